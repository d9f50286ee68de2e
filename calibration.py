"""The search of a schedule as main.py asks for it: its images, what schedules lose on them, what is kept of it.

The search itself is in `budget.py`, the measured times of --speedup are in `latency.py`. All ranks search together:
each one measures its share of the images, and the sums make them all take the same decisions.
"""

import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from budget import FORMAT, Cost, Found, Gmacs, R, Search, Space, cheapest, total
from datasets import Data, DataConfig, ImageSet, build_data, build_transform, open_images
from distributed import Distributed, all_reduce_sum, broadcast_object
from engine import Precision
from latency import Latency, measured_speedup
from models import MergingViT, UserError
from models.gmacs import gmacs
from models.schedule import TokenPlan, format_schedule
from models.tokens import Tokens
from models.weights import HEADS
from utils import Progress, is_main_process, log, versions, write_json

DEFAULT_IMAGES = 256
BATCH = 16  # images of a forward; the largest memory is this many images at every block


# Images


@dataclass(frozen=True)
class Calibration:
    """Unlabelled images, prepared as in an evaluation, and where they come from."""

    images: Tensor  # (n,3,H,W) of this rank: the rank-th, and every world-th from there
    total: int  # of all ranks
    source: str


def load_calibration(args: Namespace, data: Data | None, config: DataConfig, dist: Distributed) -> Calibration:
    """Read --calibration_images images of --calibration_path, else of the training split, else of the evaluated ones.

    Which ones follows from --seed. Unreadable images are left out.

    Args:
        data: the data set of a run; None: that of the command line is opened where it is needed.

    Raises:
        UserError: no such images.
    """
    images, source = _open(args, data, config)
    return draw_calibration(images, args.calibration_images or DEFAULT_IMAGES, args.seed, source, dist)


def draw_calibration(images: ImageSet, wanted: int, seed: int, source: str, dist: Distributed) -> Calibration:
    """Read some images of a set, at most `wanted`, drawn by the seed; `source` names the set."""
    wanted = min(wanted, len(images))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:wanted].tolist()
    samples = [images[index] for index in order[dist.rank :: dist.world]]
    for name in (name for sample in samples for name in sample.bad):
        log(f"unreadable, left out: {name}")
    readable = [sample.image for sample in samples if sample.valid]
    count = int(all_reduce_sum(torch.tensor(len(readable))))
    if not count:
        raise UserError(f"none of the {wanted} calibration images of {source} can be read; give --calibration_path")
    size = images.size
    return Calibration(torch.stack(readable) if readable else torch.zeros(0, 3, size, size), count, source)


def _open(args: Namespace, data: Data | None, config: DataConfig) -> tuple[ImageSet, str]:
    """Open the set that calibration images are drawn from, and name it."""
    if args.calibration_path:
        everything = Namespace(**{**vars(args), "limit": None})
        return open_images([args.calibration_path], everything, config, "--calibration_path"), args.calibration_path
    if data is not None and data.train is not None:
        return _as_evaluated(data.train, args, config), f"the training split of {args.dataset}"
    try:
        trained = build_data(Namespace(**{**vars(args), "eval": False}), config).train
        assert trained is not None
        return _as_evaluated(trained, args, config), f"the training split of {args.dataset}"
    except UserError:  # there is only what is evaluated
        val = data.val if data is not None else build_data(args, config).val
        log("note: the schedule is searched on the evaluated images, for there is no training split; give others by")
        log("note: --calibration_path FOLDER if the result is to be compared")
        return val, f"the validation split of {args.dataset}"


def _as_evaluated(images: ImageSet, args: Namespace, config: DataConfig) -> ImageSet:
    """The images of a training set with the transform of evaluation, each as it is or not at all."""
    plain = copy(images)
    plain.transform, plain.tries = build_transform(args, config, train=False), 1
    return plain


# What schedules lose


