"""utils.py: real files, real signals, real processes."""

import argparse
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import utils
from distributed import Distributed
from models.errors import UserError
from utils import RunError

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "REGTOME_DIST_TIMEOUT")
SLURM = ("PROCID", "NTASKS", "LOCALID", "JOB_ID", "JOB_NODELIST", "STEP_ID", "STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (*LAUNCHER, *(f"SLURM_{end}" for end in SLURM)):
        monkeypatch.delenv(name, raising=False)


def one_line(call, error=UserError):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message and "\x1b" not in message
    return message


def names_in(folder):
    return sorted(os.listdir(folder))


# Randomness


def test_mix_seed_is_stable_and_tells_arguments_apart():
    assert utils.mix_seed(0, 1, 2) == 4529435921577843265
    seeds = {utils.mix_seed(*key) for key in [(0, 12), (0, 1, 2), (1, 2), (12,), (-1,), (1,), (0,), ()]}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)
    assert utils.mix_seed(np.int64(3)) == utils.mix_seed(3)


def draw():
    return random.random(), random.gauss(0, 1), float(np.random.normal()), float(torch.rand(()))


def test_seed_all_seeds_every_stream():
    utils.seed_all(3, 4)
    first = draw()
    second = draw()
    utils.seed_all(3, 4)
    assert draw() == first
    assert all(a != b for a, b in zip(first, second, strict=True))


# Stop signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_signal_asks_for_a_resumable_stop(name):
    before = signal.getsignal(signal.Signals[name])
    with utils.StopSignal() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.requested == name and stop.status == 75
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == name
    assert signal.getsignal(signal.Signals[name]) is before


def test_signals_after_a_finished_run_are_ignored_where_the_process_ends_with_it(monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)]
    monkeypatch.setattr(utils.StopSignal, "ends_process", True)
    with utils.StopSignal() as stop:
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)] == before  # it was stopped
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    }
    try:
        with utils.StopSignal() as stop:
            stop.finished = True
        assert {signal.getsignal(number) for number in handlers} == {signal.SIG_IGN}
        os.kill(os.getpid(), signal.SIGUSR2)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_second_interrupt_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), utils.StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == "SIGINT" and stop.status == 130
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_install_nothing():
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with utils.StopSignal() as stop:
            found.append(signal.getsignal(signal.SIGTERM))
            stop.request("SIGUSR1")
            found.append(stop.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before, "SIGUSR1"]


def test_stop_marker(tmp_path):
    utils.write_stop_marker(tmp_path, "SIGUSR1", 3, 17)
    expected = {"reason": "SIGUSR1", "epoch": 3, "step": 17, "status": 75}
    assert json.loads((tmp_path / "stopped.json").read_text()) == expected
    utils.clear_stop_marker(tmp_path)
    utils.clear_stop_marker(tmp_path)
    utils.write_stop_marker("", "SIGTERM", 0, 0)
    assert os.listdir(tmp_path) == []


# Metadata and logging


def test_to_jsonable_is_json_and_loads_weights_only(tmp_path):
    args = argparse.Namespace(
        lr=np.float32(0.5), n=np.int64(3), path=Path("a"), device=torch.device("cpu"), t=(1, (2.5, None)), flag=True,
        dist=Distributed(torch.device("cpu")), tensor=torch.ones(2), s={2, 1}, text=np.str_("x"),
    )  # fmt: skip
    plain = utils.to_jsonable(args)
    dist = {"device": "cpu", "rank": 0, "world": 1, "local_rank": 0}
    assert plain == {
        "lr": 0.5, "n": 3, "path": "a", "device": "cpu", "t": [1, [2.5, None]], "flag": True,
        "dist": dist, "tensor": [1.0, 1.0], "s": [1, 2], "text": "x",
    }  # fmt: skip
    assert json.loads(json.dumps(plain)) == plain and plain["flag"] is True and type(plain["text"]) is str
    checkpoint.save_checkpoint(tmp_path / "c.pth", {"args": plain})
    assert checkpoint.load_checkpoint(tmp_path / "c.pth") == {"args": plain}


def test_log_is_cut_to_the_resumed_epoch(tmp_path):
    path = tmp_path / "log.txt"
    utils.truncate_log(path, 0)
    assert not path.exists()
    for epoch in range(4):
        utils.append_json_line(path, {"epoch": epoch, "train_loss": torch.tensor(0.5)})
    unbroken = path.read_bytes()
    with open(path, "ab") as file:
        file.write(b'{"epoch": 1, "tra')
    utils.truncate_log(path, 2)
    for epoch in (2, 3):
        utils.append_json_line(path, {"epoch": epoch, "train_loss": 0.5})
    assert path.read_bytes() == unbroken
    if os.path.exists("/dev/full"):
        assert "No space" in one_line(lambda: utils.append_json_line("/dev/full", {}), RunError)


