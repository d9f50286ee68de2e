"""Similarity: neighbouring patches, outliers and normal tokens, register maps, and layers with each other.

    result = similarity.measure(model, images)
    similarity.draw(result).savefig("outliers.png")
    similarity.draw_layers(result).savefig("layers.png")

Command: run/analyze.py similarity. Shapes: B batch, N tokens, T patch tokens, P prefix tokens, C channels, L stages
(input, every block's output, final norm), S sampled patches, (gh,gw) the patch grid.
"""

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models import MergingViT, UserError

from . import charts
from .inputs import ImageBatches, as_list, batches, evaluation
from .outliers import DEFAULT_RULE, Histogram, Rule, norms
from .walk import Layer, attention, check_layer, final, layer_at, patch_grid, per_patch, to_grid, walk

SAMPLES = 2048  # tokens that layers are compared on


def neighbour_cosines(x: Tensor) -> Tensor:
    """Cosine of patches (B,gh,gw,C) with those up, down, left, right: (B,4,gh,gw), NaN beyond the border."""
    x = F.normalize(x.float(), dim=-1)
    batch, rows, columns, _ = x.shape
    out = x.new_full((batch, 4, rows, columns), float("nan"))
    down = (x[:, 1:] * x[:, :-1]).sum(dim=-1)
    right = (x[:, :, 1:] * x[:, :, :-1]).sum(dim=-1)
    out[:, 0, 1:], out[:, 1, :-1] = down, down
    out[:, 2, :, 1:], out[:, 3, :, :-1] = right, right
    return out


@dataclass
class CosineHistogram:
    """Cosines of two populations (normal, outlier) in bounded memory: 4096 bins over [-1, 1].

    Attributes:
        counts: (2,bins) pairs of normal and of outlier patches.
        sums: (2,) sums of their cosines.
    """

    bins: int = 4096
    counts: np.ndarray = field(init=False)
    sums: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.counts, self.sums = np.zeros((2, self.bins), dtype=np.int64), np.zeros(2)

    def add(self, cosines: Tensor, outlier: Tensor) -> None:
        """Count cosines (any shape, NaN left out) with a flag each."""
        valid = ~cosines.isnan()
        values, labels = cosines[valid].double(), outlier[valid].long()
        index = ((values.clamp(-1, 1) + 1) / 2 * self.bins).long().clamp(max=self.bins - 1)
        counts = torch.bincount(labels * self.bins + index, minlength=2 * self.bins)
        self.counts += counts.view(2, self.bins).cpu().numpy()
        self.sums += torch.bincount(labels, weights=values, minlength=2).cpu().numpy()

    @property
    def centres(self) -> np.ndarray:
        """Middles (bins,) of the bins."""
        return (np.arange(self.bins) + 0.5) / self.bins * 2 - 1

    def summary(self) -> dict[str, float]:
        """Pairs, mean and median of both, and the AUC: the chance that an outlier's pair is more similar."""
        numbers = self.counts.sum(axis=1)
        summary: dict[str, float] = {}
        for name, count, total, row in zip(("normal", "outlier"), numbers, self.sums, self.counts, strict=True):
            middle = int(np.searchsorted(row.cumsum(), count / 2))
            summary[f"{name}_pairs"] = int(count)
            summary[f"{name}_mean"] = float(total / count) if count else float("nan")
            summary[f"{name}_median"] = float(self.centres[min(middle, self.bins - 1)]) if count else float("nan")
        summary["auc"] = area_under_curve(self.counts[1], self.counts[0])
        return summary


def area_under_curve(first: np.ndarray, second: np.ndarray) -> float:
    """Chance that a draw of the first histogram is larger than one of the second, ties counted half."""
    pairs = float(first.sum()) * float(second.sum())
    if not pairs:
        return float("nan")
    below = second.cumsum() - second
    return float((first * (below + second / 2)).sum() / pairs)


