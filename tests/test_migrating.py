"""docs/migrating.md: its code runs, and its flags and names are those of the program."""

import re
import runpy
from pathlib import Path

import pytest

from models import UserError
from options import NO_FLAGS, build_parser, normalise_flag

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "migrating.md").read_text()
# the values of flags that take neither a count nor a probability
VALUES = {"opt": "adamw", "sched": "cosine", "aa": "none", "train_interpolation": "bicubic", "remode": "pixel"}
VALUES |= {"mixup_mode": "batch", "distillation_type": "soft", "model": "deit_tiny", "data_set": "DIGITS"}


def rows(section: str) -> list[list[str]]:
    """The cells of a section's tables."""
    text = PAGE.partition(f"## From {section}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


@pytest.mark.parametrize("theirs, ours", [row for row in rows("DeiT") if row[0].startswith("`--")])
def test_deits_flags_are_taken_or_refused_as_the_page_says(theirs: str, ours: str) -> None:
    for flag in re.findall(r"`(--[\w-]+)`", theirs):
        name = normalise_flag(flag)
        if ours.startswith("refused"):
            assert name in NO_FLAGS
            with pytest.raises(UserError, match=name):
                build_parser().parse([flag])
            continue
        action = build_parser().spellings()[name]
        fraction = name in ("--drop", "--drop_path", "--momentum", "--smoothing")  # below 1
        values = {0: [], None: ["0.5" if fraction else "1"], 2: ["0.2", "0.8"], "+": ["0.9", "0.99"]}[action.nargs]
        build_parser().parse([flag, *([VALUES[name[2:]]] if name[2:] in VALUES else values)])


@pytest.mark.parametrize("section", ["ToMe", "MCTF", "DeiT", "timm"])
def test_flags_of_our_column_exist(section: str) -> None:
    known = set(build_parser().spellings()) | {
        "--models",
        "--methods",
        "--images",
        "--out",
        "--csv",
        "--nodes",
        "--ngpus",
    }
    for row in rows(section):
        for command in re.findall(r"`([^`]*)`", row[-1]):
            assert {normalise_flag(flag) for flag in re.findall(r"(?<![\w-])--\w[\w-]*", command)} <= known, command
            for script in re.findall(r"run/\w+\.py", command):
                assert (ROOT / script).is_file()


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    monkeypatch.chdir(tmp_path)
    Path("page.py").write_text("\n".join(blocks))
    names = runpy.run_path("page.py")
    assert names["out"].group.shape == (1, 196)
    assert names["model"].plan().merges[0] == 32  # twice r, falling to nothing
