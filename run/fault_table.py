"""The faults of docs/cluster.md, played one by one: what became of them once beside what becomes of them now.

`run/kill_test.py --all` calls this. Each fault is a function that plays it on short runs of main.py and returns what
happened in one line; it raises AssertionError where that is not what docs/cluster.md promises.
"""

import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from run import kill_test
from run.kill_test import ROOT, checkpoint, differing_runs

FLAGS = (
    "--dataset DIGITS --model deit_digits --device cpu --limit 240 --epochs 3 --batch_size 8 --warmup_epochs 1 --r 2"
)
FLAGS += " --num_registers 2 --drop_path 0.1 --mixup 0.5 --reprob 0.3 --log_every 1 --num_workers 0 --input_size 16"
FLAGS += " --save_every_steps 1"
# every process draws nothing for itself, so that only sums can differ between numbers of processes
PLAIN = "--drop_path 0 --mixup 0 --cutmix 0 --reprob 0 --aa none --opt momentum --momentum 0 --lr 0.1"
PATIENCE = 150.0


@dataclass
class Ended:
    """A process that has ended: its status, what it said, and how long it took."""

    status: int
    text: str
    seconds: float

    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if ": error" in line]


@dataclass
class Run:
    """A run of main.py in a folder, under torchrun or alone."""

    folder: Path
    process: subprocess.Popen[bytes]
    output: Path
    began: float = field(default_factory=time.monotonic)

    def ranks(self) -> list[int]:
        return kill_test.Launch(self.folder, self.process).ranks()

    def until(self, text: str, times: int = 1) -> "Run":
        """Wait until the run has said something."""
        deadline = time.monotonic() + PATIENCE
        while len(re.findall(text, self.output.read_text())) < times:
            assert time.monotonic() < deadline and self.process.poll() is None, f"{self.output}: no {text!r}"
            time.sleep(0.02)
        return self

    def end(self, patience: float = PATIENCE) -> Ended:
        status = self.process.wait(patience)
        return Ended(status, self.output.read_text(), time.monotonic() - self.began)

    def hit(self, number: signal.Signals, rank: int | None = None) -> "Run":
        os.kill(self.process.pid if rank is None else self.ranks()[rank], number)
        self.began = time.monotonic()
        return self


