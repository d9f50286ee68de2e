"""Short runs of main.py inside the test process, and what several tests check of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

import main
from models.registry import OWN_SIZES
from run.kill_test import differing_runs

# takes the place of deit_digits: 16 patches, 3 blocks, so that an epoch of 40 images takes a fraction of a second
TOY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}


class Ended(NamedTuple):
    """Exit status of a run, and what it printed."""

    status: int
    out: str
    err: str


@contextmanager
def toy_model() -> Iterator[None]:
    """Let --model deit_digits be a smaller one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OWN_SIZES, "deit_digits", TOY)
        yield


def digits(*flags: object, limit: int = 40) -> list[str]:
    """A command line that trains one epoch of a few digits, or evaluates where --eval is among the flags."""
    training = [] if "--eval" in flags else ["--epochs", 1, "--warmup_epochs", 0]
    words = ["--dataset", "DIGITS", "--limit", limit, "--batch_size", 10, *training, *flags]
    return [str(word) for word in words]


def run(capsys: pytest.CaptureFixture[str], argv: list[str]) -> Ended:
    """main.main(argv) with its output."""
    capsys.readouterr()
    status = main.main(argv)
    return Ended(status, *capsys.readouterr())


def succeeds(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Output of a run that ends well."""
    ended = run(capsys, argv)
    assert (ended.status, ended.err) == (0, ""), ended
    return ended.out


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str], status: int = 2) -> str:
    """The one line on stderr of a run that is refused."""
    ended = run(capsys, argv)
    assert ended.status == status, ended
    assert ended.err.startswith("main.py: error: ") and ended.err.count("\n") == 1, ended.err
    assert "Traceback" not in ended.out + ended.err
    return ended.err


def same_run(first: Path, second: Path) -> None:
    """Two runs left the same log lines and, bit for bit, the same checkpoint."""
    assert differing_runs(first, second) == []


def make_tree(root: Path, train: dict[str, int], val: dict[str, int], size: int = 24) -> Path:
    """A FOLDER data set of random images: images per class."""
    generator = np.random.default_rng(0)
    for split, classes in (("train", train), ("val", val)):
        for name, images in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root
