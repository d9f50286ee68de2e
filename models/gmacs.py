"""Multiply-adds of a model, by formula: what a schedule costs before anything runs.

Matching and merging are left out (about 1 %), as are norms, activations and biases. Real parameter shapes are used, so
every width, MLP and head counts as it is. N tokens enter a block, M leave it.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from .blocks import Costs, MergingBlock, read_out_macs
from .methods.base import Method
from .schedule import TokenPlan
from .vit import MergingViT


def gmacs(model: MergingViT, r: Any = None, img: int | tuple[int, int] | None = None, inference: bool = False) -> float:
    """Multiply-adds per image, in 1e9, as papers count them: all tokens that are left go through all blocks.

    Args:
        r: a schedule in any form of `MergeConfig.r`, or a `TokenPlan`; None is the model's own.
        img: image side(s) in pixels; None is the model's own.
        inference: count what is computed in evaluation mode, where the last block may serve the tokens alone that are
            pooled, see `MergingViT.readers`.
    """
    patches = _patches(model, img)
    plan = r if isinstance(r, TokenPlan) else model.plan(r, patches)
    macs = model.patch_embed.proj.weight.numel() * patches
    left, blocks = patches, cast(Sequence[MergingBlock], model.blocks)
    readers = model.readers(plan) if inference else None
    for block, prefix, merged in zip(blocks, model.prefixes(), plan.merges, strict=True):
        reading = readers if block is blocks[-1] else None
        macs += block_macs(block, left + prefix, left + prefix - merged, model.merge.rule, reading)
        if model.rope_mixed and left < patches:
            macs += mixed_rope_macs(block, left + prefix, patches)
        left -= merged
    return (macs + head_macs(model, left + model.num_prefix_tokens)) / 1e9


def block_macs(block: MergingBlock, tokens: int, left: int, rule: Method, readers: int | None = None) -> int:
    """Multiply-adds of a block that N tokens enter and M leave, by the place where the method merges.

    Args:
        readers: the first tokens, which alone are computed to the end; None: all.
    """
    attn, mlp = block.attn, linear_macs(block.mlp)
    out = linear_macs(attn.proj) + (0 if attn.gate is None else linear_macs(attn.gate))
    if attn.qkv is None:
        q, k, v = (linear_macs(part) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
    else:
        q = k = v = linear_macs(attn.qkv) // 3
    costs = Costs(q, k, v, out, mlp, attn.num_heads * attn.head_dim)
    if readers is not None:
        return read_out_macs(costs, tokens, readers)
    if tokens == left:
        return costs.attention(tokens) + tokens * mlp
    return rule.place().macs(costs, tokens, left)


def mixed_rope_macs(block: MergingBlock, tokens: int, patches: int) -> int:
    """Multiply-adds of the angles of N tokens of which some are merged, see `MixedPositions.angles`."""
    return tokens * patches * block.attn.num_heads * block.attn.head_dim


def linear_macs(module: nn.Module) -> int:
    """Multiply-adds per token of all linear layers of a module, also those inside adapters and quantised ones."""
    layers: list[Any] = [part for part in module.modules() if hasattr(part, "out_features")]
    # an adapter is as wide as the layer in it, and only what is inside computes
    innermost = (part for part in layers if sum(inner in layers for inner in part.modules()) == 1)
    return sum(part.in_features * part.out_features for part in innermost)


def head_macs(model: MergingViT, tokens: int) -> int:
    """Multiply-adds of the pooling and the heads, of `tokens` that the last block leaves, prefix included."""
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
