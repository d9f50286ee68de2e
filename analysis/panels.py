"""Panels: pictures of groups of patches and of values per token, and their layout with titles and colour scales.

A panel is an array (gh*cell, gw*cell, 3) of uint8, a patch being a square of `cell` pixels on the grid (gh,gw).
"""

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from models.merging import merge_by_map, unmerge

from .charts import HEAT

MANY = 6  # patches of a merged token: one with more has a single line, else lines would hide everything
DARK, BRIGHT = (20, 20, 20, 200), (255, 255, 255, 255)
FINE = 2  # lines are drawn this many times as large, and then reduced
INK, FAINT = (25, 25, 25), (115, 115, 115)
GAP, TEXT, SMALL = 14, 17, 14  # pixels between panels, of titles and of other text
LEGEND = 84  # pixels, width of a colour scale

# Panels


def to_picture(image: Tensor, grid: tuple[int, int], cell: int) -> np.ndarray:
    """Scale an image (3,H,W) in [0, 1] so that a patch has `cell` pixels."""
    pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    scaled = Image.fromarray(pixels).resize((grid[1] * cell, grid[0] * cell), Image.Resampling.BICUBIC)
    return np.asarray(scaled)


def stretch(images: Tensor) -> Tensor:
    """Scale each image (...,3,H,W) to [0, 1] by its own range, where nobody says how it was normalised."""
    low, high = images.float().amin(dim=(-3, -2, -1), keepdim=True), images.float().amax(dim=(-3, -2, -1), keepdim=True)
    return (images.float() - low) / (high - low).clamp(min=1e-12)


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

    def position(self, values: np.ndarray) -> np.ndarray:
        """The position of values between the ends: 0 to 1."""
        low, high = np.float64(self.low), np.float64(self.high)
        if self.log:
            values, low, high = np.log(np.maximum(values, low)), np.log(low), np.log(high)
        return np.clip((values - low) / max(high - low, 1e-12), 0, 1)

    def colours(self, values: np.ndarray) -> np.ndarray:
        """(...) -> (...,3) in [0, 1]."""
        return colormaps[HEAT](self.position(values))[..., :3]

    def ticks(self) -> list[float]:
        """Round values inside the scale, for a legend."""
        if self.high <= self.low:
            return [self.low]
        if not self.log:
            ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
            return [float(tick) for tick in ticks if self.low <= tick <= self.high]
        decades = range(int(np.floor(np.log10(self.low))), int(np.ceil(np.log10(self.high))) + 1)
        digits = (1, 2, 5) if np.log10(self.high / self.low) < 3.5 else (1,)
        every = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        inside = [tick for tick in every if self.low * 0.999 <= tick <= self.high * 1.001]
        return inside if len(inside) > 1 else [self.low, self.high]


def draw_heat(values: np.ndarray, group: np.ndarray, scale: Scale, cell: int) -> np.ndarray:
    """Draw a map (gh,gw) of one value per token, with the outlines of the tokens (gh,gw)."""
    return draw_groups(scale.colours(values), group, cell, line=1)


def draw_windows(picture: np.ndarray, count: int) -> np.ndarray:
    """Draw the borders of count x count windows as dashed white lines on a panel."""
    canvas = Image.fromarray(picture)
    draw, (height, width) = ImageDraw.Draw(canvas), picture.shape[:2]
    for part in range(1, count):
        x, y = part * width // count, part * height // count
        for start in range(0, max(height, width), 12):
            draw.line((x, start, x, start + 6), BRIGHT[:3], 2)
            draw.line((start, y, start + 6, y), BRIGHT[:3], 2)
    return np.asarray(canvas)


