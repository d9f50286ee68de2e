"""Runs on a real Slurm: two nodes, signals in mid-epoch, requeues from inside and outside, a failing rank, scancel.

All jobs are submitted at once and interrupted as soon as they train, so that they share the time they wait.
"""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import submitit
import torch
from _slurm import ENDED, ROOT, Cluster, slurm_cluster, until
from runs import same_run

from run import submit

pytestmark = pytest.mark.timeout(1800)

ARGUMENTS = shlex.split(
    "--dataset DIGITS --limit 240 --epochs 2 --batch_size 4 --warmup_epochs 0 --r 4 --num_registers 2 "
    "--drop_path 0.1 --mixup 0.8 --log_every 1 --device cpu --output_dir"
)
INTERRUPTIONS = {
    "signalled": ("scancel", "--signal=USR2"),
    "torchrun": ("scancel", "--signal=USR2"),
    "requeued": ("scontrol", "requeue"),
    "cancelled": ("scancel",),
}
# rank 1 raises in the fifth step: the streams are seeded before each
FAILING = """
    import os, random
    if os.environ.get("SLURM_PROCID") == "1":
        seed, calls = random.seed, []
        def failing(*values):
            calls.append(values)
            if len(calls) > 5:
                raise RuntimeError("rank 1 breaks here")
            seed(*values)
        random.seed = failing
"""


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pth", weights_only=True)


@dataclass(frozen=True)
class Jobs:
    """A cluster on which every job has ended, and what the failing one's submitter saw."""

    cluster: Cluster
    folder: Path
    ids: dict[str, str]
    failing: subprocess.CompletedProcess[str]

    def log(self, name: str) -> str:
        return log_of(self.folder, name, self.ids[name]).read_text()


def log_of(folder: Path, name: str, job: str) -> Path:
    """What rank 0 prints; the template has one log for all ranks."""
    return folder / "torchrun.log" if name == "torchrun" else folder / name / "slurm" / f"{job}_0_log.out"


def send(cluster: Cluster, folder: Path, name: str, *flags: str) -> str:
    """Call submit.py in this process; returns the job's id."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        for key in ("SLURM_CONF", "PATH", "OMP_NUM_THREADS", "TMPDIR"):
            patch.setenv(key, cluster.environment[key])
        assert submit.main([*flags, "--ngpus", "0", "--", *ARGUMENTS, str(folder / name)]) == 0
    return said.getvalue().split()[1]


def send_template(cluster: Cluster, folder: Path) -> str:
    options = ("--nodes=2", "--cpus-per-task=1", f"--output={folder / 'torchrun.log'}", "--parsable")
    done = cluster.run("sbatch", *options, "run/train.sbatch", *ARGUMENTS, str(folder / "torchrun"), NPROC="1")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def send_failing(cluster: Cluster, folder: Path) -> "subprocess.Popen[str]":
    """submit.py --wait as a user calls it, with a rank that raises in the middle of training."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(textwrap.dedent(FAILING))
    environment = cluster.environment | {"PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "run/submit.py", "--nodes", "2", "--ngpus", "0", "--wait", "--"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [*command, *ARGUMENTS, str(folder / "failing")], cwd=ROOT, env=environment, text=True, **streams
    )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("jobs")
    with slurm_cluster() as cluster, contextlib.ExitStack() as stack:
        ids = {"torchrun": send_template(cluster, folder)}
        for name, nodes in (("signalled", 2), ("requeued", 2), ("cancelled", 1)):
            ids[name] = send(cluster, folder, name, "--nodes", str(nodes))
        failing = send_failing(cluster, folder)
        stack.callback(failing.kill)
        interrupt(cluster, folder, ids)
        # the run that nobody interrupts: two processes here, which no Slurm knows
        ids["unbroken"] = send(cluster, folder, "unbroken", "--cluster", "local", "--tasks_per_node", "2")
        out, err = failing.communicate(timeout=900)
        until("all jobs end", lambda: all(cluster.state(ids[name]) in ENDED for name in INTERRUPTIONS), 900)
        local = submitit.LocalJob(folder / "unbroken" / "slurm", ids["unbroken"], [0, 1])
        until("the unbroken run ends", lambda: len(submit.read_results(local)) == 2, 900)
        yield Jobs(cluster, folder, ids, subprocess.CompletedProcess((), failing.returncode, out, err))


