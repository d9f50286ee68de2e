"""The base of merging methods: settings with their published defaults, and the decisions that differ between methods.

Shapes: B batch, N tokens in, M tokens out, n patches at the input, P prefix tokens, C channels, H heads, D their
channels, S sources, T destinations.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..blocks import AFTER_ATTENTION, Candidates, Merged, MergingAttention, Place, join_heads, split_heads
from ..errors import UserError
from ..merging import (
    Merge,
    build_pool_index,
    group_map,
    match_scores,
    max_tokens,
    merge_columns,
    merge_rows,
    pool_rows,
    unmerge,
)

POOLINGS = ("size", "attention", "max", "mean")


class Knob(NamedTuple):
    """A setting of a method, as flags and checks need it."""

    name: str
    kind: type  # bool, int, float or str
    default: Any
    help: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    note: str  # a remark for the error about a wrong value
    is_layer: bool  # the value counts blocks, and may not exceed those of the model unless it is the default

    def check(self, value: Any) -> None:
        """Raise a UserError for a value of the wrong type or out of range."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
        if self.kind is bool:
            good, wanted = isinstance(value, bool), "True or False"
        elif self.kind is str:
            good, wanted = value in self.choices, f"one of {', '.join(self.choices)}"
        else:
            good = number and (self.kind is float or isinstance(value, int))
            good = good and (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
            wanted = "an integer" if self.kind is int else "a number"
            wanted += ("" if self.low is None else f" >= {self.low:g}") + (
                "" if self.high is None else f" and <= {self.high:g}"
            )
        if not good:
            raise UserError(f"{self.name} must be {wanted}{f' ({self.note})' if self.note else ''}, not {value!r}")


def knob(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    note: str = "",
    is_layer: bool = False,
) -> Any:
    """A setting of a method: a dataclass field from which the flag, its help, its check and its default follow.

    Args:
        default: the published value.
        low, high: the range of a number, both included.
        choices: the values of a text.
        note: a remark for the error about a wrong value.
        is_layer: the value counts blocks, and may not exceed those of the model unless it is the default.
    """
    return field(
        default=default,
        metadata={"help": help, "low": low, "high": high, "choices": choices, "note": note, "is_layer": is_layer},
    )


@dataclass(frozen=True)
class Method:
    """A merging method with its settings. A subclass names itself and overrides what it decides differently.

    Attributes:
        name: of --merge and `MergeConfig.method`.
        paper: where it was published.
        first_block: the first block that merges where no `activate_layers` are given.
        spatial: whether matching asks which patches a token holds, so that the forward follows them.
        variants: published configurations by name, as keywords of `MergeConfig`; tables and benchmarks show them.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    first_block: ClassVar[int] = 0
    spatial: ClassVar[bool] = False
    variants: ClassVar[dict[str, dict[str, Any]]] = {}

    dense_layers: int = knob(0, "the first blocks that merge nothing (DFE)", low=0, is_layer=True)
    prop_attn: bool = knob(True, "add log(size) of the key token to the attention logits")
    pooling: str = knob("size", "how the features of a group combine", choices=POOLINGS)
    min_tokens: int = knob(0, "smallest number of tokens, with prefix, that a merge may leave", low=0)

    def __post_init__(self) -> None:
        chosen = [(setting, getattr(self, setting.name)) for setting in self.knobs().values()]
        for setting, value in chosen:
            setting.check(value)
        # kept for `check_depth`, which every forward calls
        layers = [(knob.name, value) for knob, value in chosen if knob.is_layer and value != knob.default]
        object.__setattr__(self, "_layer_settings", tuple(layers))

    @classmethod
    def knobs(cls) -> dict[str, Knob]:
        """The settings of the method by name."""
        return {
            setting.name: Knob(setting.name, setting.type, setting.default, **setting.metadata)  # type: ignore[arg-type]
            for setting in fields(cls)
        }

    # Decisions

    def place(self) -> Place:
        """Where in a block tokens merge."""
        return AFTER_ATTENTION

    def windows(self) -> int:
        """Windows per side that some merges keep to; 0 if none do."""
        return 0

    def needs_score(self) -> bool:
        """True if the attention received is needed, which from all tokens costs the fused attention kernel."""
        return self.pooling == "attention"

    def score_queries(self, num_prefix_tokens: int) -> int | None:
        """Whose attention the score is, where it is needed: that of the first so many tokens, or of all (None)."""
        return None

    def most(self, patches: int) -> int:
        """The most tokens that may merge in a block that `patches` patch tokens enter."""
        return patches // 2

    def amounts(self, count: int, layer: int) -> tuple[int, int]:
        """The tokens that block `layer` merges where the schedule says `count`, and those of them merged in windows."""
        return count, 0

    def carry(self, x: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """State per patch (B,n,...) that travels with the tokens and is averaged by size where they merge.

        Args:
            x: (B,n,C) patch embeddings.
            grid: (gh,gw) with gh * gw = n.
        """
        return {}

    def scores(self, candidates: Candidates) -> Tensor:
        """The score (B,S,T) of every source with every destination, for methods of bipartite matching."""
        raise NotImplementedError(f"{type(self).__name__} has no table of scores")

    def match(self, candidates: Candidates) -> Merge:
        """The tokens that merge. The default takes the best pairs of `scores`, one way."""
        return match_scores(self.scores(candidates), candidates.plan.r, candidates.tokens.num_prefix_tokens)

    def token_scores(self, candidates: Candidates) -> dict[str, Tensor]:
        """Named values (B,n) of every patch token that the decision rests on, for pictures; none by default."""
        return {}

    # Merging

    def weight(self, candidates: Candidates) -> Tensor | None:
        """Weights (B,N) of the tokens in the mean of a group; None asks for the maximum."""
        size, score = candidates.tokens.size, candidates.score
        if self.pooling == "attention":
            assert score is not None, "needs_score says so"
            return score * size / size.amax(dim=1, keepdim=True)
        return {"size": size, "mean": torch.ones_like(size), "max": None}[self.pooling]

    def merge(self, candidates: Candidates) -> Merged:
        """Match and pool: the tokens that are left."""
        tokens = candidates.tokens
        weight = self.weight(candidates)
        merge = self.match(candidates)
        pool = None if weight is None else build_pool_index(merge, weight)
        x = max_tokens(tokens.x, merge) if pool is None else pool_rows(tokens.x, pool)
        by_size = pool if self.pooling == "size" else None
        return Merged(tokens.merged(x, merge, by_size), merge, pool)

    def attend_merged(self, attn: MergingAttention, attention: Tensor, v: Tensor, merged: Merged) -> Tensor:
        """The merged attention map times the values of merged tokens, without merging the map: (B,M,H*D).

        Summing the key columns of a map A over groups gives every member its group's value, and a weighted mean W of
        query rows commutes with the product, so the merged map times v is W (A unmerge(v)). Only the maximum of rows is
        not linear and needs the merged map itself.

        Args:
            attention: (B,H,N,N) map of the tokens before the merge.
            v: (B,M,H*D) values of the tokens after it, heads joined.
        """
        assert merged.merge is not None
        if merged.pool is None:
            merged_map = merge_rows(merge_columns(attention, merged.merge), merged.merge)
            return join_heads(attn.attn_drop(merged_map) @ split_heads(attn, v))
        spread = split_heads(attn, unmerge(v, group_map(merged.merge)))
        return pool_rows(join_heads(attn.attn_drop(attention) @ spread), merged.pool)

    # Settings

    def settings(self) -> dict[str, Any]:
        """The value of every setting by name."""
        return {name: getattr(self, name) for name in self.knobs()}

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise a UserError for a setting that does not fit the rows and columns of the model's patches."""

    def check_depth(self, depth: int) -> None:
        """Raise a UserError for a setting that counts more blocks than the model has."""
        for name, value in self._layer_settings:  # type: ignore[attr-defined]
            if value > depth:
                raise UserError(f"{name} is {value}, but the model has {depth} blocks")
