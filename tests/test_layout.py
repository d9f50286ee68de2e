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
TOP_LEVEL = (
    "main",
    "options",
    "build",
    "trainer",
    "linear_probe",
    "interrupts",
    "engine",
    "losses",
    "datasets",
    "sources",
    "checkpoint",
    "distributed",
    "downloads",
    "runfolder",
    "resume",
    "sharding",
    "memory",
    "budget",
    "calibration",
    "latency",
    "utils",
)
PROGRAM = {*TOP_LEVEL, "run", "tests", "hubconf"}
INSTRUMENT_LIBRARIES = {
    "matplotlib",
    "PIL",
    "sklearn",
    "torchvision",
    "tensorboard",
    "submitit",
    "onnx",
    "onnxruntime",
    "peft",
}
METHOD_WORDS = {"tome", "mctf", "lgtm", "pitome", "dfe", "register", "registers", "merge_config", "bipartite"}
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
    package = path.relative_to(ROOT).parts[:-1]
    names: set[str] = set()
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from runtime_nodes(child)


def module_files(package: str = "models") -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    """models/methods/tome.py -> models.methods.tome; a package's __init__ is the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


# Who imports whom


@pytest.mark.parametrize("path", module_files(), ids=module_name)
def test_models_import_neither_program_nor_instruments(path: Path) -> None:
    """models/ is the core alone, and imports relatively: an installation calls it regtome."""
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & (PROGRAM | {"analysis"})
    absolute = [node for node in runtime_nodes(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    assert not [node.module for node in absolute if node.level == 0 and str(node.module).split(".")[0] == "models"]


@pytest.mark.parametrize("path", module_files(), ids=module_name)
def test_models_need_light_libraries_only(path: Path) -> None:
    """onnx and its kin are imported where they are asked for."""
    tree = ast.parse(path.read_text())
    eager = [node for node in ast.iter_child_nodes(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in eager if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in eager if isinstance(node, ast.ImportFrom) and node.level == 0}
    assert not {name.split(".")[0] for name in names} & INSTRUMENT_LIBRARIES


def edges(paths: list[Path]) -> dict[str, set[str]]:
    names = {module_name(path) for path in paths}
    return {module_name(path): (imports(path) & names) - {module_name(path)} for path in paths}


@pytest.mark.parametrize(
    "paths",
    [
        [path for path in module_files() if path != ROOT / "models" / "__init__.py"],
        [path for path in module_files("analysis") if path.stem != "__init__"],
        [ROOT / f"{name}.py" for name in TOP_LEVEL],
    ],
    ids=["models", "analysis", "program"],
)
def test_no_circle(paths: list[Path]) -> None:
    needs = edges(paths)
    while needs:
        leaves = {name for name, others in needs.items() if not others & needs.keys()}
        assert leaves, f"these import one another: {sorted(needs)}"
        needs = {name: others for name, others in needs.items() if name not in leaves}


@pytest.mark.parametrize("path", module_files("analysis"), ids=module_name)
def test_instruments_work_without_the_program(path: Path) -> None:
    """What an instrument's command needs of the program is imported inside the command; `command` is such a command."""
    tree = ast.parse(path.read_text())
    eager = [node for node in ast.iter_child_nodes(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in eager if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in eager if isinstance(node, ast.ImportFrom) and node.level == 0}
    assert path.stem == "command" or not {name.split(".")[0] for name in names} & PROGRAM


@pytest.mark.parametrize("word", ["mctf", "lgtm", "pitome"])
def test_a_method_has_one_place(word: str) -> None:
    """Only its own module and its registration name a method; of MCTF also the old command line and checkpoints."""
    files = [*module_files(), *module_files("analysis"), *(ROOT / f"{name}.py" for name in TOP_LEVEL)]
    allowed = {ROOT / "models" / "methods" / f"{word}.py", ROOT / "models" / "methods" / "__init__.py"}
    allowed |= {ROOT / "options.py", ROOT / "models" / "weights.py"} if word == "mctf" else set()
    for path in set(files) - allowed:
        for node in ast.walk(ast.parse(path.read_text())):
            texts = (getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "arg", None))
            constant = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            assert not [text for text in texts if word in str(text).lower()], f"{path.name} knows {word}"
            assert constant.lower() != word, f"{path.name} asks for {word}"


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


SCRIPTS_WITH_A_RUN = {"submit", "tiny_training"}  # they train: main.py is what they run


@pytest.mark.parametrize(
    "path",
    [*(ROOT / f"{name}.py" for name in TOP_LEVEL), *module_files("analysis"), *sorted((ROOT / "run").glob("*.py"))],
    ids=lambda path: path.stem,
)
def test_nothing_imports_main(path: Path) -> None:
    if path.stem not in SCRIPTS_WITH_A_RUN:
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
    names = [module_name(path) for path in (*module_files(), *module_files("analysis"))] + list(TOP_LEVEL)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT_CHECK, *names]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
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
    assert {path.stem for path in ROOT.glob("*.py")} == {*TOP_LEVEL, "hubconf", "setup"}
