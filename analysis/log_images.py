"""Pictures of a model in training, for tensorboard: norms, where class token and registers look, merged tokens.

Shapes: B images, n patches, (gh,gw) the patch grid, P prefix tokens.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import MergingViT

from .outliers import norms
from .panels import Scale, draw_groups, mean_colours, to_picture
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
        step: of the training, for the writer.
    """
    training = model.training
    model.eval()
    try:
        for layer in walk(model, images):
            lengths = norms(layer.after.x)
            of_patches = lengths[:, layer.num_prefix_tokens :].cpu().numpy()
            writer.add_histogram(f"norms/block_{layer.index}/patches", of_patches, step)
            for index, token_type in enumerate(layer.token_types):
                name = f"norms/{token_type.replace(' ', '_')}/block_{layer.index}"
                writer.add_scalar(name, float(lengths[:, index].mean()), step)
        final_norms = norms(final(model, layer))[:, layer.num_prefix_tokens :]
        writer.add_histogram("norms/after_the_final_norm/patches", final_norms.cpu().numpy(), step)
        writer.add_image("pictures", sheet(layer, pictures), step, dataformats="HWC")
    finally:
        model.train(training)


def sheet(last: Layer, pictures: Tensor) -> np.ndarray:
    """Draw a row per image: input, merged tokens, norms, then attention of every prefix token; uint8 (height,width,3).

    Args:
        last: the last block of a walk over the images.
        pictures: (B,3,H,W) in [0, 1].
    """
    grid, pictures = last.grid, pictures.cpu()
    cell = max(1, SIDE // max(grid))
    group = last.after.group.cpu()
    norm_maps = to_grid(norms(last.after.x)[:, last.num_prefix_tokens :], last.after.group, grid).cpu().numpy()
    attended = per_patch(attention(last)[:, :, : last.num_prefix_tokens].mean(dim=1), last).cpu().numpy()  # (B,P,gh,gw)
    colours = mean_colours(pictures, group, grid).unflatten(1, grid).numpy()
    groups = group.unflatten(1, grid).numpy()
    rows = []
    for index, picture in enumerate(pictures):
        panels = [to_picture(picture, grid, cell), draw_groups(colours[index], groups[index], cell, line=1)]
        panels += [_heat(values, cell) for values in (norm_maps[index], *attended[index])]
        rows.append(_with_gaps(panels, axis=1))
    return _with_gaps(rows, axis=0)


def _heat(values: np.ndarray, cell: int) -> np.ndarray:
    """A map (gh,gw) in colours from its lowest to its highest value, a patch being a square of `cell` pixels."""
    colours = Scale(float(values.min()), float(values.max())).colours(values)
    return np.kron((colours * 255).round().astype(np.uint8), np.ones((cell, cell, 1), dtype=np.uint8))


def _with_gaps(panels: list[np.ndarray], axis: int) -> np.ndarray:
    """Join panels along an axis, with white between them."""
    shape = list(panels[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, dtype=np.uint8)
    parts = [part for panel in panels for part in (panel, gap)]
    return np.concatenate(parts[:-1], axis=axis)
