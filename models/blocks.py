"""timm's transformer block with a merge in it: one function per place, no state of its own.

Shapes: B batch, N tokens in, M tokens out, n patch tokens in, P prefix tokens, C channels, H heads, D their channels.
"""

from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .criteria import attention_received, match_mctf, pooling_weight
from .merging import (
    Merge,
    compose,
    cosine_scores,
    group_map,
    match_bipartite,
    match_scores,
    max_tokens,
    merge_columns,
    merge_rows,
    merge_sizes,
    pool_rows,
    pool_tokens,
    pooling,
    unmerge,
)
from .schedule import MergeConfig


class BlockOutput(NamedTuple):
    """Tokens (B,M,C), their sizes (B,M) and the merge that led there (None: nothing merged)."""

    x: Tensor
    size: Tensor
    step: Merge | None


class Local(NamedTuple):
    """LGTM's part of a block: tokens to merge inside windows (> 0), and the window (B,n) of every patch token."""

    r: int
    windows: Tensor


def run_block(
    block: Block,
    x: Tensor,
    size: Tensor,
    prefix: int,
    r: int,
    config: MergeConfig,
    merged: bool,
    local: Local | None = None,
) -> BlockOutput:
    """One block that merges r tokens; r = 0 is timm's own block (with proportional attention once sizes differ).

    Args:
        x: (B,N,C) residual stream.
        size: (B,N) patches per token, 1 for the prefix.
        r: tokens to merge in all, local ones included.
        merged: whether an earlier block merged, so that sizes differ from 1.
        local: what merges inside windows (method lgtm).
    """
    bias = log_size(size, x) if config.prop_attn and merged else None
    if r > 0 and config.method == "mctf":
        place = {"off": merge_after_mlp, "on": merge_one_step_ahead, "precise": merge_and_attend_again}
        return place[config.one_step_ahead](block, x, size, prefix, r, config, bias)  # type: ignore[index]
    return merge_after_attention(block, x, size, prefix, r, config, bias, local)


def merge_after_attention(
    block: Block,
    x: Tensor,
    size: Tensor,
    prefix: int,
    r: int,
    config: MergeConfig,
    bias: Tensor | None,
    local: Local | None = None,
) -> BlockOutput:
    """ToMe's place (arXiv 2210.09461): tokens are compared by their keys and merge between attention and MLP."""
    attn: Any = block.attn
    y, keys, received = attend(attn, block.norm1(x), bias, r > 0 and config.pooling == "attention")
    x = x + block.drop_path1(block.ls1(y))
    del y  # and the keys below: the MLP is the peak of memory
    step = None
    if r > 0:
        weight = pooling_weight(config.pooling, size, received)  # type: ignore[arg-type]
        step = match_keys(keys, weight, r, prefix, config, local)
        x, size = pool_tokens(x, step, weight), merge_sizes(size, step)
    del keys
    return BlockOutput(mlp_residual(block, x), size, step)


def match_keys(
    keys: Tensor, weight: Tensor | None, r: int, prefix: int, config: MergeConfig, local: Local | None
) -> Merge:
    """Matching by keys (B,H,N,D): ToMe's, or LGTM's local matching and then, on what it leaves, the global one.

    LGTM (arXiv 2303.02331) is our reading, for its code was never published: in the local matching pairs stay inside a
    window, ceil(r / windows) in each; what windows cannot give is made up by the best pairs of all in the same
    matching, so that every image keeps the same number of tokens. For the global matching the keys of a group are
    pooled as its features are.
    """
    metric, two_way = mean_over_heads(keys.detach()), bool(config.bidirectional)
    if local is None:
        return match_bipartite(metric[:, prefix:], r, prefix, two_way)
    scores = cosine_scores(metric[:, prefix:], prefix)
    windows = config.local_grid**2  # type: ignore[operator]
    step = match_scores(scores, local.r, prefix, two_way, local.windows, windows)
    if local.r == r:
        return step
    metric = pool_tokens(metric, step, weight)
    return compose(step, match_bipartite(metric[:, prefix:], r - local.r, prefix, two_way))


def merge_one_step_ahead(
    block: Block, x: Tensor, size: Tensor, prefix: int, r: int, config: MergeConfig, bias: Tensor | None
) -> BlockOutput:
    """MCTF (arXiv 2403.10030): match by the attention of the block's input, merge, and attend with that same map.

    Summing the key columns of a map A over groups gives every member its group's value, and a weighted mean W of query
    rows commutes with the product, so the merged map times v is W (A unmerge(v)): no map is ever merged. Only the
    maximum of rows is not linear and needs the map itself.
    """
    attn: Any = block.attn
    attention = attention_map(attn, *project_qk(attn, block.norm1(x)), bias)
    received = attention_received(attention)
    step = match_mctf(x, size, received, r, prefix, config)
    weight = pooling_weight(config.pooling, size, received)  # type: ignore[arg-type]
    plan = None if weight is None else pooling(step, weight)
    x = max_tokens(x, step) if plan is None else pool_rows(x, plan)
    size = merge_sizes(size, step)
    y = block.norm1(x)
    v = project_v(attn, y)
    if plan is None:
        merged_map = merge_rows(merge_columns(attention, step), step)
        mixed = join_heads(attn.attn_drop(merged_map) @ split_heads(attn, v))
    else:
        spread = split_heads(attn, unmerge(v, group_map(step)))
        mixed = pool_rows(join_heads(attn.attn_drop(attention) @ spread), plan)
    del attention  # its memory serves the MLP: 4 % of the time of a small model on a CPU
    x = x + block.drop_path1(block.ls1(project_out(attn, y, mixed)))
    return BlockOutput(mlp_residual(block, x), size, step)


