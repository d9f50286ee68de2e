"""Intervals over images: 95 %, by the bootstrap, and none where fewer than five images contribute.

The patches of an image resemble each other, so images are what is resampled. All draws come from one seed: two models
that saw the same images are resampled alike, and their difference is paired.

Shapes: I images, K columns of a table of sums.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LEAST = 5  # images that an interval needs: fewer say nothing about others
DRAWS, TOGETHER = 1000, 50  # draws, and how many are summed at once
Statistic = Callable[[np.ndarray], float]  # of sums (K,) over images


def resample(table: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield sums over images drawn with replacement: (I,K) -> `draws` times (K,)."""
    generator, images = np.random.default_rng(seed), len(table)
    table = np.asarray(table, dtype=float)
    for start in range(0, draws, TOGETHER):
        drawn = [generator.integers(0, images, images) for _ in range(min(TOGETHER, draws - start))]
        weights = np.stack([np.bincount(places, minlength=images) for places in drawn]).astype(float)
        yield from weights @ table


def middle(values: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of the values that are numbers; None if there are none."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    return (float(np.quantile(finite, 0.025)), float(np.quantile(finite, 0.975))) if len(finite) else None


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: NaN where no image contributes.
        ci95: None where fewer than `LEAST` images contribute, or all of them agree.
        n: images that contribute, which may be fewer than were read.
    """

    value: float
    ci95: tuple[float, float] | None
    n: int

    @property
    def shown(self) -> bool:
        """Tell whether there are images enough to draw it."""
        return self.n >= LEAST and bool(np.isfinite(self.value))

    def named(self, name: str, factor: float = 1.0) -> dict[str, float | int | list[float] | None]:
        """For json: NAME, NAME_ci95 and NAME_n."""
        span = None if self.ci95 is None else [factor * bound for bound in self.ci95]
        return {name: factor * self.value, f"{name}_ci95": span, f"{name}_n": self.n}


def ratio(total: float, count: float) -> float:
    """total / count, NaN where there is nothing to divide by."""
    return float(total / count) if count else float("nan")


def estimate(table: np.ndarray, statistic: Statistic, contributes: np.ndarray | None = None) -> Estimate:
    """A statistic of sums over images, with its interval.

    Args:
        table: (I,K) per image.
        contributes: (I,) bool; None: all images do.
    """
    number = len(table) if contributes is None else int(contributes.sum())
    value = statistic(table.sum(axis=0)) if len(table) else float("nan")
    if number < LEAST:
        return Estimate(value, None, number)
    span = middle([statistic(sums) for sums in resample(table)])
    # images that all agree: an interval of no width would claim certainty
    return Estimate(value, None if span is None or span[0] == span[1] else span, number)


def mean_over(sums: np.ndarray, counts: np.ndarray) -> Estimate:
    """A mean over things of which image i has counts[i], with sum sums[i]; images without any do not contribute."""
    table = np.stack((sums, counts), axis=1).astype(float)
    return estimate(table, lambda row: ratio(row[0], row[1]), counts > 0)


def mean(values: np.ndarray) -> Estimate:
    """The mean of one value per image (I,)."""
    return mean_over(values, np.ones(len(values)))


def difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """The paired difference second - first of one value per image (I,), of the images where both are numbers."""
    gap = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    return mean(gap[np.isfinite(gap)])


def paired(first: np.ndarray, second: np.ndarray, statistic: Statistic, contribute: Sequence[np.ndarray]) -> Estimate:
    """statistic(second) - statistic(first), of tables (I,K) of the same images, which are resampled together.

    Args:
        contribute: (I,) bool of each of the two; the one with fewer images counts.
    """
    width = first.shape[1]
    joined = np.concatenate((first, second), axis=1)
    fewer = min(contribute, key=lambda flags: int(flags.sum()))
    return estimate(joined, lambda row: statistic(row[width:]) - statistic(row[:width]), fewer)


def text(estimate: Estimate, digits: int = 2, factor: float = 1.0) -> str:
    """A number for tables and captions: `1.99 [1.2, 2.7]`; `too few (n = 1)` below five images."""
    if not estimate.shown:
        return f"too few images (n = {estimate.n})"
    value = f"{factor * estimate.value:.{digits}f}"
    if estimate.ci95 is None:
        return value
    low, high = (factor * bound for bound in estimate.ci95)
    return f"{value} [{low:.{digits}f}, {high:.{digits}f}]"
