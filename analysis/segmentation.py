"""Linear segmentation of the patch grid: what merging costs a head that needs a prediction for every patch.

Features of a frozen model are un-merged to the grid of patches, as `model.forward_intermediates` gives them, and a
linear classifier labels every patch. It is cross-validated over images: every image is labelled by heads that saw no
patch of it. Three numbers tell what merging costs under each schedule, all as mean intersection over union (mIoU):

- refitted: the head is fitted to the features of that schedule;
- kept: the head is the one fitted at r = 0, as where merging is switched on behind a trained head;
- ceiling: every token has the label that most of its patches have. Patches that share a token share a prediction, so
  that no head labels more patches rightly.

    images, labels = segmentation.synthetic(64, (224, 224), (16, 16))
    result = segmentation.measure(model, [(images, labels)], classes=segmentation.TEXTURES)
    segmentation.draw(result)                                    # mIoU against GMACs
    segmentation.draw_maps(result, pictures, shown=[0, 1, 2])    # labels and predictions

Command: run/analyze.py segmentation. Shapes: I images, S schedules (r = 0 first), D divisions into folds, K classes,
n = gh * gw patches, C channels.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models import MergingViT, UserError
from models.gmacs import gmacs
from models.schedule import format_schedule, parse_schedule

from . import charts
from .inputs import as_list, evaluation, labelled_batches
from .intervals import estimate, paired
from .prediction_changes import that_merges
from .walk import check_layer, to_grid, walk

if TYPE_CHECKING:
    from .command import Loaded
    from .voc import Annotated

SCHEDULES = ("2", "4", "8", "13", "16")
HEADS = ("refitted", "kept", "ceiling")
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)  # L2 penalties of a head, of which a fifth of the training images chooses one
TEXTURES = ("background", "rows", "columns", "checks", "diagonals")
BACKGROUND = "background"
CLASS_COLOURS = ("#e6e6e6", *charts.COLOURS[1:], *charts.COLOURS[:1])
LabelledGrids = Iterable[Any]  # of batches that begin with images (B,3,H,W) and labels of patches (B,gh,gw)


@dataclass
class SegmentationResult:
    """Cross-validated predictions of one model under several schedules.

    Attributes:
        label: the model's name in figures.
        method: of merging.
        schedules: r as a command line writes it; "0" first.
        gmacs: (S,) multiply-adds per image, in 1e9.
        classes: names of the K classes.
        labels: (I,gh,gw) the true ones.
        tables: (S,D,I,3*K) by the names of `HEADS`: of every class an image's patches that are rightly labelled, that
            are of it, and that are labelled with it.
        place: (D,I,3*K) of a head that knows where a patch is, and nothing of the image.
        predictions: (S,I,gh,gw) of the refitted heads of the first division.
    """

    label: str
    method: str
    schedules: list[str]
    gmacs: list[float]
    classes: tuple[str, ...]
    labels: np.ndarray
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    place: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))
    predictions: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0, 0), dtype=np.int64))


def measure(
    model: VisionTransformer,
    scenes: LabelledGrids,
    *,
    classes: Sequence[str],
    schedules: Sequence[str] = SCHEDULES,
    layers: Sequence[int] = (-1,),
    folds: int = 5,
    divisions: int = 3,
    decays: Sequence[float] = DECAYS,
    label: str = "model",
    report: Callable[[str], None] | None = None,
) -> SegmentationResult:
    """Fit and judge heads under every schedule. Memory holds the features of one schedule, n * C floats an image.

    Args:
        model: its method of merging is used; ToMe's if it merges nothing.
        scenes: batches of images and of labels of their patches in [0,K); iterated once per schedule.
        classes: names of the K classes.
        schedules: in any form of `MergeConfig.r`.
        layers: blocks whose outputs, after the final norm, are the features; several are joined.
        folds: parts of the images, each of which is labelled by a head fitted to the others.
        divisions: random divisions into folds, from seeds 0, 1, ...; their spread is given.
        decays: L2 penalties; the cross-entropy at r = 0 on a fifth of the training images chooses one per fold.
        report: takes a line per schedule.

    Raises:
        UserError: too few images, or labels that are not on the model's grid.
    """
    names = list(dict.fromkeys(["0", *(format_schedule(parse_schedule(r)) for r in schedules)]))
    with evaluation(model) as vit:
        merging = that_merges(vit)
        blocks = [check_layer(merging, layer, "layers", label) for layer in layers]
        costs = [gmacs(merging, r) for r in names]
        result = SegmentationResult(label, merging.merge.method, names, costs, tuple(classes), np.zeros((0, 0, 0)))
        heads: dict[tuple[int, int], Head] = {}
        for index, r in enumerate(names):
            features, groups, labels = read_features(merging, scenes, blocks, r)
            if index == 0:
                check_labels(labels, len(classes), folds)
                result.labels = labels.numpy()
                _allocate(result, divisions)
            _judge(result, index, features, groups, folds, heads, decays)
            if report:
                values = {head: mean_iou(_total(result.tables[head][index]).sum(axis=0)) for head in HEADS}
                found = ", ".join(f"{head} {100 * value:.1f}" for head, value in values.items())
                report(f"{label}, {result.method} r={r}: mIoU {found} %")
    return result


def _allocate(result: SegmentationResult, divisions: int) -> None:
    schedules, images, kinds = len(result.schedules), len(result.labels), len(result.classes)
    shape = (schedules, divisions, images, 3 * kinds)
    result.tables = {head: np.zeros(shape, dtype=np.float32) for head in HEADS}
    result.place = np.zeros(shape[1:], dtype=np.float32)
    result.predictions = np.zeros((schedules, *result.labels.shape), dtype=np.int64)


def check_labels(labels: Tensor, classes: int, folds: int) -> None:
    """Raise a UserError for labels (I,gh,gw) that cannot be cross-validated."""
    if len(labels) < max(10, 2 * folds):
        raise UserError(f"a segmentation probe needs at least {max(10, 2 * folds)} images, there are {len(labels)}")
    if folds < 2:
        raise UserError(f"folds must be at least 2, not {folds}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise UserError(f"labels must lie in [0,{classes}), not in [{int(labels.min())},{int(labels.max())}]")


@torch.no_grad()
def read_features(
    model: MergingViT, scenes: LabelledGrids, blocks: Sequence[int], r: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (I,n,C) of the token that each patch is in, that token's number (I,n), and labels (I,gh,gw).

    They are those of `forward_intermediates(images, blocks, norm=True, r=r)`, with their channels joined. The number
    is that after the first of the blocks, where most patches are still apart.
    """
    features, groups, labels = [], [], []
    for images, targets in labelled_batches(scenes, model):
        parts: dict[int, Tensor] = {}
        group = None
        for layer in walk(model, images, r):
            if layer.index in blocks:
                tokens = model.norm(layer.after.x)[:, layer.num_prefix_tokens :]
                parts[layer.index] = to_grid(tokens, layer.after.group, layer.grid).flatten(1, 2)
                group = layer.after.group if group is None else group
                if tuple(targets.shape[1:]) != layer.grid:
                    raise UserError(f"labels must be on the grid of patches, {layer.grid}, not {targets.shape[1:]}")
        assert group is not None
        features.append(torch.cat([parts[block] for block in blocks], dim=-1).float().cpu())
        groups.append(group.cpu())
        labels.append(targets.cpu())
    if not features:
        raise UserError("there is no image to segment")
    return torch.cat(features), torch.cat(groups), torch.cat(labels)