def merge_and_attend_again(
    block: Block, x: Tensor, size: Tensor, prefix: int, r: int, config: MergeConfig, bias: Tensor | None
) -> BlockOutput:
    """MCTF, precise: match by the attention of the block's input, merge, and attend anew."""
    attn: Any = block.attn
    with torch.no_grad():
        received = attention_received(attention_map(attn, *project_qk(attn, block.norm1(x)), bias))
        step = match_mctf(x, size, received, r, prefix, config)
        weight = pooling_weight(config.pooling, size, received)  # type: ignore[arg-type]
    x, size = pool_tokens(x, step, weight), merge_sizes(size, step)
    bias = log_size(size, x) if config.prop_attn else None
    x = x + block.drop_path1(block.ls1(attend(attn, block.norm1(x), bias)[0]))
    return BlockOutput(mlp_residual(block, x), size, step)


def merge_after_mlp(
    block: Block, x: Tensor, size: Tensor, prefix: int, r: int, config: MergeConfig, bias: Tensor | None
) -> BlockOutput:
    """MCTF without looking ahead: an ordinary block, whose output merges by that block's attention."""
    attn: Any = block.attn
    y, _, received = attend(attn, block.norm1(x), bias, True)
    x = mlp_residual(block, x + block.drop_path1(block.ls1(y)))
    step = match_mctf(x, size, received, r, prefix, config)  # type: ignore[arg-type]
    weight = pooling_weight(config.pooling, size, received)  # type: ignore[arg-type]
    return BlockOutput(pool_tokens(x, step, weight), merge_sizes(size, step), step)


def mlp_residual(block: Block, x: Tensor) -> Tensor:
    """The second half of a block."""
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def attend(
    attn: Attention, x: Tensor, bias: Tensor | None = None, with_received: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """timm's attention with an additive key bias (B,1,1,N), never expanded to N x N.

    Also returns the keys (B,H,N,D) and, if asked for, the attention received (B,N), which needs the map.
    """
    q, k, v = project_qkv(attn, x)
    if not with_received:
        return project_out(attn, x, join_heads(attention_product(attn, q, k, v, bias))), k, None
    attention = attention_map(attn, q, k, bias)
    y = project_out(attn, x, join_heads(attn.attn_drop(attention) @ v))
    return y, k, attention_received(attention)


def mean_over_heads(x: Tensor) -> Tensor:
    """(B,H,N,D) -> (B,N,D) in fp32. Head by head, for a CPU's strided mean takes two to three times as long."""
    return reduce(torch.add, x.float().unbind(1)) / x.shape[1]


def project_qkv(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B,N,C) -> q, k, v (B,H,N,D), normed where the model does."""
    q, k, v = _by_heads(attn, attn.qkv(x))
    return attn.q_norm(q), attn.k_norm(k), v


def project_qk(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    """The first two of `project_qkv` alone."""
    q, k = _by_heads(attn, _linear_rows(attn.qkv, x, slice(0, 2 * attn.attn_dim)))
    return attn.q_norm(q), attn.k_norm(k)


def project_v(attn: Attention, x: Tensor) -> Tensor:
    """The third one, with heads joined: (B,N,C) -> (B,N,H*D)."""
    return _linear_rows(attn.qkv, x, slice(2 * attn.attn_dim, None))


def _linear_rows(linear: nn.Linear, x: Tensor, rows: slice) -> Tensor:
    return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def _by_heads(attn: Attention, x: Tensor) -> tuple[Tensor, ...]:
    """(B,N,k*H*D) -> k times (B,H,N,D)."""
    return x.unflatten(2, (-1, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def split_heads(attn: Attention, x: Tensor) -> Tensor:
    """(B,N,H*D) -> (B,H,N,D)."""
    return x.unflatten(2, (attn.num_heads, attn.head_dim)).transpose(1, 2)


def join_heads(y: Tensor) -> Tensor:
    """(B,H,N,D) -> (B,N,H*D)."""
    return y.transpose(1, 2).flatten(2)


def attention_product(attn: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T * scale + bias) v, fused where timm would fuse: (B,H,N,D)."""
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return attn.attn_drop(attention_map(attn, q, k, bias)) @ v


def attention_map(attn: Attention, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """The plain map softmax(q k^T * scale + bias): (B,H,N,N)."""
    logits = (q * attn.scale) @ k.transpose(-2, -1)
    if bias is not None:
        logits += bias  # in place: another N x N map costs more than the sum
    return logits.softmax(dim=-1)


def project_out(attn: Attention, x: Tensor, y: Tensor) -> Tensor:
    """Joined heads (B,N,H*D) back to the residual stream (B,N,C); x is the attention's input (a gate reads it)."""
    y = attn.norm(y)
    if attn.gate is not None:
        y = y * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y))


def log_size(size: Tensor, like: Tensor) -> Tensor:
    """Proportional attention's key bias: a token that stands for s patches counts s times. (B,N) -> (B,1,1,N)."""
    return size.log().to(like.dtype)[:, None, None, :]
