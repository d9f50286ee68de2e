"""RegToMe's models: `create_model`, `apply_merging`, `MergingViT`, `MergeConfig`."""

from . import export as export  # makes saved models known to timm
from .config import MergeConfig
from .errors import UserError
from .merging import merge_by_map, unmerge
from .registry import create_model
from .vit import MergeOutput, MergingViT, apply_merging

__version__ = "0.2.0"

__all__ = ["MergeConfig", "MergeOutput", "MergingViT", "UserError", "apply_merging", "create_model"]
__all__ += ["merge_by_map", "unmerge"]
