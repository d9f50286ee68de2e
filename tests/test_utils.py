"""Tests of utils.py: real files, real signals, real processes."""

import argparse
import errno
import io
import json
import os
import pathlib
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import checkpoint
import distributed
import utils
from checkpoint import DamagedCheckpoint
from distributed import Distributed
from models.errors import UserError
from utils import RunError

ROOT = Path(utils.__file__).parent
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "REGTOME_DIST_TIMEOUT")
SLURM = ("PROCID", "NTASKS", "LOCALID", "JOB_ID", "JOB_NODELIST", "STEP_ID", "STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (*LAUNCHER, *(f"SLURM_{end}" for end in SLURM)):
        monkeypatch.delenv(name, raising=False)


def state(epoch=0, size=10):
    return {"model": {"a": torch.arange(float(size)), "b": torch.ones(3, 4)}, "epoch": epoch, "args": {"x": [1, None]}}


def assert_same(loaded, expected):
    assert loaded.keys() == expected.keys() and loaded["model"].keys() == expected["model"].keys()
    assert all(torch.equal(loaded["model"][key], value) for key, value in expected["model"].items())
    assert (loaded["epoch"], loaded["args"]) == (expected["epoch"], expected["args"])


def one_line(call, error=UserError):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message and "\x1b" not in message
    return message


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


def test_rng_state_survives_a_checkpoint(tmp_path):
    utils.seed_all(1)
    draw()  # an odd number of Gaussian draws leaves a cached one in python and numpy
    checkpoint.save_checkpoint(tmp_path / "c.pth", {"rng": checkpoint.rng_state(), "epoch": 0})
    expected = [draw() for _ in range(3)]
    checkpoint.set_rng_state(checkpoint.load_checkpoint(tmp_path / "c.pth")["rng"])
    assert [draw() for _ in range(3)] == expected


# Distributed


def test_alone_everything_is_a_no_op():
    dist = distributed.init_distributed("cpu")
    assert dist == Distributed(torch.device("cpu"), 0, 1, 0) and dist.is_main and not dist.distributed
    tensor = torch.ones(2, requires_grad=True)
    total = distributed.all_reduce_sum(tensor)
    assert torch.equal(total, tensor) and not total.requires_grad and total.data_ptr() != tensor.data_ptr()
    assert distributed.any_rank(True, dist) and not distributed.any_rank(False, dist)
    assert distributed.gather_names(("a", "b")) == ["a", "b"] and distributed.broadcast_object({"x": 1}) == {"x": 1}
    distributed.barrier()
    distributed.close_distributed()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "contradict"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "contradict"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "'one', not a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "'-1', not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "MASTER_PORT"),
        ({"REGTOME_DIST_TIMEOUT": "soon"}, "REGTOME_DIST_TIMEOUT"),
        ({"REGTOME_DIST_TIMEOUT": "nan"}, "REGTOME_DIST_TIMEOUT"),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}, "contradict"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}, "set MASTER_ADDR"),
    ],
)
def test_contradictory_environment(monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert words in one_line(lambda: distributed.init_distributed("cpu"))


@pytest.mark.parametrize("device", ["foo", "cdua", "cpu:x", "cuda:", "", "meta"])
def test_unknown_device(device):
    message = one_line(lambda: distributed.init_distributed(device))
    assert f"unknown --device '{device}'" in message and "cpu, cuda" in message


def test_absent_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in one_line(lambda: distributed.init_distributed("cuda"))
    assert distributed.init_distributed(None).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "place", "expected"),
    [
        ("cuda", distributed._Place(3, 4, 1), "cuda:1"),
        ("cuda", distributed._Place(3, 4), "cuda:1"),  # rank modulo GPUs when LOCAL_RANK is not told
        ("cuda:1", distributed._Place(), "cuda:1"),
        ("cuda:2", distributed._Place(), None),
        ("cuda:1", distributed._Place(0, 2, 0), None),
        ("cuda", distributed._Place(3, 4, 2), None),
    ],
)
def test_gpu_of_a_process(monkeypatch, device, place, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if expected is None:
        one_line(lambda: distributed._pick_device(device, place))
    else:
        assert str(distributed._pick_device(device, place)) == expected


def test_slurm_step_but_not_the_batch_shell(monkeypatch):
    values = {"PROCID": "1", "NTASKS": "4", "LOCALID": "1", "JOB_ID": "54321", "JOB_NODELIST": "node7,node9"}
    for end, value in values.items():
        monkeypatch.setenv(f"SLURM_{end}", value)
    assert distributed._find_place() == distributed._Place()  # sbatch's own shell: no srun
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert distributed._find_place() == distributed._Place(1, 4, 1, "node7", 20000 + 54321 % 20000, bound_gpu=True)


def test_slurm_asks_scontrol_for_a_compressed_list(monkeypatch, tmp_path):
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$3" = "n[3-4]" ] && printf "n3\\nn4\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[3-4]")
    assert distributed._slurm_address() == "n3"


WORKER = """
import os, sys, torch, utils
dist = distributed.init_distributed("cpu")
distributed.barrier()
assert dist.distributed and dist.is_main == (dist.rank == 0)
assert distributed.all_reduce_sum(torch.tensor([dist.rank + 1.0], dtype=torch.float64)).tolist() == [3.0]
assert distributed.any_rank(dist.rank == 1, dist) is True and distributed.any_rank(False, dist) is False
assert distributed.gather_names(["a"] if dist.rank else ["b", "c"]) == ["b", "c", "a"]
assert distributed.broadcast_object({"rank": dist.rank}) == {"rank": 0}
mean = utils.Mean()
mean.update(torch.tensor(1.0 + dist.rank), 1 + 2 * dist.rank)
assert mean.all_reduce() == 1.75 and mean.value == 1.0 + dist.rank
utils.log("once")
folder = sys.argv[1]
state, path = checkpoint.load_resume("auto", folder)
assert state["epoch"] == 4 and path.endswith("checkpoint_prev.pth")
try:
    checkpoint.load_resume(folder + "/none.pth", folder)
except ValueError as error:
    assert "does not exist" in str(error)
else:
    raise SystemExit(3)
if dist.rank == 1:
    os._exit(0)
try:
    while True:
        distributed.barrier()
except utils.RunError as error:
    assert "\\n" not in str(error)
    print(error)
    os._exit(1)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(code, *arguments, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=env,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_two_processes_agree_and_survive_a_dead_one(tmp_path):
    """Rank 0 as torchrun starts it, rank 1 as srun does."""
    checkpoint.save_checkpoint(tmp_path / "checkpoint.pth", state(4))
    checkpoint.save_checkpoint(tmp_path / "checkpoint.pth", state(5))
    os.truncate(tmp_path / "checkpoint.pth", 500)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "REGTOME_DIST_TIMEOUT": "30"}
    first = start(WORKER, str(tmp_path), RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", **meeting)
    second = start(WORKER, str(tmp_path), SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_LOCALID="1", **meeting)
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert (first.returncode, second.returncode) == (1, 0), outputs
    assert outputs[0][0].count("once") == 1 and "once" not in outputs[1][0]
    assert outputs[0][0].count("warning:") == 1 and "lost contact" in outputs[0][0]


ALONE = """
import random, signal, torch
def snapshot():
    return random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads(), signal.getsignal(15)
before = snapshot()
import utils
assert snapshot() == before
try: distributed.init_distributed("cpu")
except utils.RunError as error: print(error)
"""


def test_import_changes_nothing_and_a_missing_process_ends_the_wait():
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "REGTOME_DIST_TIMEOUT": "1"}
    output, _ = start(ALONE, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", **meeting).communicate(timeout=60)
    assert "lost contact" in output and "process 0 of 2" in output and output.count("\n") == 1


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


# Checkpoints: writing


def names_in(folder):
    return sorted(os.listdir(folder))


def test_save_keeps_the_one_before(tmp_path):
    path = tmp_path / "checkpoint.pth"
    for epoch in range(3):
        checkpoint.save_checkpoint(path, state(epoch))
    assert_same(checkpoint.load_checkpoint(path), state(2))
    assert_same(checkpoint.load_checkpoint(tmp_path / "checkpoint_prev.pth"), state(1))
    checkpoint.save_checkpoint(tmp_path / "best.pth", state(), keep_previous=False)
    checkpoint.save_checkpoint(tmp_path / "best.pth", state(), keep_previous=False)
    assert names_in(tmp_path) == ["best.pth", "checkpoint.pth", "checkpoint_prev.pth"]


def test_save_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for epoch in range(3):
        checkpoint.save_checkpoint(tmp_path / "checkpoint.pth", state(epoch))
    assert_same(checkpoint.load_checkpoint(tmp_path / "checkpoint.pth"), state(2))
    assert_same(checkpoint.load_checkpoint(tmp_path / "checkpoint_prev.pth"), state(1))
    assert len(names_in(tmp_path)) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("size", [10, 1_000_000])  # in the writer's buffer, and beyond it
def test_full_disk_keeps_the_old_files(tmp_path, monkeypatch, size):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save_checkpoint(path, state(0))
    checkpoint.save_checkpoint(path, state(1))

    def open_full(temporary):
        temporary.touch()
        return open("/dev/full", "wb")

    monkeypatch.setattr(utils, "_open_new", open_full)
    message = one_line(lambda: checkpoint.save_checkpoint(path, state(2, size)), RunError)
    assert "No space left on device" in message and str(path) in message
    one_line(lambda: utils.write_json(tmp_path / "args.json", {}), RunError)
    assert names_in(tmp_path) == ["checkpoint.pth", "checkpoint_prev.pth"]
    assert_same(checkpoint.load_checkpoint(path), state(1))


def in_child(function):
    """Exit status of a function run in a forked process."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_disk_that_fills_inside_the_zip_writer(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "checkpoint.pth"
    checkpoint.save_checkpoint(path, state(1))

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoint.save_checkpoint(path, state(2, 1_000_000))
        except RunError:
            os._exit(0)

    assert in_child(save) == 0
    assert names_in(tmp_path) == ["checkpoint.pth"]
    assert_same(checkpoint.load_checkpoint(path), state(1))


def die_before(step):
    """Make the given call of fsync, link or rename the process's last moment."""
    calls = 0

    def guard(real, *arguments):
        nonlocal calls
        calls += 1
        if calls == step:
            os._exit(0)
        return real(*arguments)

    for name in ("fsync", "link", "replace"):
        setattr(os, name, partial(guard, getattr(os, name)))


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("step", range(1, 7))
def test_killed_at_any_moment_a_whole_checkpoint_is_there(tmp_path, step, torn):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save_checkpoint(path, state(0))
    checkpoint.save_checkpoint(path, state(1))
    if torn:
        os.truncate(path, 300)

    def save():
        die_before(step)
        checkpoint.save_checkpoint(path, state(2))

    assert in_child(save) == (9 if step == 6 else 0)  # five moments, and then it is done
    loaded, _ = checkpoint.load_resume("auto", tmp_path)
    assert_same(loaded, state(2 if step > 3 else 0 if torn else 1))
    utils.setup_output(tmp_path, True)
    assert names_in(tmp_path) == ["checkpoint.pth", "checkpoint_prev.pth"]
    checkpoint.save_checkpoint(path, state(3))
    assert_same(checkpoint.load_checkpoint(path), state(3))
    assert names_in(tmp_path) == ["checkpoint.pth", "checkpoint_prev.pth"]


def test_save_when_both_names_are_one_file(tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save_checkpoint(path, state(0))
    os.link(path, checkpoint.previous_path(path))
    checkpoint.save_checkpoint(path, state(1))
    assert names_in(tmp_path) == ["checkpoint.pth", "checkpoint_prev.pth"]
    assert_same(checkpoint.load_checkpoint(path), state(1))


def test_a_mistake_of_ours_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.save_checkpoint(tmp_path / "c.pth", {"model": lambda: 0})
    assert names_in(tmp_path) == []


# Checkpoints: reading


def test_every_bit_flip_is_found_or_harmless(tmp_path):
    """Every third byte, one of its bits; only alignment padding and unused header fields may be harmless."""
    path = tmp_path / "c.pth"
    checkpoint.save_checkpoint(path, state())
    content, found = path.read_bytes(), 0
    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            loaded = checkpoint.load_checkpoint(path)
        except DamagedCheckpoint:
            found += 1
        else:
            assert_same(loaded, state())
    assert found > len(content) / 3 / 3


def test_an_entry_marked_as_a_folder_is_found(tmp_path):
    """The one bit flip that neither zip's checksums nor torch notice: torch then returns uninitialised memory."""
    path = tmp_path / "c.pth"
    checkpoint.save_checkpoint(path, state())
    content = bytearray(path.read_bytes())
    content[content.rindex(b"archive/data/0") - 46 + 38] |= 0x10  # external attributes in the central directory
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert "archive/data/0" in one_line(lambda: checkpoint.load_checkpoint(path), DamagedCheckpoint)


def test_a_flip_in_the_weights_names_the_part(tmp_path):
    path = tmp_path / "c.pth"
    checkpoint.save_checkpoint(path, state(size=4000))
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(4000.0).numpy().tobytes()) + 9000] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch itself sees nothing
    assert "wrong checksum of" in one_line(lambda: checkpoint.load_checkpoint(path), DamagedCheckpoint)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("legacy", [False, True])
