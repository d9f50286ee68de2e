"""Norms: lengths of class, register and patch tokens over the layers, and which patches are outliers.

    result = norms.measure(model, images)
    norms.draw(result).savefig("layers.png")
    norms.summarise(result)["outliers"]["sigma:3"]["share"]

Command: run/analyze.py norms. Shapes: n patches at the input, (gh,gw) the patch grid, K images that are drawn.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer

from models import UserError

from . import charts
from .inputs import ImageBatches, as_list, batches, evaluation
from .intervals import difference, mean, text
from .outliers import (
    BIMODALITY_REFERENCES,
    DEFAULT_RULE,
    SCALED,
    SHARED,
    Histogram,
    Rule,
    Yardstick,
    add_outlier_rule,
    bimodality,
    bin_edges,
    describe_cuts,
    norms,
)
from .walk import Layer, check_layer, final, layer_at, to_grid, walk

RULES = (Rule("quantile", 0.98), Rule("quantile", 0.995), Rule("sigma", 3), Rule("ratio", 3))
DENSITY_BINS = 1024


@dataclass
class NormResult:
    """Norms of a model's tokens over a set of images.

    Stage 0 is the input of the first block, stage i the output of block i - 1, the last stage the tokens after the
    final norm.

    Attributes:
        label: the model's name in figures.
        layer: block whose output outliers are judged by.
        grid: (gh,gw).
        token_types: names of the prefix tokens.
        patches: per stage, the norms of all patch tokens, every token once.
        prefix: per stage, the norms of each prefix token that is present there, by its name.
        at_layer: (images,n) norms after block `layer`, per patch of the input: a merged token counts once per patch.
    """

    label: str
    layer: int
    grid: tuple[int, int]
    token_types: tuple[str, ...]
    patches: list[Histogram]
    prefix: list[dict[str, Histogram]]
    at_layer: np.ndarray

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.at_layer)

    @property
    def stages(self) -> list[str]:
        """Names of the stages."""
        return ["input", *(str(index) for index in range(len(self.patches) - 2)), "final norm"]

    @property
    def stage(self) -> int:
        """The stage after block `layer`."""
        return self.layer + 1

    @property
    def judged(self) -> Histogram:
        """Norms of patch tokens after block `layer`."""
        return self.patches[self.stage]


@torch.no_grad()
def measure(
    model: VisionTransformer,
    images: ImageBatches,
    *,
    layer: int = -1,
    label: str = "model",
    store: np.ndarray | None = None,
) -> NormResult:
    """Measure the norms of all tokens of all layers, in one pass over the images.

    Args:
        model: a `MergingViT`, or a timm ViT that it can be made of.
        images: (B,3,H,W) as the model sees them, or batches of them, all of one size.
        layer: block after which outliers are judged; -1 is the last.
        store: array (at least as many rows as images, n) that takes the norms of single patches, for instance a memmap:
            all else is histograms, so that memory then does not grow with the number of images.

    Raises:
        UserError: there is no image or no such layer, or tokens are not finite.
    """
    with evaluation(model) as model:
        layer, depth = check_layer(model, layer, label=label), len(model.blocks)
        prefix: list[dict[str, Histogram]] = [{} for _ in range(depth + 2)]
        result = NormResult(
            label, layer, (0, 0), model.token_types(), [Histogram() for _ in range(depth + 2)], prefix, np.empty(0)
        )
        parts: list[np.ndarray] = []
        done = 0
        for batch in batches(images, model):
            at_layer = _measure_batch(result, model, batch)
            if store is None:
                parts.append(at_layer)
            else:
                store[done : done + len(batch)] = at_layer
            done += len(batch)
    if not done:
        raise UserError("none of the images can be read")
    result.at_layer = np.concatenate(parts) if store is None else store[:done]
    return result


def _measure_batch(result: NormResult, model: Any, images: torch.Tensor) -> np.ndarray:
    """Count the norms of a batch in all stages; return those of the patches (B,n) after the chosen block."""
    for layer in walk(model, images):
        if layer.index == 0:
            _count(result, 0, norms(layer.before.x), layer)
        lengths = norms(layer.after.x)
        _count(result, layer.index + 1, lengths, layer)
        if layer.index == result.layer:
            at_layer = to_grid(lengths[:, layer.num_prefix_tokens :], layer.after.group, layer.grid)
    _count(result, len(result.patches) - 1, norms(final(model, layer)), layer)
    result.grid = layer.grid
    return at_layer.flatten(1).cpu().numpy()


def _count(result: NormResult, stage: int, lengths: torch.Tensor, layer: Layer) -> None:
    if not lengths.isfinite().all():
        raise UserError(f"{result.label}: tokens of stage {result.stages[stage]} are not finite; check its weights")
    result.patches[stage].add(lengths[:, layer.num_prefix_tokens :])
    for index, token_type in enumerate(layer.token_types):
        result.prefix[stage].setdefault(token_type, Histogram()).add(lengths[:, index])


@torch.no_grad()
def norm_maps(model: VisionTransformer, images: ImageBatches, *, layer: int = -1) -> np.ndarray:
    """Norms of the patch tokens after a block, for a few images (K,3,H,W): (K,gh,gw)."""
    maps = []
    with evaluation(model) as model:
        for batch in batches(images, model):
            chosen = layer_at(model, batch, layer)
            lengths = norms(chosen.after.x)[:, chosen.num_prefix_tokens :]
            maps.append(to_grid(lengths, chosen.after.group, chosen.grid).cpu().numpy())
    return np.concatenate(maps)


def yardstick(result: NormResult, rule: Rule = DEFAULT_RULE) -> Yardstick:
    """The cut of a rule on this model, by which others are judged too."""
    return Yardstick.made_on(result.judged, rule, result.label)


def summarise(result: NormResult, rule: Rule = DEFAULT_RULE, baseline: NormResult | None = None) -> dict[str, Any]:
    """Numbers of one model: every stage's norms, its outliers under several cuts, and how bimodal the norms are.

    Args:
        rule: one more rule beside `RULES`.
        baseline: the model whose cut under `rule` is applied to this one too, as it is ("shared") and scaled by the
            ratio of the medians ("shared_scaled"), with the difference to it, paired by image; None: the model itself.
    """
    histogram, common = result.judged, yardstick(baseline or result, rule)
    cuts = {str(rule): rule.cut(histogram) for rule in dict.fromkeys((*RULES, rule))} | common.cuts(histogram)
    stages = {
        name: {"patches": patches.summary(), **{token: lengths.summary() for token, lengths in prefix.items()}}
        for name, patches, prefix in zip(result.stages, result.patches, result.prefix, strict=True)
    }
    outliers = {name: {"cut": cut, **outlier_shares(result, cut)} for name, cut in cuts.items()}
    if baseline is not None and baseline is not result:
        for name in (SHARED, SCALED):
            change = difference(_share_per_image(baseline, common.cut), _share_per_image(result, cuts[name]))
            outliers[name] |= change.named("share_minus_baseline")
    return {
        "label": result.label,
        "n_images": result.images,
        "outlier_cut": {"rule": str(rule), "of": common.of, "cut": common.cut},
        "outliers": outliers,
        "bimodality": {**bimodality(histogram), "references": BIMODALITY_REFERENCES},
        "stages": stages,
    }


def _share_per_image(result: NormResult, cut: float) -> np.ndarray:
    """Share of each image's patches above a cut: (images,)."""
    return np.array([(lengths > cut).mean() for lengths in result.at_layer])


