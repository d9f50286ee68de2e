"""The mathematics of the instruments: norms and outliers, attention, similarity. Tensors in, tensors out.

Shapes: B batch, N tokens, M tokens after a merge, P prefix tokens, n patches at the input, T patch tokens, C channels,
H heads, L layers, (gh,gw) the patch grid. All sums are in fp32 or better.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import UserError
from models.merging import group_map, merge_by_map

from .walk import Layer, to_grid

# Norms and outliers

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
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    number: int = 0
    total: float = 0.0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, values: Tensor) -> None:
        """Count values of any shape."""
        flat = values.detach().double().flatten()
        place = ((flat.clamp(min=LOWEST).log10() - np.log10(LOWEST)) * (BINS / DECADES)).long().clamp(0, BINS - 1)
        self.counts += torch.bincount(place, minlength=BINS).cpu().numpy()
        self.number += flat.numel()
        self.total += float(flat.sum())
        self.squares += float((flat**2).sum())
        self.largest = max(self.largest, float(flat.max()))

    @property
    def mean(self) -> float:
        return self.total / self.number

    @property
    def std(self) -> float:
        """Of the population."""
        return max(0.0, self.squares / self.number - self.mean**2) ** 0.5

    def quantile(self, q: float) -> float:
        """The value below which a share q lies (upper edge of its bin, at most the largest value)."""
        place = int(np.searchsorted(self.counts.cumsum(), q * self.number))
        return min(float(bin_edges()[min(place, BINS - 1) + 1]), self.largest)

    def share_above(self, cut: float) -> float:
        """Share of values above a cut, which is moved to the nearest edge of a bin."""
        place = int(np.abs(bin_edges() - cut).argmin())
        return float(self.counts[place:].sum()) / self.number

    def summary(self) -> dict[str, float]:
        """Mean, std, quantiles, maximum and their ratio."""
        found = {"mean": self.mean, "std": self.std} | {name: self.quantile(q) for name, q in LEVELS.items()}
        return found | {"max": self.largest, "max_over_median": self.largest / found["median"]}

    def rebinned(self, bins: int) -> np.ndarray:
        """Counts in fewer bins (a divisor of BINS)."""
        return self.counts.reshape(bins, -1).sum(axis=1)


def bin_edges(bins: int = BINS) -> np.ndarray:
    """Edges (bins+1,) of `Histogram`'s bins."""
    return LOWEST * 10 ** (np.arange(bins + 1) * (DECADES / bins))


@dataclass(frozen=True)
class Rule:
    """What counts as an outlier: `quantile:0.98`, `sigma:3` (mean + 3 std), `ratio:3` (3 medians), `abs:150`."""

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Rule":
        kind, _, number = text.partition(":")
        limits = {"quantile": (0, 1), "sigma": (0, 1e6), "ratio": (0, 1e6), "abs": (0, 1e9)}
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if kind not in limits or not limits[kind][0] < value < limits[kind][1]:
            raise UserError(f"outlier rule {text!r} is none of quantile:0.98, sigma:3, ratio:3, abs:150")
        return cls(kind, value)

    def cut(self, histogram: Histogram) -> float:
        """The norm above which a token is an outlier."""
        if self.kind == "abs":
            return self.value
        if self.kind == "sigma":
            return histogram.mean + self.value * histogram.std
        if self.kind == "ratio":
            return histogram.quantile(0.5) * self.value
        return histogram.quantile(self.value)

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:g}"


def bimodality(histogram: Histogram) -> dict[str, float]:
    """Is a distribution two heaps? Numbers for it.

    Otsu's threshold and the share of the variance that lies between its two sides (1: two points; 0.64 for a normal,
    0.75 for a uniform distribution, so only what is clearly above speaks for two heaps), and Sarle's coefficient
    (skewness^2 + 1) / kurtosis (1/3 for a normal, 5/9 for a uniform distribution; a heavy tail alone raises it too).
    """
    edges = bin_edges()
    x, weight = np.sqrt(edges[1:] * edges[:-1]), histogram.counts / histogram.number
    mean = (weight * x).sum()
    variance = (weight * (x - mean) ** 2).sum()
    if variance <= 1e-12 * mean**2:
        return {"otsu_threshold": float(mean), "otsu_between": 0.0, "sarle": 0.0}
    below, below_sum = weight.cumsum(), (weight * x).cumsum()
    inside = (below > 0) & (below < 1 - 1e-12)
    between = np.zeros_like(x)
    between[inside] = (mean * below - below_sum)[inside] ** 2 / (below * (1 - below))[inside]
    skewness = (weight * (x - mean) ** 3).sum() / variance**1.5
    kurtosis = (weight * (x - mean) ** 4).sum() / variance**2
    best = np.nonzero(between == between.max())[0]  # a plateau where bins between two heaps are empty: its middle
    result = {"otsu_threshold": edges[best + 1].mean(), "otsu_between": between.max() / variance}
    return {key: float(value) for key, value in (result | {"sarle": (skewness**2 + 1) / kurtosis}).items()}