def test_torn(tmp_path, share, legacy):
    path = tmp_path / "c.pth"
    torch.save(state(), path, _use_new_zipfile_serialization=not legacy)
    os.truncate(path, int(path.stat().st_size * share))
    words = "is empty" if share == 0 else str(path)
    assert words in one_line(lambda: checkpoint.load_checkpoint(path), DamagedCheckpoint)


def npz_bytes():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"hello world, a text file\n" * 9,
        b'{"a": 1}',
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        b"\xff\xd8\xff\xe0" + bytes(range(256)),
        bytes(4096),
        pickle.dumps([1, 2], protocol=2),
        pickle.dumps({"a": 1}, protocol=4),
        npz_bytes(),
        b"PK",
    ],
)
def test_foreign(tmp_path, content, recwarn):
    path = tmp_path / "c.pth"
    path.write_bytes(content)
    assert str(path) in one_line(lambda: checkpoint.load_checkpoint(path), DamagedCheckpoint)
    assert not recwarn.list


@pytest.mark.parametrize("content", [[1, 2], {}, {1: torch.ones(1)}, torch.ones(2), "text"])
def test_a_saved_object_that_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    message = one_line(lambda: checkpoint.load_checkpoint(tmp_path / "c.pth"), DamagedCheckpoint)
    assert type(content).__name__ in message


