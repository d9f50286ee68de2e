"""Attention: what class, register and patch tokens look at, per head, in the mean, and over all blocks.

    result = attention.measure(model, images)
    attention.draw(result).savefig("metrics.png")
    maps = attention.attention_maps(model, images[:4], pictures)   # pictures: (4,H,W,3) in [0, 1]
    attention.draw_maps(maps).savefig("maps.png")

Command: run/analyze.py attention. Shapes: B batch, N tokens, M tokens after a merge, P prefix tokens, n patches at the
input, T types of tokens (prefix tokens, then the mean patch), H heads, L blocks, Q chosen patches, K images that are
drawn, I images, (gh,gw) the patch grid.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models import MergingViT, UserError
from models.merging import group_map, merge_by_map

from . import charts
from .inputs import ImageBatches, as_list, batches, evaluation
from .intervals import Estimate, difference, mean
from .walk import Layer, attention, check_layer, check_patches, in_parts, per_patch, walk

METRICS = ("entropy", "top_patch", "top_2_percent")
MASSES = ("class", "distillation", "registers", "patches")
ALL_PATCHES = "mean of patches"  # of metrics the average over patches; of maps the averaged one
MOST_COLUMNS, MOST_ROWS = 16, 12
CLIP = 0.98  # quantile at which the colours end: a few patches may hold most of the attention and hide the rest
UNIT = "attention to a patch (1: an even share of all patches)"

Tables = dict[str, dict[str, np.ndarray]]  # by token type and metric


def patch_rows(maps: Tensor, layer: Layer, patches: Sequence[tuple[int, int]]) -> Tensor:
    """Rows of the tokens that hold the given patches (row, column): (B,H,N,N) -> (B,H,Q,N)."""
    index = torch.tensor([row * layer.grid[1] + column for row, column in patches], device=maps.device)
    rows = layer.before.group[:, index] + layer.num_prefix_tokens
    return maps.gather(2, rows[:, None, :, None].expand(-1, maps.shape[1], -1, maps.shape[3]))


def summary_rows(maps: Tensor, layer: Layer) -> Tensor:
    """Rows of the prefix tokens, and last the mean row of all patches: (B,H,N,N) -> (B,H,P+1,N)."""
    size = layer.before.size[:, layer.num_prefix_tokens :]
    weight = (size / size.sum(dim=1, keepdim=True)).to(maps.dtype)
    mean = torch.einsum("bhnm,bn->bhm", maps[:, :, layer.num_prefix_tokens :], weight)
    return torch.cat((maps[:, :, : layer.num_prefix_tokens], mean.unsqueeze(2)), dim=2)


def mass_by_token_type(rows: Tensor, layer: Layer) -> dict[str, Tensor]:
    """Attention that rows (...,N) spend on class, distillation, registers and patches: each (...)."""
    mass: dict[str, Tensor] = {}
    for index, token_type in enumerate(layer.token_types):
        name = "registers" if token_type.startswith("register") else token_type
        mass[name] = mass.get(name, 0) + rows[..., index]
    mass["patches"] = rows[..., layer.num_prefix_tokens :].sum(dim=-1)
    return mass


def spread_metrics(maps: Tensor) -> dict[str, Tensor]:
    """Measure how concentrated maps (...,gh,gw) over the patches are, relative to their own mass: each (...).

    Returns:
        entropy: 1 spread evenly, 0 all on one patch.
        top_patch: share of the strongest patch.
        top_2_percent: share of the strongest 2 % of the patches (at least one).
    """
    flat = maps.flatten(-2).float()
    share = flat / flat.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    patches = share.shape[-1]
    entropy = -torch.special.xlogy(share, share).sum(dim=-1) / np.log(max(2, patches))
    strongest = share.topk(max(1, round(0.02 * patches)), dim=-1).values
    return {"entropy": entropy, "top_patch": strongest[..., 0], "top_2_percent": strongest.sum(dim=-1)}


def all_metrics(maps: Tensor, layer: Layer) -> dict[str, Tensor]:
    """All metrics of a block's maps (B,H,N,N): of every prefix token, and last the average over patches: (B,H,P+1).

    The average is that of the patches' own metrics, a merged token counting once per patch. The entropy of the averaged
    map is another thing: patches that all look at their own neighbourhood have an even map on average.
    """
    prefix = layer.num_prefix_tokens
    size = layer.before.size[:, prefix:]
    weight = size / size.sum(dim=1, keepdim=True)
    rows = {**spread_metrics(per_patch(maps, layer)), **mass_by_token_type(maps, layer)}
    return {
        name: torch.cat(
            (values[..., :prefix], torch.einsum("bhn,bn->bh", values[..., prefix:], weight.to(values)).unsqueeze(-1)),
            dim=-1,
        )
        for name, values in rows.items()
    }


class Rollout:
    """Attention rollout (arXiv 2005.00928): how much of each input token reaches each token, block after block.

    Every block mixes by (mean over heads + identity) / 2; a merge averages the rows of a group by size. Columns are the
    prefix tokens and the n patches of the input, so the result needs no un-merging.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None  # (B,M,S): S = all prefix tokens so far, then n patches
        self.token_types: tuple[str, ...] = ()

    def add(self, layer: Layer, maps: Tensor) -> None:
        """Take in one block and its map (B,H,N,N)."""
        rows = self._with_entered(layer)
        mixed = (maps.mean(dim=1).float() @ rows + rows) / 2
        if layer.merge is not None:
            left = layer.after.x.shape[1]
            mixed = merge_by_map(mixed, group_map(layer.merge), left, layer.before.size)
        self.rows = mixed

    def _with_entered(self, layer: Layer) -> Tensor:
        """The rows so far, with a row and a column for each prefix token that enters with this block."""
        batch, patches = layer.before.group.shape
        if self.rows is None:
            rows = torch.eye(patches, device=layer.before.x.device).expand(batch, -1, -1)
        else:
            rows = self.rows
        for index, token_type in enumerate(layer.token_types):
            if token_type not in self.token_types:
                rows = _insert_zeros(_insert_zeros(rows, 1, index), 2, index)
                rows[:, index, index] = 1.0
        self.token_types = layer.token_types
        return rows

    def to_patches(self, grid: tuple[int, int]) -> Tensor:
        """The share of each patch in the first prefix token (without any: in the mean patch): (B,gh,gw)."""
        assert self.rows is not None, "add comes first"
        row = self.rows[:, 0] if self.token_types else self.rows.mean(dim=1)
        return row[:, len(self.token_types) :].unflatten(1, grid)


