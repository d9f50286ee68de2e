"""Attention: what class, register and patch tokens look at, per head, in the mean, and over all blocks.

    result = attention.measure(model, images)
    attention.draw(result).savefig("metrics.png")
    maps = attention.attention_maps(model, images[:4], pictures)   # pictures: (4,H,W,3) in [0, 1]
    attention.draw_maps(maps).savefig("maps.png")

Command: run/analyze.py attention. Shapes: B batch, N tokens, M tokens after a merge, P prefix tokens, n patches at the
input, T types of tokens (prefix tokens, then the mean patch), H heads, L blocks, Q chosen patches, K images that are
drawn, (gh,gw) the patch grid.
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
from .walk import Layer, attention, check_layer, in_parts, per_patch, walk

METRICS = ("entropy", "top_patch", "top_2_percent")
MASSES = ("class", "distillation", "registers", "patches")
ALL_PATCHES = "mean of patches"
MOST_COLUMNS = 16
CLIP = 0.98  # quantile at which the colours end: a few patches may hold most of the attention and hide the rest

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
    strongest = share.sort(dim=-1, descending=True).values
    few = max(1, round(0.02 * patches))
    return {"entropy": entropy, "top_patch": strongest[..., 0], "top_2_percent": strongest[..., :few].sum(dim=-1)}


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
    """Metrics of one model's attention, summed over images.

    Attributes:
        label: the model's name in figures.
        token_types: names of the prefix tokens.
        images: number of images.
        sums: by type of token ("mean of patches" too) and metric, (L,H); NaN in blocks where the token is not present.
    """

    label: str
    token_types: tuple[str, ...]
    images: int = 0
    sums: Tables = field(default_factory=dict)

    def means(self) -> Tables:
        """Means over the images: by type of token, the class token first where there is one, and metric, (L,H)."""
        return {
            token_type: {name: table / self.images for name, table in self.sums[token_type].items()}
            for token_type in (*self.token_types, ALL_PATCHES)
        }


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
                    _add_rows(result, layer, summary_rows(attention(layer), layer), shape)
                result.images += len(part)
    if not result.images:
        raise UserError("none of the images can be read")
    return result


def _add_rows(result: AttentionResult, layer: Layer, rows: Tensor, shape: tuple[int, int]) -> None:
    """Add the metrics of rows (B,H,P+1,N): the prefix tokens', and last the mean patch's."""
    metrics = {**spread_metrics(per_patch(rows, layer)), **mass_by_token_type(rows, layer)}
    for name, values in metrics.items():
        total = values.sum(dim=0).double().cpu().numpy()  # (H,P+1)
        for index, token_type in enumerate((*layer.token_types, ALL_PATCHES)):
            table = result.sums.setdefault(token_type, {}).setdefault(name, np.full(shape, np.nan))
            table[layer.index] = np.nan_to_num(table[layer.index]) + total[:, index]


def summarise(result: AttentionResult) -> dict[str, Any]:
    """Metrics per block, averaged over heads; None in blocks where the token is not present."""
    per_block = {
        token_type: {
            name: [None if np.isnan(value) else float(value) for value in values.mean(axis=1)]
            for name, values in table.items()
        }
        for token_type, table in result.means().items()
    }
    return {"label": result.label, "n_images": result.images, "per_block": per_block}


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
        layers: (K,L,gh,gw) where the model's first token looks in every block, mean over heads; NaN before it enters.
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

    @property
    def mean(self) -> np.ndarray:
        """`rows`, averaged over heads."""
        return self.rows.mean(axis=1)

    @property
    def first(self) -> str:
        """The token whose map comes first: the class token, or the mean patch where there is no prefix."""
        return (*self.token_types, ALL_PATCHES)[0]


@torch.no_grad()
def attention_maps(
    model: VisionTransformer,
    images: Tensor,
    pictures: np.ndarray,
    *,
    layer: int = -1,
    patches: Sequence[tuple[int, int]] | None = None,
    label: str = "model",
) -> AttentionMaps:
    """Take the attention maps of a few images.

    Args:
        model: a `MergingViT`, or a timm ViT that it can be made of.
        images: (K,3,H,W) as the model sees them.
        pictures: (K,H,W,3) the same in [0, 1].
        layer: block of the maps; -1 is the last.
        patches: chosen patches (row, column); None: three of them.

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
    return AttentionMaps(label, index, types, queries, pictures, rows, patch_maps, rollout, layers)


def _maps_of(
    model: MergingViT, images: Tensor, index: int, queries: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, ...]:
    """`rows`, `patches`, `rollout` and `layers` of `AttentionMaps`."""
    rollout, layers, rows, patches = Rollout(), [], Tensor(), Tensor()
    first = (*model.token_types(), ALL_PATCHES)[0]
    for layer in walk(model, images):
        maps = attention(layer)
        rollout.add(layer, maps)
        summary = summary_rows(maps, layer)
        layers.append(_map_of_token(summary, layer, first))
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


