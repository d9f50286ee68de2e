"""runfolder.py: two runs never write to one folder, and a start replaces nothing unasked."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import digits, refusal, run, succeeds, toy_model

import runfolder
import trainer
from models import UserError
from run.kill_test import checkpoint, log_lines
from runfolder import Holder, Launch, RunLock
from utils import RunError

Capture = pytest.CaptureFixture[str]
LAUNCHERS = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    with toy_model():
        yield


@pytest.fixture(scope="module")
def finished(toy: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    import main

    assert main.main(argv(folder)) == 0
    return folder


@pytest.fixture
def used(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "used")


def argv(folder: Path, *flags: object) -> list[str]:
    return digits("--num_workers", 0, "--output_dir", folder, *flags, limit=20)


def contents(folder: Path) -> dict[str, bytes]:
    names = ("checkpoint.pth", "best.pth", "log.txt", "args.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Stop main.py as Ctrl-C pressed twice would, before it trains its `at`-th epoch."""
    real, epochs = trainer.train_one_epoch, []

    def train(*arguments: Any, **options: Any) -> bool:
        epochs.append(0)
        if len(epochs) == at:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(trainer, "train_one_epoch", train)


# A start in a used folder


def test_a_fresh_start_in_a_used_folder_is_refused(capsys: Capture, used: Path) -> None:
    before = contents(used)
    for flags in ([], ["--resume", used.parent / "elsewhere.pth"]):
        line = refusal(capsys, argv(used, *flags))
        assert all(way in line for way in ("--resume auto", "--overwrite", "another --output_dir"))
    assert contents(used) == before and not (used / "run.lock").exists()
    assert "done: 1 epochs" in succeeds(capsys, argv(used, "--resume", "auto"))
    assert "--overwrite is about" in refusal(capsys, digits("--overwrite"))


