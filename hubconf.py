"""torch.hub entries: one for each of our models, `create_model` for any supported name, `MergeConfig` for what merges,
`load_folder` for what `run/export.py folder` wrote.

    merge = torch.hub.load(REPOSITORY, "MergeConfig", r=16)
    model = torch.hub.load(REPOSITORY, "deit_small", num_registers=4, merge=merge, pretrained=True)

Keywords are those of `models.create_model`. Names with an underscore are none of torch.hub's entries.
"""

from typing import Any as _Any

from models import MergeConfig as MergeConfig  # the form of an import that others may use
from models import MergingViT as _MergingViT
from models import create_model
from models.exporting import load_folder as load_folder

dependencies = ["torch", "timm"]


def deit_tiny(**options: _Any) -> _MergingViT:
    """RegToMe's deit_tiny: DeiT-Ti, 224 px."""
    return create_model("deit_tiny", **options)


def deit_small(**options: _Any) -> _MergingViT:
    """RegToMe's deit_small: DeiT-S, 224 px."""
    return create_model("deit_small", **options)


def deit_base(**options: _Any) -> _MergingViT:
    """RegToMe's deit_base: DeiT-B, 224 px."""
    return create_model("deit_base", **options)


def deit_tiny_distilled(**options: _Any) -> _MergingViT:
    """RegToMe's deit_tiny_distilled: DeiT-Ti with the distillation token."""
    return create_model("deit_tiny_distilled", **options)


def deit_small_distilled(**options: _Any) -> _MergingViT:
    """RegToMe's deit_small_distilled: DeiT-S with the distillation token."""
    return create_model("deit_small_distilled", **options)


def deit_base_distilled(**options: _Any) -> _MergingViT:
    """RegToMe's deit_base_distilled: DeiT-B with the distillation token."""
    return create_model("deit_base_distilled", **options)


def deit3_small(**options: _Any) -> _MergingViT:
    """RegToMe's deit3_small: DeiT-III-S."""
    return create_model("deit3_small", **options)


def deit3_medium(**options: _Any) -> _MergingViT:
    """RegToMe's deit3_medium: DeiT-III-M."""
    return create_model("deit3_medium", **options)


def deit3_base(**options: _Any) -> _MergingViT:
    """RegToMe's deit3_base: DeiT-III-B."""
    return create_model("deit3_base", **options)


def deit3_large(**options: _Any) -> _MergingViT:
    """RegToMe's deit3_large: DeiT-III-L."""
    return create_model("deit3_large", **options)


def deit_digits(**options: _Any) -> _MergingViT:
    """RegToMe's deit_digits: The toy: 32 px, 64 patches, 6 blocks, 10 classes."""
    return create_model("deit_digits", **options)
