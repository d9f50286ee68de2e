"""The one style of all figures, and what they are made of: heat maps on the patch grid, overlays, tables of pictures.

Figures are made without pyplot: no global state, no display needed. Arrays are numpy; images are (H,W,3) in [0, 1],
maps are (gh,gw) on the patch grid.
"""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

INK, FAINT, RULE = "#222222", "#767676", "#dddddd"
# Okabe and Ito's colours, which colour-blind people can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#555555")
TOKEN_COLOURS = {"class": "#D55E00", "distillation": "#CC79A7", "registers": "#009E73", "patches": "#0072B2"}
HEAT, DENSITY = "viridis", "magma_r"
PANEL, WIDEST = 1.75, 14.0  # inches of a picture, and of a row of them at most
TITLE_INCH = 0.1  # a letter of a title
CHARACTERS_PER_INCH, LINE, FOOTER = 18, 0.145, "footer"  # of a footer: width, inches per line, its mark
Cell = Callable[[Axes], Any]  # draws on its axes
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": True,
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "figure.dpi": 120,
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorate a function that makes a figure: inside it, our style holds; outside nothing changes."""

    @wraps(draw)
    def inside(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


def new_figure(
    rows: int = 1, columns: int = 1, width: float = 4.0, height: float = 3.0, title: str | None = None, **options: Any
) -> tuple[Figure, np.ndarray]:
    """Make a figure and its axes (rows,columns).

    Args:
        width, height: inches of one of the axes.
        **options: of matplotlib's `Figure.subplots`.
    """
    wide = max(columns * width, 0.2 + TITLE_INCH * len(title or ""))
    figure = Figure(figsize=(wide, rows * height + (0.35 if title else 0)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, axes


def colour_of(index: int) -> str:
    """The colour of the index-th model."""
    return COLOURS[index % len(COLOURS)]


def rgb_of(index: int) -> tuple[float, float, float]:
    """`colour_of` as numbers."""
    return to_rgb(colour_of(index))


def token_colour(token_type: str) -> str:
    """The colour of class, distillation, registers (or register 3), patches."""
    return TOKEN_COLOURS["registers" if token_type.startswith("register") else token_type]


def show_image(ax: Axes, image: np.ndarray, title: str = "") -> None:
    """Draw an image without axes."""
    _bare(ax, title)
    ax.imshow(image)


def show_map(
    ax: Axes, values: np.ndarray, title: str = "", limits: tuple[float, float] | None = None, cmap: str = HEAT
) -> Any:
    """Draw a map, a square per patch, and return it for a colour bar. limits None: the range of the map itself."""
    _bare(ax, title)
    low, high = limits if limits else (float(np.nanmin(values)), float(np.nanmax(values)))
    return ax.imshow(values, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")


def show_overlay(
    ax: Axes, image: np.ndarray, values: np.ndarray, title: str = "", limits: tuple[float, float] | None = None
) -> Any:
    """Draw a map (bilinear, 60 % opaque) over the image in grey, and return it for a colour bar."""
    _bare(ax, title)
    height, width = image.shape[:2]
    low, high = limits if limits else (float(np.nanmin(values)), float(np.nanmax(values)))
    ax.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=1)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    return ax.imshow(values, cmap=HEAT, vmin=low, vmax=high, alpha=0.6, interpolation="bilinear", extent=extent)


def mark_patch(ax: Axes, patch: tuple[int, int], side: float = 1.0, colour: str = "#ff2d2d") -> None:
    """Outline the patch (row, column); `side` is its length in the axes' units (1 on a map, pixels on an image)."""
    row, column = patch
    corner = (column * side - 0.5, row * side - 0.5)
    ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=1.6))


def image_cell(image: np.ndarray) -> Cell:
    """A cell of `picture_table`: an image."""
    return lambda ax: show_image(ax, image)


def rgb_cell(values: np.ndarray) -> Cell:
    """A cell of `picture_table`: a map (gh,gw,3) of colours in [0, 1], a square per patch."""

    def draw(ax: Axes) -> None:
        _bare(ax, "")
        ax.imshow(values, interpolation="nearest")

    return draw


def patch_cell(image: np.ndarray, patch: tuple[int, int], rows: int) -> Cell:
    """A cell of `picture_table`: an image with one patch of a grid of so many rows outlined."""

    def draw(ax: Axes) -> None:
        show_image(ax, image)
        mark_patch(ax, patch, image.shape[0] / rows)

    return draw


