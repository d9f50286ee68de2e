"""The state that travels through the blocks.

Shapes: B batch, N tokens, n patches at the input, P prefix tokens, C channels, (gh,gw) the patch grid.
"""

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """The tokens between two blocks, and what is known of each. Never changed: `tokens._replace(x=...)` makes another.

    Attributes:
        x: (B,N,C) residual stream, prefix first.
        size: (B,N) patches that a token stands for, 1 for the prefix.
        num_prefix_tokens: P, the class, distillation and register tokens present.
        grid: (gh,gw), n = gh * gw.
        followed: (B,n) in [0, N-P): the token that each patch is in; None where nobody asked to follow the patches.
        sizes_differ: whether anything merged, so that sizes are not all 1.
        carried: further state per token (B,N,...), such as positions, by name. Where tokens merge it is averaged by
            size; prefix tokens carry zeros.
    """

    x: Tensor
    size: Tensor
    num_prefix_tokens: int
    grid: tuple[int, int]
    carried: dict[str, Tensor]
    followed: Tensor | None = None
    sizes_differ: bool = False

    @property
    def group(self) -> Tensor:
        """The token (B,n) that each patch is in, counted without the prefix, where patches are followed."""
        assert self.followed is not None, "the patches of these tokens were not followed: run with trace=True"
        return self.followed