# Heads


@dataclass(frozen=True)
class Head:
    """A linear classifier of patches, with the L2 penalty that it was fitted with."""

    linear: nn.Linear
    decay: float

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Classes (...) of features (...,C)."""
        return self.linear(features).argmax(dim=-1)


def fit_head(features: Tensor, labels: Tensor, classes: int, decay: float, iterations: int = 100) -> nn.Linear:
    """Fit multinomial logistic regression by L-BFGS to features (P,C), standardised for it, and labels (P,).

    The penalty is decay / 2 times the squared length of the weights of standardised features. Loss and penalty are
    convex, so the start does not matter; all zeros is one that draws nothing at random.

    Returns:
        A layer that takes features as they are.
    """
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    x = (features - mean) / scale
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
    linear = nn.Linear(x.shape[1], classes)
    with torch.no_grad():
        linear.weight.copy_(weight / scale)
        linear.bias.copy_(bias - linear.weight @ mean)
    return linear.requires_grad_(False)


def choose_decay(features: Tensor, labels: Tensor, classes: int, decays: Sequence[float]) -> float:
    """The penalty whose head, fitted to four of five images (I,n,C), has the lowest cross-entropy on the others."""
    if len(decays) == 1:
        return decays[0]
    held_back = torch.arange(len(features)) % 5 == 0
    fit, check = (features[~held_back].flatten(0, 1), features[held_back].flatten(0, 1))
    fit_labels, check_labels = labels[~held_back].flatten(), labels[held_back].flatten()
    losses = {
        decay: float(F.cross_entropy(fit_head(fit, fit_labels, classes, decay)(check), check_labels))
        for decay in decays
    }
    return min(losses, key=losses.__getitem__)


def fold_of(images: int, folds: int, division: int) -> Tensor:
    """The fold (I,) of every image in a random division, whose seed is its number."""
    return torch.from_numpy(np.random.default_rng(division).permutation(images) % folds)


def _judge(
    result: SegmentationResult,
    index: int,
    features: Tensor,
    groups: Tensor,
    folds: int,
    heads: dict[tuple[int, int], Head],
    decays: Sequence[float],
) -> None:
    """Fill the tables of a schedule; `heads` holds those fitted at r = 0."""
    kinds, grid = len(result.classes), result.labels.shape[1:]
    labels = torch.from_numpy(result.labels).flatten(1)
    divisions = result.place.shape[0]
    result.tables["ceiling"][index] = count(labels, majority(labels, groups, kinds), kinds)
    for division in range(divisions):
        fold = fold_of(len(labels), folds, division)
        for number in range(folds):
            test, train = fold == number, fold != number
            x, y = features[train], labels[train]
            if index == 0:
                decay = choose_decay(x, y, kinds, decays)
                heads[division, number] = Head(fit_head(x.flatten(0, 1), y.flatten(), kinds, decay), decay)
                guess = F.one_hot(y, kinds).sum(dim=0).argmax(dim=-1).expand(int(test.sum()), -1)
                result.place[division][test] = count(labels[test], guess, kinds)
            kept = heads[division, number]
            head = kept if index == 0 else Head(fit_head(x.flatten(0, 1), y.flatten(), kinds, kept.decay), kept.decay)
            for name, of in (("refitted", head), ("kept", kept)):
                predicted = of(features[test])
                result.tables[name][index, division][test] = count(labels[test], predicted, kinds)
                if name == "refitted" and division == 0:
                    result.predictions[index][test] = predicted.unflatten(1, grid).numpy()


def majority(labels: Tensor, groups: Tensor, classes: int) -> Tensor:
    """The label that most patches of a patch's token have: (I,n), (I,n) -> (I,n)."""
    counts = torch.zeros(*groups.shape, classes)
    counts.scatter_add_(1, groups.unsqueeze(-1).expand(-1, -1, classes), F.one_hot(labels, classes).float())
    return counts.argmax(dim=-1).gather(1, groups)


