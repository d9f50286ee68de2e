"""The commands of run/analyze.py: a new instrument is a module and its name here."""

from . import (
    attention,
    cka,
    class_probes,
    cosine_maps,
    lost,
    norms,
    patch_pca,
    prediction_changes,
    reconstruction,
    register_dynamics,
    report,
    segmentation,
    similarity,
    test_time_registers,
    token_fate,
    training,
)

# modules with `add_parser(subparsers)`, in the order of --help
COMMANDS = (
    attention,
    prediction_changes,
    cka,
    cosine_maps,
    register_dynamics,
    token_fate,
    lost,
    norms,
    patch_pca,
    reconstruction,
    class_probes,
    segmentation,
    similarity,
    training,
    test_time_registers,
    report,
)
