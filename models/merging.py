"""A merge is a map from tokens to groups: match -> `Merge` -> merge, un-merge, compose.

Shapes: B batch, N tokens, P prefix tokens (class, distillation, registers), n = N - P patch tokens, C channels,
r tokens merged, M = N - r tokens left, S sources, D destinations. Prefix tokens are set aside: never a source, never a
destination. Output order: prefix, surviving sources in their old order, destinations (one way: in their old order,
both ways: by descending second-round score).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Merge(NamedTuple):
    """A merge, in indices over all tokens.

    Output token j starts as input token keep[:, j]; input token source[:, i] joins output token into[:, i].
    This holds the same information as the group map (B,N) but touches only r tokens when it is applied. What took two
    hops (matching both ways, two merges in one block) is flattened: `into` is always the final slot.
    """

    keep: Tensor  # (B,M) in [0,N)
    source: Tensor  # (B,r) in [0,N)
    into: Tensor  # (B,r) in [0,M)


class Windows(NamedTuple):
    """The windows that pairs must stay in: of proposers (B,S) and of their choices (B,D), in [0, total)."""

    proposers: Tensor
    choices: Tensor
    total: int


def match_bipartite(metric: Tensor, r: int, num_prefix_tokens: int, bidirectional: bool = False) -> Merge:
    """Bipartite soft matching (ToMe, arXiv 2210.09461): every source proposes its best destination, the r best merge.

    Args:
        metric: (B,n,D) what patch tokens are compared by (cosine), without the prefix; compared in fp32.
        r: pairs to merge, 0 < r <= n // 2.
        num_prefix_tokens: P; a token is a source if its absolute position P + index is even.
        bidirectional: see `match_scores`.
    """
    return match_scores(cosine_scores(metric, num_prefix_tokens), r, num_prefix_tokens, bidirectional)


def cosine_scores(metric: Tensor, num_prefix_tokens: int) -> Tensor:
    """Cosine of every source with every destination in fp32: (B,n,D) -> (B,S,D)."""
    with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
        metric = metric.float()
        length = torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min(1e-12)
        sources, destinations = split_sets(metric / length, num_prefix_tokens)
        return sources @ destinations.transpose(1, 2)


@torch.no_grad()
def match_scores(
    scores: Tensor,
    r: int,
    num_prefix_tokens: int,
    bidirectional: bool = False,
    windows: Tensor | None = None,
    window_count: int = 1,
) -> Merge:
    """The r best pairs of a table of scores.

    Args:
        scores: (B,S,D) of every source with every destination.
        r: pairs to merge, 0 < r <= n // 2.
        bidirectional: r // 2 sources merge into destinations, then r - r // 2 destinations into sources that survived,
            by the same scores; a destination carries along what merged into it (MCTF, arXiv 2403.10030).
        windows: (B,n) window of every patch token, in [0, window_count): pairs stay inside one, see `propose_inside`.
    """
    sets = None if windows is None else Windows(*split_sets(windows, num_prefix_tokens), window_count)
    first_round = r // 2 if bidirectional else r
    order, choice = propose(scores, first_round, sets)
    merged, survivors = order[:, :first_round], order[:, first_round:].sort(dim=-1).values
    if not bidirectional:
        return _one_round(merged, survivors, choice, scores.shape[2], num_prefix_tokens)
    left = unmerge(scores, survivors).transpose(1, 2)
    if sets is not None:
        sets = Windows(sets.choices, sets.proposers.gather(1, survivors), window_count)
    second_round = r - first_round
    order, second_choice = propose(left, second_round, sets)
    return _two_rounds(merged, survivors, choice, order, second_choice, second_round, num_prefix_tokens)


def propose(scores: Tensor, r: int, windows: Windows | None = None) -> tuple[Tensor, Tensor]:
    """Every proposer's best pair: proposers (B,S) from best to worst, and the choices (B,r) of the first r.

    Choices are looked up for those r alone: an argmax takes several times as long as a maximum on a CPU.
    """
    if windows is not None:
        return propose_inside(scores, r, windows)
    order = scores.amax(dim=-1).argsort(dim=-1, descending=True)
    rows = order[:, :r].unsqueeze(-1).expand(-1, -1, scores.shape[2])
    return order, scores.gather(1, rows).argmax(dim=-1)


def propose_inside(scores: Tensor, r: int, windows: Windows) -> tuple[Tensor, Tensor]:
    """`propose` with ceil(r / windows) pairs of every window in front; the best pairs of all make up what is short.

    The number of pairs that a window can give differs between images, the shapes here must not. So every proposer has
    one score: its best pair inside its window if that is among the window's quota ("local"), else its best pair of all.
    Sorting by score and then, stably, by local puts the locals in front, and the best of the others behind them.
    """
    apart = windows.proposers.unsqueeze(2) != windows.choices.unsqueeze(1)
    best, choice = scores.masked_fill(apart, -torch.inf).max(dim=-1)
    quota = -(-r // windows.total)
    local = (rank_inside(best, windows.proposers, windows.total) < quota) & (best > -torch.inf)
    best_of_all, choice_of_all = scores.max(dim=-1)
    order = torch.where(local, best, best_of_all).argsort(dim=-1, descending=True)
    locals_first = local.gather(1, order).int().argsort(dim=-1, descending=True, stable=True)
    order = order.gather(1, locals_first)
    return order, torch.where(local, choice, choice_of_all).gather(1, order[:, :r])


def rank_inside(best: Tensor, window: Tensor, count: int) -> Tensor:
    """The rank of every proposer inside its window, 0 for the best: (B,S), (B,S) -> (B,S)."""
    order = best.argsort(dim=-1, descending=True)
    members = window.gather(1, order).unsqueeze(-1) == torch.arange(count, device=window.device)
    ranks = (members.cumsum(dim=1) * members).sum(dim=-1) - 1
    return torch.empty_like(ranks).scatter(1, order, ranks)


def split_sets(x: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Patch tokens (B,n,...) as (sources, destinations), alternating by the parity of P + index."""
    first = num_prefix_tokens % 2
    return x[:, first::2], x[:, 1 - first :: 2]


