"""Norms of tokens, their distribution in bounded memory, and which of them are outliers.

Shapes: B batch, N tokens, C channels. All sums are in fp32 or better.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models import UserError

BINS = 2**14
LOWEST, DECADES = 1e-4, 10.0  # bins from 1e-4 to 1e6, each 0.14 % wide
LEVELS = {"median": 0.5, "p95": 0.95, "p98": 0.98, "p99.5": 0.995}


def norms(x: Tensor) -> Tensor:
    """L2 norm of every token in fp32: (...,C) -> (...)."""
    return x.float().norm(dim=-1)


@dataclass
class Histogram:
    """A distribution of positive values in bounded memory: logarithmic bins over ten decades, exact moments.

    A quantile is right to within one bin, 0.14 % of its value, in a single pass and for any number of values.

    Attributes:
        counts: (BINS,) values per bin.
        number, total, squares, largest: how many values there are, their sum, the sum of their squares, their maximum.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    number: int = 0
    total: float = 0.0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, values: Tensor) -> None:
        """Count values of any shape."""
        flat = values.detach().double().flatten()
        index = ((flat.clamp(min=LOWEST).log10() - np.log10(LOWEST)) * (BINS / DECADES)).long().clamp(0, BINS - 1)
        self.counts += torch.bincount(index, minlength=BINS).cpu().numpy()
        self.number += flat.numel()
        self.total += float(flat.sum())
        self.squares += float((flat**2).sum())
        self.largest = max(self.largest, float(flat.max()))

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return self.total / self.number

    @property
    def std(self) -> float:
        """Standard deviation of the values, taken as the whole population."""
        return max(0.0, self.squares / self.number - self.mean**2) ** 0.5

    def quantile(self, q: float) -> float:
        """The value below which a share q lies (upper edge of its bin, at most the largest value)."""
        index = int(np.searchsorted(self.counts.cumsum(), q * self.number))
        return min(float(bin_edges()[min(index, BINS - 1) + 1]), self.largest)

    def share_above(self, cut: float) -> float:
        """Share of values above a cut, which is moved to the nearest edge of a bin."""
        index = int(np.abs(bin_edges() - cut).argmin())
        return float(self.counts[index:].sum()) / self.number

    def summary(self) -> dict[str, float]:
        """Mean, std, quantiles, maximum and the ratio of maximum and median."""
        quantiles = {name: self.quantile(q) for name, q in LEVELS.items()}
        return {
            "mean": self.mean,
            "std": self.std,
            **quantiles,
            "max": self.largest,
            "max_over_median": self.largest / quantiles["median"],
        }

    def rebinned(self, bins: int) -> np.ndarray:
        """Counts in fewer bins (a divisor of BINS)."""
        return self.counts.reshape(bins, -1).sum(axis=1)


def bin_edges(bins: int = BINS) -> np.ndarray:
    """Edges (bins+1,) of `Histogram`'s bins."""
    return LOWEST * 10 ** (np.arange(bins + 1) * (DECADES / bins))


@dataclass(frozen=True)
class Rule:
    """A rule that tells outliers: `quantile:0.98`, `sigma:3` (mean + 3 std), `ratio:3` (3 medians), `abs:150`."""

    HELP: ClassVar[str] = "quantile:Q, sigma:K (mean + K std), ratio:M (M medians) or abs:NORM, made on the first model"

    name: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Read a rule as the command line writes it.

        Raises:
            UserError: the text is no rule.
        """
        name, _, number = text.partition(":")
        limits = {"quantile": (0, 1), "sigma": (0, 1e6), "ratio": (0, 1e6), "abs": (0, 1e9)}
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in limits or not limits[name][0] < value < limits[name][1]:
            raise UserError(f"outlier rule {text!r} is none of quantile:0.98, sigma:3, ratio:3, abs:150")
        return cls(name, value)

    def cut(self, histogram: Histogram) -> float:
        """The norm above which a token is an outlier."""
        if self.name == "abs":
            return self.value
        if self.name == "sigma":
            return histogram.mean + self.value * histogram.std
        if self.name == "ratio":
            return histogram.quantile(0.5) * self.value
        return histogram.quantile(self.value)

    def __str__(self) -> str:
        return f"{self.name}:{self.value:g}"


DEFAULT_RULE = Rule("quantile", 0.98)
SHARED, SCALED = "shared", "shared_scaled"  # the cut as it is, and scaled by the medians


@dataclass(frozen=True)
class Yardstick:
    """The one cut by which all models of a comparison are judged: that of a rule on the first model's patches.

    A rule of each model's own cannot show a difference: its own 98 % quantile always labels 2 %. Where all norms of a
    model are smaller, on the other hand, fewer lie above a shared cut although their spread may be the same. So two
    cuts are applied side by side, the shared one and the shared one times the ratio of the models' medians.

    Attributes:
        rule: that made the cut.
        of: label of the model that it was made on.
        cut: the norm above which a patch is an outlier.
        median: of the norms of that model's patches.
    """

    rule: Rule
    of: str
    cut: float
    median: float

    @classmethod
    def made_on(cls, histogram: Histogram, rule: Rule = DEFAULT_RULE, label: str = "model") -> "Yardstick":
        """The yardstick that a rule makes of the patch norms of one model."""
        return cls(rule, label, rule.cut(histogram), histogram.quantile(0.5))

    def cuts(self, histogram: Histogram) -> dict[str, float]:
        """The two cuts for a model with these norms: as it is (`SHARED`), and scaled by the medians (`SCALED`)."""
        return {SHARED: self.cut, SCALED: self.cut * histogram.quantile(0.5) / self.median}

    @property
    def own_share(self) -> float | None:
        """The share of its own model's patches that lies above, where the rule alone decides it."""
        return 1 - self.rule.value if self.rule.name == "quantile" else None

    def __str__(self) -> str:
        own = "" if self.rule.name == "abs" else f", {self.rule} of {self.of}"
        return f"norm > {self.cut:.1f}{own}"


