"""How much to merge: the forms of a schedule, and the tokens that one leaves in every block."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import UserError

if TYPE_CHECKING:
    from .config import MergeConfig


@dataclass(frozen=True)
class Inflection:
    """A schedule that changes linearly over depth: first = int(r * (1 - inflection)), last = 2 r - first."""

    r: int
    inflection: float


Schedule = int | float | tuple[int, ...] | Inflection


class BlockPlan(NamedTuple):
    """The part of a schedule that one block is asked to follow.

    Attributes:
        layer, depth: which block of how many.
        r: tokens to merge in all.
        local: those of them that merge inside windows, for methods that have windows.
        readers: the first tokens, which alone leave the block; None: all do. Nothing merges then.
    """

    layer: int
    depth: int
    r: int
    local: int = 0
    readers: int | None = None


class TokenPlan(NamedTuple):
    """A schedule resolved for one model: per block the tokens that merge, and those that are left, prefix included."""

    merges: tuple[int, ...]
    counts: tuple[int, ...]
    local: tuple[int, ...]  # those of `merges` that merge inside windows
    asked: tuple[int, ...]  # what the schedule would merge, if there were tokens enough
    depth: int  # blocks that the schedule is made for; a pruned model has fewer
    readers: int | None = None  # the first tokens, which alone leave the last block (`MergingViT.readers`); None: all

    def block(self, layer: int) -> BlockPlan:
        """The part of one block."""
        readers = self.readers if layer == len(self.merges) - 1 else None
        return BlockPlan(layer, self.depth, self.merges[layer], self.local[layer], readers)

    def first(self, blocks: int) -> TokenPlan:
        """The part of the first blocks."""
        cut = {name: getattr(self, name)[:blocks] for name in ("merges", "counts", "local", "asked")}
        return self._replace(**cut)

    @property
    def clamped(self) -> tuple[int, ...]:
        """The blocks that merge fewer tokens than the schedule asks for."""
        return tuple(layer for layer, asked in enumerate(self.asked) if self.merges[layer] < asked)


def parse_schedule(r: Any) -> Schedule:
    """Any form of a schedule (see `MergeConfig`) as its canonical, hashable value.

    Raises:
        UserError: not a schedule.
    """
    if isinstance(r, str):
        return _parse_text(r)
    if isinstance(r, Inflection):
        return _inflection(r.r, r.inflection)
    if isinstance(r, (list, tuple)):
        if len(r) == 2 and (isinstance(r[1], float) or (is_int(r[1]) and r[1] < 0)):
            return _inflection(*r)
        return _counts(r)
    if not is_number(r) or r < 0 or (r > 1 and r != int(r)):
        raise UserError(f"r must be an integer >= 0, a ratio below 1, a list or (r, inflection), not {r!r}")
    return int(r) if r == int(r) else float(r)


def format_schedule(r: Schedule) -> str:
    """The command-line form of a schedule: parse_schedule(format_schedule(r)) == r."""
    if isinstance(r, Inflection):
        short = f"{r.inflection:g}"
        return f"({r.r},{short if float(short) == r.inflection else repr(r.inflection)})"
    return ",".join(map(str, r)) + ("," if len(r) == 1 else "") if isinstance(r, tuple) else str(r)


def token_plan(config: MergeConfig, patches: int, prefixes: tuple[int, ...], r: Schedule | None = None) -> TokenPlan:
    """The tokens each block merges and leaves, known before the forward so that shapes are static.

    Args:
        config: the method and its schedule.
        patches: patch tokens at the input.
        prefixes: prefix tokens present in each block, one per block.
        r: another schedule than the config's.
    """
    depth = len(prefixes)
    counts_asked = _counts_asked(config.r if r is None else r, depth)
    active = config.active(depth)
    merges: list[int] = []
    counts: list[int] = []
    local: list[int] = []
    wanted: list[int] = []
    for layer, prefix in enumerate(prefixes):
        count = counts_asked[layer] if layer in active else 0
        asked, inside = config.rule.amounts(int(patches * count) if 0 < count < 1 else int(count), layer)
        spare = max(0, patches + prefix - config.rule.min_tokens)
        merged = static_int(min(asked, spare, config.rule.most(patches)))
        patches -= merged
        merges.append(merged)
        counts.append(patches + prefix)
        local.append(min(inside, merged))
        wanted.append(asked)
    return TokenPlan(tuple(merges), tuple(counts), tuple(local), tuple(wanted), depth)


def static_int(value: int) -> int:
    """The value itself, as a constant for torch.compile.

    The compiler would make a number that changed between two calls symbolic, and then one graph would have to serve all
    schedules. The length of a range is always a constant: one graph per schedule.
    """
    return len(range(value))


def warn_if_clamped(config: MergeConfig, plan: TokenPlan) -> None:
    """Warn, at the user's line, where a model is given a schedule of which it cannot do what it says.

    A number for all blocks is an upper bound: tokens run out towards the end, and `plan` says what is left. It is a
    mistake only if the first block that merges falls short already. A list says what every block is to merge, so there
    each block counts.
    """
    first = next((layer for layer, asked in enumerate(plan.asked) if asked), None)
    short = [layer for layer in plan.clamped if isinstance(config.r, tuple) or layer == first]
    if not short:
        return
    what = ", ".join(f"{plan.merges[layer]} of {plan.asked[layer]} in block {layer}" for layer in short)
    floor = f", and min_tokens={config.rule.min_tokens} stay" if config.rule.min_tokens else ""
    warnings.warn(
        f"r={format_schedule(config.r)} is more than can merge: {what} (at most half of a block's patches merge{floor})"
        f"; tokens per block: {list(plan.counts)}",
        stacklevel=stacklevel_of_caller(),
    )


def stacklevel_of_caller() -> int:
    """The stacklevel, for a warning in the calling function, that names the line of whoever called this package.

    Frames of torch and timm are passed over too: properties are set, and models made, through them.
    """
    inside = {__name__.partition(".")[0], "torch", "timm"}
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    return level


def _counts_asked(r: Schedule, depth: int) -> Sequence[float]:
    """Spell a schedule out: one number per block, a count or a ratio below 1."""
    if isinstance(r, Inflection):
        first = int(r.r * (1 - r.inflection))
        step = (2 * r.r - 2 * first) / (depth - 1) if depth > 1 else 0.0
        return [int(first + step * layer) for layer in range(depth)]
    if isinstance(r, tuple):
        if len(r) > depth:
            raise UserError(f"r lists {len(r)} blocks, but the model has {depth}")
        return list(r) + [0] * (depth - len(r))
    return [r] * depth


def _parse_text(text: str) -> Schedule:
    body = text.strip()
    pair = re.fullmatch(r"\(([^,()]*),([^,()]*)\)", body)
    listed = re.fullmatch(r"\[(.*)\]|\((.*)\)|(.*,.*)", body)
    try:
        if pair:
            return _inflection(_number(pair[1]), _number(pair[2]))
        if listed:
            items = next(group for group in listed.groups() if group is not None).split(",")
            # one trailing comma makes a list of a single number
            return _counts([_number(item) for item in (items[:-1] if items[-1].strip() == "" else items)])
        return parse_schedule(_number(body))
    except (ValueError, OverflowError) as error:
        why = f" ({error})" if isinstance(error, UserError) else ""
        raise UserError(f"cannot read r={text!r}{why}; write 16, 0.35, 16,0,8 or (16,-1)") from None


def _counts(r: Sequence[Any]) -> tuple[int, ...]:
    if not r or not all(is_int(value) and value >= 0 for value in r):
        raise UserError(f"r must list one integer >= 0 per block, not {list(r)!r}")
    return tuple(int(value) for value in r)


def _inflection(r: Any, inflection: Any) -> Inflection:
    if not is_number(r) or r != int(r) or r < 0 or not is_number(inflection) or not -1 <= inflection <= 1:
        raise UserError(f"(r, inflection) needs an integer r >= 0 and -1 <= inflection <= 1, not ({r}, {inflection})")
    return Inflection(int(r), float(inflection))


def _number(text: str) -> float:
    text = text.strip()
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


def is_int(value: Any) -> bool:
    """True for an integer; False for booleans."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """True for a finite number; False for booleans."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
