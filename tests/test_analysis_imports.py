"""Which way imports go: instruments import the core, never the reverse, and need nothing of the training program."""

import ast
import subprocess
import sys
from pathlib import Path

PROGRAM = (
    "budget build calibration checkpoint datasets distributed engine latency losses main options run trainer utils"
).split()

# Imports every module of analysis/ but `command`, where the program's modules and `command` cannot be imported.
LIBRARY = """
import importlib, pathlib, sys
sys.modules.update(dict.fromkeys({program!r}))
sys.modules["analysis.command"] = None
for file in sorted(pathlib.Path("analysis").glob("*.py")):
    if file.stem not in ("__init__", "command"):
        importlib.import_module("analysis." + file.stem)
assert "matplotlib.pyplot" not in sys.modules, "a process-wide state, and a window where there is a display"
"""


def imported(file: Path) -> set[str]:
    """Modules that a file imports, wherever in it; relative ones by their path in the repository."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            package = f"{file.parent.name}." if node.level == 1 else ""
            names |= {f"{package}{node.module or ''}".rstrip("."), *(alias.name for alias in node.names if node.level)}
    return names


def test_the_core_imports_no_instrument_and_no_program(repo: Path) -> None:
    for file in (repo / "models").rglob("*.py"):
        packages = {name.split(".")[0] for name in imported(file)}
        assert not packages & {"analysis", "matplotlib", "sklearn", *PROGRAM}, file.name


def test_training_imports_instruments_only_to_draw(repo: Path) -> None:
    for name in set(PROGRAM) - {"run"}:
        modules = {module for module in imported(repo / f"{name}.py") if module.split(".")[0] == "analysis"}
        assert modules <= {"analysis.log_images", "analysis.schedules"}, name


def test_instruments_are_a_library(repo: Path) -> None:
    """In an installation of `regtome` there are the core and analysis/, but no program around them."""
    code = LIBRARY.format(program=PROGRAM)
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
