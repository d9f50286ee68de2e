"""Tiny models of timm's Eva, one for each form of attention, position, MLP and pooling that its 65 names have."""

from typing import Any

import pytest
from timm.layers import RmsNorm
from timm.models.eva import Eva
from tiny import SIZES, randomise

from models import MergeConfig, MergingViT, apply_merging

ROPE: dict[str, Any] = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}
DINOV3 = ROPE | {
    "rope_type": "dinov3",
    "rope_rotate_half": True,
    "rope_temperature": 100.0,
    "dynamic_img_size": True,
    "num_reg_tokens": 4,
    "init_values": 1e-5,
}
ROPE_VIT = ROPE | {"attn_type": "rope", "init_values": 1e-5, "global_pool": "token", "rope_grid_indexing": "xy"}
FAMILIES: dict[str, dict[str, Any]] = {
    "dinov3": DINOV3,
    "dinov3-swiglu": DINOV3 | {"swiglu_mlp": True, "swiglu_align_to": 8, "qkv_bias": False, "global_pool": "token"},
    "eva02": {"use_rot_pos_emb": True, "ref_feat_shape": 3, "swiglu_mlp": True, "scale_mlp": True},
    "eva02-apart": {
        "use_rot_pos_emb": True,
        "ref_feat_shape": 3,
        "swiglu_mlp": True,
        "qkv_fused": False,
        "scale_attn_inner": True,
    },
    "eva-giant": {},
    "rope-reg-gap": ROPE | {"num_reg_tokens": 4, "class_token": False, "init_values": 1e-5},
    "rope-vit": ROPE_VIT | {"rope_temperature": 100.0},
    "rope-vit-mixed": ROPE_VIT | {"rope_type": "mixed", "rope_temperature": 10.0},
    "rope-vit-mixed-ape": ROPE_VIT
    | {"rope_type": "mixed", "rope_temperature": 10.0, "use_abs_pos_emb": True, "no_embed_class": True},
    "pe": {
        "attn_type": "rope",
        "use_rot_pos_emb": True,
        "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy",
        "use_pre_transformer_norm": True,
        "global_pool": "map",
        "attn_pool_num_heads": 2,
    },
    "sapiens2": DINOV3
    | {
        "attn_type": "rope",
        "num_heads": 6,
        "num_kv_heads": (6, 2, 6),
        "qk_norm": True,
        "qkv_fused": False,
        "attn_only_layer_scale": True,
        "swiglu_mlp": True,
        "num_reg_tokens": 8,
        "global_pool": "token",
        "norm_layer": RmsNorm,
        "img_size": (40, 24),
    },
    "mrope": ROPE | {"rope_type": "mrope", "rope_mrope_section": (1, 2, 2)},
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def timm_eva(family: str, **options: Any) -> Any:
    """timm's own model, in evaluation mode."""
    return randomise(Eva(**(SIZES | FAMILIES[family] | options))).eval()


def merging_eva(family: str, merge: MergeConfig | None = None, **options: Any) -> MergingViT:
    """A merging model on `timm_eva`; options of `apply_merging` go there."""
    names = ("num_registers", "register_layer", "class_layer")
    own = {name: options.pop(name) for name in names if name in options}
    model = apply_merging(timm_eva(family, **options), merge or MergeConfig(), **own)
    return randomise(model).eval()
