"""Pictures of a model in training, for tensorboard: norms, where class token and registers look, merged tokens.

Shapes: B images, n patches, (gh,gw) the patch grid, P prefix tokens.
"""

from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor

from models.merging import merge_by_map, unmerge
from models.vit import MergingViT

from .outliers import norms
from .walk import Layer, attention, final, per_patch, to_grid, walk

SIDE = 224  # pixels of a picture, as far as whole patches allow
GAP = 4


@torch.no_grad()
def log_images(model: MergingViT, images: Tensor, pictures: Tensor, writer: Any, step: int) -> None:
    """Write histograms of norms, and one sheet of pictures with a row per image.

    The model's mode is kept, no random number is drawn, and no gradient is left.

    Args:
        images: (B,3,H,W) as the model sees them.
        pictures: (B,3,H,W) the same in [0, 1].
        writer: tensorboard's SummaryWriter.
    """
    mode = model.training
    model.eval()
    try:
        for layer in walk(model, images):
            lengths = norms(layer.after.x)
            writer.add_histogram(
                f"norms/block_{layer.index}/patches", lengths[:, layer.num_prefix_tokens :].cpu().numpy(), step
            )
            for place, kind in enumerate(layer.token_types):
                name = f"norms/{kind.replace(' ', '_')}/block_{layer.index}"
                writer.add_scalar(name, float(lengths[:, place].mean()), step)
        final_norms = norms(final(model, layer))[:, layer.num_prefix_tokens :]
        writer.add_histogram("norms/after_the_final_norm/patches", final_norms.cpu().numpy(), step)
        writer.add_image("pictures", sheet(layer, pictures), step, dataformats="HWC")
    finally:
        model.train(mode)


def sheet(last: Layer, pictures: Tensor) -> np.ndarray:
    """One row per image: input, merged tokens, norms, then attention of every prefix token; uint8 (height,width,3)."""
    grid, rows = last.grid, []
    length = to_grid(norms(last.after.x)[:, last.num_prefix_tokens :], last.after.group, grid).cpu()
    looks = per_patch(attention(last)[:, :, : last.num_prefix_tokens].mean(dim=1), last).cpu()  # (B,P,gh,gw)
    groups, pictures = last.after.group.cpu(), pictures.cpu()
    for i, picture in enumerate(pictures):
        panels = [_scaled(picture.permute(1, 2, 0).numpy(), grid), _merged(picture, groups[i], grid)]
        panels += [_heat(length[i].numpy(), grid), *(_heat(look.numpy(), grid) for look in looks[i])]
        rows.append(_joined(panels, axis=1))
    return _joined(rows, axis=0)


def _cell(grid: tuple[int, int]) -> int:
    return max(1, SIDE // max(grid))


def _scaled(picture: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(H,W,3) in [0, 1] by nearest neighbours to whole cells."""
    height, width = (side * _cell(grid) for side in grid)
    rows = np.arange(height) * picture.shape[0] // height
    columns = np.arange(width) * picture.shape[1] // width
    return (picture[rows][:, columns] * 255).round().astype(np.uint8)


def _merged(picture: Tensor, group: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Every group of patches in its mean colour, with a dark line around it."""
    colours = torch.nn.functional.adaptive_avg_pool2d(picture[None], grid).flatten(2).transpose(1, 2)
    mean = unmerge(merge_by_map(colours, group[None], int(group.max()) + 1), group[None])[0]
    cell = np.ones((_cell(grid), _cell(grid)), dtype=np.int64)
    filled = np.kron(mean.view(*grid, 3).numpy(), cell[..., None])
    labels = np.kron(group.view(grid).numpy(), cell)
    edge = np.zeros(labels.shape, dtype=bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    return (np.where(edge[..., None], filled * 0.3, filled) * 255).round().astype(np.uint8)


def _heat(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    colours = colormaps["viridis"]((values - low) / max(high - low, 1e-12))[..., :3]
    return _scaled(colours, grid)


def _joined(panels: list[np.ndarray], axis: int) -> np.ndarray:
    shape = list(panels[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, dtype=np.uint8)
    parts = [part for panel in panels for part in (panel, gap)]
    return np.concatenate(parts[:-1], axis=axis)
