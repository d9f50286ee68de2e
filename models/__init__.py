"""RegToMe's models: `create_model`, `apply_merging`, `MergingViT`, `MergeConfig`."""

from models.errors import UserError
from models.merging import merge_by_map, unmerge
from models.registry import create_model
from models.schedule import MergeConfig
from models.vit import MergeOutput, MergingViT, apply_merging

__all__ = ["MergeConfig", "MergeOutput", "MergingViT", "UserError", "apply_merging", "create_model"]
__all__ += ["merge_by_map", "unmerge"]
