"""Figures of searched schedules: tokens per block, what a block's merging loses for what it saves, the Pareto front.

The records are those of schedule files, which `run/search.py` and main.py --gmacs write.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import charts


@charts.styled
def draw(records: Sequence[dict[str, Any]]) -> Figure:
    """Draw the schedules of one model and method, found for one or several budgets.

    Args:
        records: of schedule files, one for each budget.
    """
    first = records[0]
    title = f"{first['model']}, {first['merge']['method']}: {first['images']} images of {first['calibration']}"
    figure, axes = charts.new_figure(1, 3, width=4.2, height=3.4, title=title)
    for i, record in enumerate(records):
        _draw_tokens(axes[0, 0], record, charts.colour_of(i))
    _draw_sensitivity(axes[0, 1], records)
    _draw_front(axes[0, 2], records)
    for ax in axes[0, :2]:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_tokens(ax: Axes, record: dict[str, Any], colour: str) -> None:
    ax.step(range(record["depth"]), record["tokens"], color=colour, where="mid", label=_label(record))
    ax.set_xlabel("block")
    ax.set_ylabel("tokens that leave the block")
    ax.set_ylim(bottom=0)
    ax.legend()


def _label(record: dict[str, Any]) -> str:
    return f"{record['gmacs']:.3f} GMACs"


def _draw_sensitivity(ax: Axes, records: Sequence[dict[str, Any]]) -> None:
    """Draw, from the neighbours that were measured, what a GMAC that a block saves more would lose."""
    for i, record in enumerate(records):
        slopes = marginal_losses(record)
        if slopes:
            ax.plot(list(slopes), list(slopes.values()), "o-", color=charts.colour_of(i), label=_label(record))
    ax.set_xlabel("block")
    ax.set_ylabel(f"marginal {records[0]['loss_of']} per GMAC saved")
    if any(line.get_xdata().size for line in ax.lines):  # type: ignore[union-attr]
        ax.set_yscale("log")
        charts.plain_log(ax)


def marginal_losses(record: dict[str, Any]) -> dict[int, float]:
    """Per block the loss per GMAC saved, from measured schedules that differ from the one found in that block alone.

    At an optimum it is the same in all blocks that merge neither nothing nor all that they can.
    """
    r, found = record["r"], {}
    points: dict[int, list[tuple[float, float]]] = {}
    for other in [*record["measured"], record]:
        # the last block merges all that it can where that is free, which is less after a neighbour merged more
        differ = [layer for layer, (a, b) in enumerate(zip(r[:-1], other["r"], strict=False)) if a != b]
        for layer in differ if len(differ) == 1 else range(record["depth"]) if not differ else ():
            points.setdefault(layer, []).append((other["gmacs"], other["loss"]))
    for layer, pairs in sorted(points.items()):
        gmacs, losses = np.array(sorted(set(pairs))).T
        if len(gmacs) > 1 and gmacs[-1] > gmacs[0] and losses[0] > losses[-1]:
            found[layer] = float((losses[0] - losses[-1]) / (gmacs[-1] - gmacs[0]))
    return found


def _draw_front(ax: Axes, records: Sequence[dict[str, Any]]) -> None:
    """Draw everything that was measured, and the front of what nothing cheaper beats."""
    measured = {(m["gmacs"], m["loss"]) for record in records for m in record["measured"]}
    best, front = math.inf, []
    for gmacs, loss in sorted(measured):
        if loss < best:
            best = loss
            front.append((gmacs, loss))
    ax.plot(*zip(*sorted(measured), strict=True), ".", color=charts.FAINT, label="measured")
    ax.plot(*zip(*front, strict=True), color=charts.RULE, linewidth=4, zorder=0, label="Pareto front")
    for i, record in enumerate(records):
        ax.plot(record["gmacs"], record["loss"], "o", color=charts.colour_of(i))
    ax.set_xlabel("GMACs per image")
    ax.set_ylabel(f"{records[0]['loss_of']} to dense")
    ax.set_yscale("log")
    charts.plain_log(ax)
    ax.legend()
