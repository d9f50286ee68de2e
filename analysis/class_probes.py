"""Class probes: how well one token alone tells the class of its image, by kind of token (Darcet et al., table 1).

One token of every kind is taken per image, after the final norm: class, distillation and register tokens, a random
normal and a random outlier patch, and means. Logistic regression and nearest neighbours are trained on each.

How well is always said with chance beside it, and of which images: some have no outlier. Tokens are compared on all
images, and on those that have an outlier and a normal patch in every model that is compared.

    result = class_probes.measure(model, train_loader, test_loader)
    banks = [class_probes.collect(model, train_loader, test_loader), ...]    # several models
    results = class_probes.probe(banks)                                       # on the same images

Shapes: B images, n patches, C channels.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.errors import UserError
from models.vit import MergingViT

from . import charts
from .inputs import as_list, batches, evaluation, labelled_batches
from .intervals import LEAST, Estimate, difference, mean, text
from .outliers import DEFAULT_RULE, SCALED, SHARED, Histogram, Rule, Yardstick, describe_cuts
from .probing import add_outlier_flags, check_outlier_flags, patch_norms
from .walk import check_layer, final, to_grid, walk

MOST_LABELLED = 20_000  # images per split: memory holds one token of every kind of each
PROBES = ("linear", "knn")
STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # C of the logistic regression
LabelledImages = Iterable[Any]  # of batches that begin with images (B,3,H,W) and labels (B,), as a DataLoader yields


NORMAL, OUTLIER = "normal patch", "outlier patch"
ALL, WITH_OUTLIER = "all images", "images with an outlier"  # what tokens are compared on


def patch_type(name: str, cut: str) -> str:
    """The name of normal or outlier patches under a cut."""
    return name if cut == SHARED else f"{name}, scaled cut"


def image_set(cut: str) -> str:
    """The name of the images with an outlier under a cut."""
    return WITH_OUTLIER if cut == SHARED else f"{WITH_OUTLIER}, scaled cut"


class TokenBank:
    """A token of every kind per image, after the final norm; random patches are drawn anew for every draw."""

    def __init__(self, draws: int = 5, seed: int = 0) -> None:
        self.draws, self._generator = draws, torch.Generator().manual_seed(seed)
        self._tokens: dict[str, list[Tensor]] = {}  # token type -> (draws,B,C) per batch
        self._labels: list[Tensor] = []
        self._covered: dict[str, list[Tensor]] = {}  # by cut

    @torch.no_grad()
    def add(
        self, model: MergingViT, images: Tensor, labels: Tensor, cuts: dict[str, float], outlier_layer: int = -1
    ) -> None:
        """Take the tokens of a batch.

        Args:
            cuts: a patch is an outlier if its norm before the final norm exceeds the cut, by the cut's name.
        """
        layer = lengths = None
        norm_layer = check_layer(model, outlier_layer, "outlier_layer")
        for layer in walk(model, images):
            if layer.index == norm_layer:
                lengths = patch_norms(layer).cpu()
        assert layer is not None and lengths is not None
        tokens = final(model, layer).float()
        patches = to_grid(tokens[:, layer.num_prefix_tokens :], layer.after.group, layer.grid).flatten(1, 2).cpu()
        tokens = tokens.cpu()
        # copies: a view would keep all tokens of the batch
        taken = {name: tokens[:, i].clone().expand(self.draws, -1, -1) for i, name in enumerate(layer.token_types)}
        registers = [i for i, name in enumerate(layer.token_types) if name.startswith("register")]
        if len(registers) > 1:
            taken["mean of registers"] = tokens[:, registers].mean(dim=1).expand(self.draws, -1, -1)
        taken["mean of patches"] = patches.mean(dim=1).expand(self.draws, -1, -1)
        for cut_name, cut in cuts.items():
            outlier = lengths > cut
            for name, flags in ((NORMAL, ~outlier), (OUTLIER, outlier)):
                taken[patch_type(name, cut_name)] = torch.stack([self._draw(patches, flags) for _ in range(self.draws)])
            self._covered.setdefault(cut_name, []).append(outlier.any(dim=1) & (~outlier).any(dim=1))
        for name, values in taken.items():
            self._tokens.setdefault(name, []).append(values)
        self._labels.append(labels.cpu())

    def _draw(self, patches: Tensor, flags: Tensor) -> Tensor:
        """Draw a random flagged patch per image; NaN where there is none."""
        chance = torch.rand(flags.shape, generator=self._generator).masked_fill(~flags, -1.0)
        best, index = chance.max(dim=1)
        chosen = patches[torch.arange(len(patches)), index]
        return chosen.masked_fill((best < 0).unsqueeze(1), float("nan"))

    @property
    def labels(self) -> np.ndarray:
        return torch.cat(self._labels).numpy()

    def covered(self, cut: str = SHARED) -> np.ndarray:
        """Images (images,) that have both an outlier and a normal patch under a cut, as flags."""
        return torch.cat(self._covered[cut]).numpy()

    @property
    def token_types(self) -> list[str]:
        return list(self._tokens)

    def tokens(self, token_type: str, draw: int) -> np.ndarray:
        """Tokens (images,C) of one type."""
        return torch.cat([values[draw] for values in self._tokens[token_type]]).numpy()


def logistic_hits(
    x: np.ndarray, y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, seed: int, strengths: Sequence[float]
) -> tuple[np.ndarray, float]:
    """Multinomial logistic regression (L2, LBFGS, standardised features).

    Returns:
        Which test images it is right on, and the C that a fifth of the training images chose.
    """
    from sklearn.linear_model import LogisticRegression  # sets environment variables when imported
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    def fitted(strength: float, features: np.ndarray, labels: np.ndarray) -> Any:
        return LogisticRegression(C=strength, max_iter=1000).fit(features, labels)

    scaler = StandardScaler().fit(x)
    x, test_x = scaler.transform(x), scaler.transform(test_x)
    best = strengths[0]
    if len(strengths) > 1:
        fit_x, val_x, fit_y, val_y = train_test_split(x, y, test_size=0.2, random_state=seed, stratify=y)
        best = max(strengths, key=lambda c: fitted(c, fit_x, fit_y).score(val_x, val_y))
    hits: np.ndarray = fitted(best, x, y).predict(test_x) == test_y
    return hits, best


def knn_hits(x: np.ndarray, y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, neighbours: int) -> np.ndarray:
    """Nearest neighbours by cosine, votes weighed by closeness: which test images they are right on."""
    from sklearn.neighbors import KNeighborsClassifier

    def closeness(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / 0.07)  # DINO's temperature

    model = KNeighborsClassifier(min(neighbours, len(x)), metric="cosine", algorithm="brute", weights=closeness)
    hits: np.ndarray = model.fit(x, y).predict(test_x) == test_y
    return hits


@dataclass(frozen=True)
class Accuracy:
    """What one type of token tells of the class, on one set of images.

    Attributes:
        hits: of "linear" and "knn", (draws, test images): which images the probe is right on.
        strengths: the C of each draw.
    """

    hits: dict[str, np.ndarray]
    strengths: list[float]

    def estimate(self, probe: str) -> Estimate:
        """Accuracy (a fraction), mean over draws, with its interval over test images."""
        return mean(self.hits[probe].mean(axis=0))

    def spread(self, probe: str) -> float:
        """Standard deviation over draws; 0 for one draw."""
        accuracies = self.hits[probe].mean(axis=1)
        return float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else 0.0

    def summary(self) -> dict[str, Any]:
        """Numbers for json."""
        row: dict[str, Any] = {"strengths": self.strengths}
        for probe in PROBES:
            row |= self.estimate(probe).named(probe)
            row |= {f"{probe}_std": self.spread(probe), f"{probe}_draws": self.hits[probe].mean(axis=1).tolist()}
        return row


def token_accuracy(
    train: TokenBank,
    test: TokenBank,
    token_type: str,
    chosen: tuple[np.ndarray, np.ndarray],
    neighbours: int = 20,
    strengths: Sequence[float] = STRENGTHS,
) -> Accuracy:
    """Fit both probes on one type of token, of the chosen training and test images (flags)."""
    linear, nearest, used = [], [], []
    (fit, check), y, test_y = chosen, train.labels[chosen[0]], test.labels[chosen[1]]
    for draw in range(train.draws):
        x, test_x = train.tokens(token_type, draw)[fit], test.tokens(token_type, draw)[check]
        hits, strength = logistic_hits(x, y, test_x, test_y, draw, strengths)
        linear.append(hits)
        used.append(strength)
        nearest.append(knn_hits(x, y, test_x, test_y, neighbours))
    return Accuracy({"linear": np.stack(linear), "knn": np.stack(nearest)}, used)


# Measurement


@dataclass(frozen=True)
class Collected:
    """The tokens of one model, before probes are fitted.

    Attributes:
        yardstick: the shared cut, to be given to the next model.
        cuts: the cuts that differ: the shared one, and the one scaled by the medians.
    """

    label: str
    yardstick: Yardstick
    cuts: dict[str, float]
    train: TokenBank
    test: TokenBank


@dataclass(frozen=True)
class ClassProbesResult:
    """Accuracies of one model.

    Attributes:
        yardstick, cuts: as in `Collected`.
        classes: how many there are.
        largest_class: share of the most frequent class among the test images: what one gets without looking.
        numbers: by set of images, training and test images in it.
        coverage: share of the training images that have an outlier and a normal patch in this model, by set.
        accuracies: by set of images and type of token.
        left_out: by set of images, why there is nothing.
    """

    label: str
    yardstick: Yardstick
    cuts: dict[str, float]
    classes: int
    largest_class: float
    numbers: dict[str, tuple[int, int]] = field(default_factory=dict)
    coverage: dict[str, float] = field(default_factory=dict)
    accuracies: dict[str, dict[str, Accuracy]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def collect(
    model: VisionTransformer,
    train: LabelledImages,
    test: LabelledImages,
    *,
    outlier_rule: Rule = DEFAULT_RULE,
    outlier_layer: int = -1,
    yardstick: Yardstick | None = None,
    draws: int = 5,
    seed: int = 0,
    label: str = "model",
) -> Collected:
    """Take the tokens of all images. Two passes over the training images, one over the test images.

    Args:
        train, test: batches of images (B,3,H,W) and labels (B,); `train` is iterated twice.
        outlier_rule: see `Rule`, on the norms of the training images, where there is no
        yardstick: cut of another model that this one is compared with.
        outlier_layer: the block whose output is judged.
        draws: random patches per image, with one probe each.
    """
    with evaluation(model) as vit:
        histogram = Histogram()
        norm_layer = check_layer(vit, outlier_layer, "outlier_layer")
        for images in batches(train, vit):
            histogram.add(next(patch_norms(layer) for layer in walk(vit, images) if layer.index == norm_layer))
        yardstick = yardstick or Yardstick.made_on(histogram, outlier_rule, label)
        cuts = yardstick.cuts(histogram)
        if abs(cuts[SCALED] - cuts[SHARED]) < 1e-6 * cuts[SHARED]:
            del cuts[SCALED]
        train_bank, test_bank = TokenBank(draws, seed), TokenBank(draws, seed + 1)
        for bank, labelled in ((train_bank, train), (test_bank, test)):
            for images, labels in labelled_batches(labelled, vit):
                bank.add(vit, images, labels, cuts, outlier_layer)
    return Collected(label, yardstick, cuts, train_bank, test_bank)


def probe(
    collected: Sequence[Collected],
    *,
    neighbours: int = 20,
    strengths: Sequence[float] = STRENGTHS,
    report: Callable[[str], None] | None = None,
    track: Callable[[list[str]], Iterable[str]] = iter,
) -> list[ClassProbesResult]:
    """Fit both probes on every type of token of one model or several, on the same images for all.

    Args:
        neighbours: k of the nearest neighbours.
        strengths: C of the logistic regression, of which a fifth of the training images chooses one.
        report: takes a line per token type.
        track: wraps the token types, to show progress.

    Raises:
        UserError: too few images of a class, or models that saw different images.
    """
    labels, test_labels = collected[0].train.labels, collected[0].test.labels
    for other in collected[1:]:
        if not (np.array_equal(other.train.labels, labels) and np.array_equal(other.test.labels, test_labels)):
            raise UserError(f"{collected[0].label} and {other.label} did not see the same images")
    problem = _too_few(labels)
    if problem:
        raise UserError(f"{problem}; take more images")
    largest = float(np.unique(test_labels, return_counts=True)[1].max() / len(test_labels))
    results = [
        ClassProbesResult(of.label, of.yardstick, of.cuts, len(set(labels.tolist())), largest) for of in collected
    ]
    everything = _with_normal(collected, "train"), _with_normal(collected, "test")
    differing = list(dict.fromkeys(cut for of in collected for cut in of.cuts))
    for of, result in zip(collected, results, strict=True):
        _probe_set(of, result, ALL, None, everything, neighbours, strengths, report, track)
        for cut in differing:
            name, own = image_set(cut), cut if cut in of.cuts else SHARED
            result.coverage[name] = float(of.train.covered(own).mean())
            chosen = _common(collected, cut)
            left = _too_few(labels[chosen[0]]) or ("" if chosen[1].sum() >= LEAST else "fewer than 5 test images")
            if left:
                result.left_out[name] = left
                continue
            _probe_set(of, result, name, own, chosen, neighbours, strengths, report, track)
    return results


def _with_normal(collected: Sequence[Collected], split: str) -> np.ndarray:
    """All images, less those that are nothing but outliers in some model."""
    banks = [getattr(of, split) for of in collected]
    return np.logical_and.reduce([np.isfinite(bank.tokens(NORMAL, 0)).all(axis=1) for bank in banks])


def _common(collected: Sequence[Collected], cut: str) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images that have an outlier and a normal patch in all models."""
    of_all = [(of, cut if cut in of.cuts else SHARED) for of in collected]
    return tuple(  # type: ignore[return-value]
        np.logical_and.reduce([getattr(of, split).covered(name) for of, name in of_all]) for split in ("train", "test")
    )


