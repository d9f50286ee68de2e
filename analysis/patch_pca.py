"""PCA of patch features as colours: what a model takes for the same thing has the same colour (as in DINOv2).

    first, second = patch_pca.measure(model, images, pictures), patch_pca.measure(another, images, pictures)
    patch_pca.draw([first, second])

The first three principal components of all patches of all images are red, green and blue. With several models or
layers the components are joint ones where the features have as many channels: equal colour is then equal direction,
across images, layers and models. Each layer of each model is first centred and scaled to variance 1, so that none
decides alone. Under merging every patch has the features of the token that it ended in.

Command: run/analyze.py pca. Shapes: K images, L layers, C channels, (gh,gw) the patch grid.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models import UserError

from . import charts
from .inputs import ImageBatches, as_list, batches, evaluation
from .walk import check_layer, to_grid, walk

CLIP = 0.01  # share of values beyond either end of a colour: a few would take the range for themselves


@dataclass
class PcaResult:
    """Patch features of a few images.

    Attributes:
        label: the model's name in figures.
        layers: blocks whose output it is, after the final norm.
        pictures: (K,H,W,3) the images in [0, 1].
        features: (L,K,gh,gw,C).
        captions: names of the images.
    """

    label: str
    layers: list[int]
    pictures: np.ndarray
    features: np.ndarray
    captions: list[str] = field(default_factory=list)


@torch.no_grad()
def measure(
    model: VisionTransformer,
    images: ImageBatches,
    pictures: np.ndarray,
    *,
    layers: Sequence[int] = (-1,),
    captions: Sequence[str] = (),
    label: str = "model",
) -> PcaResult:
    """Take the patch features of a few images, on the grid of the input.

    Args:
        model: a `MergingViT`, or a timm ViT that it can be made of.
        images: (K,3,H,W) as the model sees them, or batches of them.
        pictures: (K,H,W,3) the same in [0, 1].
        layers: blocks, -1 is the last; their output goes through the final norm.

    Raises:
        UserError: no such layer, or no image.
    """
    with evaluation(model) as model:
        chosen = [check_layer(model, layer, "layers", label) for layer in layers]
        parts = []
        for batch in batches(images, model):
            of_batch: dict[int, Tensor] = {}
            for layer in walk(model, batch):
                if layer.index in chosen:
                    x = model.norm(layer.after.x)[:, layer.num_prefix_tokens :].float()
                    of_batch[layer.index] = to_grid(x, layer.after.group, layer.grid).cpu()
            parts.append(torch.stack([of_batch[index] for index in chosen]))
    if not parts:
        raise UserError("none of the images can be read")
    return PcaResult(label, chosen, pictures, torch.cat(parts, dim=1).numpy(), list(captions))


@dataclass(frozen=True)
class Colours:
    """The components of one model's patches.

    Attributes:
        components: (L,K,gh,gw,3).
        rgb: the same in [0, 1], black where `foreground` is False.
        foreground: (L,K,gh,gw) bool, all True where no threshold was asked for.
        explained: (L,) share of the variance of a layer's (foreground) patches that the three components hold.
        joint: whether they are those of all models and layers together.
    """

    components: np.ndarray
    rgb: np.ndarray
    foreground: np.ndarray
    explained: np.ndarray
    joint: bool


def colours(results: PcaResult | Sequence[PcaResult], foreground: bool = False) -> list[Colours]:
    """Compute the components of all results, jointly where their features have as many channels.

    Args:
        foreground: first split the patches by their first component at 0, keep the side whose patches lie nearer to the
            middle of the images, and compute the components of those alone, as DINOv2's figures do.
    """
    results = as_list(results)
    joint = len({result.features.shape[-1] for result in results}) == 1
    found: list[Colours] = []
    for together in [results] if joint else [[result] for result in results]:
        found += _components(together, foreground, joint)
    return found


def _components(results: Sequence[PcaResult], foreground: bool, joint: bool) -> list[Colours]:
    scaled = [_scaled(result.features) for result in results]
    masks = [np.ones(features.shape[:-1], dtype=bool) for features in scaled]
    if foreground:
        first = _project(scaled, masks, 1)
        masks = _central_side([values[..., 0] > 0 for values in first])
        # the mean and the scale of the foreground are its own
        scaled = [_scaled(result.features, mask) for result, mask in zip(results, masks, strict=True)]
    projected = _project(scaled, masks, 3)
    everything = np.concatenate([values[mask] for values, mask in zip(projected, masks, strict=True)])
    low, high = np.quantile(everything, (CLIP, 1 - CLIP), axis=0)
    made = []
    for features, values, mask in zip(scaled, projected, masks, strict=True):
        rgb = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1) * mask[..., None]
        explained = [_share(values[i][mask[i]], features[i][mask[i]]) for i in range(len(features))]
        made.append(Colours(values, rgb, mask, np.array(explained), joint))
    return made


def _scaled(features: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Each layer's patches (L,K,gh,gw,C), of a mask, with mean 0 and mean squared length 1."""
    scaled = np.empty_like(features)
    for index, layer in enumerate(features):
        used = layer.reshape(-1, layer.shape[-1]) if mask is None else layer[mask[index]]
        mean = used.mean(axis=0) if len(used) else 0.0
        length = np.sqrt(((used - mean) ** 2).sum(axis=1).mean()) if len(used) else 1.0
        scaled[index] = (layer - mean) / max(float(length), 1e-12)
    return scaled