def interrupt(cluster: Cluster, folder: Path, ids: dict[str, str]) -> None:
    """Stop every job as soon as it trains."""
    left, commands = dict(INTERRUPTIONS), []

    def act() -> bool:
        for name in list(left):
            log = log_of(folder, name, ids[name])
            if log.is_file() and "epoch 0 [2/" in log.read_text():
                commands.append(subprocess.Popen([*left.pop(name), ids[name]], env=cluster.environment))
        return not left

    until("all jobs train", act, 900)
    assert [command.wait(60) for command in commands] == [0] * len(INTERRUPTIONS)


def stopped_at(log: str) -> tuple[int, int]:
    """Epoch and micro-batch at which a log says that the run stopped, and went on; once."""
    stops = re.findall(r"^stopped by .* in epoch (\d+) after micro-batch (\d+); saved", log, re.M)
    starts = re.findall(r"^resumed .*checkpoint\.pth at epoch (\d+), micro-batch (\d+)$", log, re.M)
    assert len(stops) == 1 and stops == starts
    return int(stops[0][0]), int(stops[0][1])


def test_two_nodes_train_together(jobs: Jobs) -> None:
    folder = jobs.folder / "signalled"
    assert {"args.json", "log.txt", "checkpoint.pth", "checkpoint_prev.pth", "best.pth"} <= set(os.listdir(folder))
    assert [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()] == [0, 1]
    assert checkpoint(folder)["sampler"]["world"] == 2
    ranks = [folder / "slurm" / f"{jobs.ids['signalled']}_{rank}_log.out" for rank in (0, 1)]
    assert [f"global_rank={rank}(2)" in path.read_text() for rank, path in enumerate(ranks)] == [True, True]
    assert ["node=0(2)" in ranks[0].read_text(), "node=1(2)" in ranks[1].read_text()] == [True, True]


@pytest.mark.parametrize("name", ["signalled", "requeued", "torchrun"])
def test_an_interrupted_run_ends_as_the_unbroken_one(jobs: Jobs, name: str) -> None:
    assert jobs.cluster.state(jobs.ids[name]) == "COMPLETED"
    assert jobs.cluster.restarts(jobs.ids[name]) == 1
    epoch, step = stopped_at(jobs.log(name))
    assert epoch in (0, 1) and step > 0
    assert not (jobs.folder / name / "stopped.json").exists()
    same_run(jobs.folder / "unbroken", jobs.folder / name)


def test_a_signal_requeues_once_through_submitit(jobs: Jobs) -> None:
    assert jobs.log("signalled").count("Calling checkpoint method.") == 1
    assert jobs.log("signalled").count("10 remaining timeouts") == 1  # a preemption costs no timeout
    assert "Calling checkpoint method." not in jobs.log("requeued")  # Slurm has requeued it already


def test_the_submitter_waits_through_a_requeue(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    job = submitit.SlurmJob(jobs.folder / "signalled" / "slurm", jobs.ids["signalled"], [0, 1])
    assert submit.wait(job) == 0
    assert submit.read_results(job) == {0: ("success", 0), 1: ("success", 0)}


def test_a_failing_ranks_traceback_reaches_the_submitter(jobs: Jobs) -> None:
    assert jobs.failing.returncode == 1, jobs.failing
    assert "failed on rank 1 of 2" in jobs.failing.stderr
    assert "Traceback" in jobs.failing.stderr and "engine.py" in jobs.failing.stderr
    assert jobs.failing.stderr.rstrip().endswith("RuntimeError: rank 1 breaks here")
    job = jobs.failing.stdout.split()[1]
    assert jobs.cluster.state(job) == "FAILED" and jobs.cluster.restarts(job) == 0


def test_a_cancelled_job_saves_and_stays_cancelled(jobs: Jobs) -> None:
    assert jobs.cluster.state(jobs.ids["cancelled"]) == "CANCELLED"
    assert jobs.cluster.restarts(jobs.ids["cancelled"]) == 0
    marker = json.loads((jobs.folder / "cancelled" / "stopped.json").read_text())
    assert marker["status"] == 75 and marker["step"] > 0
    saved = checkpoint(jobs.folder / "cancelled")
    assert (saved["epoch"], saved["step"]) == (marker["epoch"], marker["step"])


def test_slurm_refuses_in_one_line(jobs: Jobs, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", jobs.cluster.environment["SLURM_CONF"])
        patch.setenv("PATH", jobs.cluster.environment["PATH"])
        flags = ["--nodes", "3", "--ngpus", "0", "--", *ARGUMENTS, str(tmp_path)]
        assert submit.main(flags) == 2
        assert submit.slurm_state("999999") == "GONE"
    error = capsys.readouterr().err
    assert error.startswith("submit.py: error: Slurm refuses the job: ") and error.count("\n") == 1
    assert "Node count specification invalid" in error
