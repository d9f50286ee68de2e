"""analyze.py reconstruction and analyze.py probes: what single tokens know of pixels, places and classes."""

import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from datasets import unnormalise
from models import UserError
from utils import log

from . import charts
from . import probes as P
from .command import Images, Loaded, Output, add_command, load_models, track
from .outliers import Histogram, Rule
from .walk import patch_grid

MOST_IMAGES = 2000  # unless --limit says otherwise: a probe's features go to a temporary file
MOST_LABELLED = 20_000  # per split: probes of the class hold one token of every kind of each image in memory
TARGETS = ("raw", "standardised")


def add_parser(subparsers: Any) -> None:
    text = "reconstruct pixels and position of a patch from its token: outlier against normal patches"
    parser = add_command(subparsers, "reconstruction", reconstruction, text)
    parser.add_argument("--probe", choices=("linear", "mlp"), default="linear", help="linear: least squares, exact")
    parser.add_argument("--feat", default="prenorm", metavar="FEAT", help="prenorm, postnorm or layer:K")
    parser.add_argument("--target", choices=TARGETS, default="raw", help="normalised pixels, or those of each patch")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="of the mlp and the position probe")
    parser.add_argument("--show", type=int, default=5, metavar="K", help="images drawn")
    _outlier_flags(parser)
    text = "linear and nearest-neighbour probes of the class from one class, register, normal or outlier token"
    parser = add_command(subparsers, "probes", probes, text)
    parser.add_argument("--draws", type=int, default=5, metavar="N", help="random patches per image, one probe each")
    parser.add_argument("--neighbours", type=int, default=20, metavar="K")
    parser.add_argument("--C", nargs="+", type=float, default=list(P.STRENGTHS), metavar="C", help="strengths to try")
    _outlier_flags(parser)


def _outlier_flags(parser: Any) -> None:
    parser.add_argument("--outlier_rule", default="quantile:0.98", metavar="RULE", help="also sigma:3, ratio:3, abs:75")
    parser.add_argument("--outlier_layer", type=int, default=-1, metavar="BLOCK", help="whose output (default: last)")


def _rule(own: Namespace, models: Sequence[Loaded]) -> Rule:
    for loaded in models:
        depth = len(loaded.model.blocks)
        if not -depth <= own.outlier_layer < depth:
            raise UserError(f"--outlier_layer {own.outlier_layer}: {loaded.label} has blocks 0..{depth - 1}")
    return Rule.parse(own.outlier_rule)


# Reconstruction


@dataclass
class Judged:
    """A model's probes and what they came to."""

    loaded: Loaded
    feature: P.Feature
    pixels: nn.Module
    places: nn.Module
    cut: float
    rows: dict[str, Any]


def reconstruction(own: Namespace, rest: Sequence[str]) -> None:
    models = load_models(own, rest)
    if own.epochs < 1:
        raise UserError(f"--epochs must be at least 1, not {own.epochs}")
    feature, rule = P.Feature.parse(own.feat), _rule(own, models)
    for loaded in models:
        feature.index(len(loaded.model.blocks))
        P.Folds.alternate(len(_probe_images(own, loaded)))
    out = Output(own, rest, models)
    judged = [_judge(own, loaded, feature, rule) for loaded in models]
    rows = [{"label": one.loaded.label, **one.rows} for one in judged]
    head = {"probe": own.probe, "feat": own.feat, "target": own.target, "outlier_rule": str(rule), "models": rows}
    out.json("reconstruction", head)
    out.npz("reconstruction", {f"{i}/{k}": np.asarray(v) for i, row in enumerate(rows) for k, v in _flat(row).items()})
    out.png("reconstruction_errors", draw_errors(judged))
    for one in judged if own.show > 0 else ():
        name = "reconstruction_images" + (f"_{one.loaded.slug}" if len(judged) > 1 else "")
        out.png(name, draw_reconstructions(own, one))
    for row in rows:
        log(_line(row))


