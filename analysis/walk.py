"""A model block by block: the view that all instruments share.

`walk` is the forward's own loop over the blocks, which hands out one layer at a time, so that memory holds one block's
tokens as long as the caller keeps none.

Shapes: B batch, N tokens in, M tokens out, n patches at the input, P prefix tokens, C channels, H heads, D their
channels, (gh,gw) the patch grid.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import Format
from torch import Tensor

from models import MergingViT, UserError
from models.blocks import attention_map, project_qk, project_qkv
from models.vit import Layer

MAP_BYTES = 2**28  # of one block's attention maps: more images than that are run in parts


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
    """Query, key and value (B,H,N,D) of the block's incoming tokens: with bias and norm, before scale and rotation."""
    with torch.no_grad():
        return project_qkv(layer.block.attn, layer.block.norm1(layer.before.x))


def attention(layer: Layer) -> Tensor:
    """The attention map (B,H,N,N) over the block's incoming tokens, with proportional attention's bias.

    This is the map the block attends with (method mctf: the one it merges by; with one_step_ahead="precise" it then
    attends again, over merged tokens). Rows sum to 1. A column is the mass on a token, so on all patches in it.
    """
    attn, inputs = layer.block.attn, layer.attention_inputs
    with torch.no_grad():
        q, k = project_qk(attn, layer.block.norm1(layer.before.x), inputs.get("rope"))
        return attention_map(attn, q, k, inputs["attn_mask"])


def patch_grid(model: MergingViT, images: Tensor) -> tuple[int, int]:
    """Rows and columns (gh,gw) of patches that the model makes of images (B,3,H,W)."""
    height, width = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    return height, width


def layer_at(model: MergingViT, images: Tensor, index: int) -> Layer:
    """Run the model on images (B,3,H,W) up to one block, named from the front or the end, and return that block."""
    index = check_layer(model, index)
    return next(layer for layer in walk(model, images) if layer.index == index)


def images_at_once(model: MergingViT, images: Tensor) -> int:
    """Return how many images of this size make attention maps (fp32, one block) that fit in `MAP_BYTES`; at least 1."""
    rows, columns = patch_grid(model, images)
    tokens = rows * columns + model.num_prefix_tokens
    blocks: Any = model.blocks
    heads = max(block.attn.num_heads for block in blocks)
    return max(1, MAP_BYTES // (4 * heads * tokens**2))


def in_parts(model: MergingViT, images: Tensor) -> Iterator[Tensor]:
    """Split a batch (B,3,H,W) into parts whose attention maps fit in `MAP_BYTES`."""
    yield from images.split(images_at_once(model, images))


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


def per_patch(columns: Tensor, layer: Layer) -> Tensor:
    """Spread attention to tokens over the patches in them: (B,...,N) -> (B,...,gh,gw).

    A token's mass is divided by the patches it stands for, so that a map sums to the mass on all patches whether or
    not something merged.
    """
    size = layer.before.size[:, layer.num_prefix_tokens :].to(columns.dtype)
    spread = columns[..., layer.num_prefix_tokens :] / size.view(len(size), *[1] * (columns.ndim - 2), -1)
    tokens_second = spread.movedim(-1, 1)  # where `to_grid` expects them
    return to_grid(tokens_second, layer.before.group, layer.grid).movedim((1, 2), (-2, -1))


def check_layer(model: MergingViT, layer: int, name: str = "layer", label: str = "the model") -> int:
    """Return the index of a block, which may be counted from the end (-1: the last).

    Args:
        name: of the option that holds `layer`, for the error.
        label: of the model, for the error.

    Raises:
        UserError: the model has no such block.
    """
    depth = len(model.blocks)
    if not -depth <= layer < depth:
        raise UserError(f"{name} is {layer}, but {label} has blocks 0..{depth - 1} (or -{depth}..-1)")
    return layer % depth


def check_patches(
    model: MergingViT, patches: Sequence[tuple[int, int]] | None, name: str = "patches", label: str = "the model"
) -> list[tuple[int, int]]:
    """Return the chosen patches (row, column), three of them where None are chosen.

    Raises:
        UserError: one of them is not on the model's grid.
    """
    rows, columns = model.patch_embed.grid_size
    chosen = list(patches or [(rows // 2, columns // 2), (rows // 4, columns // 4), (rows - 1, columns - 1)])
    for row, column in chosen:
        if row >= rows or column >= columns:
            raise UserError(f"{name} names {row},{column}, but {label} has {rows} x {columns} patches")
    return chosen


def allow_any_size(model: MergingViT) -> None:
    """Let the model take images of any height and width from now on, in place.

    Images are padded with zeros on the right and below to whole patches; position entries are resampled (bicubic,
    antialiased) in every forward. Weights do not change, nor does the output for the model's own size.
    """
    embed = model.patch_embed
    embed.strict_img_size, embed.dynamic_img_pad = False, True
    embed.flatten, embed.output_fmt = False, Format.NHWC
