"""analyze.py attention: what class, register and patch tokens look at, per head, in the mean, and over all blocks."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
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
from .outliers import Rollout, mass_by_kind, patch_rows, per_patch, spread_metrics
from .walk import Layer, attention, patch_grid, walk

MAP_BYTES = 2**28  # of one block's attention maps: larger batches are split
METRICS = ("entropy", "top_patch", "top_2_percent")
MASSES = ("class", "distillation", "registers", "patches")
ALL_PATCHES = "mean of patches"
MOST_COLUMNS = 16
CLIP = 0.98  # quantile at which the colours end: a few patches may hold most of the attention and hide the rest


def add_parser(subparsers: Any) -> None:
    text = "attention of class, registers and patches: maps per head, mean, rollout, and their metrics per block"
    parser = add_command(subparsers, "attention", run, text)
    parser.add_argument("--layer", type=int, default=-1, metavar="BLOCK", help="whose maps are drawn (default: last)")
    parser.add_argument("--show", type=int, default=4, metavar="K", help="images drawn")
    parser.add_argument(
        "--patches", type=_patches, metavar="R,C;R,C", help="rows and columns of patches whose attention is drawn"
    )
    parser.add_argument("--shared_scale", action="store_true", help="one colour scale for all images of a column")


def _patches(text: str) -> list[tuple[int, int]]:
    """7,7;0,3 -> [(7, 7), (0, 3)]."""
    pairs = [tuple(int(number) for number in item.split(",")) for item in text.split(";")]
    if not all(len(pair) == 2 and min(pair) >= 0 for pair in pairs):
        raise ValueError(text)
    return [(pair[0], pair[1]) for pair in pairs]


_patches.__name__ = "list of patches"


@dataclass
class Tables:
    """Means over images of every metric: values[kind][metric] is (L,H), NaN where the token is not there yet."""

    kinds: tuple[str, ...]
    sums: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    images: int = 0

    def add(self, layer: Layer, rows: Tensor, shape: tuple[int, int]) -> None:
        """Rows (B,H,K,N) of the kinds of a layer, and of the mean patch as the last one."""
        found = spread_metrics(per_patch(rows, layer)) | mass_by_kind(rows, layer)
        for name, values in found.items():
            total = values.sum(dim=0).double().cpu().numpy()  # (H,K)
            for index, kind in enumerate((*layer.token_types, ALL_PATCHES)):
                table = self.sums.setdefault(kind, {}).setdefault(name, np.full(shape, np.nan))
                before = np.nan_to_num(table[layer.index])
                table[layer.index] = before + total[:, index]

    def means(self) -> dict[str, dict[str, np.ndarray]]:
        """Ordered by kind: class first, where there is one."""
        return {
            kind: {name: table / self.images for name, table in self.sums[kind].items()}
            for kind in (*self.kinds, ALL_PATCHES)
        }


@dataclass
class Pictures:
    """Drawn images and their maps: (K,H,W,3), (K,H,kinds,gh,gw), (K,H,patches,gh,gw), (K,gh,gw), (K,L,gh,gw)."""

    images: np.ndarray
    rows: np.ndarray
    patches: np.ndarray
    rollout: np.ndarray
    layers: np.ndarray
    kinds: tuple[str, ...]
    queries: list[tuple[int, int]]

    @property
    def mean(self) -> np.ndarray:
        """Over heads."""
        return self.rows.mean(axis=1)


def run(own: Namespace, rest: Sequence[str]) -> None:
    models = load_models(own, rest)
    out = Output(own, rest, models)
    for loaded in models:
        depth = len(loaded.model.blocks)
        if not -depth <= own.layer < depth:
            raise UserError(f"--layer is {own.layer}, but {loaded.label} has blocks 0..{depth - 1} (or -{depth}..-1)")
    tables = [measure(own, loaded) for loaded in models]
    means = [table.means() for table in tables]
    out.json("attention", {"models": [_row(*item) for item in zip(models, tables, means, strict=True)]})
    out.png("attention_metrics", draw_metrics(models, means, [table.images for table in tables]))
    pictures = [capture(own, loaded) for loaded in models] if own.show > 0 else []
    for index, (loaded, table) in enumerate(zip(models, means, strict=True)):
        arrays = {f"{kind}/{name}": values for kind, tables in table.items() for name, values in tables.items()}
        out.npz(f"attention_{loaded.slug}", arrays | (_arrays(pictures[index]) if pictures else {}))
    for loaded, shown in zip(models, pictures, strict=False):
        draw_model(out, own, loaded, shown)
    if len(pictures) > 1:
        out.png("attention_compare", draw_compare(own, models, pictures))


def _arrays(shown: Pictures) -> dict[str, np.ndarray]:
    arrays = {"maps": shown.rows, "map_kinds": np.array([*shown.kinds, ALL_PATCHES]), "patch_maps": shown.patches}
    return arrays | {"patches": np.array(shown.queries), "rollout": shown.rollout, "layer_maps": shown.layers}


def draw_model(out: Output, own: Namespace, loaded: Loaded, shown: Pictures) -> None:
    block = own.layer % len(loaded.model.blocks)
    out.png(f"attention_{loaded.slug}", draw_maps(shown, f"{loaded.label}, block {block}", own.shared_scale))
    out.png(f"attention_heads_{loaded.slug}", draw_heads(shown, f"{loaded.label}, block {block}, head by head"))
    out.png(f"attention_patches_{loaded.slug}", draw_patches(shown, f"{loaded.label}, block {block}, patch to patch"))
    out.png(f"attention_layers_{loaded.slug}", draw_layers(shown, f"{loaded.label}, block after block"))


def _row(loaded: Loaded, table: Tables, means: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Metrics per block, averaged over heads; what is absent is None."""
    plain = {
        kind: {name: [None if np.isnan(v) else float(v) for v in values.mean(axis=1)] for name, values in found.items()}
        for kind, found in means.items()
    }
    return {"label": loaded.label, "n_images": table.images, "per_block": plain}


