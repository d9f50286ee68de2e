"""analyze.py ttr find | apply | eval: test-time registers (arXiv 2506.08010)."""

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from models import MergingViT, UserError
from utils import log

from . import charts
from .command import Images, Loaded, Output, add_command, labels_fit, load_models
from .outliers import Rule, bimodality, norms
from .test_time_registers import (
    Effect,
    Neuron,
    NormTable,
    Ranking,
    find_neurons,
    norm_table,
    random_neurons,
    shift_neurons,
)
from .walk import attention, check_layer, per_patch, to_grid, walk

MOST_IMAGES = 1000  # the paper's number, unless --limit says otherwise
STEPS = ("find", "apply", "eval")


def add_parser(subparsers: Any) -> None:
    text = "test-time registers: find register neurons, apply the shift to images, evaluate it on a data set"
    parser = add_command(subparsers, "ttr", run, text)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--outlier_rule", default="sigma:3", metavar="RULE", help="also quantile:0.98, ratio:3, abs:75")
    parser.add_argument("--detection_layer", type=int, default=-1, metavar="BLOCK", help="whose output is judged")
    parser.add_argument("--top_layer", default="auto", metavar="BLOCK", help="find: the last block looked at")
    parser.add_argument("--top_k", type=int, nargs="+", default=[10], metavar="K", help="neurons; eval takes several")
    parser.add_argument(
        "--sparse", action="store_true", help="find: only neurons silent at half of the patches or more"
    )
    parser.add_argument("--neurons", type=Path, metavar="FILE", help="apply, eval: neurons.json of find")
    parser.add_argument("--controls", type=int, default=3, metavar="N", help="eval: draws of random neurons")
    parser.add_argument("--show", type=int, default=5, metavar="K", help="apply: images drawn")


def run(own: Namespace, rest: Sequence[str]) -> None:
    models = load_models(own, rest)
    if len(models) > 1:
        raise UserError("ttr takes one model at a time")
    if min(own.top_k) < 0 or (own.step == "find" and max(own.top_k) < 1) or own.controls < 0:
        raise UserError("--top_k and --controls must be at least 0, and --top_k of find at least 1")
    if (own.neurons is None) != (own.step == "find"):
        raise UserError("find makes neurons.json; apply and eval need it: --neurons FILE")
    Rule.parse(own.outlier_rule), check_layer(models[0].model, own.detection_layer)
    {"find": find, "apply": apply, "eval": evaluate}[own.step](own, rest, models[0])


def _images(own: Namespace, loaded: Loaded, title: str) -> Images:
    return Images(own, loaded, title=title, limit=None if loaded.args.limit else MOST_IMAGES)


class _Only:
    """The images alone of every batch, as often as asked."""

    def __init__(self, batches: Images) -> None:
        self._batches = batches

    def __iter__(self) -> Any:
        return (batch.images for batch in self._batches)


# find


def find(own: Namespace, rest: Sequence[str], loaded: Loaded) -> None:
    top = None if own.top_layer == "auto" else _block(own.top_layer, loaded.model)
    out = Output(own, rest, [loaded])
    table = norm_table(loaded.model, _Only(_images(own, loaded, "norms")), own.detection_layer)
    cut = Rule.parse(own.outlier_rule).cut(table.histogram)
    chosen = table.top_layer() if top is None else top
    log(f"outliers: norm > {cut:.2f} after block {own.detection_layer}; neurons of blocks 0..{chosen}")
    batches = _Only(_images(own, loaded, "activations"))
    ranking = find_neurons(loaded.model, batches, table.detection > cut, chosen, max(own.top_k), own.sparse)
    jump = (table.largest.mean(0)[1:] / table.largest.mean(0)[:-1]).tolist()
    content = {
        "neurons": {str(block): units for block, units in ranking.by_block().items()},
        "ranked": [list(neuron) for neuron in ranking.neurons],
        "scores": list(ranking.scores),
        "scores_elsewhere": list(ranking.elsewhere),
        "outlier_rule": own.outlier_rule,
        "cut": cut,
        "detection_layer": own.detection_layer,
        "top_layer": chosen,
        "top_layer_how": "given" if top is not None else "doubles" if max(jump) > 2 else "largest jump; none doubles",
        "max_norm_by_block": table.largest.mean(0).tolist(),
        "n_images": ranking.images,
        "n_images_with_outliers": ranking.images_with_outliers,
        "outlier_share": 100 * ranking.outliers / table.detection.numel(),
        "bimodality": bimodality(table.histogram),
    }
    out.json("neurons", content)
    out.npz("neurons", {"largest": table.largest, "norms": table.detection})
    out.png("neurons", draw_found(table, ranking, cut, chosen))
    log(f"{ranking.images_with_outliers} of {ranking.images} images have outliers; first: {list(ranking.neurons[:5])}")