def _too_few(labels: np.ndarray) -> str:
    """Why labels do not do to train probes: five of a class let a fifth of them choose the strength."""
    kinds, numbers = np.unique(labels, return_counts=True)
    if len(kinds) >= 2 and numbers.min() >= 5:
        return ""
    least = int(numbers.min()) if len(numbers) else 0
    return f"{len(labels)} training images, of {len(kinds)} classes with {least} or more each: too few (5 of each of 2)"


def _probe_set(
    of: Collected,
    result: ClassProbesResult,
    name: str,
    cut: str | None,
    chosen: tuple[np.ndarray, np.ndarray],
    neighbours: int,
    strengths: Sequence[float],
    report: Callable[[str], None] | None,
    track: Callable[[list[str]], Iterable[str]],
) -> None:
    """Fit the probes of every type of token on a set of images; outlier patches under a cut, if one is given."""
    result.numbers[name] = int(chosen[0].sum()), int(chosen[1].sum())
    patches = {NORMAL: SHARED} if cut is None else {NORMAL: cut, OUTLIER: cut}
    types = {kind: kind for kind in of.train.token_types if not kind.startswith((NORMAL, OUTLIER))}
    types |= {kind: patch_type(kind, its_cut) for kind, its_cut in patches.items()}
    for kind in track(list(types)):
        accuracy = token_accuracy(of.train, of.test, types[kind], chosen, neighbours, strengths)
        result.accuracies.setdefault(name, {})[kind] = accuracy
        if report:
            linear, nearest = (text(accuracy.estimate(which), 1, 100) for which in PROBES)
            report(f"  {of.label}, {name}, {kind}: linear {linear}, knn {nearest} %")


