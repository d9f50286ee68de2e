"""analyze.py similarity: neighbouring patches, outliers and normal tokens, register maps, layers with each other."""

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from models import UserError

from . import charts
from .command import Images, Loaded, Output, add_command, load_models
from .outliers import (
    CosineHistogram,
    GroupCosines,
    Histogram,
    Rule,
    layer_tables,
    map_cosines,
    neighbour_cosines,
    norms,
    per_patch,
)
from .walk import Layer, attention, final, to_grid, walk

SAMPLES = 2048  # tokens that layers are compared on


def add_parser(subparsers: Any) -> None:
    text = "cosine to the neighbours, outlier against normal tokens, register maps, CKA and cosine between layers"
    parser = add_command(subparsers, "similarity", run, text)
    parser.add_argument("--outlier_rule", type=Rule.parse, default=Rule("quantile", 0.98), metavar="RULE")
    parser.add_argument("--layer", type=int, default=-1, metavar="BLOCK", help="whose norms make outliers (last)")


@dataclass
class Found:
    """Everything measured on one model."""

    loaded: Loaded
    cut: float
    mean: Tensor  # (C,) of the patch tokens at the chosen layer
    neighbours: CosineHistogram = field(default_factory=CosineHistogram)
    raw: GroupCosines = field(default_factory=GroupCosines)
    centred: GroupCosines = field(default_factory=GroupCosines)
    kinds: tuple[str, ...] = ()
    maps: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))  # (P,P) mean cosine of attention maps
    cka: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))  # (L,L)
    cosine: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    stages: tuple[str, ...] = ()
    images: int = 0


def run(own: Namespace, rest: Sequence[str]) -> None:
    models = load_models(own, rest)
    out = Output(own, rest, models)
    found: list[Found] = []
    for loaded in models:
        depth = len(loaded.model.blocks)
        if not -depth <= own.layer < depth:
            raise UserError(f"--layer is {own.layer}, but {loaded.label} has blocks 0..{depth - 1} (or -{depth}..-1)")
    for loaded in models:
        found.append(measure(own, loaded))
    out.json("similarity", {"outlier_rule": str(own.outlier_rule), "models": [_row(one) for one in found]})
    for one in found:
        arrays = {"neighbour_counts": one.neighbours.counts, "neighbour_centres": one.neighbours.centres}
        arrays |= {"map_cosines": one.maps, "cka": one.cka, "layer_cosine": one.cosine}
        out.npz(f"similarity_{one.loaded.slug}", arrays)
    out.png("similarity_neighbours", draw_neighbours(found))
    out.png("similarity_outliers", draw_outliers(found))
    out.png("similarity_layers", draw_layers(found))
    if any(len(one.kinds) > 1 for one in found):
        out.png("similarity_maps", draw_maps([one for one in found if len(one.kinds) > 1]))


def _row(one: Found) -> dict[str, Any]:
    row: dict[str, Any] = {"label": one.loaded.label, "n_images": one.images, "cut": one.cut}
    row |= {"neighbours": one.neighbours.summary(), "cosines": one.raw.means()}
    row |= {"cosines_centred": one.centred.means(), "map_kinds": list(one.kinds), "map_cosines": one.maps.tolist()}
    return row | {"stages": list(one.stages), "cka": one.cka.tolist(), "layer_cosine": one.cosine.tolist()}


def measure(own: Namespace, loaded: Loaded) -> Found:
    """Two passes: the cut and the mean token first, then everything that needs them."""
    found = Found(loaded, *_threshold(own, loaded))
    images = Images(own, loaded, title=f"similarity of {loaded.label}")
    samples: list[Tensor] = []
    generator = torch.Generator().manual_seed(loaded.args.seed)
    total = torch.zeros(0, 0)
    for batch in images:
        chosen = _sample(found.images, len(batch.images), len(images), loaded, generator)
        stages, total = _measure_batch(own, found, batch.images, chosen, total)
        samples.append(stages)
        found.images += len(batch.images)
    found.maps = (total / found.images).numpy()
    found.cka, found.cosine = layer_tables(torch.cat(samples, dim=1))
    found.stages = ("input", *(str(index) for index in range(len(loaded.model.blocks))), "final norm")
    return found


