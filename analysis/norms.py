"""analyze.py norms: lengths of class, register and patch tokens over the layers, and which patches are outliers."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models import UserError

from . import charts
from .command import Images, Loaded, Output, add_command, load_models
from .outliers import Histogram, Rule, bimodality, bin_edges, norms
from .walk import final, to_grid, walk

RULES = ("quantile:0.98", "quantile:0.995", "sigma:3", "ratio:3")
DENSITY_BINS = 1024


def add_parser(subparsers: Any) -> None:
    text = "norms of class, register and patch tokens per layer; outliers under several rules"
    parser = add_command(subparsers, "norms", run, text)
    parser.add_argument("--outlier_rule", type=Rule.parse, default=Rule("quantile", 0.98), metavar="RULE")
    parser.add_argument("--layer", type=int, default=-1, metavar="BLOCK", help="whose output (default: the last)")
    parser.add_argument("--show", type=int, default=5, metavar="K", help="images drawn")


@dataclass
class Measured:
    """Norms of one model over a set of images. Stage 0 is the input of the first block, stage i the output of block
    i - 1, the last stage the tokens after the final norm."""

    loaded: Loaded
    kinds: tuple[str, ...]
    patches: list[Histogram]  # per stage, every token once
    prefix: list[dict[str, Histogram]]  # per stage
    at_layer: np.ndarray  # (images,n) of the chosen layer, per patch of the input (merged tokens count as often)
    images: int = 0
    cuts: dict[str, float] = field(default_factory=dict)

    @property
    def stages(self) -> list[str]:
        return ["input", *(str(index) for index in range(len(self.patches) - 2)), "final norm"]


def run(own: Namespace, rest: Sequence[str]) -> None:
    models = load_models(own, rest)
    out = Output(own, rest, models)
    measured = [measure(own, loaded, out) for loaded in models]
    rules = [Rule.parse(text) for text in RULES]
    rules += [own.outlier_rule] if own.outlier_rule not in rules else []
    stage = _stage(own, measured[0])
    shared = own.outlier_rule.cut(measured[0].patches[stage]), measured[0].patches[stage].quantile(0.5)
    rows = [evaluate(one, rules, shared, _stage(own, one)) for one in measured]
    out.json("norms", {"layer": own.layer, "outlier_rule": str(own.outlier_rule), "models": rows})
    for one, row in zip(measured, rows, strict=True):
        out.npz(f"norms_{one.loaded.slug}", _arrays(one, row, _stage(own, one)))
    out.png("norms_layers", draw_layers(measured))
    out.png("norms_histogram", draw_histogram(measured, rows, stage))
    out.png("norms_kinds", draw_kinds(measured, own))
    out.png("norms_positions", draw_positions(measured, rows))
    if own.show > 0:
        out.png("norms_images", draw_images(own, measured, rows))


def _stage(own: Namespace, one: Measured) -> int:
    return own.layer % len(one.loaded.model.blocks) + 1


def measure(own: Namespace, loaded: Loaded, out: Output) -> Measured:
    """One pass over the images; memory holds histograms, a file on the disk the norms of the chosen layer."""
    model, depth = loaded.model, len(loaded.model.blocks)
    if not -depth <= own.layer < depth:
        raise UserError(f"--layer is {own.layer}, but {loaded.label} has blocks 0..{depth - 1} (or -{depth}..-1)")
    images = Images(own, loaded, title=f"norms of {loaded.label}")
    kinds = model.token_types()
    file = out.folder / f"norms_{loaded.slug}.npy"
    shape = (len(images), model.patch_embed.num_patches)
    at_layer = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    at_layer[:] = np.nan
    empty: list[dict[str, Histogram]] = [{} for _ in range(depth + 2)]
    found = Measured(loaded, kinds, [Histogram() for _ in range(depth + 2)], empty, at_layer)
    for batch in images:
        for layer in walk(model, batch.images):
            if layer.index == 0:
                _count(found, 0, norms(layer.before.x), layer.num_prefix_tokens, layer.token_types)
            lengths = norms(layer.after.x)
            _count(found, layer.index + 1, lengths, layer.num_prefix_tokens, layer.token_types)
            if layer.index == own.layer % depth:
                grid = to_grid(lengths[:, layer.num_prefix_tokens :], layer.after.group, layer.grid)
                at_layer[found.images : found.images + len(grid)] = grid.flatten(1).cpu().numpy()
        _count(found, depth + 1, norms(final(model, layer)), layer.num_prefix_tokens, layer.token_types)
        found.images += len(batch.images)
    if not found.images:
        raise UserError("none of the images can be read")
    found.at_layer = at_layer[: found.images]
    return found


def _count(found: Measured, stage: int, lengths: torch.Tensor, prefix: int, kinds: Sequence[str]) -> None:
    if not lengths.isfinite().all():
        raise UserError(
            f"{found.loaded.label}: tokens of stage {found.stages[stage]} are not finite; check its weights"
        )
    found.patches[stage].add(lengths[:, prefix:])
    for index, kind in enumerate(kinds):
        found.prefix[stage].setdefault(kind, Histogram()).add(lengths[:, index])


def evaluate(one: Measured, rules: Sequence[Rule], shared: tuple[float, float], stage: int) -> dict[str, Any]:
    """Numbers of one model, with its own cuts and the baseline's, as it is and scaled by the medians.

    Args:
        shared: cut and median of the baseline.
        stage: the chosen one.
    """
    histogram, (cut, median) = one.patches[stage], shared
    one.cuts = {str(rule): rule.cut(histogram) for rule in rules}
    cuts = one.cuts | {"shared": cut, "shared_scaled": cut * histogram.quantile(0.5) / median}
    tables = {
        name: {"patches": patches.summary()} | {kind: held.summary() for kind, held in prefix.items()}
        for name, patches, prefix in zip(one.stages, one.patches, one.prefix, strict=True)
    }
    outliers = {name: {"cut": cut, **_outliers(one, histogram, cut)} for name, cut in cuts.items()}
    row = {"label": one.loaded.label, "n_images": one.images, "outliers": outliers}
    return row | {"bimodality": bimodality(histogram), "stages": tables}


def _outliers(one: Measured, histogram: Histogram, cut: float) -> dict[str, float]:
    """Of patches, exact; of tokens (the same where nothing merged), with the cut at the edge of a bin."""
    per_image = np.array([(row > cut).sum() for row in one.at_layer])
    found = {"share": per_image.mean() / one.at_layer.shape[1], "token_share": histogram.share_above(cut)}
    found |= {"per_image": per_image.mean(), "images_without": (per_image == 0).mean()}
    return {name: float(value) for name, value in found.items()}


def _arrays(one: Measured, row: dict[str, Any], stage: int) -> dict[str, np.ndarray]:
    arrays = {"patch_counts": np.stack([h.rebinned(DENSITY_BINS) for h in one.patches])}
    arrays |= {"bin_edges": bin_edges(DENSITY_BINS), "stages": np.array(one.stages), "chosen_stage": np.array(stage)}
    for kind in one.kinds:
        held = [prefix.get(kind) for prefix in one.prefix]
        arrays[f"mean_{kind.replace(' ', '_')}"] = np.array([np.nan if h is None else h.mean for h in held])
    cut = row["outliers"]["shared"]["cut"]
    return arrays | {"outlier_frequency": position_frequency(one, cut)}


def position_frequency(one: Measured, cut: float) -> np.ndarray:
    """Share of images whose token at a cell is an outlier: (gh,gw)."""
    total = np.zeros(one.at_layer.shape[1])
    for row in one.at_layer:
        total += row > cut
    return (total / one.images).reshape(one.loaded.model.patch_embed.grid_size)


@charts.styled
def draw_layers(measured: Sequence[Measured]) -> Figure:
    """All patch norms per layer as a density, and the prefix tokens as lines."""
    title = "Token norms over the layers"
    figure, axes = charts.new_figure(1, len(measured), 5.4, 4.0, title, sharey=True)
    edges = bin_edges(DENSITY_BINS)
    counts = [np.stack([h.rebinned(DENSITY_BINS) for h in one.patches[:-1]]) for one in measured]
    filled = np.nonzero(np.sum([c.sum(axis=0) for c in counts], axis=0))[0]
    # without the input: fresh registers enter so short that the scale would be theirs alone
    prefix_means = [h.mean for one in measured for held in one.prefix[1:-1] for h in held.values()]
    low, high = edges[filled[0]], edges[filled[-1] + 1]
    limits = min([low, *prefix_means]) * 0.85, max([high, *prefix_means]) * 1.15
    for ax, one, count in zip(axes[0], measured, counts, strict=True):
        mesh = charts.density(ax, count / one.images, edges)
        x = np.arange(len(count))
        ax.plot(x, [h.quantile(0.5) for h in one.patches[:-1]], color="white", lw=3)
        ax.plot(x, [h.quantile(0.5) for h in one.patches[:-1]], color=charts.INK, label="patches, median")
        _draw_prefix(ax, one)
        ax.set_title(f"{one.loaded.label}  ({one.images} images)")
        ax.set_ylim(*limits)
        ax.set_xticks(x[:: max(1, len(x) // 13)], [one.stages[i] for i in x[:: max(1, len(x) // 13)]])
        ax.set_xlabel("output of block (before the final norm)")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)
    axes[0, 0].set_ylabel("L2 norm")
    charts.colour_bar(figure, mesh, axes[0].tolist(), "patch tokens per image")
    return figure


def _draw_prefix(ax: Axes, one: Measured) -> None:
    """A line per prefix token; registers share one colour and one label."""
    labelled = set()
    for kind in one.kinds:
        name = "registers" if kind.startswith("register") else kind
        y = [held[kind].mean if kind in held else np.nan for held in one.prefix[:-1]]
        label = None if name in labelled else name + (", mean" if name != "registers" else ", mean of each")
        labelled.add(name)
        ax.plot(np.arange(len(y)), y, color=charts.kind_colour(kind), label=label, marker="o", ms=3)


@charts.styled
def draw_histogram(measured: Sequence[Measured], rows: Sequence[dict[str, Any]], stage: int) -> Figure:
    """Patch norms of the chosen layer, all models on the same bins, with the shared and the own cuts."""
    figure, axes = charts.new_figure(1, 1, 7.0, 3.8)
    ax = axes[0, 0]
    low, high = (f([f(one.at_layer) for one in measured]) for f in (min_, max_))
    edges = np.linspace(low, high * 1.0001 + 1e-9, 101)
    for index, (one, row) in enumerate(zip(measured, rows, strict=True)):
        colour = charts.colour_of(index)
        share = np.histogram(one.at_layer, edges)[0] / one.at_layer.size
        above = 100 * row["outliers"]["shared"]["share"]
        ax.stairs(share, edges, color=colour, lw=1.6, label=f"{one.loaded.label}: {above:.2f} % above the shared cut")
        ax.stairs(share, edges, color=colour, alpha=0.12, fill=True)
    ax.set_yscale("log")
    shared = rows[0]["outliers"]["shared"]["cut"]
    ax.axvline(shared, color=charts.INK, lw=1.4, label=f"shared cut {shared:.1f} (of {measured[0].loaded.label})")
    for rule, style in (("sigma:3", "--"), ("ratio:3", ":")):
        for index, one in enumerate(measured):
            ax.axvline(one.cuts[rule], color=charts.colour_of(index), lw=1, ls=style)
        ax.plot([], [], color=charts.FAINT, lw=1, ls=style, label=f"own cut {rule}")
    ax.set_xlim(low, max(high, shared) * 1.02)
    ax.set_title(f"Norms of patch tokens after block {measured[0].stages[stage]}")
    ax.set_xlabel("L2 norm")
    ax.set_ylabel("share of patches")
    ax.legend(loc="upper right")
    return figure


def min_(values: Any) -> float:
    return float(np.min(values))


def max_(values: Any) -> float:
    return float(np.max(values))


@charts.styled
def draw_kinds(measured: Sequence[Measured], own: Namespace) -> Figure:
    """Spread of every kind of token at the chosen layer: box = quartiles, whiskers = 1 % and 99 %."""
    names = [*dict.fromkeys(kind for one in measured for kind in one.kinds), "patches"]
    figure, axes = charts.new_figure(1, 1, max(4.0, 1.2 + 0.75 * len(names)), 3.4)
    ax = axes[0, 0]
    width = 0.7 / len(measured)
    for index, one in enumerate(measured):
        stage = _stage(own, one)
        held = one.prefix[stage] | {"patches": one.patches[stage]}
        places = [i for i, name in enumerate(names) if name in held]
        boxes = [_box(held[names[i]]) for i in places]
        shift = (index - (len(measured) - 1) / 2) * width
        colour = charts.colour_of(index)
        face = dict(facecolor=colour, alpha=0.35, edgecolor=colour)
        line = dict(color=colour)
        ax.bxp(
            boxes,
            positions=[place + shift for place in places],
            widths=width * 0.8,
            showfliers=False,
            patch_artist=True,
            boxprops=face,
            medianprops=line,
            whiskerprops=line,
            capprops=line,
        )
        ax.plot([], [], color=colour, lw=5, alpha=0.5, label=one.loaded.label)
    ax.set_xticks(range(len(names)), names)
    charts.plain_log(ax)
    ax.set_ylabel("L2 norm")
    ax.set_title(f"Norms after block {measured[0].stages[_stage(own, measured[0])]}, by kind of token")
    ax.set_xlabel("box: quartiles, whiskers: 1 % to 99 %", fontsize=7.5, color=charts.FAINT)
    ax.legend(loc="best")
    return figure


def _box(histogram: Histogram) -> dict[str, float]:
    names = {"whislo": 0.01, "q1": 0.25, "med": 0.5, "q3": 0.75, "whishi": 0.99}
    return {name: histogram.quantile(q) for name, q in names.items()}


def draw_positions(measured: Sequence[Measured], rows: Sequence[dict[str, Any]]) -> Figure:
    """Where outliers sit: share of images with an outlier at each cell, under the shared cut."""
    maps = [position_frequency(one, row["outliers"]["shared"]["cut"]) for one, row in zip(measured, rows, strict=True)]
    return _positions_figure(maps, measured)


@charts.styled
def _positions_figure(maps: Sequence[np.ndarray], measured: Sequence[Measured]) -> Figure:
    figure, axes = charts.new_figure(1, len(maps), 3.4, 3.1, "Where outliers sit (shared cut)")
    top = max(float(np.max(maps_)) for maps_ in maps) * 100 or 1.0
    for ax, values, one in zip(axes[0], maps, measured, strict=True):
        drawn = charts.show_map(ax, values * 100, one.loaded.label, (0, top), "magma")
    charts.colour_bar(figure, drawn, axes[0].tolist(), "% of images")
    return figure


def draw_images(own: Namespace, measured: Sequence[Measured], rows: Sequence[dict[str, Any]]) -> Figure:
    """Some images and their norm maps, one scale per model, outliers (shared cut) outlined."""
    cells: list[list[Any]] = []
    for index, (one, row) in enumerate(zip(measured, rows, strict=True)):
        cut, line = row["outliers"]["shared"]["cut"], 0
        images = Images(own, one.loaded, title=f"pictures of {one.loaded.label}", limit=own.show)
        stage = one.patches[_stage(own, one)]
        limits = (stage.quantile(0.001), max(stage.quantile(0.995), stage.quantile(0.5) * 1.2))
        for batch in images:
            for picture, values in zip(
                images.pictures(batch.images), _maps(own, one.loaded, batch.images), strict=True
            ):
                if index == 0:
                    cells.append([_image_cell(picture)])
                cells[line].append(_map_cell(values, limits, cut))
                line += 1
    columns = ["input", *(one.loaded.label for one in measured)]
    block = measured[0].stages[_stage(own, measured[0])]
    note = f"norm of patch tokens after block {block}; red: above the shared cut"
    return charts.picture_table(cells, columns, note=note)


def _maps(own: Namespace, loaded: Loaded, images: torch.Tensor) -> np.ndarray:
    for layer in walk(loaded.model, images):
        if layer.index == own.layer % len(loaded.model.blocks):
            return (
                to_grid(norms(layer.after.x)[:, layer.num_prefix_tokens :], layer.after.group, layer.grid).cpu().numpy()
            )
    raise AssertionError("the layer was checked before")


def _image_cell(picture: np.ndarray) -> Any:
    return lambda ax: charts.show_image(ax, picture)


def _map_cell(values: np.ndarray, limits: tuple[float, float], cut: float) -> Any:
    def draw(ax: Axes) -> None:
        charts.show_map(ax, values, limits=limits)
        for row, column in np.argwhere(values > cut):
            charts.mark_patch(ax, (int(row), int(column)))

    return draw
