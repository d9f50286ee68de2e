"""Checks of what a model is asked to be built with, before timm builds it."""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from .errors import UserError
from .schedule import is_int

VIT_KEYWORDS = tuple(name for name in inspect.signature(VisionTransformer.__init__).parameters if name != "self")
EVA_KEYWORDS = tuple(name for name in inspect.signature(Eva.__init__).parameters if name != "self")
# timm's -> those of MergingViT
_RENAMED = {
    "img_size": "image_size",
    "embed_dim": "dim",
    "num_heads": "heads",
    "mlp_ratio": "mlp_dim",
    "reg_tokens": "num_registers",
}
_CONSTRUCTOR = (*_RENAMED.values(), "patch_size", "num_classes", "depth", "r", "merge", "distilled")
_CONSTRUCTOR += ("register_layer", "class_layer")


_WINDOWS = "attention in windows needs a regular grid, and merging takes that away"
_NORMED_SUMS = "a block that norms what it adds to the tokens needs a place to merge of its own"
# What modules of timm would need in order to be served, by a part of their names
_UNSERVED = {
    "postnorm": _NORMED_SUMS,
    "respost": _NORMED_SUMS,
    "parallel": "attention and MLP add to the same tokens, so that there is no place between them to merge",
    "naflex": "images of all sizes share a sequence and a mask, which a merge would have to know",
    "swin": _WINDOWS,
    "sam": _WINDOWS,
    "hiera": _WINDOWS,
    "maxxvit": _WINDOWS,
    "beit": "a table of relative positions is added to the attention map, and merging would have to average it",
}


def unserved(name: str) -> str:
    """What a module of timm would need in order to be served, in brackets; nothing where that is not known."""
    return next((f" ({need})" for part, need in _UNSERVED.items() if part in name.lower()), "")


def check_constructor_keywords(vit: dict[str, Any]) -> None:
    """Raise a UserError for a keyword that MergingViT passes on and timm's VisionTransformer does not have."""
    for name in vit:
        if name in _RENAMED:
            raise UserError(f"MergingViT has no {name}; write {_RENAMED[name]}")
        check_keyword("MergingViT", name, [*_CONSTRUCTOR, *(known for known in VIT_KEYWORDS if known not in _RENAMED)])


def check_keyword(of: str, name: str, known: Sequence[str], base: str = "VisionTransformer") -> None:
    """Raise a UserError, with the nearest known ones, for a keyword that nobody knows.

    Args:
        base: timm's class, whose keywords are among the known ones.
    """
    if name in known:
        return
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"beside its own it takes those of timm's {base}"
    raise UserError(f"{of} has no keyword {name}; {hint}")


def check_image_size(name: str, image_size: Any, patch_size: Any) -> None:
    """Raise a UserError for sides that are no pixels, or that do not divide into patches: timm would drop the rest."""
    sides, patches = _sides(name, image_size), _sides("patch_size", patch_size)
    if any(side % patch for side, patch in zip(sides, patches, strict=True)):
        patch = patches[0] if patches[0] == patches[1] else patches
        raise UserError(f"{name} {image_size} is not a multiple of the patches of {patch} pixels")


def _sides(name: str, size: Any) -> tuple[int, int]:
    """Height and width of a number of pixels, or of two."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(is_int(side) and side > 0 for side in sides):
        raise UserError(f"{name} must be a number of pixels > 0, or (height, width), not {size!r}")
    return sides
