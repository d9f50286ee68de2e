"""A merge is a map from tokens to groups: match -> `Merge` -> merge, un-merge, compose.

Shapes: B batch, N tokens, P prefix tokens (class, distillation, registers), n = N - P patch tokens, C channels,
r tokens merged, M = N - r tokens left. Prefix tokens are set aside: never a source, never a destination.
Output order: prefix, surviving sources in their old order, destinations.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Merge(NamedTuple):
    """One merge step, in indices over all tokens.

    Output token j starts as input token keep[:, j]; input token source[:, i] joins output token into[:, i].
    This holds the same information as the group map (B,N) but touches only r tokens when it is applied.
    """

    keep: Tensor  # (B,M) in [0,N)
    source: Tensor  # (B,r) in [0,N)
    into: Tensor  # (B,r) in [0,M)


def match_bipartite(metric: Tensor, r: int, prefix: int) -> Merge:
    """Bipartite soft matching (ToMe, arXiv 2210.09461): every source proposes its best destination, the r best merge.

    Args:
        metric: (B,n,D) what patch tokens are compared by (cosine), without the prefix; compared in fp32.
        r: pairs to merge, 0 < r <= n // 2.
        prefix: P; a token is a source if its absolute position P + index is even.
    """
    with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
        metric = F.normalize(metric.float(), dim=-1)
        sources, destinations = split_sets(metric, prefix)
        best, choice = (sources @ destinations.transpose(1, 2)).max(dim=-1)
        order = best.argsort(dim=-1, descending=True)
        merged, survivors = order[:, :r], order[:, r:].sort(dim=-1).values
        return _one_way(merged, survivors, choice.gather(1, merged), destinations.shape[1], prefix)


def split_sets(x: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Patch tokens (B,n,...) as (sources, destinations), alternating by the parity of P + index."""
    first = prefix % 2
    return x[:, first::2], x[:, 1 - first :: 2]


def _one_way(merged: Tensor, survivors: Tensor, choice: Tensor, n_destinations: int, prefix: int) -> Merge:
    """Ranks within the two sets -> positions among all tokens."""
    batch, kept = survivors.shape
    first, device = prefix % 2, survivors.device
    head = torch.arange(prefix, device=device).expand(batch, -1)
    tail = (torch.arange(n_destinations, device=device) * 2 + (1 - first + prefix)).expand(batch, -1)
    keep = torch.cat((head, survivors * 2 + (first + prefix), tail), dim=1)
    return Merge(keep, merged * 2 + (first + prefix), choice + (prefix + kept))


def merge_tokens(x: Tensor, step: Merge, weight: Tensor) -> Tensor:
    """Weighted mean of every group: (B,N,C) -> (B,M,C), weight (B,N) > 0.

    Written as x_rep + sum_i w_i / W * (x_i - x_rep), which is the same mean but copies each surviving row once and
    computes on the r merged rows only.
    """
    batch, tokens, channels = x.shape
    left = step.keep.shape[1]
    flat = x.reshape(batch * tokens, channels)
    source, into = _flat(step.source, tokens), _flat(step.into, left)
    out = flat.index_select(0, _flat(step.keep, tokens))
    moved = weight.gather(1, step.source)
    share = moved / merge_sizes(weight, step).gather(1, step.into)
    delta = flat.index_select(0, source) - out.index_select(0, into)
    out.index_add_(0, into, delta * share.reshape(-1, 1).to(x.dtype))
    return out.view(batch, left, channels)


def merge_sizes(size: Tensor, step: Merge) -> Tensor:
    """Sum over every group: (B,N) -> (B,M)."""
    return size.gather(1, step.keep).scatter_add(1, step.into, size.gather(1, step.source))


def group_map(step: Merge) -> Tensor:
    """The map itself: (B,N) with values in [0,M)."""
    batch, left = step.keep.shape
    ranks = torch.arange(left, device=step.keep.device).expand(batch, -1)
    group = torch.empty(batch, left + step.into.shape[1], dtype=torch.long, device=step.keep.device)
    return group.scatter(1, step.keep, ranks).scatter(1, step.source, step.into)


def merge_by_map(x: Tensor, group: Tensor, groups: int, weight: Tensor | None = None) -> Tensor:
    """Weighted mean over groups from any group map, plainly: (B,N,C), (B,N) -> (B,groups,C).

    The plain path beside `merge_tokens`, and the one for maps composed over several blocks.
    """
    weight = torch.ones_like(group, dtype=x.dtype) if weight is None else weight.to(x.dtype)
    total = x.new_zeros(x.shape[0], groups).scatter_add(1, group, weight)
    index = group.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    summed = x.new_zeros(x.shape[0], groups, x.shape[-1]).scatter_add(1, index, x * weight.unsqueeze(-1))
    return summed / total.unsqueeze(-1)


def unmerge(x: Tensor, group: Tensor) -> Tensor:
    """Give every member its group's value: (B,M,C) by (B,N) -> (B,N,C). Inverts any merge, also composed ones.

    For a dense map of the patches: `unmerge(out.tokens[:, prefix:], out.group)`, with prefix = M - (tokens that are
    patches) = `model.num_prefix_tokens`.
    """
    return x.gather(1, group.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _flat(index: Tensor, tokens: int) -> Tensor:
    """Per-image row numbers (B,k) -> row numbers of the flattened (B*tokens) batch."""
    offset = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * tokens
    return (index + offset).reshape(-1)