def test_write_json_replaces_whole(tmp_path):
    utils.write_json(tmp_path / "a.json", {"x": 1})
    utils.write_json(tmp_path / "a.json", argparse.Namespace(x=2))
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2} and names_in(tmp_path) == ["a.json"]
    one_line(lambda: utils.write_json(tmp_path / "none" / "a.json", {}), RunError)


def test_versions():
    found = utils.versions()
    assert list(found) == ["python", "torch", "torchvision", "timm", "numpy"]
    assert found["numpy"] == np.__version__ and found["torch"] == str(torch.__version__)


def test_git_revision_is_of_this_project_only(tmp_path, monkeypatch):
    def git(*command):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", tmp_path, *identity, *command], check=True, capture_output=True)

    (tmp_path / "sub").mkdir()
    (tmp_path / "utils.py").write_text("a")
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    assert utils.git_revision() is None  # no repository
    git("init")
    assert utils.git_revision() is None  # no commit
    git("add", "utils.py")
    git("commit", "-m", "a")
    revision = utils.git_revision()
    assert revision and set(revision) <= set("0123456789abcdef")
    (tmp_path / "utils.py").write_text("b")
    assert utils.git_revision() == f"{revision}-dirty"
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "sub" / "utils.py"))
    assert utils.git_revision() is None  # a tarball unpacked in someone else's repository
    monkeypatch.setenv("PATH", str(tmp_path))
    assert utils.git_revision() is None  # no git


def test_output_folder(tmp_path, monkeypatch):
    assert utils.setup_output("", True) is None
    assert utils.setup_output(tmp_path / "a" / "b", False) == tmp_path / "a" / "b" and not (tmp_path / "a").exists()
    folder = utils.setup_output(tmp_path / "a" / "b", True)
    assert folder.is_dir() and names_in(folder) == []
    (tmp_path / "file").touch()
    assert "is a file" in one_line(lambda: utils.setup_output(tmp_path / "file", True))
    assert "below one" in one_line(lambda: utils.setup_output(tmp_path / "file" / "x", True))

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    assert "Read-only file system" in one_line(lambda: utils.setup_output(folder, True))


def test_progress_prints_lines_where_there_is_no_terminal(capsys):
    progress = utils.Progress("abcde", total=7, title="epoch 1", log_every=3, start=2)
    seen = []
    for item in progress:
        seen.append(item)
        if progress.due:
            progress.show(loss=torch.tensor(0.123456), lr=1e-4, note="x")
    lines = capsys.readouterr().out.splitlines()
    assert seen == list("abcde") and [line[: line.index("]") + 1] for line in lines] == [
        f"epoch 1 [{n}/7]" for n in (3, 6, 7)
    ]
    assert "loss 0.1235  lr 0.0001  note x" in lines[0]


def test_progress_on_a_terminal_and_on_other_ranks(capsys, monkeypatch):
    quiet = utils.Progress(range(4), total=4, title="t", log_every=1, is_main=False)
    assert [quiet.due for _ in quiet] == [False] * 4
    quiet.show(loss=1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = utils.Progress(range(2), total=2, title="train", log_every=1)
    for _ in shown:
        shown.show(loss=0.5)
        utils.log("a line")
    captured = capsys.readouterr()
    assert captured.out == "a line\na line\n" and "train" in captured.err and "loss 0.5" in captured.err
    monkeypatch.setenv("RANK", "1")
    utils.log("unseen")
    assert capsys.readouterr().out == ""


def test_tensorboard(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for writer in (utils.tensorboard("", True), utils.tensorboard(tmp_path, False)):
        writer.add_scalar("a", 1.0, 1)
        writer.add_image("b", torch.zeros(3, 4, 4), 1)
        writer.close()
    assert names_in(tmp_path) == []
    with utils.tensorboard(tmp_path / "run", True) as writer:
        writer.add_scalar("a", 1.0, 1)
    assert [name.startswith("events.out") for name in names_in(tmp_path / "run")] == [True]


def test_nearest():
    message = utils.nearest("deit_smal", ["deit_small", "deit_tiny"], "model")
    assert message == "unknown model 'deit_smal'; did you mean 'deit_small'? (choices: deit_small, deit_tiny)"
    assert "did you mean" not in utils.nearest("zzz", ["deit_small"])


def test_a_table_is_valid_markdown_also_for_narrow_columns() -> None:
    text = utils.table(["name", "r", "empty"], [["a", "4", ""], ["bc", "5", ""]])
    assert text.splitlines() == ["| name |  r |", "| ---- | -: |", "| a    |  4 |", "| bc   |  5 |"]
    assert utils.table(["a", "b"], [["x", "1.5"]], markdown=False).splitlines()[0] == "a    b"
