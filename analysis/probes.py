"""What single tokens know: patch reconstruction, position, and class, from frozen features.

Reconstruction follows Darcet et al. (arXiv 2309.16588): one probe is trained on all patches and its error split into
outlier and normal patches afterwards. Because outliers tend to sit where the image is uniform, which is easy to
reconstruct, the same error is also compared with normal patches of the same image that match in contrast or in
likeness to their neighbours.

Shapes: B batch or images, n patches, C channels, V = patch height * width * 3 values of a patch, K classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import UserError
from models.vit import MergingViT

from .similarity import neighbour_cosines
from .walk import to_grid, walk

# Targets and features


def patch_targets(images: Tensor, patch: tuple[int, int], standardise: bool = False) -> Tensor:
    """Pixels of every patch, row by row, column by column, channel by channel: (B,3,H,W) -> (B,n,V).

    standardise: every patch to mean 0 and variance 1, as masked autoencoders do.
    """
    height, width = patch
    rows, columns = images.shape[-2] // height, images.shape[-1] // width
    x = images.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # (B,3,h,p,w,q)
    x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    if not standardise:
        return x
    return (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def fold_targets(targets: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of `patch_targets`: (B,n,V) -> (B,3,H,W)."""
    x = targets.unflatten(2, (*patch, 3)).unflatten(1, grid)  # (B,h,w,p,q,3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


@dataclass(frozen=True)
class Feature:
    """Which tokens a probe reads: `prenorm` (last block, through a LayerNorm without weights), `postnorm` (after the
    final norm) or `layer:k` (after block k, as prenorm)."""

    kind: str = "prenorm"
    layer: int = -1

    @classmethod
    def parse(cls, text: str) -> "Feature":
        """
        Raises:
            UserError: not a feature.
        """
        kind, _, number = text.partition(":")
        if text in ("prenorm", "postnorm"):
            return cls(text)
        if kind == "layer" and number.lstrip("-").isdigit():
            return cls(kind, int(number))
        raise UserError(f"--feat {text!r} is none of prenorm, postnorm, layer:K")

    def index(self, depth: int) -> int:
        if not -depth <= self.layer < depth:
            raise UserError(f"--feat layer:{self.layer}: the model has blocks 0..{depth - 1}")
        return self.layer % depth


@torch.no_grad()
def patch_features(model: MergingViT, images: Tensor, feature: Feature, outlier_layer: int = -1) -> tuple[Tensor, ...]:
    """Features (B,n,C) of every patch (of the token it is in) and the norm (B,n) of that token at outlier_layer."""
    depth = len(model.blocks)
    wanted, judged = feature.index(depth), outlier_layer % depth
    features = norms = None
    for layer in walk(model, images):
        patches = to_grid(layer.after.x[:, layer.num_prefix_tokens :], layer.after.group, layer.grid).flatten(1, 2)
        if layer.index == wanted:
            features = model.norm(patches) if feature.kind == "postnorm" else F.layer_norm(patches, patches.shape[-1:])
        if layer.index == judged:
            norms = patches.float().norm(dim=-1)
    assert features is not None and norms is not None
    return features.float(), norms


