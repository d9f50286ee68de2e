"""The shell scripts, result tables, requirements and README: every command line in them is one that main.py takes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

import options
from models import MergeConfig
from models.methods import METHODS
from models.schedule import token_plan
from run import results

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "run").glob("*.sh"))
RECIPES = [script for script in SCRIPTS if script.name.startswith(("eval_", "finetune_"))]
PUBLISHED = {"t": "deit_tiny", "s": "deit_small", "b": "deit_base"}


def bash(script: Path, *words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    # a coverage or CI variable of the outer process must not change what a script does
    clean = {key: value for key, value in os.environ.items() if key not in ("DATA", "CKPT", "NGPUS", "REGTOME_ECHO")}
    env = clean | {"PYTHON": sys.executable, "NGPUS": "1"} | env
    return subprocess.run(["bash", str(script), *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def echoed(script: Path, *words: str, **env: str) -> tuple[list[str], Namespace]:
    """The launcher of a script's command, and main.py's arguments as main.py reads them."""
    done = bash(script, *words, REGTOME_ECHO="1", **env)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    place = command.index(str(ROOT / "main.py"))
    return command[:place], options.parse_args(command[place + 1 :])


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_are_shell(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).stderr == b""


def test_every_promised_script_is_there() -> None:
    names = [f"{verb}_deit_{size}_regtome" for verb in ("eval", "finetune") for size in "tsb"]
    names += [f"eval_deit_{size}_{method}" for size in "ts" for method in ("tome", "mctf", "mctf_fast", "lgtm")]
    names += [f"finetune_deit_{size}_{method}" for size in "ts" for method in ("mctf", "mctf_fast")]
    assert {script.stem for script in RECIPES} == set(names)


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_what_its_name_and_header_say(script: Path) -> None:
    launcher, args = echoed(script)
    verb, _, size, method = script.stem.split("_", 3)
    config = options.merge_config(args)
    assert launcher == [sys.executable]
    assert args.eval == (verb == "eval")
    assert args.model == PUBLISHED[size]
    assert config.method == {"regtome": "tome", "mctf_fast": "mctf"}.get(method, method)
    assert (args.num_registers or 0) == (4 if method == "regtome" else 0)
    assert args.data_path == "data/IMNET"
    assert args.output_dir == f"output/{script.stem}"
    stated = float(
        re.findall(r"([\d.]+)\s+GMACs", script.read_text().replace("# ", "").replace("\n", " "))[-2].strip(".")
    )
    width = {"t": 192, "s": 384, "b": 768}[size]
    assert stated == pytest.approx(_gmacs(config, width, 1 + (args.num_registers or 0)), abs=0.006)


def _gmacs(config: Any, width: int, prefix: int, patches: int = 196) -> float:
    """specs: 4NC^2 + 2N^2C + 8N'C^2 a block; mctf multiplies and projects values after its merge, on N' tokens."""
    before, total = patches + prefix, patches * width * 768 + width * 1000
    for after in token_plan(config, patches, (prefix,) * 12).counts:
        early = config.method == "mctf" and after < before
        values = 2 * (after if early else before) * width**2
        total += 2 * before * width**2 + 2 * before**2 * width + values + 8 * after * width**2
        before = after
    return total / 1e9


@pytest.mark.parametrize("script", [s for s in RECIPES if s.name.startswith("finetune")], ids=lambda path: path.stem)
def test_finetuning_is_the_published_recipe(script: Path) -> None:
    _, args = echoed(script)
    recipe = dict(epochs=30, cooldown_epochs=10, warmup_epochs=0, lr_times=0.03, min_lr_times=0.1, mixup=0, cutmix=0)
    recipe |= dict(full_weight=1, full_r_max=8, consistency_weight=3, consistency_threshold=0.4, merged_weight=1)
    recipe |= dict(weight_decay=0.05, drop_path=0.1, smoothing=0.1, reprob=0.25, repeated_aug=None, lr=5e-4)
    assert {name: getattr(args, name) for name in recipe} == recipe


@pytest.mark.parametrize(("processes", "steps"), [(1, 8), (2, 4), (3, 3), (8, 1), (16, 1)])
def test_few_gpus_accumulate_to_the_recipes_batch(processes: int, steps: int) -> None:
    launcher, args = echoed(ROOT / "run/finetune_deit_s_mctf.sh", NGPUS=str(processes))
    assert (args.batch_size, args.accumulation_steps) == (128, steps)
    assert (f"--nproc_per_node={processes}" in launcher) == (processes > 1)


def test_arguments_reach_main(tmp_path: Path) -> None:
    words = [str(tmp_path / "my data"), "--r", "8", "--throughput"]
    _, args = echoed(ROOT / "run/eval_deit_s_tome.sh", *words, CKPT="a b.pth")
    assert (args.data_path, args.r, args.throughput, args.finetune) == (words[0], "8", True, "a b.pth")
    _, args = echoed(ROOT / "run/eval_deit_s_tome.sh", "--finetune", "mine.pth", CKPT="other.pth", DATA="d")
    assert (args.data_path, args.finetune) == ("d", "mine.pth")


@pytest.mark.parametrize("name", ["eval_deit_t_tome", "finetune_deit_b_regtome"])
def test_missing_data_is_one_line_and_status_2(name: str, tmp_path: Path) -> None:
    done = bash(ROOT / f"run/{name}.sh", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert "data/IMNET/" in done.stderr and "usage: bash" in done.stderr


def test_validation_images_are_enough_to_evaluate(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    done = bash(ROOT / "run/finetune_deit_t_mctf.sh", str(tmp_path))
    assert done.returncode == 2 and f"{tmp_path}/train" in done.stderr
    # past the script's own check, main.py finds the folder empty
    done = bash(ROOT / "run/eval_deit_t_mctf.sh", str(tmp_path), "--no_pretrained", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("main.py: error: ")


def test_process_count_must_be_a_number() -> None:
    done = bash(ROOT / "run/eval_deit_t_tome.sh", REGTOME_ECHO="1", NGPUS="two")
    assert done.returncode == 2 and "'two'" in done.stderr


@pytest.mark.parametrize("script", [s for s in SCRIPTS if not s.name.startswith("_")], ids=lambda path: path.stem)
def test_help(script: Path) -> None:
    done = bash(script, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "bash " in done.stdout and len(done.stdout.splitlines()) > 3


# The environment that test.sh and quickstart.sh make


STUB = """#!/bin/sh
# stands for a Python: makes an environment of itself, and installs what is not called missing
case "$1 $2" in
  "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip") ! grep -q missing "$7" ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project in a path with a space."""
    folder = tmp_path / "a project"
    (folder / "run").mkdir(parents=True)
    shutil.copy(ROOT / "run/_venv.sh", folder / "run")
    for name in ("setup.py", "run/torchrun.py"):  # what the installation depends on besides the requirements
        shutil.copy(ROOT / name, folder / name)
    (folder / "requirements.txt").write_text("package==1.0\n")
    (folder / "run/use.sh").write_text('set -euo pipefail\n. "$(dirname "$0")/_venv.sh"\necho "python=$PYTHON"\n')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3.11").write_text(STUB)
    (tmp_path / "bin/python3.11").chmod(0o755)
    return folder


def use(project: Path, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{project.parent / 'bin'}:{os.environ['PATH']}"
    return bash(project / "run/use.sh", cwd=project.parent, **{"CI": "", "REGTOME_VENV": "", "PATH": path, **env})


def test_environment_is_made_once_and_redone_when_torn(project: Path) -> None:
    stamp = project / ".venv/.regtome-requirements"
    assert "creating" in use(project).stdout
    assert use(project).stdout == f"python={project}/.venv/bin/python\n"
    stamp.unlink()  # an installation that was killed
    assert "installing" in use(project).stdout and stamp.exists()
    (project / "requirements.txt").write_text("package==1.1\n")
    out = use(project).stdout
    assert "installing" in out and "creating" not in out
    (project / ".venv/bin/python").unlink()  # its interpreter is gone
    assert "creating" in use(project).stdout


def test_one_installation_at_a_time(project: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        outs = [done.stdout for done in pool.map(lambda _: use(project), range(4))]
    assert sum("installing" in out for out in outs) == 1
    assert all(out.endswith("/.venv/bin/python\n") for out in outs)


def test_environment_of_ci_is_kept_by_requirements(project: Path) -> None:
    env = {"CI": "true", "XDG_CACHE_HOME": str(project.parent / "cache")}
    assert "installing" in use(project, **env).stdout
    (venv,) = (project.parent / "cache/regtome").iterdir()
    assert re.fullmatch(r"venv-[0-9a-f]{16}", venv.name) and not (project / ".venv").exists()
    assert use(project, **env).stdout == f"python={venv}/bin/python\n"


def test_a_named_environment_is_used(project: Path) -> None:
    named = project.parent / "my env"
    assert use(project, REGTOME_VENV=str(named), CI="true").stdout.endswith(f"python={named}/bin/python\n")
    assert not (project / ".venv").exists()


def test_a_failed_installation_leaves_no_stamp(project: Path) -> None:
    (project / "requirements.txt").write_text("missing==1.0\n")
    done = use(project)
    assert done.returncode == 1
    assert "use.sh: error: pip could not install" in done.stderr.splitlines()[-1]
    assert not (project / ".venv/.regtome-requirements").exists()


# results.py


def result(device: str = "cpu", **row: Any) -> dict[str, Any]:
    base = {"r": "8", "schedule": [8] * 6, "tokens": [57, 49, 41, 33, 25, 17], "gmacs": 0.0321, "params": 678000}
    base |= {"acc1": 91.25, "acc5": 99.0, "loss": 0.3}
    return {"model": "deit_digits", "weights": "x", "dataset": "DIGITS", "device": device, "rows": [base | row]}


def write(folder: Path, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(content))
    return folder


SPEED = {"median": 1000.0, "q25": 990.0, "q75": 1010.0}


def test_table_holds_what_the_files_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the ratio is not that of the two medians: it must be the one that was measured
    timed = write(tmp_path / "timed", result(images_per_s=SPEED, native_images_per_s=SPEED, speedup=1.37))
    plain = write(tmp_path / "plain", result(r="(16,-1)", acc1=90.0))
    assert results.main([f"ours={timed}", str(plain), "--markdown"]) == 0
    head, rule, first, second = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, first, second)]
    ours, other = (dict(zip(cells[0], row, strict=True)) for row in cells[1:])
    assert set(rule) <= set("|-: ")
    assert (ours["run"], ours["acc1 %"], ours["GMACs"], ours["tokens left"]) == ("ours", "91.25", "0.032", "17")
    assert (ours["images/s [quartiles]"], ours["speed-up"]) == ("1000 [990, 1010]", "1.37")
    assert (other["run"], other["r"], other["speed-up"]) == ("plain", "(16,-1)", "")
    assert "agree %" not in ours  # nobody measured it


def test_folder_of_runs_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, acc1 in (("a", 90.0), ("b", 90.0)):  # equal points: nothing to sort by
        write(tmp_path / name, result(acc1=acc1, images_per_s=SPEED, native_images_per_s=SPEED, speedup=1.0))
    picture = tmp_path / "new" / "plot.png"
    assert results.main([str(tmp_path), "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["a", "b"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_pareto_front() -> None:
    points = [(1.0, 70.0), (2.0, 69.0), (2.0, 75.0), (3.0, 75.0), (4.0, 76.0)]
    assert results.pareto(points, smaller_x=True) == [(1.0, 70.0), (2.0, 75.0), (4.0, 76.0)]
    assert results.pareto(points, smaller_x=False) == [(4.0, 76.0)]


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [{}], "model": "m"}', '{"model": "m", "rows": [3]}', "\x00"])
def test_no_result_is_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text(content)
    assert results.main([str(tmp_path)]) == 2
    out = capsys.readouterr()
    assert out.out == "" and len(out.err.splitlines()) == 1 and "result.json" in out.err


def test_wrong_arguments_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main([str(tmp_path)]) == 2
    assert "--eval --output_dir" in capsys.readouterr().err
    assert results.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert results.main([str(write(tmp_path, result())), "--plot", str(tmp_path / "plot.nothing")]) == 2
    assert "plot.nothing" in capsys.readouterr().err


# Requirements and documents


def pins() -> dict[str, str]:
    """Package -> version in requirements.txt."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+==[0-9][0-9.]*", line) for line in lines)
    return dict(line.split("==") for line in lines)