@dataclass
class _AcrossImages:
    """Sums over images of one set of tokens, for the pairs of different images."""

    total: Tensor  # (C,) sum of all unit vectors
    inner: float = 0.0  # sum over images of |sum of the image's unit vectors|^2
    count: float = 0.0  # tokens
    count_squared: float = 0.0  # sum over images of the square of their number

    def mean(self) -> float | None:
        """Mean cosine of two tokens of different images: all pairs less those within an image."""
        return _ratio(float(self.total.square().sum()) - self.inner, self.count**2 - self.count_squared)


@dataclass
class GroupCosines:
    """Mean cosine within and between sets of tokens, over all pairs.

    A sum of cosines over pairs of unit vectors u is a product of sums: sum_ij u_i.u_j = |sum_i u_i|^2, and between two
    sets (sum_i u_i).(sum_j v_j). So one sum of vectors per set and image is enough, which is exact and linear in the
    number of tokens. The mean over ordered pairs of distinct members of a set leaves out the n pairs of a token with
    itself, whose cosine is 1: (|sum u|^2 - n) / (n (n - 1)).
    """

    pairs: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    across: dict[str, _AcrossImages] = field(default_factory=dict)

    def add(self, x: Tensor, outlier: Tensor, others: dict[str, Tensor] | None = None) -> None:
        """Take in a batch.

        Args:
            x: (B,T,C) tokens.
            outlier: (B,T) bool.
            others: more tokens (B,C) by name, compared with outlier and normal ones.
        """
        unit = F.normalize(x.double(), dim=-1)
        sets = {"outlier": outlier, "normal": ~outlier}
        total = {name: (unit * chosen.unsqueeze(-1)).sum(dim=1) for name, chosen in sets.items()}  # (B,C)
        number = {name: chosen.sum(dim=1).double() for name, chosen in sets.items()}  # (B,)
        for name in sets:
            n, inner = number[name], total[name].square().sum(dim=1)
            self._count(f"{name}-{name}", inner - n, n * (n - 1))
            across = self.across.setdefault(name, _AcrossImages(torch.zeros_like(total[name][0])))
            across.total += total[name].sum(dim=0)
            across.inner += float(inner.sum())
            across.count += float(n.sum())
            across.count_squared += float((n**2).sum())
        self._count("outlier-normal", (total["outlier"] * total["normal"]).sum(1), number["outlier"] * number["normal"])
        for other, tokens in (others or {}).items():
            direction = F.normalize(tokens.double(), dim=-1)
            for name in sets:
                self._count(f"{name}-{other}", (total[name] * direction).sum(dim=1), number[name])

    def _count(self, key: str, total: Tensor, pairs: Tensor) -> None:
        self.sums[key] = self.sums.get(key, 0.0) + float(total.sum())
        self.pairs[key] = self.pairs.get(key, 0.0) + float(pairs.sum())

    def means(self) -> dict[str, float | None]:
        """Mean cosine over all pairs within images by name, and `X-X across images`; None where there is no pair."""
        within = {key: _ratio(self.sums[key], pairs) for key, pairs in self.pairs.items()}
        return within | {f"{name}-{name} across images": across.mean() for name, across in self.across.items()}


def _ratio(total: float, pairs: float) -> float | None:
    return total / pairs if pairs > 0.5 else None


