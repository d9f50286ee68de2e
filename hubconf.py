"""torch.hub entries: one for each of our models, `create_model` for any supported name, `MergeConfig` for what merges,
`load_folder` for what `run/export.py folder` wrote.

    merge = torch.hub.load(REPOSITORY, "MergeConfig", r=16)
    model = torch.hub.load(REPOSITORY, "deit_small", num_registers=4, merge=merge, pretrained=True)

Keywords are those of `models.create_model`. torch.hub lists every function here.
"""

from models import MergeConfig, create_model
from models.export import load_folder
from models.registry import (
    deit3_base,
    deit3_large,
    deit3_medium,
    deit3_small,
    deit_base,
    deit_base_distilled,
    deit_digits,
    deit_small,
    deit_small_distilled,
    deit_tiny,
    deit_tiny_distilled,
    dinov3_base,
    dinov3_large,
    dinov3_small,
)

dependencies = ["torch", "timm"]
__all__ = [
    "MergeConfig",
    "create_model",
    "deit3_base",
    "deit3_large",
    "deit3_medium",
    "deit3_small",
    "deit_base",
    "deit_base_distilled",
    "deit_digits",
    "deit_small",
    "deit_small_distilled",
    "deit_tiny",
    "deit_tiny_distilled",
    "dependencies",
    "dinov3_base",
    "dinov3_large",
    "dinov3_small",
    "load_folder",
]