class Store:
    """Features, pictures and norms of many images in files of a folder, so that memory holds one batch only."""

    def __init__(self, folder: Path, images: int, tokens: tuple[int, int], pixels: tuple[int, int]) -> None:
        self.size, self._next = images, 0
        kinds: dict[str, tuple[Any, tuple[int, ...]]] = {
            "features": (np.float16, tokens),
            "images": (np.float16, (3, *pixels)),
            "norms": (np.float32, tokens[:1]),
        }
        self._arrays = {
            name: np.memmap(folder / name, kind, "w+", shape=(images, *shape)) for name, (kind, shape) in kinds.items()
        }

    def add(self, features: Tensor, images: Tensor, norms: Tensor) -> None:
        """Append a batch."""
        end = self._next + len(features)
        for name, values in (("features", features), ("images", images), ("norms", norms)):
            self._arrays[name][self._next : end] = values.cpu().numpy()
        self._next = end

    def __len__(self) -> int:
        return self._next

    @property
    def norms(self) -> Tensor:
        """(images,n)."""
        return torch.from_numpy(np.array(self._arrays["norms"][: self._next]))

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Features (B,n,C) and images (B,3,H,W) in fp32."""
        order = np.asarray(indices)
        found = [torch.from_numpy(self._arrays[name][order].astype(np.float32)) for name in ("features", "images")]
        return found[0], found[1]

    def batches(
        self, indices: Sequence[int], size: int, seed: int | None = None
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """(indices, features, images) of `size` images at a time, shuffled by a seed."""
        order = np.asarray(indices)
        order = order if seed is None else np.random.default_rng(seed).permutation(order)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            yield chosen, *self.read(chosen)


@dataclass(frozen=True)
class Folds:
    """Images of a set that fit a probe, that stop its training, and that judge it."""

    fit: list[int]
    stop: list[int]
    test: list[int]

    @classmethod
    def alternate(cls, images: int) -> "Folds":
        """Odd ones judge; of the even ones every tenth stops. Sets sorted by class stay balanced.

        Raises:
            UserError: too few images.
        """
        if images < 8:
            raise UserError(f"a probe needs at least 8 images, there are {images}")
        even = list(range(0, images, 2))
        stop = even[::10]
        return cls([i for i in even if i not in set(stop)], stop, list(range(1, images, 2)))


# Probes


class LeastSquares:
    """The best linear probe, exactly: normal equations in one pass and double precision, whatever the data's size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.cross = torch.zeros(inputs + 1, outputs, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count examples x (...,C) with targets y (...,V)."""
        x = F.pad(x.reshape(-1, x.shape[-1]).double(), (0, 1), value=1.0)
        self.gram += x.T @ x
        self.cross += x.T @ y.reshape(-1, y.shape[-1]).double()

    def solve(self, ridge: float = 1e-6) -> nn.Linear:
        """The probe; ridge is relative to the mean diagonal, and keeps features of lower rank solvable."""
        scale = self.gram.diagonal()[:-1].mean()
        penalty = torch.full((len(self.gram),), float(ridge * scale), dtype=torch.float64)
        penalty[-1] = 0.0
        weight = torch.linalg.solve(self.gram + penalty.diag(), self.cross)
        probe = nn.Linear(weight.shape[0] - 1, weight.shape[1])
        with torch.no_grad():
            probe.weight.copy_(weight[:-1].T)
            probe.bias.copy_(weight[-1])
        return probe


def mean_target(store: Store, folds: Folds, target: Callable[[Tensor], Tensor], batch: int = 16) -> Tensor:
    """The target (V,) of the mean patch: what a probe that reads nothing would say."""
    sums = [target(images).double().mean(dim=1).sum(dim=0) for _, _, images in store.batches(folds.fit, batch)]
    return (torch.stack(sums).sum(dim=0) / len(folds.fit)).float()


RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)


def fit_linear(store: Store, folds: Folds, target: Callable[[Tensor], Tensor], batch: int = 16) -> nn.Linear:
    """The least-squares probe of target(images) (B,n,V), with the ridge that suits the stopping images best."""
    equations = None
    for _, x, images in store.batches(folds.fit, batch):
        y = target(images)
        equations = equations or LeastSquares(x.shape[-1], y.shape[-1])
        equations.add(x, y)
    assert equations is not None
    square = lambda y, images: (y - target(images)).square().mean()  # noqa: E731
    probes = [equations.solve(ridge) for ridge in RIDGES]
    return min(probes, key=lambda probe: _mean_loss(probe, store, folds.stop, square, batch))


def mlp_probe(inputs: int, outputs: int) -> nn.Sequential:
    """C -> 4C -> V with GELU."""
    return nn.Sequential(nn.Linear(inputs, 4 * inputs), nn.GELU(), nn.Linear(4 * inputs, outputs))


