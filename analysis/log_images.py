"""Pictures of a model in training, for tensorboard and for `training`: norms, attention, merged tokens.

Shapes: B images, n patches, (gh,gw) the patch grid, P prefix tokens.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import MergingViT

from .charts import common_limits
from .outliers import norms
from .panels import Scale, draw_groups, lay_out, mean_colours, to_picture
from .training import FOLDER, save, snapshot
from .walk import Layer, attention, final, per_patch, to_grid, walk

SIDE = 224  # pixels of a picture, as far as whole patches allow
CLIP = 0.98  # quantile at which the colours of attention end


@torch.no_grad()
def log_images(
    model: MergingViT, images: Tensor, pictures: Tensor, writer: Any, step: int, folder: Path | None = None
) -> None:
    """Write histograms of norms, and one sheet of pictures with a row per image.

    The model's mode is kept, no random number is drawn, and no gradient is left.

    Args:
        images: (B,3,H,W) as the model sees them.
        pictures: (B,3,H,W) the same in [0, 1].
        writer: tensorboard's SummaryWriter.
        step: of the training, for the writer.
        folder: of the run; a snapshot for `run/analyze.py training --run` goes into it.
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
        writer.add_image(
            "pictures", sheet(layer, pictures, f"epoch {step}, block {layer.index}"), step, dataformats="HWC"
        )
        if folder is not None:
            save(folder / FOLDER, snapshot(model, images, pictures.permute(0, 2, 3, 1).cpu().numpy(), step))
    finally:
        model.train(training)


def sheet(last: Layer, pictures: Tensor, title: str = "") -> np.ndarray:
    """Draw a row per image: input, merged tokens, norms, then attention of every prefix token; uint8 (height,width,3).

    All norms are on one colour scale and all attention on another; the columns' titles say which.

    Args:
        last: the last block of a walk over the images.
        pictures: (B,3,H,W) in [0, 1].
        title: in front of the sheet's heading.
    """
    grid, pictures = last.grid, pictures.cpu()
    cell = max(1, SIDE // max(grid))
    group = last.after.group.cpu()
    norm_maps = to_grid(norms(last.after.x)[:, last.num_prefix_tokens :], last.after.group, grid).cpu().numpy()
    attended = per_patch(attention(last)[:, :, : last.num_prefix_tokens].mean(dim=1), last).cpu().numpy()  # (B,P,gh,gw)
    attended = attended * (grid[0] * grid[1])  # 1: an even share
    lengths = Scale(*common_limits([norm_maps]))
    shares = Scale(0.0, common_limits([attended], CLIP)[1]) if attended.size else Scale(0, 1)
    colours = mean_colours(pictures, group, grid).unflatten(1, grid).numpy()
    groups = group.unflatten(1, grid).numpy()
    rows = []
    for index, picture in enumerate(pictures):
        panels = [to_picture(picture, grid, cell), draw_groups(colours[index], groups[index], cell, line=1)]
        panels += [_heat(values, lengths, cell) for values in norm_maps[index : index + 1]]
        panels += [_heat(values, shares, cell) for values in attended[index]]
        rows.append(panels)
    titles = [("input", f"{grid[0] * grid[1]} patches"), ("merged", f"{int(group.max()) + 1} tokens left")]
    titles.append(("norms", _range(lengths)))
    titles += [(name, f"1: even, {_range(shares)}") for name in last.token_types]
    captions = [f"image {index + 1}" for index in range(len(pictures))]
    return np.asarray(lay_out(rows, titles, captions, (), f"{title}: norms, and where class token and registers look"))


def _range(scale: Scale) -> str:
    return f"{scale.low:.3g} dark, {scale.high:.3g} bright"


def _heat(values: np.ndarray, scale: Scale, cell: int) -> np.ndarray:
    """A map (gh,gw) in the colours of a scale, a patch being a square of `cell` pixels."""
    colours = scale.colours(values)
    return np.kron((colours * 255).round().astype(np.uint8), np.ones((cell, cell, 1), dtype=np.uint8))
