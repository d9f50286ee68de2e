"""Reconstruction: how well the pixels and the position of a patch can be read from its token, outlier against normal.

After Darcet et al. (arXiv 2309.16588) one probe is trained on all patches and its error is split into outlier and
normal patches afterwards. Because outliers tend to sit where the image is uniform, which is easy to reconstruct, the
same error is also compared with normal patches of the same image that match in brightness, in contrast or in
similarity to their neighbours.

Shapes: B images, n patches on a grid (gh,gw), C channels, V = patch height * width * 3 values of a patch.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.errors import UserError
from models.vit import MergingViT

from . import charts
from .inputs import ImageBatches, as_list, batches, evaluation
from .outliers import DEFAULT_RULE, Histogram, Rule
from .probing import (
    BATCH,
    Feature,
    Folds,
    Matched,
    Split,
    Store,
    Target,
    add_outlier_flags,
    check_outlier_flags,
    fit_linear,
    mean_target,
    mlp_probe,
    patch_features,
    squared_error,
    train_probe,
)
from .similarity import neighbour_cosines
from .walk import patch_grid

MOST_IMAGES = 2000  # unless --limit says otherwise: a probe's features go to a temporary file
PROBES, TARGETS = ("linear", "mlp"), ("raw", "standardised")
MATCHED_BY = ("contrast", "likeness", "brightness")  # properties of a patch, by their names in the json

# Targets and properties of patches


def patch_targets(images: Tensor, patch: tuple[int, int], standardise: bool = False) -> Tensor:
    """Pixels of every patch, row by row, column by column, channel by channel: (B,3,H,W) -> (B,n,V).

    standardise: every patch to mean 0 and variance 1, as masked autoencoders do.
    """
    height, width = patch
    rows, columns = images.shape[-2] // height, images.shape[-1] // width
    x = images.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # (B,3,h,p,w,q)
    x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    if not standardise:
        return x
    return (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def fold_targets(targets: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of `patch_targets`: (B,n,V) -> (B,3,H,W)."""
    x = targets.unflatten(2, (*patch, 3)).unflatten(1, grid)  # (B,h,w,p,q,3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


