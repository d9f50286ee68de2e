"""Test-time registers (arXiv 2506.08010): find register neurons, move them to an extra token, measure the effect.

    found = test_time_registers.find(model, images)
    result = test_time_registers.measure(model, images, found.ranking.neurons, found.cut)
    test_time_registers.draw(result)

The mathematics of finding and moving is in `register_neurons`. Nothing merges here.

Shapes: B images, n patches on a grid (gh,gw), L blocks.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.errors import UserError
from models.vit import MergingViT

from . import charts
from .inputs import ImageBatches, batches, evaluation, labelled_batches
from .intervals import difference, mean
from .outliers import BIMODALITY_REFERENCES, Rule, add_outlier_rule, bimodality, norms
from .register_neurons import (
    Neuron,
    NormTable,
    Ranking,
    find_neurons,
    norm_table,
    random_neurons,
    shift_neurons,
)
from .walk import attention, check_layer, per_patch, to_grid, walk

if TYPE_CHECKING:
    from .command import Loaded

MOST_IMAGES = 1000  # the paper's number, unless --limit says otherwise
RULE = Rule("sigma", 3)
SURE = 0.95  # share of draws that an automatic choice needs
RANKINGS = ("ratio", "activation")
STEPS = ("find", "apply", "eval")

# Finding the neurons


@dataclass(frozen=True)
class FoundNeurons:
    """The register neurons of one model.

    Attributes:
        cut: the norm above which a patch is an outlier.
        top_layer: the last block that was searched.
        top_layer_how: "given", or what the automatic rule went by.
        votes: share of bootstrap draws over images that choose each block as `top_layer`; empty if it was given.
    """

    label: str
    table: NormTable
    ranking: Ranking
    rule: Rule
    cut: float
    detection_layer: int
    top_layer: int
    top_layer_how: str
    ranked_by: str = "ratio"
    votes: dict[int, float] = field(default_factory=dict)

    @property
    def doubt(self) -> str:
        """Why the choice of `top_layer` may be wrong; empty if nothing speaks against it."""
        if not self.votes:
            return ""
        sure = self.votes.get(self.top_layer, 0.0)
        shares = ", ".join(f"block {layer} {100 * share:.0f} %" for layer, share in list(self.votes.items())[:3])
        fell_back = (
            "no block doubles the largest norm, so the largest jump decided; " if "none" in self.top_layer_how else ""
        )
        unsure = f"resampling the images chooses {shares}" if sure < SURE else ""
        return (fell_back + unsure).rstrip("; ")


def find(
    model: VisionTransformer,
    images: ImageBatches,
    *,
    outlier_rule: Rule = RULE,
    detection_layer: int = -1,
    top_layer: int | None = None,
    top_k: int = 10,
    sparse: bool = False,
    rank_by: str = "ratio",
    label: str = "model",
) -> FoundNeurons:
    """Rank the hidden units that are active at outlier patches. Two passes over the images.

    Args:
        images: see `inputs.ImageBatches`; they are iterated twice.
        outlier_rule: on the patch norms after block `detection_layer`.
        top_layer: the last block searched; None: where norms grow, see `NormTable.top_layer`.
        top_k: neurons that are kept.
        sparse: keep only units that are silent at half of the patches or more.
        rank_by: "ratio" or "activation", see `register_neurons.find_neurons`.

    Raises:
        UserError: no image has an outlier, or a layer does not exist.
    """
    with evaluation(model) as vit:
        table = norm_table(vit, batches(images, vit), detection_layer)
        cut = outlier_rule.cut(table.histogram)
        searched = table.top_layer() if top_layer is None else check_layer(vit, top_layer, "top_layer")
        ranking = find_neurons(vit, batches(images, vit), table.detection > cut, searched, top_k, sparse, rank_by)
    votes = table.top_layer_votes() if top_layer is None else {}
    doubles = max(table.jumps(), default=0.0) > 2
    how = "given" if top_layer is not None else "doubles" if doubles else "largest jump; none doubles"
    return FoundNeurons(label, table, ranking, outlier_rule, cut, detection_layer, searched, how, rank_by, votes)


def summarise_neurons(found: FoundNeurons) -> dict[str, Any]:
    """The content of neurons.json."""
    ranking = found.ranking
    return {
        "neurons": {str(block): units for block, units in ranking.by_block().items()},
        "ranked": [list(neuron) for neuron in ranking.neurons],
        "scores": list(ranking.scores),
        "scores_elsewhere": list(ranking.elsewhere),
        "outlier_rule": str(found.rule),
        "cut": found.cut,
        "detection_layer": found.detection_layer,
        "top_layer": found.top_layer,
        "top_layer_how": found.top_layer_how,
        "top_layer_votes": {str(layer): share for layer, share in found.votes.items()},
        "top_layer_doubt": found.doubt,
        "jumps": found.table.jumps(),
        "ranked_by": found.ranked_by,
        "ratios": list(ranking.ratios),
        "max_norm_by_block": found.table.largest.mean(0).tolist(),
        "n_images": ranking.images,
        "n_images_with_outliers": ranking.images_with_outliers,
        "outlier_share": ranking.outliers / found.table.detection.numel(),
        "bimodality": {**bimodality(found.table.histogram), "references": BIMODALITY_REFERENCES},
    }


# What moving them does to single images


@dataclass(frozen=True)
class TokenMaps:
    """Maps of B images before and after the neurons were moved."""

    norm_before: np.ndarray  # (B,gh,gw) at the detection layer
    class_before: np.ndarray  # (B,gh,gw) attention of the class token in the last block
    token_before: np.ndarray  # (B,) norm of the last prefix token at the detection layer
    norm_after: np.ndarray
    class_after: np.ndarray
    token_after: np.ndarray


def compare(
    model: VisionTransformer, images: ImageBatches, neurons: Sequence[Neuron], *, detection_layer: int = -1
) -> TokenMaps:
    """Map norms and class attention of images (see `inputs.ImageBatches`), with the neurons in place and moved."""
    parts = []
    with evaluation(model) as vit:
        shifted = shift_neurons(vit, neurons)
        for batch in batches(images, vit):
            parts.append((*_maps(vit, batch, detection_layer), *_maps(shifted, batch, detection_layer)))
    return TokenMaps(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@torch.no_grad()
def _maps(model: MergingViT, images: Tensor, detection_layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Norms (B,gh,gw), class attention (B,gh,gw) and norm (B,) of the last prefix token, as in `TokenMaps`."""
    detection_layer = check_layer(model, detection_layer, "detection_layer")
    for layer in walk(model, images, r=0):
        if layer.index == detection_layer:
            lengths = norms(layer.after.x)
            norm = to_grid(lengths[:, layer.num_prefix_tokens :], layer.after.group, layer.grid)
            token = lengths[:, layer.num_prefix_tokens - 1]
    class_attention = per_patch(attention(layer)[:, :, 0].mean(dim=1), layer)
    return norm.cpu().numpy(), class_attention.cpu().numpy(), token.cpu().numpy()


