"""distributed.py: the launchers' environments, devices, and two real processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_utils import one_line, plain_environment  # noqa: F401  (a fixture of every test here too)

import checkpoint
import distributed
from distributed import Distributed

ROOT = Path(distributed.__file__).parent


def test_alone_everything_is_a_no_op():
    dist = distributed.init_distributed("cpu")
    assert dist == Distributed(torch.device("cpu"), 0, 1, 0) and dist.is_main and not dist.distributed
    tensor = torch.ones(2, requires_grad=True)
    total = distributed.all_reduce_sum(tensor)
    assert torch.equal(total, tensor) and not total.requires_grad and total.data_ptr() != tensor.data_ptr()
    assert distributed.max_over_ranks(3, dist) == 3
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
    ("device", "launch", "expected"),
    [
        ("cuda", distributed.LaunchInfo(3, 4, 1), "cuda:1"),
        ("cuda", distributed.LaunchInfo(3, 4), "cuda:1"),  # rank modulo GPUs when LOCAL_RANK is not told
        ("cuda:1", distributed.LaunchInfo(), "cuda:1"),
        ("cuda:2", distributed.LaunchInfo(), None),
        ("cuda:1", distributed.LaunchInfo(0, 2, 0), None),
        ("cuda", distributed.LaunchInfo(3, 4, 2), None),
    ],
)
def test_gpu_of_a_process(monkeypatch, device, launch, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if expected is None:
        one_line(lambda: distributed._pick_device(device, launch))
    else:
        assert str(distributed._pick_device(device, launch)) == expected


def test_slurm_step_but_not_the_batch_shell(monkeypatch):
    values = {"PROCID": "1", "NTASKS": "4", "LOCALID": "1", "JOB_ID": "54321", "JOB_NODELIST": "node7,node9"}
    for end, value in values.items():
        monkeypatch.setenv(f"SLURM_{end}", value)
    assert distributed.read_launcher() == distributed.LaunchInfo()  # sbatch's own shell: no srun
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert distributed.read_launcher() == distributed.LaunchInfo(
        1, 4, 1, "node7", 20000 + 54321 % 20000, bound_gpu=True
    )


def test_slurm_asks_scontrol_for_a_compressed_list(monkeypatch, tmp_path):
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$3" = "n[3-4]" ] && printf "n3\\nn4\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[3-4]")
    assert distributed._slurm_address() == "n3"


WORKER = """
import os, sys, torch
import checkpoint, distributed, utils
dist = distributed.init_distributed("cpu")
distributed.barrier()
assert dist.distributed and dist.is_main == (dist.rank == 0)
assert distributed.all_reduce_sum(torch.tensor([dist.rank + 1.0], dtype=torch.float64)).tolist() == [3.0]
assert distributed.any_rank(dist.rank == 1, dist) is True and distributed.any_rank(False, dist) is False
assert distributed.gather_names(["a"] if dist.rank else ["b", "c"]) == ["b", "c", "a"]
assert distributed.broadcast_object({"rank": dist.rank}) == {"rank": 0}
assert distributed.max_over_ranks(7 - dist.rank, dist) == 7 and distributed.max_over_ranks(dist.rank, dist) == 1
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
    checkpoint.save_checkpoint(tmp_path / "checkpoint.pth", {"model": {"a": torch.ones(3)}, "epoch": 4})
    checkpoint.save_checkpoint(tmp_path / "checkpoint.pth", {"model": {"a": torch.ones(3)}, "epoch": 5})
    os.truncate(tmp_path / "checkpoint.pth", 500)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "REGTOME_DIST_TIMEOUT": "30"}
    first = start(WORKER, str(tmp_path), RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", **meeting)
    second = start(WORKER, str(tmp_path), SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_LOCALID="1", **meeting)
    outputs = [process.communicate(timeout=600) for process in (first, second)]
    assert (first.returncode, second.returncode) == (1, 0), outputs
    assert outputs[0][0].count("once") == 1 and "once" not in outputs[1][0]
    assert outputs[0][0].count("warning:") == 1 and "lost contact" in outputs[0][0]


ALONE = """
import random, signal, torch
def snapshot():
    return random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads(), signal.getsignal(15)
before = snapshot()
import checkpoint, distributed, utils
assert snapshot() == before
try: distributed.init_distributed("cpu")
except utils.RunError as error: print(error)
"""


def test_import_changes_nothing_and_a_missing_process_ends_the_wait():
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "REGTOME_DIST_TIMEOUT": "1"}
    output, _ = start(ALONE, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", **meeting).communicate(timeout=600)
    assert "lost contact" in output and "process 0 of 2" in output and output.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "[/a/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.2]:5960. This is "
            "typically caused by a remote worker crashing. GLHF!",
            "a process on 10.0.0.2 closed the connection",
        ),
        ("[/a/b.cc:78] Timed out waiting 4000ms for recv operation to complete", "no answer within 4 s"),
        ("NCCL error: remote process exited\nstack", "NCCL error: remote process exited"),
        ("[/a/pair.cc:1] something new. GLHF!", "something new."),
    ],
)
def test_a_lost_process_is_told_in_plain_words(text: str, wanted: str) -> None:
    assert distributed.plain_reason(RuntimeError(text)) == wanted