def map_cosines(maps: Tensor) -> Tensor:
    """Cosines of K maps with each other: (B,K,...) -> (B,K,K)."""
    unit = F.normalize(maps.flatten(2).float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def layer_tables(samples: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Compare the same tokens in all layers (L,S,C): linear CKA (arXiv 1905.00414) (L,L) and mean cosine (L,L)."""
    layers = len(samples)
    cka = np.eye(layers)
    centred = samples.float() - samples.float().mean(dim=1, keepdim=True)
    # CKA is |x'y|^2 / (|x'x| |y'y|): divided beforehand, the numerator is all there is to compute for a pair
    scaled = [x / (x.T @ x).norm().sqrt().clamp(min=1e-20) for x in centred]
    for i in range(layers):
        for j in range(i):
            cka[i, j] = cka[j, i] = float((scaled[i].T @ scaled[j]).square().sum())
    unit = F.normalize(samples.float(), dim=-1)
    cosine = torch.einsum("isc,jsc->ij", unit, unit) / samples.shape[1]
    return cka, cosine.cpu().numpy()


@dataclass
class SimilarityResult:
    """Similarities of one model's tokens over a set of images.

    Attributes:
        label: the model's name in figures.
        layer: block whose output outliers are judged by.
        cut: the norm above which a patch token is an outlier there.
        mean: (C,) mean patch token there.
        images: number of images.
        neighbours: cosines of patch embeddings with their neighbours.
        raw, centred: cosines of tokens there, as they are and less the mean patch token.
        token_types: names of the prefix tokens in the last block, P of them.
        maps: (P,P) mean cosine of their attention maps in the last block.
        stages: names of the L stages.
        cka, cosine: (L,L) stages with each other: linear CKA, and mean cosine of the same token.
    """

    label: str
    layer: int
    cut: float
    mean: Tensor
    images: int = 0
    neighbours: CosineHistogram = field(default_factory=CosineHistogram)
    raw: GroupCosines = field(default_factory=GroupCosines)
    centred: GroupCosines = field(default_factory=GroupCosines)
    token_types: tuple[str, ...] = ()
    maps: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    stages: tuple[str, ...] = ()
    cka: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    cosine: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))


@torch.no_grad()
def measure(
    model: VisionTransformer,
    images: ImageBatches,
    *,
    layer: int = -1,
    rule: Rule = DEFAULT_RULE,
    seed: int = 0,
    label: str = "model",
) -> SimilarityResult:
    """Measure similarities in two passes over the images: the first one finds the cut and the mean token.

    Args:
        model: a `MergingViT`, or a timm ViT that it can be made of.
        images: (B,3,H,W) as the model sees them, or batches of them, to be iterated twice.
        layer: block after which outliers are judged; -1 is the last.
        rule: how outliers are told.
        seed: of the random patches that layers are compared on, about 2048 in all and evenly spread over the images.

    Raises:
        UserError: there is no image or no such layer.
    """
    with evaluation(model) as model:
        layer = check_layer(model, layer, label=label)
        histogram, mean, number = _first_pass(model, images, layer)
        result = SimilarityResult(label, layer, rule.cut(histogram), mean)
        generator = torch.Generator().manual_seed(seed)
        samples, map_sum = [], torch.zeros(0, 0)
        for batch in batches(images, model):
            chosen = _sample_patches(model, batch, result.images, number, generator)
            tokens, last = _measure_batch(result, model, batch, chosen)
            samples.append(tokens)
            if last.num_prefix_tokens:
                cosines = _cosines_of_maps(last)
                map_sum = cosines if not map_sum.numel() else map_sum + cosines
            result.images += len(batch)
    if result.images != number:
        raise UserError(f"the first pass saw {number} images, the second {result.images}; give a list, not a generator")
    result.token_types = last.token_types
    result.maps = (map_sum / result.images).numpy()
    result.cka, result.cosine = layer_tables(torch.cat(samples, dim=1))
    result.stages = ("input", *(str(index) for index in range(last.index + 1)), "final norm")
    return result


def _first_pass(model: MergingViT, images: ImageBatches, index: int) -> tuple[Histogram, Tensor, int]:
    """Norms and mean (C,) of the patch tokens after a block, and the number of images."""
    histogram, number, tokens = Histogram(), 0, 0
    total = torch.zeros(model.embed_dim, dtype=torch.float64)
    for batch in batches(images, model):
        layer = layer_at(model, batch, index)
        x = layer.after.x[:, layer.num_prefix_tokens :]
        histogram.add(norms(x))
        total += x.double().sum(dim=(0, 1)).cpu()
        tokens += x.shape[0] * x.shape[1]
        number += len(batch)
    if not number:
        raise UserError("none of the images can be read")
    return histogram, (total / tokens).float(), number


def _sample_patches(
    model: MergingViT, images: Tensor, done: int, number: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose random patches of a batch: (S,) image in the batch and (S,) patch.

    Over all images they are about SAMPLES, evenly spread: after k of `number` images SAMPLES * k // number are chosen.

    Args:
        done: images before this batch.
    """
    rows, columns = patch_grid(model, images)
    patches = rows * columns
    until = [min(patches * k, SAMPLES * k // number) for k in range(done, done + len(images) + 1)]
    counts = torch.tensor(until).diff()
    order = torch.rand(len(images), patches, generator=generator).argsort(dim=1)
    chosen = torch.cat([order[image, :count] for image, count in enumerate(counts.tolist())])
    return torch.arange(len(images)).repeat_interleave(counts), chosen


def _measure_batch(
    result: SimilarityResult, model: MergingViT, images: Tensor, chosen: tuple[Tensor, Tensor]
) -> tuple[Tensor, Layer]:
    """Add a batch to `result`; return the tokens of the chosen patches in all stages (L,S,C), and the last block."""
    stages = []
    for layer in walk(model, images):
        if layer.index == 0:
            stages.append(_tokens_of(layer.before.x, layer.before.group, layer.num_prefix_tokens, chosen))
        stages.append(_tokens_of(layer.after.x, layer.after.group, layer.num_prefix_tokens, chosen))
        if layer.index == result.layer:
            _compare(result, model, layer, images)
    stages.append(_tokens_of(final(model, layer), layer.after.group, layer.num_prefix_tokens, chosen))
    return torch.stack(stages), layer


def _tokens_of(x: Tensor, group: Tensor, num_prefix_tokens: int, chosen: tuple[Tensor, Tensor]) -> Tensor:
    """Tokens of the chosen patches: (B,N,C) -> (S,C) in fp32 on the CPU."""
    rows, patches = chosen[0].to(x.device), chosen[1].to(x.device)
    return x[rows, group[rows, patches] + num_prefix_tokens].float().cpu()


def _compare(result: SimilarityResult, model: MergingViT, layer: Layer, images: Tensor) -> None:
    """Compare the outliers after a block: their input patches with the neighbours, and the tokens among themselves."""
    x = layer.after.x[:, layer.num_prefix_tokens :].float()
    outlier = norms(x) > result.cut
    # patch embeddings before positions are added, and a label for the patch in the middle of each pair
    embedded = model.patch_embed(images)
    cosines = neighbour_cosines(embedded.reshape(len(embedded), *layer.grid, -1))
    of_patches = to_grid(outlier, layer.after.group, layer.grid)
    result.neighbours.add(cosines, of_patches.unsqueeze(1).expand_as(cosines))
    others = {name: layer.after.x[:, index].float() for index, name in enumerate(layer.token_types)}
    result.raw.add(x, outlier, others)
    mean = result.mean.to(x)
    result.centred.add(x - mean, outlier, {name: tokens - mean for name, tokens in others.items()})


def _cosines_of_maps(layer: Layer) -> Tensor:
    """Cosines (P,P) of the prefix tokens' attention maps, summed over the images of a batch."""
    maps = per_patch(attention(layer)[:, :, : layer.num_prefix_tokens].mean(dim=1), layer)
    return map_cosines(maps).sum(dim=0).double().cpu()


def summarise(result: SimilarityResult) -> dict[str, Any]:
    """Numbers of one model; a mean over no pair is None or NaN."""
    return {
        "label": result.label,
        "n_images": result.images,
        "cut": result.cut,
        "neighbours": result.neighbours.summary(),
        "cosines": result.raw.means(),
        "cosines_centred": result.centred.means(),
        "map_kinds": list(result.token_types),
        "map_cosines": result.maps.tolist(),
        "stages": list(result.stages),
        "cka": result.cka.tolist(),
        "layer_cosine": result.cosine.tolist(),
    }


# Figures


@charts.styled
def draw(results: SimilarityResult | Sequence[SimilarityResult]) -> Figure:
    """Draw mean cosines within and between outliers, normal tokens and the prefix, raw and less the mean token."""
    results = as_list(results)
    tables = {
        "raw": [_joined(result.raw.means()) for result in results],
        "after removing the data set's mean token": [_joined(result.centred.means()) for result in results],
    }
    keys = list(dict.fromkeys(key for table in tables["raw"] for key in table))
    figure, axes = charts.new_figure(1, 2, 5.0, 0.9 + 0.3 * len(keys), "Cosines of tokens", sharey=True)
    for ax, (title, table) in zip(axes[0], tables.items(), strict=True):
        height = 0.75 / len(results)
        for index, (result, means) in enumerate(zip(results, table, strict=True)):
            y = np.arange(len(keys)) + (index - (len(results) - 1) / 2) * height
            values = [means.get(key, np.nan) for key in keys]
            ax.barh(y, values, height * 0.9, color=charts.colour_of(index), alpha=0.8, label=result.label)
        ax.axvline(0, color=charts.FAINT, lw=0.8)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("mean cosine")
        ax.set_xlim(min(-0.3, ax.get_xlim()[0]), 1.0)
    axes[0, 0].set_yticks(range(len(keys)), keys)
    axes[0, 0].invert_yaxis()
    axes[0, 1].legend(loc="lower right")
    return figure


def _joined(means: dict[str, float | None]) -> dict[str, float]:
    """Put registers into one row, the mean over them, and leave out what does not occur."""
    lists: dict[str, list[float]] = {}
    for key, value in means.items():
        if value is not None:
            lists.setdefault(re.sub(r"register \d+", "registers", key), []).append(value)
    return {key: sum(values) / len(values) for key, values in lists.items()}


@charts.styled
def draw_neighbours(results: SimilarityResult | Sequence[SimilarityResult]) -> Figure:
    """Draw the distribution of the cosine of an input patch with its neighbours, outliers against normal patches."""
    results = as_list(results)
    figure, axes = charts.new_figure(1, len(results), 4.6, 3.0, "Input patches and their four neighbours", sharey=True)
    for ax, result in zip(axes[0], results, strict=True):
        summary = result.neighbours.summary()
        for index, (name, counts) in enumerate(zip(("normal", "outlier"), result.neighbours.counts, strict=True)):
            if not counts.sum():
                continue
            text = f"{name}: mean {summary[f'{name}_mean']:.3f}, {counts.sum()} pairs"
            x, y = _smooth(result.neighbours.centres, counts)
            ax.plot(x, y, color=charts.colour_of(index), label=text)
            ax.fill_between(x, y, color=charts.colour_of(index), alpha=0.12, lw=0)
        ax.set_title(f"{result.label}: AUC {summary['auc']:.3f}")
        ax.set_xlabel("cosine of patch embeddings (without position)")
        ax.legend(loc="upper left")
    axes[0, 0].set_ylabel("density")
    return figure


def _smooth(centres: np.ndarray, counts: np.ndarray, width: float = 0.012) -> tuple[np.ndarray, np.ndarray]:
    """Make a density of a histogram by a Gaussian of fixed width, mirrored at 1 so that no mass is lost there."""
    spacing = centres[1] - centres[0]
    offsets = np.arange(-int(4 * width / spacing), int(4 * width / spacing) + 1) * spacing
    kernel = np.exp(-0.5 * (offsets / width) ** 2)
    half = len(offsets) // 2
    padded = np.concatenate([counts[half - 1 :: -1], counts, counts[: -half - 1 : -1]]).astype(float)
    smooth = np.convolve(padded, kernel / kernel.sum(), mode="valid") / (counts.sum() * spacing)
    low = max(-1.0, float(centres[np.searchsorted(counts.cumsum(), 0.002 * counts.sum())]) - 0.05)
    inside = centres >= low
    return centres[inside], smooth[inside]


@charts.styled
def draw_layers(results: SimilarityResult | Sequence[SimilarityResult]) -> Figure:
    """Draw layers against each other: linear CKA and cosine of the same token."""
    results = as_list(results)
    figure, axes = charts.new_figure(len(results), 2, 4.2, 3.7, "Patch tokens: layer against layer")
    for row, result in zip(axes, results, strict=True):
        for ax, table, name in zip(row, (result.cka, result.cosine), ("linear CKA", "cosine"), strict=True):
            low = 0.0 if name == "linear CKA" else min(0.0, float(table.min()))
            drawn = ax.imshow(table, vmin=low, vmax=1, cmap=charts.HEAT)
            _layer_ticks(ax, result.stages)
            ax.set_title(f"{result.label}: {name}", fontsize=9)
            charts.colour_bar(figure, drawn, ax)
    return figure


def _layer_ticks(ax: Axes, stages: Sequence[str]) -> None:
    shown = list(range(0, len(stages), max(1, round(len(stages) / 14))))
    ax.grid(False)
    ax.set_xticks(shown, [stages[i] for i in shown], fontsize=7, rotation=90)
    ax.set_yticks(shown, [stages[i] for i in shown], fontsize=7)


@charts.styled
def draw_maps(results: SimilarityResult | Sequence[SimilarityResult]) -> Figure:
    """Draw the likeness of the prefix tokens' attention maps, with the numbers."""
    results = as_list(results)
    size = 1.6 + 0.45 * max(len(result.token_types) for result in results)
    figure, axes = charts.new_figure(1, len(results), size, size, "Last block: attention maps, cosine")
    for ax, result in zip(axes[0], results, strict=True):
        ax.grid(False)
        ax.imshow(result.maps, vmin=0, vmax=1, cmap=charts.HEAT)
        names = range(len(result.token_types)), result.token_types
        ax.set_xticks(*names, rotation=90, fontsize=8)
        ax.set_yticks(*names, fontsize=8)
        for (row, column), value in np.ndenumerate(result.maps):
            colour = "white" if value < 0.6 else charts.INK
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        ax.set_title(result.label, fontsize=9)
    return figure


# Command


def add_parser(subparsers: Any) -> None:
    """Add the command `similarity`."""
    from .command import add_command

    text = "cosine to the neighbours, outlier against normal tokens, register maps, CKA and cosine between layers"
    parser = add_command(subparsers, "similarity", run, text)
    parser.add_argument("--outlier_rule", type=Rule.parse, default=DEFAULT_RULE, metavar="RULE")
    parser.add_argument("--layer", type=int, default=-1, metavar="BLOCK", help="whose norms make outliers (last)")


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    """Measure all models and write similarity.json, an npz per model, and the figures."""
    from .command import Images, Output, load_models

    models = load_models(args, main_argv)
    out = Output(args, main_argv, models)
    for loaded in models:
        check_layer(loaded.model, args.layer, "--layer", loaded.label)
    results = []
    for loaded in models:
        images = Images(args, loaded, title=(f"norms of {loaded.label}", f"similarity of {loaded.label}"))
        options: dict[str, Any] = {"layer": args.layer, "rule": args.outlier_rule, "seed": loaded.args.seed}
        results.append(measure(loaded.model, images, **options, label=loaded.label))
    rows = [summarise(result) for result in results]
    out.json("similarity", {"outlier_rule": str(args.outlier_rule), "models": rows})
    for loaded, result in zip(models, results, strict=True):
        out.npz(f"similarity_{loaded.slug}", arrays(result))
    out.png("similarity_neighbours", draw_neighbours(results))
    out.png("similarity_outliers", draw(results))
    out.png("similarity_layers", draw_layers(results))
    several = [result for result in results if len(result.token_types) > 1]
    if several:
        out.png("similarity_maps", draw_maps(several))


def arrays(result: SimilarityResult) -> dict[str, np.ndarray]:
    """Arrays of the npz."""
    return {
        "neighbour_counts": result.neighbours.counts,
        "neighbour_centres": result.neighbours.centres,
        "map_cosines": result.maps,
        "cka": result.cka,
        "layer_cosine": result.cosine,
    }
