"""The baseline of speed: a model whose tokens are dropped by slicing, so that matching and merging cost nothing.

An instrument: its outputs mean nothing, its time is the best that a merging model with the same tokens per block can
have. Shapes: B batch, N tokens in, M tokens out, C channels, H heads, D their channels.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from models import MergingViT
from models.blocks import Candidates, Merged, MergingAttention, Place, adopt, join_heads, split_heads
from models.methods import Method
from models.schedule import TokenPlan
from models.tokens import Tokens
from models.vit import Layer


class Slicing(Method):
    """Another method's place in the block, where nothing is compared: the first M tokens stay.

    There are no sizes either, so that attention takes no mask and runs on the fastest kernel there is.
    """

    def __init__(self, original: Method) -> None:
        object.__setattr__(self, "original", original)  # methods are frozen

    def place(self) -> Place:
        """The original's."""
        return self.original.place()  # type: ignore[attr-defined]

    def needs_score(self) -> bool:
        """Never: no token is weighed."""
        return False

    def merge(self, candidates: Candidates) -> Merged:
        """The first M tokens."""
        tokens = candidates.tokens
        left = tokens.x.shape[1] - candidates.plan.r
        positions = None if tokens.positions is None else tokens.positions.take(slice(left))
        kept = tokens._replace(x=tokens.x[:, :left], size=tokens.size[:, :left], carried={}, positions=positions)
        return Merged(kept, None, None)

    def attend_merged(self, attn: MergingAttention, attention: Tensor, v: Tensor, merged: Merged) -> Tensor:
        """The first M rows and columns of the map times the values (B,M,H*D)."""
        left = v.shape[1]
        return join_heads(attn.attn_drop(attention[:, :, :left, :left]) @ split_heads(attn, v))


class IdealViT(MergingViT):
    """A merging model that keeps the first M tokens of every block instead. Made by `ideal_model`."""

    def layers(
        self,
        tokens: Tokens,
        plan: TokenPlan,
        rule: Method | None = None,
        enter: Callable[[int, Tokens], Tokens] | None = None,
        masking: dict[str, Any] | None = None,
        start: int = 0,
    ) -> Iterator[Layer]:
        """The loop of the merging model, with `Slicing` at the place of its method."""
        return super().layers(tokens, plan, Slicing(rule or self.merge.rule), enter, masking, start)


def ideal_model(model: MergingViT) -> IdealViT:
    """The baseline of a merging model, with the same parameters (shared, not copied) and the same tokens per block."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return adopt(IdealViT, copy.deepcopy(model, shared))
