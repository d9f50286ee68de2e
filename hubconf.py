"""torch.hub entries: one for each of our models, `create_model` for any supported name, `MergeConfig` for what merges,
`load_folder` for what `run/export.py folder` wrote.

    merge = torch.hub.load(REPOSITORY, "MergeConfig", r=16)
    model = torch.hub.load(REPOSITORY, "deit_small", num_registers=4, merge=merge, pretrained=True)

Keywords are those of `models.create_model`.
"""

from models import MergeConfig
from models.exporting import load_folder
from models.registry import ENTRY_POINTS as _ENTRY_POINTS
from models.registry import create_model

dependencies = ["torch", "timm"]
globals().update(_ENTRY_POINTS)

__all__ = ["MergeConfig", "create_model", "dependencies", "load_folder"]