class Bench:
    """Starts runs in one folder; everything that is still alive at its end is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count, self.runs = folder, 0, []  # type: Path, int, list[Run]

    def new(self) -> Path:
        self.count += 1
        return self.folder / f"run{self.count}"

    def start(
        self, folder: Path, flags: str = "", world: int = 2, torchrun: str = "--standalone", name: str = ""
    ) -> Run:
        """Start a run; what it says goes to FOLDER + name + .txt, whose content so far is dropped."""
        command = [sys.executable, str(ROOT / "main.py")]
        if world > 1 or "nnodes" in torchrun:
            command[1:1] = [str(ROOT / "run" / "torchrun.py"), *torchrun.split(), f"--nproc_per_node={world}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "REGTOME_DIST_TIMEOUT": "20"}
        words = [*command, *FLAGS.split(), *flags.split(), "--output_dir", str(folder)]
        with open(f"{folder}{name}.txt", "wb") as output:
            process = subprocess.Popen(words, stdout=output, stderr=output, env=environment)
        run = Run(folder, process, Path(output.name))
        self.runs.append(run)
        return run

    @cached_property
    def unbroken(self) -> Path:
        folder = self.folder / "unbroken"
        assert self.start(folder).end().status == 0, f"{folder}.txt"
        return folder

    def same(self, folder: Path) -> str:
        lines = differing_runs(folder, self.unbroken)
        assert not lines, lines[:3]
        return "identical"

    def close(self) -> None:
        for run in self.runs:
            for pid in [*run.ranks(), run.process.pid]:
                kill_test.send(pid, signal.SIGKILL)
            run.process.wait()


def epochs(folder: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]


def gone(pids: Sequence[int], seconds: float) -> float:
    """Wait for the end of processes; returns the seconds that it took."""
    began = time.monotonic()
    while any(kill_test.is_rank(pid) for pid in pids):
        assert time.monotonic() - began < seconds, f"{pids} live on"
        time.sleep(0.05)
    return time.monotonic() - began


# The faults


def torchrun_killed(bench: Bench) -> str:
    run = bench.start(bench.new(), "--resume auto").until(r"epoch 1 \[1/")
    ranks = run.ranks()
    run.hit(signal.SIGKILL)
    again = bench.start(run.folder, "--resume auto")
    seconds = gone(ranks, 60)
    assert again.end().status == 0, again.output
    assert epochs(run.folder) == [0, 1, 2]
    return f"both ranks save and leave within {seconds:.1f} s; the same command goes on, {bench.same(run.folder)}"


def two_starts(bench: Bench) -> str:
    first = bench.start(bench.new(), "--seed 1 --epochs 8", world=1).until(r"epoch 0 \[2/")
    second = bench.start(first.folder, "--resume auto", world=1, name="-second").end()
    assert second.status == 2 and "in use by another run" in second.text, second.text
    assert first.end().status == 0 and epochs(first.folder) == list(range(8))
    return "second start: status 2, 'in use by another run (process N on HOST, since ...)'; the first ends whole"


def used_folder(bench: Bench) -> str:
    folder = shutil.copytree(bench.unbroken, bench.new())
    ended = bench.start(folder).end()
    assert ended.status == 2 and "--overwrite" in ended.text
    bench.same(folder)
    bench.start(folder, "--overwrite --seed 1 --save_every_steps 0").until(r"epoch 0 \[3/").hit(signal.SIGKILL, 0).end()
    return f"status 2 with the ways out; --overwrite killed in epoch 0: the earlier run is {bench.same(folder)}"


def max_restarts(bench: Bench) -> str:
    said = []
    for flags in ("", "--resume auto"):
        run = bench.start(bench.new(), flags, torchrun="--standalone --max_restarts=2")
        run.until(r"epoch 1 \[2/").hit(signal.SIGKILL, 1)
        ended = run.end()
        said.append(ended.status)
        if flags:
            assert ended.status == 0
        else:
            assert ended.status != 0 and "holds checkpoint.pth" in ended.text
    return f"without: refused, status {said[0]}, nothing lost; with: {bench.same(run.folder)}"


def rank_killed(bench: Bench) -> str:
    run = bench.start(bench.new(), "--resume auto").until(r"epoch 1 \[1/")
    ended = run.hit(signal.SIGKILL, 1).end()
    last = [line for line in ended.text.splitlines() if line.startswith("torchrun: ")]
    assert ended.status == 1 and "Traceback" not in ended.text and "was killed by SIGKILL" in last[0] and len(last) == 3
    assert bench.start(run.folder, "--resume auto").end().status == 0
    same = bench.same(run.folder)
    return f"status 1 in {ended.seconds:.0f} s; '{last[0][10:90]}...', the checkpoint, the command; {same}"


def launcher_terminated(bench: Bench) -> str:
    run = bench.start(bench.new(), "--resume auto").until(r"epoch 1 \[1/")
    ended = run.hit(signal.SIGTERM).end()
    assert (run.folder / "stopped.json").exists() and "Traceback" not in ended.text
    assert bench.start(run.folder, "--resume auto").end().status == 0
    return f"saved in mid-epoch; {bench.same(run.folder)}"


def rank_paused(bench: Bench) -> str:
    run = bench.start(bench.new()).until(r"epoch 1 \[1/")
    run.hit(signal.SIGSTOP, 1)
    time.sleep(5)
    run.hit(signal.SIGCONT, 1)
    assert run.end().status == 0
    return f"waits, goes on, {bench.same(run.folder)}"


def rank_frozen(bench: Bench) -> str:
    run = bench.start(bench.new(), "--resume auto").until(r"epoch 1 \[1/")
    ended = run.hit(signal.SIGSTOP, 1).end()
    line = ended.errors()[0]
    assert ended.status == 1 and "no answer within 20 s" in line
    assert bench.start(run.folder, "--resume auto").end().status == 0
    return f"status 1 after {ended.seconds:.0f} s, 'no answer within 20 s'; {bench.same(run.folder)}"


def fewer_processes(bench: Bench) -> str:
    whole = bench.new()
    assert bench.start(whole, PLAIN).end().status == 0
    said = []
    for split in ("--batch_size 16", "--batch_size 8 --accumulation_steps 2"):
        run = bench.start(bench.new(), f"{PLAIN} --resume auto").until(r"epoch 1 \[4/")
        run.hit(signal.SIGTERM).end()
        assert checkpoint(run.folder)["step"] > 0
        ended = bench.start(run.folder, f"{PLAIN} --resume auto {split}", world=1).end()
        assert ended.status == 0 and "the same images in the same order" in ended.text, ended.text
        a, b = checkpoint(whole)["model"], checkpoint(run.folder)["model"]
        said.append(max(float((a[name] - b[name]).abs().max()) for name in a))
        assert said[-1] < 1e-4
    by = f"{said[0]:.0e} (1x16), {said[1]:.0e} (1x8, accumulation 2)"
    return f"goes on inside the epoch; weights in the end differ by {by}"


def other_global_batch(bench: Bench) -> str:
    said = []
    for flags in ("", "--resume_anyway"):
        run = bench.start(bench.new(), "--resume auto").until(r"epoch 1 \[4/")
        run.hit(signal.SIGTERM).end()
        ended = bench.start(run.folder, f"--resume auto {flags}", world=1).end()
        assert ended.status == 0 and epochs(run.folder) == [0, 1, 2], ended.text
        note = next(line for line in ended.text.splitlines() if "images of the epoch were done" in line)
        rate = next(line for line in ended.text.splitlines() if "learning rate follows" in line)
        said.append(note.partition("were done; ")[2][:60] if flags else rate.partition("batch: ")[2])
    return f"goes on at the next epoch, lr {said[0]}; with --resume_anyway it {said[1]}"


def elastic(bench: Bench) -> str:
    """One torchrun, then a second one joins, then the second one is killed."""
    folder, port = bench.new(), 29400 + os.getpid() % 500
    options = f"--nnodes=1:2 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{port} --rdzv_id=e{port} --max_restarts=3"
    worlds: list[int] = []

    def join(name: str) -> Run:
        return bench.start(folder, "--epochs 30 --resume auto --resume_anyway", 1, options, name)

    def until_world(world: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while not (folder / "checkpoint.pth").exists() or checkpoint(folder)["sampler"]["world"] != world:
            assert time.monotonic() < deadline, f"world {world} does not come; {first.output}"
            time.sleep(0.2)
        worlds.append(world)

    first = join("-first")
    until_world(1)
    second = join("-second")
    until_world(2)
    for pid in [second.process.pid, *second.ranks()]:
        kill_test.send(pid, signal.SIGKILL)
    until_world(1)
    done = checkpoint(folder)["epoch"]
    first.hit(signal.SIGTERM).end()
    assert epochs(folder) == list(range(len(epochs(folder)))) and len(epochs(folder)) >= done
    return f"worlds {worlds}; log.txt without gaps or doubles"


def folder_removed(bench: Bench) -> str:
    run = bench.start(bench.new(), world=1).until(r"epoch 1 \[1/")
    shutil.rmtree(run.folder)
    ended = run.end()
    assert ended.status == 1 and len(ended.errors()) == 1 and "last good checkpoint: none" in ended.text
    return (
        f"status 1, '{ended.errors()[0].partition('error: ')[2].partition('; ')[0][-60:]}', no false checkpoint named"
    )


def torn_files(bench: Bench) -> str:
    run = bench.start(bench.new(), "--resume auto").until(r"epoch 1 \[1/")
    run.hit(signal.SIGKILL, 0).end()
    os.truncate(run.folder / "checkpoint.pth", 5000)
    ended = bench.start(run.folder, "--resume auto").end()
    assert ended.status == 0 and ended.text.count("torn or damaged") == 1
    return f"one warning, goes on from checkpoint_prev.pth, {bench.same(run.folder)}"


def altered_checkpoint(bench: Bench) -> str:
    state = torch.load(bench.unbroken / "checkpoint.pth", weights_only=True)
    said = []
    changes: list[dict[str, Any]] = [{"epoch": "abc"}, {"rng": {}}, {"sampler": {}}, {"epoch": 99}, {"step": 3000}]
    for number, change in enumerate(changes):
        file = bench.folder / f"altered{number}.pth"
        torch.save(state | {"epoch": 1} | change, file)
        ended = bench.start(bench.new(), f"--resume {file}", world=1).end()
        assert ended.status == 2 and len(ended.errors()) == 1 and "Traceback" not in ended.text, ended.text
        said.append(next(iter(change)))
    return f"status 2, one line each ({', '.join(said)})"


def bomb(bench: Bench) -> str:
    plain, packed = bench.folder / "plain.pth", bench.folder / "bomb.pth"
    torch.save({"model": torch.zeros(4)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            if name.endswith("data/0"):
                with target.open(name, "w", force_zip64=True) as record:
                    for _ in range(1024):
                        record.write(bytes(2**20))
            else:
                target.writestr(name, source.read(name))
    code = "import sys, time, resource; sys.path.insert(0, sys.argv[1]); from checkpoint import load_checkpoint\n"
    code += "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; began = time.monotonic()\n"
    code += "try: load_checkpoint(sys.argv[2])\nexcept Exception as error: print(type(error).__name__, error)\n"
    code += "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    code += "print(f'{time.monotonic() - began:.2f} s, {(after - before) / 1024:.0f} MB more')"
    command = [sys.executable, "-c", code, str(ROOT), str(packed)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "compressed parts" in lines[0] and float(lines[1].split()[0]) < 2
    return f"one line after {lines[1]}"


def lone_rank(bench: Bench) -> str:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    words = [sys.executable, str(ROOT / "main.py"), *FLAGS.split(), "--output_dir", str(bench.new())]
    environment = os.environ | environment | {"REGTOME_DIST_TIMEOUT": "5"}
    began = time.monotonic()
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 1 and len(lines) == 1 and "nobody answers there" in lines[0], lines
    return f"status 1 after {time.monotonic() - began:.0f} s (timeout 5 s), one line in all"


def port_in_use(bench: Bench) -> str:
    """A foreign program listens on the port: torchrun's own store, and a bare rank 0."""
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        port = foreign.getsockname()[1]
        run = bench.start(bench.new(), torchrun=f"--nnodes=1 --master_addr=127.0.0.1 --master_port={port}")
        under = run.end()
        environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [sys.executable, str(ROOT / "main.py"), *FLAGS.split(), "--output_dir", str(bench.new())]
        environment = os.environ | environment | {"REGTOME_DIST_TIMEOUT": "10"}
        began = time.monotonic()
        bare = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    lines = (bare.stdout + bare.stderr).splitlines()
    assert under.status != 0 and "EADDRINUSE" in under.text.upper().replace("ADDRESS ALREADY IN USE", "EADDRINUSE")
    assert bare.returncode == 1 and len(lines) == 1 and "another program uses that port" in lines[0], lines
    said = f"bare: 1 in {time.monotonic() - began:.0f} s, '{lines[0].partition('error: ')[2][:60]}...'"
    return f"torchrun: status {under.status} in {under.seconds:.0f} s; {said}"