def train_probe(
    probe: nn.Module,
    store: Store,
    folds: Folds,
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int = 20,
    patience: int = 4,
    batch: int = 16,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """Adam at 1e-3, cosine to 0, until `epochs` or until the loss on the stopping images no longer falls; best weights.

    Args:
        loss: of the probe's output (B,n,...) and the images (B,3,H,W).
    """
    optimizer = torch.optim.Adam(probe.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best, best_state, waited = float("inf"), {k: v.clone() for k, v in probe.state_dict().items()}, 0
    for epoch in range(epochs):
        for _, x, images in store.batches(folds.fit, batch, seed=seed + epoch):
            optimizer.zero_grad()
            loss(probe(x), images).backward()
            optimizer.step()
        schedule.step()
        value = _mean_loss(probe, store, folds.stop, loss, batch)
        report(f"epoch {epoch + 1}/{epochs}: loss {value:.5f} on the stopping images")
        waited = 0 if value < best else waited + 1
        if value < best:
            best, best_state = value, {k: v.clone() for k, v in probe.state_dict().items()}
        if waited >= patience:
            break
    probe.load_state_dict(best_state)
    return probe.eval()


@torch.no_grad()
def _mean_loss(
    probe: nn.Module, store: Store, indices: list[int], loss: Callable[[Tensor, Tensor], Tensor], batch: int
) -> float:
    total = sum(float(loss(probe(x), images)) * len(x) for _, x, images in store.batches(indices, batch))
    return total / len(indices)


def position_loss(logits: Tensor, _: Tensor) -> Tensor:
    """Cross entropy of the patch's own place: logits (B,n,n)."""
    places = torch.arange(logits.shape[1]).expand(len(logits), -1)
    return F.cross_entropy(logits.flatten(0, 1), places.flatten())


# Judging, split by outlier and normal


@dataclass
class Split:
    """Per image: sums over its outlier and over its normal patches of some error, and how many there are.

    Means are over patches; confidence intervals resample images, because patches of an image are not independent.
    """

    rows: list[Tensor] = field(default_factory=list)  # (B,4): outlier sum, outlier count, normal sum, normal count

    def add(self, errors: Tensor, outlier: Tensor) -> None:
        """Count errors (B,n) with a flag each."""
        e, o = errors.double(), outlier.double()
        self.rows.append(torch.stack(((e * o).sum(1), o.sum(1), (e * (1 - o)).sum(1), (1 - o).sum(1)), dim=1))

    def summary(self, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Means of all, normal and outlier patches, and outlier / normal with a 95 % interval over images."""
        table = torch.cat(self.rows)
        total = table.sum(dim=0)
        found = _means(total)
        found["all"] = float((total[0] + total[2]) / (total[1] + total[3]))
        found |= {"outlier_patches": int(total[1]), "normal_patches": int(total[3]), "images": len(table)}
        sampled = [_means(row) for row in resample(table, draws, seed)]
        for name in ("outlier", "normal", "ratio"):
            found[f"{name}_ci95"] = interval([row[name] for row in sampled])
        return found


def _means(row: Tensor) -> dict[str, Any]:
    outlier, normal = (float(row[i] / row[i + 1]) if row[i + 1] > 0 else float("nan") for i in (0, 2))
    return {"outlier": outlier, "normal": normal, "ratio": outlier / normal if normal else float("nan")}


def resample(table: Tensor, draws: int, seed: int) -> Iterator[Tensor]:
    """Sums over images drawn with replacement: (images,k) -> draws times (k,)."""
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        weight = np.bincount(generator.integers(0, len(table), len(table)), minlength=len(table))
        yield torch.from_numpy(weight).double() @ table


def interval(values: Sequence[float]) -> list[float]:
    """The middle 95 % of values that are numbers."""
    finite = np.asarray([v for v in values if np.isfinite(v)])
    return [float(v) for v in np.quantile(finite, (0.025, 0.975))] if len(finite) else [float("nan")] * 2


@dataclass
class Matched:
    """Outlier patches beside the normal patch of the same image that is nearest in some property."""

    rows: list[Tensor] = field(default_factory=list)  # (images,5): sums of both errors, both properties, and pairs

    def add(self, errors: Tensor, outlier: Tensor, prop: Tensor) -> None:
        """Count errors (B,n) of patches with a property (B,n) to match on."""
        for error, flag, value in zip(errors.double(), outlier, prop.double(), strict=True):
            first, second = nearest_normal(value, flag)
            if len(first):
                pairs = torch.tensor(float(len(first)), dtype=torch.float64)
                sums = [error[first].sum(), error[second].sum(), value[first].sum(), value[second].sum()]
                self.rows.append(torch.stack([*sums, pairs]))

    def summary(self, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Means of both sides, their ratio with a 95 % interval over images, and how well the property matched."""
        if not self.rows:
            return {"pairs": 0}
        table = torch.stack(self.rows)
        total = table.sum(dim=0)
        means = (total[:4] / total[4]).tolist()
        names = ("outlier", "matched_normal", "outlier_property", "matched_property")
        ratios = [float(row[0] / row[1]) for row in resample(table, draws, seed) if row[1] > 0]
        found = {"pairs": int(total[4]), "images": len(table), **dict(zip(names, means, strict=True))}
        return found | {"ratio": means[0] / means[1], "ratio_ci95": interval(ratios)}


def nearest_normal(prop: Tensor, outlier: Tensor) -> tuple[Tensor, Tensor]:
    """For every outlier the normal patch with the nearest property: (n,), (n,) -> indices (k,), (k,)."""
    first, normal = outlier.nonzero().flatten(), (~outlier).nonzero().flatten()
    if not len(first) or not len(normal):
        return first[:0], normal[:0]
    distance = (prop[first].unsqueeze(1) - prop[normal].unsqueeze(0)).abs()
    return first, normal[distance.argmin(dim=1)]


@torch.no_grad()
def contrast(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Log variance of a patch's pixels (within channels): (B,3,H,W) -> (B,n)."""
    pixels = patch_targets(images, patch).unflatten(2, (-1, 3))
    return pixels.var(dim=2).mean(dim=-1).clamp(min=1e-8).log()


@torch.no_grad()
def likeness(model: MergingViT, images: Tensor) -> Tensor:
    """Mean cosine of a patch embedding (before positions) with its neighbours: (B,3,H,W) -> (B,n)."""
    x = model.patch_embed(images)
    grid = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    return neighbour_cosines(x.reshape(len(x), *grid, -1)).nanmean(dim=1).flatten(1)


def cell_distance(places: Tensor, grid: tuple[int, int]) -> Tensor:
    """Distance in cells from predicted places (B,n) to the own ones."""
    own = torch.arange(places.shape[1])
    rows, columns = (places // grid[1] - own // grid[1], places % grid[1] - own % grid[1])
    return (rows.double() ** 2 + columns.double() ** 2).sqrt()


# Class from one token (Darcet et al., table 1)


class TokenBank:
    """One token of every kind per image, after the final norm; random patches are drawn anew for every draw."""

    def __init__(self, draws: int = 5, seed: int = 0) -> None:
        self.draws, self._generator = draws, torch.Generator().manual_seed(seed)
        self._tokens: dict[str, list[Tensor]] = {}  # kind -> (draws,B,C) per batch
        self._labels: list[Tensor] = []
        self._covered: list[Tensor] = []

    @torch.no_grad()
    def add(self, model: MergingViT, images: Tensor, labels: Tensor, cut: float, outlier_layer: int = -1) -> None:
        """Take the tokens of a batch; a patch is an outlier if its norm before the final norm exceeds `cut`."""
        layer = norms = None
        for layer in walk(model, images):
            if layer.index == outlier_layer % len(model.blocks):
                own = layer.after.x[:, layer.num_prefix_tokens :].float().norm(dim=-1)
                norms = to_grid(own, layer.after.group, layer.grid).flatten(1).cpu()
        assert layer is not None and norms is not None
        tokens = model.norm(layer.after.x).float()
        patches = to_grid(tokens[:, layer.num_prefix_tokens :], layer.after.group, layer.grid).flatten(1, 2).cpu()
        tokens = tokens.cpu()
        # copies: a view would keep all tokens of the batch
        found = {kind: tokens[:, i].clone().expand(self.draws, -1, -1) for i, kind in enumerate(layer.token_types)}
        registers = [i for i, kind in enumerate(layer.token_types) if kind.startswith("register")]
        if len(registers) > 1:
            found["mean of registers"] = tokens[:, registers].mean(dim=1).expand(self.draws, -1, -1)
        found["mean of patches"] = patches.mean(dim=1).expand(self.draws, -1, -1)
        outlier = norms > cut
        for kind, flags in (("normal patch", ~outlier), ("outlier patch", outlier)):
            found[kind] = torch.stack([self._draw(patches, flags) for _ in range(self.draws)])
        for kind, values in found.items():
            self._tokens.setdefault(kind, []).append(values)
        self._labels.append(labels.cpu())
        self._covered.append(outlier.any(dim=1) & (~outlier).any(dim=1))

    def _draw(self, patches: Tensor, flags: Tensor) -> Tensor:
        """One random flagged patch per image; NaN where there is none."""
        chance = torch.rand(flags.shape, generator=self._generator).masked_fill(~flags, -1.0)
        best, place = chance.max(dim=1)
        chosen = patches[torch.arange(len(patches)), place]
        return chosen.masked_fill((best < 0).unsqueeze(1), float("nan"))

    @property
    def labels(self) -> np.ndarray:
        return torch.cat(self._labels).numpy()

    @property
    def covered(self) -> np.ndarray:
        """(images,) which have both an outlier and a normal patch."""
        return torch.cat(self._covered).numpy()

    @property
    def kinds(self) -> list[str]:
        return list(self._tokens)

    def tokens(self, kind: str, draw: int) -> np.ndarray:
        """(images,C)."""
        return torch.cat([values[draw] for values in self._tokens[kind]]).numpy()


STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # C of the logistic regression


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
    train: TokenBank, test: TokenBank, kind: str, neighbours: int = 20, strengths: Sequence[float] = STRENGTHS
) -> dict[str, Any]:
    """Accuracy of both probes from one kind of token, over the images that have every kind: mean and std over draws."""
    linear, nearest, chosen = [], [], []
    for draw in range(train.draws):
        x, test_x = train.tokens(kind, draw)[train.covered], test.tokens(kind, draw)[test.covered]
        y, test_y = train.labels[train.covered], test.labels[test.covered]
        accuracy, strength = logistic_accuracy(x, y, test_x, test_y, draw, strengths)
        linear.append(accuracy)
        chosen.append(strength)
        nearest.append(knn_accuracy(x, y, test_x, test_y, neighbours))
    found: dict[str, Any] = {"strengths": chosen}
    for name, values in (("linear", linear), ("knn", nearest)):
        found |= {name: float(np.mean(values)), f"{name}_std": float(np.std(values, ddof=1)) if len(values) > 1 else 0}
        found[f"{name}_draws"] = values
    return found
