"""Multiply-adds of a model, by formula: what a schedule costs before anything runs.

Matching and merging are left out (about 1 %), as are norms, activations and biases. Real parameter shapes are used, so
every width, MLP and head counts as it is. N tokens enter a block, M leave it.
"""

import math
from collections.abc import Iterable
from typing import Any, cast

from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn

from .schedule import MergeConfig, TokenPlan
from .vit import MergingViT


def gmacs(model: MergingViT, r: Any = None, img: int | tuple[int, int] | None = None) -> float:
    """Multiply-adds per image, in 1e9.

    Args:
        r: a schedule in any form of `MergeConfig.r`, or a `TokenPlan`; None is the model's own.
        img: image side(s) in pixels; None is the model's own.
    """
    patches = _patches(model, img)
    plan = r if isinstance(r, TokenPlan) else model.plan(r, patches)
    macs = model.patch_embed.proj.weight.numel() * patches
    left, blocks = patches, cast(Iterable[Block], model.blocks)
    for block, prefix, merged in zip(blocks, model.prefixes(), plan.merges, strict=True):
        macs += block_macs(block, left + prefix, left + prefix - merged, model.merge)
        left -= merged
    return (macs + _head_macs(model, left + model.num_prefix_tokens)) / 1e9


def block_macs(block: Block, tokens: int, left: int, config: MergeConfig) -> int:
    """Multiply-adds of a block that N tokens enter and M leave, by the place where the method merges."""
    attn: Any = block.attn
    mlp = linear_macs(block.mlp)
    if config.method != "mctf" or tokens == left:
        return attention_macs(attn, tokens) + left * mlp
    look = tokens * 2 * _per_part(attn) + tokens**2 * attn.attn_dim  # q, k and the map
    product = tokens**2 * attn.attn_dim
    return {
        "off": attention_macs(attn, tokens) + tokens * mlp,
        "on": look + left * _per_part(attn) + product + left * _out(attn) + left * mlp,
        "precise": look + attention_macs(attn, left) + left * mlp,
    }[config.one_step_ahead]  # type: ignore[index]


def attention_macs(attn: Attention, tokens: int) -> int:
    """A whole attention layer: q, k, v, map, product, projection."""
    return tokens * (3 * _per_part(attn) + _out(attn)) + 2 * tokens**2 * attn.attn_dim


def linear_macs(module: nn.Module) -> int:
    """Multiply-adds per token of all linear layers of a module."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _per_part(attn: Attention) -> int:
    return attn.qkv.weight.numel() // 3


def _out(attn: Attention) -> int:
    return attn.proj.weight.numel() + (0 if attn.gate is None else attn.gate.weight.numel())


def _head_macs(model: MergingViT, tokens: int) -> int:
    macs = linear_macs(model.head) + (linear_macs(model.head_dist) if model.head_dist is not None else 0)
    if model.attn_pool is None:
        return macs
    pool = model.attn_pool  # one latent query: keys and values of every token, the rest once per latent
    keys, latents = pool.kv.weight.numel() * tokens, pool.latent_len
    return macs + keys + latents * (linear_macs(pool) - pool.kv.weight.numel() + 2 * tokens * pool.kv.in_features)


def _patches(model: MergingViT, img: int | tuple[int, int] | None) -> int:
    if img is None:
        return model.patch_embed.num_patches
    return math.prod(model.patch_embed.dynamic_feat_size((img, img) if isinstance(img, int) else img))
