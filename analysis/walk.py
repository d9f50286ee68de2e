"""What happens inside a model, block by block: the view that all instruments share.

`walk` runs the very block functions of the forward, from outside: the forward itself knows nothing of it and pays
nothing. Layers are handed out one at a time, so that memory holds one block's tokens as long as the caller keeps none.

Shapes: B batch, N tokens in, M tokens out, n patches at the input, P prefix tokens, C channels, H heads, D their
channels, (gh,gw) the patch grid.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import Format
from torch import Tensor

from models import MergingViT, UserError
from models.blocks import attention_map, project_qkv
from models.vit import Layer


@torch.no_grad()
def walk(model: MergingViT, images: Tensor, r: Any = None) -> Iterator[Layer]:
    """Run the model on images (B,3,H,W) and hand out every block, in order: the forward's own loop, without gradient.

    Args:
        model: in evaluation mode.
        r: another schedule than the model's, in any form of `MergeConfig.r`.
    """
    plan = model.plan(r, math.prod(patch_grid(model, images)))
    yield from model.layers(model.embed(images, follow=True), plan)


def final(model: MergingViT, layer: Layer) -> Tensor:
    """Tokens (B,M,C) after the final norm, from the last layer of `walk`: `model(images, trace=True).tokens`."""
    with torch.no_grad():
        return model.norm(layer.after.x)


def qkv(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (B,H,N,D) of the block's incoming tokens: before scaling, with bias and any q/k norm."""
    with torch.no_grad():
        return project_qkv(layer.block.attn, layer.block.norm1(layer.before.x))


def attention(layer: Layer) -> Tensor:
    """The attention map (B,H,N,N) over the block's incoming tokens, with proportional attention's bias.

    This is the map the block attends with (method mctf: the one it merges by; with one_step_ahead="precise" it then
    attends again, over merged tokens). Rows sum to 1. A column is the mass on a token, so on all patches in it.
    """
    q, k, _ = qkv(layer)
    with torch.no_grad():
        return attention_map(layer.block.attn, q, k, layer.bias)


def patch_grid(model: MergingViT, images: Tensor) -> tuple[int, int]:
    """Rows and columns (gh,gw) of patches that the model makes of images (B,3,H,W)."""
    height, width = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    return height, width


def to_grid(values: Tensor, group: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Give every patch the value of the token it is in: values (B,T,...) by group (B,n) -> (B,gh,gw,...).

    Args:
        values: of the T patch tokens, without the prefix.
        group: (B,n) with values in [0,T), as `Layer.before.group` or `after.group`.
        grid: (gh,gw) with gh * gw = n; None: square.
    """
    batch, patches = group.shape
    if grid is None:
        side = round(patches**0.5)
        grid = (side, side)
    if grid[0] * grid[1] != patches:
        raise UserError(f"{patches} patches do not make a grid of {grid[0]} x {grid[1]}; name the grid")
    rows = torch.arange(batch, device=group.device).unsqueeze(1)
    return values[rows, group].unflatten(1, grid)


def allow_any_size(model: MergingViT) -> None:
    """Let the model take images of any height and width from now on, in place.

    Images are padded with zeros on the right and below to whole patches; position entries are resampled (bicubic,
    antialiased) in every forward. Weights do not change, nor does the output for the model's own size.
    """
    embed = model.patch_embed
    embed.strict_img_size, embed.dynamic_img_pad = False, True
    embed.flatten, embed.output_fmt = False, Format.NHWC