def _sample(done: int, batch: int, total: int, loaded: Loaded, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random patches, about SAMPLES in the whole set and evenly spread over its images: (image, patch) in the batch."""
    patches = loaded.model.patch_embed.num_patches
    until = [min(patches * place, SAMPLES * place // total) for place in range(done, done + batch + 1)]
    numbers = torch.tensor(until).diff()
    rows = torch.arange(batch).repeat_interleave(numbers)
    order = torch.rand(batch, patches, generator=generator).argsort(dim=1)
    return rows, torch.cat([order[row, :number] for row, number in enumerate(numbers.tolist())])


def _threshold(own: Namespace, loaded: Loaded) -> tuple[float, Tensor]:
    model, histogram = loaded.model, Histogram()
    total, number = torch.zeros(model.embed_dim, dtype=torch.float64), 0
    for batch in Images(own, loaded, title=f"norms of {loaded.label}"):
        layer = _layer(own, loaded, batch.images)
        x = layer.after.x[:, layer.num_prefix_tokens :]
        histogram.add(norms(x))
        total += x.double().sum(dim=(0, 1)).cpu()
        number += x.shape[0] * x.shape[1]
    if not number:
        raise UserError("none of the images can be read")
    return own.outlier_rule.cut(histogram), (total / number).float()


def _layer(own: Namespace, loaded: Loaded, images: Tensor) -> Layer:
    for layer in walk(loaded.model, images):
        if layer.index == own.layer % len(loaded.model.blocks):
            return layer
    raise AssertionError("the layer was checked before")


def _measure_batch(
    own: Namespace, found: Found, images: Tensor, chosen: tuple[Tensor, Tensor], total: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds a batch to `found`; returns sampled tokens of all stages (L,S,C) and the sum of map cosines."""
    model, stages = found.loaded.model, []
    for layer in walk(model, images):
        if layer.index == 0:
            stages.append(_take(layer.before.x, layer.before.group, layer.num_prefix_tokens, chosen))
        stages.append(_take(layer.after.x, layer.after.group, layer.num_prefix_tokens, chosen))
        if layer.index == own.layer % len(model.blocks):
            _compare(found, layer, images)
    stages.append(_take(final(model, layer), layer.after.group, layer.num_prefix_tokens, chosen))
    if layer.num_prefix_tokens:
        found.kinds = layer.token_types
        maps = per_patch(attention(layer)[:, :, : layer.num_prefix_tokens].mean(dim=1), layer)
        cosines = map_cosines(maps).sum(dim=0).double().cpu()
        total = cosines if not total.numel() else total + cosines
    return torch.stack(stages), total


def _take(x: Tensor, group: Tensor, prefix: int, chosen: tuple[Tensor, Tensor]) -> Tensor:
    """Tokens of the chosen patches: (B,N,C) -> (S,C) in fp32 on the CPU."""
    rows, patches = (index.to(x.device) for index in chosen)
    return x[rows, group[rows, patches] + prefix].float().cpu()


def _compare(found: Found, layer: Layer, images: Tensor) -> None:
    """Outliers of this layer: their input patches' neighbours, and the tokens among themselves."""
    x = layer.after.x[:, layer.num_prefix_tokens :].float()
    outlier = norms(x) > found.cut
    found.neighbours.add(*_neighbours(found.loaded, images, to_grid(outlier, layer.after.group, layer.grid)))
    others = {kind: layer.after.x[:, index].float() for index, kind in enumerate(layer.token_types)}
    found.raw.add(x, outlier, others)
    mean = found.mean.to(x)
    found.centred.add(x - mean, outlier, {kind: tokens - mean for kind, tokens in others.items()})


def _neighbours(loaded: Loaded, images: Tensor, outlier: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of patch embeddings before positions are added, and the label of the patch in the middle of each pair."""
    with torch.no_grad():
        x = loaded.model.patch_embed(images)
    cosines = neighbour_cosines(x.reshape(len(x), *outlier.shape[1:], -1))
    return cosines, outlier.unsqueeze(1).expand_as(cosines)


# Pictures


@charts.styled
def draw_neighbours(found: Sequence[Found]) -> Figure:
    """Distribution of the cosine of an input patch with its neighbours, outliers against normal patches."""
    figure, axes = charts.new_figure(1, len(found), 4.6, 3.0, "Input patches and their four neighbours", sharey=True)
    for ax, one in zip(axes[0], found, strict=True):
        summary = one.neighbours.summary()
        for label, counts, colour in zip(
            ("normal", "outlier"), one.neighbours.counts, (charts.colour_of(0), charts.colour_of(1)), strict=True
        ):
            if not counts.sum():
                continue
            text = f"{label}: mean {summary[f'{label}_mean']:.3f}, {counts.sum()} pairs"
            x, y = _smooth(one.neighbours.centres, counts)
            ax.plot(x, y, color=colour, label=text)
            ax.fill_between(x, y, color=colour, alpha=0.12, lw=0)
        ax.set_title(f"{one.loaded.label}: AUC {summary['auc']:.3f}")
        ax.set_xlabel("cosine of patch embeddings (without position)")
        ax.legend(loc="upper left")
    axes[0, 0].set_ylabel("density")
    return figure


def _smooth(centres: np.ndarray, counts: np.ndarray, width: float = 0.012) -> tuple[np.ndarray, np.ndarray]:
    """A density by a Gaussian of fixed width on the histogram, mirrored at 1 so that no mass is lost there."""
    step = centres[1] - centres[0]
    offsets = np.arange(-int(4 * width / step), int(4 * width / step) + 1) * step
    kernel = np.exp(-0.5 * (offsets / width) ** 2)
    half = len(offsets) // 2
    padded = np.concatenate([counts[half - 1 :: -1], counts, counts[: -half - 1 : -1]]).astype(float)
    smooth = np.convolve(padded, kernel / kernel.sum(), mode="valid") / (counts.sum() * step)
    low = max(-1.0, float(centres[np.searchsorted(counts.cumsum(), 0.002 * counts.sum())]) - 0.05)
    inside = centres >= low
    return centres[inside], smooth[inside]


@charts.styled
def draw_outliers(found: Sequence[Found]) -> Figure:
    """Mean cosines within and between outliers, normal tokens and the prefix, raw and after removing the mean token."""
    tables = {name: [_joined(getattr(one, name).means()) for one in found] for name in ("raw", "centred")}
    keys = list(dict.fromkeys(key for table in tables["raw"] for key in table))
    figure, axes = charts.new_figure(1, 2, 5.0, 0.9 + 0.3 * len(keys), "Cosines of tokens", sharey=True)
    names = ("raw", "after removing the data set's mean token")
    for ax, name, which in zip(axes[0], names, ("raw", "centred"), strict=True):
        height = 0.75 / len(found)
        for index, one in enumerate(found):
            means = tables[which][index]
            y = np.arange(len(keys)) + (index - (len(found) - 1) / 2) * height
            values = [means.get(key, np.nan) for key in keys]
            ax.barh(y, values, height * 0.9, color=charts.colour_of(index), alpha=0.8, label=one.loaded.label)
        ax.axvline(0, color=charts.FAINT, lw=0.8)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("mean cosine")
        ax.set_xlim(min(-0.3, ax.get_xlim()[0]), 1.0)
    axes[0, 0].set_yticks(range(len(keys)), keys)
    axes[0, 0].invert_yaxis()
    axes[0, 1].legend(loc="lower right")
    return figure


def _joined(means: dict[str, float | None]) -> dict[str, float]:
    """Registers in one row, the mean over them; what does not occur left out."""
    lists: dict[str, list[float]] = {}
    for key, value in means.items():
        if value is not None:
            lists.setdefault(re.sub(r"register \d+", "registers", key), []).append(value)
    return {key: sum(values) / len(values) for key, values in lists.items()}


@charts.styled
def draw_layers(found: Sequence[Found]) -> Figure:
    """Layers against each other: linear CKA and cosine of the same token."""
    figure, axes = charts.new_figure(len(found), 2, 4.2, 3.7, "Patch tokens: layer against layer")
    for line, one in zip(axes, found, strict=True):
        for ax, table, name in zip(line, (one.cka, one.cosine), ("linear CKA", "cosine"), strict=True):
            low = 0.0 if name == "linear CKA" else min(0.0, float(table.min()))
            drawn = ax.imshow(table, vmin=low, vmax=1, cmap=charts.HEAT)
            _layer_ticks(ax, one.stages)
            ax.set_title(f"{one.loaded.label}: {name}", fontsize=9)
            charts.colour_bar(figure, drawn, ax)
    return figure


def _layer_ticks(ax: Axes, stages: Sequence[str]) -> None:
    shown = list(range(0, len(stages), max(1, round(len(stages) / 14))))
    ax.grid(False)
    ax.set_xticks(shown, [stages[i] for i in shown], fontsize=7, rotation=90)
    ax.set_yticks(shown, [stages[i] for i in shown], fontsize=7)


@charts.styled
def draw_maps(found: Sequence[Found]) -> Figure:
    """Attention maps of the prefix tokens against each other, with the numbers."""
    size = 1.6 + 0.45 * max(len(one.kinds) for one in found)
    figure, axes = charts.new_figure(1, len(found), size, size, "Last block: attention maps, cosine")
    for ax, one in zip(axes[0], found, strict=True):
        ax.grid(False)
        ax.imshow(one.maps, vmin=0, vmax=1, cmap=charts.HEAT)
        ax.set_xticks(range(len(one.kinds)), one.kinds, rotation=90, fontsize=8)
        ax.set_yticks(range(len(one.kinds)), one.kinds, fontsize=8)
        for (row, column), value in np.ndenumerate(one.maps):
            colour = "white" if value < 0.6 else charts.INK
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        ax.set_title(one.loaded.label, fontsize=9)
    return figure
