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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.errors import UserError

COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#e29e21", "#7a5195", "#4d4d4d")


@dataclass(frozen=True)
class Row:
    """One schedule of one result.json: `values` is the row as it stands there, `merge` that of the whole file."""

    label: str
    model: str
    device: str
    merge: dict[str, Any]
    values: dict[str, Any]


# The columns of the table: title, and the text of a row or None where it has no such value.
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


def find_files(place: str) -> list[Path]:
    """The result.json of a folder, or those in folders below it; a file is itself."""
    path = Path(place)
    if path.is_file():
        return [path]
    found = [path / "result.json"] if (path / "result.json").is_file() else sorted(path.rglob("result.json"))
    if not found:
        raise UserError(f"no result.json in {place}; write one with main.py --eval --output_dir {place}")
    return found


def read_rows(file: Path, label: str) -> list[Row]:
    """The rows of one result.json.

    Raises:
        UserError: not such a file.
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


def collect(places: Sequence[str]) -> list[Row]:
    """All rows of PLACE or LABEL=PLACE arguments; the label of a file is else the name of its folder."""
    rows: list[Row] = []
    for place in places:
        label, equals, path = place.partition("=")
        if not equals or Path(place).exists():
            label, path = "", place
        rows += [row for file in find_files(path) for row in read_rows(file, label or file.resolve().parent.name)]
    return rows


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    """A text or markdown table of the columns that some row has."""
    cells = [[title, *(text(row) or "" for row in rows)] for title, text in COLUMNS]
    cells = [column for column in cells if any(column[1:])]
    widths = [max(map(len, column)) for column in cells]
    lines = []
    for place in range(len(rows) + 1):
        line = [
            column[place].ljust(width) if i < 2 else column[place].rjust(width)
            for i, (column, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("| " + " | ".join(line) + " |" if markdown else "  ".join(line).rstrip())
    rules = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines.insert(1, "| " + " | ".join(rules) + " |" if markdown else "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def pareto(points: Sequence[tuple[float, float]], smaller_x: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both x and y (larger y is better), by rising x."""
    best, front = -math.inf, []
    for x, y in sorted(points, key=lambda p: (p[0] if smaller_x else -p[0], -p[1])):
        if y > best:
            best = y
            front.append((x, y))
    return sorted(front)


def plot(rows: Sequence[Row], file: Path) -> None:
    """Save accuracy against GMACs, and against the speed-up where it was measured, with the Pareto front.

    Not against images/s: those of two runs do not compare on a machine that does other things too.
    """
    import matplotlib  # half a second that a table does not need

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = [row for row in rows if row.values.get("speedup")]
    figure, axes = plt.subplots(1, 2 if timed else 1, figsize=(11 if timed else 6, 4.4), squeeze=False, sharey=True)
    _panel(axes[0][0], rows, "GMACs per image", lambda row: row.values["gmacs"], smaller_x=True)
    if timed:
        title = "images/s, as a multiple of timm's dense model in the same run"
        _panel(axes[0][1], timed, title, lambda row: row.values["speedup"], smaller_x=False)
        devices = sorted({f"{row.device}, batch size {row.values.get('batch_size', '?')}" for row in timed})
        axes[0][1].set_title("; ".join(devices), fontsize=9, color="0.35")
    axes[0][0].set_ylabel("top-1 accuracy (%)")
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --plot {file}: {error}; name a .png file") from error
    finally:
        plt.close(figure)


def _panel(axis: Any, rows: Sequence[Row], title: str, x_of: Callable[[Row], float], smaller_x: bool) -> None:
    front = pareto([(x_of(row), row.values["acc1"]) for row in rows], smaller_x)
    axis.plot(
        *zip(*front, strict=True), color="0.75", linewidth=5, solid_capstyle="round", zorder=1, label="Pareto front"
    )
    for i, label in enumerate(dict.fromkeys(row.label for row in rows)):
        mine = sorted((row for row in rows if row.label == label), key=x_of)
        colour = COLOURS[i % len(COLOURS)]
        points = [(x_of(row), row.values["acc1"]) for row in mine]
        axis.plot(*zip(*points, strict=True), "o-", color=colour, label=label, zorder=2)
        for (x, y), row in zip(points, mine, strict=True):
            speed = row.values.get("images_per_s")
            note = f"r={row.values['r']}" + (f", {speed['median']:.0f}/s" if speed and not smaller_x else "")
            axis.annotate(note, (x, y), (0, 7), textcoords="offset points", fontsize=7, color=colour, ha="center")
    axis.set_xlabel(title)
    axis.grid(alpha=0.25)
    axis.margins(0.15)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def build_parser() -> Parser:
    parser = Parser(prog="results.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", metavar="[LABEL=]PLACE", help="a result.json, or a folder that holds some")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="save accuracy against GMACs and speed-up")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, or 2 after the user's mistake."""
    try:
        args = build_parser().parse_args(argv)
        rows = collect(args.places)
        print(table(rows, args.markdown))
        if args.plot:
            plot(rows, args.plot)
            print(f"wrote {args.plot}")
        return 0
    except UserError as error:
        print(f"results.py: error: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse after --help
        return int(stop.code or 0)


if __name__ == "__main__":
    sys.exit(main())