def _one_round(merged: Tensor, survivors: Tensor, choice: Tensor, n_destinations: int, num_prefix_tokens: int) -> Merge:
    """Indices within the two sets -> positions among all tokens.

    With P = 1, six patches and sources at even positions (the token at position p is written as p):

        position      0  |  1  2  3  4  5  6
        set        prefix|  D  S  D  S  D  S       sources have ranks 0 1 2 (positions 2 4 6), destinations 1 3 5
        source 4 merges into destination 1:
        slot          0  |  1  2  |  3  4  5
        keep          0  |  2  6  |  1  3  5       prefix, surviving sources, destinations
        into                                       of source 4: slot 3 = P + survivors + its choice (rank 0)
    """
    batch, kept = survivors.shape
    device = survivors.device
    source, destination = _first_positions(num_prefix_tokens)
    prefix = torch.arange(num_prefix_tokens, device=device).expand(batch, -1)
    destinations = (torch.arange(n_destinations, device=device) * 2 + destination).expand(batch, -1)
    keep = torch.cat((prefix, survivors * 2 + source, destinations), dim=1)
    return Merge(keep, merged * 2 + source, choice + (num_prefix_tokens + kept))


def _two_rounds(
    merged: Tensor,
    survivors: Tensor,
    choice: Tensor,
    order: Tensor,
    second_choice: Tensor,
    r: int,
    num_prefix_tokens: int,
) -> Merge:
    """As `_one_round`, where in a second round the first r destinations of `order` merge into surviving sources.

    Slots after both rounds, with k surviving sources and T destinations:

        slot     0 .. P-1 | P .. P+k-1        | P+k .. P+k+T-r-1
        token    prefix   | surviving sources | order[r:], the destinations that stay, best second-round score first

    A destination has the slot of the survivor that it merges into (`order[:r]`), or one of its own (`order[r:]`). A
    source of the first round goes where its destination goes, so its slot is looked up there: two hops become one.
    """
    batch, kept = survivors.shape
    source, destination = _first_positions(num_prefix_tokens)
    prefix = torch.arange(num_prefix_tokens, device=order.device).expand(batch, -1)
    moved, stay = order[:, :r], order[:, r:]
    keep = torch.cat((prefix, survivors * 2 + source, stay * 2 + destination), dim=1)
    own_slots = torch.arange(num_prefix_tokens + kept, keep.shape[1], device=order.device).expand(batch, -1)
    moved_slots = second_choice + num_prefix_tokens
    slot_of_destination = torch.empty_like(order).scatter(1, order, torch.cat((moved_slots, own_slots), dim=1))
    into = torch.cat((slot_of_destination.gather(1, choice), moved_slots), dim=1)
    return Merge(keep, torch.cat((merged * 2 + source, moved * 2 + destination), dim=1), into)


def _first_positions(num_prefix_tokens: int) -> tuple[int, int]:
    """Positions of the first source and the first destination: a token is a source where its position is even."""
    odd = num_prefix_tokens % 2
    return num_prefix_tokens + odd, num_prefix_tokens + 1 - odd


def compose(first: Merge, second: Merge) -> Merge:
    """Two merges, one after the other, as one."""
    into = group_map(second).gather(1, first.into)
    source = torch.cat((first.source, first.keep.gather(1, second.source)), dim=1)
    return Merge(first.keep.gather(1, second.keep), source, torch.cat((into, second.into), dim=1))


