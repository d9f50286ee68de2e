"""Cosine maps: how much the features of every patch resemble those of a chosen one (as in DINOv3's figures).

    result = cosine_maps.measure(model, images, pictures, patches=[(7, 7), (0, 3)])
    cosine_maps.draw([result, another])

Command: run/analyze.py cosine. Shapes: K images, Q chosen patches, (gh,gw) the patch grid.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer

from models import UserError

from . import charts
from .inputs import ImageBatches, as_list, batches, evaluation
from .walk import check_layer, check_patches, layer_at, to_grid


@dataclass
class CosineMaps:
    """A few images, and the cosine of every patch with the chosen ones.

    Attributes:
        label: the model's name in figures.
        layer: block whose output it is, after the final norm.
        queries: the Q chosen patches (row, column).
        pictures: (K,H,W,3) the images in [0, 1].
        maps: (K,Q,gh,gw) in [-1, 1]; patches of one token resemble each other fully.
        mean: (K,) mean cosine of all pairs of patches of an image: what "resembles" is to be read against.
        captions: names of the images.
    """

    label: str
    layer: int
    queries: list[tuple[int, int]]
    pictures: np.ndarray
    maps: np.ndarray
    mean: np.ndarray
    captions: list[str] = field(default_factory=list)


@torch.no_grad()
def measure(
    model: VisionTransformer,
    images: ImageBatches,
    pictures: np.ndarray,
    *,
    patches: Sequence[tuple[int, int]] | None = None,
    layer: int = -1,
    captions: Sequence[str] = (),
    label: str = "model",
) -> CosineMaps:
    """Compare the features of all patches with those of the chosen ones.

    Args:
        model: a `MergingViT`, or a timm ViT that it can be made of.
        images: (K,3,H,W) as the model sees them, or batches of them.
        pictures: (K,H,W,3) the same in [0, 1].
        patches: chosen patches (row, column); None: three of them.
        layer: block, -1 is the last; its output goes through the final norm.

    Raises:
        UserError: no such layer or patch, or no image.
    """
    with evaluation(model) as model:
        index = check_layer(model, layer, label=label)
        queries = check_patches(model, patches, label=label)
        maps, means = [], []
        for batch in batches(images, model):
            chosen = layer_at(model, batch, index)
            x = model.norm(chosen.after.x)[:, chosen.num_prefix_tokens :].float()
            unit = F.normalize(to_grid(x, chosen.after.group, chosen.grid), dim=-1)  # (B,gh,gw,C)
            of_queries = torch.stack([unit[:, row, column] for row, column in queries], dim=1)
            maps.append(torch.einsum("bqc,bhwc->bqhw", of_queries, unit).cpu())
            means.append(unit.mean(dim=(1, 2)).square().sum(dim=-1).cpu())
    if not maps:
        raise UserError("none of the images can be read")
    return CosineMaps(
        label, index, queries, pictures, torch.cat(maps).numpy(), torch.cat(means).numpy(), list(captions)
    )


def summarise(result: CosineMaps) -> dict[str, Any]:
    """Numbers of one model, per image: mean cosine of all pairs, and of the chosen patches with all."""
    return {
        "label": result.label,
        "n_images": len(result.maps),
        "layer": result.layer,
        "patches": [list(query) for query in result.queries],
        "mean_cosine": result.mean.tolist(),
        "mean_cosine_of_patches": result.maps.mean(axis=(2, 3)).tolist(),
    }


def draw(results: CosineMaps | Sequence[CosineMaps]) -> Figure:
    """Draw a row per image and chosen patch, a column per model, all on one scale; the patch is outlined."""
    results = as_list(results)
    limits = min(0.0, charts.common_limits([result.maps for result in results])[0]), 1.0
    rows, captions = [], []
    grid = results[0].maps.shape[2:]
    for index, picture in enumerate(results[0].pictures):
        for query, patch in enumerate(results[0].queries):
            marked = np.zeros(grid, dtype=bool)
            marked[patch[0], patch[1]] = True
            cells = [charts.map_cell(result.maps[index, query], limits, marked) for result in results]
            rows.append([charts.patch_cell(picture, patch, grid[0]), *cells])
            name = results[0].captions[index] if results[0].captions else f"image {index + 1}"
            captions.append(f"{name} patch {patch[0]},{patch[1]}")
    columns = ["input", *(f"{result.label}, block {result.layer}" for result in results)]
    bars = [charts.Bar((1, len(results)), limits, "cosine with the outlined patch")]
    means = "; ".join(f"{result.label} {result.mean.mean():.2f}" for result in results)
    note = "Features after the final norm. The mean cosine of all pairs of patches of an image, which "
    note += "is what a value is to "
    note += f"be read against: {means}."
    return charts.picture_table(rows, columns, captions, "Cosine of patch features", note=note, bars=bars)


# Command


def add_parser(subparsers: Any) -> None:
    """Add the command `cosine`."""
    from .command import add_command, add_patches_flag

    parser = add_command(
        subparsers, "cosine", run, "cosine of all patches with chosen ones, side by side for all models"
    )
    add_patches_flag(parser, "that the others are compared with")
    parser.add_argument("--layer", type=int, default=-1, metavar="BLOCK", help="whose output (default: the last)")
    parser.add_argument("--show", type=int, default=3, metavar="K", help="images drawn (default: 3)")


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    """Write cosine.json, cosine.npz and the figure."""
    from .command import Output, load_models, measure_shown

    models = load_models(args, main_argv)
    if args.show < 1:
        raise UserError(f"--show must be at least 1, not {args.show}")
    for loaded in models:
        check_layer(loaded.model, args.layer, "--layer", loaded.label)
        check_patches(loaded.model, args.patches, "--patches", loaded.label)
    out = Output(args, main_argv, models)
    results = measure_shown(measure, args, models, out, "features", patches=args.patches, layer=args.layer)
    _check_grids(results)
    out.json("cosine", {"models": [summarise(result) for result in results]})
    out.npz("cosine", {f"{result.label}/maps": result.maps for result in results})
    out.figure("cosine", draw(results))


def _check_grids(results: Sequence[CosineMaps]) -> None:
    """Refuse models of different grids: the default patches would be other places."""
    grids = {result.maps.shape[2:] for result in results}
    if len(grids) > 1:
        raise UserError(f"the models have patch grids {sorted(grids)}; compare models of one grid")