# What moving them does to a data set


@dataclass
class VariantResult:
    """Per-image facts of one model; `summary` turns them into means."""

    correct: list[Tensor] = field(default_factory=list)  # (B,)
    top: list[Tensor] = field(default_factory=list)  # (B,) predicted class
    largest: list[Tensor] = field(default_factory=list)  # (B,L) largest patch norm after every block
    norms: list[Tensor] = field(default_factory=list)  # (B,n) patch norms at the detection layer
    token: list[Tensor] = field(default_factory=list)  # (B,L) norm of the last prefix token
    class_peak: list[Tensor] = field(default_factory=list)  # (B,L) largest attention of the class token to a patch
    class_to_token: list[Tensor] = field(default_factory=list)  # (B,L) its attention to the last prefix token

    @torch.no_grad()
    def add(self, model: MergingViT, images: Tensor, targets: Tensor | None, detection_layer: int = -1) -> None:
        """Count a batch, without merging."""
        detection_layer, rows = check_layer(model, detection_layer, "detection_layer"), []
        for layer in walk(model, images, r=0):
            prefix = layer.num_prefix_tokens
            lengths = norms(layer.after.x).cpu()
            weights = attention(layer).mean(dim=1)[:, 0].float().cpu()  # of the first token: class
            rows.append(
                (
                    lengths[:, prefix:].amax(dim=1),
                    lengths[:, prefix - 1],
                    weights[:, prefix:].amax(dim=1),
                    weights[:, prefix - 1],
                )
            )
            if layer.index == detection_layer:
                self.norms.append(lengths[:, prefix:])
            last = layer
        by_block = (torch.stack(values, dim=1) for values in zip(*rows, strict=True))
        for store, values in zip(
            (self.largest, self.token, self.class_peak, self.class_to_token), by_block, strict=True
        ):
            store.append(values)
        tokens = model.norm(last.after.x)
        top = model.classify(tokens, last.after.size)[0].argmax(dim=1).cpu()
        self.top.append(top)
        if targets is not None:
            self.correct.append(top == targets.cpu())

    def summary(self, cut: float, before: "VariantResult | None" = None) -> dict[str, Any]:
        """Means over images.

        Args:
            cut: the norm above which a patch is an outlier.
            before: the model before, which this one is compared with, paired by image; None for itself.
        """
        norms, largest = torch.cat(self.norms).double(), torch.cat(self.largest).double()
        row: dict[str, Any] = {
            "n_images": len(norms),
            **mean(norms.amax(dim=1).numpy()).named("max_norm"),
            "p98_norm": float(norms.flatten().sort().values[int(0.98 * (norms.numel() - 1))]),
            "median_norm": float(norms.median()),
            **mean(self.shares(cut)).named("outlier_share"),
            "max_norm_by_block": largest.mean(dim=0).tolist(),
            "token_norm_by_block": torch.cat(self.token).double().mean(dim=0).tolist() if before is not None else None,
            "class_peak_by_block": torch.cat(self.class_peak).double().mean(dim=0).tolist(),
            "class_to_token_by_block": torch.cat(self.class_to_token).double().mean(dim=0).tolist(),
        }
        if self.correct:
            row |= mean(torch.cat(self.correct).double().numpy()).named("acc1")
        if before is not None:
            same = torch.cat(self.top) == torch.cat(before.top)
            row |= mean(same.double().numpy()).named("agree")
            row |= difference(before.shares(cut), self.shares(cut)).named("outlier_share_minus_before")
            if self.correct:
                change = difference(torch.cat(before.correct).numpy(), torch.cat(self.correct).numpy())
                row |= change.named("acc1_minus_before")
        return row

    def shares(self, cut: float) -> np.ndarray:
        """Share of each image's patches above a cut (images,)."""
        shares: np.ndarray = (torch.cat(self.norms) > cut).double().mean(dim=1).numpy()
        return shares


