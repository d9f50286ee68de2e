"""Merged tokens: what every block leaves of an image's patches, in numbers and pictures.

    result = merged_tokens.measure(model, images)
    merged_tokens.draw(result, views=("groups", "sizes", "pairs")).save("merged.png")

Command: run/visualize.py merged. Pictures are Pillow's, made of the panels in `panels`.

Shapes: B images, n patches, (gh,gw) the patch grid with n = gh * gw, r merged tokens of a block, L blocks.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.blocks import AFTER_MLP, ATTEND_AGAIN, ONE_STEP_AHEAD, Candidates, Readout, attention_residual, mlp_residual
from models.errors import UserError
from models.merging import Merge
from models.methods import METHODS, Method
from models.schedule import format_schedule
from models.vit import MergingViT

from .inputs import ImageBatches, evaluation
from .panels import (
    Scale,
    draw_groups,
    draw_heat,
    draw_pairs,
    draw_windows,
    lay_out,
    mean_colours,
    stretch,
    to_picture,
)
from .walk import Layer, in_parts, patch_grid, walk

VIEWS = ("groups", "sizes", "pairs", "criteria")
NOT_DRAWN = ("informativeness",)  # a function of attention, which is drawn; `arrays` has it too
LABELS = {
    "groups": "groups in their mean colour",
    "sizes": "patches per token",
    "pairs": "merged in the block: lines lead to the token joined",
    "attention": "attention received (1: an equal share)",
    "size": "size factor (1: merges readily)",
    "similarity": "similarity of the best partner",
    "energy": "energy (high: resembles many, merges)",
}
SHORT = {"sizes": "patches per token", "attention": "attention", "size": "size factor", "similarity": "similarity"}
PANEL = 336  # pixels that a picture is scaled to, as far as whole patches allow
MIN_CELL = 8  # pixels of a patch, at least
CLIP = 0.01  # share of values beyond either end of a criterion's colours: few would hide what the others do
WIDE = 14  # pixels of a patch from which outlines have two
MAX_PIXELS = 100_000_000  # of a picture
FRAME_PANEL, FRAME_IMAGES = 224, 4  # of a frame, at most: some 1600 x 1000 pixels


@dataclass(frozen=True)
class BlockMerge:
    """The merges of one block, per patch of B images; on the CPU."""

    index: int
    group_in: Tensor  # (B,n) the incoming patch token that each patch is in, counted without the prefix
    group: Tensor  # (B,n) the outgoing one
    size: Tensor  # (B,n) patches in the outgoing token of each patch
    pairs: Tensor  # (B,r,2) incoming patch tokens: a merged one, and the one that it joined
    criteria: dict[str, Tensor] = field(default_factory=dict)  # (B,n) each, see `token_scores`
    windows: int = 0  # per side, that the merges kept to; 0: none

    @property
    def tokens(self) -> int:
        """Patch tokens left."""
        return int(self.group.max()) + 1

    @property
    def incoming(self) -> int:
        """Patch tokens that enter."""
        return int(self.group_in.max()) + 1


# Mathematics


@torch.no_grad()
def block_merges(model: MergingViT, images: Tensor, criteria: Collection[int] = ()) -> list[BlockMerge]:
    """Follow the patches of images (B,3,H,W), on any device, through every block; run in parts of bounded memory.

    Args:
        model: in evaluation mode.
        criteria: blocks whose values of single tokens are wanted, see `token_scores`.

    Raises:
        UserError: criteria of a method that has none.
    """
    if criteria and not has_token_scores(model.merge.rule):
        users = " or ".join(name for name, method in METHODS.items() if has_token_scores(method()))
        raise UserError(f"only --merge {users} has criteria, not {model.merge.method}; leave out the view criteria")
    device = next(model.parameters()).device
    parts = []
    for part in in_parts(model, images):
        layers = walk(model, part.to(device))
        parts.append([_block_merge(layer, layer.index in criteria) for layer in layers])
    return [_joined(blocks) for blocks in zip(*parts, strict=True)]


def _block_merge(layer: Layer, with_criteria: bool) -> BlockMerge:
    size = layer.after.size[:, layer.num_prefix_tokens :].gather(1, layer.after.group)
    criteria = token_scores(layer) if with_criteria else {}
    grids = {name: values.gather(1, layer.before.group).cpu() for name, values in criteria.items()}
    pairs = _pairs(layer.merge, layer.num_prefix_tokens, layer.before.group)
    groups = layer.before.group.cpu(), layer.after.group.cpu()
    windows = layer.rule.windows() if layer.plan.local else 0
    return BlockMerge(layer.index, *groups, size.cpu(), pairs.cpu(), grids, windows)


def _pairs(merge: Merge | None, num_prefix_tokens: int, group: Tensor) -> Tensor:
    if merge is None:
        return group.new_zeros(group.shape[0], 0, 2)
    return torch.stack((merge.source, merge.keep.gather(1, merge.into)), dim=2) - num_prefix_tokens


def _joined(parts: tuple[BlockMerge, ...]) -> BlockMerge:
    """Join a block's merges of all parts of the images."""
    tensors = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in ("group_in", "group", "size", "pairs")
    }
    criteria = {name: torch.cat([part.criteria[name] for part in parts]) for name in parts[0].criteria}
    return BlockMerge(parts[0].index, **tensors, criteria=criteria, windows=parts[0].windows)


