"""Tables and plots of result.json files, as `main.py --eval --output_dir DIR` writes them.

python run/results.py output/eval_deit_s_tome output/eval_deit_s_mctf --plot curve.png
python run/results.py "dense=output/a" "finetuned=output/b/result.json" --markdown

A name before "=" labels a file's rows. Nothing is computed across files: a speed-up stands in the file, measured there
against timm's dense model in the same run.
"""

import argparse
import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import interrupts  # noqa: F401  # isort: skip  # first: Ctrl-C while the rest is imported

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import charts
from models import UserError
from options import Parser, exit_status
from utils import table


@dataclass(frozen=True)
class Row:
    """A schedule of a result.json: `values` is the row as it stands there, `merge` that of the whole file."""

    label: str
    model: str
    device: str
    merge: dict[str, Any]
    values: dict[str, Any]


class Point(NamedTuple):
    """A model in a plot of accuracies."""

    series: str  # what it is joined with by a line
    x: float
    acc1: float
    note: str


# A column of the table: its title, and the text of a row, None where the row has no such value
Column = tuple[str, Callable[[Row], str | None]]


def _value(key: str, form: str) -> Callable[[Row], str | None]:
    return lambda row: format(row.values[key], form) if row.values.get(key) is not None else None


def _speed(key: str) -> Callable[[Row], str | None]:
    """Median and quartiles, as 123.4 [120.1, 125.0]."""

    def text(row: Row) -> str | None:
        speed = row.values.get(key)
        return speed and "{median:.0f} [{q25:.0f}, {q75:.0f}]".format_map(speed)

    return text


COLUMNS: tuple[Column, ...] = (
    ("run", lambda row: row.label),
    ("model", lambda row: row.model),
    ("r", lambda row: str(row.values["r"])),
    ("tokens left", lambda row: str(row.values["tokens"][-1])),
    ("GMACs", _value("gmacs", ".3f")),
    ("acc1 %", _value("acc1", ".2f")),
    ("acc5 %", _value("acc5", ".2f")),
    ("agree %", _value("agree", ".2f")),
    ("KL", _value("kl", ".4f")),
    ("images/s [quartiles]", _speed("images_per_s")),
    ("native images/s", _speed("native_images_per_s")),
    ("speed-up", _value("speedup", ".2f")),
)


def find_files(path: Path) -> list[Path]:
    """Find the result.json of a folder, or those in folders below it; a file is itself."""
    if path.is_file():
        return [path]
    files = [path / "result.json"] if (path / "result.json").is_file() else sorted(path.rglob("result.json"))
    if not files:
        raise UserError(f"no result.json in {path}; write one with main.py --eval --output_dir {path}")
    return files


def read_rows(file: Path, label: str) -> list[Row]:
    """Read the rows of one result.json.

    Raises:
        UserError: the file is not one.
    """
    try:
        result = json.loads(file.read_text())
        common = (label, result["model"], str(result.get("device", "")), dict(result.get("merge") or {}))
        rows = [Row(*common, dict(row)) for row in result["rows"]]
        for row in rows:
            row.values["r"], row.values["tokens"][-1], float(row.values["acc1"]), float(row.values["gmacs"])
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{file} is not a result.json of main.py --eval ({type(error).__name__}: {error})") from error
    return rows


def collect(arguments: Sequence[str]) -> list[Row]:
    """Read all rows of PLACE or LABEL=PLACE arguments; without a label a file has the name of its folder."""
    rows: list[Row] = []
    for argument in arguments:
        label, equals, name = argument.partition("=")
        if not equals or Path(argument).exists():
            label, name = "", argument
        path = Path(name)
        rows += [row for file in find_files(path) for row in read_rows(file, label or file.resolve().parent.name)]
    return rows


def results_table(rows: Sequence[Row], markdown: bool = False) -> str:
    """Print rows as a text or markdown table of the columns that some row has."""
    texts = [[text(row) or "" for _, text in COLUMNS] for row in rows]
    return table([title for title, _ in COLUMNS], texts, left=2, markdown=markdown)


def pareto(points: Sequence[tuple[float, float]], smaller_x: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both x and y (larger y is better), by rising x."""
    best, front = -math.inf, []
    for x, y in sorted(points, key=lambda p: (p[0] if smaller_x else -p[0], -p[1])):
        if y > best:
            best = y
            front.append((x, y))
    return sorted(front)


@charts.styled
def draw(rows: Sequence[Row]) -> Figure:
    """Draw accuracy against GMACs, and against the speed-up where it was measured, with the Pareto fronts.

    Not against images/s: those of two runs do not compare on a machine that does other things too.
    """
    timed = [row for row in rows if row.values.get("speedup")]
    figure, axes = charts.new_figure(1, 2 if timed else 1, width=5.5, height=4.4, sharey=True)
    by_gmacs = [Point(row.label, row.values["gmacs"], row.values["acc1"], f"r={row.values['r']}") for row in rows]
    draw_accuracies(axes[0, 0], by_gmacs, "GMACs per image", smaller_x=True)
    if timed:
        by_speed = [Point(row.label, row.values["speedup"], row.values["acc1"], _speed_note(row)) for row in timed]
        title = "images/s, as a multiple of timm's dense model in the same run"
        draw_accuracies(axes[0, 1], by_speed, title, smaller_x=False)
        devices = sorted({f"{row.device}, batch size {row.values.get('batch_size', '?')}" for row in timed})
        axes[0, 1].set_title("; ".join(devices), fontsize=9, color=charts.FAINT)
    axes[0, 0].set_ylabel("top-1 accuracy (%)")
    axes[0, 0].legend()
    return figure


def _speed_note(row: Row) -> str:
    speed = row.values.get("images_per_s")
    return f"r={row.values['r']}" + (f", {speed['median']:.0f}/s" if speed else "")


def draw_accuracies(ax: Axes, points: Sequence[Point], x_title: str, smaller_x: bool) -> None:
    """Draw accuracies over a cost (smaller_x: less is better) or a speed: a line for each series, and the front."""
    front = pareto([(point.x, point.acc1) for point in points], smaller_x)
    wide: dict[str, Any] = {"color": charts.RULE, "linewidth": 5, "solid_capstyle": "round", "zorder": 1}
    ax.plot(*zip(*front, strict=True), **wide, label="Pareto front")
    for i, series in enumerate(dict.fromkeys(point.series for point in points)):
        line = sorted((point for point in points if point.series == series), key=lambda point: point.x)
        colour = charts.colour_of(i)
        ax.plot([p.x for p in line], [p.acc1 for p in line], "o-", color=colour, label=series, zorder=2)
        for point in line:
            place = (point.x, point.acc1)
            ax.annotate(point.note, place, (0, 7), textcoords="offset points", fontsize=7, color=colour, ha="center")
    ax.set_xlabel(x_title)
    ax.margins(0.15)


def save(figure: Figure, file: Path, flag: str) -> None:
    """Write a figure; raises UserError that names the flag where that is impossible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {flag} {file}: {error}; name a .png file") from error


def build_parser() -> Parser:
    parser = Parser(prog="results.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", metavar="[LABEL=]PLACE", help="a result.json, or a folder that holds some")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="save accuracy against GMACs and speed-up")
    return parser


def run(argv: Sequence[str]) -> None:
    """Print the table, and save the plot."""
    args: Namespace = build_parser().parse_args(argv)
    rows = collect(args.places)
    print(results_table(rows, args.markdown))
    if args.plot:
        save(draw(rows), args.plot, "--plot")
        print(f"wrote {args.plot}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, or 2 after the user's mistake."""
    return exit_status("results.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
