"""Similarity: neighbouring patches, outliers among normal tokens, and attention maps of registers with each other.

    first = similarity.measure(model, images)
    second = similarity.measure(another, images, yardstick=first.yardstick)      # judged by the same cut
    similarity.draw([first, second]).savefig("outliers.png")

Command: run/analyze.py similarity. Shapes: B batch, N tokens, T patch tokens, P prefix tokens, C channels, I images,
(gh,gw) the patch grid.
"""

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models import MergingViT, UserError

from . import charts
from .inputs import ImageBatches, as_list, batches, evaluation
from .intervals import LEAST, Estimate, estimate, mean_over, paired, resample, text
from .outliers import (
    DEFAULT_RULE,
    SCALED,
    SHARED,
    Histogram,
    Rule,
    Yardstick,
    add_outlier_rule,
    describe_cuts,
    norms,
)
from .walk import Layer, attention, check_layer, layer_at, per_patch, to_grid, walk

AUC_BINS = 256  # of an image's histogram, for the interval of the AUC


def neighbour_cosines(x: Tensor) -> Tensor:
    """Cosine of patches (B,gh,gw,C) with those up, down, left, right: (B,4,gh,gw), NaN beyond the border."""
    x = F.normalize(x.float(), dim=-1)
    batch, rows, columns, _ = x.shape
    out = x.new_full((batch, 4, rows, columns), float("nan"))
    down = (x[:, 1:] * x[:, :-1]).sum(dim=-1)
    right = (x[:, :, 1:] * x[:, :, :-1]).sum(dim=-1)
    out[:, 0, 1:], out[:, 1, :-1] = down, down
    out[:, 2, :, 1:], out[:, 3, :, :-1] = right, right
    return out


