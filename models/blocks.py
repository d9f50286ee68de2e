"""timm's transformer block with a merge in it: one function per place, no state of its own.

Shapes: B batch, N tokens, P prefix tokens, C channels, H heads, D channels of a head.
"""

from typing import NamedTuple

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

from models.merging import Merge, match_bipartite, merge_sizes, merge_tokens
from models.schedule import MergeConfig


class BlockOutput(NamedTuple):
    """Tokens (B,M,C), their sizes (B,M) and the merge that led there (None: nothing merged)."""

    x: Tensor
    size: Tensor
    step: Merge | None


def run_block(
    block: Block, x: Tensor, size: Tensor, prefix: int, r: int, config: MergeConfig, merged: bool
) -> BlockOutput:
    """One block that merges r tokens; r = 0 is timm's own block (with proportional attention once sizes differ).

    Args:
        x: (B,N,C) residual stream.
        size: (B,N) patches per token, 1 for the prefix.
        merged: whether an earlier block merged, so that sizes differ from 1.
    """
    bias = log_size(size, x) if config.prop_attn and merged else None
    return merge_after_attention(block, x, size, prefix, r, bias)


def merge_after_attention(
    block: Block, x: Tensor, size: Tensor, prefix: int, r: int, bias: Tensor | None
) -> BlockOutput:
    """ToMe's place (arXiv 2210.09461): tokens are compared by their keys and merge between attention and MLP."""
    y, keys = attend(block.attn, block.norm1(x), bias)
    x = x + block.drop_path1(block.ls1(y))
    step = None
    if r > 0:
        step = match_bipartite(keys.mean(dim=1)[:, prefix:], r, prefix)
        x, size = merge_tokens(x, step, size), merge_sizes(size, step)
    x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return BlockOutput(x, size, step)


def attend(attn: Attention, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """timm's attention with an additive key bias (B,1,1,N), never expanded to N x N; also returns keys (B,H,N,D)."""
    q, k, v = project_qkv(attn, x)
    return project_out(attn, x, attention_product(attn, q, k, v, bias)), k


def project_qkv(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B,N,C) -> q, k, v (B,H,N,D), normed where the model does."""
    batch, tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def attention_product(attn: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T * scale + bias) v, fused where timm would fuse: (B,H,N,D)."""
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return attn.attn_drop(attention_map(attn, q, k, bias)) @ v


def attention_map(attn: Attention, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """The plain map softmax(q k^T * scale + bias): (B,H,N,N)."""
    logits = (q * attn.scale) @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(dim=-1)


def project_out(attn: Attention, x: Tensor, y: Tensor) -> Tensor:
    """Heads (B,H,N,D) back to the residual stream (B,N,C); x is the attention's input (a gate reads it)."""
    y = attn.norm(y.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        y = y * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y))


def log_size(size: Tensor, like: Tensor) -> Tensor:
    """Proportional attention's key bias: a token that stands for s patches counts s times. (B,N) -> (B,1,1,N)."""
    return size.log().to(like.dtype)[:, None, None, :]