def has_token_scores(rule: Method) -> bool:
    """Tell whether a method says by what values of single tokens it decides."""
    return type(rule).token_scores is not Method.token_scores


@torch.no_grad()
def token_scores(layer: Layer) -> dict[str, Tensor]:
    """Values of the incoming patch tokens of a block that its method decides by, each (B,N-P): see its `token_scores`.

    Where a method merges what leaves the block, its values are those of the tokens there.
    """
    tokens, block = layer.before, layer.block
    readout = Readout(with_score=True, queries=layer.rule.score_queries(layer.num_prefix_tokens))
    y = block.attn(block.norm1(tokens.x), **layer.attention_inputs, readout=readout)
    place = layer.rule.place()
    if place is not ONE_STEP_AHEAD and place is not ATTEND_AGAIN:
        tokens = tokens._replace(x=attention_residual(block, tokens.x, y))
    if place is AFTER_MLP:
        tokens = tokens._replace(x=mlp_residual(block, tokens.x))
    return layer.rule.token_scores(Candidates(tokens, layer.plan, readout.keys, readout.score))


# Measurement


@dataclass(frozen=True)
class MergedTokensResult:
    """The merges of every block, per patch of a few images.

    Attributes:
        method, r: the merging, r as a command line writes it.
        pictures: (B,3,H,W) the images in [0, 1].
        captions: one per image.
        grid: (gh,gw).
        blocks: one per block of the model.
    """

    label: str
    method: str
    r: str
    num_registers: int
    pictures: Tensor
    captions: tuple[str, ...]
    grid: tuple[int, int]
    blocks: list[BlockMerge]


def measure(
    model: VisionTransformer,
    images: ImageBatches,
    *,
    pictures: Tensor | None = None,
    captions: Sequence[str] = (),
    criteria: Collection[int] = (),
    label: str = "model",
) -> MergedTokensResult:
    """Follow the patches of a few images through all blocks.

    Args:
        images: see `inputs.ImageBatches`; all of them are held in memory.
        pictures: (B,3,H,W) the same in [0, 1]; None: each image scaled to that range.
        captions: one per image; none: their numbers.
        criteria: blocks whose criteria are wanted, for the view `criteria`.

    Raises:
        UserError: criteria of a method that has none.
    """
    with evaluation(model) as vit:
        batch = (
            images if isinstance(images, Tensor) else torch.cat([b if isinstance(b, Tensor) else b[0] for b in images])
        )
        return MergedTokensResult(
            label,
            vit.merge.method,
            format_schedule(vit.merge.r),
            vit.num_registers,
            stretch(batch).cpu() if pictures is None else pictures.cpu(),
            tuple(captions) or tuple(f"image {index + 1}" for index in range(len(batch))),
            patch_grid(vit, batch),
            block_merges(vit, batch, criteria),
        )


