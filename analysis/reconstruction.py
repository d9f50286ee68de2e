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
from matplotlib.patches import Rectangle
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.errors import UserError
from models.vit import MergingViT

from . import charts
from .inputs import ImageBatches, as_list, batches, evaluation
from .intervals import LEAST, paired
from .outliers import DEFAULT_RULE, SCALED, SHARED, Histogram, Rule, Yardstick, describe_cuts
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
    outlier_ratio,
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
        yardstick: the shared cut, to be given to the measurement of the next model.
        cuts: the shared cut and the one scaled by the medians.
        held_back: positions of the test images among those measured.
        numbers: of images that fit the probes, stop their training and test them.
        errors: by cut, numbers of the test images, as the json holds them: `mse`, `l2`, `explained` and others split
            into outlier, normal and all patches; `matched` by property; `position` with top-1 and distance in cells.
        tables: by cut, squared errors of each test image as in `Split` (I,4), to compare models image by image.
    """

    label: str
    feature: Feature
    probe: str  # of PROBES
    target: str  # of TARGETS
    outlier_layer: int
    yardstick: Yardstick
    cuts: dict[str, float]
    probes: Probes
    held_back: list[int]
    numbers: dict[str, int]
    errors: dict[str, dict[str, Any]]
    tables: dict[str, np.ndarray]

    @property
    def drawn(self) -> list[str]:
        """The cuts that differ."""
        return [SHARED] if abs(self.cuts[SHARED] - self.cuts[SCALED]) < 1e-6 * self.cuts[SHARED] else [SHARED, SCALED]


def measure(
    model: VisionTransformer,
    images: ImageBatches,
    *,
    feature: str = "prenorm",
    probe: str = "linear",
    target: str = "raw",
    outlier_rule: Rule = DEFAULT_RULE,
    outlier_layer: int = -1,
    yardstick: Yardstick | None = None,
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
        outlier_rule: see `Rule`, on the norms of the images that train and validate, where there is no
        yardstick: cut of another model that this one is compared with (its result's `yardstick`).
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
        yardstick = yardstick or Yardstick.made_on(histogram, outlier_rule, label)
        cuts = yardstick.cuts(histogram)
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
        tested = {name: _test(vit, store, folds, probes, true, cut, grid) for name, cut in cuts.items()}
    return ReconstructionResult(
        label,
        tokens,
        probe,
        target,
        outlier_layer,
        yardstick,
        cuts,
        probes,
        held_back=folds.test,
        numbers=numbers,
        errors={name: errors for name, (errors, _) in tested.items()},
        tables={name: table for name, (_, table) in tested.items()},
    )


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
) -> tuple[dict[str, Any], np.ndarray]:
    """Errors of the test images, split and matched; and the table of squared errors, see `Split`."""
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
            "top1": (guess == torch.arange(guess.shape[1])).double(),
            "distance": cell_distance(guess, grid),
        }
        for name, value in values.items():
            splits.setdefault(name, Split()).add(value, outlier)
        for name, pairs in matched.items():
            pairs.add(values["mse"], outlier, values[name])
    return _summaries(splits, matched), splits["mse"].table


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


def summarise(result: ReconstructionResult, baseline: ReconstructionResult | None = None) -> dict[str, Any]:
    """The row of one model, for json: errors under both cuts, shares as fractions.

    Args:
        baseline: another model on the same images: the ratio of errors less its one comes too, paired by image.
    """
    of, less = result.yardstick, {}
    if baseline is not None and baseline is not result and baseline.held_back == result.held_back:
        for name, table in result.tables.items():
            tables = baseline.tables[name], table
            change = paired(*tables, outlier_ratio, [rows[:, 1] > 0 for rows in tables])
            less[name] = change.named("ratio_minus_baseline")
    return {
        "label": result.label,
        **result.numbers,
        "outlier_cut": {"rule": str(of.rule), "of": of.of, "cut": of.cut},
        **{
            name: {"cut": result.cuts[name], **errors, "mse": {**errors["mse"], **less.get(name, {})}}
            for name, errors in result.errors.items()
        },
    }


@dataclass(frozen=True)
class Reconstructions:
    """Reconstruct some images with the pixel probe of a result."""

    images: Tensor  # (B,3,H,W) as the model sees them
    decoded: Tensor  # (B,3,H,W) the same from tokens
    error: np.ndarray  # (B,gh,gw) root mean square over a patch
    norms: np.ndarray  # (B,gh,gw) by which outliers are told


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
            parts.append((batch.cpu(), fold_targets(y, patch, grid), error, lengths.cpu().unflatten(1, grid)))
    images, decoded, error, lengths = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Reconstructions(images, decoded, error.numpy(), lengths.numpy())


# Figures


@charts.styled
def draw(results: ReconstructionResult | Sequence[ReconstructionResult]) -> Figure:
    """Error of outlier, matched normal and all normal patches with 95 % intervals; position accuracy beside it."""
    results = as_list(results)
    series = [(result, name) for result in results for name in result.drawn]
    title = f"Patch reconstruction ({results[0].probe} probe, {results[0].target} pixels), images held back"
    figure, axes = charts.new_figure(1, 3, 3.7 + 0.7 * len(series), 3.6, title, width_ratios=(2.6, 1.1, 1.1))
    panels = (
        ("mse", "mean squared error of a patch"),
        ("top1", "position, top-1 (%)"),
        ("distance", "position, cells off"),
    )
    for ax, (name, title) in zip(axes[0], panels, strict=True):
        for index, (result, cut) in enumerate(series):
            _draw_bars(ax, _bars(result.errors[cut], name), index, len(series), _series_style(results, result, cut))
        ax.set_title(title, fontsize=9)
        ax.grid(False, axis="x")
        ax.set_ylim(0, None)
    chance = 100 / results[0].probes.positions.out_features  # type: ignore[operator]
    axes[0, 1].axhline(chance, color=charts.INK, lw=1, ls=":", label=f"chance {chance:.2f} %")
    axes[0, 1].legend(handles=axes[0, 1].lines[-1:], loc="upper left", fontsize=7)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3)
    contributing = "; ".join(
        f"{result.label}, {'scaled' if cut == SCALED else 'shared'} cut {result.cuts[cut]:.1f}: "
        f"{result.errors[cut]['mse']['outlier_patches']} outlier patches in {result.errors[cut]['mse']['outlier_n']} "
        f"of n = {result.numbers['n_test']} images"
        for result, cut in series
    )
    note = f"Whiskers: 95 % over images; nothing is drawn that fewer than {LEAST} images contribute to. "
    scaled = {result.label: result.cuts[SCALED] for result in results}
    charts.footer(figure, note + contributing, describe_cuts(results[0].yardstick, scaled))
    return figure


def _series_style(
    results: Sequence[ReconstructionResult], result: ReconstructionResult, cut: str
) -> tuple[str, str, bool]:
    """Colour, label, and whether it is hatched."""
    colour = charts.colour_of(results.index(result))
    return colour, f"{result.label}, {'scaled' if cut == SCALED else 'shared'} cut", cut == SCALED


Bar = tuple[str, float, Sequence[float] | None, int]  # name, height, 95 % interval, images


def _bars(errors: dict[str, Any], name: str) -> list[Bar]:
    row = errors["mse"] if name == "mse" else errors["position"][name]
    factor = 100.0 if name == "top1" else 1.0
    bars = [_bar(tokens, row, tokens, factor) for tokens in ("normal", "outlier")]
    if name == "mse":
        bars += [_bar(f"normal, same\n{key}", row, "matched_normal") for key, row in errors["matched"].items()]
    return bars


def _bar(title: str, row: dict[str, Any], name: str, factor: float = 1.0) -> Bar:
    span = row.get(f"{name}_ci95")
    return (
        title,
        factor * row.get(name, float("nan")),
        None if span is None else [factor * s for s in span],
        row.get(f"{name}_n", 0),
    )


def _draw_bars(ax: Axes, bars: Sequence[Bar], index: int, count: int, style: tuple[str, str, bool]) -> None:
    width = 0.8 / count
    colour, label, hatched = style
    x = np.arange(len(bars)) + (index - (count - 1) / 2) * width
    face = dict(facecolor="white", edgecolor=colour, hatch="///") if hatched else dict(facecolor=colour, alpha=0.85)
    ax.add_patch(Rectangle((0, 0), 0, 0, label=label, **face))  # type: ignore[arg-type]
    for position, (_, value, span, images) in zip(x, bars, strict=True):
        place = dict(textcoords="offset points", ha="center", fontsize=6.5)
        if images < LEAST or not np.isfinite(value):
            ax.annotate(f"n={images}", (position, 0), (0, 3), color=colour, rotation=90, **place)  # type: ignore[arg-type]
            continue
        ax.bar(position, value, width * 0.9, **face)  # type: ignore[arg-type]
        if span is not None:
            ax.plot([position, position], span, color=charts.INK, lw=1.4)
        ax.annotate(f"{value:.3g}", (position, value if span is None else span[1]), (0, 3), **place)  # type: ignore[arg-type]
    ax.set_xticks(range(len(bars)), [name for name, *_ in bars], fontsize=7)
    ax.margins(y=0.14)


def draw_images(
    results: ReconstructionResult | Sequence[ReconstructionResult],
    shown: Reconstructions | Sequence[Reconstructions],
    to_pictures: Callable[[Tensor], np.ndarray],
    captions: Sequence[str] | None = None,
) -> Figure:
    """Images, what each model's probe makes of their tokens, and the error on one scale; outliers are outlined.

    Args:
        shown: of each result, of the same images; `held_back` of a result says which ones no probe has seen.
        to_pictures: turns images (B,3,H,W) as the model sees them into pictures (B,H,W,3) in [0, 1].
        captions: names of the images.
    """
    results, shown = as_list(results), as_list(shown)
    limits = 0.0, charts.common_limits([of_model.error for of_model in shown], 0.98)[1]
    cells: list[list[charts.Cell]] = [[charts.image_cell(picture)] for picture in to_pictures(shown[0].images)]
    columns, bars = ["input"], []
    for result, of_model in zip(results, shown, strict=True):
        pictures = zip(cells, to_pictures(of_model.decoded), of_model.error, of_model.norms, strict=True)
        for row, made, error, lengths in pictures:
            marked, also = lengths > result.cuts[SHARED], lengths > result.cuts[SCALED]
            row += [charts.image_cell(made), charts.map_cell(error, limits, marked=marked, also=also)]
        name = result.label if len(results) > 1 else f"{result.probe} probe, {result.feature}"
        columns += [name, f"error {of_model.error.mean():.2f} (mean)"]
        at = len(columns) - 1
        bars.append(charts.Bar((at, at), limits, "RMS, normalised pixels", over=True))
    scaled = {result.label: result.cuts[SCALED] for result in results}
    note = "errors on one scale, which ends at the 98 % quantile; red: above the shared cut, orange: above the scaled "
    note += "one only. " + describe_cuts(results[0].yardstick, scaled)
    title = f"Reconstruction by a {results[0].probe} probe, images held back from it"
    return charts.picture_table(cells, columns, captions, title, note=note, bars=bars)


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
    out.about(sets[0].note)
    options = {name: getattr(args, name) for name in ("probe", "target", "outlier_layer", "epochs")}
    options |= {"outlier_rule": rule, "feature": args.feat, "report": log}
    results: list[ReconstructionResult] = []
    for m, images in zip(models, sets, strict=True):
        common = results[0].yardstick if results else None
        results.append(measure(m.model, images, **options, yardstick=common, seed=m.args.seed, label=m.label))
    rows = [summarise(result, results[0]) for result in results]
    head = {"probe": args.probe, "feat": args.feat, "target": args.target, "outlier_rule": str(rule), "models": rows}
    out.json("reconstruction", head)
    out.npz("reconstruction", {f"{i}/{k}": np.asarray(v) for i, row in enumerate(rows) for k, v in _flat(row).items()})
    out.figure("reconstruction_errors", draw(results))
    if args.show > 0:
        test = results[0].held_back
        chosen = [
            test[i] for i in np.unique(np.linspace(0, len(test) - 1, min(args.show, len(test))).round().astype(int))
        ]
        few = [images.only(chosen) for images in sets]
        shown = [reconstruct(m.model, images, r) for m, images, r in zip(models, few, results, strict=True)]
        out.figure("reconstruction_images", draw_images(results, shown, few[0].pictures, few[0].names()))
    for row in rows:
        log(_line(row))


def _flat(row: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Numbers and lists of a nested dictionary, by their path."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat.update(_flat(value, f"{path}{key}/") if isinstance(value, dict) else {path + key: value})
    return {key: value for key, value in flat.items() if isinstance(value, (int, float, list))}


def _line(row: dict[str, Any]) -> str:
    errors = row[SHARED]
    mse, top1 = errors["mse"], errors["position"]["top1"]
    line = f"{row['label']}: MSE normal {mse['normal']:.4f}"
    if mse["ratio_ci95"] is None:
        return f"{line}; outliers in {mse['outlier_n']} of {mse['images']} images, too few to compare"
    low, high = mse["ratio_ci95"]
    return (
        f"{line}, outlier {mse['outlier']:.4f}, ratio {mse['ratio']:.3f} [{low:.3f}, {high:.3f}] over {mse['ratio_n']} "
        f"images; explained {errors['explained']['outlier']:.2f} and {errors['explained']['normal']:.2f}; "
        f"position top-1 outlier {100 * top1['outlier']:.1f} %, normal {100 * top1['normal']:.1f} %"
    )