def map_cell(
    values: np.ndarray,
    limits: tuple[float, float] | None = None,
    marked: np.ndarray | None = None,
    cmap: str = HEAT,
    also: np.ndarray | None = None,
) -> Cell:
    """A cell of `picture_table`: a map (gh,gw), with the patches of a mask (gh,gw) outlined; empty for a map of NaN.

    Args:
        also: another mask, outlined in orange where the first one is not.
    """

    def draw(ax: Axes) -> None:
        if np.isnan(values).all():
            ax.set_axis_off()
            return
        show_map(ax, values, limits=limits, cmap=cmap)
        if also is not None:
            for row, column in np.argwhere(also if marked is None else also & ~marked):
                mark_patch(ax, (int(row), int(column)), colour="#ffae42")
        for row, column in np.argwhere(marked) if marked is not None else ():
            mark_patch(ax, (int(row), int(column)))

    return draw


def overlay_cell(
    image: np.ndarray,
    values: np.ndarray,
    limits: tuple[float, float] | None = None,
    patch: tuple[int, int] | None = None,
) -> Cell:
    """A cell of `picture_table`: a map (gh,gw) laid over the image, with one patch outlined."""

    def draw(ax: Axes) -> None:
        show_overlay(ax, image, values, limits=limits)
        if patch is not None:
            mark_patch(ax, patch, image.shape[0] / values.shape[0])

    return draw


def draw_box(
    ax: Axes, box: Sequence[float], colour: str, label: str = "", dashed: bool = False, inset: int = 0
) -> None:
    """Draw a box (x1,y1,x2,y2) in pixels with a thin dark rim, so that it shows on any picture.

    Args:
        inset: points that it is drawn inside of its place, so that boxes that coincide are all seen.
    """
    x1, y1, x2, y2 = box
    scale = max(abs(ax.get_xlim()[1] - ax.get_xlim()[0]), abs(ax.get_ylim()[1] - ax.get_ylim()[0])) / (PANEL * 72)
    gap = (1 + inset) * scale  # a point: lines at the very rim of a picture would be cut off
    shape: dict[str, Any] = dict(fill=False, xy=(x1 - 0.5 + gap, y1 - 0.5 + gap))
    shape |= dict(width=max(x2 - x1 - 2 * gap, scale), height=max(y2 - y1 - 2 * gap, scale))
    ax.add_patch(Rectangle(**shape, edgecolor="black", linewidth=2.2, alpha=0.55))
    ax.add_patch(Rectangle(**shape, edgecolor=colour, linewidth=1.5, linestyle="--" if dashed else "-", label=label))


def row_label(ax: Axes, text: str) -> None:
    """Write a caption at the left of a row of pictures."""
    ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8, color=FAINT, labelpad=6)


@dataclass(frozen=True)
class Bar:
    """A colour bar below some columns of a `picture_table`.

    Attributes:
        columns: first and last one.
        limits: of the colours.
        over: there are values above the upper limit, which have its colour.
    """

    columns: tuple[int, int]
    limits: tuple[float, float]
    label: str
    cmap: str = HEAT
    over: bool = False


@styled
def picture_table(
    rows: Sequence[Sequence[Cell]],
    columns: Sequence[str],
    captions: Sequence[str] | None = None,
    title: str | None = None,
    aspect: float = 1.0,
    note: str = "",
    bars: Sequence[Bar] = (),
) -> Figure:
    """A table of pictures, each drawn by its cell.

    Args:
        columns, captions: names above the columns and beside the rows.
        aspect: height / width of a picture.
        note: lines below the table.
        bars: colour bars below columns.
    """
    width = max(map(len, rows))
    side = min(PANEL, WIDEST / width)
    heights = [side * aspect] * len(rows) + ([0.1] if bars else [])
    size = (width * side + (0.9 if captions else 0), sum(heights) + (0.35 if title else 0) + (0.5 if bars else 0) + 0.2)
    wide = max(size[0], 3.4, 0.2 + TITLE_INCH * len(title or ""))
    figure = Figure(figsize=(wide, size[1]), layout="constrained")
    cells_grid = figure.add_gridspec(len(heights), width, height_ratios=heights)
    for row, cells in enumerate(rows):
        for column in range(len(cells)):
            ax = figure.add_subplot(cells_grid[row, column])
            cells[column](ax)
            if row == 0 and column < len(columns):
                name = textwrap.fill(columns[column], max(8, int(side * 14)), break_long_words=False)
                ax.set_title(name, fontsize=8.5 if "\n" not in name else 7.5, loc="center")
            if captions and column == 0:
                row_label(ax, textwrap.fill(captions[row], 16))
    for bar in bars:
        first, last = bar.columns
        _flat_bar(figure, figure.add_subplot(cells_grid[-1, first : min(last, first + 2) + 1]), bar)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    if note:
        footer(figure, note)
    return figure