def draw_pairs(picture: np.ndarray, group: np.ndarray, pairs: np.ndarray, cell: int) -> np.ndarray:
    """Draw what merged into what: a line from each patch of a merged token to the middle of the token that it joined.

    A token of many patches has a single line, from its own middle.

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
        starts, end = patches[merged], _middle(patches[joined])
        _fill(draw, starts, side, (*colours[joined], 175))
        lines += [(start, end) for start in (starts if len(starts) <= MANY else [_middle(starts)])]
    unit = FINE * max(1.0, cell / 20)
    _draw_lines(draw, lines, side, unit)
    for joined, colour in colours.items():
        (x, y), radius = _centre(_middle(patches[joined]), side), 4 * unit
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), (*colour, 255), BRIGHT, round(unit))
    return np.asarray(canvas.resize(picture.shape[1::-1], Image.Resampling.LANCZOS))


def _draw_lines(draw: ImageDraw.ImageDraw, lines: Sequence[tuple[Any, Any]], side: int, unit: float) -> None:
    """Draw white lines with dark rims; all rims lie under all lines."""
    for width, colour in ((3.2, DARK), (1.4, BRIGHT)):
        for start, end in lines:
            (x, y), half = _centre(start, side), (width + 1) * unit / 2
            draw.line((x, y, *_centre(end, side)), colour, round(width * unit))
            draw.ellipse((x - half, y - half, x + half, y + half), colour)


def _faded(picture: np.ndarray) -> np.ndarray:
    """Take most of the colour out, so that colours drawn on the picture stand out."""
    grey = picture.mean(axis=2, keepdims=True)
    return (0.75 * grey + 0.25 * picture).astype(np.uint8)


def _distinct_colours() -> Iterator[tuple[int, int, int]]:
    """Yield bright colours without end, each far from those before it: hues by the golden ratio, three brightnesses."""
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
    """The patch, of a token's (k,2), nearest to their centre, for the centre itself may lie outside of the token."""
    distance = ((patches - patches.mean(axis=0)) ** 2).sum(axis=1)
    middle: np.ndarray = patches[distance.argmin()]
    return middle


# Layout


def lay_out(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[tuple[str, str]],
    captions: Sequence[str],
    scales: Sequence[Scale | None] = (),
    heading: str = "",
) -> Any:
    """Make one picture: rows of panels, captions underneath, a title (two lines) per column, scales at the right.

    Args:
        heading: a line above all.
    """
    height, width = rows[0][0].shape[:2]
    above = TEXT + 10 if heading else 0
    top, row_height = above + GAP + TEXT + SMALL + 16, height + SMALL + GAP + 6
    size = (GAP + len(titles) * (width + GAP) + LEGEND * any(scales), top + len(rows) * row_height)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    large, small = ImageFont.load_default(TEXT), ImageFont.load_default(SMALL)
    if heading:
        draw.text((GAP, GAP), heading, INK, large, anchor="lt")
    for column, (title, below) in enumerate(titles):
        middle = GAP + column * (width + GAP) + width // 2
        draw.text((middle, above + GAP), title, INK, large, anchor="mt")
        draw.text((middle, above + GAP + TEXT + 6), below, FAINT, small, anchor="mt")
    for line, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        y = top + line * row_height
        for column, picture in enumerate(row):
            x = GAP + column * (width + GAP)
            canvas.paste(Image.fromarray(picture), (x, y))
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=INK)
        draw.text((GAP, y + height + 5), caption, FAINT, small, anchor="lt")
    for line, scale in enumerate(scales):
        if scale:
            draw_scale(canvas, scale, (size[0] - LEGEND, top + line * row_height), height)
    return canvas


def draw_scale(canvas: Any, scale: Scale, corner: tuple[int, int], height: int, width: int = 16) -> None:
    """Draw an upright colour scale with numbers on a picture of Pillow's."""
    (x, y), draw, small = corner, ImageDraw.Draw(canvas), ImageFont.load_default(SMALL - 1)
    ends = Scale(0, 1)
    ramp = ends.colours(np.linspace(1, 0, height))[:, None].repeat(width, axis=1)
    canvas.paste(Image.fromarray((ramp * 255).round().astype(np.uint8)), (x, y))
    draw.rectangle((x - 1, y - 1, x + width, y + height), outline=INK)
    for tick in scale.ticks():
        at = y + (1 - float(scale.position(np.array(tick)))) * (height - 1)
        draw.line((x + width, at, x + width + 4, at), INK)
        text_at = min(max(at, y + SMALL / 2), y + height - SMALL / 2)
        draw.text((x + width + 8, text_at), f"{tick:.3g}", FAINT, small, anchor="lm")


def one_palette(frames: Sequence[Any]) -> list[Any]:
    """Reduce pictures of one size to 256 colours that they share, so that an animation does not flicker."""
    palette = _joint_palette(frames)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def _joint_palette(frames: Sequence[Any]) -> Any:
    """256 colours of the first, a middle and the last frame; the brightest become the white between panels."""
    some = [frames[0], frames[len(frames) // 2], frames[-1]]
    joint = Image.new("RGB", (some[0].width, 3 * some[0].height))
    for index, frame in enumerate(some):
        joint.paste(frame, (0, index * frame.height))
    palette = joint.quantize(256)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    brightness = colours.min(axis=1)
    colours[brightness >= min(246, brightness.max())] = 255  # all near white: Pillow looks colours up roughly
    palette.putpalette(colours.ravel().tolist())
    return palette