def _project(features: Sequence[np.ndarray], masks: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Components (L,K,gh,gw,count) of features, fitted on the patches of the masks."""
    from sklearn.decomposition import PCA  # sets environment variables when imported

    rows = np.concatenate([values[mask] for values, mask in zip(features, masks, strict=True)])
    if len(rows) < count:
        raise UserError(f"{len(rows)} foreground patches are too few for a PCA; draw more images or leave it out")
    pca = PCA(count, svd_solver="full").fit(rows)
    return [
        pca.transform(values.reshape(-1, values.shape[-1])).reshape(*values.shape[:-1], count) for values in features
    ]


def _central_side(masks: list[np.ndarray]) -> list[np.ndarray]:
    """The masks or their opposites: a component has no sign, and objects are nearer to the middle than backgrounds."""
    inside, outside = [], []
    for mask in masks:
        rows, columns = mask.shape[-2:]
        y, x = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")
        distance = np.broadcast_to(np.hypot(x, y), mask.shape)
        inside.append(distance[mask])
        outside.append(distance[~mask])
    if not sum(map(len, outside)) or np.concatenate(inside).mean() <= np.concatenate(outside).mean():
        return masks
    return [~mask for mask in masks]


def _share(components: np.ndarray, features: np.ndarray) -> float:
    """Share of the variance of features (P,C) that their components (P,3) hold."""
    total = float(((features - features.mean(axis=0)) ** 2).sum()) if len(features) else 0.0
    return float(((components - components.mean(axis=0)) ** 2).sum()) / total if total else float("nan")


def summarise(result: PcaResult, of: Colours | None = None) -> dict[str, Any]:
    """Numbers of one model.

    Args:
        of: from `colours`, where several models share components; None: its own.
    """
    of = of or colours(result)[0]
    return {
        "label": result.label,
        "n_images": len(result.pictures),
        "layers": result.layers,
        "joint": of.joint,
        "explained": of.explained.tolist(),
        "foreground_share": of.foreground.mean(axis=(1, 2, 3)).tolist(),
    }


# Figure


def draw(results: PcaResult | Sequence[PcaResult], foreground: bool = False) -> Figure:
    """Draw the images and their patches' components as colours: a column per model and layer."""
    results = as_list(results)
    found = colours(results, foreground)
    rows: list[list[charts.Cell]] = [[charts.image_cell(picture)] for picture in results[0].pictures]
    columns = ["input"]
    for result, of in zip(results, found, strict=True):
        for index, layer in enumerate(result.layers):
            columns.append(f"{result.label}, block {layer} ({100 * of.explained[index]:.0f} %)")
            for row, rgb in zip(rows, of.rgb[index], strict=True):
                row.append(charts.rgb_cell(rgb))
    shared = (
        "joint components of all models and layers" if found[0].joint else "components of each model (widths differ)"
    )
    note = f"Red, green, blue: the first three {shared}; equal colour is equal direction. In brackets: the share of a "
    note += "layer's variance that they hold: what the colours do not show may be most of it."
    if foreground:
        note += " Black: the side of the first component's 0 that lies nearer to the rim."
    return charts.picture_table(rows, columns, results[0].captions or None, "PCA of patch features", note=note)


# Command


def add_parser(subparsers: Any) -> None:
    """Add the command `pca`."""
    from .command import add_command

    parser = add_command(subparsers, "pca", run, "principal components of patch features as colours, joint over models")
    parser.add_argument("--layers", type=int, nargs="+", default=[-1], metavar="BLOCK", help="default: the last")
    parser.add_argument("--no_foreground", action="store_true", help="no second picture of the foreground alone")
    parser.add_argument("--show", type=int, default=6, metavar="K", help="images drawn, whose patches are the data")


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    """Write pca.json, pca.npz and the figures."""
    from .command import Output, load_models, measure_shown

    models = load_models(args, main_argv)
    if args.show < 1:
        raise UserError(f"--show must be at least 1, not {args.show}")
    for loaded in models:
        for layer in args.layers:
            check_layer(loaded.model, layer, "--layers", loaded.label)
    out = Output(args, main_argv, models)
    results = measure_shown(measure, args, models, out, "features", layers=args.layers)
    found = colours(results)
    out.json("pca", {"models": [summarise(result, of) for result, of in zip(results, found, strict=True)]})
    out.npz("pca", {f"{r.label}/components": of.components for r, of in zip(results, found, strict=True)})
    out.figure("pca", draw(results))
    if not args.no_foreground:
        out.figure("pca_foreground", draw(results, foreground=True))