@dataclass(frozen=True)
class ShiftResult:
    """A model before and after, with controls, by the names in the figure."""

    label: str
    cut: float  # the norm above which a patch is an outlier
    variants: dict[str, VariantResult]


def measure(
    model: VisionTransformer,
    images: ImageBatches,
    neurons: Sequence[Neuron],
    cut: float,
    *,
    top_k: Sequence[int] = (10,),
    controls: int = 3,
    detection_layer: int = -1,
    labelled: bool = False,
    label: str = "model",
) -> ShiftResult:
    """Measure norms, class attention and predictions before and after, in one pass over the images.

    Controls are the empty token alone and random neurons of the same blocks.

    Args:
        images: see `inputs.ImageBatches`; with `labelled`, batches that begin with images and labels.
        neurons: (block, hidden unit), best first.
        cut: the norm above which a patch is an outlier.
        top_k: how many of the neurons are moved, one variant each.
        controls: draws of random neurons.
        detection_layer: the block whose output is judged.

    Raises:
        UserError: neurons or a layer that the model does not have.
    """
    with evaluation(model) as vit:
        models = variants(vit, neurons, top_k, controls)
        result = ShiftResult(label, cut, {name: VariantResult() for name in models})
        pairs = labelled_batches(images, vit) if labelled else ((batch, None) for batch in batches(images, vit))
        for batch, targets in pairs:
            for name, variant in models.items():
                result.variants[name].add(variant, batch, targets, detection_layer)
    return result