def measure(
    model: VisionTransformer,
    train: LabelledImages,
    test: LabelledImages,
    *,
    outlier_rule: Rule = DEFAULT_RULE,
    outlier_layer: int = -1,
    yardstick: Yardstick | None = None,
    draws: int = 5,
    neighbours: int = 20,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    label: str = "model",
    report: Callable[[str], None] | None = None,
) -> ClassProbesResult:
    """Fit both probes on every type of token of one model: `collect` and `probe`, which say the arguments."""
    options: dict[str, Any] = {"outlier_rule": outlier_rule, "outlier_layer": outlier_layer, "yardstick": yardstick}
    found = collect(model, train, test, **options, draws=draws, seed=seed, label=label)
    return probe([found], neighbours=neighbours, strengths=strengths, report=report)[0]


def summarise(result: ClassProbesResult, baseline: ClassProbesResult | None = None) -> dict[str, Any]:
    """The row of one model, for json; accuracies are fractions.

    Args:
        baseline: accuracies less this model's, paired by test image, come too.
    """
    sets: dict[str, Any] = {}
    for name, accuracies in result.accuracies.items():
        kinds = {}
        for token_type, accuracy in accuracies.items():
            row = accuracy.summary()
            other = baseline.accuracies.get(name, {}).get(token_type) if baseline not in (None, result) else None  # type: ignore[union-attr]
            for kind in PROBES if other is not None else ():
                change = difference(other.hits[kind].mean(axis=0), accuracy.hits[kind].mean(axis=0))  # type: ignore[union-attr]
                row |= change.named(f"{kind}_minus_baseline")
            kinds[token_type] = row
        n_train, n_test = result.numbers[name]
        sets[name] = {"n_train": n_train, "n_test": n_test, "kinds": kinds}
    of = result.yardstick
    return {
        "label": result.label,
        "outlier_cut": {"rule": str(of.rule), "of": of.of, "cut": of.cut},
        "cuts": result.cuts,
        "coverage": result.coverage,
        "classes": result.classes,
        "chance": 1 / result.classes,
        "largest_class": result.largest_class,
        "sets": sets,
        "left_out": result.left_out,
    }


