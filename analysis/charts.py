"""Pictures for the instruments: one look, heat maps on the patch grid, overlays, grids of panels.

Figures are made without pyplot: no global state, no display needed. Arrays are numpy; images are (H,W,3) in [0, 1],
maps are (gh,gw) on the patch grid.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

INK, FAINT, RULE = "#222222", "#767676", "#dddddd"
# Okabe and Ito's colours, which colour-blind people can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#555555")
KIND_COLOURS = {"class": "#D55E00", "distillation": "#CC79A7", "registers": "#009E73", "patches": "#0072B2"}
HEAT, DENSITY = "viridis", "magma_r"
PANEL = 1.75  # inches of a picture
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
    """Decorate a function that makes a figure: inside it, our look holds; outside nothing changes."""

    @wraps(draw)
    def inside(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


def new_figure(
    rows: int = 1, columns: int = 1, width: float = 4.0, height: float = 3.0, title: str | None = None, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows,columns); width and height are inches of one of them."""
    figure = Figure(figsize=(columns * width, rows * height + (0.35 if title else 0)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, axes


def colour_of(index: int) -> str:
    """The colour of the index-th model."""
    return COLOURS[index % len(COLOURS)]


def kind_colour(kind: str) -> str:
    """The colour of a kind of token: class, distillation, register 3, patches."""
    return KIND_COLOURS["registers" if kind.startswith("register") else kind]


def show_image(ax: Axes, image: np.ndarray, title: str = "") -> None:
    """An image without axes."""
    _bare(ax, title)
    ax.imshow(image)


def show_map(
    ax: Axes, values: np.ndarray, title: str = "", limits: tuple[float, float] | None = None, cmap: str = HEAT
) -> Any:
    """A map on the patch grid, a cell per patch; returns the image for a colour bar. limits None: its own range."""
    _bare(ax, title)
    low, high = limits if limits else (float(np.nanmin(values)), float(np.nanmax(values)))
    return ax.imshow(values, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")


def show_overlay(
    ax: Axes, image: np.ndarray, values: np.ndarray, title: str = "", limits: tuple[float, float] | None = None
) -> Any:
    """A map (bilinear, 60 % opaque) over the image in grey."""
    _bare(ax, title)
    height, width = image.shape[:2]
    low, high = limits if limits else (float(np.nanmin(values)), float(np.nanmax(values)))
    ax.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=1)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    return ax.imshow(values, cmap=HEAT, vmin=low, vmax=high, alpha=0.6, interpolation="bilinear", extent=extent)


def mark_patch(ax: Axes, patch: tuple[int, int], cell: float = 1.0, colour: str = "#ff2d2d") -> None:
    """Outline the patch (row, column); cell is its side in the axes' units (1 on a map, pixels on an image)."""
    row, column = patch
    corner = (column * cell - 0.5, row * cell - 0.5)
    ax.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor=colour, linewidth=1.6))


def draw_box(ax: Axes, box: Sequence[float], colour: str, label: str = "", dashed: bool = False) -> None:
    """A box (x1,y1,x2,y2) in pixels, with a white rim so that it shows on any picture."""
    x1, y1, x2, y2 = box
    shape: dict[str, Any] = dict(xy=(x1 - 0.5, y1 - 0.5), width=x2 - x1, height=y2 - y1, fill=False)
    shape["clip_on"] = False  # else half of the line is cut off where the box is the whole image
    ax.add_patch(Rectangle(**shape, edgecolor="white", linewidth=3.2))
    ax.add_patch(Rectangle(**shape, edgecolor=colour, linewidth=1.8, linestyle="--" if dashed else "-", label=label))


def row_label(ax: Axes, text: str) -> None:
    """A caption at the left of a row of pictures."""
    ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8, color=FAINT, labelpad=6)


@styled
def picture_table(
    rows: Sequence[Sequence[Callable[[Axes], Any]]],
    columns: Sequence[str],
    captions: Sequence[str] | None = None,
    title: str | None = None,
    aspect: float = 1.0,
    note: str = "",
) -> Figure:
    """A table of pictures: every cell is a function that draws on its axes; `aspect` is a picture's height / width."""
    figure, axes = new_figure(len(rows), max(map(len, rows)), PANEL, PANEL * aspect, title)
    for line, row in enumerate(rows):
        for column, ax in enumerate(axes[line]):
            if column >= len(row):
                ax.set_axis_off()
                continue
            row[column](ax)
            if line == 0 and column < len(columns):
                ax.set_title(columns[column], fontsize=8.5, loc="center")
        if captions:
            row_label(axes[line, 0], captions[line])
    if note:
        figure.supxlabel(note, fontsize=7.5, color=FAINT, x=0.01, ha="left")
    return figure


def density(ax: Axes, counts: np.ndarray, edges: np.ndarray, log_axis: bool = True) -> Any:
    """Histograms (layers,bins) side by side, log colour; the x axis counts layers."""
    shown = np.where(counts > 0, counts, np.nan)
    x = np.arange(len(counts) + 1) - 0.5
    mesh = ax.pcolormesh(x, edges, shown.T, norm=LogNorm(), cmap=DENSITY, rasterized=True, alpha=0.9)
    if log_axis:
        plain_log(ax)
    return mesh


def plain_log(ax: Axes, axis: str = "y") -> None:
    """A logarithmic axis with plain numbers: 5, 10, 20 instead of powers of ten."""
    getattr(ax, f"set_{axis}scale")("log")
    chosen = ax.yaxis if axis == "y" else ax.xaxis
    chosen.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=30))
    chosen.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    chosen.set_minor_formatter(NullFormatter())


def colour_bar(figure: Figure, drawn: Any, axes: Any, label: str = "") -> None:
    """A thin colour bar beside axes."""
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