class Divergence:
    """What schedules lose on images: the mean KL(dense || merged) in nats; callable as `budget.Losses`.

    Schedules that begin alike share the blocks up to where they part, so that a change in block b costs the blocks
    from b on.

    Args:
        by_features: compare the input of the head instead, by the squared distance as a share of the squared length;
            for a head that has learned nothing yet.
    """

    def __init__(self, model: MergingViT, calibration: Calibration, by_features: bool = False) -> None:
        self.model, self.by_features = model, by_features or not model.num_classes
        self.device = next(model.parameters()).device
        self.images = calibration.images
        self.agreement: dict[R, float] = {}  # same top-1 as the dense model in %, of what was measured on all images
        self._dense: dict[tuple[int, int], Tensor] = {}

    def __call__(self, schedules: Sequence[R], all_images: bool) -> np.ndarray:
        """Return the mean loss (S,) of S schedules; all ranks must call it."""
        wanted = len(self.images) if all_images else -(-len(self.images) // 3)
        plans = [(index, self.model.plan(r)) for index, r in enumerate(schedules)]
        sums = torch.zeros(len(plans) + 1, 2, dtype=torch.double)
        starts = range(0, wanted, BATCH)
        progress = Progress(starts, len(starts), f"search, {len(plans)} schedules on {wanted} images")
        training = self.model.training
        self.model.eval()
        for start in progress:
            stop = min(start + BATCH, wanted)
            self._add(sums, plans, start, stop)
            if progress.due:
                progress.show()
        self.model.train(training)
        sums = all_reduce_sum(sums)
        means = sums[:-1] / sums[-1]
        if not torch.isfinite(means).all():
            raise UserError("the search of a schedule finds outputs that are NaN or infinite; the weights are damaged")
        if all_images:
            self.agreement |= {r: 100 * float(agree) for r, (_, agree) in zip(schedules, means, strict=True)}
        return means[:, 0].numpy()

    @torch.no_grad()
    def _add(self, sums: Tensor, plans: list[tuple[int, TokenPlan]], start: int, stop: int) -> None:
        tokens = self.model.embed(self.images[start:stop].to(self.device))
        if (start, stop) not in self._dense:
            still = self.model.plan(0)
            self._dense[start, stop] = next(self._outputs(tokens, [(0, still)], 0))[1]
        dense = self._dense[start, stop]
        for members, outputs in self._outputs(tokens, plans, 0):
            agree = (outputs.argmax(1) == dense.argmax(1)).double().sum()
            sums[members] += torch.stack((self._loss(dense, outputs).sum(), agree)).cpu()
        sums[-1] += stop - start

    def _loss(self, dense: Tensor, outputs: Tensor) -> Tensor:
        if self.by_features:
            return (outputs - dense).square().sum(1) / dense.square().sum(1)
        log_p, log_q = dense.log_softmax(1), outputs.log_softmax(1)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)

    def _outputs(
        self, tokens: Tokens, plans: list[tuple[int, TokenPlan]], layer: int
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Run the blocks from `layer` on for plans that are alike before it: their numbers, and what comes out."""
        if layer == len(self.model.blocks):
            yield [index for index, _ in plans], self._read(tokens)
            return
        alike: dict[Any, list[tuple[int, TokenPlan]]] = {}
        for index, plan in plans:
            alike.setdefault(plan.block(layer), []).append((index, plan))
        for members in alike.values():
            after = next(self.model.layers(tokens, members[0][1], start=layer)).after
            yield from self._outputs(after, members, layer + 1)

    def _read(self, tokens: Tokens) -> Tensor:
        x, size = self.model.norm(tokens.x), tokens.size if tokens.sizes_differ else None
        if self.by_features:
            return self.model.forward_head(x, pre_logits=True, size=tokens.size).double()  # type: ignore[union-attr]
        return self.model.classify(x, size)[0].double()


# What the flags ask for


@dataclass(frozen=True)
class Goal:
    """A budget as a user writes it, and what it means for a model."""

    flag: str  # --gmacs 55%
    cost: Cost
    budget: float  # in the unit of `cost`


def gmacs_goal(text: str, model: MergingViT) -> Goal:
    """What --gmacs TEXT means: GMACs per image, or per cent of the dense model's.

    Raises:
        UserError: no schedule costs that; it names the range that can be reached.
    """
    cost, space = Gmacs(model), Space.of(model)
    dense, least = total(cost, space, (0,) * space.depth), cheapest(cost, space)
    budget = float(text[:-1]) / 100 * dense if text.endswith("%") else float(text)
    if not least <= budget < dense:
        reach = f"from {least:.3g} ({100 * least / dense:.0f}%) to less than {dense:.4g}, the dense model"
        raise UserError(f"--gmacs {text} cannot be reached: schedules of {model.merge.method} cost {reach}")
    return Goal(f"--gmacs {text}", cost, budget)


def speedup_goal(speedup: float, model: MergingViT, latency: Latency) -> Goal:
    """What --speedup X means: seconds of a batch, X times fewer than those of timm's dense model.

    Raises:
        UserError: no schedule is that fast; it names the range that can be reached.
    """
    space = Space.of(model)
    dense, least = total(latency, space, (0,) * space.depth), cheapest(latency, space)
    budget = latency.native / speedup
    if not least <= budget < dense:
        reach = f"from more than {latency.native / dense:.2f} to {latency.native / least:.2f}"
        method = model.merge.method
        raise UserError(f"--speedup {speedup:g} cannot be reached: schedules of {method} have {reach} here")
    return Goal(f"--speedup {speedup:g}", latency, budget)


def goals_of(
    gmacs: Sequence[str], speedups: Sequence[float], args: Namespace, model: MergingViT, name: str, precision: Precision
) -> list[Goal]:
    """All budgets of a command line; times are measured, or taken from the cache, only where they are needed."""
    goals = [gmacs_goal(text, model) for text in gmacs]
    if speedups:
        table = Latency.of(model, name, args.batch_size, precision) if is_main_process() else None
        latency = broadcast_object(table)
        assert latency is not None
        goals += [speedup_goal(speedup, model, latency) for speedup in speedups]
    return goals


# The search, and what is kept of it


@dataclass(frozen=True)
class Result:
    """What was found for some budgets on one model.

    Attributes:
        goals, found: of each budget.
        speeds: for each budget the speed-ups over timm's dense model, predicted and measured; None: not asked for.
    """

    goals: tuple[Goal, ...]
    found: tuple[Found, ...]
    search: Search
    divergence: Divergence
    speeds: tuple[tuple[float, float] | None, ...]
    about: dict[str, Any]

    def records(self) -> list[dict[str, Any]]:
        """The schedule files of the budgets, in plain values."""
        return [self._record(*of) for of in zip(self.goals, self.found, self.speeds, strict=True)]

    def _record(self, goal: Goal, found: Found, speed: tuple[float, float] | None) -> dict[str, Any]:
        space, model, best = self.search.space, self.divergence.model, found.best
        plan = space.plan(best.r)
        return {
            "format": FORMAT,
            **self.about,
            "asked": goal.flag,
            "r": list(best.r),
            "merge": model.merge.with_r(best.r).as_dict(),
            "depth": space.depth,
            "patches": space.patches,
            "num_registers": model.num_registers,
            "tokens": list(plan.counts),
            "gmacs": gmacs(model, plan),
            "gmacs_inference": gmacs(model, plan, inference=True),
            "dense_gmacs": gmacs(model, 0),
            "loss": best.loss,
            "agree": self.divergence.agreement.get(best.r),
            "speedup": None if speed is None else {"predicted": speed[0], "measured": speed[1]},
            "sensitivity": {
                "level": [float(level) if np.isfinite(level) else None for level in self.search.law.level],
                "thinning": self.search.law.thinning,
                "haste": self.search.law.haste,
            },
            "measured": [
                {"r": list(m.r), "gmacs": gmacs(model, space.plan(m.r)), "loss": m.loss}
                for m in self.search.measured
                if m.all_images
            ],
        }


def search_schedules(
    goals: Sequence[Goal], model: MergingViT, calibration: Calibration, name: str, seed: int, by_features: bool = False
) -> Result:
    """Search a schedule for every budget; all ranks must call it. The model itself stays as it is."""
    assert goals
    divergence, began = Divergence(model, calibration, by_features), time.monotonic()
    search = Search(Space.of(model), goals[0].cost, divergence)
    unit = "squared error of features" if divergence.by_features else "KL"
    log(f"searching schedules of {model.merge.method} on {calibration.total} images of {calibration.source}")
    search.table()
    found = []
    for goal in goals:
        search.cost = goal.cost
        found.append(broadcast_object(search.find(goal.budget)))
        best = found[-1].best
        agree = f", {divergence.agreement[best.r]:.2f} % agree" if best.r in divergence.agreement else ""
        log(
            f"{goal.flag}: r={format_schedule(best.r)}; {gmacs(model, search.space.plan(best.r)):.3f} GMACs; "
            f"{unit} to dense {best.loss:.4f}{agree}"
        )
    about = {
        "model": name,
        "loss_of": unit,
        "calibration": calibration.source,
        "images": calibration.total,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "versions": versions(),
    }
    return Result(tuple(goals), tuple(found), search, divergence, (None,) * len(goals), about)


def verify(result: Result, name: str, batch_size: int, precision: Precision) -> Result:
    """Measure the speed-ups that were predicted, and print both."""
    model = result.divergence.model
    speeds: list[tuple[float, float] | None] = []
    for goal, found in zip(result.goals, result.found, strict=True):
        if not isinstance(goal.cost, Latency):
            speeds.append(None)
            continue
        predicted = goal.cost.native / total(goal.cost, result.search.space, found.best.r)
        measured = measured_speedup(model, name, found.best.r, batch_size, precision)
        log(f"{goal.flag}: {predicted:.2f}x predicted, {measured:.2f}x measured, of timm's dense model")
        speeds.append((predicted, measured))
    return replace(result, speeds=tuple(speeds))


def apply_budget(
    args: Namespace,
    dist: Distributed,
    data: Data,
    model: MergingViT,
    name: str,
    fresh: Sequence[str],
    precision: Precision,
) -> Result:
    """Search the schedule that --gmacs or --speedup asks for, and give it to the model.

    Args:
        fresh: parameters without weights; with a head among them features are compared, and not logits.
    """
    by_features = any(parameter.split(".")[0] in HEADS for parameter in fresh)
    asked = [args.gmacs] if args.gmacs else [], [args.speedup] if args.speedup else []
    goals = goals_of(*asked, args, model, name, precision)
    calibration = load_calibration(args, data, data.config, dist)
    result = search_schedules(goals, model, calibration, name, args.seed, by_features)
    model.r = result.found[0].best.r
    return verify(result, name, args.batch_size, precision) if dist.is_main else result


def write_result(result: Result, folder: Path, names: Sequence[str] = ("schedule",)) -> list[Path]:
    """Write a schedule file for every budget, and a figure of all of them beside the first one."""
    from analysis.schedules import draw  # matplotlib is needed here only

    records = result.records()
    files = [folder / f"{name}.json" for name in names]
    for file, record in zip(files, records, strict=True):
        write_json(file, record)
    draw(records).savefig(folder / f"{names[0] if len(names) == 1 else 'schedules'}.png", dpi=150)
    return files