def variants(
    model: MergingViT, neurons: Sequence[Neuron], top_k: Sequence[int], controls: int
) -> dict[str, MergingViT]:
    """The models that `measure` compares, by name."""
    models = {"before": model, "empty token only": shift_neurons(model, (), add_token=True)}
    for k in top_k:
        models[f"{k} neurons moved"] = shift_neurons(model, neurons[:k])
    most = neurons[: max(top_k)]
    for seed in range(controls if most else 0):
        name = f"{len(most)} random neurons, draw {seed + 1}"
        models[name] = shift_neurons(model, random_neurons(model, most, seed))
    return models


def summarise(result: ShiftResult) -> list[dict[str, Any]]:
    """A row per variant, for json."""
    before = result.variants["before"]
    return [
        {"variant": name, **variant.summary(result.cut, None if variant is before else before)}
        for name, variant in result.variants.items()
    ]


# Figures


@charts.styled
def draw_neurons(found: FoundNeurons) -> Figure:
    """Where outliers appear and how sure that is, how far they stand apart, and the neurons' activations."""
    table, ranking = found.table, found.ranking
    title = (
        f"Register neurons of {found.label} (n = {ranking.images} images, {ranking.images_with_outliers} with outliers)"
    )
    figure, axes = charts.new_figure(1, 3, 3.9, 3.4, title)
    ax, mean_norm = axes[0, 0], table.largest.mean(dim=0)
    spread = table.largest.std(dim=0)
    x = np.arange(len(mean_norm))
    ax.fill_between(x, mean_norm - spread, mean_norm + spread, color=charts.COLOURS[0], alpha=0.15, lw=0)
    ax.plot(x, mean_norm, color=charts.COLOURS[0], marker="o", ms=3)
    for at, jump in enumerate(table.jumps(), start=1):
        ax.annotate(
            f"x{jump:.2f}", (at, float(mean_norm[at])), (0, 5), textcoords="offset points", fontsize=6, ha="center"
        )
    for layer, share in found.votes.items():
        if share >= 0.01:
            ax.axvline(
                layer,
                color=charts.COLOURS[1],
                ls=":",
                alpha=0.25 + 0.75 * share,
                label=f"block {layer}: {100 * share:.0f} % of draws",
            )
    if not found.votes:
        ax.axvline(found.top_layer, color=charts.FAINT, ls=":", label=f"up to block {found.top_layer} (given)")
    ax.set(title="largest patch norm of an image", xlabel="after block (band: std over images)", ylabel="L2 norm")
    ax.set_ylim(0, None)
    ax.legend(fontsize=7, title="where outliers start" if found.votes else None, title_fontsize=7)
    ax = axes[0, 1]
    ax.hist(table.detection.flatten().numpy(), 100, color=charts.COLOURS[0], alpha=0.8)
    ax.axvline(found.cut, color=charts.COLOURS[1], label=f"cut {found.cut:.1f} ({found.rule})")
    ax.set(title=f"patch norms after block {found.detection_layer}", yscale="log", xlabel="L2 norm")
    ax.set_ylabel("patches (log axis)")
    ax.set_xlim(0, None)
    ax.legend()
    ax = axes[0, 2]
    shown = min(12, len(ranking.neurons))
    y = np.arange(shown)
    ax.barh(y - 0.2, ranking.scores[:shown], 0.38, color=charts.COLOURS[1], label="at outlier patches")
    ax.barh(y + 0.2, ranking.elsewhere[:shown], 0.38, color=charts.COLOURS[0], label="at other patches")
    for at, value in enumerate(ranking.ratios[:shown]):
        place = dict(textcoords="offset points", fontsize=6.5, va="center")
        end = max(ranking.scores[at], ranking.elsewhere[at])
        ax.annotate(f"x{value:.1f}", (end, at), (3, 0), **place)  # type: ignore[arg-type]
    ax.set_yticks(y, [f"{block}: {unit}" for block, unit in ranking.neurons[:shown]], fontsize=7)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set(title=f"first neurons (block: unit), by {found.ranked_by}", xlabel="mean |activation|")
    ax.legend(loc="lower right")
    note = f"Units of blocks 0 to {found.top_layer} were searched. x: activation at outliers over elsewhere; near 1 a "
    note += "unit is as active everywhere and no register neuron."
    charts.footer(figure, note, *([f"The choice of the block is not settled: {found.doubt}."] if found.doubt else []))
    return figure