# Figure


@charts.styled
def draw(results: ClassProbesResult | Sequence[ClassProbesResult]) -> Figure:
    """Accuracy by type of token with 95 % intervals over test images: a row per set of images, a column per probe."""
    results = as_list(results)
    sets = list(dict.fromkeys(name for result in results for name in result.accuracies))
    names = {
        chosen: list(dict.fromkeys(name for result in results for name in result.accuracies.get(chosen, {})))
        for chosen in sets
    }
    heights = [0.5 + 0.24 * len(names[chosen]) * max(1.0, 0.6 * len(results)) for chosen in sets]
    title = "The class from one token (after the final norm)"
    figure, axes = charts.new_figure(len(sets), 2, 5.0, sum(heights) / len(sets) + 0.5, title, height_ratios=heights)
    for row, chosen in zip(axes, sets, strict=True):
        for ax, kind, name in zip(row, PROBES, ("logistic regression", "nearest neighbours"), strict=True):
            for index, result in enumerate(results):
                _draw_dots(ax, result, kind, chosen, names[chosen], index, len(results))
            ax.axvline(100 / results[0].classes, color=charts.INK, lw=1, ls=":")
            ax.axvline(100 * results[0].largest_class, color=charts.FAINT, lw=1, ls="-.")
            fit, check = next(r.numbers[chosen] for r in results if chosen in r.numbers)
            ax.set_title(f"{name}, {chosen}\n({fit} train, {check} test)", fontsize=8)
            ax.grid(False, axis="y")
            ax.set_xlim(0, 112)
            ax.set_yticks(range(len(names[chosen])), names[chosen] if ax is row[0] else [""] * len(names[chosen]))
            ax.set_ylim(len(names[chosen]) - 0.5, -0.5)
            ax.set_xlabel("test top-1 (%)")
    for index, result in enumerate(results):
        axes[0, 1].plot([], [], marker="o", ls="", color=charts.colour_of(index), label=result.label)
    axes[0, 1].plot([], [], color=charts.INK, lw=1, ls=":", label=f"chance, {100 / results[0].classes:.3g} %")
    axes[0, 1].plot([], [], color=charts.FAINT, lw=1, ls="-.", label="always the largest class")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside upper right", ncols=len(results) + 2)
    left = "; ".join(f"{result.label}, {name}: {why}" for result in results for name, why in result.left_out.items())
    scaled = {result.label: result.cuts.get(SCALED, result.cuts[SHARED]) for result in results}
    note = "Lines: 95 % over test images. All models are compared on the same images."
    charts.footer(figure, note, *([f"Left out: {left}"] if left else []), describe_cuts(results[0].yardstick, scaled))
    return figure


