"""What tokens are compared and weighed by: MCTF's criteria (arXiv 2403.10030), pooling weights, LGTM's windows.

Shapes: B batch, N tokens, n patches at the input, M tokens left, P prefix tokens, S sources, D destinations.
"""

import torch
from torch import Tensor

from .merging import Merge, cosine_scores, match_scores, split_sets
from .schedule import MergeConfig

# attention received may underflow; a token is divided by it, and a group of such tokens still needs a weight
_LEAST_ATTENTION = 1e-20


def match_mctf(x: Tensor, size: Tensor, received: Tensor, r: int, prefix: int, config: MergeConfig) -> Merge:
    """The r best pairs by similarity, informativeness and size.

    Args:
        x: (B,N,C) tokens to compare, in the residual stream.
        size: (B,N) patches per token.
        received: (B,N) attention received.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        scores = similarity(cosine_scores(x[:, prefix:], prefix), config.tau_sim or 0)
        factor = token_factor(size, received, config)
        if factor is not None:
            sources, destinations = split_sets(factor[:, prefix:], prefix)
            scores = scores * sources.unsqueeze(2) * destinations.unsqueeze(1)
        return match_scores(scores, r, prefix, bool(config.bidirectional))


def similarity(cosine: Tensor, tau: float) -> Tensor:
    """((cos + 1) / 2)^(1/tau), in [0,1]; all ones for tau = 0."""
    if tau == 0:
        return torch.ones_like(cosine)
    half = ((cosine + 1) / 2).clamp(min=0)  # rounding may leave the cosine below -1
    return half if tau == 1 else half ** (1 / tau)


def token_factor(size: Tensor, received: Tensor, config: MergeConfig) -> Tensor | None:
    """f (B,N) such that f_i * f_j is informativeness times size of a pair: both criteria are of rank one."""
    factor = None
    for value, tau in ((received, config.tau_info), (size, config.tau_size)):
        if tau:
            value = (value.amin(dim=1, keepdim=True) / value) ** (1 / tau)
            factor = value if factor is None else factor * value
    return factor


def attention_received(attention: Tensor) -> Tensor:
    """Mean of a map (B,H,N,N) over heads and queries, in fp32 and without gradient: (B,N)."""
    return attention.detach().flatten(1, 2).mean(dim=1, dtype=torch.float32).clamp(min=_LEAST_ATTENTION)


def pooling_weight(pooling: str, size: Tensor, received: Tensor | None) -> Tensor | None:
    """Weights (B,N) of a group's mean; None asks for the maximum."""
    if pooling == "attention":
        return received * size / size.amax(dim=1, keepdim=True)  # type: ignore[operator]
    return {"size": size, "mean": torch.ones_like(size), "max": None}[pooling]


def first_patch(group: Tensor, tokens: int) -> Tensor:
    """The lowest patch index of every group: (B,n) with values in [0,tokens) -> (B,tokens)."""
    patches = torch.arange(group.shape[1], device=group.device).expand_as(group)
    return patches.new_zeros(group.shape[0], tokens).scatter_reduce(1, group, patches, "amin", include_self=False)


def window_of(patch: Tensor, grid: tuple[int, int], per_side: int) -> Tensor:
    """The window in [0, per_side^2) of patches (row-major index); an uneven grid is cut as evenly as it goes."""
    rows, columns = grid
    row, column = patch // columns, patch % columns
    return row * per_side // rows * per_side + column * per_side // columns