@torch.no_grad()
def contrast(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Log variance of a patch's pixels (within channels): (B,3,H,W) -> (B,n)."""
    pixels = patch_targets(images, patch).unflatten(2, (-1, 3))
    return pixels.var(dim=2).mean(dim=-1).clamp(min=1e-8).log()


@torch.no_grad()
def neighbour_similarity(model: MergingViT, images: Tensor) -> Tensor:
    """Mean cosine of a patch embedding (before positions) with its neighbours: (B,3,H,W) -> (B,n)."""
    x = model.patch_embed(images)
    return neighbour_cosines(x.reshape(len(x), *patch_grid(model, images), -1)).nanmean(dim=1).flatten(1)


def position_loss(logits: Tensor, _: Tensor) -> Tensor:
    """Cross entropy of the patch's own position: logits (B,n,n)."""
    positions = torch.arange(logits.shape[1]).expand(len(logits), -1)
    return F.cross_entropy(logits.flatten(0, 1), positions.flatten())


def cell_distance(predicted: Tensor, grid: tuple[int, int]) -> Tensor:
    """Distance in cells from predicted positions (B,n) to the true ones."""
    true = torch.arange(predicted.shape[1])
    rows, columns = (predicted // grid[1] - true // grid[1], predicted % grid[1] - true % grid[1])
    return (rows.double() ** 2 + columns.double() ** 2).sqrt()


# Measurement


class Probes(NamedTuple):
    """The two probes of a model, both of features (B,n,C)."""

    pixels: nn.Module  # -> targets (B,n,V)
    positions: nn.Module  # -> logits (B,n,n)


@dataclass(frozen=True)
class ReconstructionResult:
    """The knowledge that a model's tokens hold of the pixels and the position of their patches.

    Attributes:
        cut: the norm above which a patch is an outlier.
        errors: numbers of the test images, as the json holds them: `mse`, `l2`, `explained` and others split into
            outlier, normal and all patches; `matched` by property; `position` with top-1 in % and distance in cells.
    """

    label: str
    feature: Feature
    probe: str  # of PROBES
    target: str  # of TARGETS
    outlier_layer: int
    cut: float
    probes: Probes
    errors: dict[str, Any]


def measure(
    model: VisionTransformer,
    images: ImageBatches,
    *,
    feature: str = "prenorm",
    probe: str = "linear",
    target: str = "raw",
    outlier_rule: Rule = DEFAULT_RULE,
    outlier_layer: int = -1,
    epochs: int = 20,
    seed: int = 0,
    label: str = "model",
    report: Callable[[str], None] | None = None,
) -> ReconstructionResult:
    """Train both probes on half of the images and test them on the other half. One pass over the images.

    Args:
        images: see `inputs.ImageBatches`; at least 8. Features and images go through a temporary file.
        feature: what the probes read, see `Feature`.
        probe: of the pixels: "linear" is solved exactly, "mlp" is trained.
        target: "raw" pixels as the model sees them, or "standardised" per patch.
        outlier_rule: see `Rule`, on the norms of the images that train and validate.
        outlier_layer: the block whose output is judged.
        epochs: at most, of the probes that are trained.
        report: takes a line per epoch.

    Raises:
        UserError: fewer than 8 images, or a layer that the model does not have.
    """
    tokens = Feature.parse(feature)
    with evaluation(model) as vit, tempfile.TemporaryDirectory(prefix="probe_") as folder:
        store, grid = Store(Path(folder)), (0, 0)
        for batch in batches(images, vit):
            features, lengths = patch_features(vit, batch, tokens, outlier_layer)
            store.add(features, batch, lengths)
            grid = patch_grid(vit, batch)
        if len(store) < 8:
            raise UserError(f"a probe needs at least 8 readable images, there are {len(store)}")
        folds, patch = Folds.alternate(len(store)), vit.patch_embed.patch_size
        histogram = Histogram()
        # the cut belongs to what is fitted: test images must not move it
        histogram.add(store.norms[folds.train + folds.val])
        cut = outlier_rule.cut(histogram)
        true: Target = lambda images: patch_targets(images, patch, target == "standardised")  # noqa: E731
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if probe == "linear":
                pixels: nn.Module = fit_linear(store, folds, true)
            else:
                pixels = _fit_mlp(store, folds, true, epochs, seed, _prefixed(report, f"mlp probe of {label}, "))
            positions = _fit_positions(store, folds, epochs, seed, _prefixed(report, f"position probe of {label}, "))
        probes = Probes(pixels, positions)
        numbers = {"n_fit": len(folds.train), "n_stop": len(folds.val), "n_test": len(folds.test)}
        errors = {"cut": cut, **numbers, **_test(vit, store, folds, probes, true, cut, grid)}
    return ReconstructionResult(label, tokens, probe, target, outlier_layer, cut, probes, errors)


def _prefixed(report: Callable[[str], None] | None, prefix: str) -> Callable[[str], None]:
    return lambda line: report(prefix + line) if report else None


def _fit_mlp(
    store: Store, folds: Folds, target: Target, epochs: int, seed: int, report: Callable[[str], None]
) -> nn.Module:
    features, images = store.read(folds.train[:1])
    probe = mlp_probe(features.shape[-1], target(images).shape[-1])
    return train_probe(probe, store, folds, squared_error(target), epochs, seed=seed, report=report)


def _fit_positions(store: Store, folds: Folds, epochs: int, seed: int, report: Callable[[str], None]) -> nn.Module:
    features, _ = store.read(folds.train[:1])
    probe = nn.Linear(features.shape[-1], features.shape[1])
    return train_probe(probe, store, folds, position_loss, epochs, seed=seed, report=report)


@torch.no_grad()
def _test(
    model: MergingViT, store: Store, folds: Folds, probes: Probes, target: Target, cut: float, grid: tuple[int, int]
) -> dict[str, Any]:
    """Errors of the test images, split and matched."""
    patch, device = model.patch_embed.patch_size, next(model.parameters()).device
    mean, lengths = mean_target(store, folds, target), store.norms
    splits: dict[str, Split] = {}
    matched = {name: Matched() for name in MATCHED_BY}
    for indices, x, images in store.batches(folds.test, BATCH):
        y, outlier = target(images), lengths[indices] > cut
        square, guess = (probes.pixels(x) - y).square(), probes.positions(x).argmax(dim=-1)
        values = {
            "mse": square.mean(dim=-1),
            "mse_of_mean_patch": (y - mean).square().mean(dim=-1),
            "l2": square.sum(dim=-1).sqrt(),
            "brightness": patch_targets(images, patch).mean(dim=-1),
            "contrast": contrast(images, patch),
            "likeness": neighbour_similarity(model, images.to(device)).cpu(),
            "top1": 100.0 * (guess == torch.arange(guess.shape[1])),
            "distance": cell_distance(guess, grid),
        }
        for name, value in values.items():
            splits.setdefault(name, Split()).add(value, outlier)
        for name, pairs in matched.items():
            pairs.add(values["mse"], outlier, values[name])
    return _summaries(splits, matched)


def _summaries(splits: dict[str, Split], matched: dict[str, Matched]) -> dict[str, Any]:
    rows = {name: split.summary() for name, split in splits.items()}
    for name in MATCHED_BY:  # logarithms and cosines: their ratio means nothing
        rows[name] = {key: value for key, value in rows[name].items() if "ratio" not in key}
    position = {name: rows.pop(name) for name in ("top1", "distance")}
    sets = ("outlier", "normal", "all")
    return {
        **rows,
        "explained": {name: 1 - rows["mse"][name] / rows["mse_of_mean_patch"][name] for name in sets},
        "matched": {name: pairs.summary() for name, pairs in matched.items()},
        "position": position,
    }


def summarise(result: ReconstructionResult) -> dict[str, Any]:
    """The row of one model, for json."""
    return {"label": result.label, **result.errors}


@dataclass(frozen=True)
class Reconstructions:
    """Reconstruct some images with the pixel probe of a result."""

    images: Tensor  # (B,3,H,W) as the model sees them
    decoded: Tensor  # (B,3,H,W) the same from tokens
    error: np.ndarray  # (B,gh,gw) root mean square over a patch
    outlier: np.ndarray  # (B,gh,gw) bool


@torch.no_grad()
def reconstruct(model: VisionTransformer, images: ImageBatches, result: ReconstructionResult) -> Reconstructions:
    """Decode images (B,3,H,W) from their tokens; standardised patches get their own mean and contrast back."""
    parts = []
    with evaluation(model) as vit:
        patch = vit.patch_embed.patch_size
        for batch in batches(images, vit):
            features, lengths = patch_features(vit, batch, result.feature, result.outlier_layer)
            grid = patch_grid(vit, batch)
            y, true = result.probes.pixels(features.cpu()), patch_targets(batch.cpu(), patch)
            if result.target == "standardised":
                y = y * true.std(dim=-1, keepdim=True) + true.mean(dim=-1, keepdim=True)
            error = (y - true).square().mean(dim=-1).unflatten(1, grid).sqrt()
            outlier = (lengths.cpu() > result.cut).unflatten(1, grid)
            parts.append((batch.cpu(), fold_targets(y, patch, grid), error, outlier))
    images, decoded, error, outlier = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Reconstructions(images, decoded, error.numpy(), outlier.numpy())


# Figures


@charts.styled
def draw(results: ReconstructionResult | Sequence[ReconstructionResult]) -> Figure:
    """Error of outlier, matched normal and all normal patches with 95 % intervals; position accuracy beside it."""
    results = as_list(results)
    figure, axes = charts.new_figure(
        1, 3, 3.6, 3.3, "Patch reconstruction, images held back", width_ratios=(2.3, 1.1, 1.1)
    )
    panels = (
        ("mse", "mean squared error of a patch"),
        ("top1", "position, top-1 (%)"),
        ("distance", "position, cells off"),
    )
    for ax, (name, title) in zip(axes[0], panels, strict=True):
        for index, result in enumerate(results):
            _draw_bars(ax, _bars(result.errors, name), index, len(results), result.label)
        ax.set_title(title, fontsize=9)
        ax.grid(False, axis="x")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    note = "whiskers: 95 % over images; outliers by " + "; ".join(map(_outlier_note, results))
    figure.supxlabel(note, fontsize=7.5, color=charts.FAINT, x=0.01, ha="left")
    if len(results) > 1:
        figure.legend(handles, labels, loc="outside upper right")
    return figure


Bar = tuple[str, float, list[float] | None]  # name, height, 95 % interval


def _bars(errors: dict[str, Any], name: str) -> list[Bar]:
    row = errors["mse"] if name == "mse" else errors["position"][name]
    bars: list[Bar] = [(tokens, row[tokens], row[f"{tokens}_ci95"]) for tokens in ("normal", "outlier")]
    if name == "mse":
        matched = {key: row for key, row in errors["matched"].items() if row["pairs"]}
        bars += [(f"normal, same\n{key}", row["matched_normal"], None) for key, row in matched.items()]
    return bars


def _outlier_note(result: ReconstructionResult) -> str:
    mse = result.errors["mse"]
    share = 100 * mse["outlier_patches"] / (mse["outlier_patches"] + mse["normal_patches"])
    return f"norm > {result.cut:.1f} ({share:.1f} % of patches)"


def _draw_bars(ax: Axes, bars: Sequence[Bar], index: int, models: int, label: str) -> None:
    width = 0.75 / models
    x = np.arange(len(bars)) + (index - (models - 1) / 2) * width
    colours = [charts.colour_of(index)] * len(bars)
    if models == 1:
        colours = [charts.COLOURS[1] if name == "outlier" else charts.COLOURS[0] for name, _, _ in bars]
    heights = [value for _, value, _ in bars]
    ax.bar(x, heights, width * 0.92, color=colours, alpha=0.85, label=label)
    for position, (_, value, span) in zip(x, bars, strict=True):
        top = value
        if span is not None and np.isfinite(span).all():
            ax.plot([position, position], span, color=charts.INK, lw=1.4)
            top = span[1]
        ax.annotate(f"{value:.3g}", (position, top), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    ax.set_xticks(range(len(bars)), [name for name, _, _ in bars], fontsize=7)
    ax.margins(y=0.14)


def draw_images(
    result: ReconstructionResult, shown: Reconstructions, to_pictures: Callable[[Tensor], np.ndarray]
) -> Figure:
    """Images, what the probe makes of their tokens, and the error, outliers outlined.

    Args:
        to_pictures: turns images (B,3,H,W) as the model sees them into pictures (B,H,W,3) in [0, 1].
    """
    inputs, decoded = to_pictures(shown.images), to_pictures(shown.decoded)
    cells = [
        [
            charts.image_cell(picture),
            charts.image_cell(made),
            charts.map_cell(error, limits=(0.0, 1.5), marked=outlier),
        ]
        for picture, made, error, outlier in zip(inputs, decoded, shown.error, shown.outlier, strict=True)
    ]
    columns = ["input", f"{result.probe} probe, {result.feature}", "error"]
    captions = [f"error {error.mean():.2f}" for error in shown.error]
    note = "error: root mean square of normalised pixels; red: outlier patches"
    return charts.picture_table(cells, columns, captions, result.label, note=note)


# Command


def add_parser(subparsers: Any) -> None:
    from .command import add_command

    text = "reconstruct pixels and position of a patch from its token: outlier against normal patches"
    parser = add_command(subparsers, "reconstruction", run, text)
    parser.add_argument("--probe", choices=PROBES, default="linear", help="linear: least squares, exact")
    parser.add_argument("--feat", default="prenorm", metavar="FEAT", help="prenorm, postnorm or layer:K")
    parser.add_argument("--target", choices=TARGETS, default="raw", help="normalised pixels, or those of each patch")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="of the mlp and the position probe")
    parser.add_argument("--show", type=int, default=5, metavar="K", help="images drawn")
    add_outlier_flags(parser)


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    from utils import log

    from . import command

    models = command.load_models(args, main_argv)
    if args.epochs < 1:
        raise UserError(f"--epochs must be at least 1, not {args.epochs}")
    feature, rule = Feature.parse(args.feat), check_outlier_flags(args, models)
    sets = []
    for loaded in models:
        feature.index(loaded.model)
        limit = None if loaded.args.limit else MOST_IMAGES
        sets.append(command.Images(args, loaded, title=f"features of {loaded.label}", limit=limit))
        Folds.alternate(len(sets[-1]))
    out = command.Output(args, main_argv, models)
    options = {name: getattr(args, name) for name in ("probe", "target", "outlier_layer", "epochs")}
    results = [
        measure(
            m.model,
            images,
            **options,
            outlier_rule=rule,
            feature=args.feat,
            seed=m.args.seed,
            label=m.label,
            report=log,
        )
        for m, images in zip(models, sets, strict=True)
    ]
    rows = [summarise(result) for result in results]
    head = {"probe": args.probe, "feat": args.feat, "target": args.target, "outlier_rule": str(rule), "models": rows}
    out.json("reconstruction", head)
    out.npz("reconstruction", {f"{i}/{k}": np.asarray(v) for i, row in enumerate(rows) for k, v in _flat(row).items()})
    out.figure("reconstruction_errors", draw(results))
    for loaded, result in zip(models, results, strict=True) if args.show > 0 else ():
        images = command.Images(args, loaded, title="pictures", limit=args.show)
        name = "reconstruction_images" + (f"_{loaded.slug}" if len(models) > 1 else "")
        out.figure(name, draw_images(result, reconstruct(loaded.model, images, result), images.pictures))
    for row in rows:
        log(_line(row))


def _flat(row: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Numbers and lists of a nested dictionary, by their path."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat.update(_flat(value, f"{path}{key}/") if isinstance(value, dict) else {path + key: value})
    return {key: value for key, value in flat.items() if isinstance(value, (int, float, list))}


def _line(row: dict[str, Any]) -> str:
    mse, top1 = row["mse"], row["position"]["top1"]
    low, high = mse["ratio_ci95"]
    return (
        f"{row['label']}: MSE outlier {mse['outlier']:.4f}, normal {mse['normal']:.4f}, ratio {mse['ratio']:.3f} "
        f"[{low:.3f}, {high:.3f}]; explained {row['explained']['outlier']:.2f} and {row['explained']['normal']:.2f}; "
        f"position top-1 outlier {top1['outlier']:.1f} %, normal {top1['normal']:.1f} %"
    )