@dataclass
class CosineHistogram:
    """Cosines of two populations (normal, outlier): 4096 bins over [-1, 1], and few numbers per image.

    Attributes:
        counts: (2,bins) pairs of normal and of outlier patches.
        sums: per batch (B,4): sum and number of the pairs of normal and of outlier patches, per image.
        coarse: per batch (B,2,AUC_BINS) pairs per image, for the interval of the AUC.
    """

    bins: int = 4096
    counts: np.ndarray = field(init=False)
    sums: list[np.ndarray] = field(default_factory=list)
    coarse: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = np.zeros((2, self.bins), dtype=np.int64)

    def add(self, cosines: Tensor, outlier: Tensor) -> None:
        """Count cosines (B,...), NaN left out, with a flag each."""
        images = len(cosines)
        values, labels = cosines.reshape(images, -1).double(), outlier.reshape(images, -1).long()
        valid = ~values.isnan()
        image = torch.arange(images, device=values.device).unsqueeze(1).expand_as(values)[valid]
        values, labels = values[valid], labels[valid]
        index = ((values.clamp(-1, 1) + 1) / 2 * self.bins).long().clamp(max=self.bins - 1)
        counts = torch.bincount(labels * self.bins + index, minlength=2 * self.bins)
        self.counts += counts.view(2, self.bins).cpu().numpy()
        row = image * 2 + labels
        total = torch.bincount(row, weights=values, minlength=2 * images).view(images, 2)
        number = torch.bincount(row, minlength=2 * images).view(images, 2)
        self.sums.append(torch.stack((total, number), dim=2).flatten(1).cpu().numpy())
        few = torch.bincount(row * AUC_BINS + index * AUC_BINS // self.bins, minlength=2 * images * AUC_BINS)
        self.coarse.append(few.view(images, 2, AUC_BINS).to(torch.int32).cpu().numpy())

    @property
    def centres(self) -> np.ndarray:
        """Middles (bins,) of the bins."""
        return (np.arange(self.bins) + 0.5) / self.bins * 2 - 1

    def means(self) -> dict[str, Estimate]:
        """Mean cosine of the pairs of normal and of outlier patches, with intervals over images."""
        table = np.concatenate(self.sums)
        return {name: mean_over(table[:, at], table[:, at + 1]) for name, at in (("normal", 0), ("outlier", 2))}

    def auc(self) -> Estimate:
        """The chance that an outlier's pair is more similar than a normal patch's; images with outliers contribute."""
        table, contributes = self._per_image()
        found = estimate(table, _coarse_auc, contributes)
        return Estimate(area_under_curve(self.counts[1], self.counts[0]), found.ci95, found.n)

    def auc_less(self, other: "CosineHistogram") -> Estimate:
        """This AUC less that of another model on the same images, which are resampled together."""
        (first, in_first), (second, in_second) = other._per_image(), self._per_image()
        found = paired(first, second, _coarse_auc, (in_first, in_second))
        value = area_under_curve(self.counts[1], self.counts[0]) - area_under_curve(other.counts[1], other.counts[0])
        return Estimate(value, found.ci95, found.n)

    def _per_image(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of each image in coarse bins (I,2*AUC_BINS), and whether it has an outlier (I,)."""
        table = np.concatenate(self.coarse)
        return table.reshape(len(table), -1), table[:, 1].sum(axis=1) > 0

    def summary(self) -> dict[str, Any]:
        """Pairs, mean and median of both with intervals over images, and the AUC."""
        numbers = self.counts.sum(axis=1)
        summary: dict[str, Any] = {}
        for name, count, row in zip(("normal", "outlier"), numbers, self.counts, strict=True):
            middle = int(np.searchsorted(row.cumsum(), count / 2))
            summary[f"{name}_pairs"] = int(count)
            summary[f"{name}_median"] = float(self.centres[min(middle, self.bins - 1)]) if count else float("nan")
        for name, value in self.means().items():
            summary |= value.named(f"{name}_mean")
        return summary | self.auc().named("auc")


def _coarse_auc(row: np.ndarray) -> float:
    """The AUC of sums of `CosineHistogram.coarse`."""
    return area_under_curve(row[AUC_BINS:], row[:AUC_BINS])


def area_under_curve(first: np.ndarray, second: np.ndarray) -> float:
    """Chance that a draw of the first histogram is larger than one of the second, ties counted half."""
    pairs = float(first.sum()) * float(second.sum())
    if not pairs:
        return float("nan")
    below = second.cumsum() - second
    return float((first * (below + second / 2)).sum() / pairs)


@dataclass
class _AcrossImages:
    """Sums over images of one set of tokens, for the pairs of different images."""

    total: Tensor  # (C,) sum of all unit vectors
    inner: float = 0.0  # sum over images of |sum of the image's unit vectors|^2
    count: float = 0.0  # tokens
    count_squared: float = 0.0  # sum over images of the square of their number
    images: int = 0  # that have such tokens

    def mean(self) -> float | None:
        """Mean cosine of two tokens of different images: all pairs less those within an image."""
        return _ratio(float(self.total.square().sum()) - self.inner, self.count**2 - self.count_squared)


@dataclass
class GroupCosines:
    """Mean cosine within and between sets of tokens, over all pairs.

    A sum of cosines over pairs of unit vectors u is a product of sums: sum_ij u_i.u_j = |sum_i u_i|^2, and between two
    sets (sum_i u_i).(sum_j v_j). So one sum of vectors per set and image is enough, which is exact and linear in the
    number of tokens. The mean over ordered pairs of distinct members of a set leaves out the n pairs of a token with
    itself, whose cosine is 1: (|sum u|^2 - n) / (n (n - 1)).
    """

    sums: dict[str, list[np.ndarray]] = field(default_factory=dict)  # per batch (B,2): sum and number of the pairs
    across: dict[str, _AcrossImages] = field(default_factory=dict)

    def add(self, x: Tensor, outlier: Tensor, others: dict[str, Tensor] | None = None) -> None:
        """Take in a batch.

        Args:
            x: (B,T,C) tokens.
            outlier: (B,T) bool.
            others: more tokens (B,C) by name, compared with outlier and normal ones.
        """
        unit = F.normalize(x.double(), dim=-1)
        sets = {"outlier": outlier, "normal": ~outlier}
        total = {name: (unit * chosen.unsqueeze(-1)).sum(dim=1) for name, chosen in sets.items()}  # (B,C)
        number = {name: chosen.sum(dim=1).double() for name, chosen in sets.items()}  # (B,)
        for name in sets:
            n, inner = number[name], total[name].square().sum(dim=1)
            self._count(f"{name}-{name}", inner - n, n * (n - 1))
            across = self.across.setdefault(name, _AcrossImages(torch.zeros_like(total[name][0])))
            across.total += total[name].sum(dim=0)
            across.inner += float(inner.sum())
            across.count += float(n.sum())
            across.count_squared += float((n**2).sum())
            across.images += int((n > 0).sum())
        self._count("outlier-normal", (total["outlier"] * total["normal"]).sum(1), number["outlier"] * number["normal"])
        for other, tokens in (others or {}).items():
            direction = F.normalize(tokens.double(), dim=-1)
            for name in sets:
                self._count(f"{name}-{other}", (total[name] * direction).sum(dim=1), number[name])

    def _count(self, key: str, total: Tensor, pairs: Tensor) -> None:
        self.sums.setdefault(key, []).append(torch.stack((total, pairs), dim=1).cpu().numpy())

    def tables(self) -> dict[str, np.ndarray]:
        """Sum and number of the pairs of each image (I,2), by name."""
        return {key: np.concatenate(rows) for key, rows in self.sums.items()}

    def estimates(self) -> dict[str, Estimate]:
        """Mean cosine over all pairs within images, with intervals over images; registers are also joined into one."""
        tables = self.tables()
        for name in ("outlier", "normal"):
            registers = [table for key, table in tables.items() if key.startswith(f"{name}-register")]
            if registers:
                tables[f"{name}-registers"] = np.sum(registers, axis=0)
        return {
            key: mean_over(table[:, 0], np.where(table[:, 1] > 0.5, table[:, 1], 0)) for key, table in tables.items()
        }

    def means(self) -> dict[str, float | None]:
        """Mean cosine over all pairs within images by name, and `X-X across images`; None where there is no pair."""
        tables = {key: table.sum(axis=0) for key, table in self.tables().items()}
        within = {key: _ratio(total, pairs) for key, (total, pairs) in tables.items()}
        return within | {f"{name}-{name} across images": across.mean() for name, across in self.across.items()}


def _ratio(total: float, pairs: float) -> float | None:
    return float(total / pairs) if pairs > 0.5 else None


def map_cosines(maps: Tensor) -> Tensor:
    """Cosines of K maps with each other: (B,K,...) -> (B,K,K)."""
    unit = F.normalize(maps.flatten(2).float(), dim=-1)
    return unit @ unit.transpose(1, 2)


@dataclass
class Cosines:
    """What one cut tells apart.

    Attributes:
        cut: the norm above which a patch token is an outlier.
        outliers: patches above it, per batch (B,).
        neighbours: cosines of patch embeddings with their neighbours.
        raw, centred: cosines of tokens, as they are and less the mean patch token.
    """

    cut: float
    outliers: list[np.ndarray] = field(default_factory=list)
    neighbours: CosineHistogram = field(default_factory=CosineHistogram)
    raw: GroupCosines = field(default_factory=GroupCosines)
    centred: GroupCosines = field(default_factory=GroupCosines)

    @property
    def images_with(self) -> int:
        """Images that have an outlier."""
        return int((np.concatenate(self.outliers) > 0).sum())

    def summary(self) -> dict[str, Any]:
        """Numbers for json."""
        return {
            "cut": self.cut,
            "images_with": self.images_with,
            "neighbours": self.neighbours.summary(),
            "cosines": self.raw.means(),
            "cosines_ci95": {key: value.ci95 for key, value in self.raw.estimates().items()},
            "cosines_centred": self.centred.means(),
            "cosines_centred_ci95": {key: value.ci95 for key, value in self.centred.estimates().items()},
            "cosines_n": {key: value.n for key, value in self.raw.estimates().items()},
        }


@dataclass
class SimilarityResult:
    """Similarities of one model's tokens over a set of images.

    Attributes:
        label: the model's name in figures.
        layer: block whose output outliers are judged by.
        yardstick: the shared cut, to be given to the measurement of the next model.
        mean: (C,) mean patch token there.
        by_cut: cosines under the shared cut and under the one scaled by the medians.
        images: number of images.
        token_types: names of the prefix tokens in the last block, P of them.
        maps: (P,P) mean cosine of their attention maps in the last block.
        maps_ci95: (2,P,P) the ends of its interval over images; NaN below five images.
    """

    label: str
    layer: int
    yardstick: Yardstick
    mean: Tensor
    by_cut: dict[str, Cosines]
    images: int = 0
    token_types: tuple[str, ...] = ()
    maps: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    maps_ci95: np.ndarray = field(default_factory=lambda: np.zeros((2, 0, 0)))

    @property
    def drawn(self) -> list[tuple[str, Cosines]]:
        """The cuts that differ: both, or for the model that the yardstick was made on the shared one alone."""
        shared, scaled = self.by_cut[SHARED], self.by_cut[SCALED]
        return [(SHARED, shared)] + ([] if scaled is shared else [(SCALED, scaled)])


@torch.no_grad()
def measure(
    model: VisionTransformer,
    images: ImageBatches,
    *,
    layer: int = -1,
    rule: Rule = DEFAULT_RULE,
    yardstick: Yardstick | None = None,
    label: str = "model",
) -> SimilarityResult:
    """Measure similarities in two passes over the images: the first one finds the cut and the mean token.

    Args:
        model: a `MergingViT`, or a timm ViT that it can be made of.
        images: (B,3,H,W) as the model sees them, or batches of them, to be iterated twice.
        layer: block after which outliers are judged; -1 is the last.
        rule: how outliers are told, where there is no
        yardstick: cut of another model that this one is compared with (its result's `yardstick`).

    Raises:
        UserError: there is no image or no such layer.
    """
    with evaluation(model) as model:
        layer = check_layer(model, layer, label=label)
        histogram, mean, number = _first_pass(model, images, layer)
        yardstick = yardstick or Yardstick.made_on(histogram, rule, label)
        cuts = yardstick.cuts(histogram)
        shared = Cosines(cuts[SHARED])
        same = abs(cuts[SCALED] - cuts[SHARED]) < 1e-6 * cuts[SHARED]
        result = SimilarityResult(
            label, layer, yardstick, mean, {SHARED: shared, SCALED: shared if same else Cosines(cuts[SCALED])}
        )
        maps = []
        for batch in batches(images, model):
            last = _measure_batch(result, model, batch)
            maps.append(_cosines_of_maps(last))
            result.images += len(batch)
    if result.images != number:
        raise UserError(f"the first pass saw {number} images, the second {result.images}; give a list, not a generator")
    result.token_types = last.token_types
    table = np.concatenate(maps)
    result.maps = table.mean(axis=0)
    result.maps_ci95 = np.full((2, *result.maps.shape), np.nan)
    if number >= LEAST and result.maps.size:
        flat = np.array(list(resample(table.reshape(number, -1)))) / number
        result.maps_ci95 = np.quantile(flat, (0.025, 0.975), axis=0).reshape(2, *result.maps.shape)
    return result


def _first_pass(model: MergingViT, images: ImageBatches, index: int) -> tuple[Histogram, Tensor, int]:
    """Norms and mean (C,) of the patch tokens after a block, and the number of images."""
    histogram, number, tokens = Histogram(), 0, 0
    total = torch.zeros(model.embed_dim, dtype=torch.float64)
    for batch in batches(images, model):
        layer = layer_at(model, batch, index)
        x = layer.after.x[:, layer.num_prefix_tokens :]
        histogram.add(norms(x))
        total += x.double().sum(dim=(0, 1)).cpu()
        tokens += x.shape[0] * x.shape[1]
        number += len(batch)
    if not number:
        raise UserError("none of the images can be read")
    return histogram, (total / tokens).float(), number


def _measure_batch(result: SimilarityResult, model: MergingViT, images: Tensor) -> Layer:
    """Add a batch to `result`; return the last block."""
    for layer in walk(model, images):
        if layer.index == result.layer:
            for _, cosines in result.drawn:
                _compare(cosines, result.mean, model, layer, images)
    return layer


def _compare(result: Cosines, mean: Tensor, model: MergingViT, layer: Layer, images: Tensor) -> None:
    """Compare the outliers after a block: their input patches with the neighbours, and the tokens among themselves."""
    x = layer.after.x[:, layer.num_prefix_tokens :].float()
    outlier = norms(x) > result.cut
    # patch embeddings before positions are added, and a label for the patch in the middle of each pair
    embedded = model.patch_embed(images)
    cosines = neighbour_cosines(embedded.reshape(len(embedded), *layer.grid, -1))
    of_patches = to_grid(outlier, layer.after.group, layer.grid)
    result.outliers.append(of_patches.flatten(1).sum(dim=1).cpu().numpy())
    result.neighbours.add(cosines, of_patches.unsqueeze(1).expand_as(cosines))
    others = {name: layer.after.x[:, index].float() for index, name in enumerate(layer.token_types)}
    result.raw.add(x, outlier, others)
    mean = mean.to(x)
    result.centred.add(x - mean, outlier, {name: tokens - mean for name, tokens in others.items()})


def _cosines_of_maps(layer: Layer) -> np.ndarray:
    """Cosines (B,P,P) of the prefix tokens' attention maps."""
    maps = per_patch(attention(layer)[:, :, : layer.num_prefix_tokens].mean(dim=1), layer)
    return map_cosines(maps).double().cpu().numpy()


def summarise(result: SimilarityResult, baseline: SimilarityResult | None = None) -> dict[str, Any]:
    """Numbers of one model, under both cuts; a mean over no pair is None or NaN.

    Args:
        baseline: another model on the same images: the AUC less its one comes too, paired by image.
    """
    cuts = {name: cosines.summary() for name, cosines in result.by_cut.items()}
    if baseline is not None and baseline is not result and baseline.images == result.images:
        for name, cosines in result.by_cut.items():
            change = cosines.neighbours.auc_less(baseline.by_cut[name].neighbours)
            cuts[name]["neighbours"] |= change.named("auc_minus_baseline")
    return {
        "label": result.label,
        "n_images": result.images,
        "outlier_cut": {"rule": str(result.yardstick.rule), "of": result.yardstick.of, "cut": result.yardstick.cut},
        **cuts,
        "map_kinds": list(result.token_types),
        "map_cosines": result.maps.tolist(),
        "map_cosines_ci95": result.maps_ci95.tolist(),
    }


# Figures


def _cut_note(results: Sequence[SimilarityResult]) -> str:
    return describe_cuts(results[0].yardstick, {result.label: result.by_cut[SCALED].cut for result in results})


def _series(results: Sequence[SimilarityResult]) -> list[tuple[str, str, str, Cosines]]:
    """What is drawn side by side: label, name of the cut, colour, cosines."""
    return [
        (f"{result.label}, {'scaled' if name == SCALED else 'shared'} cut {cosines.cut:.1f}", name, colour, cosines)
        for result, colour in zip(results, map(charts.colour_of, range(len(results))), strict=True)
        for name, cosines in result.drawn
    ]


@charts.styled
def draw(results: SimilarityResult | Sequence[SimilarityResult]) -> Figure:
    """Draw mean cosines within and between outliers, normal tokens and the prefix, raw and less the mean token."""
    results = as_list(results)
    series = _series(results)
    keys = list(dict.fromkeys(key for *_, cosines in series for key in _rows(cosines.raw)))
    height = max(0.3, 0.13 * len(series)) * len(keys) + 0.9
    figure, axes = charts.new_figure(1, 2, 5.0, height, "Cosines of tokens", sharey=True)
    titles = {"raw": "raw", "centred": "after removing the data set's mean token"}
    step = 0.76 / len(series)
    for ax, (kind, title) in zip(axes[0], titles.items(), strict=True):
        for index, (label, name, colour, cosines) in enumerate(series):
            rows = _rows(getattr(cosines, kind))
            for y, key in enumerate(keys):
                _draw_cosine(ax, rows.get(key), y + (index - (len(series) - 1) / 2) * step, colour, name == SCALED)
            kwargs = dict(
                marker="s" if name == SCALED else "o", ls="", ms=4.5, mfc="white" if name == SCALED else colour
            )
            ax.plot([], [], color=colour, label=f"{label}; {cosines.images_with} images have outliers", **kwargs)
        ax.axvline(0, color=charts.FAINT, lw=0.8)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("mean cosine (line: 95 % over images)")
        ax.set_xlim(-0.4, 1.02)
    axes[0, 0].set_yticks(range(len(keys)), keys)
    axes[0, 0].set_ylim(len(keys) - 0.5, -0.5)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", fontsize=7.5)
    n = f"n = {results[0].images} images; nothing is drawn that fewer than {LEAST} contribute to; "
    charts.footer(figure, n + "no interval across images.", _cut_note(results))
    return figure


def _rows(group: GroupCosines) -> dict[str, Estimate]:
    """What `draw` shows: registers in one row, and pairs across images, which have no interval."""
    within = group.estimates()
    rows = {key: value for key, value in within.items() if not re.search(r"register \d", key)}
    for name, across in group.across.items():
        value = across.mean()
        rows[f"{name}-{name} across images"] = Estimate(np.nan if value is None else value, None, across.images)
    return {key: value for key, value in rows.items() if value.n}


def _draw_cosine(ax: Axes, value: Estimate | None, y: float, colour: str, hollow: bool) -> None:
    if value is None:
        return
    if not value.shown:
        ax.annotate(f"n = {value.n}", (-0.39, y), fontsize=6, color=colour, va="center")
        return
    charts.dots(ax, y, value.value, value.ci95, colour, across=True)
    if hollow:
        ax.plot([value.value], [y], marker="s", color=colour, mfc="white", ms=4.5)


@charts.styled
def draw_neighbours(results: SimilarityResult | Sequence[SimilarityResult]) -> Figure:
    """Draw the distribution of the cosine of an input patch with its neighbours, outliers against normal patches.

    It is drawn as the share of pairs below a cosine: a density is all peak at 1.
    """
    results = as_list(results)
    panels = [(result, name, cosines) for result in results for name, cosines in result.drawn]
    title = "Input patches and their four neighbours"
    figure, axes = charts.new_figure(1, len(panels), 4.6, 3.4, title, sharey=True)
    for ax, (result, name, cosines) in zip(axes[0], panels, strict=True):
        means, auc = cosines.neighbours.means(), cosines.neighbours.auc()
        for index, (kind, counts) in enumerate(zip(("normal", "outlier"), cosines.neighbours.counts, strict=True)):
            if not counts.sum() or not means[kind].shown:
                ax.plot([], [], color=charts.colour_of(index), label=f"{kind}: not drawn, n = {means[kind].n} images")
                continue
            label = f"{kind}: mean {text(means[kind], 2)}, {means[kind].n} images"
            below = counts.cumsum() / counts.sum()
            ax.plot(cosines.neighbours.centres, below, color=charts.colour_of(index), label=label)
        cut = f"{'scaled' if name == SCALED else 'shared'} cut {cosines.cut:.1f}"
        ax.set_title(f"{result.label}, {cut}\nAUC {text(auc, 3)} (chance 0.5)", fontsize=9)
        ax.set_xlabel("cosine of patch embeddings (without position)")
        ax.set_xlim(-0.5, 1)
        ax.set_ylim(0, 1)
        ax.legend(loc="upper left", fontsize=7.5)
    axes[0, 0].set_ylabel("share of pairs below")
    note = "AUC: the chance that an outlier's pair is more similar than a normal patch's; 95 % intervals over images."
    charts.footer(figure, note, _cut_note(results))
    return figure


@charts.styled
def draw_maps(results: SimilarityResult | Sequence[SimilarityResult]) -> Figure:
    """Draw the likeness of the prefix tokens' attention maps, with the numbers and their intervals over images."""
    results = as_list(results)
    size = 1.9 + 0.62 * max(len(result.token_types) for result in results)
    figure, axes = charts.new_figure(1, len(results), size, size, "Last block: attention maps, cosine")
    for ax, result in zip(axes[0], results, strict=True):
        ax.grid(False)
        drawn = ax.imshow(result.maps, vmin=0, vmax=1, cmap=charts.HEAT)
        names = range(len(result.token_types)), result.token_types
        ax.set_xticks(*names, rotation=90, fontsize=8)
        ax.set_yticks(*names, fontsize=8)
        for (row, column), value in np.ndenumerate(result.maps):
            colour = "white" if value < 0.6 else charts.INK
            low, high = result.maps_ci95[:, row, column]
            span = f"\n[{low:.3f},\n{high:.3f}]" if np.isfinite(low) and row != column else ""
            ax.text(column, row, f"{value:.3f}{span}", ha="center", va="center", fontsize=6, color=colour)
        ax.set_title(f"{result.label} (n = {result.images})", fontsize=9)
    charts.colour_bar(figure, drawn, axes[0].tolist(), "cosine of maps, mean over images")
    return figure


# Command


def add_parser(subparsers: Any) -> None:
    """Add the command `similarity`."""
    from .command import add_command

    parser = add_command(
        subparsers, "similarity", run, "cosine to the neighbours, outlier against normal tokens, register maps"
    )
    add_outlier_rule(parser)
    parser.add_argument("--layer", type=int, default=-1, metavar="BLOCK", help="whose norms make outliers (last)")


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    """Measure all models and write similarity.json, an npz per model, and the figures."""
    from .command import Images, Output, load_models

    models, rule = load_models(args, main_argv), Rule.parse(args.outlier_rule)
    out = Output(args, main_argv, models)
    for loaded in models:
        check_layer(loaded.model, args.layer, "--layer", loaded.label)
    results: list[SimilarityResult] = []
    for loaded in models:
        images = Images(args, loaded, title=(f"norms of {loaded.label}", f"similarity of {loaded.label}"))
        out.about(images.note)
        common = results[0].yardstick if results else None
        results.append(measure(loaded.model, images, layer=args.layer, rule=rule, yardstick=common, label=loaded.label))
    rows = [summarise(result, results[0]) for result in results]
    out.json("similarity", {"outlier_rule": str(rule), "models": rows})
    for loaded, result in zip(models, results, strict=True):
        out.npz(f"similarity_{loaded.slug}", arrays(result))
    out.figure("similarity_neighbours", draw_neighbours(results))
    out.figure("similarity_outliers", draw(results))
    several = [result for result in results if len(result.token_types) > 1]
    if several:
        out.figure("similarity_maps", draw_maps(several))


def arrays(result: SimilarityResult) -> dict[str, np.ndarray]:
    """Arrays of the npz."""
    found = {"map_cosines": result.maps, "neighbour_centres": result.by_cut[SHARED].neighbours.centres}
    for name, cosines in result.by_cut.items():
        found[f"{name}/neighbour_counts"] = cosines.neighbours.counts
        found |= {f"{name}/sums_and_pairs/{key}": table for key, table in cosines.raw.tables().items()}
    return found