def count(labels: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """Patches of each image that are rightly labelled, of a class, labelled with it: (I,n), (I,n) -> (I,3*K)."""
    true, found = F.one_hot(labels, classes), F.one_hot(predicted, classes)
    return torch.cat(((true * found).sum(1), true.sum(1), found.sum(1)), dim=1).numpy().astype(np.float32)


# Numbers


def class_ious(sums: np.ndarray) -> np.ndarray:
    """Intersection over union (K,) from sums (3*K,) of `count`; NaN for a class that no patch has."""
    hit, true, found = sums.reshape(3, -1)
    return np.where(true > 0, hit / np.maximum(true + found - hit, 1), np.nan)


def mean_iou(sums: np.ndarray) -> float:
    """The mean over the classes that occur, from sums (3*K,) of `count`."""
    hit, true, found = sums.reshape(3, -1)
    occurs = true > 0
    return float((hit[occurs] / (true + found - hit)[occurs]).mean())


def _total(tables: np.ndarray) -> np.ndarray:
    """The mean over divisions of tables (D,I,3*K): (I,3*K)."""
    mean: np.ndarray = tables.mean(axis=0)
    return mean


def _spread(tables: np.ndarray, of: np.ndarray | None = None) -> float:
    """The standard deviation over divisions of the mIoU of tables (D,I,3*K), or of its difference to that of others."""
    values = [mean_iou(table.sum(axis=0)) for table in tables]
    others = [0.0] * len(values) if of is None else [mean_iou(table.sum(axis=0)) for table in of]
    return float(np.std(np.subtract(values, others), ddof=1)) if len(values) > 1 else 0.0


def summarise(result: SegmentationResult) -> dict[str, Any]:
    """Numbers for json (fractions): mIoU of every head under every schedule, and less that at r = 0, paired by image.

    `NAME` is the mIoU of all divisions' predictions together, `NAME_ci95` its interval over images, `NAME_std` the
    standard deviation over divisions (heads and folds differ, images do not).
    """
    everyone = np.ones(len(result.labels), dtype=bool)
    rows = []
    for index, name in enumerate(result.schedules):
        row: dict[str, Any] = {"r": name, "gmacs": result.gmacs[index]}
        for head in HEADS:
            dense, of = result.tables[head][0], result.tables[head][index]
            gap = paired(_total(dense), _total(of), mean_iou, (everyone, everyone))
            row |= estimate(_total(of), mean_iou).named(head) | {f"{head}_std": _spread(of)}
            row |= gap.named(f"{head}_minus_unmerged") | {f"{head}_minus_unmerged_std": _spread(of, dense)}
        ious = class_ious(result.tables["refitted"][index].sum(axis=(0, 1)))
        row["iou"] = dict(zip(result.classes, ious.tolist(), strict=True))
        rows.append(row)
    counts = np.bincount(result.labels.ravel(), minlength=len(result.classes))
    return {
        "label": result.label,
        "method": result.method,
        "n_images": len(result.labels),
        "grid": list(result.labels.shape[1:]),
        "divisions": len(result.place),
        "patches": dict(zip(result.classes, counts.tolist(), strict=True)),
        "place": estimate(_total(result.place), mean_iou).named("miou"),
        "rows": rows,
    }


# Figures


@charts.styled
def draw(results: SegmentationResult | Sequence[SegmentationResult]) -> Figure:
    """Draw mIoU against GMACs, and what of it is lost against r = 0."""
    results = as_list(results)
    figure, axes = charts.new_figure(1, 2, 5.2, 3.8, "What merging costs a linear segmentation head")
    level, loss = axes[0]
    styles = {"refitted": "-", "kept": "--", "ceiling": ":"}
    summaries = [summarise(result) for result in results]
    for index, result in enumerate(results):
        colour, rows = charts.colour_of(index), summaries[index]["rows"]
        for head in HEADS:
            level.plot(result.gmacs, [100 * row[head] for row in rows], color=colour, ls=styles[head], marker="o", ms=3)
        level.plot([], [], color=colour, marker="o", ms=3, label=f"{result.label}, {result.method}")
        for head in ("refitted", "kept"):
            for row, x in zip(rows, result.gmacs, strict=True):
                span = row[f"{head}_minus_unmerged_ci95"]
                if span is not None:
                    loss.plot([x, x], [100 * bound for bound in span], color=colour, lw=1, alpha=0.6)
            gaps = [100 * row[f"{head}_minus_unmerged"] for row in rows]
            loss.plot(result.gmacs, gaps, color=colour, ls=styles[head], marker="o", ms=3)
        for x, row in zip(result.gmacs, rows, strict=True):
            y = 100 * row["refitted_minus_unmerged"]
            loss.annotate(f"r={row['r']}", (x, y), (3, 4), textcoords="offset points", fontsize=6.5)
    place = summaries[0]["place"]["miou"]
    level.axhline(100 * place, color=charts.INK, lw=1, ls="-.", label=f"place alone, {100 * place:.1f} %")
    handles, names = level.get_legend_handles_labels()
    handles += [Line2D([], [], color=charts.FAINT, ls=styles[head]) for head in HEADS]
    level.legend(handles, [*names, *HEADS], loc="lower right", fontsize=7)
    level.set(xlabel="GMACs per image", ylabel="mIoU of patches (%)", title="level", ylim=(0, 102))
    loss.axhline(0, color=charts.INK, lw=1, ls=":")
    loss.set(xlabel="GMACs per image", ylabel="mIoU less that of r=0 (points)", title="less r=0, paired by image")
    for ax in (level, loss):
        ax.set_xlim(0, None)
    note = (
        "refitted: a head fitted to each schedule; kept: the head of r=0; ceiling: every token has the label of most "
    )
    note += f"of its patches. n = {len(results[0].labels)} images, each labelled by heads that did not see it. "
    charts.footer(figure, note + "Lines: 95 % over images.")
    return figure


def draw_maps(
    result: SegmentationResult, pictures: np.ndarray, shown: Sequence[int], schedules: Sequence[int] | None = None
) -> Figure:
    """Draw images, the labels of their patches, and the predictions of refitted heads under some schedules.

    Args:
        pictures: (K,H,W,3) in [0, 1] of the images `shown`, by their places.
        schedules: by their places; None: r = 0, the middle and the last.
    """
    last = len(result.schedules) - 1
    chosen = list(dict.fromkeys([0, (last + 1) // 2, last] if schedules is None else schedules))
    rows = []
    for picture, place in zip(pictures, shown, strict=True):
        maps = [result.labels[place], *(result.predictions[index, place] for index in chosen)]
        rows.append([charts.image_cell(picture), *(charts.rgb_cell(class_colours(values)) for values in maps)])
    columns = ["image", "labels", *(f"{result.method} r={result.schedules[index]}" for index in chosen)]
    occurring = np.unique(np.concatenate([result.labels[list(shown)].ravel(), result.predictions[:, shown].ravel()]))
    note = "Predictions of the refitted heads of the first division; no head saw the image that it labels."
    figure = charts.picture_table(rows, columns, None, f"{result.label}: segmentation", note=note)
    _legend(figure, result.classes, occurring)
    return figure


def _legend(figure: Figure, classes: Sequence[str], occurring: np.ndarray) -> None:
    marks = [
        Line2D([], [], marker="s", ls="", color=CLASS_COLOURS[index % len(CLASS_COLOURS)], label=classes[index])
        for index in occurring
    ]
    figure.legend(handles=marks, loc="outside right upper", fontsize=7, frameon=False)


def class_colours(values: np.ndarray) -> np.ndarray:
    """Classes (gh,gw) as colours (gh,gw,3); they repeat after nine."""
    palette = np.array([to_rgb(colour) for colour in CLASS_COLOURS])
    return palette[values % len(palette)]


# Scenes


def synthetic(count: int, size: tuple[int, int], patch: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (I,3,H,W) in [0, 1] of textured discs and boxes on a plain ground, and labels (I,gh,gw) of their patches.

    A class (`TEXTURES`) is a direction of stripes half a patch wide. Colours are random for every object and ground, so
    colour alone tells no class, and one patch does. A patch has the label of its middle.
    """
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    up, across = rows // max(1, patch[0] // 2) % 2, columns // max(1, patch[1] // 2) % 2
    slope = (rows * patch[1] + columns * patch[0]) // max(1, patch[0] * patch[1] // 2) % 2
    stripes = (np.zeros_like(up), up, across, up ^ across, slope)
    images, labels = np.zeros((count, *size, 3)), np.zeros((count, *size), dtype=np.int64)
    for image, label in zip(images, labels, strict=True):
        image[:] = random.uniform(0.2, 0.8, 3)
        for _ in range(random.integers(1, 4)):
            kind, inside = int(random.integers(1, len(TEXTURES))), _shape(random, rows, columns)
            colours = random.uniform(0, 0.4, 3), random.uniform(0.6, 1, 3)
            image[inside] = np.where(stripes[kind][inside][:, None] == 1, *colours)
            label[inside] = kind
        image += random.normal(0, 0.03, image.shape)
    middles = labels[:, patch[0] // 2 :: patch[0], patch[1] // 2 :: patch[1]]
    return torch.from_numpy(images.clip(0, 1)).permute(0, 3, 1, 2).float(), torch.from_numpy(middles.copy())


def _shape(random: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A mask (H,W) of a random ellipse or box."""
    height, width = rows.shape
    y, x = random.uniform(0.2, 0.8, 2) * (height, width)
    a, b = random.uniform(0.12, 0.35, 2) * (height, width)
    near, level = np.abs(rows - y) / a, np.abs(columns - x) / b
    inside: np.ndarray = near**2 + level**2 <= 1 if random.random() < 0.5 else np.maximum(near, level) <= 1
    return inside


def box_labels(boxes: np.ndarray, kinds: Sequence[int], size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """The class of every patch (gh,gw) from boxes: that of the smallest box around the patch's middle, else 0.

    Boxes are weak labels: the corners of a box are mostly background. They are the same for all schedules.

    Args:
        boxes: (k,4) x1,y1,x2,y2 in pixels of the image.
        kinds: (k,) classes above 0.
        size: (height,width) of the image, which the grid covers whole.
    """
    y = (np.arange(grid[0]) + 0.5) / grid[0] * size[0]
    x = (np.arange(grid[1]) + 0.5) / grid[1] * size[1]
    labels = np.zeros(grid, dtype=np.int64)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for index in np.argsort(-areas, kind="stable"):
        x1, y1, x2, y2 = boxes[index]
        labels[np.ix_((y1 <= y) & (y < y2), (x1 <= x) & (x < x2))] = kinds[index]
    return labels


# Command


@dataclass(frozen=True)
class Scenes:
    """Images as bytes (I,3,H,W), prepared batch by batch, with labels of their patches (I,gh,gw)."""

    images: Tensor
    labels: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield (images / 255 - mean) / std, labels

    def pictures(self, shown: Sequence[int]) -> np.ndarray:
        """Some of the images (K,H,W,3) in [0, 1]."""
        return (self.images[list(shown)].permute(0, 2, 3, 1) / 255).numpy()


def add_parser(subparsers: Any) -> None:
    """Add the command `segmentation`."""
    from .command import add_command

    about = "mIoU of a linear segmentation head on un-merged features, under several schedules"
    parser = add_command(subparsers, "segmentation", run, about, images=False)
    parser.add_argument("--voc", type=Path, metavar="FOLDER", help="Pascal VOC tree; its boxes are the labels")
    parser.add_argument("--year", type=int, choices=(2007, 2012), help="of a VOCdevkit that holds both")
    parser.add_argument("--set", default="trainval", help="list of ImageSets/Main (default: trainval)")
    parser.add_argument("--labels", choices=("objects", "classes"), default="objects", help="of --voc's boxes")
    parser.add_argument("--synthetic", type=int, metavar="N", help="so many made-up images instead; needs no data")
    parser.add_argument("--r_values", nargs="+", default=list(SCHEDULES), metavar="r", help="schedules, as --r")
    parser.add_argument(
        "--layers", nargs="+", type=int, default=[-1], metavar="BLOCK", help="features; several are joined"
    )
    parser.add_argument("--folds", type=int, default=5, metavar="N")
    parser.add_argument("--divisions", type=int, default=3, metavar="N", help="into folds, each with its own seed")
    parser.add_argument("--show", type=int, default=4, metavar="K", help="images drawn (default: 4)")


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    """Write segmentation.json, segmentation.npz and the figures."""
    from utils import log

    from . import command

    if (args.voc is None) == (args.synthetic is None):
        raise UserError("give --voc FOLDER (a Pascal VOC tree with boxes) or --synthetic N (made-up images)")
    if args.synthetic is not None and (args.year or args.labels != "objects"):
        raise UserError("--year and --labels are about the boxes of --voc; leave them out with --synthetic")
    if args.divisions < 1 or args.folds < 2:
        raise UserError("--divisions must be at least 1, and --folds at least 2")
    for flag in ("--dataset", "--data_path", "--eval_crop_ratio"):
        if any(token.split("=")[0] == flag for token in main_argv):
            raise UserError(f"{flag} has no effect on segmentation, whose labels come from --voc; leave it out")
    schedules = [format_schedule(parse_schedule(text)) for text in args.r_values]
    models = command.load_models(args, main_argv)
    for loaded in models:
        for layer in args.layers:
            check_layer(loaded.model, layer, "--layers", loaded.label)
        for r in schedules:
            that_merges(loaded.model).plan(r)
    out = command.Output(args, main_argv, models)
    results, sets = [], []
    for loaded in models:
        scenes, classes, note = _scenes(args, loaded)
        out.about(note)
        options = {"layers": args.layers, "folds": args.folds, "divisions": args.divisions, "report": log}
        results.append(
            measure(loaded.model, scenes, classes=classes, schedules=schedules, label=loaded.label, **options)
        )
        sets.append(scenes)
    settings = {"labels": args.labels if args.voc else "synthetic", "layers": args.layers, "folds": args.folds}
    out.json("segmentation", settings | {"models": [summarise(result) for result in results]})
    out.npz("segmentation", {f"{r.label}/{head}": r.tables[head] for r in results for head in HEADS})
    out.figure("segmentation", draw(results))
    for loaded, result, scenes in zip(models, results, sets, strict=True):
        shown = list(range(0, len(scenes.labels), max(1, len(scenes.labels) // max(1, args.show))))[: max(0, args.show)]
        if shown:
            out.figure(f"segmentation_{loaded.slug}", draw_maps(result, scenes.pictures(shown), shown))


def _scenes(args: Namespace, loaded: "Loaded") -> tuple[Scenes, tuple[str, ...], str]:
    """The images and labels of a command line on a model's grid, the classes, and the images in words."""
    embed, config = loaded.model.patch_embed, loaded.config
    size, grid, patch = tuple(embed.img_size), tuple(embed.grid_size), tuple(embed.patch_size)
    prepared = config.mean, config.std, loaded.args.batch_size
    if args.voc is None:
        count = min(args.synthetic, loaded.args.limit or args.synthetic)
        images, labels = synthetic(count, size, patch, loaded.args.seed)
        return Scenes((images * 255).round().byte(), labels, *prepared), TEXTURES, f"{count} made-up images"
    items, read = _annotated(args, loaded)
    names = sorted({name for item in items for name in item.classes}) if args.labels == "classes" else ["object"]
    number = {name: index for index, name in enumerate(names, start=1)}
    images_read, labels_read = [], []
    for item, picture in read:
        kinds = [number[name] if args.labels == "classes" else 1 for name in item.classes]
        assert item.boxes is not None
        labels_read.append(box_labels(item.boxes, kinds, picture.size[::-1], grid))
        resized = np.asarray(picture.resize(size[::-1], 3))  # bicubic
        images_read.append(torch.from_numpy(resized.copy()).permute(2, 0, 1))
    if len(images_read) < max(10, 2 * args.folds):
        raise UserError(f"{args.voc} gives {len(images_read)} images; {max(10, 2 * args.folds)} at least are needed")
    note = f"{args.voc}: {len(images_read)} images, resized whole to {size[1]} x {size[0]}"
    scenes = Scenes(torch.stack(images_read), torch.from_numpy(np.stack(labels_read)), *prepared)
    return scenes, (BACKGROUND, *names), note


def _annotated(args: Namespace, loaded: "Loaded") -> tuple[list["Annotated"], Iterator[tuple["Annotated", Any]]]:
    """The annotated images that --limit leaves, and those that can be read with their pictures."""
    from utils import log

    from .voc import open_voc

    items = open_voc(args.voc, args.year, args.set, no_hard=False)
    limit = loaded.args.limit
    items = items[:: math.ceil(len(items) / limit)] if limit else items

    def read() -> Iterator[tuple["Annotated", Any]]:
        for item in items:
            picture = item.read()
            if picture is None:
                log(f"unreadable, left out: {item.name}")
            else:
                yield item, picture

    return items, read()
