"""A schedule for a cost: the tokens that each block merges, chosen so that a model within a budget loses least.

Three parts: the schedules that a model can follow (`Space`), what one costs (`Cost`: multiply-adds here, seconds in
`latency.py`), and what one loses, measured on images by a function that the caller brings (`calibration.py`). Measuring
is the expensive part. So a law with a number per block is fitted to everything that was measured (`Sensitivity`), the
best schedule under that law is found exactly (`solve`), its neighbours are measured, and the law is fitted again.

Counts of tokens are those of patches unless they say otherwise. docs/budget.md compares this with others.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from models import MergeConfig, MergingViT, UserError
from models.gmacs import block_macs, head_macs, mixed_rope_macs
from models.methods.base import Method
from models.schedule import TokenPlan, parse_schedule, token_plan

R = tuple[int, ...]  # a schedule with a count for every block
Losses = Callable[[Sequence[R], bool], np.ndarray]  # mean loss of schedules on a third of the images, or on all

LEVELS = 1024  # parts of the budget that `solve` counts in
STATES = 100  # numbers of tokens that it tells apart, about
TABLE = (0.08, 0.2, 0.4)  # shares of the patches that the first measurements merge in one block
NEIGHBOUR = 1 / 32  # share of the patches by which a schedule's neighbours differ from it
ROUNDS = 1  # of measured neighbours
# of the fit: one over the usual errors of what is measured, and of the course of levels from block to block
SINGLE, PAIRED, BENDS = 4.0, 11.0, 2.5
USUAL = (2.5, 8.0)  # thinning and haste of the law
SPREAD = (2.0, 3.0)  # how far from these they are expected
LEAST_LOSS = 1e-6  # of the largest loss: what is below is rounding


# Schedules and their costs


@dataclass(frozen=True)
class Space:
    """The schedules that a model can follow.

    Attributes:
        config: the method; its schedule does not matter.
        patches: patch tokens at the input.
        prefixes: prefix tokens present in each block.
    """

    config: MergeConfig
    patches: int
    prefixes: tuple[int, ...]
    _choices: dict[tuple[int, int], dict[int, int]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, model: MergingViT) -> "Space":
        """The schedules of a model at its own resolution."""
        return cls(model.merge, model.patch_embed.num_patches, model.prefixes())

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.prefixes)

    @cached_property
    def active(self) -> tuple[int, ...]:
        """The blocks that may merge."""
        return self.config.active(self.depth)

    def plan(self, r: R) -> TokenPlan:
        """The tokens that a schedule merges and leaves."""
        return token_plan(self.config, self.patches, self.prefixes, r)

    def choices(self, layer: int, patches: int) -> dict[int, int]:
        """What a block that `patches` tokens enter can merge, in rising order: tokens merged -> count that asks so."""
        known = self._choices.get((layer, patches))
        if known is None:
            known = self._choices[layer, patches] = self._merges(layer, patches)
        return known

    def _merges(self, layer: int, patches: int) -> dict[int, int]:
        if layer not in self.active:
            return {0: 0}
        most = self._merged(layer, patches, patches)
        if type(self.config.rule).amounts is Method.amounts:  # a count is what it says
            return {merged: merged for merged in range(most + 1)}
        found = {0: 0}
        for count in range(1, patches):
            if max(found) == most:
                break
            found.setdefault(self._merged(layer, patches, count), count)
        return found

    def _merged(self, layer: int, patches: int, count: int) -> int:
        asked = tuple(count if block == layer else 0 for block in range(self.depth))
        return token_plan(self.config, patches, self.prefixes, asked).merges[layer]

    def clip(self, r: Sequence[int]) -> R:
        """The schedule itself, with counts lowered to what the blocks can merge."""
        left, counts = self.patches, []
        for layer, count in enumerate(r):
            merged, asked = max(pair for pair in self.choices(layer, left).items() if pair[1] <= count)
            counts.append(asked)
            left -= merged
        return tuple(counts)


class Cost(Protocol):
    """What a forward costs, as a sum over blocks."""

    @property
    def unit(self) -> str:
        """What it is counted in, for people."""

    def block(self, layer: int, tokens: int, left: int) -> float:
        """A block that `tokens` enter and `left` leave, prefix included."""

    def rest(self, left: int) -> float:
        """All outside of the blocks, the last of which `left` tokens leave, prefix included."""


class Gmacs:
    """Multiply-adds per image in 1e9, those of `models.gmacs`."""

    unit = "GMACs"

    def __init__(self, model: MergingViT) -> None:
        self.model, self.patches = model, model.patch_embed.num_patches
        self._stem = model.patch_embed.proj.weight.numel() * self.patches
        self._known: dict[tuple[int, int, int], int] = {}
        shapes = [tuple(tuple(p.shape) for p in block.parameters()) for block in model.blocks]
        self._kinds = [shapes.index(shape) for shape in shapes]  # blocks of the same shapes cost the same
        self._prefixes = model.prefixes()

    def block(self, layer: int, tokens: int, left: int) -> float:
        """See `Cost.block`."""
        key = (self._kinds[layer], tokens, left)
        if key not in self._known:
            self._known[key] = block_macs(self.model.blocks[key[0]], tokens, left, self.model.merge.rule)
        macs = self._known[key]
        if self.model.rope_mixed and tokens < self.patches + self._prefixes[layer]:
            macs += mixed_rope_macs(self.model.blocks[layer], tokens, self.patches)
        return macs / 1e9

    def rest(self, left: int) -> float:
        """See `Cost.rest`."""
        return (self._stem + head_macs(self.model, left)) / 1e9


def total(cost: Cost, space: Space, r: R) -> float:
    """What a forward with a schedule costs."""
    left, spent = space.patches, 0.0
    for layer, merged in enumerate(space.plan(r).merges):
        prefix = space.prefixes[layer]
        spent += cost.block(layer, left + prefix, left + prefix - merged)
        left -= merged
    return spent + cost.rest(left + space.prefixes[-1])


def cheapest(cost: Cost, space: Space) -> float:
    """The least that a forward of these schedules can cost."""
    value = {left: cost.rest(left + space.prefixes[-1]) for left in range(space.patches + 1)}
    for layer in reversed(range(space.depth)):
        prefix = space.prefixes[layer]
        reachable = range(1, space.patches + 1) if layer else (space.patches,)
        value = {
            left: min(
                cost.block(layer, left + prefix, left + prefix - merged) + value[left - merged]
                for merged in space.choices(layer, left)
            )
            for left in reachable
        }
    return value[space.patches]


# What a schedule loses


@dataclass
class Sensitivity:
    """A law of what a schedule loses: the sum over blocks, for one that merges r of the n tokens that enter it, of

        exp(level) * (patches / n)^thinning * n / haste * (exp(haste * r / n) - 1).

    Merging the first pairs, which are the most alike, costs exp(level) a token; each further one costs more (haste),
    and all of them the more, the fewer tokens are left (thinning). On a DeiT-Tiny the law tells what single blocks lose
    over four orders of magnitude. Whole schedules lose up to twice the sum, for what blocks do to the output adds up
    partly in one direction; that is no matter here, because it hardly changes which schedule loses least.

    Attributes:
        level: per block; -inf where merging loses nothing.
    """

    patches: int
    level: np.ndarray
    thinning: float = USUAL[0]
    haste: float = USUAL[1]

    def block(self, layer: int, patches: int, merged: "int | np.ndarray") -> Any:
        """The summand of a block that `patches` tokens enter and `merged` of them leave."""
        scale = np.exp(self.level[layer]) * (self.patches / patches) ** self.thinning * patches / self.haste
        return scale * np.expm1(self.haste * np.asarray(merged) / patches)

    def __call__(self, merges: Sequence[int]) -> float:
        """The loss of a schedule that merges so many tokens in each block."""
        left, lost = self.patches, 0.0
        for layer, merged in enumerate(merges):
            lost += float(self.block(layer, left, merged)) if merged else 0.0
            left -= merged
        return lost

    def fit(self, measured: Sequence["Measured"]) -> None:
        """Fit the law to measured schedules, by squares of the errors of logarithms.

        Of single blocks the losses count, of neighbours the ratio to the schedule that they are neighbours of. A block
        in which merging alone loses nothing is free. Levels of neighbouring blocks are drawn to a smooth course, and
        the exponents to usual values: some hundred images tell the slope of a block to no better than a quarter, and a
        search that believes them more than that overfits.
        """
        from scipy.optimize import least_squares  # which only a search needs

        least = LEAST_LOSS * max(m.loss for m in measured)
        heard = [m for m in measured if m.loss > least and any(m.merges)]
        blocks = sorted({layer for m in heard for layer, merged in enumerate(m.merges) if merged == sum(m.merges)})
        if not blocks:
            return
        merges = np.array([m.merges for m in heard], dtype=float)
        taken, entering = merges[:, blocks], (self.patches - np.cumsum(merges, axis=1) + merges)[:, blocks]
        losses = np.log([m.loss for m in heard])
        index = {id(m): i for i, m in enumerate(heard)}
        pairs = [(i, index[id(m.like)]) for i, m in enumerate(heard) if m.like is not None and id(m.like) in index]
        of, to = (np.array([pair[side] for pair in pairs], dtype=int) for side in (0, 1))
        single = np.array([i for i, m in enumerate(heard) if np.count_nonzero(m.merges) == 1], dtype=int)

        def predicted(x: np.ndarray) -> np.ndarray:
            scale = np.exp(x[:-2]) * (self.patches / entering) ** x[-2] * entering / x[-1]
            return np.log((scale * np.expm1(x[-1] * taken / entering)).sum(axis=1) + least / 100)

        def errors(x: np.ndarray) -> np.ndarray:
            error = predicted(x) - losses
            bends = BENDS * np.diff(x[:-2], 2) if len(blocks) > 2 else np.zeros(0)
            usual = (x[-2:] - USUAL) / SPREAD
            return np.concatenate([SINGLE * error[single], PAIRED * (error[of] - error[to]), bends, usual])

        start = np.where(np.isfinite(self.level), self.level, math.log(least))[blocks]
        low, high = [-80.0] * len(blocks) + [0.0, 0.5], [20.0] * len(blocks) + [8.0, 30.0]
        found = least_squares(errors, np.concatenate([start, [self.thinning, self.haste]]), bounds=(low, high)).x
        self.level = np.full(len(self.level), -np.inf)
        self.level[blocks] = found[:-2]
        self.thinning, self.haste = map(float, found[-2:])


Law = Callable[[int, int, np.ndarray], np.ndarray]  # block, tokens that enter, numbers merged -> losses


def solve(law: Law, space: Space, cost: Cost, budget: float, levels: int = LEVELS) -> R | None:
    """The schedule within a budget whose loss, a sum over blocks, is least: by dynamic programming.

    The state is the tokens left and the budget left. Costs are rounded up to the budget / levels, so that the result
    never exceeds the budget; it is exact where costs are multiples of that, and up to `STATES` patches.

    Args:
        law: loss of a block; it is asked for all its choices at once.

    Returns:
        None if no schedule is that cheap.
    """
    options = _options(space)
    unit = budget / levels
    value = {
        left - merged: _within(_units(cost.rest(left - merged + space.prefixes[-1]), unit), levels)
        for left, merges in options[-1].items()
        for merged in merges
    }
    taken: list[dict[int, np.ndarray]] = []
    for layer in reversed(range(space.depth)):
        prefix, best, choice = space.prefixes[layer], {}, {}
        for left, merges in options[layer].items():
            losses = law(layer, left, np.array(merges))
            lowest, pick = np.full(levels + 1, np.inf), np.zeros(levels + 1, dtype=np.int32)
            for merged, loss in zip(merges, losses, strict=True):
                units = _units(cost.block(layer, left + prefix, left + prefix - merged), unit)
                if units > levels:
                    continue
                candidate = value[left - merged][: levels + 1 - units] + loss
                better = candidate < lowest[units:]
                lowest[units:][better] = candidate[better]
                pick[units:][better] = merged
            best[left], choice[left] = lowest, pick
        value = best
        taken.insert(0, choice)
    if not np.isfinite(value[space.patches][levels]):
        return None
    left, budget_left, counts = space.patches, levels, []
    for layer, choice in enumerate(taken):
        merged = int(choice[left][budget_left])
        prefix = space.prefixes[layer]
        budget_left -= _units(cost.block(layer, left + prefix, left + prefix - merged), unit)
        counts.append(space.choices(layer, left)[merged])
        left -= merged
    return tuple(counts)


def _units(amount: float, unit: float) -> int:
    return math.ceil(amount / unit - 1e-9)


def _within(units: int, levels: int) -> np.ndarray:
    """The loss 0 with at least so many units left, infinite with fewer."""
    return np.where(np.arange(levels + 1) >= units, 0.0, np.inf)


def _options(space: Space) -> list[dict[int, list[int]]]:
    """For every block the numbers of tokens that may enter, and what it may merge of each, in steps."""
    step = max(1, round(space.patches / STATES))
    found: list[dict[int, list[int]]] = []
    entering = {space.patches}
    for layer in range(space.depth):
        merges = {left: [m for m in space.choices(layer, left) if m % step == 0] for left in sorted(entering)}
        found.append(merges)
        entering = {left - merged for left, choices in merges.items() for merged in choices}
    return found


def polish(law: Callable[[Sequence[int]], float], space: Space, cost: Cost, budget: float, r: R) -> R:
    """A schedule within the budget that no change of one or two counts by one or two betters under a law."""
    best, lost = r, law(space.plan(r).merges)
    improved = True
    while improved:
        improved = False
        for changed in {space.clip(changed): None for changed in _changes(best, space.active)}:
            if total(cost, space, changed) > budget:
                continue
            loss = law(space.plan(changed).merges)
            if loss < lost - 1e-9 * abs(lost):
                best, lost, improved = changed, loss, True
    return best


def _changes(r: R, blocks: Sequence[int]) -> Iterator[R]:
    for less, more, by in itertools.product(blocks, (*blocks, None), (1, 2)):
        if less != more and r[less] >= by:
            changed = list(r)
            changed[less] -= by
            if more is not None:
                changed[more] += by
            yield tuple(changed)


# The search


@dataclass(frozen=True)
class Measured:
    """A schedule whose loss was measured.

    Attributes:
        like: the schedule that it is a neighbour of, measured on the same images; None: it stands alone.
    """

    r: R
    merges: tuple[int, ...]
    cost: float
    loss: float
    all_images: bool
    like: "Measured | None" = None


@dataclass(frozen=True)
class Found:
    """The schedule found for a budget."""

    budget: float
    best: Measured
    rounds: tuple[Measured, ...]  # one for each round, the best among them


class Search:
    """A search for schedules of several budgets, which share what was measured.

    Args:
        losses: measures; called with schedules and whether on all images.
    """

    def __init__(self, space: Space, cost: Cost, losses: Losses) -> None:
        self.space, self.cost, self.losses = space, cost, losses
        self.law = Sensitivity(space.patches, np.full(space.depth, -np.inf))
        self.measured: list[Measured] = []

    def table(self) -> None:
        """Measure what merging in one block alone loses, and fit the law to it."""
        schedules = []
        for layer in self.space.active:
            choices = self.space.choices(layer, self.space.patches)
            wanted = {max(1, round(share * self.space.patches)) for share in TABLE}
            merges = {min(choices, key=lambda merged: abs(merged - amount)) for amount in wanted} - {0}
            schedules += [self._single(layer, choices[merged]) for merged in sorted(merges)]
        self.measure(schedules, all_images=False)
        self.fit()

    def _single(self, layer: int, count: int) -> R:
        return tuple(count if block == layer else 0 for block in range(self.space.depth))

    def measure(self, schedules: Sequence[R], all_images: bool, centre: bool = False) -> list[Measured]:
        """Measure schedules on the same images; with `centre` all but the first are neighbours of the first."""
        found: list[Measured] = []
        for r, loss in zip(schedules, self.losses(schedules, all_images), strict=True):
            plan, like = self.space.plan(r), found[0] if centre and found else None
            found.append(Measured(r, plan.merges, total(self.cost, self.space, r), float(loss), all_images, like))
        self.measured += found
        return found

    def fit(self) -> None:
        """Fit the law to all that was measured."""
        self.law.fit(self.measured)

    def find(self, budget: float, rounds: int = ROUNDS) -> Found:
        """Find the schedule of a budget.

        Raises:
            UserError: no schedule is that cheap.
        """
        tried: list[Measured] = []
        for turn in range(rounds + 1):
            r = solve(self.law.block, self.space, self.cost, budget)
            if r is None:
                raise UserError(f"no schedule reaches {budget:.3f} {self.cost.unit}")
            r = polish(self.law, self.space, self.cost, budget, r)
            known = next((m for m in tried if m.r == r), None)
            neighbours = self.neighbours(r) if turn < rounds and known is None else []
            if known is None:
                tried.append(self.measure([r, *neighbours], all_images=True, centre=True)[0])
            elif turn < rounds:  # the law gave the same answer again: it would for ever
                break
            self.fit()
        return Found(budget, min(tried, key=lambda m: m.loss), tuple(tried))

    def neighbours(self, r: R) -> list[R]:
        """Schedules that merge somewhat less or more in one block; other costs than the budget's, on both sides."""
        by = max(1, round(NEIGHBOUR * self.space.patches))
        changed = [
            self.space.clip((*r[:layer], max(0, count), *r[layer + 1 :]))
            for layer in self.space.active
            if np.isfinite(self.law.level[layer])
            for count in (r[layer] - by, r[layer] + by)
        ]
        return [other for other in dict.fromkeys(changed) if other != r]