def test_no_file(tmp_path):
    assert "does not exist" in one_line(lambda: checkpoint.load_checkpoint(tmp_path / "none.pth"))
    assert "is a folder" in one_line(lambda: checkpoint.load_checkpoint(tmp_path))
    (tmp_path / "file").touch()
    assert "Not a directory" in one_line(lambda: checkpoint.load_checkpoint(tmp_path / "file" / "c.pth"))


def test_permission_denied(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save_checkpoint(path, state(0))
    checkpoint.save_checkpoint(path, state(1))
    path.chmod(0)
    if os.geteuid() == 0:  # whom no mode keeps out
        real = open

        def refuse(file, *arguments, **options):
            if Path(file) == path:
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return real(file, *arguments, **options)

        monkeypatch.setattr("builtins.open", refuse)
    assert "Permission denied" in one_line(lambda: checkpoint.load_checkpoint(path))
    assert "Permission denied" in one_line(lambda: checkpoint.load_resume("auto", tmp_path))  # no silent step back


class Evil:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle0", "pickle2", "pickle5"])
@pytest.mark.parametrize("name", ["system", "eval"])
def test_code_in_a_checkpoint_is_named_and_not_run(tmp_path, kind, name):
    trace, path = tmp_path / "ran", tmp_path / "checkpoint.pth"
    evil = Evil(os.system, f"touch {trace}") if name == "system" else Evil(eval, f"open({str(trace)!r}, 'w')")
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(evil, protocol=int(kind[-1])))
    else:
        torch.save({"model": {}, "args": evil}, path, _use_new_zipfile_serialization=kind == "zip")
    message = one_line(lambda: checkpoint.load_checkpoint(path))
    assert kind == "pickle5" or f"{name};" in message
    if kind == "zip":
        checkpoint.save_checkpoint(tmp_path / "checkpoint_prev.pth", state())
        assert name in one_line(lambda: checkpoint.find_resume(tmp_path))  # refused, not passed over
    assert not trace.exists()