def ranges() -> dict[str, dict[str, Requirement]]:
    """Extra ("" for what is always installed) -> package -> its range in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: {(r := Requirement(line)).name: r for line in lines} for extra, lines in groups.items()}


def test_one_list_of_requirements() -> None:
    """Every pin lies inside the range that an installation asks for, and every package of the one is in the other."""
    named = {name: r for group in ranges().values() for name, r in group.items() if name != "regtome"}
    assert {name for name, version in pins().items() if name in named and version not in named[name].specifier} == set()
    assert named.keys() - pins().keys() == {"openvino"}  # large; its tests skip without it
    assert pins().keys() - named.keys() == {"huggingface_hub"}  # timm's own requirement


def test_extras() -> None:
    extras = ranges()
    assert extras[""].keys() == {"torch", "timm", "numpy", "safetensors"}
    assert extras.keys() == {"", "adapters", "analysis", "export", "openvino", "train", "dev"}
    assert {"matplotlib", "scikit-learn"} <= extras["analysis"].keys()
    assert extras["train"]["regtome"].extras == {"analysis"}
    assert extras["dev"]["regtome"].extras == {"adapters", "export", "train"}


# onnx_ir is a requirement of onnxscript, which is its front end
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "PyYAML", "sklearn": "scikit-learn", "onnx_ir": "onnxscript"}


def imported(*folders: str) -> set[str]:
    """Packages that the Python files below folders import, by the names they are installed under."""
    files = [file for folder in folders for file in ROOT.glob(f"{folder}/**/*.py" if folder else "*.py")]
    own = {file.stem for file in [*files, *ROOT.glob("*.py")]} | {"models", "analysis", "run", "tests", "regtome"}
    lines = "\n".join(file.read_text() for file in files)
    names = set(re.findall(r"^\s*(?:from|import) (\w+)[\w.]* ?(?:import|as|$)", lines, re.M))
    return {DISTRIBUTIONS.get(name, name) for name in names - own - set(sys.stdlib_module_names)}


def test_requirements_are_what_is_imported() -> None:
    """Every package that the project imports is in the list (the tests' own too)."""
    # packaging comes with pytest
    assert imported("", "models", "analysis", "run", "tests") - {"packaging", "openvino"} <= pins().keys()


def test_ranges_are_what_is_imported() -> None:
    extras = {extra: set(group) for extra, group in ranges().items()}
    optional = extras["adapters"] | extras["export"] | extras["openvino"]
    assert imported("models") <= extras[""] | optional | {"huggingface_hub"}
    train = extras["train"] | extras["analysis"]
    assert imported("", "analysis", "run") <= extras[""] | train | extras["dev"]


def document_commands() -> list[tuple[str, str]]:
    """(document, command) of every command line in README.md and docs/, continued lines joined."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = re.sub(r"\\\n\s*", " ", path.read_text()) if path.exists() else ""
        lines = [
            line.strip().removeprefix("$ ")
            for line in text.splitlines()
            if line.startswith(("    ", "\t")) or line[:1].isalpha()
        ]
        found += [
            (path.name, line) for line in lines if re.match(r"(\w+=\S+ )*(python3? |torchrun |bash |main\.py -)", line)
        ]
    return found


COMMANDS = document_commands()


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[command[:60] for _, command in COMMANDS])
def test_documented_commands_are_taken(document: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = MergeConfig("regtome", (8,) * 12)
    searched = {"r": list(merge.r), "merge": merge.as_dict(), "depth": 12, "patches": 196, "model": "deit_small"}
    monkeypatch.setattr(options, "read_schedule", lambda path: searched)  # of --r FILE.json
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word.endswith((".py", ".sh")))
    assert (ROOT / script).is_file(), f"{document} names {script}"
    rest = words[words.index(script) + 1 :]
    if script == "run/submit.py":
        rest = rest[rest.index("--") + 1 :]
    if script in ("main.py", "run/submit.py") and "--help" not in rest:
        options.parse_args(rest)
    if words[0] == "torchrun":
        assert torchrun_arguments(words[1:], abbreviations=False) == rest


def torchrun_arguments(words: list[str], abbreviations: bool) -> list[str]:
    """What torchrun passes on to its script: torch's own with abbreviations, run/torchrun.py without."""
    parser = get_args_parser()
    parser.allow_abbrev = abbreviations
    return parser.parse_args(words).training_script_args


def test_torchrun_passes_a_scripts_options_on() -> None:
    done = bash(ROOT / "run/finetune_deit_s_regtome.sh", REGTOME_ECHO="1", NGPUS="8")
    words = shlex.split(done.stdout)
    assert words[1] == str(ROOT / "run/torchrun.py")
    assert "--r" in torchrun_arguments(words[2:], abbreviations=False)


def test_the_readme_names_every_method_and_module() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"| `{name}` |" in text for name in METHODS)
    modules = {path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("models/*.py")]} - {"__init__.py", "hubconf.py"}
    assert {name for name in modules if name not in text} <= {"errors.py", "scatter_free.py"}


def test_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / link).is_file(), f"{document.name} links to {link}"


def test_commands_in_the_help_of_main_are_taken() -> None:
    lines = re.findall(r"^(?:torchrun|python) .*?main\.py (.*)$", options.DESCRIPTION, re.M)
    assert lines
    for line in lines:
        options.parse_args(shlex.split(line))
