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
from .outliers import DEFAULT_RULE, Histogram, Rule, bimodality, bin_edges, norms
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


def summarise(result: NormResult, rule: Rule = DEFAULT_RULE, baseline: NormResult | None = None) -> dict[str, Any]:
    """Numbers of one model: every stage's norms, its outliers under several cuts, and how bimodal the norms are.

    Args:
        rule: one more rule beside `RULES`.
        baseline: the model whose cut under `rule` is applied to this one too, as it is ("shared") and scaled by the
            ratio of the medians ("shared_scaled"); None: the model itself.
    """
    histogram, other = result.judged, (baseline or result).judged
    shared = rule.cut(other)
    cuts = {str(rule): rule.cut(histogram) for rule in (*RULES, rule)}
    cuts["shared"], cuts["shared_scaled"] = shared, shared * histogram.quantile(0.5) / other.quantile(0.5)
    stages = {
        name: {"patches": patches.summary(), **{token: lengths.summary() for token, lengths in prefix.items()}}
        for name, patches, prefix in zip(result.stages, result.patches, result.prefix, strict=True)
    }
    return {
        "label": result.label,
        "n_images": result.images,
        "outliers": {name: {"cut": cut, **outlier_shares(result, cut)} for name, cut in cuts.items()},
        "bimodality": bimodality(histogram),
        "stages": stages,
    }


