"""Prediction changes: which images and classes decide otherwise under merging, and what accuracy a GMAC buys.

    result = prediction_changes.measure(model, loader, schedules=("8", "16"), labelled=True)
    prediction_changes.draw(result)                     # accuracy against GMACs, over all and class by class
    prediction_changes.draw_classes(result)             # classes, sorted by how often they change
    worst = prediction_changes.most_changed(result)     # images, sorted by how far their prediction moved

Every schedule runs on the same weights and the same images; r = 0 is what it is compared with.

Command: run/analyze.py changes. Shapes: S schedules (r = 0 first), I images.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer

from models import MergeConfig, MergingViT, UserError, apply_merging
from models.gmacs import gmacs
from models.schedule import format_schedule, parse_schedule

from . import charts
from .inputs import ImageBatches, as_list, batches, evaluation, labelled_batches
from .intervals import LEAST, Estimate, difference, mean, text

SCHEDULES = ("4", "8", "12", "16")
MOST_CLASSES = 24  # in a figure
Named = Callable[[int], str]  # a class's name by its index


@dataclass
class ChangesResult:
    """The predictions of one model under several schedules.

    Attributes:
        label: the model's name in figures.
        method: of merging.
        schedules: r as a command line writes it; "0" first.
        gmacs: (S,) multiply-adds per image, in 1e9.
        tops: (S,I) predicted class.
        confidence: (S,I) probability of it.
        kept: (S,I) probability of the class that r = 0 predicts.
        kl: (S,I) KL(r = 0 || merged) in nats.
        labels: (I,) true classes; None: not known.
    """

    label: str
    method: str
    schedules: list[str]
    gmacs: list[float]
    tops: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    confidence: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    kept: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    kl: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    labels: np.ndarray | None = None

    @property
    def images(self) -> int:
        """Number of images."""
        return self.tops.shape[1]

    @property
    def right(self) -> np.ndarray:
        """(S,I): whether the prediction is right; without labels, whether it is that of r = 0."""
        return self.tops == (self.tops[0] if self.labels is None else self.labels)

    @property
    def measure_name(self) -> str:
        """The name of what `right` is about."""
        return "same top-1 as r=0" if self.labels is None else "top-1 accuracy"

    def of_class(self) -> np.ndarray:
        """(I,) the class by which images are told apart: the true one, or the one that r = 0 predicts."""
        return self.tops[0] if self.labels is None else self.labels


@torch.no_grad()
def measure(
    model: VisionTransformer,
    images: ImageBatches,
    *,
    schedules: Sequence[str] = SCHEDULES,
    labelled: bool = False,
    label: str = "model",
) -> ChangesResult:
    """Predict every image under every schedule, in one pass.

    Args:
        model: its method of merging is used; ToMe's if it merges nothing.
        images: see `inputs.ImageBatches`; with `labelled`, batches that begin with images and labels.
        schedules: in any form of `MergeConfig.r`.

    Raises:
        UserError: there is no image.
    """
    names = list(dict.fromkeys(["0", *(format_schedule(parse_schedule(r)) for r in schedules)]))
    with evaluation(model) as vit:
        merging = that_merges(vit)
        result = ChangesResult(label, merging.merge.method, names, [gmacs(merging, r) for r in names])
        rows, labels = [], []
        pairs = labelled_batches(images, merging) if labelled else ((batch, None) for batch in batches(images, merging))
        for batch, targets in pairs:
            logs = torch.stack([merging(batch, r=r).double().log_softmax(dim=1) for r in names]).cpu()  # (S,B,classes)
            best = logs.max(dim=2)
            kept = logs.gather(2, best.indices[:1, :, None].expand(len(names), -1, -1)).squeeze(2).exp()
            kl = (logs[0].exp() * (logs[0] - logs)).sum(dim=2).clamp(min=0)
            rows.append((best.indices.numpy(), best.values.exp().numpy(), kept.numpy(), kl.numpy()))
            labels += [] if targets is None else [targets.cpu().numpy()]
    if not rows:
        raise UserError("none of the images can be read")
    parts = (np.concatenate(arrays, axis=1) for arrays in zip(*rows, strict=True))
    result.tops, result.confidence, result.kept, result.kl = parts
    result.labels = np.concatenate(labels) if labels else None
    return result


def that_merges(model: MergingViT) -> MergingViT:
    """The model, or where it merges nothing one by ToMe that shares its weights."""
    return apply_merging(model, MergeConfig()).eval() if model.merge.method == "none" else model


def most_changed(result: ChangesResult, schedule: int = -1, count: int = 12) -> list[int]:
    """Images whose prediction moved most (KL) among those whose top-1 changed, most first."""
    changed = np.nonzero(result.tops[schedule] != result.tops[0])[0]
    return [int(i) for i in changed[np.argsort(-result.kl[schedule][changed], kind="stable")][:count]]


@dataclass(frozen=True)
class ClassRow:
    """One class: how many images it has, and how its predictions change under a schedule."""

    index: int
    images: int
    changed: Estimate  # share of images whose top-1 is not that of r = 0
    drop: Estimate  # accuracy less that of r = 0, paired


def class_rows(result: ChangesResult, schedule: int = -1) -> list[ClassRow]:
    """All classes, those that change most first."""
    of_class, rows = result.of_class(), []
    changed = (result.tops[schedule] != result.tops[0]).astype(float)
    right = result.right.astype(float)
    for index in np.unique(of_class):
        chosen = of_class == index
        drop = difference(right[0][chosen], right[schedule][chosen])
        rows.append(ClassRow(int(index), int(chosen.sum()), mean(changed[chosen]), drop))
    return sorted(rows, key=lambda row: (-row.changed.value, -row.images, row.index))


def summarise(result: ChangesResult, named: Named = str) -> dict[str, Any]:
    """Numbers for json: a row per schedule with intervals over images, classes, images (all shares are fractions)."""
    right = result.right.astype(float)
    rows = []
    for index, name in enumerate(result.schedules):
        row: dict[str, Any] = {"r": name, "gmacs": result.gmacs[index]}
        row |= mean((result.tops[index] == result.tops[0]).astype(float)).named("agree")
        row |= mean(result.kl[index]).named("kl")
        if result.labels is not None:
            row |= mean(right[index]).named("acc1") | difference(right[0], right[index]).named("acc1_minus_unmerged")
            row["broken"] = int(((right[0] == 1) & (right[index] == 0)).sum())
            row["mended"] = int(((right[0] == 0) & (right[index] == 1)).sum())
        rows.append(row)
    classes = [
        {
            "class": named(row.index),
            "index": row.index,
            "n_images": row.images,
            **row.changed.named("changed"),
            **({} if result.labels is None else row.drop.named("acc1_minus_unmerged")),
        }
        for row in class_rows(result)
    ]
    return {
        "label": result.label,
        "method": result.method,
        "n_images": result.images,
        "rows": rows,
        "classes_under": result.schedules[-1],
        "classes": classes,
    }


# Figures


@charts.styled
def draw(results: ChangesResult | Sequence[ChangesResult], named: Named = str) -> Figure:
    """Draw accuracy (without labels: agreement with r = 0) against GMACs: over all images, and class by class."""
    results = as_list(results)
    figure, axes = charts.new_figure(1, 1 + len(results), 4.6, 3.6, "What a GMAC buys")
    ax = axes[0, 0]
    for index, result in enumerate(results):
        estimates = [mean(row.astype(float)) for row in result.right]
        colour = charts.colour_of(index)
        ax.plot(result.gmacs, [100 * value.value for value in estimates], color=colour, marker="o", ms=3.5)
        for x, value, name in zip(result.gmacs, estimates, result.schedules, strict=True):
            if value.ci95 is not None:
                ax.plot([x, x], [100 * bound for bound in value.ci95], color=colour, lw=1.2)
            ax.annotate(f"r={name}", (x, 100 * value.value), (3, -9), textcoords="offset points", fontsize=6.5)
        ax.plot(
            [], [], color=colour, marker="o", ms=3.5, label=f"{result.label}, {result.method} (n = {result.images})"
        )
    ax.set_ylim(0, 102)
    ax.set_xlim(0, None)
    ax.set(title="all images", xlabel="GMACs per image", ylabel=f"{results[0].measure_name} (%)")
    ax.legend(loc="lower right")
    for ax, result in zip(axes[0, 1:], results, strict=True):
        _draw_class_lines(ax, result, named)
    note = "Lines: 95 % over images; the schedules see the same images, so differences (in the json) are surer. "
    charts.footer(
        figure, note + f"Classes of fewer than {LEAST} images are left out, for one image would be 20 % and more."
    )
    return figure


def _draw_class_lines(ax: Axes, result: ChangesResult, named: Named) -> None:
    """Draw a line per class with images enough; those that lose most in colour, by name."""
    of_class, right = result.of_class(), result.right.astype(float)
    curves = {}
    for index in np.unique(of_class):
        chosen = of_class == index
        if chosen.sum() >= LEAST:
            curves[int(index)] = 100 * right[:, chosen].mean(axis=1)
    losers = sorted(curves, key=lambda index: curves[index][-1] - curves[index][0])[:5]
    for index, curve in curves.items():
        if index not in losers:
            ax.plot(result.gmacs, curve, color=charts.FAINT, lw=0.7, alpha=0.5)
    for place, index in enumerate(losers):
        label = f"{named(index)} ({int((of_class == index).sum())})"
        ax.plot(result.gmacs, curves[index], color=charts.colour_of(place + 1), marker="o", ms=3, label=label)
    ax.set_ylim(0, 102)
    ax.set_xlim(0, None)
    ax.set(title=f"{result.label}: {len(curves)} classes of {LEAST} images or more", xlabel="GMACs per image")
    if losers:
        ax.legend(loc="lower right", fontsize=7, title="lose most (images)", title_fontsize=7)
    else:
        ax.text(0.5, 0.5, f"no class has {LEAST} images", transform=ax.transAxes, ha="center", color=charts.FAINT)


@charts.styled
def draw_classes(result: ChangesResult, named: Named = str, schedule: int = -1) -> Figure:
    """Draw the classes that change most under a schedule: share of their images with another top-1 than at r = 0."""
    rows = [row for row in class_rows(result, schedule) if row.changed.shown]
    left = len(class_rows(result, schedule)) - len(rows)
    rows = rows[:MOST_CLASSES]
    title = f"{result.label}: which classes change at r={result.schedules[schedule]}"
    figure, axes = charts.new_figure(1, 1, 6.4, 1.0 + 0.2 * max(2, len(rows)), title)
    ax = axes[0, 0]
    for y, row in enumerate(rows):
        span = None if row.changed.ci95 is None else [100 * bound for bound in row.changed.ci95]
        charts.dots(ax, y, 100 * row.changed.value, span, charts.colour_of(1), across=True)
    if not rows:
        ax.text(0.5, 0.5, f"no class has {LEAST} images", transform=ax.transAxes, ha="center", color=charts.FAINT)
    overall = mean((result.tops[schedule] != result.tops[0]).astype(float))
    ax.axvline(100 * overall.value, color=charts.INK, lw=1, ls=":", label=f"all images: {text(overall, 1, 100)} %")
    ax.set_yticks(range(len(rows)), [f"{named(row.index)} ({row.images})" for row in rows], fontsize=7.5)
    ax.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    ax.set_xlim(0, 102)
    ax.set_xlabel("images with another top-1 than at r=0 (%); lines: 95 % over images")
    ax.grid(False, axis="y")
    ax.legend(loc="lower right")
    kind = "true" if result.labels is not None else "predicted at r=0"
    note = f"Classes: {kind}; in brackets their images. {left} classes of fewer than {LEAST} images "
    note += "are not drawn. Of many "
    charts.footer(figure, note + "classes the topmost are partly luck: look at the intervals.")
    return figure


def draw_images(
    result: ChangesResult,
    pictures: np.ndarray,
    shown: Sequence[int],
    named: Named = str,
    schedule: int = -1,
    captions: Sequence[str] = (),
) -> Figure:
    """Draw images whose prediction changed, with both predictions and their probabilities.

    Args:
        pictures: (K,H,W,3) in [0, 1] of the images
        shown: (K,) by their places, as `most_changed` gives them.
    """

    def cell(place: int) -> charts.Cell:
        index = shown[place]

        def draw_one(ax: Axes) -> None:
            charts.show_image(ax, pictures[place])
            before, after = (
                f"{named(int(result.tops[s, index]))[:22]} {100 * result.confidence[s, index]:.0f} %"
                for s in (0, schedule)
            )
            lines = [
                f"r=0: {before}",
                f"r={result.schedules[schedule]}: {after}",
                f"KL {result.kl[schedule, index]:.2f}",
            ]
            if result.labels is not None:
                marks = ["right" if result.right[s, index] else "wrong" for s in (0, schedule)]
                lines[2] += f", {marks[0]}, now {marks[1]}"
            ax.set_xlabel("\n".join(lines), fontsize=6.5, labelpad=2)

        return draw_one

    wide = 6
    cells = [cell(place) for place in range(len(shown))]
    rows = [cells[at : at + wide] for at in range(0, len(cells), wide)]
    count = int((result.tops[schedule] != result.tops[0]).sum())
    title = f"{result.label}: the {len(shown)} images that {result.method} r={result.schedules[schedule]} moves most"
    note = f"{count} of n = {result.images} images ({100 * count / result.images:.1f} %) have another "
    note += "top-1 than at r=0; these "
    note += "are those of the largest KL, so they are no sample."
    return charts.picture_table(rows, [], None, title, aspect=1.35, note=note)


# Command


def add_parser(subparsers: Any) -> None:
    """Add the command `changes`."""
    from .command import add_command

    about = "images and classes whose prediction changes under merging, and accuracy against GMACs"
    parser = add_command(subparsers, "changes", run, about)
    parser.add_argument(
        "--r_values", nargs="+", default=list(SCHEDULES), metavar="r", help="schedules, as --r; the last is looked into"
    )
    parser.add_argument("--show", type=int, default=12, metavar="K", help="images drawn (default: 12)")


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    """Write changes.json, changes.npz and the figures."""
    from utils import log

    from . import command

    schedules = [format_schedule(parse_schedule(text)) for text in args.r_values]
    models = command.load_models(args, main_argv)
    for loaded in models:
        for r in schedules:
            that_merges(loaded.model).plan(r)
    out = command.Output(args, main_argv, models)
    results, sets, names = [], [], []
    for loaded in models:
        images = command.Images(args, loaded, title=f"predictions of {loaded.label}")
        out.about(images.note)
        labelled = command.labels_fit(args, loaded)
        results.append(measure(loaded.model, images, schedules=schedules, labelled=labelled, label=loaded.label))
        sets.append(images)
        names.append(command.class_namer(args, loaded))
    out.json("changes", {"models": [summarise(r, named) for r, named in zip(results, names, strict=True)]})
    out.npz("changes", {f"{r.label}/{key}": getattr(r, key) for r in results for key in ("tops", "kept", "kl")})
    out.figure("changes_gmacs", draw(results, names[0]))
    for loaded, result, images, named in zip(models, results, sets, names, strict=True):
        out.figure(f"changes_classes_{loaded.slug}", draw_classes(result, named))
        shown = most_changed(result, count=max(0, args.show))
        if not shown:
            log(f"{loaded.label}: no prediction changes at r={result.schedules[-1]}, or --show 0: no image is drawn")
            continue
        _, pictures = images.only(shown, "pictures").load()
        out.figure(f"changes_images_{loaded.slug}", draw_images(result, pictures, shown, named))
    for result in results:
        row = summarise(result)["rows"][-1]
        agree = f"{100 * row['agree']:.2f} % agree with r=0 (n = {result.images})"
        log(f"{result.label}, {result.method} r={row['r']}: {agree}")