# Attention


def per_patch(columns: Tensor, layer: Layer) -> Tensor:
    """Attention to tokens, spread over the patches in them: (B,...,N) -> (B,...,gh,gw).

    A token's mass is divided by the patches it stands for, so that a map sums to the mass on all patches whether or
    not something merged.
    """
    spread = columns[..., layer.num_prefix_tokens :] / _like(layer.before.size[:, layer.num_prefix_tokens :], columns)
    rows_last = spread.movedim(-1, 1)
    return to_grid(rows_last, layer.before.group, layer.grid).movedim((1, 2), (-2, -1))


def _like(size: Tensor, columns: Tensor) -> Tensor:
    return size.to(columns.dtype).view(len(size), *[1] * (columns.ndim - 2), -1)


def patch_rows(attention: Tensor, layer: Layer, patches: list[tuple[int, int]]) -> Tensor:
    """Rows of the tokens that hold the given patches (row, column): (B,H,N,N) -> (B,H,len(patches),N)."""
    index = torch.tensor([row * layer.grid[1] + column for row, column in patches], device=attention.device)
    rows = layer.before.group[:, index] + layer.num_prefix_tokens
    return attention.gather(2, rows[:, None, :, None].expand(-1, attention.shape[1], -1, attention.shape[3]))


def mass_by_kind(rows: Tensor, layer: Layer) -> dict[str, Tensor]:
    """Attention that rows (...,N) spend on class, distillation, registers and patches: each (...)."""
    names = [kind.split()[0] for kind in layer.token_types]
    mass: dict[str, Tensor] = {}
    for index, name in enumerate(names):
        key = "registers" if name == "register" else name
        mass[key] = mass.get(key, 0) + rows[..., index]
    return mass | {"patches": rows[..., layer.num_prefix_tokens :].sum(dim=-1)}


def spread_metrics(maps: Tensor) -> dict[str, Tensor]:
    """How concentrated maps (...,gh,gw) over the patches are, of their own mass: each (...).

    entropy: 1 spread evenly, 0 all on one patch; top_patch: share of the strongest patch; top_2_percent: share of the
    strongest 2 % of the patches (at least one).
    """
    flat = maps.flatten(-2).float()
    share = flat / flat.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    patches = share.shape[-1]
    entropy = -torch.special.xlogy(share, share).sum(dim=-1) / np.log(max(2, patches))
    strongest = share.sort(dim=-1, descending=True).values
    few = max(1, round(0.02 * patches))
    return {"entropy": entropy, "top_patch": strongest[..., 0], "top_2_percent": strongest[..., :few].sum(dim=-1)}


class Rollout:
    """Attention rollout (arXiv 2005.00928): how much of each input token reaches each token, block after block.

    Every block mixes by (mean over heads + identity) / 2; a merge averages the rows of a group by size. Columns are the
    prefix tokens and the n patches of the input, so the result needs no un-merging.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None  # (B,M,S): S = all prefix tokens so far, then n patches
        self.kinds: tuple[str, ...] = ()

    def add(self, layer: Layer, attention: Tensor) -> None:
        """Take in one block and its map (B,H,N,N)."""
        rows = self._entered(layer)
        mixed = (attention.mean(dim=1).float() @ rows + rows) / 2
        if layer.merge is not None:
            left = layer.after.x.shape[1]
            mixed = merge_by_map(mixed, group_map(layer.merge), left, layer.before.size)
        self.rows = mixed

    def _entered(self, layer: Layer) -> Tensor:
        """Rows and columns for prefix tokens that enter with this block."""
        batch, patches = layer.before.group.shape
        if self.rows is None:
            rows = torch.eye(patches, device=layer.before.x.device).expand(batch, -1, -1)
        else:
            rows = self.rows
        for index, kind in enumerate(layer.token_types):
            if kind not in self.kinds:
                rows = _insert(_insert(rows, 1, index), 2, index)
                rows[:, index, index] = 1.0
        self.kinds = layer.token_types
        return rows

    def to_patches(self, grid: tuple[int, int]) -> Tensor:
        """What reaches the first prefix token (without any: the mean patch) from each patch: (B,gh,gw)."""
        assert self.rows is not None, "add comes first"
        row = self.rows[:, 0] if self.kinds else self.rows.mean(dim=1)
        return row[:, len(self.kinds) :].unflatten(1, grid)


def _insert(x: Tensor, dim: int, index: int) -> Tensor:
    """A slice of zeros at `index`."""
    before, after = x.split((index, x.shape[dim] - index), dim=dim)
    return torch.cat((before, torch.zeros_like(x.narrow(dim, 0, 1)), after), dim=dim)


# Similarity


OFFSETS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


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
    """Cosines of two populations (normal, outlier) in bounded memory: 4096 bins over [-1, 1]."""

    bins: int = 4096
    counts: np.ndarray = field(init=False)
    sums: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.counts, self.sums = np.zeros((2, self.bins), dtype=np.int64), np.zeros(2)

    def add(self, cosines: Tensor, outlier: Tensor) -> None:
        """Count cosines (any shape, NaN left out) with a flag each."""
        valid = ~cosines.isnan()
        values, labels = cosines[valid].double(), outlier[valid].long()
        place = ((values.clamp(-1, 1) + 1) / 2 * self.bins).long().clamp(max=self.bins - 1)
        found = torch.bincount(labels * self.bins + place, minlength=2 * self.bins)
        self.counts += found.view(2, self.bins).cpu().numpy()
        self.sums += torch.bincount(labels, weights=values, minlength=2).cpu().numpy()

    @property
    def centres(self) -> np.ndarray:
        return (np.arange(self.bins) + 0.5) / self.bins * 2 - 1

    def summary(self) -> dict[str, float]:
        """Pairs, mean and median of both, and the AUC: the chance that an outlier's pair is more similar."""
        numbers = self.counts.sum(axis=1)
        found: dict[str, float] = {}
        for name, count, total, row in zip(("normal", "outlier"), numbers, self.sums, self.counts, strict=True):
            found[f"{name}_pairs"] = int(count)
            found[f"{name}_mean"] = float(total / count) if count else float("nan")
            middle = int(np.searchsorted(row.cumsum(), count / 2))
            found[f"{name}_median"] = float(self.centres[min(middle, self.bins - 1)]) if count else float("nan")
        return found | {"auc": area_under_curve(self.counts[1], self.counts[0])}