def draw_maps(
    maps: TokenMaps, pictures: Sequence[np.ndarray], cut: float, neurons: int, captions: Sequence[str] | None = None
) -> Figure:
    """A row per image: input, norms and class attention before and after, on shared scales with their bars.

    Args:
        pictures: (H,W,3) in [0, 1], one per image.
        cut: the norm above which a patch is an outlier.
        neurons: how many were moved.
    """
    even = maps.class_before.shape[1] * maps.class_before.shape[2]
    limits = charts.common_limits((maps.norm_before, maps.norm_after))
    attended = 0.0, charts.common_limits((maps.class_before, maps.class_after), 0.98)[1] * even
    cells = []
    images = zip(pictures, maps.norm_before, maps.norm_after, maps.class_before, maps.class_after, strict=True)
    for picture, norm_before, norm_after, class_before, class_after in images:
        row = [charts.image_cell(picture)]
        row += [charts.map_cell(values, limits, marked=values > cut) for values in (norm_before, norm_after)]
        row += [charts.map_cell(values * even, attended, cmap="magma") for values in (class_before, class_after)]
        cells.append(row)
    columns = ["input", "norms before", f"norms, {neurons} neurons moved", "class attention before"]
    note = f"red: above the cut {cut:.1f} of the model before; attention ends at the 98 % quantile"
    bars = [
        charts.Bar((1, 2), limits, "norm of patch tokens"),
        charts.Bar((3, 4), attended, "attention (1: an even share)", "magma", over=True),
    ]
    columns.append("class attention after")
    return charts.picture_table(cells, columns, captions, "Test-time registers", note=note, bars=bars)


@charts.styled
def draw(result: ShiftResult) -> Figure:
    """Largest norms over blocks, norms of the extra token, class attention, and the norms' distribution."""
    rows = summarise(result)
    n = len(torch.cat(result.variants["before"].norms))
    figure, axes = charts.new_figure(2, 2, 4.6, 3.0, f"Test-time registers in {result.label} (n = {n} images)")
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
        ax.set(title=title, xlabel="block", ylabel="attention" if key.startswith("class") else "L2 norm")
        ax.set_ylim(0, None)
    axes[0, 0].legend()
    ax = axes[1, 1]
    values = {name: torch.cat(variant.norms).flatten().numpy() for name, variant in result.variants.items()}
    edges = np.linspace(0, max(float(v.max()) for v in values.values()) * 1.001, 101)
    for index, row in enumerate(shown):
        ax.stairs(np.histogram(values[row["variant"]], edges)[0], edges, color=charts.colour_of(index), lw=1.4)
    ax.axvline(result.cut, color=charts.INK, lw=1, ls=":", label=f"cut {result.cut:.1f}")
    ax.set(title="patch norms, detection layer", yscale="log", xlabel="L2 norm", ylabel="patches (log axis)")
    ax.legend()
    lines = [f"{row['variant']}: {_shares(row)}" for row in rows]
    charts.footer(figure, "Means over images. " + "; ".join(lines))
    return figure


