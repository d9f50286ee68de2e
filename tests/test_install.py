"""The library as it is installed, and the promised torchrun line as it is typed.

Both in an environment that run/_venv.sh makes, as for quickstart.sh and test.sh, of a copy of the files in the
repository: with `pip install -r requirements.txt .`, which env.yaml asks for, too. To need no network, the environment
sees the packages of the one that runs the tests, and its list of requirements is empty.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest
import yaml
from test_layout import tracked

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = {path.stem for path in ROOT.glob("*.py")} | {"run", "models", "analysis"}
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
# pip reads "no" as "isolate: no": the setuptools that builds is the one that is here
OFFLINE |= {"PIP_NO_BUILD_ISOLATION": "no", "PIP_IGNORE_INSTALLED": "1"}


def call(*command: object, cwd: Path, **environment: str) -> str:
    """The output of a command that succeeds."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [str(word) for word in command]
    settings = clean | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(words, cwd=cwd, env=settings, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, in a folder with a space, that installs nothing but itself."""
    folder = tmp_path_factory.mktemp("a checkout")
    for file in tracked():
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    (folder / "requirements.txt").write_text("# what the tests' own environment has\n")
    return folder


@pytest.fixture(scope="module")
def environment(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment of run/_venv.sh."""
    folder = tmp_path_factory.mktemp("an environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=project)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    out = call("bash", "-c", ". run/_venv.sh", cwd=project, REGTOME_VENV=str(folder), **OFFLINE)
    assert "installing" in out and "creating" not in out
    return folder


def build(project: Path, out: Path, source: Path | None = None) -> zipfile.ZipFile:
    """The wheel of a checkout or of an sdist."""
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", out, source or project, cwd=project, **OFFLINE)
    return zipfile.ZipFile(next(out.glob("regtome-*.whl")))


def test_a_wheel_holds_the_library_and_nothing_else(project: Path, tmp_path: Path) -> None:
    (project / "build" / "lib" / "models").mkdir(parents=True, exist_ok=True)
    (project / "build" / "lib" / "models" / "stale.py").touch()  # of an earlier build
    wheel = build(project, tmp_path / "wheel")
    names = set(wheel.namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops <= {"regtome", "regtome_torchrun.py"}
    installed = {name for name in names if name.startswith("regtome/")}
    core = {f"regtome/{path.relative_to(ROOT / 'models').as_posix()}" for path in ROOT.glob("models/**/*.py")}
    assert core | {"regtome/py.typed", "regtome/analysis/norms.py"} <= installed
    assert "regtome/analysis/command.py" not in installed
    # from a source distribution, which holds no more than that needs, the same
    code = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"
    archive = call(sys.executable, "-c", code, tmp_path, cwd=project).splitlines()[-1]
    assert set(build(project, tmp_path / "again", tmp_path / archive).namelist()) == names


def test_installed_instruments_import_the_installed_core(project: Path, tmp_path: Path) -> None:
    with build(project, tmp_path) as wheel:
        for name in wheel.namelist():
            if name.startswith("regtome/analysis/") and name.endswith(".py"):
                for node in ast.walk(ast.parse(wheel.read(name))):
                    if isinstance(node, ast.ImportFrom) and node.level == 0:
                        assert str(node.module).split(".")[0] not in ("models", "analysis"), name


def test_the_installed_library_works_without_the_checkout(environment: Path, tmp_path: Path) -> None:
    code = """
        import importlib, pathlib, sys
        import torch
        import regtome
        model = regtome.create_model("deit_digits", merge=regtome.MergeConfig(r=4)).eval()
        out = model(torch.zeros(1, 3, 32, 32), trace=True)
        print(regtome.__version__, tuple(out.logits.shape), out.counts[-1])
        from regtome.analysis import norms
        from regtome.analysis.ideal import ideal_model
        assert ideal_model(model)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
        folder = pathlib.Path(regtome.__file__).parent
        for file in sorted(folder.rglob("*.py")):
            importlib.import_module(".".join(("regtome", *file.relative_to(folder).with_suffix("").parts)))
        print(*sorted(name for name in sys.modules if name in sys.argv[1:]))
        """
    program = sorted(PROGRAM)
    shown = call(environment / "bin" / "python", "-c", textwrap.dedent(code), *program, cwd=tmp_path)
    import models

    assert shown.splitlines() == [f"{models.__version__} (1, 10) 41", ""]


def test_the_readmes_python_runs_where_the_library_is_installed(environment: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    code = code.replace("pretrained=True", "pretrained=False")  # weights come from a network
    call(environment / "bin" / "python", "-c", f"{code}\nassert out.group.shape == (2, 196)", cwd=tmp_path)


def test_the_promised_line_runs_as_typed(environment: Path, project: Path, tmp_path: Path) -> None:
    line = "torchrun --nproc_per_node=2 main.py --model deit_digits --r 4 --num_registers 4 --dataset DIGITS --epochs 1"
    line += f" --limit 64 --batch_size 16 --device cpu --output_dir '{tmp_path}'"
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    shown = call("bash", "-c", line, cwd=project, PATH=path)
    assert "r=4" in shown and (tmp_path / "checkpoint.pth").is_file()


def test_torchrun_is_torchs_own_but_for_abbreviations(environment: Path, project: Path) -> None:
    shown = call(environment / "bin" / "python", "run/torchrun.py", "--help", cwd=project)
    assert "--nproc-per-node" in shown and "training_script" in shown
    if sys.version_info < (3, 12, 7):
        assert (environment / "bin" / "torchrun").is_file()


def test_every_environment_installs_the_same() -> None:
    """quickstart.sh and test.sh by _venv.sh, conda, and what the README says to type."""
    conda = yaml.safe_load((ROOT / "env.yaml").read_text())
    assert {"pip": ["-r requirements.txt", "."]} in conda["dependencies"]
    assert 'pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt" "$ROOT"' in (
        ROOT / "run/_venv.sh"
    ).read_text().replace(" -m ", " ")
    assert "pip install -r requirements.txt ." in (ROOT / "README.md").read_text()