def test_a_whole_module_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "c.pth")
    assert "torch.nn.modules.linear.Linear" in one_line(lambda: checkpoint.load_checkpoint(tmp_path / "c.pth"))


@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoint_of_deit_with_its_namespace(tmp_path, legacy):
    """DeiT's keys; its submitit launcher leaves a path in args."""
    args = argparse.Namespace(lr=5e-4, opt_betas=None, activate_layer=[1, 2], output_dir=pathlib.PosixPath("/a/b"))
    content = {**state(), "optimizer": {"state": {}}, "lr_scheduler": {}, "args": args}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    loaded = checkpoint.load_checkpoint(tmp_path / "c.pth")
    checkpoint.check_resumable(loaded, "c.pth")
    assert utils.to_plain(loaded["args"]) == {
        "lr": 5e-4,
        "opt_betas": None,
        "activate_layer": [1, 2],
        "output_dir": "/a/b",
    }
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed for that one file only


@pytest.mark.parametrize("end", ["pth", "safetensors"])
def test_bare_state_dict(tmp_path, end):
    weights = state()["model"]
    path = tmp_path / f"c.{end}"
    torch.save(weights, path) if end == "pth" else save_file(weights, path)
    loaded = checkpoint.load_checkpoint(path)
    assert list(loaded) == ["model"] and torch.equal(loaded["model"]["a"], weights["a"])
    assert "use --finetune" in one_line(lambda: checkpoint.check_resumable(loaded, path))
    os.truncate(path, path.stat().st_size - 40)
    one_line(lambda: checkpoint.load_checkpoint(path), DamagedCheckpoint)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of one checkpoint, and a hub cache of its own."""
    checkpoint.save_checkpoint(tmp_path / "served.pth", state(7))
    content, asked = (tmp_path / "served.pth").read_bytes(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if "good" in self.path else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_): ...

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "*")
    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", asked
    httpd.shutdown()
    httpd.server_close()


def test_url_is_cached_by_address(server, tmp_path):
    address, asked = server
    for folder in ("good1", "good1", "good2"):  # two files of one name are two files
        loaded, path = checkpoint.load_resume(f"{address}/{folder}/checkpoint.pth?download=1", "")
        assert path.startswith("http://") and loaded["epoch"] == 7
    assert len(asked) == 2
    checkpoint.load_checkpoint(f"{address}/good/deit_small_patch16_224-cd65a155.pth")
    assert (tmp_path / "hub" / "checkpoints" / "deit_small_patch16_224-cd65a155.pth").exists()


def test_url_that_does_not_answer(server, tmp_path):
    address, _ = server
    assert "404" in one_line(lambda: checkpoint.load_checkpoint(f"{address}/bad/checkpoint.pth"))
    offline = f"http://127.0.0.1:{free_port()}/c.pth"
    assert "give a local file" in one_line(lambda: checkpoint.load_checkpoint(offline))
    assert not list((tmp_path / "hub").rglob("*.pth*"))


# Resume


def test_resume_auto(tmp_path, capsys):
    assert checkpoint.find_resume(tmp_path / "new") is None and checkpoint.load_resume("auto", tmp_path / "new") is None
    assert checkpoint.load_resume(None, tmp_path) is None and checkpoint.load_resume("", tmp_path) is None
    path = tmp_path / "checkpoint.pth"
    checkpoint.save_checkpoint(path, state(0))
    checkpoint.save_checkpoint(path, state(1))
    assert checkpoint.find_resume(tmp_path) == path and capsys.readouterr().out == ""
    os.truncate(path, 700)
    loaded, found = checkpoint.load_resume("auto", tmp_path)
    output = capsys.readouterr().out
    assert loaded["epoch"] == 0 and found.endswith("checkpoint_prev.pth")
    assert output.startswith("warning: ") and output.count("\n") == 1
    assert "torn" in one_line(lambda: checkpoint.load_resume(str(path), tmp_path))  # a named file is taken or refused
    path.unlink()
    assert checkpoint.find_resume(tmp_path) == checkpoint.previous_path(path)
    os.truncate(checkpoint.previous_path(path), 700)
    assert "no checkpoint to resume" in one_line(lambda: checkpoint.find_resume(tmp_path))
    assert "--output_dir" in one_line(lambda: checkpoint.load_resume("auto", ""))


# Metadata and logging


def test_to_plain_is_json_and_loads_weights_only(tmp_path):
    args = argparse.Namespace(
        lr=np.float32(0.5), n=np.int64(3), path=Path("a"), device=torch.device("cpu"), t=(1, (2.5, None)), flag=True,
        dist=Distributed(torch.device("cpu")), tensor=torch.ones(2), s={2, 1}, text=np.str_("x"),
    )  # fmt: skip
    plain = utils.to_plain(args)
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


def test_mean_is_weighted_and_exact():
    mean = utils.Mean()
    assert np.isnan(mean.value) and np.isnan(mean.all_reduce())
    mean.update(float("nan"), 0)
    mean.update(torch.tensor(100.0, requires_grad=True), 3)
    mean.update(0.0, torch.tensor(1))
    assert mean.value == mean.all_reduce() == 75.0
    large = utils.Mean()
    for _ in range(1000):
        large.update(torch.tensor(1.0), 2**24 + 1)  # a count that single precision cannot hold
    assert float(large.count) == 1000 * (2**24 + 1) and large.value == 1.0
    assert utils.reduce_means({"a": mean, "b": large}) == {"a": 75.0, "b": 1.0} and utils.reduce_means({}) == {}


def test_nearest():
    message = utils.nearest("deit_smal", ["deit_small", "deit_tiny"], "model")
    assert message == "unknown model 'deit_smal'; did you mean 'deit_small'? (choices: deit_small, deit_tiny)"
    assert "did you mean" not in utils.nearest("zzz", ["deit_small"])