def _block(text: str, model: MergingViT) -> int:
    try:
        return check_layer(model, int(text))
    except ValueError as error:
        raise UserError(f"--top_layer must be auto or a block, not {text}: {error}") from error


@charts.styled
def draw_found(table: NormTable, ranking: Ranking, cut: float, top: int) -> Figure:
    """Where outliers appear, how far they stand apart, and the neurons' activations at them and elsewhere."""
    figure, axes = charts.new_figure(1, 3, 3.7, 3.2, "Register neurons")
    ax, mean = axes[0, 0], table.largest.mean(dim=0)
    spread = table.largest.std(dim=0)
    x = np.arange(len(mean))
    ax.fill_between(x, mean - spread, mean + spread, color=charts.COLOURS[0], alpha=0.15, lw=0)
    ax.plot(x, mean, color=charts.COLOURS[0], marker="o", ms=3)
    ax.axvline(top, color=charts.FAINT, ls=":", label=f"neurons up to block {top}")
    ax.set(title="largest patch norm of an image", xlabel="after block (band: std over images)", ylabel="L2 norm")
    ax.legend()
    ax = axes[0, 1]
    ax.hist(table.detection.flatten().numpy(), 100, color=charts.COLOURS[0], alpha=0.8)
    ax.axvline(cut, color=charts.COLOURS[1], label=f"cut {cut:.1f}")
    ax.set(title="patch norms, detection layer", yscale="log", xlabel="L2 norm", ylabel="patches")
    ax.legend()
    ax = axes[0, 2]
    shown = min(12, len(ranking.neurons))
    y = np.arange(shown)
    ax.barh(y - 0.2, ranking.scores[:shown], 0.38, color=charts.COLOURS[1], label="at outlier patches")
    ax.barh(y + 0.2, ranking.elsewhere[:shown], 0.38, color=charts.COLOURS[0], label="at other patches")
    ax.set_yticks(y, [f"{block}: {unit}" for block, unit in ranking.neurons[:shown]], fontsize=7)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set(title="first neurons (block: unit)", xlabel="mean |activation|")
    ax.legend(loc="lower right")
    return figure


# apply


