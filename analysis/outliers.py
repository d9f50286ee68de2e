"""Norms of tokens, their distribution in bounded memory, and which of them are outliers.

Shapes: B batch, N tokens, C channels. All sums are in fp32 or better.
"""

from dataclasses import dataclass, field

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