def check_patches(
    model: MergingViT, patches: Sequence[tuple[int, int]] | None, name: str = "patches", label: str = "the model"
) -> list[tuple[int, int]]:
    """Return the chosen patches (row, column), three of them where None are chosen.

    Raises:
        UserError: one of them is not on the model's grid.
    """
    rows, columns = model.patch_embed.grid_size
    chosen = list(patches or [(rows // 2, columns // 2), (rows // 4, columns // 4), (rows - 1, columns - 1)])
    for row, column in chosen:
        if row >= rows or column >= columns:
            raise UserError(f"{name} names {row},{column}, but {label} has {rows} x {columns} patches")
    return chosen


# Figures


@charts.styled
def draw(results: AttentionResult | Sequence[AttentionResult]) -> Figure:
    """Draw where the first token's attention goes, model by model, and below how concentrated it is, all models."""
    results = as_list(results)
    columns = max(3, len(results))
    figure, axes = charts.new_figure(2, columns, 3.7, 2.7, "Attention over the blocks")
    for ax, result in zip(axes[0], results, strict=False):
        first, table = next(iter(result.means().items()))
        _draw_masses(ax, table, f"{result.label}: {first}'s attention goes to")
        ax.set_xlabel(f"block ({result.images} images, mean over heads)")
    for ax in axes[0, len(results) :]:
        ax.set_axis_off()
    labels = {"entropy": "entropy (1: even)", "top_patch": "share of the top patch"}
    for ax, name in zip(axes[1], METRICS, strict=False):
        _draw_metric(ax, name, results)
        ax.set_title(labels.get(name, "share of the top 2 % of patches"), fontsize=9)
    for ax in axes[1, len(METRICS) :]:
        ax.set_axis_off()
    return figure


def _draw_masses(ax: Axes, table: dict[str, np.ndarray], title: str) -> None:
    names = [name for name in MASSES if name in table]
    layers = [np.nan_to_num(table[name].mean(axis=1)) for name in names]
    colours = [charts.token_colour(name) for name in names]
    ax.stackplot(np.arange(len(layers[0])), layers, labels=names, colors=colours, alpha=0.75)
    ax.set_ylim(0, 1)
    ax.set_xlim(0, len(layers[0]) - 1)
    ax.set_title(title, fontsize=8.5)
    ax.legend(loc="lower left")


def _draw_metric(ax: Axes, name: str, results: Sequence[AttentionResult]) -> None:
    """Draw the first token's metric, its heads as a band from the lowest to the highest; dotted: the mean patch."""
    for index, result in enumerate(results):
        means, colour = result.means(), charts.colour_of(index)
        values = next(iter(means.values()))[name]
        x = np.arange(len(values))
        ax.fill_between(x, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.15, lw=0)
        ax.plot(x, values.mean(axis=1), color=colour, label=result.label)
        ax.plot(x, means[ALL_PATCHES][name].mean(axis=1), color=colour, ls=":", lw=1.2)
    ax.plot([], [], color=charts.FAINT, ls=":", lw=1.2, label=ALL_PATCHES)
    ax.set_xlabel("block (band: lowest to highest head)")
    ax.legend(loc="best", fontsize=7)


def _limits(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(np.quantile(values, CLIP))


def draw_maps(maps: AttentionMaps, shared_scale: bool = False) -> Figure:
    """Draw the first token's map, raw and laid over the image, every register's, the mean patch's, and rollout.

    Args:
        shared_scale: one colour scale for all images of a column.
    """
    mean = maps.mean
    rows = []
    for index, picture in enumerate(maps.pictures):
        layers = [*mean[index], maps.rollout[index]]
        limits = [_limits(column if shared_scale else column[index]) for column in (*mean.swapaxes(0, 1), maps.rollout)]
        overlays = [charts.overlay_cell(picture, *pair) for pair in zip(layers, limits, strict=True)]
        rows.append([charts.image_cell(picture), charts.map_cell(layers[0], limits[0]), *overlays])
    columns = ["input", f"{maps.first}, raw", *maps.token_types, ALL_PATCHES, "rollout"]
    note = "attention to patches, mean over heads; colours end at the 98 % quantile of the "
    note += "column" if shared_scale else "picture"
    return charts.picture_table([_shortened(row) for row in rows], _shortened(columns), title=_title(maps), note=note)


def _title(maps: AttentionMaps, what: str = "") -> str:
    return f"{maps.label}, block {maps.layer}{what}"


def _shortened(row: list[Any]) -> list[Any]:
    """A row without its middle: sixteen registers and more do not fit on a page."""
    return row if len(row) <= MOST_COLUMNS else [*row[: MOST_COLUMNS - 2], *row[-2:]]


def draw_heads(maps: AttentionMaps) -> Figure:
    """Draw the first token's map of every head."""
    heads = min(maps.rows.shape[1], MOST_COLUMNS - 1)
    rows = [
        [charts.image_cell(picture), *(charts.map_cell(rows[head, 0]) for head in range(heads))]
        for picture, rows in zip(maps.pictures, maps.rows, strict=True)
    ]
    columns = ["input", *(f"head {head}" for head in range(heads))]
    note = f"attention of: {maps.first}; own colour scale per picture"
    return charts.picture_table(rows, columns, title=_title(maps, ", head by head"), note=note)


def draw_patches(maps: AttentionMaps) -> Figure:
    """Draw where the chosen patches look; they are outlined."""
    rows = []
    for picture, query_maps in zip(maps.pictures, maps.patches.mean(axis=1), strict=True):
        cells = [
            charts.overlay_cell(picture, query_map, _limits(query_map), query)
            for query_map, query in zip(query_maps, maps.queries, strict=True)
        ]
        rows.append([charts.image_cell(picture), *cells])
    columns = ["input", *(f"patch {row},{column}" for row, column in maps.queries)]
    note = "mean over heads; red: the patch that looks"
    return charts.picture_table(rows, columns, title=_title(maps, ", patch to patch"), note=note)


def draw_layers(maps: AttentionMaps) -> Figure:
    """Draw the first token's mean map in every block (up to 15, evenly spread)."""
    depth = maps.layers.shape[1]
    chosen = np.unique(np.linspace(0, depth - 1, min(depth, MOST_COLUMNS - 1)).round().astype(int)).tolist()
    rows = [
        [charts.image_cell(picture), *(charts.map_cell(layers[index]) for index in chosen)]
        for picture, layers in zip(maps.pictures, maps.layers, strict=True)
    ]
    columns = ["input", *(f"block {index}" for index in chosen)]
    note = f"attention of: {maps.first}; mean over heads, own colour scale per picture"
    return charts.picture_table(rows, columns, title=f"{maps.label}, block after block", note=note)


def draw_compare(maps: Sequence[AttentionMaps]) -> Figure:
    """Draw the same images under all models: attention of the first token."""
    rows = [
        [
            charts.image_cell(maps[0].pictures[index]),
            *(
                charts.overlay_cell(of_model.pictures[index], of_model.mean[index, 0], _limits(of_model.mean[index, 0]))
                for of_model in maps
            ),
        ]
        for index in range(min(len(of_model.pictures) for of_model in maps))
    ]
    note = f"attention of: {maps[0].first}, block {maps[0].layer}; mean over heads; colours end at the picture's "
    note += "98 % quantile"
    return charts.picture_table(rows, ["input", *(of_model.label for of_model in maps)], note=note)


# Command


def add_parser(subparsers: Any) -> None:
    """Add the command `attention`."""
    from .command import add_command

    text = "attention of class, registers and patches: maps per head, mean, rollout, and their metrics per block"
    parser = add_command(subparsers, "attention", run, text)
    parser.add_argument("--layer", type=int, default=-1, metavar="BLOCK", help="whose maps are drawn (default: last)")
    parser.add_argument("--show", type=int, default=4, metavar="K", help="images drawn")
    parser.add_argument(
        "--patches", type=_read_patches, metavar="R,C;R,C", help="rows and columns of patches whose attention is drawn"
    )
    parser.add_argument("--shared_scale", action="store_true", help="one colour scale for all images of a column")


def _read_patches(text: str) -> list[tuple[int, int]]:
    """7,7;0,3 -> [(7, 7), (0, 3)]."""
    pairs = [tuple(int(number) for number in item.split(",")) for item in text.split(";")]
    if not all(len(pair) == 2 and min(pair) >= 0 for pair in pairs):
        raise ValueError(text)
    return [(pair[0], pair[1]) for pair in pairs]


_read_patches.__name__ = "list of patches"  # what argparse calls it in its error


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    """Measure all models and write attention.json, an npz per model, and the figures."""
    from .command import Images, Output, load_models

    models = load_models(args, main_argv)
    out = Output(args, main_argv, models)
    for loaded in models:
        check_layer(loaded.model, args.layer, "--layer", loaded.label)
        check_patches(loaded.model, args.patches, "--patches", loaded.label)
    results = [
        measure(loaded.model, Images(args, loaded, title=f"attention of {loaded.label}"), label=loaded.label)
        for loaded in models
    ]
    out.json("attention", {"models": [summarise(result) for result in results]})
    out.png("attention_metrics", draw(results))
    maps: list[AttentionMaps] = []
    for loaded in models if args.show > 0 else ():
        images, pictures = Images(args, loaded, title=f"pictures of {loaded.label}", limit=args.show).load()
        options: dict[str, Any] = {"layer": args.layer, "patches": args.patches, "label": loaded.label}
        maps.append(attention_maps(loaded.model, images, pictures, **options))
    for index, (loaded, result) in enumerate(zip(models, results, strict=True)):
        out.npz(f"attention_{loaded.slug}", arrays(result, maps[index] if maps else None))
    for loaded, of_model in zip(models, maps, strict=False):
        out.png(f"attention_{loaded.slug}", draw_maps(of_model, args.shared_scale))
        out.png(f"attention_heads_{loaded.slug}", draw_heads(of_model))
        out.png(f"attention_patches_{loaded.slug}", draw_patches(of_model))
        out.png(f"attention_layers_{loaded.slug}", draw_layers(of_model))
    if len(maps) > 1:
        out.png("attention_compare", draw_compare(maps))


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
    }
