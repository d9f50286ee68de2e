"""Probes of frozen features: where features are read and kept, how probes are fitted, how their errors are compared.

The instruments `reconstruction` and `class_probes` build on this module.

Shapes: B images, n patches, C channels, V values of a target.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import UserError
from models.vit import MergingViT

from .intervals import Estimate, estimate, mean_over, ratio
from .outliers import Rule, add_outlier_rule, norms
from .walk import Layer, check_layer, to_grid, walk

if TYPE_CHECKING:
    from .command import Loaded

BATCH = 16  # images that a probe reads at once
RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)
Loss = Callable[[Tensor, Tensor], Tensor]  # of a probe's output (B,n,...) and the images (B,3,H,W)
Target = Callable[[Tensor], Tensor]  # images (B,3,H,W) -> what a probe predicts (B,n,V)

# Features


@dataclass(frozen=True)
class Feature:
    """Which tokens a probe reads: `prenorm` (last block, through a LayerNorm without weights), `postnorm` (after the
    final norm) or `layer:k` (after block k, as prenorm)."""

    name: str = "prenorm"
    layer: int = -1

    @classmethod
    def parse(cls, text: str) -> "Feature":
        """Read `prenorm`, `postnorm` or `layer:k`.

        Raises:
            UserError: the text is none of them.
        """
        name, _, number = text.partition(":")
        if text in ("prenorm", "postnorm"):
            return cls(text)
        if name == "layer" and number.lstrip("-").isdigit():
            return cls(name, int(number))
        raise UserError(f"--feat {text!r} is none of prenorm, postnorm, layer:K")

    def __str__(self) -> str:
        return f"{self.name}:{self.layer}" if self.name == "layer" else self.name

    def index(self, model: MergingViT) -> int:
        """The block whose output is read, counted from the front."""
        return check_layer(model, self.layer, "--feat layer")


@torch.no_grad()
def patch_features(
    model: MergingViT, images: Tensor, feature: Feature, outlier_layer: int = -1
) -> tuple[Tensor, Tensor]:
    """Read features (B,n,C) of the token that every patch is in, and norms (B,n) of that token at `outlier_layer`."""
    feature_layer, norm_layer = feature.index(model), check_layer(model, outlier_layer, "--outlier_layer")
    features = lengths = None
    for layer in walk(model, images):
        if layer.index == feature_layer:
            x = layer.after.x[:, layer.num_prefix_tokens :]
            patches = to_grid(x, layer.after.group, layer.grid).flatten(1, 2)
            features = model.norm(patches) if feature.name == "postnorm" else F.layer_norm(patches, patches.shape[-1:])
        if layer.index == norm_layer:
            lengths = patch_norms(layer)
    assert features is not None and lengths is not None
    return features.float(), lengths


def patch_norms(layer: Layer) -> Tensor:
    """Norm (B,n) of the token that every patch is in, after the block."""
    lengths = norms(layer.after.x[:, layer.num_prefix_tokens :])
    return to_grid(lengths, layer.after.group, layer.grid).flatten(1)


class Store:
    """Features, images and norms of many images in files of an empty folder, so that memory holds one batch only."""

    TYPES = (("features", np.float16), ("images", np.float16), ("norms", np.float32))

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        self._shapes: dict[str, tuple[int, ...]] = {}  # of one image

    def add(self, features: Tensor, images: Tensor, norms: Tensor) -> None:
        """Append a batch: features (B,n,C), images (B,3,H,W), norms (B,n)."""
        for (name, number_type), values in zip(self.TYPES, (features, images, norms), strict=True):
            array = values.cpu().numpy().astype(number_type)
            self._shapes[name] = array.shape[1:]
            with (self.folder / name).open("ab") as file:
                file.write(array.tobytes())
        self._count += len(features)

    def __len__(self) -> int:
        return self._count

    def _array(self, name: str) -> np.ndarray:
        shape = (self._count, *self._shapes[name])
        return np.memmap(self.folder / name, dict(self.TYPES)[name], "r", shape=shape)

    @property
    def norms(self) -> Tensor:
        """The norms (images,n)."""
        return torch.from_numpy(np.array(self._array("norms")))

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Features (B,n,C) and images (B,3,H,W) in fp32."""
        order = np.asarray(indices)
        features, images = (self._array(name)[order].astype(np.float32) for name in ("features", "images"))
        return torch.from_numpy(features), torch.from_numpy(images)

    def batches(
        self, indices: Sequence[int], size: int, seed: int | None = None
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Yield (indices, features, images) of `size` images at a time, shuffled by a seed."""
        order = np.asarray(indices)
        order = order if seed is None else np.random.default_rng(seed).permutation(order)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            yield chosen, *self.read(chosen)


@dataclass(frozen=True)
class Folds:
    """Indices of the images that train a probe, that validate it (early stopping, ridge), and that test it."""

    train: list[int]
    val: list[int]
    test: list[int]

    @classmethod
    def alternate(cls, images: int) -> "Folds":
        """Odd images test; of the even ones every tenth validates and the others train.

        A set of images is mostly sorted by class. Held-out images that were cut from its end would be of other classes
        than those that train; alternating keeps every class in all three folds, without a random draw.

        Raises:
            UserError: there are fewer than 8 images.
        """
        if images < 8:
            raise UserError(f"a probe needs at least 8 images, there are {images}")
        even = list(range(0, images, 2))
        val = even[::10]
        return cls([i for i in even if i not in set(val)], val, list(range(1, images, 2)))


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
        """Solve for the probe; `ridge` is relative to the mean diagonal and keeps features of low rank solvable."""
        scale = self.gram.diagonal()[:-1].mean()
        penalty = torch.full((len(self.gram),), float(ridge * scale), dtype=torch.float64)
        penalty[-1] = 0.0  # the bias is not shrunk
        weight = torch.linalg.solve(self.gram + penalty.diag(), self.cross)
        probe = nn.Linear(weight.shape[0] - 1, weight.shape[1])
        with torch.no_grad():
            probe.weight.copy_(weight[:-1].T)
            probe.bias.copy_(weight[-1])
        return probe


def mean_target(store: Store, folds: Folds, target: Target, batch: int = BATCH) -> Tensor:
    """The constant-prediction baseline: the mean target (V,) of the training patches."""
    sums = [target(images).double().mean(dim=1).sum(dim=0) for _, _, images in store.batches(folds.train, batch)]
    return (torch.stack(sums).sum(dim=0) / len(folds.train)).float()


def squared_error(target: Target) -> Loss:
    """The loss of a probe that predicts target(images): its mean squared error."""
    return lambda output, images: (output - target(images)).square().mean()


def fit_linear(store: Store, folds: Folds, target: Target, batch: int = BATCH) -> nn.Linear:
    """Fit the least-squares probe of target(images) (B,n,V), with the ridge that validates best."""
    equations = None
    for _, x, images in store.batches(folds.train, batch):
        y = target(images)
        equations = equations or LeastSquares(x.shape[-1], y.shape[-1])
        equations.add(x, y)
    assert equations is not None
    probes = [equations.solve(ridge) for ridge in RIDGES]
    return min(probes, key=lambda probe: mean_loss(probe, store, folds.val, squared_error(target), batch))


def mlp_probe(inputs: int, outputs: int) -> nn.Sequential:
    """An untrained MLP probe: C -> 4C -> V with GELU."""
    return nn.Sequential(nn.Linear(inputs, 4 * inputs), nn.GELU(), nn.Linear(4 * inputs, outputs))


def train_probe(
    probe: nn.Module,
    store: Store,
    folds: Folds,
    loss: Loss,
    epochs: int = 20,
    patience: int = 4,
    batch: int = BATCH,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
) -> nn.Module:
    """Train by Adam at 1e-3 (cosine to 0) for `epochs`, or until the validation loss has not fallen for `patience`.

    The probe ends with the weights of its best epoch, in evaluation mode.
    """
    optimizer = torch.optim.Adam(probe.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best, best_state, waited = float("inf"), {k: v.clone() for k, v in probe.state_dict().items()}, 0
    for epoch in range(epochs):
        for _, x, images in store.batches(folds.train, batch, seed=seed + epoch):
            optimizer.zero_grad()
            loss(probe(x), images).backward()
            optimizer.step()
        schedule.step()
        value = mean_loss(probe, store, folds.val, loss, batch)
        if report:
            report(f"epoch {epoch + 1}/{epochs}: loss {value:.5f} on the stopping images")
        waited = 0 if value < best else waited + 1
        if value < best:
            best, best_state = value, {k: v.clone() for k, v in probe.state_dict().items()}
        if waited >= patience:
            break
    probe.load_state_dict(best_state)
    return probe.eval()


@torch.no_grad()
def mean_loss(probe: nn.Module, store: Store, indices: list[int], loss: Loss, batch: int = BATCH) -> float:
    """The mean over images of a probe's loss."""
    total = sum(float(loss(probe(x), images)) * len(x) for _, x, images in store.batches(indices, batch))
    return total / len(indices)


# Errors of outlier and of normal patches


def outlier_ratio(row: np.ndarray) -> float:
    """Mean of outlier over mean of normal patches, of a row of `Split`."""
    return ratio(ratio(row[0], row[1]), ratio(row[2], row[3]))


@dataclass
class Split:
    """Per image the sums of some error over its outlier and over its normal patches, and how many there are.

    Means are over patches; intervals resample images, because patches of an image are not independent.
    """

    rows: list[Tensor] = field(default_factory=list)  # (B,4): outlier sum, outlier count, normal sum, normal count

    def add(self, errors: Tensor, outlier: Tensor) -> None:
        """Count errors (B,n) with a flag each."""
        e, o = errors.double(), outlier.double()
        self.rows.append(torch.stack(((e * o).sum(1), o.sum(1), (e * (1 - o)).sum(1), (1 - o).sum(1)), dim=1))

    @property
    def table(self) -> np.ndarray:
        """All rows (images,4)."""
        return torch.cat(self.rows).numpy()

    def estimates(self) -> dict[str, Estimate]:
        """Mean over outlier and over normal patches, and their ratio; images with outliers contribute to it."""
        table = self.table
        return {
            "outlier": mean_over(table[:, 0], table[:, 1]),
            "normal": mean_over(table[:, 2], table[:, 3]),
            "ratio": estimate(table, outlier_ratio, table[:, 1] > 0),
        }

    def summary(self) -> dict[str, Any]:
        """Means of all, normal and outlier patches, and outlier / normal, each with interval and n of images."""
        total = torch.cat(self.rows).sum(dim=0)
        summary: dict[str, Any] = {}
        for name, value in self.estimates().items():
            summary |= value.named(name)
        return {
            **summary,
            "all": float((total[0] + total[2]) / (total[1] + total[3])),
            "outlier_patches": int(total[1]),
            "normal_patches": int(total[3]),
            "images": sum(map(len, self.rows)),
        }


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

    def summary(self) -> dict[str, Any]:
        """Means of both sides, their ratio with its interval over images, and how well the property matched."""
        if not self.rows:
            return {"pairs": 0}
        table = torch.stack(self.rows).numpy()
        names = ("outlier", "matched_normal", "outlier_property", "matched_property")
        summary: dict[str, Any] = {"pairs": int(table[:, 4].sum()), "images": len(table)}
        for column, name in enumerate(names):
            summary |= mean_over(table[:, column], table[:, 4]).named(name)
        return summary | estimate(table, lambda row: ratio(row[0], row[1])).named("ratio")


def nearest_normal(prop: Tensor, outlier: Tensor) -> tuple[Tensor, Tensor]:
    """For every outlier the normal patch with the nearest property: (n,), (n,) -> indices (k,), (k,)."""
    first, normal = outlier.nonzero().flatten(), (~outlier).nonzero().flatten()
    if not len(first) or not len(normal):
        return first[:0], normal[:0]
    distance = (prop[first].unsqueeze(1) - prop[normal].unsqueeze(0)).abs()
    return first, normal[distance.argmin(dim=1)]


# What the two commands share


def add_outlier_flags(parser: Any) -> None:
    """Add --outlier_rule and --outlier_layer."""
    add_outlier_rule(parser)
    parser.add_argument("--outlier_layer", type=int, default=-1, metavar="BLOCK", help="whose output (default: last)")


def check_outlier_flags(args: Namespace, models: Sequence["Loaded"]) -> Rule:
    """The rule that the flags of `add_outlier_flags` name, once the layer is known to exist in all models."""
    for loaded in models:
        check_layer(loaded.model, args.outlier_layer, "--outlier_layer", loaded.label)
    return Rule.parse(args.outlier_rule)
