"""LGTM, local-then-global token merging of Delayed Spatial Merging (arXiv 2303.02331), in our reading.

Shapes: B batch, n patches at the input, D key channels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..blocks import Candidates, mean_over_heads
from ..errors import UserError
from ..merging import Merge, compose, cosine_scores, match_bipartite, match_scores, pool_tokens
from .base import knob
from .tome import ToMe


@dataclass(frozen=True)
class LGTM(ToMe):
    """ToMe's matching inside windows of the image, and from a later block on among all tokens too.

    This is our reading, for LGTM's code was never published: in the local matching pairs stay inside a window,
    ceil(r / windows) in each; what windows cannot give is made up by the best pairs of all in the same matching, so
    that every image keeps the same number of tokens.
    """

    name = "lgtm"
    paper = "Delayed Spatial Merging, arXiv 2303.02331"
    spatial = True
    variants: ClassVar = {"lgtm": {"r": 8}}

    dense_layers: int = knob(2, "the first blocks that merge nothing (DFE)", low=0, is_layer=True)
    local_grid: int = knob(2, "windows per side of the local merge", low=1)
    global_layer: int = knob(7, "first block with a global merge", low=0, is_layer=True)

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Windows of one patch have nothing to merge."""
        if self.local_grid**2 >= grid[0] * grid[1]:
            raise UserError(
                f"local_grid {self.local_grid} cuts {grid[0]} x {grid[1]} patches into windows of one or none, "
                "which have nothing to merge; take a smaller one"
            )

    def windows(self) -> int:
        """The windows of the local merge, per side."""
        return self.local_grid

    def amounts(self, count: int, layer: int) -> tuple[int, int]:
        """Windows times ceil(count / windows) locally, and `count` more in blocks with a global merge."""
        windows = self.local_grid**2
        local = windows * -(-count // windows)
        return local + (count if layer >= self.global_layer else 0), local

    def match(self, candidates: Candidates) -> Merge:
        """The local merge, and then a global one of what it leaves, by keys pooled as the features are."""
        tokens, r, local = candidates.tokens, candidates.plan.r, candidates.plan.local
        prefix, patches = tokens.num_prefix_tokens, tokens.x.shape[1] - tokens.num_prefix_tokens
        assert candidates.keys is not None
        keys = mean_over_heads(candidates.keys.detach())
        windows = window_of(first_patch(tokens.group, patches), tokens.grid, self.local_grid)
        scores = cosine_scores(keys[:, prefix:], prefix)
        merge = match_scores(scores, local, prefix, self.bidirectional, windows, self.local_grid**2)
        if local == r:
            return merge
        keys = pool_tokens(keys, merge, self.weight(candidates))
        return compose(merge, match_bipartite(keys[:, prefix:], r - local, prefix, self.bidirectional))


def first_patch(group: Tensor, tokens: int) -> Tensor:
    """The lowest patch index of every group: (B,n) with values in [0,tokens) -> (B,tokens)."""
    patches = torch.arange(group.shape[1], device=group.device).expand_as(group)
    return patches.new_zeros(group.shape[0], tokens).scatter_reduce(1, group, patches, "amin", include_self=False)


def window_of(patch: Tensor, grid: tuple[int, int], per_side: int) -> Tensor:
    """The window in [0, per_side^2) of patches (row-major index); an uneven grid is cut as evenly as it goes."""
    rows, columns = grid
    row, column = patch // columns, patch % columns
    return row * per_side // rows * per_side + column * per_side // columns
