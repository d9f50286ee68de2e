"""What may import what, what is in the repository, and that importing does nothing."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = {"main", "engine", "losses", "datasets", "utils", "run", "tests", "hubconf"}
INSTRUMENT_LIBRARIES = {"matplotlib", "PIL", "sklearn", "torchvision", "tensorboard", "submitit", "onnx", "onnxruntime"}
METHOD_WORDS = {"tome", "mctf", "lgtm", "dfe", "register", "registers", "merge_config", "bipartite"}
IGNORED = {
    ".git",
    ".venv",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    "data",
    "output",
    "runs",
    "build",
}


def tracked() -> list[Path]:
    """Files of the repository: git's, with those not yet added; without git every file that is not a cache."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    return [p for p in ROOT.rglob("*") if p.is_file() and not IGNORED & set(p.relative_to(ROOT).parts)]


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it ("models.vit", ...), but for types alone."""
    found: set[str] = set()
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from runtime_nodes(child)


def module_files() -> list[Path]:
    return sorted((ROOT / "models").glob("*.py"))


def core() -> set[str]:
    """Modules that `import models` brings in, and checkpoint loading: what everything else may build on."""
    names = {path.stem for path in module_files()}
    todo, seen = ["__init__", "checkpoint"], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        found = imports(ROOT / "models" / f"{name}.py")
        todo += [n for n in names - seen - {"__init__"} if f"models.{n}" in found and n not in todo]
    return seen


# Who imports whom


@pytest.mark.parametrize("path", module_files(), ids=lambda path: path.stem)
def test_models_do_not_import_the_program(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & PROGRAM


def test_the_core_is_where_it_should_be() -> None:
    assert {"errors", "schedule", "merging", "blocks", "vit", "registry", "checkpoint"} <= core()


def test_the_core_knows_no_instrument() -> None:
    for name in core():
        found = {module.split(".")[0] for module in imports(ROOT / "models" / f"{name}.py")}
        assert not found & INSTRUMENT_LIBRARIES, name
    assert not [n for n in core() if re.search("analy|pictur|visual|norms|lost|probe|benchmark|export", n)]


def test_the_core_has_no_circle() -> None:
    names = core() - {"__init__"}
    edges = {n: {m for m in names if f"models.{m}" in imports(ROOT / "models" / f"{n}.py")} for n in names}
    while edges:
        leaves = {name for name, needs in edges.items() if not needs & edges.keys()}
        assert leaves, f"these import one another: {sorted(edges)}"
        edges = {name: needs for name, needs in edges.items() if name not in leaves}


def test_the_engine_knows_no_method() -> None:
    path = ROOT / "engine.py"
    if not path.is_file():
        pytest.skip("no engine.py yet")
    words = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for text in (getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "arg", None)):
            words |= set(re.split(r"_|\W", str(text).lower()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            words |= set(re.split(r"_|\W", node.value.lower()))
    assert not words & METHOD_WORDS


@pytest.mark.parametrize("name", ["engine", "losses", "datasets", "utils"])
def test_nothing_imports_main(name: str) -> None:
    path = ROOT / f"{name}.py"
    if path.is_file():
        assert "main" not in {module.split(".")[0] for module in imports(path)}


# Importing does nothing

IMPORT_CHECK = """
import builtins, importlib, logging, os, random, signal, sys, warnings
import numpy, torch, torchvision, timm, huggingface_hub, tensorboardX
def state():
    return (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(), builtins.print,
            list(warnings.filters), list(logging.root.handlers), logging.root.level, torch.get_num_threads(),
            torch.get_default_dtype(), torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(),
            torch.cuda.is_initialized(), dict(os.environ), os.getcwd(), torch.get_float32_matmul_precision(),
            [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)])
names = sys.argv[1:]
before = state()
for name in names:
    importlib.import_module(name)
    after = state()
    changed = [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
    assert not changed, f"importing {name} changed {changed}"
assert not os.listdir("."), os.listdir(".")
"""


def test_importing_has_no_side_effect(tmp_path: Path) -> None:
    names = [n for n in ("datasets", "losses", "utils", "engine", "main") if (ROOT / f"{n}.py").is_file()]
    names = [f"models.{path.stem}" for path in module_files() if path.stem != "__init__"] + names
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT_CHECK, *names]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_no_bare_except_and_no_evaluation_of_strings() -> None:
    for path in (p for p in tracked() if p.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"bare except in {path.name}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{node.func.id}() in {path.name}"


# What is in the repository


def test_files_are_small() -> None:
    large = {path.name: path.stat().st_size for path in tracked() if path.stat().st_size > 500_000}
    assert not large


def test_no_weights_or_bytecode_in_the_repository() -> None:
    suffixes = {".pth", ".pt", ".pyc", ".pkl", ".pickle", ".onnx", ".safetensors"}
    assert not [path.name for path in tracked() if path.suffix in suffixes]


def test_no_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.~$}/-])/(?:work|root|home|Users|scratch-\w+|tmp/w)/[\w.]")
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = pattern.search(text)
        assert found is None, f"{path.relative_to(ROOT)}: {text[found.start() : found.start() + 60]!r}"


SCRIPTS = sorted((ROOT / "run").glob("*.sh")) + sorted((ROOT / "run").glob("*.sbatch"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\r" not in path.read_text()


def test_top_level_names() -> None:
    allowed = {"main", "engine", "losses", "datasets", "utils", "hubconf"}
    assert {path.stem for path in ROOT.glob("*.py")} <= allowed
