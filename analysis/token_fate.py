"""Token fate: where every patch went, block by block, as a strip of pictures and as a tree.

    result = token_fate.measure(model, images, pictures)
    token_fate.draw(result)              # chosen patches and all that their tokens stand for, block by block
    token_fate.draw_tree(result)         # all patches of one image: lines that meet where tokens merge

Command: run/analyze.py fate. Shapes: K images, n patches, L blocks, Q chosen patches, (gh,gw) the patch grid.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models import UserError

from . import charts
from .inputs import evaluation
from .intervals import mean
from .merged_tokens import block_merges, spread_blocks
from .walk import check_patches, patch_grid

MOST_BLOCKS = 7  # of the strip


@dataclass
class FateResult:
    """The groups of a few images' patches through all blocks.

    Attributes:
        label: the model's name in figures.
        grid: (gh,gw).
        groups: (L+1,K,n) the token that each patch is in: before the first block, then after every block.
        queries: the Q chosen patches (row, column).
        pictures: (K,H,W,3) the images in [0, 1].
        captions: names of the images.
    """

    label: str
    grid: tuple[int, int]
    groups: np.ndarray
    queries: list[tuple[int, int]]
    pictures: np.ndarray
    captions: list[str] = field(default_factory=list)

    def members(self, block: int, image: int, patch: tuple[int, int]) -> np.ndarray:
        """The patches (gh,gw), as flags, of the token that holds a patch after a block; -1: before the first one."""
        group = self.groups[block + 1, image]
        return (group == group[patch[0] * self.grid[1] + patch[1]]).reshape(self.grid)


@torch.no_grad()
def measure(
    model: VisionTransformer,
    images: Tensor,
    pictures: np.ndarray,
    *,
    patches: Sequence[tuple[int, int]] | None = None,
    captions: Sequence[str] = (),
    label: str = "model",
) -> FateResult:
    """Follow all patches of a few images through the blocks.

    Args:
        images: (K,3,H,W) as the model sees them.
        pictures: (K,H,W,3) the same in [0, 1].
        patches: chosen patches (row, column); None: three of them.

    Raises:
        UserError: no such patch.
    """
    with evaluation(model) as vit:
        queries = check_patches(vit, patches, label=label)
        blocks = block_merges(vit, images)
        grid = patch_grid(vit, images)
    groups = np.stack([blocks[0].group_in.numpy(), *(block.group.numpy() for block in blocks)])
    return FateResult(label, grid, groups, queries, pictures, list(captions))


def spread(group: np.ndarray, grid: tuple[int, int]) -> float:
    """How far apart the patches of a token lie: the root mean square distance (in patches) from its centre, over all n
    patches of an image (n,)."""
    places = np.stack(np.unravel_index(np.arange(len(group)), grid), axis=1).astype(float)
    count = np.bincount(group)
    centre = np.stack([np.bincount(group, places[:, axis]) for axis in (0, 1)], axis=1) / np.maximum(count, 1)[:, None]
    return float(np.sqrt(((places - centre[group]) ** 2).sum(axis=1).mean()))


def summarise(result: FateResult) -> dict[str, Any]:
    """Numbers after every block, means over the images: tokens, patches in the largest, alone, and how far apart."""
    rows = []
    for block in range(len(result.groups)):
        groups = result.groups[block]
        sizes = [np.bincount(group) for group in groups]
        row: dict[str, Any] = {"block": block - 1, "tokens": int((sizes[0] > 0).sum())}
        row |= mean(np.array([size.max() for size in sizes], dtype=float)).named("largest")
        row |= mean(np.array([(size == 1).sum() / size.sum() for size in sizes])).named("patches_alone")
        row |= mean(np.array([spread(group, result.grid) for group in groups])).named("spread")
        rows.append(row)
    note = "block -1: before the first one; patches_alone is a fraction; spread is in patches"
    return {"label": result.label, "n_images": len(result.pictures), "note": note, "blocks": rows}


# Figures


def draw(results: FateResult | Sequence[FateResult]) -> Figure:
    """Draw a row per image, a column per block: chosen patches, and all that their tokens stand for by then.

    Of several models, their rows follow each other.
    """
    results = [results] if isinstance(results, FateResult) else list(results)
    depth = len(results[0].groups) - 1
    blocks = spread_blocks(depth, min(depth, MOST_BLOCKS - 1))
    rows, captions = [], []
    for image, picture in enumerate(results[0].pictures):
        for result in results:
            rows.append([_cell(result, picture, image, block) for block in (-1, *blocks)])
            name = result.captions[image] if result.captions else f"image {image + 1}"
            captions.append(f"{result.label} {name}" if len(results) > 1 else name)
    columns = ["chosen patches", *(f"after block {block}" for block in blocks)]
    note = "A colour is a chosen patch and all patches that its token stands for; where two chosen "
    note += "patches are in one token, "
    note += "it has the colour of the first. Below: patches in those tokens."
    title = "Where patches went" if len(results) > 1 else f"{results[0].label}: where patches went"
    return charts.picture_table(rows, columns, captions, title, note=note)


def _cell(result: FateResult, picture: np.ndarray, image: int, block: int) -> charts.Cell:
    def cell(ax: Axes) -> None:
        charts.show_image(ax, 0.55 * picture.mean(axis=2, keepdims=True) + 0.25 * picture + 0.2)
        shade, sizes = np.zeros((*result.grid, 4)), []
        for index, query in reversed(list(enumerate(result.queries))):
            members = result.members(block, image, query)
            shade[members] = (*charts.rgb_of(index), 0.75)
            sizes.append(int(members.sum()))
        height, width = picture.shape[:2]
        ax.imshow(shade, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
        ax.set_xlabel(", ".join(map(str, reversed(sizes))), fontsize=7, labelpad=2)

    return cell


@charts.styled
def draw_tree(result: FateResult, image: int = 0) -> Figure:
    """Draw all patches of one image as lines that meet where their tokens merge, in the colours of the image.

    A line is as thick as its token has patches. Patches are ordered so that no lines cross: groups only ever join.
    """
    figure, axes = charts.new_figure(
        1, 2, 5.0, 6.0, f"{result.label}: what became of every patch", width_ratios=(1, 3.2)
    )
    name = result.captions[image] if result.captions else f"image {image + 1}"
    charts.show_image(axes[0, 0], result.pictures[image], name)
    _draw_lines(axes[0, 1], result, image)
    tokens = len(np.unique(result.groups[-1, image]))
    note = f"{result.groups.shape[2]} patches on the left, {tokens} tokens on the right. The order "
    note += "from top to bottom is that "
    charts.footer(figure, note + "of joining, not of place.")
    return figure


def _draw_lines(ax: Axes, result: FateResult, image: int) -> None:
    groups = result.groups[:, image]
    order = np.lexsort(groups)  # by the last block's token, within it by the one before, ...
    place = np.empty(len(order))
    place[order] = np.arange(len(order))
    colours = _patch_colours(result.pictures[image], result.grid)
    count = len(order)
    for block in range(len(groups)):
        now = groups[block]
        after = groups[min(block + 1, len(groups) - 1)]
        size = np.bincount(now)
        y = np.bincount(now, place) / np.maximum(size, 1)
        y_after = np.bincount(after, place) / np.maximum(np.bincount(after), 1)
        colour = np.stack([np.bincount(now, colours[:, c]) for c in range(3)], axis=1) / np.maximum(size, 1)[:, None]
        first = {int(token): patch for patch, token in enumerate(now)}
        tokens = sorted(first)
        segments = []
        for token in tokens:
            end = y_after[after[first[token]]] if block + 1 < len(groups) else y[token]
            x = block - 1
            segments.append([(x, y[token]), (x + 0.5, y[token]), (x + (1.0 if block + 1 < len(groups) else 0.6), end)])
        width = 0.8 * np.sqrt(size[tokens]) * 196 / count
        ax.add_collection(LineCollection(segments, colors=np.clip(colour[tokens], 0, 0.92), linewidths=width))
    ax.set_xlim(-1.1, len(groups) - 1.2)
    ax.set_ylim(count, -1)
    ax.set_yticks([])
    ax.grid(False)
    ax.set_xticks(range(-1, len(groups) - 1), ["input", *map(str, range(len(groups) - 1))])
    ax.set_xlabel("after block")


def _patch_colours(picture: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Mean colour of each patch (n,3) of a picture (H,W,3)."""
    rows = np.array_split(picture, grid[0], axis=0)
    return np.array([part.mean(axis=(0, 1)) for row in rows for part in np.array_split(row, grid[1], axis=1)])


