"""Pictures of merged tokens: what every block leaves of an image's patches, and panels that show it.

Panels are arrays (gh*cell, gw*cell, 3) of uint8, a patch being a square of `cell` pixels.

Shapes: B images, n patches, (gh,gw) the patch grid with n = gh * gw, r merged tokens of a block.
"""

import colorsys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw
from torch import Tensor

from models.blocks import AFTER_MLP, ATTEND_AGAIN, ONE_STEP_AHEAD, Candidates, Readout, attention_residual, mlp_residual
from models.errors import UserError
from models.merging import Merge, merge_by_map, unmerge
from models.methods import METHODS, Method
from models.vit import MergingViT

from .charts import HEAT
from .walk import Layer, patch_grid, walk

MAP_BYTES = 2**28  # of one block's attention maps: more images than that are run in parts
MANY = 6  # patches of a merged token: one with more has a single line, else lines would hide everything
DARK, BRIGHT = (20, 20, 20, 200), (255, 255, 255, 255)
FINE = 2  # lines are drawn this many times as large, and then reduced


@dataclass(frozen=True)
class State:
    """What one block did to the patches of B images; on the CPU."""

    index: int
    group_in: Tensor  # (B,n) the incoming patch token that each patch is in, counted without the prefix
    group: Tensor  # (B,n) the outgoing one
    size: Tensor  # (B,n) patches in the outgoing token of each patch
    pairs: Tensor  # (B,r,2) incoming patch tokens: a merged one, and the one that it joined
    criteria: dict[str, Tensor] = field(default_factory=dict)  # (B,n) each, see `token_scores`

    @property
    def tokens(self) -> int:
        """Patch tokens left."""
        return int(self.group.max()) + 1


# State of every block


@torch.no_grad()
def block_states(model: MergingViT, images: Tensor, criteria: Collection[int] = ()) -> list[State]:
    """The state of every block, for images (B,3,H,W) on any device, run in parts of bounded memory.

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
    for part in images.split(_images_at_once(model, images)):
        layers = walk(model, part.to(device))
        parts.append([_state(layer, layer.index in criteria) for layer in layers])
    return [_joined(states) for states in zip(*parts, strict=True)]


def _images_at_once(model: MergingViT, images: Tensor) -> int:
    rows, columns = patch_grid(model, images[:1])
    tokens = rows * columns + model.num_prefix_tokens
    heads = max(block.attn.num_heads for block in model.blocks)
    return max(1, MAP_BYTES // (4 * int(heads) * tokens**2))


def _state(layer: Layer, with_criteria: bool) -> State:
    size = layer.after.size[:, layer.num_prefix_tokens :].gather(1, layer.after.group)
    criteria = token_scores(layer) if with_criteria else {}
    grids = {name: values.gather(1, layer.before.group).cpu() for name, values in criteria.items()}
    pairs = _pairs(layer.merge, layer.num_prefix_tokens, layer.before.group)
    return State(layer.index, layer.before.group.cpu(), layer.after.group.cpu(), size.cpu(), pairs.cpu(), grids)


def _pairs(step: Merge | None, prefix: int, group: Tensor) -> Tensor:
    if step is None:
        return group.new_zeros(group.shape[0], 0, 2)
    return torch.stack((step.source, step.keep.gather(1, step.into)), dim=2) - prefix


def _joined(parts: tuple[State, ...]) -> State:
    """Several parts of the images in one."""
    tensors = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in ("group_in", "group", "size", "pairs")
    }
    criteria = {name: torch.cat([part.criteria[name] for part in parts]) for name in parts[0].criteria}
    return State(parts[0].index, **tensors, criteria=criteria)


def has_token_scores(rule: Method) -> bool:
    """Whether a method tells by what values of single tokens it decides."""
    return type(rule).token_scores is not Method.token_scores


@torch.no_grad()
def token_scores(layer: Layer) -> dict[str, Tensor]:
    """Values of the incoming patch tokens of a block that its method decides by, each (B,N-P): see its `token_scores`.

    Where a method merges what leaves the block, its values are those of the tokens there.
    """
    tokens, block = layer.before, layer.block
    readout = Readout(with_score=True)
    y = block.attn(block.norm1(tokens.x), attn_mask=layer.bias, readout=readout)
    place = layer.rule.place()
    if place is not ONE_STEP_AHEAD and place is not ATTEND_AGAIN:
        tokens = tokens._replace(x=attention_residual(block, tokens.x, y))
    if place is AFTER_MLP:
        tokens = tokens._replace(x=mlp_residual(block, tokens.x))
    return layer.rule.token_scores(Candidates(tokens, layer.plan, readout.keys, readout.score))


# Panels


def to_picture(image: Tensor, grid: tuple[int, int], cell: int) -> np.ndarray:
    """An image (3,H,W) in [0, 1], scaled so that a patch has `cell` pixels."""
    pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    scaled = Image.fromarray(pixels).resize((grid[1] * cell, grid[0] * cell), Image.Resampling.BICUBIC)
    return np.asarray(scaled)


def mean_colours(images: Tensor, group: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean colour of the group that each patch is in: images (B,3,H,W), group (B,n) -> (B,n,3)."""
    patches = F.adaptive_avg_pool2d(images, grid).flatten(2).transpose(1, 2)
    return unmerge(merge_by_map(patches, group, int(group.max()) + 1), group)


