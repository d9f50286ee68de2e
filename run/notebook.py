"""Execute a notebook cell by cell and write its pictures into it: no Jupyter is needed.

python run/notebook.py docs/analysis.ipynb

That is how the figures of docs/analysis.ipynb are made. Code cells run in one namespace, in the notebook's folder; what
the last line of a cell evaluates to is shown: figures and pictures as small PNGs, all else as text.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure
from PIL import Image

from models import UserError
from options import Parser, exit_status
from utils import atomic_write, log

SHOWN = "_shown"  # takes the value of a cell's last line
DPI, COLOURS = 60, 64  # small pictures: a notebook with all instruments stays below 500 kB


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The code cells of a notebook, as they are stored."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(notebook: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Run the code cells of a notebook in one namespace.

    Yields:
        Each cell with what it printed and the value of its last line (None if that is no expression).
    """
    names: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="notebook_") as folder:
        for number, cell in enumerate(code_cells(notebook), start=1):
            tree = ast.parse("".join(cell["source"]), f"cell {number}")
            if tree.body and isinstance(tree.body[-1], ast.Expr):
                tree.body[-1] = ast.Assign([ast.Name(SHOWN, ast.Store())], tree.body[-1].value)
            file, printed = Path(folder) / f"cell_{number}.py", io.StringIO()
            file.write_text(ast.unparse(ast.fix_missing_locations(tree)), encoding="utf-8")
            with contextlib.redirect_stdout(printed):
                names = runpy.run_path(str(file), init_globals=names)
            yield cell, printed.getvalue(), names.pop(SHOWN, None)


def outputs(printed: str, value: Any) -> list[dict[str, Any]]:
    """What a cell shows, as a notebook stores it."""
    shown: list[dict[str, Any]] = []
    if printed:
        shown.append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)})
    if value is None:
        return shown
    content: dict[str, Any] = {"text/plain": [type(value).__name__]}
    if isinstance(value, (Figure, Image.Image)):
        content["image/png"] = base64.b64encode(_png(value)).decode("ascii")
    else:
        content["text/plain"] = repr(value).splitlines(keepends=True)
    return [*shown, {"output_type": "display_data", "metadata": {}, "data": content}]


def _png(value: Figure | Image.Image) -> bytes:
    """A small PNG of a figure or a picture."""
    if isinstance(value, Figure):
        stream = io.BytesIO()
        value.savefig(stream, format="png", dpi=DPI)
        value = Image.open(stream)
    picture = value.convert("RGB")
    picture.thumbnail((900, 900))
    small = io.BytesIO()
    picture.quantize(COLOURS).save(small, "PNG", optimize=True)
    return small.getvalue()


def rewrite(file: Path) -> None:
    """Execute a notebook and write what its cells show into it."""
    try:
        notebook = json.loads(file.read_text(encoding="utf-8"))
        code_cells(notebook)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the notebook {file} ({error})") from error
    here = Path.cwd()
    os.chdir(file.resolve().parent)
    try:
        for number, (cell, printed, value) in enumerate(execute(notebook), start=1):
            cell["outputs"], cell["execution_count"] = outputs(printed, value), number
            log(f"cell {number} of {len(code_cells(notebook))}")
    finally:
        os.chdir(here)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    atomic_write(file, lambda stream: stream.write(text.encode("utf-8")))
    log(f"wrote {file} ({len(text) / 1000:.0f} kB)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="notebook.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("notebook", type=Path, metavar="FILE.ipynb")
    return exit_status("notebook.py", lambda words: rewrite(parser.parse_args(words).notebook), argv)


if __name__ == "__main__":
    sys.exit(main())
