"""The commands of run/analyze.py: a new instrument is a module and its name here."""

from . import (
    attention,
    cka,
    class_probes,
    lost,
    norms,
    reconstruction,
    register_dynamics,
    report,
    similarity,
    test_time_registers,
)

# modules with `add_parser(subparsers)`, in the order of --help
COMMANDS = (
    attention,
    cka,
    register_dynamics,
    lost,
    norms,
    reconstruction,
    class_probes,
    report,
    similarity,
    test_time_registers,
)