def _flat_bar(figure: Figure, ax: Axes, bar: Bar) -> None:
    """Draw a colour bar that lies on its side, on axes of its own."""
    low, high = bar.limits
    scale = ScalarMappable(Normalize(low, high if high > low else low + 1e-12), bar.cmap)
    ax.grid(False)
    drawn = figure.colorbar(scale, cax=ax, orientation="horizontal", extend="max" if bar.over else "neither")
    drawn.outline.set_visible(False)
    drawn.ax.tick_params(labelsize=7, length=0)
    drawn.set_label(bar.label, fontsize=7.5)


def footer(figure: Figure, *notes: str) -> None:
    """Write lines below a figure, under those that are there, as wide as it is; the figure grows by them."""
    width = int(figure.get_figwidth() * CHARACTERS_PER_INCH)
    before = next((text for text in figure.texts if text.get_gid() == FOOTER), None)
    lines = before.get_text().splitlines() if before else []
    added = [line for note in notes for line in textwrap.wrap(note, width)]
    if before:
        before.remove()
    height = figure.get_figheight() + len(added) * LINE + (0.0 if before else 0.1)
    figure.set_figheight(height)
    below = (len(lines + added) * LINE + 0.1) / height
    figure.text(
        0.006,
        below - 0.06 / height,
        "\n".join(lines + added),
        fontsize=7.5,
        color=FAINT,
        va="top",
        linespacing=1.25,
        gid=FOOTER,
    )
    figure.get_layout_engine().set(rect=(0, below, 1, 1 - below))  # type: ignore[union-attr, call-arg]


def common_limits(arrays: Sequence[np.ndarray], clip: float = 1.0) -> tuple[float, float]:
    """One colour scale for several maps: from the lowest value to their quantile `clip` (NaN left out)."""
    values = np.concatenate([np.asarray(array, dtype=float).ravel() for array in arrays])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(np.quantile(values, clip))) if len(values) else (0.0, 1.0)


def dots(ax: Axes, x: float, value: float, span: Sequence[float] | None, colour: str, across: bool = False) -> None:
    """Draw a number as a dot with its interval, upright or `across`."""
    at, to = (([value], [x]) if across else ([x], [value])), ((span, [x, x]) if across else ([x, x], span))
    if span is not None:
        ax.plot(*to, color=colour, lw=1.4)
    ax.plot(*at, color=colour, marker="o", ms=4.5, ls="")


def density(
    ax: Axes,
    counts: np.ndarray,
    edges: np.ndarray,
    log_axis: bool = True,
    limits: tuple[float, float] | None = None,
) -> Any:
    """Draw histograms (layers,bins) side by side in a logarithmic colour scale; the x axis counts layers.

    Args:
        limits: of the colours, for several panels on one scale.
    """
    shown = np.where(counts > 0, counts, np.nan)
    x = np.arange(len(counts) + 1) - 0.5
    mesh = ax.pcolormesh(
        x, edges, shown.T, norm=LogNorm(*(limits or (None, None))), cmap=DENSITY, rasterized=True, alpha=0.9
    )
    if log_axis:
        plain_log(ax)
    return mesh


def plain_log(ax: Axes, axis: str = "y") -> None:
    """Make an axis logarithmic with plain numbers: 5, 10, 20 instead of powers of ten."""
    getattr(ax, f"set_{axis}scale")("log")
    chosen = ax.yaxis if axis == "y" else ax.xaxis
    chosen.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=30))
    chosen.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    chosen.set_minor_formatter(NullFormatter())


def colour_bar(figure: Figure, drawn: Any, axes: Any, label: str = "") -> None:
    """Put a thin colour bar beside axes."""
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, aspect=30, pad=0.01)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=0)
    bar.set_label(label, fontsize=8)


def _bare(ax: Axes, title: str) -> None:
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    if title:
        ax.set_title(title, fontsize=8, loc="center")