def _shares(row: dict[str, Any]) -> str:
    """Patches above the cut, agreement and accuracy, with intervals."""

    def percent(name: str) -> str:
        span = row[f"{name}_ci95"]
        ends = "" if span is None else f" [{100 * span[0]:.2f}, {100 * span[1]:.2f}]"
        return f"{100 * row[name]:.2f}{ends} %"

    parts = [f"{percent('outlier_share')} of patches above the cut"]
    parts += [f"same top-1 as before {percent('agree')}"] if "agree" in row else []
    parts += [f"top-1 {percent('acc1')}"] if "acc1" in row else []
    return ", ".join(parts)


# Command


def add_parser(subparsers: Any) -> None:
    from .command import add_command

    about = "test-time registers: find register neurons, apply the shift to images, evaluate it on a data set"
    parser = add_command(subparsers, "ttr", run, about)
    parser.add_argument("step", choices=STEPS, metavar="|".join(STEPS), help="the step to take, in this order")
    add_outlier_rule(parser, RULE)
    parser.add_argument("--detection_layer", type=int, default=-1, metavar="BLOCK", help="whose output is judged")
    parser.add_argument("--top_layer", default="auto", metavar="BLOCK", help="find: the last block looked at")
    parser.add_argument("--top_k", type=int, nargs="+", default=[10], metavar="K", help="neurons; eval takes several")
    parser.add_argument("--rank_by", choices=RANKINGS, default="ratio", help="find: the order of neurons")
    parser.add_argument(
        "--sparse", action="store_true", help="find: only neurons silent at half of the patches or more"
    )
    parser.add_argument("--neurons", type=Path, metavar="FILE", help="apply, eval: neurons.json of find")
    parser.add_argument("--controls", type=int, default=3, metavar="N", help="eval: draws of random neurons")
    parser.add_argument("--show", type=int, default=5, metavar="K", help="apply: images drawn")


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    from .command import load_models

    models = load_models(args, main_argv)
    if len(models) > 1:
        raise UserError("ttr takes one model at a time")
    if min(args.top_k) < 0 or (args.step == "find" and max(args.top_k) < 1) or args.controls < 0:
        raise UserError("--top_k and --controls must be at least 0, and --top_k of find at least 1")
    if (args.neurons is None) != (args.step == "find"):
        raise UserError("find makes neurons.json; apply and eval need it: --neurons FILE")
    Rule.parse(args.outlier_rule)
    check_layer(models[0].model, args.detection_layer, "--detection_layer", models[0].label)
    {"find": _run_find, "apply": _run_apply, "eval": _run_eval}[args.step](args, main_argv, models[0])


def _run_find(args: Namespace, main_argv: Sequence[str], loaded: "Loaded") -> None:
    from utils import log

    from . import command

    top_layer = None if args.top_layer == "auto" else _block(args.top_layer, loaded)
    out = command.Output(args, main_argv, [loaded])
    limit = None if loaded.args.limit else MOST_IMAGES
    images = command.Images(args, loaded, title=("norms", "activations"), limit=limit)
    found = find(
        loaded.model,
        images,
        outlier_rule=Rule.parse(args.outlier_rule),
        detection_layer=args.detection_layer,
        top_layer=top_layer,
        top_k=max(args.top_k),
        sparse=args.sparse,
        rank_by=args.rank_by,
        label=loaded.label,
    )
    out.about(images.note)
    log(f"outliers: norm > {found.cut:.2f} after block {args.detection_layer}; neurons of blocks 0..{found.top_layer}")
    ratios = ", ".join(f"{at}: x{jump:.2f}" for at, jump in enumerate(found.table.jumps(), start=1))
    log(f"mean largest norm after a block over that of the block before: {ratios}")
    if found.doubt:
        log(f"warning: {found.doubt}. Name the block by --top_layer, and compare the neighbours")
    out.json("neurons", summarise_neurons(found))
    out.npz("neurons", {"largest": found.table.largest, "norms": found.table.detection})
    out.figure("neurons", draw_neurons(found))
    ranking = found.ranking
    log(f"{ranking.images_with_outliers} of {ranking.images} images have outliers; first: {list(ranking.neurons[:5])}")


