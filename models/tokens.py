"""The state that travels through the blocks.

Shapes: B batch, N tokens, n patches at the input, P prefix tokens, C channels, (gh,gw) the patch grid.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .merging import Merge, PoolIndex, build_pool_index, group_map, merge_sizes, pool_rows
from .rope import Positions


class Tokens(NamedTuple):
    """The tokens between two blocks, and what is known of each. Never changed: `tokens._replace(x=...)` makes another.

    Attributes:
        x: (B,N,C) residual stream, prefix first.
        size: (B,N) patches that a token stands for, 1 for the prefix.
        num_prefix_tokens: P, the class, distillation and register tokens present.
        grid: (gh,gw), n = gh * gw.
        followed: (B,n) in [0, N-P): the token that each patch is in; None where nobody asked to follow the patches.
        carried: further state per token (B,N,...) that a method asks for, by name. Where tokens merge it is averaged by
            size; prefix tokens carry zeros.
        positions: by which queries and keys are rotated; None in a model without rotary positions.
        sizes_differ: whether anything merged, so that sizes are not all 1.
    """

    x: Tensor
    size: Tensor
    num_prefix_tokens: int
    grid: tuple[int, int]
    carried: dict[str, Tensor]
    followed: Tensor | None = None
    sizes_differ: bool = False
    positions: Positions | None = None

    @property
    def group(self) -> Tensor:
        """The token (B,n) that each patch is in, counted without the prefix, where patches are followed."""
        assert self.followed is not None, "the patches of these tokens were not followed: run with trace=True"
        return self.followed

    def merged(self, x: Tensor, merge: Merge, by_size: PoolIndex | None = None) -> "Tokens":
        """The state after a merge, with the features (B,M,C) that it leaves. `follow` brings the groups up to date.

        Args:
            by_size: the mean by size over the groups of this merge, where somebody has computed it already.
        """
        carried, positions = self.carried, self.positions
        if carried or positions is not None:
            by_size = build_pool_index(merge, self.size) if by_size is None else by_size
            carried = {name: pool_rows(value, by_size) for name, value in carried.items()}
            positions = None if positions is None else positions.merged(merge, by_size)
        size = merge_sizes(self.size, merge)
        return self._replace(x=x, size=size, carried=carried, sizes_differ=True, positions=positions)

    def follow(self, merge: Merge | None) -> "Tokens":
        """The state whose patches are told where a merge took them; as it is where nobody follows them."""
        if self.followed is None or merge is None:
            return self
        prefix = self.num_prefix_tokens
        return self._replace(followed=group_map(merge).gather(1, self.followed + prefix) - prefix)

    def with_prefix(self, x: Tensor, count: int) -> "Tokens":
        """The state after `count` prefix tokens entered, which gave x (B,N+count,C)."""
        if not count:
            return self
        batch = x.shape[0]
        # all prefix sizes are 1 and all that they carry is 0, so new ones may go in front whatever the order
        size = torch.cat((self.size.new_ones(batch, count), self.size), dim=1)
        carried = {
            name: torch.cat((value.new_zeros(batch, count, *value.shape[2:]), value), dim=1)
            for name, value in self.carried.items()
        }
        positions = None if self.positions is None else self.positions.with_prefix(count)
        present = self.num_prefix_tokens + count
        return self._replace(x=x, size=size, carried=carried, num_prefix_tokens=present, positions=positions)