def pool_tokens(x: Tensor, merge: Merge, weight: Tensor | None) -> Tensor:
    """Pool every group into one token, (B,N,C) -> (B,M,C): the mean by weight (B,N), without a weight the maximum."""
    return max_tokens(x, merge) if weight is None else merge_tokens(x, merge, weight)


def max_tokens(x: Tensor, merge: Merge) -> Tensor:
    """Elementwise maximum of every group: (B,N,C) -> (B,M,C)."""
    keep, source, into = (index.unsqueeze(-1).expand(-1, -1, x.shape[-1]) for index in merge)
    return x.gather(1, keep).scatter_reduce(1, into, x.gather(1, source), "amax")


def merge_columns(attention: Tensor, merge: Merge) -> Tensor:
    """Sum the key columns of every group: (B,H,N,N) -> (B,H,N,M)."""
    keep, source, into = (index[:, None, None].expand(*attention.shape[:3], -1) for index in merge)
    return attention.gather(3, keep).scatter_add(3, into, attention.gather(3, source))


def merge_rows(attention: Tensor, merge: Merge) -> Tensor:
    """Elementwise maximum of the query rows of every group: (B,H,N,M) -> (B,H,M,M)."""
    heads, columns = attention.shape[1], attention.shape[3]
    keep, source, into = (index[:, None, :, None].expand(-1, heads, -1, columns) for index in merge)
    return attention.gather(2, keep).scatter_reduce(2, into, attention.gather(2, source), "amax")


class PoolIndex(NamedTuple):
    """A weighted mean over the groups of a merge, in rows of the flattened batch: computed once, for any tensor."""

    keep: Tensor  # (B*M,) in [0,B*N)
    source: Tensor  # (B*r,) in [0,B*N)
    into: Tensor  # (B*r,) in [0,B*M)
    share: Tensor  # (B*r,1) weight of a source in that of its group
    left: int  # M


def build_pool_index(merge: Merge, weight: Tensor) -> PoolIndex:
    """Precompute flat row numbers, and each source's share of its group, for a mean by weight (B,N) > 0."""
    tokens, left = weight.shape[1], merge.keep.shape[1]
    share = weight.gather(1, merge.source) / merge_sizes(weight, merge).gather(1, merge.into)
    keep, source, into = _flat(merge.keep, tokens), _flat(merge.source, tokens), _flat(merge.into, left)
    return PoolIndex(keep, source, into, share.reshape(-1, 1), left)


def pool_rows(x: Tensor, pool: PoolIndex) -> Tensor:
    """Weighted mean of every group: (B,N,C) -> (B,M,C).

    Written as x_rep + sum_i w_i / W * (x_i - x_rep), which is the same mean but copies each surviving row once and
    computes on the r merged rows only.
    """
    flat = x.reshape(-1, x.shape[-1])
    out = flat.index_select(0, pool.keep)
    delta = flat.index_select(0, pool.source) - out.index_select(0, pool.into)
    out.index_add_(0, pool.into, delta * pool.share.to(x.dtype))
    return out.view(x.shape[0], pool.left, x.shape[-1])  # -1 would be ambiguous for a batch of none


def merge_tokens(x: Tensor, merge: Merge, weight: Tensor) -> Tensor:
    """`pool_rows` of one tensor: (B,N,C) -> (B,M,C), weight (B,N) > 0."""
    return pool_rows(x, build_pool_index(merge, weight))


def merge_sizes(size: Tensor, merge: Merge) -> Tensor:
    """Sum over every group: (B,N) -> (B,M)."""
    return size.gather(1, merge.keep).scatter_add(1, merge.into, size.gather(1, merge.source))


def group_map(merge: Merge) -> Tensor:
    """The map itself: (B,N) with values in [0,M)."""
    batch, left = merge.keep.shape
    ranks = torch.arange(left, device=merge.keep.device).expand(batch, -1)
    tokens = torch.cat((merge.keep, merge.source), dim=1)  # each once: one scatter, which an export turns into a sort
    return torch.empty_like(tokens).scatter(1, tokens, torch.cat((ranks, merge.into), dim=1))


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

    For a dense map of the patches: `unmerge(out.tokens[:, P:], out.group)`, with P = `model.num_prefix_tokens`.
    """
    flat = x.reshape(-1, x.shape[-1])
    return flat.index_select(0, _flat(group, x.shape[1])).view(*group.shape, x.shape[-1])


def _flat(index: Tensor, tokens: int) -> Tensor:
    """Per-image row numbers (B,k) -> row numbers of the flattened (B*tokens) batch."""
    offset = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * tokens
    return (index + offset).reshape(-1)