def draw_groups(colours: np.ndarray, group: np.ndarray, cell: int, line: int = 2) -> np.ndarray:
    """Fill each patch with its colour (gh,gw,3) in [0, 1] and outline the groups (gh,gw) by `line` pixels, 1 or 2."""
    filled = np.kron(colours, np.ones((cell, cell, 1)))
    labels = np.kron(group, np.ones((cell, cell), dtype=group.dtype))
    edge = np.zeros(labels.shape, dtype=bool)
    for axis in (0, 1):
        first, second = (np.arange(labels.shape[axis] - 1) + offset for offset in (0, 1))
        differs = np.take(labels, first, axis) != np.take(labels, second, axis)
        near, far = np.moveaxis(edge, axis, 0)[:-1], np.moveaxis(edge, axis, 0)[1:]
        if line > 1:
            near |= np.moveaxis(differs, axis, 0)
        far |= np.moveaxis(differs, axis, 0)
    # dark outlines, except where the picture itself is too dark to show them
    brightness = filled.mean(axis=2, keepdims=True)
    outline = np.where(brightness > 0.22, filled * 0.2, 0.36)
    return (np.where(edge[..., None], outline, filled) * 255).round().astype(np.uint8)


@dataclass(frozen=True)
class Scale:
    """A colour scale from `low` to `high`, even in the value or in its logarithm."""

    low: float
    high: float
    log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where values lie between the ends: 0 to 1."""
        low, high = np.float64(self.low), np.float64(self.high)
        if self.log:
            values, low, high = np.log(np.maximum(values, low)), np.log(low), np.log(high)
        return np.clip((values - low) / max(high - low, 1e-12), 0, 1)

    def colours(self, values: np.ndarray) -> np.ndarray:
        """(...) -> (...,3) in [0, 1]."""
        return colormaps[HEAT](self.place(values))[..., :3]

    def ticks(self) -> list[float]:
        """Round values inside the scale, for a legend."""
        if self.high <= self.low:
            return [self.low]
        if not self.log:
            ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
            return [float(tick) for tick in ticks if self.low <= tick <= self.high]
        decades = range(int(np.floor(np.log10(self.low))), int(np.ceil(np.log10(self.high))) + 1)
        steps = (1, 2, 5) if np.log10(self.high / self.low) < 3.5 else (1,)
        every = [float(f"{step}e{decade}") for decade in decades for step in steps]
        inside = [tick for tick in every if self.low * 0.999 <= tick <= self.high * 1.001]
        return inside if len(inside) > 1 else [self.low, self.high]


def draw_heat(values: np.ndarray, group: np.ndarray, scale: Scale, cell: int) -> np.ndarray:
    """A map (gh,gw) of one value per token, with the outlines of the tokens (gh,gw)."""
    return draw_groups(scale.colours(values), group, cell, line=1)


def draw_pairs(picture: np.ndarray, group: np.ndarray, pairs: np.ndarray, cell: int) -> np.ndarray:
    """What merged into what: a line from each patch of a merged token (from a large one's middle) to the joined token.

    The patches of all that becomes one token have one colour, paler in the token that was joined, which has a dot.

    Args:
        picture: the panel of the image itself.
        group: (gh,gw) incoming token of each patch.
        pairs: (r,2) incoming tokens: merged, joined.
    """
    canvas = Image.fromarray(_faded(picture)).resize((picture.shape[1] * FINE, picture.shape[0] * FINE))
    draw, side = ImageDraw.Draw(canvas, "RGBA"), cell * FINE
    patches = {token: np.argwhere(group == token) for token in np.unique(pairs).tolist()}
    colours = dict(zip(dict.fromkeys(pairs[:, 1].tolist()), _distinct_colours(), strict=False))
    for joined, colour in colours.items():
        _fill(draw, patches[joined], side, (*colour, 95))
    lines = []
    for merged, joined in pairs.tolist():
        own, end = patches[merged], _middle(patches[joined])
        _fill(draw, own, side, (*colours[joined], 175))
        lines += [(start, end) for start in (own if len(own) <= MANY else [_middle(own)])]
    unit = FINE * max(1.0, cell / 20)
    _draw_lines(draw, lines, side, unit)
    for joined, colour in colours.items():
        (x, y), radius = _centre(_middle(patches[joined]), side), 4 * unit
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), (*colour, 255), BRIGHT, round(unit))
    return np.asarray(canvas.resize(picture.shape[1::-1], Image.Resampling.LANCZOS))


def _draw_lines(draw: ImageDraw.ImageDraw, lines: Sequence[tuple[Any, Any]], side: int, unit: float) -> None:
    """White ones with dark rims, which all lie under all lines."""
    for width, colour in ((3.2, DARK), (1.4, BRIGHT)):
        for start, end in lines:
            (x, y), half = _centre(start, side), (width + 1) * unit / 2
            draw.line((x, y, *_centre(end, side)), colour, round(width * unit))
            draw.ellipse((x - half, y - half, x + half, y + half), colour)


def _faded(picture: np.ndarray) -> np.ndarray:
    """Nearly grey, so that colours drawn on it stand out."""
    grey = picture.mean(axis=2, keepdims=True)
    return (0.75 * grey + 0.25 * picture).astype(np.uint8)


def _distinct_colours() -> Iterator[tuple[int, int, int]]:
    """Bright colours without end, each far from those before it: hues by the golden ratio, in three brightnesses."""
    index = 0
    while True:
        saturation, value = ((0.85, 1.0), (0.5, 1.0), (0.9, 0.8))[index % 3]
        red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, saturation, value)
        yield round(red * 255), round(green * 255), round(blue * 255)
        index += 1


def _fill(draw: ImageDraw.ImageDraw, patches: np.ndarray, side: int, colour: tuple[int, ...]) -> None:
    for row, column in patches.tolist():
        draw.rectangle((column * side, row * side, (column + 1) * side - 1, (row + 1) * side - 1), colour)


def _centre(patch: np.ndarray, side: int) -> tuple[float, float]:
    """x and y of a patch (row, column)."""
    return (float(patch[1]) + 0.5) * side, (float(patch[0]) + 0.5) * side


def _middle(patches: np.ndarray) -> np.ndarray:
    """That patch of a token (k,2) which is nearest to the token's centre, for the centre may lie outside of it."""
    distance = ((patches - patches.mean(axis=0)) ** 2).sum(axis=1)
    middle: np.ndarray = patches[distance.argmin()]
    return middle