def outlier_shares(result: NormResult, cut: float) -> dict[str, float]:
    """Measure how much lies above a cut after the chosen block.

    Returns:
        share: of the patches, which is exact; a merged token counts once per patch.
        token_share: of the tokens, the same where nothing merged; the cut is moved to the nearest edge of a bin.
        per_image: patches above the cut in an image, the mean.
        images_without: share of images without any.
    """
    per_image = np.array([(lengths > cut).sum() for lengths in result.at_layer])
    return {
        "share": float(per_image.mean() / result.at_layer.shape[1]),
        "token_share": float(result.judged.share_above(cut)),
        "per_image": float(per_image.mean()),
        "images_without": float((per_image == 0).mean()),
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
    figure, axes = charts.new_figure(1, len(results), 5.4, 4.0, "Token norms over the layers", sharey=True)
    edges = bin_edges(DENSITY_BINS)
    counts = [np.stack([lengths.rebinned(DENSITY_BINS) for lengths in result.patches[:-1]]) for result in results]
    filled = np.nonzero(np.sum([count.sum(axis=0) for count in counts], axis=0))[0]
    # without the input: fresh registers enter so short that the scale would be theirs alone
    prefix_means = [lengths.mean for result in results for stage in result.prefix[1:-1] for lengths in stage.values()]
    low, high = edges[filled[0]], edges[filled[-1] + 1]
    limits = min([low, *prefix_means]) * 0.85, max([high, *prefix_means]) * 1.15
    for ax, result, count in zip(axes[0], results, counts, strict=True):
        mesh = charts.density(ax, count / result.images, edges)
        x = np.arange(len(count))
        medians = [lengths.quantile(0.5) for lengths in result.patches[:-1]]
        ax.plot(x, medians, color="white", lw=3)
        ax.plot(x, medians, color=charts.INK, label="patches, median")
        _draw_prefix(ax, result)
        ax.set_title(f"{result.label}  ({result.images} images)")
        ax.set_ylim(*limits)
        ticks = x[:: max(1, len(x) // 13)]
        ax.set_xticks(ticks, [result.stages[i] for i in ticks])
        ax.set_xlabel("output of block (before the final norm)")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)
    axes[0, 0].set_ylabel("L2 norm")
    charts.colour_bar(figure, mesh, axes[0].tolist(), "patch tokens per image")
    return figure


def _draw_prefix(ax: Axes, result: NormResult) -> None:
    """Draw a line per prefix token; registers share one colour and one label."""
    labelled = set()
    for token_type in result.token_types:
        name = "registers" if token_type.startswith("register") else token_type
        y = [stage[token_type].mean if token_type in stage else np.nan for stage in result.prefix[:-1]]
        label = None if name in labelled else name + (", mean" if name != "registers" else ", mean of each")
        labelled.add(name)
        ax.plot(np.arange(len(y)), y, color=charts.token_colour(token_type), label=label, marker="o", ms=3)


@charts.styled
def draw_histogram(results: NormResult | Sequence[NormResult], rule: Rule = DEFAULT_RULE) -> Figure:
    """Draw patch norms of the chosen layer, all models on the same bins, with the first model's cut and their own."""
    results = as_list(results)
    figure, axes = charts.new_figure(1, 1, 7.0, 3.8)
    ax, shared = axes[0, 0], rule.cut(results[0].judged)
    low = min(float(result.at_layer.min()) for result in results)
    high = max(float(result.at_layer.max()) for result in results)
    edges = np.linspace(low, high * 1.0001 + 1e-9, 101)
    for index, result in enumerate(results):
        colour = charts.colour_of(index)
        share = np.histogram(result.at_layer, edges)[0] / result.at_layer.size
        above = 100 * outlier_shares(result, shared)["share"]
        ax.stairs(share, edges, color=colour, lw=1.6, label=f"{result.label}: {above:.2f} % above the shared cut")
        ax.stairs(share, edges, color=colour, alpha=0.12, fill=True)
    ax.set_yscale("log")
    ax.axvline(shared, color=charts.INK, lw=1.4, label=f"shared cut {shared:.1f} (of {results[0].label})")
    for own_rule, style in ((Rule("sigma", 3), "--"), (Rule("ratio", 3), ":")):
        for index, result in enumerate(results):
            ax.axvline(own_rule.cut(result.judged), color=charts.colour_of(index), lw=1, ls=style)
        ax.plot([], [], color=charts.FAINT, lw=1, ls=style, label=f"own cut {own_rule}")
    ax.set_xlim(low, max(high, shared) * 1.02)
    ax.set_title(f"Norms of patch tokens after block {results[0].layer}")
    ax.set_xlabel("L2 norm")
    ax.set_ylabel("share of patches")
    ax.legend(loc="upper right")
    return figure


@charts.styled
def draw_token_types(results: NormResult | Sequence[NormResult]) -> Figure:
    """Draw the spread of every type of token at the chosen layer: box = quartiles, whiskers = 1 % and 99 %."""
    results = as_list(results)
    names = [*dict.fromkeys(token_type for result in results for token_type in result.token_types), "patches"]
    figure, axes = charts.new_figure(1, 1, max(4.0, 1.2 + 0.75 * len(names)), 3.4)
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
        ax.plot([], [], color=colour, lw=5, alpha=0.5, label=result.label)
    ax.set_xticks(range(len(names)), names)
    charts.plain_log(ax)
    ax.set_ylabel("L2 norm")
    ax.set_title(f"Norms after block {results[0].layer}, by kind of token")
    ax.set_xlabel("box: quartiles, whiskers: 1 % to 99 %", fontsize=7.5, color=charts.FAINT)
    ax.legend(loc="best")
    return figure


def _box(histogram: Histogram) -> dict[str, float]:
    names = {"whislo": 0.01, "q1": 0.25, "med": 0.5, "q3": 0.75, "whishi": 0.99}
    return {name: histogram.quantile(q) for name, q in names.items()}


@charts.styled
def draw_positions(results: NormResult | Sequence[NormResult], rule: Rule = DEFAULT_RULE) -> Figure:
    """Draw where outliers sit: share of images with an outlier at each patch, under the first model's cut."""
    results = as_list(results)
    maps = [outlier_frequency(result, rule.cut(results[0].judged)) for result in results]
    figure, axes = charts.new_figure(1, len(maps), 3.4, 3.1, "Where outliers sit (shared cut)")
    top = max(float(np.max(frequency)) for frequency in maps) * 100 or 1.0
    for ax, frequency, result in zip(axes[0], maps, results, strict=True):
        drawn = charts.show_map(ax, frequency * 100, result.label, (0, top), "magma")
    charts.colour_bar(figure, drawn, axes[0].tolist(), "% of images")
    return figure


def draw_images(
    results: NormResult | Sequence[NormResult],
    pictures: np.ndarray,
    maps: np.ndarray | Sequence[np.ndarray],
    rule: Rule = DEFAULT_RULE,
) -> Figure:
    """Draw some images and their norm maps, one scale per model; outliers under the first model's cut are outlined.

    Args:
        pictures: (K,H,W,3) the images in [0, 1].
        maps: (K,gh,gw) of `norm_maps`, for each result.
    """
    results = as_list(results)
    maps = [maps] if isinstance(maps, np.ndarray) else maps
    cut = rule.cut(results[0].judged)
    cells = [[charts.image_cell(picture)] for picture in pictures]
    for result, of_model in zip(results, maps, strict=True):
        median = result.judged.quantile(0.5)
        limits = (result.judged.quantile(0.001), max(result.judged.quantile(0.995), median * 1.2))
        for row, values in zip(cells, of_model, strict=True):
            row.append(charts.map_cell(values, limits, values > cut))
    note = f"norm of patch tokens after block {results[0].layer}; red: above the shared cut"
    return charts.picture_table(cells, ["input", *(result.label for result in results)], note=note)


# Command


def add_parser(subparsers: Any) -> None:
    """Add the command `norms`."""
    from .command import add_command

    text = "norms of class, register and patch tokens per layer; outliers under several rules"
    parser = add_command(subparsers, "norms", run, text)
    parser.add_argument("--outlier_rule", type=Rule.parse, default=DEFAULT_RULE, metavar="RULE")
    parser.add_argument("--layer", type=int, default=-1, metavar="BLOCK", help="whose output (default: the last)")
    parser.add_argument("--show", type=int, default=5, metavar="K", help="images drawn")


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    """Measure all models and write norms.json, an npz and an npy per model, and the figures."""
    from .command import Images, Output, load_models

    models = load_models(args, main_argv)
    for loaded in models:
        check_layer(loaded.model, args.layer, "--layer", loaded.label)
    out = Output(args, main_argv, models)
    results = []
    for loaded in models:
        images = Images(args, loaded, title=f"norms of {loaded.label}")
        store = out.memmap(f"norms_{loaded.slug}", (len(images), loaded.model.patch_embed.num_patches))
        results.append(measure(loaded.model, images, layer=args.layer, label=loaded.label, store=store))
    rows = [summarise(result, args.outlier_rule, results[0]) for result in results]
    out.json("norms", {"layer": args.layer, "outlier_rule": str(args.outlier_rule), "models": rows})
    cut = args.outlier_rule.cut(results[0].judged)
    for loaded, result in zip(models, results, strict=True):
        out.npz(f"norms_{loaded.slug}", arrays(result, cut))
    out.png("norms_layers", draw(results))
    out.png("norms_histogram", draw_histogram(results, args.outlier_rule))
    out.png("norms_kinds", draw_token_types(results))
    out.png("norms_positions", draw_positions(results, args.outlier_rule))
    if args.show > 0:
        shown = [Images(args, loaded, title=f"pictures of {loaded.label}", limit=args.show).load() for loaded in models]
        maps = [
            norm_maps(loaded.model, images, layer=args.layer) for loaded, (images, _) in zip(models, shown, strict=True)
        ]
        out.png("norms_images", draw_images(results, shown[0][1], maps, args.outlier_rule))


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