def spread_blocks(depth: int, count: int = 4) -> tuple[int, ...]:
    """Indices of `count` blocks, evenly spread, the last one included."""
    return tuple(sorted({max(0, round(depth * part / count) - 1) for part in range(1, count + 1)}))


def summarise(result: MergedTokensResult) -> dict[str, Any]:
    """The merging in numbers, for json; `sizes` has per block and image how many tokens stand for how many patches."""
    return {
        "merge": result.method,
        "r": result.r,
        "grid": list(result.grid),
        "registers": result.num_registers,
        "images": list(result.captions),
        "blocks": [_summarise_block(block) for block in result.blocks],
    }


def _summarise_block(block: BlockMerge) -> dict[str, Any]:
    tables = []
    for size, group in zip(block.size, block.group, strict=True):
        per_token = size.new_zeros(block.tokens).scatter(0, group, size)
        values, counts = per_token.round().long().unique(return_counts=True)
        tables.append({str(value): count for value, count in zip(values.tolist(), counts.tolist(), strict=True)})
    return {"block": block.index, "patch_tokens": block.tokens, "merged": block.pairs.shape[1], "sizes": tables}


def arrays(result: MergedTokensResult) -> dict[str, np.ndarray]:
    """All maps, for npz: groups and sizes (L,B,n), and by block what else `BlockMerge` has."""
    named = {
        "captions": np.array(result.captions),
        "grid": np.array(result.grid),
        "group": np.stack([block.group.numpy() for block in result.blocks]),
        "size": np.stack([block.size.numpy() for block in result.blocks]),
    }
    for block in result.blocks:
        named[f"group_in/{block.index}"] = block.group_in.numpy()
        named[f"pairs/{block.index}"] = block.pairs.numpy()
        named |= {f"{name}/{block.index}": values.numpy() for name, values in block.criteria.items()}
    return named


# Pictures


def draw(result: MergedTokensResult, views: Sequence[str] = ("groups",), blocks: Sequence[int] | None = None) -> Any:
    """Draw one picture (of Pillow's): a row per image and view, a column per block.

    Args:
        views: of `VIEWS`.
        blocks: their indices; None: four, evenly spread.

    Raises:
        UserError: the picture would be too large.
    """
    drawing = _Drawing.of(result, views, spread_blocks(len(result.blocks)) if blocks is None else blocks)
    grid, cell = result.grid, max(MIN_CELL, round(PANEL / max(result.grid)))
    titles = [("input", f"{grid[0] * grid[1]} patches"), *(_title(block) for block in drawing.blocks)]
    entering = ", ".join(str(block.incoming) for block in drawing.blocks)
    lines = [(image, view) for image in range(len(result.pictures)) for view in drawing.views]
    if len(lines) * len(titles) * cell**2 * grid[0] * grid[1] > MAX_PIXELS:
        raise UserError("the picture would be too large; draw fewer images (--num_images), blocks or views")
    rows, captions = [], []
    for image, view in lines:
        row = [to_picture(result.pictures[image], grid, cell)]
        rows.append(row + [drawing.panel(view, block, image, cell) for block in drawing.blocks])
        plain = drawing.views == ("groups",)
        caption = result.captions[image] + ("" if plain else f" \N{MIDDLE DOT} {LABELS.get(view, view)}")
        # criteria are those of the tokens that enter a block, which are more than its title says
        caption += (
            f" \N{MIDDLE DOT} of the tokens that enter the blocks: {entering}" if view in drawing.criteria else ""
        )
        captions.append(caption)
    return lay_out(rows, titles, captions, [drawing.scales.get(view) for _, view in lines], heading(result))


def heading(result: MergedTokensResult) -> str:
    """Model, method and r in one line."""
    merging = f"{result.method}, r = {result.r}" if any(b.pairs.shape[1] for b in result.blocks) else "nothing merges"
    registers = f", {result.num_registers} registers" if result.num_registers else ""
    windows = max((block.windows for block in result.blocks), default=0)
    note = f"; dashed: windows ({windows} x {windows}) that merges keep to" if windows else ""
    return f"{result.label}: {merging}{registers}{note}"