def area_under_curve(first: np.ndarray, second: np.ndarray) -> float:
    """Chance that a draw of the first histogram is larger than one of the second, ties counted half."""
    pairs = float(first.sum()) * float(second.sum())
    if not pairs:
        return float("nan")
    below = second.cumsum() - second
    return float((first * (below + second / 2)).sum() / pairs)


@dataclass
class GroupCosines:
    """Mean cosine within and between sets of tokens, from sums of unit vectors alone: exact, and linear in tokens.

    The mean over all ordered pairs of distinct members of a set is (|sum u|^2 - n) / (n (n - 1)).
    """

    pairs: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    everywhere: dict[str, Any] = field(default_factory=dict)  # name -> [sum of u, sum of |image sum|^2, n, sum of n^2]

    def add(self, x: Tensor, outlier: Tensor, others: dict[str, Tensor] | None = None) -> None:
        """Take in a batch.

        Args:
            x: (B,T,C) tokens.
            outlier: (B,T) bool.
            others: more tokens (B,C) by name, compared with outlier and normal ones.
        """
        unit = F.normalize(x.double(), dim=-1)
        sets = {"outlier": outlier, "normal": ~outlier}
        total = {name: (unit * chosen.unsqueeze(-1)).sum(dim=1) for name, chosen in sets.items()}
        number = {name: chosen.sum(dim=1).double() for name, chosen in sets.items()}
        for name in sets:
            n, inner = number[name], total[name].square().sum(dim=1)
            self._count(f"{name}-{name}", inner - n, n * (n - 1))
            row = self.everywhere.setdefault(name, [torch.zeros_like(total[name][0]), 0.0, 0.0, 0.0])
            row[0] += total[name].sum(dim=0)
            for place, value in enumerate((inner, n, n**2), start=1):
                row[place] += float(value.sum())
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
        found = {key: _ratio(self.sums[key], pairs) for key, pairs in self.pairs.items()}
        for name, (total, inner, n, squares) in self.everywhere.items():
            found[f"{name}-{name} across images"] = _ratio(float(total.square().sum()) - inner, n**2 - squares)
        return found


def _ratio(total: float, pairs: float) -> float | None:
    return total / pairs if pairs > 0.5 else None


def map_cosines(maps: Tensor) -> Tensor:
    """Cosines of maps with each other: (B,K,...) -> (B,K,K)."""
    unit = F.normalize(maps.flatten(2).float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment (arXiv 1905.00414) of the same S samples: (S,C), (S,D) -> in [0,1]."""
    x, y = (part.double() - part.double().mean(dim=0, keepdim=True) for part in (first, second))
    if len(x) < min(x.shape[1], y.shape[1]):  # the same number from the smaller matrices
        kx, ky = x @ x.T, y @ y.T
        return float((kx * ky).sum() / (kx.norm() * ky.norm()))
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def layer_tables(samples: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The same tokens in all layers (L,S,C) against each other: linear CKA (L,L) and mean cosine (L,L)."""
    layers = len(samples)
    cka = np.eye(layers)
    centred = samples.float() - samples.float().mean(dim=1, keepdim=True)
    scaled = [
        x / (x.T @ x).norm().sqrt().clamp(min=1e-20) for x in centred
    ]  # so that `linear_cka` needs no denominator
    for i in range(layers):
        for j in range(i):
            cka[i, j] = cka[j, i] = float((scaled[i].T @ scaled[j]).square().sum())
    unit = F.normalize(samples.float(), dim=-1)
    cosine = torch.einsum("isc,jsc->ij", unit, unit) / samples.shape[1]
    return cka, cosine.cpu().numpy()