def _insert_zeros(x: Tensor, dim: int, index: int) -> Tensor:
    """Put a slice of zeros at `index`."""
    before, after = x.split((index, x.shape[dim] - index), dim=dim)
    return torch.cat((before, torch.zeros_like(x.narrow(dim, 0, 1)), after), dim=dim)


# Metrics of many images


@dataclass
class AttentionResult:
    """Metrics of one model's attention over images.

    Attributes:
        label: the model's name in figures.
        token_types: names of the prefix tokens.
        images: number of images.
        sums: by type of token ("mean of patches" too) and metric, (L,H); NaN in blocks where the token is not present.
        per_image: the same, mean over heads, per batch (B,L).
    """

    label: str
    token_types: tuple[str, ...]
    images: int = 0
    sums: Tables = field(default_factory=dict)
    per_image: dict[str, dict[str, list[np.ndarray]]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Types of tokens, the class token first where there is one."""
        return (*self.token_types, ALL_PATCHES)

    def means(self) -> Tables:
        """Means over the images: by type of token and metric, (L,H)."""
        return {
            token_type: {name: table / self.images for name, table in self.sums[token_type].items()}
            for token_type in self.names
        }

    def of_images(self, token_type: str, metric: str) -> np.ndarray:
        """A metric of each image, mean over heads: (I,L)."""
        return np.concatenate(self.per_image[token_type][metric])

    def estimates(self, token_type: str, metric: str) -> list[Estimate]:
        """A metric in every block, mean over heads and images, with its interval over images."""
        return [mean(column) for column in self.of_images(token_type, metric).T]


@torch.no_grad()
def measure(model: VisionTransformer, images: ImageBatches, *, label: str = "model") -> AttentionResult:
    """Measure where attention goes and how concentrated it is, in all blocks and heads.

    Args:
        model: a `MergingViT`, or a timm ViT that it can be made of.
        images: (B,3,H,W) as the model sees them, or batches of them.

    Raises:
        UserError: there is no image.
    """
    with evaluation(model) as model:
        result = AttentionResult(label, model.token_types())
        shape = len(model.blocks), model.blocks[0].attn.num_heads
        for batch in batches(images, model):
            for part in in_parts(model, batch):
                for layer in walk(model, part):
                    _add_metrics(result, layer, all_metrics(attention(layer), layer), shape, len(part))
                result.images += len(part)
    if not result.images:
        raise UserError("none of the images can be read")
    return result


def _add_metrics(
    result: AttentionResult, layer: Layer, metrics: dict[str, Tensor], shape: tuple[int, int], images: int
) -> None:
    """Add the metrics (B,H,P+1) of a block."""
    for name, values in metrics.items():
        plain = values.double().cpu().numpy()
        for index, token_type in enumerate((*layer.token_types, ALL_PATCHES)):
            table = result.sums.setdefault(token_type, {}).setdefault(name, np.full(shape, np.nan))
            table[layer.index] = np.nan_to_num(table[layer.index]) + plain[:, :, index].sum(axis=0)
            rows = result.per_image.setdefault(token_type, {}).setdefault(name, [])
            if sum(map(len, rows)) <= result.images:  # the first block with this token: a place for all blocks
                rows.append(np.full((images, shape[0]), np.nan))
            rows[-1][:, layer.index] = plain[:, :, index].mean(axis=1)


def summarise(result: AttentionResult, baseline: AttentionResult | None = None) -> dict[str, Any]:
    """Metrics per block, averaged over heads, with intervals over images; None in blocks without the token.

    Args:
        baseline: another model on the same images: the last block's difference to it comes too, paired by image.
    """

    def listed(values: np.ndarray) -> list[float | None]:
        return [None if np.isnan(value) else float(value) for value in values.mean(axis=1)]

    means = result.means()
    paired = baseline is not None and baseline is not result and baseline.images == result.images
    return {
        "label": result.label,
        "n_images": result.images,
        "last_block_minus_baseline": _differences(baseline, result) if baseline is not None and paired else None,
        "per_block": {
            token: {name: listed(values) for name, values in table.items()} for token, table in means.items()
        },
        "per_block_ci95": {
            token: {name: [value.ci95 for value in result.estimates(token, name)] for name in table}
            for token, table in means.items()
        },
    }


def _differences(baseline: AttentionResult, result: AttentionResult) -> dict[str, dict[str, Any]]:
    """Metrics of the last block less the baseline's, of the tokens that both models have."""
    found: dict[str, dict[str, Any]] = {}
    for token in (name for name in result.names if name in baseline.names):
        found[token] = {}
        for metric in METRICS:
            first, second = (of.of_images(token, metric)[:, -1] for of in (baseline, result))
            found[token] |= difference(first, second).named(metric)
    return found


# Maps of a few images


@dataclass
class AttentionMaps:
    """A few images and their attention maps.

    Attributes:
        label: the model's name in figures.
        layer: block of `rows` and `patches`.
        token_types: names of the prefix tokens in that block.
        queries: the Q chosen patches (row, column).
        pictures: (K,H,W,3) the images in [0, 1].
        rows: (K,H,T,gh,gw) where prefix tokens and the mean patch look.
        patches: (K,H,Q,gh,gw) where the chosen patches look.
        rollout: (K,gh,gw), see `Rollout`.
        layers: (K,L,T,gh,gw) where they look in every block, mean over heads; NaN before a token enters.
        captions: names of the images.
    """

    label: str
    layer: int
    token_types: tuple[str, ...]
    queries: list[tuple[int, int]]
    pictures: np.ndarray
    rows: np.ndarray
    patches: np.ndarray
    rollout: np.ndarray
    layers: np.ndarray
    captions: list[str] = field(default_factory=list)

    @property
    def mean(self) -> np.ndarray:
        """`rows`, averaged over heads."""
        return self.rows.mean(axis=1)

    @property
    def names(self) -> tuple[str, ...]:
        """The T types of tokens."""
        return (*self.token_types, ALL_PATCHES)

    @property
    def even(self) -> int:
        """The number of patches: a map times it is 1 where attention is spread evenly."""
        return self.rows.shape[-1] * self.rows.shape[-2]

    @property
    def first(self) -> str:
        """The token whose map comes first: the class token, or the mean patch where there is no prefix."""
        return self.names[0]


@torch.no_grad()
def attention_maps(
    model: VisionTransformer,
    images: Tensor,
    pictures: np.ndarray,
    *,
    layer: int = -1,
    patches: Sequence[tuple[int, int]] | None = None,
    captions: Sequence[str] = (),
    label: str = "model",
) -> AttentionMaps:
    """Take the attention maps of a few images.

    Args:
        model: a `MergingViT`, or a timm ViT that it can be made of.
        images: (K,3,H,W) as the model sees them.
        pictures: (K,H,W,3) the same in [0, 1].
        layer: block of the maps; -1 is the last.
        patches: chosen patches (row, column); None: three of them.
        captions: names of the images.

    Raises:
        UserError: no such layer or patch.
    """
    with evaluation(model) as model:
        index = check_layer(model, layer, label=label)
        queries = check_patches(model, patches, label=label)
        parts = [
            _maps_of(model, part, index, queries) for batch in batches(images, model) for part in in_parts(model, batch)
        ]
        types = model.token_types(index)
    rows, patch_maps, rollout, layers = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return AttentionMaps(label, index, types, queries, pictures, rows, patch_maps, rollout, layers, list(captions))


def _maps_of(
    model: MergingViT, images: Tensor, index: int, queries: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, ...]:
    """`rows`, `patches`, `rollout` and `layers` of `AttentionMaps`."""
    rollout, layers, rows, patches = Rollout(), [], Tensor(), Tensor()
    names = (*model.token_types(), ALL_PATCHES)
    for layer in walk(model, images):
        maps = attention(layer)
        rollout.add(layer, maps)
        summary = summary_rows(maps, layer)
        layers.append(torch.stack([_map_of_token(summary, layer, name) for name in names], dim=1))
        if layer.index == index:
            rows = per_patch(summary, layer)
            patches = per_patch(patch_rows(maps, layer, queries), layer)
    tensors = (rows, patches, rollout.to_patches(layer.grid), torch.stack(layers, dim=1))
    return tuple(tensor.float().cpu().numpy() for tensor in tensors)


def _map_of_token(summary: Tensor, layer: Layer, token_type: str) -> Tensor:
    """The map (B,gh,gw) of one type of token; NaN in blocks before it enters."""
    present = (*layer.token_types, ALL_PATCHES)
    maps = per_patch(summary.mean(dim=1), layer)
    if token_type not in present:
        return torch.full_like(maps[:, 0], torch.nan)
    return maps[:, present.index(token_type)]


# Figures

TITLES = {
    "entropy": "normalised entropy (1: even, 0: one patch)",
    "top_patch": "share of the top patch",
    "top_2_percent": "share of the top 2 % of patches",
}


@charts.styled
def draw(results: AttentionResult | Sequence[AttentionResult]) -> Figure:
    """Draw where the first token's attention goes, model by model, and below how concentrated it is, all models."""
    results = as_list(results)
    count, bottom = len(results), len(METRICS)
    figure, _ = charts.new_figure(1, 1, 11.1 if count < 4 else 3.7 * count, 5.6, "Attention over the blocks")
    figure.clf()
    figure.suptitle("Attention over the blocks", x=0.01, ha="left", fontsize=11, fontweight="bold")
    grid = figure.add_gridspec(2, bottom * count)
    for index, result in enumerate(results):
        ax = figure.add_subplot(grid[0, bottom * index : bottom * (index + 1)])
        first, table = next(iter(result.means().items()))
        _draw_masses(ax, table, f"{result.label}: the {first}'s attention" if first == "class" else f"{result.label}")
        ax.set_xlabel(f"block (mean over heads and n = {result.images} images)")
        ax.set_ylabel("share of its attention")
    for index, name in enumerate(METRICS):
        ax = figure.add_subplot(grid[1, count * index : count * (index + 1)])
        _draw_metric(ax, name, results, legend=index == 0)
        ax.set_title(TITLES[name], fontsize=9)
        ax.set_ylabel("normalised entropy" if name == "entropy" else "share")
        ax.set_ylim(0, 1.02 if name == "entropy" else None)
    note = "Band: lowest to highest head; upright lines: 95 % over images. Dotted: the average over patches of the "
    charts.footer(figure, note + "patches' own values. All axes start at 0.")
    return figure


def _draw_masses(ax: Axes, table: dict[str, np.ndarray], title: str) -> None:
    names = [name for name in MASSES if name in table]
    layers = [np.nan_to_num(table[name].mean(axis=1)) for name in names]
    colours = [charts.token_colour(name) for name in names]
    ax.stackplot(np.arange(len(layers[0])), layers, labels=[f"to {name}" for name in names], colors=colours, alpha=0.75)
    ax.set_ylim(0, 1)
    ax.set_xlim(0, len(layers[0]) - 1)
    ax.set_title(title, fontsize=9)
    ax.legend(loc="lower left")


def _draw_metric(ax: Axes, name: str, results: Sequence[AttentionResult], legend: bool) -> None:
    """Draw the first token's metric, its heads as a band from the lowest to the highest; dotted: the average patch."""
    for index, result in enumerate(results):
        means, colour = result.means(), charts.colour_of(index)
        first = result.names[0]
        values = means[first][name]
        x = np.arange(len(values))
        ax.fill_between(x, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.13, lw=0)
        ax.plot(x, values.mean(axis=1), color=colour, label=f"{result.label}: {first}")
        for at, value in enumerate(result.estimates(first, name)):
            if value.ci95 is not None:
                ax.plot([at, at], value.ci95, color=colour, lw=1)
        ax.plot(x, means[ALL_PATCHES][name].mean(axis=1), color=colour, ls=":", lw=1.4)
    ax.plot([], [], color=charts.FAINT, ls=":", lw=1.2, label="average over patches")
    ax.set_xlabel("block")
    if legend:
        ax.legend(loc="lower left", fontsize=7)


@dataclass(frozen=True)
class Scales:
    """Colour scales of maps: the same for all that is drawn with them, models included.

    Attributes:
        tokens: of maps averaged over heads, in multiples of an even share.
        heads: of single heads.
        rollout: of rollout, likewise.
    """

    tokens: tuple[float, float]
    heads: tuple[float, float]
    rollout: tuple[float, float]

    @classmethod
    def common(cls, maps: Sequence[AttentionMaps]) -> "Scales":
        """One scale for the maps of all models and images, from 0 to the 98 % quantile."""

        def limits(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
            return 0.0, charts.common_limits(arrays, CLIP)[1]

        tokens = [array * of.even for of in maps for array in (of.mean, of.layers, of.patches.mean(axis=1))]
        return cls(
            limits(tokens),
            limits([of.rows[:, :, 0] * of.even for of in maps]),
            limits([of.rollout * of.even for of in maps]),
        )


OWN = "every picture has a colour scale of its own: compare shapes, not strengths"
ONE = "one colour scale for all pictures and models; colours end at the 98 % quantile"


def _table(
    maps: AttentionMaps,
    rows: Sequence[Sequence[Any]],
    columns: Sequence[str],
    title: str,
    bars: Sequence[charts.Bar] | None,
    note: str = "",
    captions: Sequence[str] | None = None,
) -> Figure:
    """A table of maps; bars None: every picture on a scale of its own."""
    notes = ". ".join(part for part in (note, OWN if bars is None else ONE) if part)
    captions = maps.captions if captions is None else captions
    return charts.picture_table(rows, columns, captions or None, title, note=notes, bars=bars or ())


def _limits(values: np.ndarray, scale: tuple[float, float] | None) -> tuple[float, float]:
    return scale or (0.0, max(charts.common_limits([values], CLIP)[1], 1e-12))


def draw_maps(maps: AttentionMaps, scales: Scales | None = None, own_scale: bool = False) -> Figure:
    """Draw the first token's map, raw and laid over the image, every register's, the mean patch's, and rollout.

    Args:
        scales: of all models that are compared; None: of these maps.
        own_scale: a scale for each picture instead.
    """
    scales = scales or Scales.common([maps])
    mean, rows = maps.mean * maps.even, []
    kept = _kept(len(maps.names))
    for index, picture in enumerate(maps.pictures):
        layers = [*mean[index][kept], maps.rollout[index] * maps.even]
        used = [scales.tokens] * len(kept) + [scales.rollout]
        limits = [_limits(layer, None if own_scale else scale) for layer, scale in zip(layers, used, strict=True)]
        overlays = [charts.overlay_cell(picture, *pair) for pair in zip(layers, limits, strict=True)]
        rows.append([charts.image_cell(picture), charts.map_cell(layers[0], limits[0]), *overlays])
    names = [maps.names[index] for index in kept]
    columns = ["input", f"{maps.first}, raw", *names[:-1], "map averaged over patches", "rollout"]
    bars = [
        charts.Bar((1, len(columns) - 2), scales.tokens, UNIT, over=True),
        charts.Bar((len(columns) - 1, len(columns) - 1), scales.rollout, "rollout (1: even)", over=True),
    ]
    title = f"{maps.label}, attention in block {maps.layer}"
    return _table(maps, rows, columns, title, None if own_scale else bars, "mean over heads; laid over at 60 %")


def _kept(count: int) -> list[int]:
    """Indices without their middle: sixteen registers and more do not fit on a page."""
    most = MOST_COLUMNS - 3
    return list(range(count)) if count <= most else [*range(most - 1), count - 1]


def draw_heads(maps: AttentionMaps, scales: Scales | None = None, own_scale: bool = False) -> Figure:
    """Draw the first token's map of every head."""
    scales = scales or Scales.common([maps])
    heads = min(maps.rows.shape[1], MOST_COLUMNS - 1)
    rows = []
    for picture, of_heads in zip(maps.pictures, maps.rows[:, :, 0] * maps.even, strict=True):
        cells = [charts.map_cell(m, _limits(m, None if own_scale else scales.heads)) for m in of_heads[:heads]]
        rows.append([charts.image_cell(picture), *cells])
    columns = ["input", *(f"head {head}" for head in range(heads))]
    bars = [charts.Bar((1, heads), scales.heads, UNIT, over=True)]
    title = f"{maps.label}, {maps.first}'s attention in block {maps.layer}, head by head"
    return _table(maps, rows, columns, title, None if own_scale else bars)


def draw_patches(maps: AttentionMaps, scales: Scales | None = None, own_scale: bool = False) -> Figure:
    """Draw where the chosen patches look; they are outlined."""
    scales = scales or Scales.common([maps])
    rows = []
    for picture, query_maps in zip(maps.pictures, maps.patches.mean(axis=1) * maps.even, strict=True):
        cells = [
            charts.overlay_cell(picture, m, _limits(m, None if own_scale else scales.tokens), query)
            for m, query in zip(query_maps, maps.queries, strict=True)
        ]
        rows.append([charts.image_cell(picture), *cells])
    columns = ["input", *(f"from patch {row},{column}" for row, column in maps.queries)]
    bars = [charts.Bar((1, len(maps.queries)), scales.tokens, UNIT, over=True)]
    title = f"{maps.label}, attention of single patches in block {maps.layer}"
    note = "mean over heads; red: the patch that looks"
    return _table(maps, rows, columns, title, None if own_scale else bars, note)


def _spread_blocks(depth: int) -> list[int]:
    chosen = np.linspace(0, depth - 1, min(depth, MOST_COLUMNS - 1)).round().astype(int)
    return [int(index) for index in np.unique(chosen)]


def draw_layers(maps: AttentionMaps, scales: Scales | None = None, own_scale: bool = False) -> Figure:
    """Draw the first token's mean map in every block (up to 15, evenly spread)."""
    scales, chosen = scales or Scales.common([maps]), _spread_blocks(maps.layers.shape[1])
    rows = [
        [charts.image_cell(picture), *_block_cells(of_tokens[:, 0] * maps.even, chosen, scales, own_scale)]
        for picture, of_tokens in zip(maps.pictures, maps.layers, strict=True)
    ]
    columns = ["input", *(f"block {index}" for index in chosen)]
    bars = [charts.Bar((1, len(chosen)), scales.tokens, UNIT, over=True)]
    title = f"{maps.label}, {maps.first}'s attention block by block"
    return _table(maps, rows, columns, title, None if own_scale else bars, "mean over heads")


def _block_cells(of_blocks: np.ndarray, chosen: Sequence[int], scales: Scales, own_scale: bool) -> list[Any]:
    scale = None if own_scale else scales.tokens
    return [charts.map_cell(of_blocks[i], _limits(of_blocks[i], scale)) for i in chosen]


def draw_registers(
    maps: AttentionMaps, over: str = "blocks", scales: Scales | None = None, own_scale: bool = False
) -> Figure:
    """Draw where the class token and each register look: a row per image and token, a column per block or head.

    Args:
        over: "blocks" (mean over heads), or "heads" of the chosen block.
    """
    scales, names = scales or Scales.common([maps]), list(maps.token_types)
    if over == "heads":
        heads = min(maps.rows.shape[1], MOST_COLUMNS - 1)
        table, columns, used = maps.rows.swapaxes(1, 2), [f"head {head}" for head in range(heads)], scales.heads
    else:
        blocks = _spread_blocks(maps.layers.shape[1])
        table, columns, used = maps.layers.swapaxes(1, 2), [f"block {index}" for index in blocks], scales.tokens
    chosen = range(len(columns)) if over == "heads" else blocks
    rows, captions = [], []
    for index, picture in enumerate(maps.pictures[: max(1, MOST_ROWS // max(1, len(names)))]):
        for token, name in enumerate(names):
            of_token = table[index, token] * maps.even
            cells = [charts.map_cell(of_token[i], _limits(of_token[i], None if own_scale else used)) for i in chosen]
            rows.append([charts.image_cell(picture), *cells])
            captions.append(name)
    bars = [charts.Bar((1, len(columns)), used, UNIT, over=True)]
    where = "block by block" if over == "blocks" else f"in block {maps.layer}, head by head"
    title = f"{maps.label}, attention of class token and registers {where}"
    return _table(maps, rows, ["input", *columns], title, None if own_scale else bars, captions=captions)


def draw_compare(maps: Sequence[AttentionMaps], scales: Scales | None = None, own_scale: bool = False) -> Figure:
    """Draw the same images under all models, on one scale: attention of the first token."""
    scales = scales or Scales.common(maps)
    rows = []
    for index in range(min(len(of_model.pictures) for of_model in maps)):
        firsts = [of_model.mean[index, 0] * of_model.even for of_model in maps]
        cells = [
            charts.overlay_cell(of_model.pictures[index], m, _limits(m, None if own_scale else scales.tokens))
            for of_model, m in zip(maps, firsts, strict=True)
        ]
        rows.append([charts.image_cell(maps[0].pictures[index]), *cells])
    columns = ["input", *(f"{of_model.label}, block {of_model.layer}" for of_model in maps)]
    bars = [charts.Bar((1, len(maps)), scales.tokens, UNIT, over=True)]
    title = f"Attention of the {maps[0].first} token" if maps[0].token_types else "Attention, averaged over patches"
    return _table(maps[0], rows, columns, title, None if own_scale else bars, "mean over heads; laid over at 60 %")


# Command


def add_parser(subparsers: Any) -> None:
    """Add the command `attention`."""
    from .command import add_command, add_patches_flag

    text = "attention of class, registers and patches: maps per head, mean, rollout, and their metrics per block"
    parser = add_command(subparsers, "attention", run, text)
    parser.add_argument("--layer", type=int, default=-1, metavar="BLOCK", help="whose maps are drawn (default: last)")
    parser.add_argument("--show", type=int, default=4, metavar="K", help="images drawn")
    add_patches_flag(parser, "whose attention is drawn")
    parser.add_argument(
        "--own_scale", action="store_true", help="a colour scale for each picture (default: one for all and all models)"
    )


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    """Measure all models and write attention.json, an npz per model, and the figures."""
    from utils import log

    from .command import Images, Output, load_models

    models = load_models(args, main_argv)
    for loaded in models:
        check_layer(loaded.model, args.layer, "--layer", loaded.label)
        check_patches(loaded.model, args.patches, "--patches", loaded.label)
    out = Output(args, main_argv, models)
    results = []
    for loaded in models:
        images = Images(args, loaded, title=f"attention of {loaded.label}")
        out.about(images.note)
        results.append(measure(loaded.model, images, label=loaded.label))
    out.json("attention", {"models": [summarise(result, results[0]) for result in results]})
    out.figure("attention_metrics", draw(results))
    if args.show < 1:
        log("--show 0: no map is drawn")
    maps: list[AttentionMaps] = []
    for loaded in models if args.show > 0 else ():
        images = Images(args, loaded, title=f"pictures of {loaded.label}", limit=args.show)
        tensor, pictures = images.load()
        options: dict[str, Any] = {"layer": args.layer, "patches": args.patches, "captions": images.names()}
        maps.append(attention_maps(loaded.model, tensor, pictures, **options, label=loaded.label))
    for index, (loaded, result) in enumerate(zip(models, results, strict=True)):
        out.npz(f"attention_{loaded.slug}", arrays(result, maps[index] if maps else None))
    if maps:
        _write_maps(out, models, maps, args.own_scale)


def _write_maps(out: Any, models: Sequence[Any], maps: Sequence[AttentionMaps], own: bool) -> None:
    scales = Scales.common(maps)
    for loaded, of_model in zip(models, maps, strict=True):
        out.figure(f"attention_{loaded.slug}", draw_maps(of_model, scales, own))
        out.figure(f"attention_heads_{loaded.slug}", draw_heads(of_model, scales, own))
        out.figure(f"attention_patches_{loaded.slug}", draw_patches(of_model, scales, own))
        out.figure(f"attention_layers_{loaded.slug}", draw_layers(of_model, scales, own))
        if any(name.startswith("register") for name in of_model.token_types):
            for over in ("blocks", "heads"):
                out.figure(f"attention_registers_{over}_{loaded.slug}", draw_registers(of_model, over, scales, own))
    if len(maps) > 1:
        out.figure("attention_compare", draw_compare(maps, scales, own))


def arrays(result: AttentionResult, maps: AttentionMaps | None = None) -> dict[str, np.ndarray]:
    """Arrays of the npz: every metric per block and head, and the maps of the images that are drawn."""
    metrics = {f"{token}/{name}": values for token, table in result.means().items() for name, values in table.items()}
    if maps is None:
        return metrics
    return {
        **metrics,
        "maps": maps.rows,
        "map_kinds": np.array([*maps.token_types, ALL_PATCHES]),
        "patch_maps": maps.patches,
        "patches": np.array(maps.queries),
        "rollout": maps.rollout,
        "layer_maps": maps.layers,
        "layer_map_kinds": np.array(result.names),
    }
