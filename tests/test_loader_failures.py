"""Data loader workers that die, hang or find the shared memory full: one line with the cause and the remedy."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import make_tree, refusal, succeeds, toy_model
from test_datasets import SMALL, make_args
from torch.utils.data import get_worker_info

import datasets
from datasets import LoaderFailure, build_data, build_eval_loader, build_train_loader
from sources import FileSource


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"), {"a": 12, "b": 12}, {"a": 4, "b": 4})


def in_a_worker(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], place: str = "train/a/7.png") -> None:
    """Let the workers, which are forks of this process, do something when they read one image."""
    read = FileSource.read

    def reading(self: FileSource, index: int) -> object:
        if get_worker_info() is not None and self.name(index).endswith(place):
            act()
        return read(self, index)

    monkeypatch.setattr(FileSource, "read", reading)


def failure(tree: Path, **changes: object) -> tuple[str, int]:
    """The message of the loader's failure, and how many batches came before."""
    args = make_args(**{"data_path": str(tree), "num_workers": 2, "aa": "none"} | changes)
    seen = 0
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(LoaderFailure) as error:
        for _ in build_train_loader(args, build_data(args, SMALL), 0, 1).iterate(0):
            seen += 1
    assert "\n" not in str(error.value) and signal.getsignal(signal.SIGCHLD) is handler
    return str(error.value), seen


@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "out of memory"), (signal.SIGSEGV, "a decoder")])
def test_a_killed_worker_is_named_with_the_likely_cause(
    tree: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, words: str
) -> None:
    in_a_worker(monkeypatch, lambda: os.kill(os.getpid(), number))
    began = time.monotonic()
    message, _ = failure(tree)
    assert number.name in message and words in message and "--num_workers" in message
    assert time.monotonic() - began < 5


def test_a_stuck_worker_ends_the_run_after_the_timeout(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_worker(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    began = time.monotonic()
    message, _ = failure(tree, loader_timeout=1.0)
    assert "1 s (--loader_timeout)" in message and time.monotonic() - began < 5


def test_a_full_shared_memory_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(samples: object) -> None:
        raise RuntimeError("unable to write to file </torch_12_34_0>: No space left on device (28)")

    monkeypatch.setattr(datasets, "collate", full)
    message, seen = failure(tree)
    assert "/dev/shm" in message and "--num_workers 0" in message and "--shm-size" in message and seen == 0
    monkeypatch.undo()
    in_a_worker(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGBUS))  # how a page that cannot be had shows
    assert "/dev/shm" in failure(tree)[0]


def test_another_error_in_a_worker_stays_what_it_is(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(samples: object) -> None:
        raise KeyError("a mistake in the program")

    monkeypatch.setattr(datasets, "collate", broken)
    args = make_args(data_path=str(tree), num_workers=1)
    with pytest.raises(KeyError, match="a mistake"):
        list(build_train_loader(args, build_data(args, SMALL), 0, 1).iterate(0))


def test_a_worker_that_dies_during_an_update_does_not_interrupt_it(tree: Path) -> None:
    """torch's own handler would raise in the middle of it; here the next wait for a batch does."""
    args = make_args(data_path=str(tree), num_workers=1, aa="none")
    loader = build_train_loader(args, build_data(args, SMALL), 0, 1)
    batches = loader.iterate(0)
    next(batches)
    (worker,) = loader.feed.workers
    os.kill(worker.pid, signal.SIGKILL)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:  # an update
        torch.ones(10).sum()
    with pytest.raises(LoaderFailure, match="SIGKILL"):
        next(batches)


def test_an_evaluation_tells_it_too(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_worker(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL), "val/a/1.png")
    args = make_args(data_path=str(tree), num_workers=1, eval=True)
    with pytest.raises(LoaderFailure, match="SIGKILL"):
        list(build_eval_loader(args, build_data(args, SMALL).val, 0, 1))


def test_a_run_saves_its_whole_updates_and_goes_on(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["--dataset", "FOLDER", "--data_path", str(tree), "--model", "deit_digits", "--device", "cpu", "--r", "2"]
    argv += ["--epochs", "1", "--batch_size", "4", "--input_size", "32", "--num_workers", "1", "--output_dir", str(out)]
    argv += ["--no_repeated_aug", "--warmup_epochs", "0"]
    with toy_model():
        with pytest.MonkeyPatch.context() as patch:
            # the order of the epoch is known: let the image of the fourth update be the fatal one
            args = make_args(data_path=str(tree), batch_size=4)
            data = build_data(args, SMALL)
            batches = build_train_loader(args, data, 0, 1).batches
            index = batches.order(0)[12]
            fatal = Path(data.train.name(int(index)))
            read = FileSource.read

            def reading(self: FileSource, i: int) -> object:
                if get_worker_info() is not None and Path(self.name(i)) == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return read(self, i)

            patch.setattr(FileSource, "read", reading)
            message = refusal(capsys, argv, status=1)
        assert "SIGKILL" in message and f"last good checkpoint: {out}/checkpoint.pth (epoch 0, micro-batch " in message
        step = torch.load(out / "checkpoint.pth", weights_only=True)["step"]
        assert 0 <= step <= 3
        resumed = succeeds(capsys, [*argv, "--resume", "auto"])
        assert f"at epoch 0, micro-batch {step}" in resumed
        whole = torch.load(out / "checkpoint.pth", weights_only=True)["model"]
        succeeds(capsys, [*argv[: argv.index("--output_dir")], "--output_dir", str(tmp_path / "unbroken"), *argv[-3:]])
        unbroken = torch.load(tmp_path / "unbroken" / "checkpoint.pth", weights_only=True)["model"]
    assert all(torch.equal(whole[name], unbroken[name]) for name in whole)