def _flat(row: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        nested = isinstance(value, dict)
        found |= _flat(value, f"{before}{key}/") if nested else {before + key: value}
    return {key: value for key, value in found.items() if isinstance(value, (int, float, list))}


def _line(row: dict[str, Any]) -> str:
    mse, place = row["mse"], row["position"]["top1"]
    low, high = mse["ratio_ci95"]
    return (
        f"{row['label']}: MSE outlier {mse['outlier']:.4f}, normal {mse['normal']:.4f}, ratio {mse['ratio']:.3f} "
        f"[{low:.3f}, {high:.3f}]; explained {row['explained']['outlier']:.2f} and {row['explained']['normal']:.2f}; "
        f"position top-1 outlier {place['outlier']:.1f} %, normal {place['normal']:.1f} %"
    )


def _probe_images(own: Namespace, loaded: Loaded, title: str | None = None) -> Images:
    return Images(own, loaded, title=title, limit=None if loaded.args.limit else MOST_IMAGES)


def _judge(own: Namespace, loaded: Loaded, feature: P.Feature, rule: Rule) -> Judged:
    """Features of all images into a temporary file, both probes, both judged on the images held back."""
    model = loaded.model
    images = _probe_images(own, loaded, f"features of {loaded.label}")
    with tempfile.TemporaryDirectory(prefix="probe_") as folder:
        store = None
        for batch in images:
            features, norms = P.patch_features(model, batch.images, feature, own.outlier_layer)
            if store is None:
                pixels = (batch.images.shape[2], batch.images.shape[3])
                store = P.Store(Path(folder), len(images), (features.shape[1], features.shape[2]), pixels)
                grid = patch_grid(model, batch.images)
            store.add(features, batch.images, norms)
        if store is None or len(store) < 8:
            raise UserError(f"a probe needs at least 8 readable images, there are {0 if store is None else len(store)}")
        return _fit_and_judge(own, loaded, feature, rule, store, grid)


def _fit_and_judge(
    own: Namespace, loaded: Loaded, feature: P.Feature, rule: Rule, store: P.Store, grid: tuple[int, int]
) -> Judged:
    folds, patch = P.Folds.alternate(len(store)), loaded.model.patch_embed.patch_size
    histogram = Histogram()
    histogram.add(store.norms[folds.fit + folds.stop])
    cut, seed = rule.cut(histogram), loaded.args.seed
    target: Callable[[Tensor], Tensor] = lambda images: P.patch_targets(images, patch, own.target == "standardised")  # noqa: E731
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pixels: nn.Module = P.fit_linear(store, folds, target) if own.probe == "linear" else nn.Identity()
        _, x, images = next(store.batches(folds.fit, 1))
        if own.probe == "mlp":
            probe = P.mlp_probe(x.shape[-1], target(images).shape[-1])
            square = lambda y, images: (y - target(images)).square().mean()  # noqa: E731
            report = lambda line: log(f"mlp probe of {loaded.label}, {line}")  # noqa: E731
            pixels = P.train_probe(probe, store, folds, square, own.epochs, seed=seed, report=report)
        places: nn.Module = nn.Linear(x.shape[-1], x.shape[1])
        report = lambda line: log(f"position probe of {loaded.label}, {line}")  # noqa: E731
        places = P.train_probe(places, store, folds, P.position_loss, own.epochs, seed=seed, report=report)
    mean = P.mean_target(store, folds, target)
    rows = _errors(store, folds, pixels, places, target, mean, cut, loaded, grid)
    rows = {"cut": cut, "n_fit": len(folds.fit), "n_stop": len(folds.stop), "n_test": len(folds.test), **rows}
    return Judged(loaded, feature, pixels, places, cut, rows)


@torch.no_grad()
def _errors(
    store: P.Store,
    folds: P.Folds,
    pixels: nn.Module,
    places: nn.Module,
    target: Callable[[Tensor], Tensor],
    mean: Tensor,
    cut: float,
    loaded: Loaded,
    grid: tuple[int, int],
) -> dict[str, Any]:
    names = ("mse", "mse_of_mean_patch", "l2", "brightness", "contrast", "likeness", "top1", "distance")
    splits = {name: P.Split() for name in names}
    matched = {"contrast": P.Matched(), "likeness": P.Matched(), "brightness": P.Matched()}
    norms, device = store.norms, loaded.device
    for chosen, x, images in store.batches(folds.test, 16):
        y, outlier = target(images), norms[chosen] > cut
        square = (pixels(x) - y).square()
        guess = places(x).argmax(dim=-1)
        values = {"mse": square.mean(dim=-1), "l2": square.sum(dim=-1).sqrt()}
        values["mse_of_mean_patch"] = (y - mean).square().mean(dim=-1)
        values["brightness"] = P.patch_targets(images, loaded.model.patch_embed.patch_size).mean(dim=-1)
        values["contrast"] = P.contrast(images, loaded.model.patch_embed.patch_size)
        values["likeness"] = P.likeness(loaded.model, images.to(device)).cpu()
        values["top1"] = 100.0 * (guess == torch.arange(guess.shape[1]))
        values["distance"] = P.cell_distance(guess, grid)
        for name, value in values.items():
            splits[name].add(value, outlier)
        for name, pairs in matched.items():
            pairs.add(values["mse"], outlier, values[name])
    summaries = {name: split.summary() for name, split in splits.items()}
    for name in ("brightness", "contrast", "likeness"):  # of which a ratio says nothing
        summaries[name] = {key: value for key, value in summaries[name].items() if "ratio" not in key}
    kinds = ("outlier", "normal", "all")
    summaries["explained"] = {k: 1 - summaries["mse"][k] / summaries["mse_of_mean_patch"][k] for k in kinds}
    position = {name: summaries.pop(name) for name in ("top1", "distance")}
    return {**summaries, "matched": {name: pairs.summary() for name, pairs in matched.items()}, "position": position}


@charts.styled
def draw_errors(judged: Sequence[Judged]) -> Figure:
    """Error of outlier, matched normal and all normal patches with 95 % intervals; position accuracy beside it."""
    figure, axes = charts.new_figure(
        1, 3, 3.6, 3.3, "Patch reconstruction, images held back", width_ratios=(2.3, 1.1, 1.1)
    )
    panels = (
        ("mse", "mean squared error of a patch"),
        ("top1", "position, top-1 (%)"),
        ("distance", "position, cells off"),
    )
    for ax, (name, title) in zip(axes[0], panels, strict=True):
        for index, one in enumerate(judged):
            row = one.rows["mse"] if name == "mse" else one.rows["position"][name]
            bars = [("normal", row["normal"], row["normal_ci95"]), ("outlier", row["outlier"], row["outlier_ci95"])]
            if name == "mse":
                pairs = one.rows["matched"].items()
                bars += [(f"normal, same\n{key}", held["matched_normal"], None) for key, held in pairs if held["pairs"]]
            _bars(ax, bars, index, len(judged), one.loaded.label)
        ax.set_title(title, fontsize=9)
        ax.grid(False, axis="x")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    note = "whiskers: 95 % over images; outliers by " + "; ".join(
        f"norm > {one.cut:.1f} ({100 * one.rows['mse']['outlier_patches'] / _patches(one):.1f} % of patches)"
        for one in judged
    )
    figure.supxlabel(note, fontsize=7.5, color=charts.FAINT, x=0.01, ha="left")
    if len(judged) > 1:
        figure.legend(handles, labels, loc="outside upper right")
    return figure


def _patches(one: Judged) -> int:
    counts: int = one.rows["mse"]["outlier_patches"] + one.rows["mse"]["normal_patches"]
    return counts


def _bars(ax: Axes, bars: Sequence[tuple[str, float, Any]], index: int, models: int, label: str) -> None:
    width = 0.75 / models
    x = np.arange(len(bars)) + (index - (models - 1) / 2) * width
    colours = [charts.colour_of(index)] * len(bars)
    if models == 1:
        colours = [charts.COLOURS[1] if name == "outlier" else charts.COLOURS[0] for name, _, _ in bars]
    heights = [value for _, value, _ in bars]
    ax.bar(x, heights, width * 0.92, color=colours, alpha=0.85, label=label)
    for place, (_, value, span) in zip(x, bars, strict=True):
        if span is not None and np.isfinite(span).all():
            ax.plot([place, place], span, color=charts.INK, lw=1.4)
        top = span[1] if span is not None and np.isfinite(span).all() else value
        ax.annotate(f"{value:.3g}", (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    ax.set_xticks(range(len(bars)), [name for name, _, _ in bars], fontsize=7)
    ax.margins(y=0.14)


@torch.no_grad()
def draw_reconstructions(own: Namespace, one: Judged) -> Figure:
    """Images, what the probe makes of their tokens, and the error, outliers outlined."""
    loaded, model = one.loaded, one.loaded.model
    patch, cells, captions = model.patch_embed.patch_size, [], []
    images = Images(own, loaded, title="pictures", limit=own.show)
    for batch in images:
        features, norms = P.patch_features(model, batch.images, one.feature, own.outlier_layer)
        grid = patch_grid(model, batch.images)
        y = one.pixels(features.cpu())
        wanted = P.patch_targets(batch.images.cpu(), patch)
        if own.target == "standardised":  # give every patch its own mean and contrast back, to be looked at
            y = y * wanted.std(dim=-1, keepdim=True) + wanted.mean(dim=-1, keepdim=True)
        made = unnormalise(P.fold_targets(y, patch, grid), loaded.config).permute(0, 2, 3, 1).numpy()
        error = (y - wanted).square().mean(dim=-1).unflatten(1, grid).sqrt().numpy()
        outlier = (norms.cpu() > one.cut).unflatten(1, grid).numpy()
        for i, picture in enumerate(images.pictures(batch.images)):
            cells.append([_picture(picture), _picture(made[i]), _error_map(error[i], outlier[i])])
            captions.append(f"error {error[i].mean():.2f}")
    note = "error: root mean square of normalised pixels; red: outlier patches"
    columns = ["input", f"{own.probe} probe, {own.feat}", "error"]
    return charts.picture_table(cells, columns, captions, loaded.label, note=note)


def _picture(array: np.ndarray) -> Callable[[Axes], Any]:
    return lambda ax: charts.show_image(ax, array)


def _error_map(values: np.ndarray, outlier: np.ndarray) -> Callable[[Axes], Any]:
    def draw(ax: Axes) -> None:
        charts.show_map(ax, values, limits=(0.0, 1.5))
        for row, column in np.argwhere(outlier):
            charts.mark_patch(ax, (int(row), int(column)))

    return draw


# Probes of the class


def probes(own: Namespace, rest: Sequence[str]) -> None:
    if own.data is not None:
        raise UserError("probes need labels and a train split: give --dataset (and --data_path) instead of --data")
    if own.draws < 1 or own.neighbours < 1 or min(own.C) <= 0:
        raise UserError("--draws and --neighbours must be at least 1, and every --C above 0")
    models = load_models(own, rest)
    rule = _rule(own, models)
    limits = [None if loaded.args.limit else MOST_LABELLED for loaded in models]
    sets = [
        (
            Images(own, loaded, "train", (f"norms of {loaded.label}", f"training tokens of {loaded.label}"), limit),
            Images(own, loaded, "val", f"test tokens of {loaded.label}", limit),
        )
        for loaded, limit in zip(models, limits, strict=True)
    ]
    out = Output(own, rest, models)
    rows = [_probe_model(own, loaded, rule, *pair) for loaded, pair in zip(models, sets, strict=True)]
    out.json("probes", {"outlier_rule": str(rule), "neighbours": own.neighbours, "draws": own.draws, "models": rows})
    for index, row in enumerate(rows):
        table = {f"{k}/{p}": np.asarray(v[f"{p}_draws"]) for k, v in row["kinds"].items() for p in ("linear", "knn")}
        out.npz("probes" if len(rows) == 1 else f"probes_{models[index].slug}", table)
    out.png("probes", draw_probes(rows))


def _probe_model(own: Namespace, loaded: Loaded, rule: Rule, train: Images, test: Images) -> dict[str, Any]:
    histogram = Histogram()
    for batch in train:
        histogram.add(P.patch_features(loaded.model, batch.images, P.Feature(), own.outlier_layer)[1])
    cut = rule.cut(histogram)
    banks = [P.TokenBank(own.draws, loaded.args.seed + i) for i in range(2)]
    for bank, images in zip(banks, (train, test), strict=True):
        for batch in images:
            bank.add(loaded.model, batch.images, batch.targets, cut, own.outlier_layer)
    counts: dict[str, Any] = {"n_train": int(banks[0].covered.sum()), "n_test": int(banks[1].covered.sum())}
    counts |= {"coverage": 100 * float(banks[0].covered.mean()), "cut": cut}
    _check_banks(banks, loaded, own)
    kinds = {}
    for kind in track(banks[0].kinds, len(banks[0].kinds), f"probes of {loaded.label}"):
        kinds[kind] = P.token_accuracies(banks[0], banks[1], kind, own.neighbours, own.C)
        found = kinds[kind]
        log(f"  {kind}: linear {found['linear']:.2f} +- {found['linear_std']:.2f}, knn {found['knn']:.2f} %")
    return {"label": loaded.label, **counts, "classes": len(set(banks[0].labels.tolist())), "kinds": kinds}


def _check_banks(banks: Sequence[P.TokenBank], loaded: Loaded, own: Namespace) -> None:
    for name, bank in zip(("train", "val"), banks, strict=True):
        labels, numbers = np.unique(bank.labels[bank.covered], return_counts=True)
        if len(labels) < 2 or (name == "train" and numbers.min() < 5):
            raise UserError(
                f"{loaded.label}: of the {name} split {int(bank.covered.sum())} images have an outlier patch "
                f"({own.outlier_rule}), too few (5 of each of 2 classes); take a lower cut or more images"
            )


@charts.styled
def draw_probes(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy by kind of token, a panel per probe, all models side by side."""
    names = list(dict.fromkeys(kind for row in rows for kind in row["kinds"]))
    figure, axes = charts.new_figure(1, 2, 5.0, 0.8 + 0.36 * len(names) * max(1.0, 0.7 * len(rows)), sharey=True)
    height = 0.78 / len(rows)
    for ax, probe, title in zip(axes[0], ("linear", "knn"), ("logistic regression", "nearest neighbours"), strict=True):
        for index, row in enumerate(rows):
            own = [(i, row["kinds"][name]) for i, name in enumerate(names) if name in row["kinds"]]
            y = np.array([i for i, _ in own]) + (index - (len(rows) - 1) / 2) * height
            values, spread = ([found[f"{probe}{end}"] for _, found in own] for end in ("", "_std"))
            label = f"{row['label']} ({row['n_train']} train, {row['n_test']} test images)"
            ax.barh(y, values, height * 0.9, xerr=spread, color=charts.colour_of(index), alpha=0.85, label=label)
            for place, value, gap in zip(y, values, spread, strict=True):
                ax.annotate(
                    f"{value:.1f}", (value + gap, place), (3, 0), textcoords="offset points", va="center", fontsize=7
                )
        ax.axvline(100 / rows[0]["classes"], color=charts.FAINT, lw=1, ls=":")
        ax.set_title(f"{title}: test top-1 (%)")
        ax.grid(False, axis="y")
        ax.set_xlim(0, 108)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left")
    note = (
        "one token per image, after the final norm; images with an outlier only; whiskers: std over draws; dots: chance"
    )
    figure.supxlabel(note, fontsize=7.5, color=charts.FAINT, x=0.99, ha="right")
    return figure