def _draw_dots(
    ax: Axes, result: ClassProbesResult, kind: str, chosen: str, names: list[str], index: int, models: int
) -> None:
    for i, name in enumerate(names):
        accuracy = result.accuracies.get(chosen, {}).get(name)
        if accuracy is None:
            continue
        value, y = accuracy.estimate(kind), i + (index - (models - 1) / 2) * 0.7 / models
        span = None if value.ci95 is None else [100 * bound for bound in value.ci95]
        charts.dots(ax, y, 100 * value.value, span, charts.colour_of(index), across=True)
        at = 100 * (value.ci95[1] if value.ci95 else value.value)
        place = dict(textcoords="offset points", va="center", fontsize=6.5)
        ax.annotate(f"{100 * value.value:.1f}", (at, y), (4, 0), **place)  # type: ignore[arg-type]


# Command


def add_parser(subparsers: Any) -> None:
    from .command import add_command

    about = "linear and nearest-neighbour probes of the class from one class, register, normal or outlier token"
    parser = add_command(subparsers, "probes", run, about)
    parser.add_argument("--draws", type=int, default=5, metavar="N", help="random patches per image, one probe each")
    parser.add_argument("--neighbours", type=int, default=20, metavar="K")
    parser.add_argument("--C", nargs="+", type=float, default=list(STRENGTHS), metavar="C", help="strengths to try")
    add_outlier_flags(parser)


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    from utils import log

    from . import command

    if args.data is not None:
        raise UserError("probes need labels and a train split: give --dataset (and --data_path) instead of --data")
    if args.draws < 1 or args.neighbours < 1 or min(args.C) <= 0:
        raise UserError("--draws and --neighbours must be at least 1, and every --C above 0")
    models = command.load_models(args, main_argv)
    rule = check_outlier_flags(args, models)
    sets = []
    for loaded in models:
        limit, name = None if loaded.args.limit else MOST_LABELLED, loaded.label
        titles = (f"norms of {name}", f"training tokens of {name}")
        train = command.Images(args, loaded, "train", title=titles, limit=limit)
        sets.append((train, command.Images(args, loaded, "val", title=f"test tokens of {name}", limit=limit)))
    out = command.Output(args, main_argv, models)
    out.about("; ".join(images.note for images in sets[0]))
    options = {name: getattr(args, name) for name in ("outlier_layer", "draws")} | {"outlier_rule": rule}
    banks: list[Collected] = []
    for loaded, (train, test) in zip(models, sets, strict=True):
        common = banks[0].yardstick if banks else None
        more = {"yardstick": common, "seed": loaded.args.seed, "label": loaded.label}
        banks.append(collect(loaded.model, train, test, **options, **more))
    track = lambda names: command.track(names, len(names), "probes")  # noqa: E731
    results = probe(banks, neighbours=args.neighbours, strengths=args.C, report=log, track=track)
    for result in results:
        for name, why in result.left_out.items():
            log(f"note: {result.label}, {name}: left out, {why}")
    rows = [summarise(result, results[0]) for result in results]
    out.json("probes", {"outlier_rule": str(rule), "neighbours": args.neighbours, "draws": args.draws, "models": rows})
    for loaded, result in zip(models, results, strict=True):
        hits = {
            f"{name}/{token_type}/{kind}": accuracy.hits[kind]
            for name, accuracies in result.accuracies.items()
            for token_type, accuracy in accuracies.items()
            for kind in PROBES
        }
        out.npz("probes" if len(models) == 1 else f"probes_{loaded.slug}", hits)
    out.figure("probes", draw(results))