def _block(text: str, loaded: "Loaded") -> int:
    try:
        block = int(text)
    except ValueError:
        raise UserError(f"--top_layer must be auto or a block, not {text}") from None
    return check_layer(loaded.model, block, "--top_layer", loaded.label)


def read_neurons(file: Path) -> tuple[list[Neuron], dict[str, Any]]:
    """Read the ranked neurons of neurons.json, and all it says."""
    try:
        content = json.loads(file.read_text())
        ranked = [(int(block), int(unit)) for block, unit in content["ranked"]]
        float(content["cut"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read --neurons {file} ({error}); make it with analyze.py ttr find") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--neurons {file} is not what analyze.py ttr find writes; make it anew") from error
    return ranked, content


def _read_first(args: Namespace) -> tuple[list[Neuron], dict[str, Any]]:
    """The neurons that the largest --top_k asks for, and all that the file says."""
    ranked, content = read_neurons(args.neurons)
    for k in args.top_k:
        if k > len(ranked):
            raise UserError(
                f"--top_k {k}: {args.neurons} ranks {len(ranked)} neurons; find more with ttr find --top_k {k}"
            )
    return ranked[: max(args.top_k)], content


def _run_apply(args: Namespace, main_argv: Sequence[str], loaded: "Loaded") -> None:
    from . import command

    if len(args.top_k) > 1 or args.show < 1:
        raise UserError("ttr apply takes one --top_k and --show of at least 1")
    neurons, content = _read_first(args)
    shift_neurons(loaded.model, neurons)  # neurons that the model does not have are a mistake to tell now
    out = command.Output(args, main_argv, [loaded])
    images = command.Images(args, loaded, title="maps", limit=args.show)
    shown = [batch.images for batch in images]
    pictures = [picture for batch in shown for picture in images.pictures(batch)]
    out.about(images.note)
    maps = compare(loaded.model, shown, neurons, detection_layer=args.detection_layer)
    out.npz("applied", vars(maps))
    largest = {
        "max_norm": {
            "before": float(maps.norm_before.max(axis=(1, 2)).mean()),
            "after": float(maps.norm_after.max(axis=(1, 2)).mean()),
        },
        "token_norm_after": float(maps.token_after.mean()),
        "cut": content["cut"],
    }
    out.json("applied", {"top_k": args.top_k[0], "n_images": len(pictures), **largest})
    out.figure("applied", draw_maps(maps, pictures, content["cut"], args.top_k[0], images.names()))


def _run_eval(args: Namespace, main_argv: Sequence[str], loaded: "Loaded") -> None:
    from utils import log

    from . import command

    neurons, content = _read_first(args)
    variants(loaded.model, neurons, args.top_k, args.controls)  # mistakes come before the output
    out = command.Output(args, main_argv, [loaded])
    images = command.Images(args, loaded, title="evaluation", limit=None if loaded.args.limit else MOST_IMAGES)
    result = measure(
        loaded.model,
        images,
        neurons,
        content["cut"],
        top_k=args.top_k,
        controls=args.controls,
        detection_layer=args.detection_layer,
        labelled=command.labels_fit(args, loaded),
        label=loaded.label,
    )
    out.about(images.note)
    rows = summarise(result)
    out.json("ttr", {"cut": content["cut"], "found_on": content["n_images"], "rows": rows})
    out.npz("ttr", {name.replace(" ", "_"): torch.cat(v.largest) for name, v in result.variants.items()})
    out.figure("ttr", draw(result))
    for row in rows:
        log(_line(row))


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['variant']}: largest patch norm {row['max_norm']:.2f} (p98 {row['p98_norm']:.2f})", _shares(row)]
    token = row["token_norm_by_block"]
    return ", ".join([*parts, *([f"norm of the extra token {token[-1]:.2f}"] if token else [])])