def read_neurons(file: Path) -> tuple[list[Neuron], dict[str, Any]]:
    """The ranked neurons of neurons.json and all it says."""
    try:
        content = json.loads(file.read_text())
        ranked = [(int(block), int(unit)) for block, unit in content["ranked"]]
        float(content["cut"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read --neurons {file} ({error}); make it with analyze.py ttr find") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--neurons {file} is not what analyze.py ttr find writes; make it anew") from error
    return ranked, content


def _first(ranked: list[Neuron], k: int, file: Path) -> list[Neuron]:
    if k > len(ranked):
        raise UserError(f"--top_k {k}: {file} ranks {len(ranked)} neurons; find more with ttr find --top_k {k}")
    return ranked[:k]


def apply(own: Namespace, rest: Sequence[str], loaded: Loaded) -> None:
    """Pictures before and after: norm maps and where the class token looks."""
    if len(own.top_k) > 1 or own.show < 1:
        raise UserError("ttr apply takes one --top_k and --show of at least 1")
    ranked, found = read_neurons(own.neurons)
    shifted = shift_neurons(loaded.model, _first(ranked, own.top_k[0], own.neurons))
    out = Output(own, rest, [loaded])
    images = Images(own, loaded, title="maps", limit=own.show)
    pictures: list[np.ndarray] = []
    rows: list[tuple[Any, ...]] = []
    for batch in images:
        pictures.extend(images.pictures(batch.images))
        before, after = (_maps(model, batch.images, own.detection_layer) for model in (loaded.model, shifted))
        rows.extend(zip(*before, *after, strict=True))
    arrays = ("norm_before", "class_before", "token_before", "norm_after", "class_after", "token_after")
    stacked = {name: np.stack([row[i] for row in rows]) for i, name in enumerate(arrays)}
    out.npz("applied", stacked)
    summary = {name: float(stacked[f"norm_{name}"].max(axis=(1, 2)).mean()) for name in ("before", "after")}
    largest = {"max_norm": summary, "token_norm_after": float(stacked["token_after"].mean()), "cut": found["cut"]}
    out.json("applied", {"top_k": own.top_k[0], "n_images": len(rows), **largest})
    out.png("applied", draw_applied(pictures, stacked, found["cut"], own.top_k[0]))


@torch.no_grad()
def _maps(model: MergingViT, images: Tensor, detection_layer: int) -> tuple[np.ndarray, ...]:
    """Norms (B,gh,gw) at the detection layer, class attention (B,gh,gw) of the last block, norm (B,) of the last prefix
    token."""
    wanted = check_layer(model, detection_layer)
    for layer in walk(model, images, r=0):
        if layer.index == wanted:
            lengths = norms(layer.after.x)
            norm = to_grid(lengths[:, layer.num_prefix_tokens :], layer.after.group, layer.grid)
            token = lengths[:, layer.num_prefix_tokens - 1]
    looks = per_patch(attention(layer)[:, :, 0].mean(dim=1), layer)
    return norm.cpu().numpy(), looks.cpu().numpy(), token.cpu().numpy()


def draw_applied(pictures: Sequence[np.ndarray], maps: dict[str, np.ndarray], cut: float, k: int) -> Figure:
    """A row per image: input, norms and class attention before and after, on shared scales."""
    cells = []
    limits = (float(maps["norm_before"].min()), max(float(maps["norm_before"].max()), cut * 1.01))
    for i, picture in enumerate(pictures):
        top = max(float(maps[f"class_{when}"][i].max()) for when in ("before", "after"))
        row: list[Callable[[Axes], Any]] = [partial(charts.show_image, image=picture)]
        row += [_norm_cell(maps[f"norm_{when}"][i], limits, cut) for when in ("before", "after")]
        row += [_look_cell(maps[f"class_{when}"][i], (0.0, top)) for when in ("before", "after")]
        cells.append(row)
    columns = ["input", "norms before", f"norms, {k} neurons moved", "class attention before", "class attention after"]
    note = f"norms on one scale up to {limits[1]:.0f}; red: above the cut {cut:.1f} of the model before"
    return charts.picture_table(cells, columns, note=note)


def _norm_cell(values: np.ndarray, limits: tuple[float, float], cut: float) -> Callable[[Axes], Any]:
    def draw(ax: Axes) -> None:
        charts.show_map(ax, values, limits=limits)
        for row, column in np.argwhere(values > cut):
            charts.mark_patch(ax, (int(row), int(column)))

    return draw


def _look_cell(values: np.ndarray, limits: tuple[float, float]) -> Callable[[Axes], Any]:
    return lambda ax: charts.show_map(ax, values, limits=limits, cmap="magma")


# eval


def evaluate(own: Namespace, rest: Sequence[str], loaded: Loaded) -> None:
    """Accuracy and norms before and after, with the empty token alone and with random neurons as controls."""
    ranked, found = read_neurons(own.neurons)
    variants = _variants(own, loaded.model, ranked)
    out = Output(own, rest, [loaded])
    images = _images(own, loaded, "evaluation")
    labelled = labels_fit(own, loaded)
    effects = {name: Effect() for name in variants}
    for batch in images:
        for name, model in variants.items():
            effects[name].add(model, batch.images, batch.targets if labelled else None, own.detection_layer)
    rows = [{"variant": name, **effect.summary(found["cut"], effects["before"])} for name, effect in effects.items()]
    out.json("ttr", {"cut": found["cut"], "found_on": found["n_images"], "rows": rows})
    out.npz("ttr", {name.replace(" ", "_"): torch.cat(effect.largest) for name, effect in effects.items()})
    out.png(
        "ttr",
        draw_effects(rows, {name: torch.cat(e.norms).flatten().numpy() for name, e in effects.items()}, found["cut"]),
    )
    for row in rows:
        log(_row_text(row))


def _variants(own: Namespace, model: MergingViT, ranked: list[Neuron]) -> dict[str, MergingViT]:
    found = {"before": model, "empty token only": shift_neurons(model, (), add_token=True)}
    for k in own.top_k:
        found[f"{k} neurons moved"] = shift_neurons(model, _first(ranked, k, own.neurons))
    most = _first(ranked, max(own.top_k), own.neurons)
    for seed in range(own.controls if most else 0):
        found[f"{len(most)} random neurons, draw {seed + 1}"] = shift_neurons(model, random_neurons(model, most, seed))
    return found


def _row_text(row: dict[str, Any]) -> str:
    parts = [f"{row['variant']}: largest patch norm {row['max_norm']:.2f} (p98 {row['p98_norm']:.2f})"]
    parts += [f"above the cut {row['outlier_share']:.2f} %", f"last prefix token {row['token_norm_by_block'][-1]:.2f}"]
    parts += [f"top-1 {row['acc1']:.2f} %"] if "acc1" in row else []
    return ", ".join([*parts, f"same top-1 as before {row['agree']:.2f} %"])


@charts.styled
def draw_effects(rows: Sequence[dict[str, Any]], values: dict[str, np.ndarray], cut: float) -> Figure:
    """Largest norms over blocks, norms of the extra token, where the class token looks, and the norms' distribution."""
    figure, axes = charts.new_figure(2, 2, 4.6, 3.0, "Test-time registers")
    panels = (
        ("max_norm_by_block", "largest patch norm of an image"),
        ("token_norm_by_block", "norm of the extra token"),
        ("class_peak_by_block", "class token's largest attention to a patch"),
    )
    shown = [row for row in rows if "draw" not in row["variant"]]
    controls = [row for row in rows if "draw" in row["variant"]]
    for ax, (key, title) in zip(axes.flat, panels, strict=False):
        for index, row in enumerate(shown):
            if key.startswith("token") and row["variant"] == "before":
                continue  # there the last prefix token is another one
            ax.plot(row[key], color=charts.colour_of(index), marker="o", ms=3, label=row["variant"])
        for row in controls:
            label = "random neurons" if row is controls[0] else None
            ax.plot(row[key], color=charts.INK, lw=0.9, ls=":", alpha=0.8, label=label)
        ax.set(title=title, xlabel="block")
    axes[0, 0].legend()
    ax = axes[1, 1]
    edges = np.linspace(0, max(float(v.max()) for v in values.values()) * 1.001, 101)
    for index, row in enumerate(shown):
        ax.stairs(np.histogram(values[row["variant"]], edges)[0], edges, color=charts.colour_of(index), lw=1.4)
    ax.axvline(cut, color=charts.INK, lw=1, ls=":", label=f"cut {cut:.1f}")
    ax.set(title="patch norms, detection layer", yscale="log", xlabel="L2 norm", ylabel="patches")
    ax.legend()
    return figure