def test_overwrite_destroys_nothing_before_its_first_save(
    capsys: Capture, used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(used)
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        assert run(capsys, argv(used, "--overwrite", "--seed", 1)).status == 130
    assert contents(used) == before
    (used / "checkpoint_prev.pth").write_bytes(before["checkpoint.pth"])
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert run(capsys, argv(used, "--overwrite", "--seed", 1, "--epochs", 3)).status == 130
    assert [line["epoch"] for line in log_lines(used)] == [0]
    assert json.loads((used / "args.json").read_text())["seed"] == 1
    assert checkpoint(used)["sampler"]["seed"] == 1 and checkpoint(used / "checkpoint_prev.pth")["sampler"]["seed"] == 1
    assert checkpoint(used / "best.pth")["epoch"] == 1
    assert run(capsys, argv(used, "--resume", "auto", "--seed", 1, "--epochs", 3)).status == 0
    assert [line["epoch"] for line in log_lines(used)] == [0, 1, 2]


def test_a_restart_by_the_launcher_goes_on_with_what_overwrite_has_saved(
    capsys: Capture, used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun --max_restarts and a requeue repeat the command line, --overwrite and all."""
    monkeypatch.setenv("SLURM_JOB_ID", "27")
    flags = argv(used, "--overwrite", "--seed", 1, "--epochs", 3)
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert run(capsys, flags).status == 130
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    out = succeeds(capsys, [*flags, "--resume", "auto"])
    assert "saved by an earlier attempt" in out and "resumed" in out
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert "replaces the run" in succeeds(capsys, flags)  # by hand, once more in the same job


def test_a_run_that_died_between_log_and_save_starts_anew(capsys: Capture, used: Path) -> None:
    (used / "checkpoint.pth").unlink()
    (used / "log.txt").write_text('{"epoch": 0, "torn": true}\n')
    succeeds(capsys, argv(used, "--resume", "auto"))
    assert len(log_lines(used)) == 1 and "torn" not in log_lines(used)[0]


# The lock


def held_by(folder: Path, seconds: float = 0.0, **changes: Any) -> Path:
    """Leave a lock of another process, whose last heartbeat is some seconds old."""
    path = folder / "run.lock"
    holder = dataclasses.replace(Holder.this_process(), **changes)
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(path, (time.time() - seconds,) * 2)
    return path


ELSEWHERE = {"machine": "another", "host": "node7"}


def test_a_live_run_refuses_the_second_start(capsys: Capture, tmp_path: Path) -> None:
    writing = tmp_path / "checkpoint.pth.1.tmp"
    writing.touch()
    lock = RunLock(tmp_path)
    line = refusal(capsys, argv(tmp_path))
    assert "in use by another run" in line and f"process {os.getpid()} on" in line
    assert writing.exists()  # it is the live run's
    lock.release()
    succeeds(capsys, argv(tmp_path))
    assert not writing.exists() and not (tmp_path / "run.lock").exists()


def test_two_starts_at_once(tmp_path: Path) -> None:
    """Of many that find a dead lock, one takes it over."""
    held_by(tmp_path, pid=2**22 + 1)
    won, lost = [], []

    def start() -> None:
        try:
            won.append(RunLock(tmp_path))
        except UserError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 7
    won[0].release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("seconds", "changes", "free"),
    [
        (0, {"pid": 2**22 + 1}, True),  # gone
        (0, {"process_start": "1"}, True),  # gone, and its number is in use again
        (1e6, {}, False),  # stopped for long, but alive
        (60, ELSEWHERE, False),
        (200, ELSEWHERE, True),
        (0, ELSEWHERE | {"launch": Launch("27", "0", "", "0")}, True),  # Slurm has requeued that job: this one
        (0, ELSEWHERE | {"launch": Launch("28", "0", "", "0")}, False),
    ],
)
def test_who_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, changes: dict[str, Any], free: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "27")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    held_by(tmp_path, seconds, **({"launch": Launch()} | changes))
    if free:
        RunLock(tmp_path).release()
    else:
        with pytest.raises(UserError, match="in use by another run"):
            RunLock(tmp_path)


def test_processes_of_the_same_job_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    path = held_by(tmp_path, **ELSEWHERE)
    threading.Timer(1.0, path.unlink).start()
    RunLock(tmp_path).release()
    assert "waiting for the end of this job's earlier processes" in capsys.readouterr().out
    monkeypatch.setattr(runfolder, "STALE", 0.0)
    monkeypatch.setattr(runfolder, "HEARTBEAT", 0.2)
    held_by(tmp_path)
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path)


@pytest.mark.parametrize("loss", ["taken over", "removed"])
def test_a_run_that_lost_its_folder_ends(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    folder = tmp_path / "run"
    real = trainer.train_one_epoch

    def train(*arguments: Any, **options: Any) -> bool:
        if loss == "removed":
            shutil.rmtree(folder)
        else:
            held_by(folder, **ELSEWHERE)
        return real(*arguments, **options)

    monkeypatch.setattr(trainer, "train_one_epoch", train)
    monkeypatch.setattr(runfolder, "HEARTBEAT", 0.01)
    line = refusal(capsys, argv(folder), status=1)
    assert f"was {loss}" in line and "last good checkpoint: none" in line
    assert (folder / "run.lock").exists() == (loss == "taken over")  # the other one's


def test_a_lock_that_was_only_deleted_comes_back(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    (tmp_path / "run.lock").unlink()
    lock.check(now=True)
    assert (tmp_path / "run.lock").exists()
    held_by(tmp_path)
    with pytest.raises(RunError, match="taken over"):
        lock.check(now=True)


# The end of the launcher

ORPHAN = """
import os, subprocess, sys, time
child = 'import sys, time; sys.path.insert(0, sys.argv[1]); from utils import *\\n'
child += 'die_with_launcher()\\nwith StopSignal() as stop:\\n  print("ready", flush=True)\\n'
child += '  while not stop.requested: time.sleep(0.05)\\n  print(stop.requested, flush=True)'
subprocess.Popen([sys.executable, "-c", child, sys.argv[1]])
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux'")
def test_ranks_stop_when_their_launcher_is_killed(repo: Path) -> None:
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "a", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ORPHAN, str(repo)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"
        launcher.send_signal(signal.SIGKILL)
        assert launcher.stdout.readline() in ("SIGTERM\n", "the end of the launcher\n")