def draw_frames(
    result: MergedTokensResult, views: Sequence[str] = ("groups",), blocks: Sequence[int] | None = None
) -> Iterator[Any]:
    """Yield pictures of one size for an animation: the input, then block by block; a row per image, a column per view.

    Args:
        views: of `VIEWS`.
        blocks: their indices; None: all.
    """
    drawing = _Drawing.of(result, views, range(len(result.blocks)) if blocks is None else blocks)
    grid, count = result.grid, min(len(result.pictures), FRAME_IMAGES)
    cell, captions = max(2, FRAME_PANEL // max(grid)), result.captions[:count]
    inputs = [to_picture(image, grid, cell) for image in result.pictures[:count]]
    patches = ("input", f"{grid[0] * grid[1]} patches")
    count_views = len(drawing.views)
    before = [("before block 0", patches[1])] * count_views
    yield lay_out([[image] * (1 + count_views) for image in inputs], [patches, *before], captions, (), heading(result))
    for block in drawing.blocks:
        panels = [[drawing.panel(view, block, i, cell) for view in drawing.views] for i in range(count)]
        titles = [patches, *(drawing.frame_title(view, block) for view in drawing.views)]
        rows = [[image, *row] for image, row in zip(inputs, panels, strict=True)]
        yield lay_out(rows, titles, captions, (), heading(result))


@dataclass(frozen=True)
class _Drawing:
    """The views and blocks of a result that are drawn together, on the same colour scales."""

    result: MergedTokensResult
    views: tuple[str, ...]  # "criteria" spelled out
    blocks: list[BlockMerge]
    scales: dict[str, Scale]  # of the views that have one: the same for all images and blocks

    @property
    def criteria(self) -> set[str]:
        """Views of values that a method decides by, of the tokens that enter a block."""
        return set(self.scales) - {"sizes"}

    @classmethod
    def of(cls, result: MergedTokensResult, views: Sequence[str], blocks: Sequence[int]) -> "_Drawing":
        """Choose one colour scale per view; a few extreme values lie beyond its ends."""
        drawn = [result.blocks[index] for index in blocks]
        criteria = [name for name in drawn[0].criteria if name not in NOT_DRAWN]
        names = tuple(name for view in views for name in (criteria if view == "criteria" else (view,)))
        scales = {}
        for name in set(names) - {"groups", "pairs"}:
            values = torch.stack([block.size if name == "sizes" else block.criteria[name] for block in drawn]).numpy()
            low, high = np.quantile(values, (0.0, 1.0) if name in ("sizes", "size") else (CLIP, 1 - CLIP)).tolist()
            scales[name] = (
                Scale(1.0, max(high, 2.0), True) if name == "sizes" else Scale(low, high, name == "attention")
            )
        return cls(result, names, drawn, scales)

    def panel(self, view: str, block: BlockMerge, image: int, cell: int) -> np.ndarray:
        """Draw a view of an image in a block."""
        grid, pictures = self.result.grid, self.result.pictures
        before, after = block.group_in[image].view(grid).numpy(), block.group[image].view(grid).numpy()
        if view == "groups":
            colours = mean_colours(pictures[image : image + 1], block.group[image : image + 1], grid)
            drawn = draw_groups(colours.view(*grid, 3).numpy(), after, cell, line=2 if cell >= WIDE else 1)
            return draw_windows(drawn, block.windows) if block.windows else drawn
        if view == "pairs":
            return draw_pairs(to_picture(pictures[image], grid, cell), before, block.pairs[image].numpy(), cell)
        values = (block.size if view == "sizes" else block.criteria[view])[image].view(grid).numpy()
        return draw_heat(values, after if view == "sizes" else before, self.scales[view], cell)

    def frame_title(self, view: str, block: BlockMerge) -> tuple[str, str]:
        """The two lines above a view in a frame."""
        if view == "groups":
            return _title(block)
        if view == "pairs":
            return f"merged in block {block.index}", f"{block.pairs.shape[1]} tokens"
        scale = self.scales[view]
        return SHORT.get(view, view), f"{scale.low:.3g} (dark) to {scale.high:.3g}"


def _title(block: BlockMerge) -> tuple[str, str]:
    return f"after block {block.index}", f"{block.tokens} patch tokens"