def disk_full(bench: Bench) -> str:
    """The output folder lies on a disk of 48 MiB, which another program then fills."""
    folder = bench.new()
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        return "not played: only root can mount a small disk"
    try:
        run = bench.start(folder, "--resume auto")
        run.until(r"epoch 1 \[1/")
        with suppress(OSError), open(folder / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(2**16))
        ended = run.end()
        lines = ended.errors()
        assert ended.status == 1 and any("No space left" in line for line in lines), ended.text[-500:]
        assert not list(folder.glob("*.tmp")) and checkpoint(folder)
        copy = shutil.copytree(folder, bench.new(), ignore=shutil.ignore_patterns("filler"))
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
    (copy / "run.lock").unlink(missing_ok=True)
    assert bench.start(copy, "--resume auto").end().status == 0
    return f"status 1, one line, both files whole, no temporary left; copied elsewhere and resumed: {bench.same(copy)}"


def worker_killed(bench: Bench) -> str:
    run = bench.start(bench.new(), "--resume auto --num_workers 1 --epochs 3").until(r"epoch 1 \[1/")
    workers = [child for rank in run.ranks() for child in kill_test.children(rank)]
    assert workers, "no loader processes"
    kill_test.send(workers[-1], signal.SIGKILL)
    began = time.monotonic()
    ended = run.end()
    assert ended.status == 1 and "--num_workers" in ended.text and "Traceback" not in ended.text, ended.text[-500:]
    seconds = time.monotonic() - began
    assert bench.start(run.folder, "--resume auto").end().status == 0
    return f"status 1 after {seconds:.0f} s, one line with cause and remedy; {bench.same(run.folder)}"