def describe_cuts(yardstick: Yardstick, scaled: dict[str, float]) -> str:
    """A line for figures: the shared cut, the scaled one of every model (by label) that differs, and what is circular.

    Args:
        scaled: the cut scaled by the medians, by the model's label.
    """
    text = f"outliers: {yardstick} (shared by all models)" if len(scaled) > 1 else f"outliers: {yardstick}"
    others = [f"{cut:.1f} in {label}" for label, cut in scaled.items() if abs(cut - yardstick.cut) > 1e-3 * cut]
    if others:
        text += f"; scaled by the medians: {', '.join(others)}"
    if yardstick.own_share is not None:
        text += f". {yardstick.of} has {100 * yardstick.own_share:g} % above it by construction: a model's own "
        text += "quantile always finds its share"
    return text


# what `bimodality` gives for distributions of one mode: beside these its numbers are to be read
BIMODALITY_REFERENCES = {
    "normal": {"otsu_between": 2 / np.pi, "sarle": 1 / 3},
    "uniform": {"otsu_between": 0.75, "sarle": 5 / 9},
}


def bimodality(histogram: Histogram) -> dict[str, float]:
    """Bimodality statistics of a histogram.

    Returns:
        otsu_threshold: the cut that leaves the largest share of the variance between its two sides.
        otsu_between: that share. 1 for two points, 0.64 for a normal, 0.75 for a uniform distribution, so that only
            what is clearly above speaks for two modes.
        sarle: Sarle's coefficient (skewness^2 + 1) / kurtosis. 1/3 for a normal, 5/9 for a uniform distribution; a
            heavy tail alone raises it too.
    """
    edges = bin_edges()
    x, weight = np.sqrt(edges[1:] * edges[:-1]), histogram.counts / histogram.number
    mean = (weight * x).sum()
    variance = (weight * (x - mean) ** 2).sum()
    if variance <= 1e-12 * mean**2:
        return {"otsu_threshold": float(mean), "otsu_between": 0.0, "sarle": 0.0}
    # Otsu (1979): with the share w of the values below a cut and their sum m (all values: mean), the variance between
    # the two sides is (mean * w - m)^2 / (w * (1 - w)); running sums give it for all cuts at once. Where one side is
    # empty there is nothing to divide by.
    below, below_sum = weight.cumsum(), (weight * x).cumsum()
    two_sides = (below > 0) & (below < 1 - 1e-12)
    between = np.zeros_like(x)
    between[two_sides] = (mean * below - below_sum)[two_sides] ** 2 / (below * (1 - below))[two_sides]
    # empty bins between two modes are a plateau of equally good cuts: take its middle
    best = np.nonzero(between == between.max())[0]
    skewness = (weight * (x - mean) ** 3).sum() / variance**1.5
    kurtosis = (weight * (x - mean) ** 4).sum() / variance**2
    return {
        "otsu_threshold": float(edges[best + 1].mean()),
        "otsu_between": float(between.max() / variance),
        "sarle": float((skewness**2 + 1) / kurtosis),
    }


def add_outlier_rule(parser: Any, default: Rule = DEFAULT_RULE) -> None:
    """Add --outlier_rule, as text: `Rule.parse` reads it in the command, whose errors say what is wrong."""
    text = f"which patches are outliers: {Rule.HELP} (default: {default})"
    parser.add_argument("--outlier_rule", default=str(default), metavar="RULE", help=text.replace("%", "%%"))