def in_parts(loaded: Loaded, images: Tensor) -> Iterator[Tensor]:
    """Parts of a batch whose maps fit into MAP_BYTES."""
    gh, gw = patch_grid(loaded.model, images)
    tokens = gh * gw + loaded.model.num_prefix_tokens
    one = 4 * loaded.model.blocks[0].attn.num_heads * tokens**2
    yield from images.split(max(1, MAP_BYTES // one))


def measure(own: Namespace, loaded: Loaded) -> Tables:
    """Metrics of all blocks and heads over all images."""
    model = loaded.model
    shape = len(model.blocks), model.blocks[0].attn.num_heads
    tables = Tables(model.token_types())
    for batch in Images(own, loaded, title=f"attention of {loaded.label}"):
        for images in in_parts(loaded, batch.images):
            for layer in walk(model, images):
                tables.add(layer, summary_rows(attention(layer), layer), shape)
            tables.images += len(images)
    if not tables.images:
        raise UserError("none of the images can be read")
    return tables


def summary_rows(maps: Tensor, layer: Layer) -> Tensor:
    """Rows of the prefix tokens, and last the mean row of all patches: (B,H,N,N) -> (B,H,P+1,N)."""
    size = layer.before.size[:, layer.num_prefix_tokens :]
    weight = (size / size.sum(dim=1, keepdim=True)).to(maps.dtype)
    mean = torch.einsum("bhnm,bn->bhm", maps[:, :, layer.num_prefix_tokens :], weight)
    return torch.cat((maps[:, :, : layer.num_prefix_tokens], mean.unsqueeze(2)), dim=2)


def capture(own: Namespace, loaded: Loaded) -> Pictures:
    """Maps of a few images."""
    images = Images(own, loaded, title=f"pictures of {loaded.label}", limit=own.show)
    parts = [
        _capture_part(own, loaded, part, images.pictures(part))
        for batch in images
        for part in in_parts(loaded, batch.images)
    ]
    shown, rows, patches, rollout, layers = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    kinds = loaded.model.token_types(own.layer % len(loaded.model.blocks))
    return Pictures(shown, rows, patches, rollout, layers, kinds, _queries(own, loaded))


def _capture_part(own: Namespace, loaded: Loaded, images: Tensor, shown: np.ndarray) -> tuple[np.ndarray, ...]:
    rollout, layers, rows, patches = Rollout(), [], Tensor(), Tensor()
    for layer in walk(loaded.model, images):
        maps = attention(layer)
        rollout.add(layer, maps)
        summary = summary_rows(maps, layer)
        layers.append(_first_token(summary, layer, loaded))
        if layer.index == own.layer % len(loaded.model.blocks):
            rows = per_patch(summary, layer)
            patches = per_patch(patch_rows(maps, layer, _queries(own, loaded)), layer)
    flow = rollout.to_patches(layer.grid)
    arrays = (rows, patches, flow, torch.stack(layers, dim=1))
    return (shown, *(array.float().cpu().numpy() for array in arrays))


def _first_token(summary: Tensor, layer: Layer, loaded: Loaded) -> Tensor:
    """The map (B,gh,gw) of the model's first kind of token; NaN in blocks before it enters."""
    kinds, first = (*layer.token_types, ALL_PATCHES), (*loaded.model.token_types(), ALL_PATCHES)[0]
    maps = per_patch(summary.mean(dim=1), layer)
    return maps[:, kinds.index(first)] if first in kinds else torch.full_like(maps[:, 0], torch.nan)


def _queries(own: Namespace, loaded: Loaded) -> list[tuple[int, int]]:
    rows, columns = loaded.model.patch_embed.grid_size
    chosen = own.patches or [(rows // 2, columns // 2), (rows // 4, columns // 4), (rows - 1, columns - 1)]
    for row, column in chosen:
        if row >= rows or column >= columns:
            raise UserError(f"--patches names {row},{column}, but {loaded.label} has {rows} x {columns} patches")
    return chosen


# Pictures


def _limits(values: np.ndarray, shared: bool, index: int) -> tuple[float, float]:
    """Colour limits of one image of (K,...,gh,gw), or of all of them."""
    chosen = values if shared else values[index]
    return float(chosen.min()), float(np.quantile(chosen, CLIP))


def _image(picture: np.ndarray) -> Any:
    return lambda ax: charts.show_image(ax, picture)


def _map(values: np.ndarray, limits: tuple[float, float] | None = None) -> Any:
    if np.isnan(values).all():  # the token is not there yet
        return lambda ax: ax.set_axis_off()
    return lambda ax: charts.show_map(ax, values, limits=limits)


def _overlay(picture: np.ndarray, values: np.ndarray, limits: tuple[float, float] | None = None) -> Any:
    return lambda ax: charts.show_overlay(ax, picture, values, limits=limits)


def draw_maps(shown: Pictures, title: str, shared: bool) -> Figure:
    """Input, first token's map raw and laid over the image, every register's, the mean patch's, rollout."""
    kinds = (*shown.kinds, ALL_PATCHES)
    mean, rows = shown.mean, []
    for index, picture in enumerate(shown.images):
        row = [_image(picture)]
        row.append(_map(mean[index, 0], _limits(mean[:, 0], shared, index)))
        row.append(_overlay(picture, mean[index, 0], _limits(mean[:, 0], shared, index)))
        for place in range(1, len(kinds)):
            row.append(_overlay(picture, mean[index, place], _limits(mean[:, place], shared, index)))
        rows.append([*row, _overlay(picture, shown.rollout[index], _limits(shown.rollout, shared, index))])
    columns = ["input", f"{kinds[0]}, raw", kinds[0], *kinds[1:], "rollout"]
    note = "attention to patches, mean over heads; colours end at the 98 % quantile of the "
    note += "column" if shared else "picture"
    return charts.picture_table(_cut(rows), _cut([columns])[0], title=title, note=note)


def _cut(rows: list[list[Any]]) -> list[list[Any]]:
    """Sixteen registers and more do not fit on a page."""
    return [row if len(row) <= MOST_COLUMNS else [*row[: MOST_COLUMNS - 2], *row[-2:]] for row in rows]


def draw_heads(shown: Pictures, title: str) -> Figure:
    """The first token's map of every head."""
    heads = min(shown.rows.shape[1], MOST_COLUMNS - 1)
    rows = [
        [_image(picture), *(_map(shown.rows[index, head, 0]) for head in range(heads))]
        for index, picture in enumerate(shown.images)
    ]
    name = (*shown.kinds, ALL_PATCHES)[0]
    columns = ["input", *(f"head {head}" for head in range(heads))]
    return charts.picture_table(rows, columns, title=title, note=f"attention of: {name}; own colour scale per picture")


def draw_patches(shown: Pictures, title: str) -> Figure:
    """Where single patches look, which are outlined."""
    mean, rows = shown.patches.mean(axis=1), []
    for index, picture in enumerate(shown.images):
        row = [_image(picture)]
        for place, query in enumerate(shown.queries):
            row.append(_query(picture, mean[index, place], query))
        rows.append(row)
    columns = ["input", *(f"patch {row},{column}" for row, column in shown.queries)]
    return charts.picture_table(rows, columns, title=title, note="mean over heads; red: the patch that looks")


def _query(picture: np.ndarray, values: np.ndarray, query: tuple[int, int]) -> Any:
    def draw(ax: Axes) -> None:
        charts.show_overlay(ax, picture, values, limits=(float(values.min()), float(np.quantile(values, CLIP))))
        charts.mark_patch(ax, query, picture.shape[0] / values.shape[0])

    return draw


def draw_layers(shown: Pictures, title: str) -> Figure:
    """The first token's mean map in every block (up to 15, evenly spread)."""
    depth = shown.layers.shape[1]
    chosen = np.unique(np.linspace(0, depth - 1, min(depth, MOST_COLUMNS - 1)).round().astype(int)).tolist()
    rows = [
        [_image(picture), *(_map(shown.layers[index, layer]) for layer in chosen)]
        for index, picture in enumerate(shown.images)
    ]
    note = f"attention of: {(*shown.kinds, ALL_PATCHES)[0]}; mean over heads, own colour scale per picture"
    return charts.picture_table(rows, ["input", *(f"block {layer}" for layer in chosen)], title=title, note=note)


def draw_compare(own: Namespace, models: Sequence[Loaded], pictures: Sequence[Pictures]) -> Figure:
    """The same images under all models: attention of the first token."""
    count = min(len(shown.images) for shown in pictures)
    rows = [
        [
            _image(pictures[0].images[index]),
            *(_overlay(s.images[index], s.mean[index, 0], _limits(s.mean[:, 0], False, index)) for s in pictures),
        ]
        for index in range(count)
    ]
    columns = ["input", *(loaded.label for loaded in models)]
    kind, block = (*pictures[0].kinds, ALL_PATCHES)[0], own.layer % len(models[0].model.blocks)
    note = f"attention of: {kind}, block {block}; mean over heads; colours end at the picture's 98 % quantile"
    return charts.picture_table(rows, columns, note=note)


@charts.styled
def draw_metrics(
    models: Sequence[Loaded], means: Sequence[dict[str, dict[str, np.ndarray]]], numbers: Sequence[int]
) -> Figure:
    """Above: where the first token's attention goes, model by model. Below: how concentrated it is, all models."""
    columns = max(3, len(models))
    figure, axes = charts.new_figure(2, columns, 3.7, 2.7, "Attention over the blocks")
    for ax, loaded, found, number in zip(axes[0], models, means, numbers, strict=False):
        kind = next(iter(found))
        _stack(ax, found[kind], f"{loaded.label}: {kind}'s attention goes to")
        ax.set_xlabel(f"block ({number} images, mean over heads)")
    for ax in axes[0, len(models) :]:
        ax.set_axis_off()
    labels = {"entropy": "entropy (1: even)", "top_patch": "share of the top patch"}
    for ax, name in zip(axes[1], METRICS, strict=False):
        _lines(ax, name, models, means)
        ax.set_title(labels.get(name, "share of the top 2 % of patches"), fontsize=9)
    for ax in axes[1, len(METRICS) :]:
        ax.set_axis_off()
    return figure


def _stack(ax: Axes, tables: dict[str, np.ndarray], title: str) -> None:
    names = [name for name in MASSES if name in tables]
    layers = [np.nan_to_num(tables[name].mean(axis=1)) for name in names]
    colours = [charts.kind_colour(name) for name in names]
    ax.stackplot(np.arange(len(layers[0])), layers, labels=names, colors=colours, alpha=0.75)
    ax.set_ylim(0, 1)
    ax.set_xlim(0, len(layers[0]) - 1)
    ax.set_title(title, fontsize=8.5)
    ax.legend(loc="lower left")


def _lines(ax: Axes, name: str, models: Sequence[Loaded], means: Sequence[dict[str, dict[str, np.ndarray]]]) -> None:
    """The first token's metric, its heads as a band from the lowest to the highest; dotted: the mean patch."""
    for index, (loaded, found) in enumerate(zip(models, means, strict=True)):
        values, colour = found[next(iter(found))][name], charts.colour_of(index)
        x = np.arange(len(values))
        ax.fill_between(x, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.15, lw=0)
        ax.plot(x, values.mean(axis=1), color=colour, label=loaded.label)
        ax.plot(x, found[ALL_PATCHES][name].mean(axis=1), color=colour, ls=":", lw=1.2)
    ax.plot([], [], color=charts.FAINT, ls=":", lw=1.2, label=ALL_PATCHES)
    ax.set_xlabel("block (band: lowest to highest head)")
    ax.legend(loc="best", fontsize=7)