def no_whole_checkpoint(bench: Bench) -> str:
    folder = shutil.copytree(bench.unbroken, bench.new())
    for name in ("checkpoint.pth", "checkpoint_prev.pth"):
        os.truncate(folder / name, 3000)
    torn = bench.start(folder, "--resume auto", world=1).end()
    pickled = bench.folder / "pickled.pth"
    torch.save({"model": Path("x")}, pickled)
    code = bench.start(bench.new(), f"--resume {pickled}", world=1).end()
    missing = bench.start(bench.new(), "--resume nowhere.pth", world=1).end()
    for ended in (torn, code, missing):
        assert ended.status == 2 and len(ended.errors()) == 1 and "Traceback" not in ended.text, ended.text
    return "status 2, one line each"


def accumulation(bench: Bench) -> str:
    flags = f"{PLAIN} --epochs 6 --limit 72 --full_weight 1 --full_r_max 4 --consistency_weight 3"
    flags += " --consistency_threshold 0 --save_every_steps 0 --no_repeated_aug --opt momentum --lr 0.5"
    losses = []
    for split in ("--batch_size 64", "--batch_size 32 --accumulation_steps 2"):
        run = bench.start(bench.new(), f"{flags} {split}", world=1)
        assert run.end().status == 0, run.output
        lines = (run.folder / "log.txt").read_text().splitlines()
        losses.append([json.loads(line)["train_loss"] for line in lines])
    worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert worst < 1e-4
    return f"losses of 6 one-update epochs differ by at most {worst:.0e}"