# Command


def add_parser(subparsers: Any) -> None:
    """Add the command `fate`."""
    from .command import add_command, add_patches_flag

    parser = add_command(subparsers, "fate", run, "where every patch went, block by block, as pictures and as a tree")
    add_patches_flag(parser, "that are followed")
    parser.add_argument("--show", type=int, default=3, metavar="K", help="images (default: 3)")


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    """Write fate.json, fate.npz and the figures."""
    from .command import Output, load_models, measure_shown

    models = load_models(args, main_argv)
    if args.show < 1:
        raise UserError(f"--show must be at least 1, not {args.show}")
    if not any(any(loaded.model.plan().merges) for loaded in models):
        raise UserError("none of the models merges tokens; give --r, for instance --r 16")
    for loaded in models:
        check_patches(loaded.model, args.patches, "--patches", loaded.label)
    models = [loaded for loaded in models if any(loaded.model.plan().merges)]
    if len({(len(m.model.blocks), m.model.patch_embed.grid_size) for m in models}) > 1:
        raise UserError("models of different depth or patch grid have no common strip; give them one by one")
    out = Output(args, main_argv, models)
    results = measure_shown(measure, args, models, out, "patches", patches=args.patches)
    out.json("fate", {"models": [summarise(result) for result in results]})
    out.npz("fate", {f"{result.label}/groups": result.groups for result in results})
    out.figure("fate_strip", draw(results))
    for loaded, result in zip(models, results, strict=True):
        out.figure(f"fate_tree_{loaded.slug}", draw_tree(result))