# Files that --r reads


FORMAT = "regtome schedule"
SUFFIX = ".json"


def is_schedule_file(text: str) -> bool:
    """True if a value of --r names a file, as no other form of a schedule does."""
    return text.strip().lower().endswith(SUFFIX)


def read_schedule(path: str) -> dict[str, Any]:
    """Read a schedule file: "r", "merge" (`MergeConfig.as_dict`), "depth", "patches" and how it was found.

    Raises:
        UserError: there is none, or it is no schedule file.
    """
    try:
        record = json.loads(Path(path).expanduser().read_text())
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        config = MergeConfig.from_dict(record["merge"])
        counts = record["r"]
        depth, patches = int(record["depth"]), int(record["patches"])
        if parse_schedule(counts) != config.r or len(counts) != depth or patches < 1:
            raise ValueError("its r, depth, patches and merge do not fit together")
    except OSError as error:
        raise UserError(f"cannot read the schedule {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a schedule of --gmacs, --speedup or run/search.py ({' '.join(str(error).split())})"
        ) from error
    return record


def check_fits(record: dict[str, Any], path: str, model: MergingViT) -> None:
    """Refuse a schedule file that was made for a model of another depth or another number of patches.

    Raises:
        UserError: names both.
    """
    made, given = (record["depth"], record["patches"]), (len(model.blocks), model.patch_embed.num_patches)
    if made != given:
        raise UserError(
            f"{path} was searched for {made[0]} blocks and {made[1]} patches ({record.get('model', '?')}), but this "
            f"model has {given[0]} and {given[1]}; search one for it with --gmacs or --speedup"
        )
