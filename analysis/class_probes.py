"""Class probes: how well one token alone tells the class of its image, by kind of token (Darcet et al., table 1).

One token of every kind is taken per image, after the final norm: class, distillation and register tokens, a random
normal and a random outlier patch, and means. Logistic regression and nearest neighbours are trained on each.

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
from .outliers import DEFAULT_RULE, Histogram, Rule
from .probing import add_outlier_flags, check_outlier_flags, patch_norms
from .walk import check_layer, final, to_grid, walk

MOST_LABELLED = 20_000  # images per split: memory holds one token of every kind of each
STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # C of the logistic regression
LabelledImages = Iterable[Any]  # of batches that begin with images (B,3,H,W) and labels (B,), as a DataLoader yields


class TokenBank:
    """A token of every kind per image, after the final norm; random patches are drawn anew for every draw."""

    def __init__(self, draws: int = 5, seed: int = 0) -> None:
        self.draws, self._generator = draws, torch.Generator().manual_seed(seed)
        self._tokens: dict[str, list[Tensor]] = {}  # token type -> (draws,B,C) per batch
        self._labels: list[Tensor] = []
        self._covered: list[Tensor] = []

    @torch.no_grad()
    def add(self, model: MergingViT, images: Tensor, labels: Tensor, cut: float, outlier_layer: int = -1) -> None:
        """Take the tokens of a batch; a patch is an outlier if its norm before the final norm exceeds `cut`."""
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
        outlier = lengths > cut
        for name, flags in (("normal patch", ~outlier), ("outlier patch", outlier)):
            taken[name] = torch.stack([self._draw(patches, flags) for _ in range(self.draws)])
        for name, values in taken.items():
            self._tokens.setdefault(name, []).append(values)
        self._labels.append(labels.cpu())
        self._covered.append(outlier.any(dim=1) & (~outlier).any(dim=1))

    def _draw(self, patches: Tensor, flags: Tensor) -> Tensor:
        """Draw a random flagged patch per image; NaN where there is none."""
        chance = torch.rand(flags.shape, generator=self._generator).masked_fill(~flags, -1.0)
        best, index = chance.max(dim=1)
        chosen = patches[torch.arange(len(patches)), index]
        return chosen.masked_fill((best < 0).unsqueeze(1), float("nan"))

    @property
    def labels(self) -> np.ndarray:
        return torch.cat(self._labels).numpy()

    @property
    def covered(self) -> np.ndarray:
        """Images (images,) that have both an outlier and a normal patch, as flags."""
        return torch.cat(self._covered).numpy()

    @property
    def token_types(self) -> list[str]:
        return list(self._tokens)

    def tokens(self, token_type: str, draw: int) -> np.ndarray:
        """Tokens (images,C) of one type."""
        return torch.cat([values[draw] for values in self._tokens[token_type]]).numpy()


def logistic_accuracy(
    x: np.ndarray, y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, seed: int, strengths: Sequence[float]
) -> tuple[float, float]:
    """Multinomial logistic regression (L2, LBFGS, standardised features): test accuracy in % and the C that a fifth of
    the training images chose."""
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
    return 100 * float(fitted(best, x, y).score(test_x, test_y)), best


def knn_accuracy(x: np.ndarray, y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, neighbours: int) -> float:
    """Nearest neighbours by cosine, votes weighed by closeness: test accuracy in %."""
    from sklearn.neighbors import KNeighborsClassifier

    def closeness(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / 0.07)  # DINO's temperature

    model = KNeighborsClassifier(min(neighbours, len(x)), metric="cosine", algorithm="brute", weights=closeness)
    return 100 * float(model.fit(x, y).score(test_x, test_y))


def token_accuracies(
    train: TokenBank, test: TokenBank, token_type: str, neighbours: int = 20, strengths: Sequence[float] = STRENGTHS
) -> dict[str, Any]:
    """Accuracy of both probes from one type of token, over the images that have every type: mean and std over draws."""
    linear, nearest, chosen = [], [], []
    for draw in range(train.draws):
        x, test_x = train.tokens(token_type, draw)[train.covered], test.tokens(token_type, draw)[test.covered]
        y, test_y = train.labels[train.covered], test.labels[test.covered]
        accuracy, strength = logistic_accuracy(x, y, test_x, test_y, draw, strengths)
        linear.append(accuracy)
        chosen.append(strength)
        nearest.append(knn_accuracy(x, y, test_x, test_y, neighbours))
    return {"strengths": chosen, **_spread("linear", linear), **_spread("knn", nearest)}


def _spread(name: str, accuracies: list[float]) -> dict[str, Any]:
    std = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else 0
    return {name: float(np.mean(accuracies)), f"{name}_std": std, f"{name}_draws": accuracies}


@dataclass(frozen=True)
class ClassProbesResult:
    """Accuracies of one model.

    Attributes:
        cut: the norm above which a patch is an outlier.
        n_train, n_test: images with both an outlier and a normal patch; only these count.
        coverage: their share of the training images in %.
        accuracies: by token type: test top-1 in % of both probes with std over draws, see `token_accuracies`.
    """

    label: str
    cut: float
    n_train: int
    n_test: int
    coverage: float
    classes: int
    accuracies: dict[str, dict[str, Any]] = field(default_factory=dict)


def measure(
    model: VisionTransformer,
    train: LabelledImages,
    test: LabelledImages,
    *,
    outlier_rule: Rule = DEFAULT_RULE,
    outlier_layer: int = -1,
    draws: int = 5,
    neighbours: int = 20,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    label: str = "model",
    report: Callable[[str], None] | None = None,
    track: Callable[[list[str]], Iterable[str]] = iter,
) -> ClassProbesResult:
    """Fit both probes on every type of token. Two passes over the training images, one over the test images.

    Args:
        train, test: batches of images (B,3,H,W) and labels (B,); `train` is iterated twice.
        outlier_rule: see `Rule`, on the norms of the training images.
        outlier_layer: the block whose output is judged.
        draws: random patches per image, with one probe each.
        neighbours: k of the nearest neighbours.
        strengths: C of the logistic regression, of which a fifth of the training images chooses one.
        report: takes a line per token type.
        track: wraps the token types, to show progress.

    Raises:
        UserError: too few images have an outlier patch.
    """
    with evaluation(model) as vit:
        histogram = Histogram()
        norm_layer = check_layer(vit, outlier_layer, "outlier_layer")
        for images in batches(train, vit):
            histogram.add(next(patch_norms(layer) for layer in walk(vit, images) if layer.index == norm_layer))
        cut = outlier_rule.cut(histogram)
        train_bank, test_bank = TokenBank(draws, seed), TokenBank(draws, seed + 1)
        for bank, labelled in ((train_bank, train), (test_bank, test)):
            for images, labels in labelled_batches(labelled, vit):
                bank.add(vit, images, labels, cut, outlier_layer)
    for name, bank in (("train", train_bank), ("val", test_bank)):
        _check_bank(name, bank, label, outlier_rule)
    accuracies: dict[str, dict[str, Any]] = {}
    for token_type in track(train_bank.token_types):
        row = accuracies[token_type] = token_accuracies(train_bank, test_bank, token_type, neighbours, strengths)
        if report:
            report(f"  {token_type}: linear {row['linear']:.2f} +- {row['linear_std']:.2f}, knn {row['knn']:.2f} %")
    covered = train_bank.covered
    return ClassProbesResult(
        label,
        cut,
        n_train=int(covered.sum()),
        n_test=int(test_bank.covered.sum()),
        coverage=100 * float(covered.mean()),
        classes=len(set(train_bank.labels.tolist())),
        accuracies=accuracies,
    )


def _check_bank(name: str, bank: TokenBank, label: str, outlier_rule: Rule) -> None:
    """Refuse a split of which too few images are left; five of a class let a fifth of them choose the strength."""
    labels, numbers = np.unique(bank.labels[bank.covered], return_counts=True)
    if len(labels) < 2 or (name == "train" and numbers.min() < 5):
        raise UserError(
            f"{label}: of the {name} split {int(bank.covered.sum())} images have an outlier patch "
            f"({outlier_rule}), too few (5 of each of 2 classes); take a lower cut or more images"
        )


def summarise(result: ClassProbesResult) -> dict[str, Any]:
    """The row of one model, for json."""
    return {
        "label": result.label,
        "n_train": result.n_train,
        "n_test": result.n_test,
        "coverage": result.coverage,
        "cut": result.cut,
        "classes": result.classes,
        "kinds": result.accuracies,
    }


# Figure


@charts.styled
def draw(results: ClassProbesResult | Sequence[ClassProbesResult]) -> Figure:
    """Accuracy by type of token, a panel per probe, all models side by side."""
    results = as_list(results)
    names = list(dict.fromkeys(name for result in results for name in result.accuracies))
    figure, axes = charts.new_figure(1, 2, 5.0, 0.8 + 0.36 * len(names) * max(1.0, 0.7 * len(results)), sharey=True)
    for ax, probe, title in zip(axes[0], ("linear", "knn"), ("logistic regression", "nearest neighbours"), strict=True):
        for index, result in enumerate(results):
            _draw_bars(ax, result, probe, names, index, len(results))
        ax.axvline(100 / results[0].classes, color=charts.FAINT, lw=1, ls=":")
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


def _draw_bars(ax: Axes, result: ClassProbesResult, probe: str, names: list[str], index: int, models: int) -> None:
    height = 0.78 / models
    rows = [(i, result.accuracies[name]) for i, name in enumerate(names) if name in result.accuracies]
    y = np.array([i for i, _ in rows]) + (index - (models - 1) / 2) * height
    values, spread = [row[probe] for _, row in rows], [row[f"{probe}_std"] for _, row in rows]
    label = f"{result.label} ({result.n_train} train, {result.n_test} test images)"
    ax.barh(y, values, height * 0.9, xerr=spread, color=charts.colour_of(index), alpha=0.85, label=label)
    for position, value, gap in zip(y, values, spread, strict=True):
        ax.annotate(
            f"{value:.1f}", (value + gap, position), (3, 0), textcoords="offset points", va="center", fontsize=7
        )


# Command


def add_parser(subparsers: Any) -> None:
    from .command import add_command

    text = "linear and nearest-neighbour probes of the class from one class, register, normal or outlier token"
    parser = add_command(subparsers, "probes", run, text)
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
    options = {name: getattr(args, name) for name in ("outlier_layer", "draws", "neighbours")}
    results = []
    for loaded, (train, test) in zip(models, sets, strict=True):
        title = f"probes of {loaded.label}"
        more = {
            "outlier_rule": rule,
            "seed": loaded.args.seed,
            "label": loaded.label,
            "report": log,
            "strengths": args.C,
        }
        track = lambda names, title=title: command.track(names, len(names), title)  # noqa: E731
        results.append(measure(loaded.model, train, test, **options, **more, track=track))
    rows = [summarise(result) for result in results]
    out.json("probes", {"outlier_rule": str(rule), "neighbours": args.neighbours, "draws": args.draws, "models": rows})
    for loaded, result in zip(models, results, strict=True):
        draws = {
            f"{name}/{probe}": np.asarray(row[f"{probe}_draws"])
            for name, row in result.accuracies.items()
            for probe in ("linear", "knn")
        }
        out.npz("probes" if len(models) == 1 else f"probes_{loaded.slug}", draws)
    out.figure("probes", draw(results))