# On a Slurm


@dataclass
class Cluster:
    """The Slurm of tests/_slurm.py, with submit.py in front of it."""

    bench: Bench
    slurm: Any

    def submit(self, folder: Path, *flags: str, extra: str = "") -> subprocess.Popen[str]:
        command = [
            sys.executable,
            str(ROOT / "run" / "submit.py"),
            "--nodes",
            "2",
            "--ngpus",
            "0",
            "--wait",
            *flags,
            "--",
        ]
        command += [*FLAGS.split(), *extra.split(), "--output_dir", str(folder)]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.slurm.environment, cwd=ROOT, **streams)

    def until(self, folder: Path, text: str) -> str:
        """Wait until rank 0 has said something; returns the job's number."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for log in (folder / "slurm").glob("*_0_log.out"):
                if re.search(text, log.read_text()):
                    return log.name.partition("_")[0]
            time.sleep(0.05)
        raise AssertionError(f"{folder}: no {text!r}")

    def ranks(self, folder: Path) -> list[int]:
        """Process ids of the ranks of a job, in order."""
        found = {}
        for entry in Path("/proc").iterdir():
            variables = kill_test.read(f"{entry}/environ").split(b"\0") if entry.name.isdigit() else []
            words = kill_test.read(f"{entry}/cmdline") if variables else b""
            if b"submitit.core._submit" in words and str(folder).encode() in words and b"srun" not in words:
                rank = [word for word in variables if word.startswith(b"SLURM_PROCID=")]
                found[int(rank[0][13:])] = int(entry.name)
        return [found[rank] for rank in sorted(found)]

    def ask(self, *command: str) -> None:
        subprocess.run(command, env=self.slurm.environment, check=True, capture_output=True)


def slurm_rank_killed(cluster: Cluster) -> str:
    folder = cluster.bench.new()
    waiting = cluster.submit(folder)
    cluster.until(folder, r"epoch 1 \[2/")
    os.kill(cluster.ranks(folder)[1], signal.SIGKILL)
    text = waiting.communicate(timeout=PATIENCE)[0]
    line = next(line for line in text.splitlines() if line.startswith("submit.py: job"))
    assert waiting.returncode == 1 and "rank 1 of 2 on 127.0.0.2 was killed (SIGKILL)" in line, text
    assert "go on with: python run/submit.py" in text and "GLHF" not in text
    return f"'{line.partition(' failed: ')[2].partition(';')[0]}'; checkpoint and command follow"


def slurm_requeue_on_failure(cluster: Cluster) -> str:
    folder = cluster.bench.new()
    waiting = cluster.submit(folder, "--requeue_on_failure", "1")
    cluster.until(folder, r"epoch 1 \[2/")
    os.kill(cluster.ranks(folder)[1], signal.SIGKILL)
    text = waiting.communicate(timeout=PATIENCE)[0]
    assert waiting.returncode == 0, text
    return f"requeued once, resumed, {cluster.bench.same(folder)}"


def slurm_late_signal(cluster: Cluster) -> str:
    folder = cluster.bench.new()
    waiting = cluster.submit(folder)
    job = cluster.until(folder, "done: 3 epochs")
    cluster.ask("scancel", "--signal=USR2", job)
    text = waiting.communicate(timeout=PATIENCE)[0]
    deadline = time.monotonic() + 30
    while cluster.slurm.state(job) in ("RUNNING", "COMPLETING") and time.monotonic() < deadline:
        time.sleep(0.2)
    state = cluster.slurm.state(job)
    assert state == "COMPLETED" and waiting.returncode == 0, (state, text)
    return f"{state}, not requeued, --wait status 0"


def slurm_array(cluster: Cluster) -> str:
    waiting = cluster.submit(cluster.bench.new(), "--sbatch", "array=0-1")
    text = waiting.communicate(timeout=PATIENCE)[0]
    assert waiting.returncode == 2 and text.count("\n") == 1
    return f"status 2, '{text.strip()[18:]}'"


def slurm_cancelled(cluster: Cluster) -> str:
    folder = cluster.bench.new()
    waiting = cluster.submit(folder, extra="--epochs 30")
    job = cluster.until(folder, r"epoch 1 \[2/")
    began = time.monotonic()
    cluster.ask("scancel", job)
    text = waiting.communicate(timeout=PATIENCE)[0]
    assert waiting.returncode == 1 and "after micro-batch" in text and "go on with: " in text, text
    return f"status 1 after {time.monotonic() - began:.0f} s; says where it saved, and the command to go on with"


def slurm_interrupted(cluster: Cluster) -> str:
    said = []
    for command in (("scancel", "--signal=USR2"), ("scontrol", "requeue")):
        folder = cluster.bench.new()
        waiting = cluster.submit(folder)
        job = cluster.until(folder, r"epoch 1 \[2/")
        cluster.ask(*command, job)
        text = waiting.communicate(timeout=PATIENCE)[0]
        assert waiting.returncode == 0 and cluster.slurm.restarts(job) == 1, text
        said.append(cluster.bench.same(folder))
    return "requeued, resumed, " + ", ".join(said)


def slurm_node_down(cluster: Cluster) -> str:
    folder = cluster.bench.new()
    waiting = cluster.submit(folder)
    job = cluster.until(folder, r"epoch 1 \[2/")
    cluster.ask("scontrol", "update", "nodename=127.0.0.2", "state=down", "reason=test")
    time.sleep(3)
    with suppress(subprocess.CalledProcessError):  # it may be back by itself, as the configuration has it
        cluster.ask("scontrol", "update", "nodename=127.0.0.2", "state=resume")
    text = waiting.communicate(timeout=2 * PATIENCE)[0]
    assert waiting.returncode == 0 and cluster.slurm.restarts(job) == 1, text
    return f"NODE_FAIL, requeued, resumed, {cluster.bench.same(folder)}"


def slurm_time_limit(cluster: Cluster) -> str:
    folder, length = cluster.bench.new(), 60
    waiting = cluster.submit(folder, "--timeout", "1", "--signal_delay", "40", extra=f"--epochs {length}")
    job = cluster.until(folder, r"epoch 0 \[1/")
    text = waiting.communicate(timeout=6 * PATIENCE)[0]
    restarts = cluster.slurm.restarts(job)
    assert waiting.returncode == 0 and restarts and epochs(folder) == list(range(length)), text
    return f"saved and requeued {restarts} time(s); log.txt without gaps or doubles, status 0"


def slurm_bad_request(cluster: Cluster) -> str:
    for flag in ("partition=nowhere", "constraint=nowhere", "nodelist=nowhere", "mem=9999G"):
        waiting = cluster.submit(cluster.bench.new(), "--sbatch", flag)
        text = waiting.communicate(timeout=PATIENCE)[0]
        assert waiting.returncode == 2 and text.count("\n") == 1, text
    return "status 2, one line with Slurm's words (partition, constraint, node list, memory)"


@dataclass(frozen=True)
class Fault:
    """A row of the table; `sample` ones are played in continuous integration."""

    name: str
    before: str
    play: Callable[[Any], str]
    sample: bool = False


FAULTS = (
    Fault(
        "SIGKILL of torchrun, then the same command",
        "old ranks train on 60 s beside the new run; log doubled, 0 twice",
        torchrun_killed,
        True,
    ),
    Fault("two starts in one folder", "both write, status 0 twice, log of two runs", two_starts, True),
    Fault("start without --resume in a used folder", "log emptied at once, no word", used_folder, True),
    Fault(
        "--max_restarts=2 without / with --resume auto, rank killed",
        "without: from epoch 0 without a word",
        max_restarts,
    ),
    Fault("SIGKILL of rank 1", "status 1 in 3 s, one line, then torchrun's traceback; identical", rank_killed, True),
    Fault("SIGTERM to torchrun", "saved in mid-epoch; identical", launcher_terminated),
    Fault("SIGSTOP of a rank for 5 s", "waits, goes on, identical", rank_paused),
    Fault("SIGSTOP of a rank for good (timeout 20 s)", "status 1 after 53 s; identical", rank_frozen),
    Fault("2 -> 1 processes in mid-epoch, same global batch", "refused, no way out", fewer_processes, True),
    Fault(
        "2 -> 1 processes in mid-epoch, half the global batch",
        "refused, no way out; at an epoch's end the old lr",
        other_global_batch,
    ),
    Fault("torchrun --nnodes=1:2 grows and shrinks", "refused in mid-epoch", elastic),
    Fault("output_dir deleted", "status 1 at the next write, names a checkpoint that is gone", folder_removed),
    Fault("checkpoint.pth torn", "one warning, falls back, identical", torn_files),
    Fault("hand-altered checkpoints", "traceback, status 1; epoch 99, step 3000: accepted", altered_checkpoint),
    Fault("compressed checkpoint (1 GiB of zeros)", "refused after 27 s and 2.4 GB (2 GiB)", bomb),
    Fault("a lone rank, nobody at MASTER_PORT", "40 C++ frames before its line", lone_rank),
    Fault("a foreign program on the port", "one line; torchrun: its own traceback", port_in_use),
    Fault("disk full", "status 1, one line, files whole, resumed elsewhere: identical", disk_full),
    Fault("a loader process is killed", "traceback, no checkpoint named; identical", worker_killed),
    Fault("both checkpoints torn; code in one; none there", "status 2, one line", no_whole_checkpoint),
    Fault(
        "accumulation against the large batch, pairing at threshold 0", "losses off by 1.8e-2 to 2.1e-1", accumulation
    ),
)
SLURM_FAULTS = (
    Fault("submit.py --wait: SIGKILL of rank 1", "FAILED; blames rank 0, 'GLHF!'", slurm_rank_killed),
    Fault("the same with --requeue_on_failure 1", "not requeued", slurm_requeue_on_failure),
    Fault("USR2 after 'done'", "FAILED 12:0 though done", slurm_late_signal),
    Fault("--sbatch array=0-1", "accepted, cannot work, --wait never returns", slurm_array),
    Fault("scancel under --wait", "srun's noise only", slurm_cancelled),
    Fault("scancel --signal=USR2; scontrol requeue in mid-epoch", "requeued, resumed, identical", slurm_interrupted),
    Fault("a node goes down in mid-epoch", "NODE_FAIL, requeued, resumed, identical", slurm_node_down),
    Fault("time limit of 1 minute", "saved, requeued, identical; a second signal: FAILED", slurm_time_limit),
    Fault("a partition, constraint, node or memory that there is not", "status 2, one line", slurm_bad_request),
)


def play(faults: Sequence[Fault], stage: Any) -> list[tuple[Fault, str, bool]]:
    """Play faults one after the other; returns them with what happened, and whether that is as promised."""
    rows = []
    for fault in faults:
        began = time.monotonic()
        try:
            outcome, good = fault.play(stage), True
        except (AssertionError, subprocess.SubprocessError, OSError, LookupError, StopIteration) as error:
            outcome, good = f"FAIL: {type(error).__name__} {' '.join(str(error).split())[-300:]}", False
        print(f"{'ok  ' if good else 'FAIL'} {fault.name} ({time.monotonic() - began:.0f} s): {outcome}", flush=True)
        rows.append((fault, outcome, good))
    return rows


def play_table(folder: Path, sample: bool, slurm: bool) -> int:
    """Play the table, or its sample; prints it as markdown, returns 1 if anything is not as promised."""
    bench = Bench(folder)
    rows = []
    with ExitStack() as stack:
        stack.callback(bench.close)
        rows += play([fault for fault in FAULTS if fault.sample or not sample], bench)
        if slurm:
            sys.path.insert(0, str(ROOT / "tests"))
            slurm_cluster = importlib.import_module("_slurm").slurm_cluster
            # daemons of Slurm look into it: it must be open to all
            place = Path(tempfile.mkdtemp(prefix="regtome-faults-", dir="/tmp"))
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            jobs = Bench(place)
            jobs.unbroken = bench.unbroken
            rows += play(SLURM_FAULTS, Cluster(jobs, stack.enter_context(slurm_cluster())))
    print("\n| fault | before | now |\n| --- | --- | --- |")
    for fault, outcome, _ in rows:
        print(f"| {fault.name} | {fault.before} | {outcome.replace('|', '/')} |")
    return 0 if all(good for _, _, good in rows) else 1