def outlier_shares(result: NormResult, cut: float) -> dict[str, Any]:
    """Measure how much lies above a cut after the chosen block; all shares are fractions.

    Returns:
        share: of the patches, which is exact, with its interval over images; a merged token counts once per patch.
        token_share: of the tokens, the same where nothing merged; the cut is moved to the nearest edge of a bin.
        per_image: patches above the cut in an image, the mean.
        images_with: how many images have any.
        images_without: share of images without any.
    """
    shares = _share_per_image(result, cut)
    return {
        **mean(shares).named("share"),
        "token_share": float(result.judged.share_above(cut)),
        "per_image": float(shares.mean() * result.at_layer.shape[1]),
        "images_with": int((shares > 0).sum()),
        "images_without": float((shares == 0).mean()),
    }


def outlier_frequency(result: NormResult, cut: float) -> np.ndarray:
    """Share of images whose token at a patch is above the cut: (gh,gw)."""
    total = np.zeros(result.at_layer.shape[1])
    for lengths in result.at_layer:
        total += lengths > cut
    return (total / result.images).reshape(result.grid)


# Figures


@charts.styled
def draw(results: NormResult | Sequence[NormResult]) -> Figure:
    """Draw patch norms of every layer as a density, and the prefix tokens as lines; a panel per model."""
    results = as_list(results)
    figure, axes = charts.new_figure(1, len(results), 5.4, 4.2, "Token norms over the layers", sharey=True)
    edges = bin_edges(DENSITY_BINS)
    counts = [np.stack([lengths.rebinned(DENSITY_BINS) for lengths in result.patches]) for result in results]
    filled = np.nonzero(np.sum([count.sum(axis=0) for count in counts], axis=0))[0]
    # without the input: fresh registers enter so short that the scale would be theirs alone
    prefix_means = [lengths.mean for result in results for stage in result.prefix[1:] for lengths in stage.values()]
    low, high = edges[filled[0]], edges[filled[-1] + 1]
    limits = min([low, *prefix_means]) * 0.85, max([high, *prefix_means]) * 1.15
    densities = [count / result.images for count, result in zip(counts, results, strict=True)]
    top = max(float(values.max()) for values in densities)
    for ax, result, values in zip(axes[0], results, densities, strict=True):
        mesh = charts.density(ax, values, edges, limits=(min(1 / result.images for result in results), top))
        x = np.arange(len(values))
        medians = [lengths.quantile(0.5) for lengths in result.patches]
        for part in (slice(0, -1), slice(-1, None)):  # the final norm is another scale, so no line leads to it
            ax.plot(x[part], medians[part], color="white", lw=3, marker="o", ms=4)
            label = "patches, median" if part.start == 0 else None
            ax.plot(x[part], medians[part], color=charts.INK, label=label, marker="o", ms=2)
        _draw_prefix(ax, result)
        ax.axvline(len(x) - 1.5, color=charts.FAINT, lw=0.8)
        ax.set_title(f"{result.label}  (n = {result.images} images)")
        ax.set_ylim(*limits)
        ticks = [*x[: -1 : max(1, len(x) // 13)], len(x) - 1]
        ax.set_xticks(ticks, [result.stages[i] for i in ticks[:-1]] + ["final\nnorm"])
        ax.set_xlabel("output of block")
    axes[0, 0].set_ylabel("L2 norm (log axis)")
    charts.colour_bar(figure, mesh, axes[0].tolist(), "patch tokens per image and bin")
    most = max(axes[0], key=lambda ax: len(ax.lines))
    most.legend(loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=4)
    charts.footer(figure, "Class and registers (means over images) from the output of block 0 on.")
    return figure


REGISTER_STYLES = ("-", "--", "-.", ":")


def _draw_prefix(ax: Axes, result: NormResult) -> None:
    """Draw a line per prefix token, without the input; registers share a colour and differ by line and number."""
    registers = [name for name in result.token_types if name.startswith("register")]
    for token_type in result.token_types:
        y = np.array([stage[token_type].mean if token_type in stage else np.nan for stage in result.prefix])
        index = registers.index(token_type) if token_type in registers else 0
        x, colour, style = np.arange(len(y)), charts.token_colour(token_type), REGISTER_STYLES[index % 4]
        label = token_type if token_type not in registers or len(registers) <= 4 or index == 0 else None
        label = "registers" if token_type in registers and len(registers) > 4 and label else label
        ax.plot(x[1:-1], y[1:-1], color=colour, label=label, marker="o", ms=2.5, ls=style)
        ax.plot(x[-1:], y[-1:], color=colour, marker="o", ms=3)
        if token_type in registers:
            ax.annotate(str(index + 1), (x[-2], y[-2]), (4, -3), textcoords="offset points", fontsize=7, color=colour)


def scaled_cuts(results: Sequence[NormResult], common: Yardstick) -> dict[str, float]:
    """The cut scaled by the medians, by the model's label."""
    return {result.label: common.cuts(result.judged)[SCALED] for result in results}


@charts.styled
def draw_histogram(results: NormResult | Sequence[NormResult], rule: Rule = DEFAULT_RULE) -> Figure:
    """Draw patch norms of the chosen layer, all models on the same bins, with the shared, scaled and own cuts."""
    results = as_list(results)
    common = yardstick(results[0], rule)
    cuts = scaled_cuts(results, common)
    lines = [_above(result, common, cuts[result.label]) for result in results]
    figure, axes = charts.new_figure(1, 1, max(7.0, 0.5 + 0.062 * max(map(len, lines))), 3.9)
    ax = axes[0, 0]
    high = max(float(result.at_layer.max()) for result in results)
    high = max([high, common.cut, *cuts.values()])
    edges = np.linspace(0, high * 1.0001 + 1e-9, 121)
    for index, result in enumerate(results):
        colour = charts.colour_of(index)
        share = np.histogram(result.at_layer, edges)[0] / result.at_layer.size
        ax.stairs(share, edges, color=colour, lw=1.6, label=lines[index])
        ax.stairs(share, edges, color=colour, alpha=0.12, fill=True)
        if index and abs(cuts[result.label] - common.cut) > 1e-6:
            text = f"shared cut scaled by the medians: {cuts[result.label]:.1f}"
            ax.axvline(cuts[result.label], color=colour, lw=1.2, ls="--", label=text)
    ax.set_yscale("log")
    ax.axvline(common.cut, color=charts.INK, lw=1.4, label=f"shared cut: {common}")
    beyond = []
    for own_rule, style in ((Rule("sigma", 3), "-."), (Rule("ratio", 3), ":")):
        inside = [(i, cut) for i, r in enumerate(results) if (cut := own_rule.cut(r.judged)) <= high * 1.02]
        for index, cut in inside:
            ax.axvline(cut, color=charts.colour_of(index), lw=1, ls=style)
        if inside:
            ax.plot([], [], color=charts.FAINT, lw=1, ls=style, label=f"each model's own {own_rule}")
        if len(inside) < len(results):
            beyond.append(f"{own_rule} (own) lies beyond the axis: no patch is above")
    ax.set_xlim(0, high * 1.02)
    ax.set_title(f"Norms of patch tokens after block {results[0].layer}")
    ax.set_xlabel("L2 norm")
    ax.set_ylabel("share of patches (log axis)")
    figure.legend(loc="outside upper left", ncols=1)
    charts.footer(figure, describe_cuts(common, cuts), *beyond, _heaps(results))
    return figure


def _heaps(results: Sequence[NormResult]) -> str:
    """Whether there are two heaps of norms, beside what distributions of one heap give."""
    found = {result.label: bimodality(result.judged) for result in results}
    parts = []
    for name, key in (("variance between two heaps (Otsu)", "otsu_between"), ("Sarle's coefficient", "sarle")):
        values = ", ".join(f"{row[key]:.2f} in {label}" for label, row in found.items())
        references = ", ".join(f"{name} {row[key]:.2f}" for name, row in BIMODALITY_REFERENCES.items())
        parts.append(f"{name} {values} ({references})")
    return "Two heaps? " + "; ".join(parts)


def _above(result: NormResult, common: Yardstick, scaled: float) -> str:
    """What lies above the shared cut and above the scaled one, with intervals over images."""
    at_shared = mean(_share_per_image(result, common.cut))
    line = f"{result.label} (n = {result.images}): {text(at_shared, 2, 100)} % of patches above the shared cut"
    if abs(scaled - common.cut) > 1e-6:
        line += f", {text(mean(_share_per_image(result, scaled)), 2, 100)} % above the scaled one"
    elif common.of == result.label and common.own_share is not None:
        line += " (by construction)"
    return line


@charts.styled
def draw_token_types(results: NormResult | Sequence[NormResult]) -> Figure:
    """Draw the spread of every type of token at the chosen layer: box = quartiles, whiskers = 1 % and 99 %."""
    results = as_list(results)
    names = [*dict.fromkeys(token_type for result in results for token_type in result.token_types), "patches"]
    figure, axes = charts.new_figure(1, 1, max(4.4, 1.2 + 0.75 * len(names)), 3.4)
    ax = axes[0, 0]
    width = 0.7 / len(results)
    for index, result in enumerate(results):
        histograms = {**result.prefix[result.stage], "patches": result.judged}
        shift = (index - (len(results) - 1) / 2) * width
        colour = charts.colour_of(index)
        line = dict(color=colour)
        ax.bxp(
            [_box(histograms[name]) for name in names if name in histograms],
            positions=[position + shift for position, name in enumerate(names) if name in histograms],
            widths=width * 0.8,
            showfliers=False,
            patch_artist=True,
            boxprops=dict(facecolor=colour, alpha=0.35, edgecolor=colour),
            medianprops=line,
            whiskerprops=line,
            capprops=line,
        )
        ax.plot([], [], color=colour, lw=5, alpha=0.5, label=f"{result.label} (n = {result.images} images)")
    ax.set_xticks(range(len(names)), names)
    ax.set_ylim(0, None)
    ax.set_ylabel("L2 norm")
    ax.set_title(f"Norms after block {results[0].layer}, by kind of token")
    figure.legend(loc="outside upper left")
    charts.footer(figure, "box: quartiles over tokens, whiskers: 1 % to 99 %")
    return figure


def _box(histogram: Histogram) -> dict[str, float]:
    names = {"whislo": 0.01, "q1": 0.25, "med": 0.5, "q3": 0.75, "whishi": 0.99}
    return {name: histogram.quantile(q) for name, q in names.items()}


@charts.styled
def draw_positions(results: NormResult | Sequence[NormResult], rule: Rule = DEFAULT_RULE) -> Figure:
    """Draw where outliers sit: share of images with an outlier at each patch, under the shared cut and the scaled."""
    results = as_list(results)
    common = yardstick(results[0], rule)
    panels = []
    for result in results:
        for name, cut in common.cuts(result.judged).items():
            if name == SHARED or abs(cut - common.cut) > 1e-6:
                with_any = outlier_shares(result, cut)["images_with"]
                title = f"{result.label}, {name.replace('_', ', ')} cut {cut:.1f}\n{with_any} of n = {result.images}"
                panels.append((f"{title} have any", outlier_frequency(result, cut)))
    figure, axes = charts.new_figure(1, len(panels), 3.4, 3.3, "Where outliers sit")
    top = max(float(np.max(frequency)) for _, frequency in panels) * 100 or 1.0
    for ax, (title, frequency) in zip(axes[0], panels, strict=True):
        drawn = charts.show_map(ax, frequency * 100, title, (0, top), "magma")
    charts.colour_bar(figure, drawn, axes[0].tolist(), "% of the images")
    charts.footer(figure, describe_cuts(common, scaled_cuts(results, common)))
    return figure


def draw_images(
    results: NormResult | Sequence[NormResult],
    pictures: np.ndarray,
    maps: np.ndarray | Sequence[np.ndarray],
    rule: Rule = DEFAULT_RULE,
    captions: Sequence[str] | None = None,
) -> Figure:
    """Draw some images and their norm maps, all on one scale; patches above the shared or the scaled cut are outlined.

    Args:
        pictures: (K,H,W,3) the images in [0, 1].
        maps: (K,gh,gw) of `norm_maps`, for each result.
        captions: names of the images.
    """
    results = as_list(results)
    maps = [maps] if isinstance(maps, np.ndarray) else maps
    common = yardstick(results[0], rule)
    limits = charts.common_limits(maps)
    cells = [[charts.image_cell(picture)] for picture in pictures]
    for result, of_model in zip(results, maps, strict=True):
        scaled = common.cuts(result.judged)[SCALED]
        for row, values in zip(cells, of_model, strict=True):
            row.append(charts.map_cell(values, limits, values > common.cut, also=values > scaled))
    note = "red: above the shared cut; orange: above the cut scaled by the medians only. "
    bar = charts.Bar((1, len(results)), limits, f"norm after block {results[0].layer}, one scale for all")
    return charts.picture_table(
        cells,
        ["input", *(result.label for result in results)],
        captions,
        "Norms of patch tokens",
        note=note + describe_cuts(common, scaled_cuts(results, common)),
        bars=[bar],
    )


# Command


def add_parser(subparsers: Any) -> None:
    """Add the command `norms`."""
    from .command import add_command

    text = "norms of class, register and patch tokens per layer; outliers under several rules"
    parser = add_command(subparsers, "norms", run, text)
    add_outlier_rule(parser)
    parser.add_argument("--layer", type=int, default=-1, metavar="BLOCK", help="whose output (default: the last)")
    parser.add_argument("--show", type=int, default=5, metavar="K", help="images drawn (default: 5)")


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    """Measure all models and write norms.json, an npz and an npy per model, and the figures."""
    from .command import Images, Output, load_models

    models, rule = load_models(args, main_argv), Rule.parse(args.outlier_rule)
    for loaded in models:
        check_layer(loaded.model, args.layer, "--layer", loaded.label)
    out = Output(args, main_argv, models)
    results = []
    for loaded in models:
        images = Images(args, loaded, title=f"norms of {loaded.label}")
        out.about(images.note)
        store = out.memmap(f"norms_{loaded.slug}", (len(images), loaded.model.patch_embed.num_patches))
        results.append(measure(loaded.model, images, layer=args.layer, label=loaded.label, store=store))
        out.wrote(f"norms_{loaded.slug}.npy")
    rows = [summarise(result, rule, results[0]) for result in results]
    for loaded, row in zip(models, rows, strict=True):
        row["npy"] = f"norms_{loaded.slug}.npy holds the norm of every patch: (images, patches), NaN past the readable"
    out.json("norms", {"layer": args.layer, "outlier_rule": str(rule), "models": rows})
    cut = rule.cut(results[0].judged)
    for loaded, result in zip(models, results, strict=True):
        out.npz(f"norms_{loaded.slug}", arrays(result, cut))
    out.figure("norms_layers", draw(results))
    out.figure("norms_histogram", draw_histogram(results, rule))
    out.figure("norms_kinds", draw_token_types(results))
    out.figure("norms_positions", draw_positions(results, rule))
    if args.show > 0:
        sets = [Images(args, loaded, title=f"pictures of {loaded.label}", limit=args.show) for loaded in models]
        shown = [images.load() for images in sets]
        maps = [
            norm_maps(loaded.model, images, layer=args.layer) for loaded, (images, _) in zip(models, shown, strict=True)
        ]
        out.figure("norms_images", draw_images(results, shown[0][1], maps, rule, sets[0].names()))


def arrays(result: NormResult, cut: float) -> dict[str, np.ndarray]:
    """Arrays of the npz: histograms of the patches, means of the prefix tokens per stage, and where outliers sit."""
    means = {
        f"mean_{name.replace(' ', '_')}": np.array(
            [stage[name].mean if name in stage else np.nan for stage in result.prefix]
        )
        for name in result.token_types
    }
    return {
        "patch_counts": np.stack([lengths.rebinned(DENSITY_BINS) for lengths in result.patches]),
        "bin_edges": bin_edges(DENSITY_BINS),
        "stages": np.array(result.stages),
        "chosen_stage": np.array(result.stage),
        **means,
        "outlier_frequency": outlier_frequency(result, cut),
    }
