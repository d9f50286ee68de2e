"""Kill a training run again and again, resume it each time, and compare it bit for bit with an unbroken one.

python run/kill_test.py                        # 30 faults, some minutes on two CPU cores
python run/kill_test.py --faults 5 --seed 1 --folder output/kill_test
python run/kill_test.py --all [--slurm]        # the table of faults (run/fault_table.py): old outcome, and today's
python run/kill_test.py --sample               # some of its rows, in under five minutes
python run/kill_test.py --minutes 30           # 100,000 updates, for half an hour with a fault every few seconds

The run is a small model on scikit-learn's digits, in two processes under torchrun, saved after every update (a still
smaller one, saved every 500 updates, in the long run). Weights, their average, optimizer, schedule, random streams and
log.txt (without its two columns of time) must be equal.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(ROOT))

from models import UserError
from options import Parser, exit_status, non_negative_int, positive_float, positive_int
from utils import RunError

MAIN, TINY = "main.py", "run/tiny_training.py"
TIMES = ("images_per_s", "seconds")
PATIENCE = 180  # seconds that a start, or an end after a fault, may take
# everything that draws, in steps as short as they get
FLAGS = "--dataset DIGITS --device cpu --input_size 16 --batch_size 16 --epochs 4 --warmup_epochs 1 --num_registers 2"
FLAGS += " --r 2 --full_weight 1 --full_r_max 3 --consistency_weight 3 --mixup 0.5 --drop_path 0.1 --reprob 0.3"
FLAGS += " --repeated_aug --model_ema_decay 0.9 --log_every 1000 --save_every_steps 1"
# who is hit with what; a killed launcher's ranks must leave by themselves
FAULTS = {
    "a rank is killed": ("rank", signal.SIGKILL),
    "torchrun is killed": ("launcher", signal.SIGKILL),
    "SIGTERM to torchrun": ("launcher", signal.SIGTERM),
    "SIGTERM to a rank": ("rank", signal.SIGTERM),
    "SIGUSR1 to a rank": ("rank", signal.SIGUSR1),
    "SIGUSR2 to a rank": ("rank", signal.SIGUSR2),
}


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """Read log.txt without the columns that depend on the clock."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or a run's newest, without the time it took and the arguments, which name the folder."""
    state = torch.load(path / "checkpoint.pth" if path.is_dir() else path, weights_only=True)
    state.get("epoch_log", {}).pop("seconds", None)
    state.pop("args", None)
    return state


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """List where two nests of tensors and plain values differ in any bit; `name` is the place of a and b in theirs."""
    if isinstance(a, dict) and isinstance(b, dict):
        lines = [f"{name}/{key} only on one side" for key in a.keys() ^ b.keys()]
        return lines + [line for key in a.keys() & b.keys() for line in differences(a[key], b[key], f"{name}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{name}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [f"{name}: tensors differ"]
    return [] if _same_value(a, b) else [f"{name}: {a!r} != {b!r}"]


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return type(a) is type(b) and a == b


def differing_runs(first: Path, second: Path) -> list[str]:
    """List where two finished runs differ: checkpoint, best weights and log."""
    return [
        *differences(checkpoint(first), checkpoint(second), "checkpoint.pth"),
        *differences(checkpoint(first / "best.pth"), checkpoint(second / "best.pth"), "best.pth"),
        *differences(log_lines(first), log_lines(second), "log.txt"),
    ]


@dataclass(frozen=True)
class Launch:
    """A torchrun that was started, with its ranks."""

    folder: Path
    process: subprocess.Popen[bytes]

    def ranks(self) -> list[int]:
        """Process ids of the ranks that run, in order."""
        return sorted(pid for pid in children(self.process.pid) if is_rank(pid))

    def last_save(self) -> int:
        """When the checkpoint was last written: it changes with every save."""
        file = self.folder / "checkpoint.pth"
        return file.stat().st_mtime_ns if file.exists() else 0


def is_rank(pid: int) -> bool:
    """Tell whether a process that trains is alive."""
    stat = read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    command = read(f"/proc/{pid}/cmdline")
    return bool(stat) and stat[0] != b"Z" and any(script.encode() in command for script in (MAIN, TINY))


def read(path: str) -> bytes:
    """Read a file of /proc; empty for a process that has ended."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def children(parent: int) -> list[int]:
    """Process ids of a process's children."""
    stats = {int(entry.name): read(f"{entry}/stat") for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    return [pid for pid, stat in stats.items() if stat and int(stat.rpartition(b")")[2].split()[1]) == parent]


def launch(folder: Path, flags: str = FLAGS, script: str = MAIN) -> Launch:
    """Start or resume the run in a folder; what it says goes to FOLDER.txt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    command += [str(ROOT / script), *flags.split(), "--resume", "auto", "--output_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "REGTOME_DIST_TIMEOUT": "60"}
    with open(f"{folder}.txt", "ab") as output:
        return Launch(folder, subprocess.Popen(command, stdout=output, stderr=output, env=environment))


def end(running: Launch, ranks: Sequence[int]) -> int:
    """Wait for the end of torchrun and of its ranks; returns torchrun's exit status."""
    status = running.process.wait(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while any(is_rank(rank) for rank in ranks):
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks with process ids {ranks} outlive torchrun; see {running.folder}.txt")
        time.sleep(0.01)
    return status


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(pid, number)


def strike(running: Launch, fault: str, draw: random.Random, latest: float = 0.3) -> bool:
    """Wait for a random moment, then play the fault; returns False if the run ended before.

    One time in six the moment lies anywhere in the start, else within `latest` seconds after the first save.
    """
    started, before = time.monotonic(), running.last_save()
    early = draw.uniform(0, 10) if draw.random() < 1 / 6 else math.inf
    while running.last_save() == before and running.process.poll() is None and time.monotonic() - started < early:
        if time.monotonic() - started > PATIENCE:
            raise TimeoutError(f"no checkpoint within {PATIENCE} s; see {running.folder}.txt")
        time.sleep(0.005)
    time.sleep(0 if early < math.inf else draw.uniform(0, latest))
    if running.process.poll() is not None:
        return False
    target, number = FAULTS[fault]
    ranks = running.ranks()
    victim = draw.choice(ranks) if target == "rank" and ranks else running.process.pid
    send(victim, number)
    running.process.poll()
    end(running, ranks)
    return True


def progress(folder: Path) -> str:
    """How far the checkpoint of a run is."""
    if not (folder / "checkpoint.pth").exists():
        return "not begun"
    state = checkpoint(folder)
    return f"epoch {state['epoch']}, update {state['step']}"


def torture(folder: Path, faults: int, draw: random.Random, counts: Counter[str]) -> None:
    """Play up to `faults` faults on one run, each in its turn, until it is done; counts them by name."""
    names = list(FAULTS)
    for _ in range(faults):
        fault = names[counts.total() % len(names)]
        running = launch(folder)
        if not strike(running, fault, draw):
            _check_end(running, 0)
            return
        counts[fault] += 1
        marker = "stop marker" if (folder / "stopped.json").exists() else "no marker"
        print(f"{counts.total():3d}  {fault:20s}  {progress(folder)}, {marker}", flush=True)
    _check_end(launch(folder), PATIENCE * 5)


def _check_end(running: Launch, patience: float) -> None:
    if running.process.wait(None if patience == math.inf else patience):
        raise RunError(f"the run failed by itself; see {running.folder}.txt")


def build_parser() -> Parser:
    parser = Parser(prog="kill_test.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--faults", type=non_negative_int, default=30, help="how many to play (default: 30)")
    what.add_argument("--all", action="store_true", help="play every row of the table of faults")
    what.add_argument("--sample", action="store_true", help="play some rows of it")
    what.add_argument("--minutes", type=positive_float, help="play faults on one long run for so long")
    parser.add_argument("--updates", type=positive_int, help="of that long run (default: 100000)")
    parser.add_argument(
        "--slurm", action="store_true", help="with --all: also the rows on a Slurm, made by tests/_slurm.py"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--folder", type=Path, default=Path("output/kill_test"), help="emptied first")
    return parser


def run(argv: Sequence[str]) -> int:
    """Play what is asked for; returns 0 if everything came out as it must, else 1."""
    args = build_parser().parse(argv)
    if args.slurm and not args.all:
        raise UserError("--slurm adds rows to those of --all; give both")
    if args.updates and not args.minutes:
        raise UserError("--updates is the length of the long run; give --minutes too")
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    if args.all or args.sample:
        from run.fault_table import play_table

        return play_table(args.folder, args.sample, args.slurm)
    draw = random.Random(args.seed)
    if args.minutes:
        return long_run(args.folder, args.minutes, args.updates or 100_000, draw)
    return compare(args.folder, args.faults, draw)


def compare(base: Path, faults: int, draw: random.Random) -> int:
    """Train once unbroken, then under faults; returns 0 if every tortured run equals the unbroken one, else 1."""
    began, counts = time.monotonic(), Counter[str]()
    unbroken = base / "unbroken"
    _check_end(launch(unbroken), PATIENCE * 5)
    print(f"unbroken run: {time.monotonic() - began:.0f} s", flush=True)
    lines: list[str] = []
    runs = 0
    while counts.total() < faults:
        folder = base / f"tortured{runs}"
        torture(folder, faults - counts.total(), draw, counts)
        lines += [f"{folder.name}: {line}" for line in differing_runs(folder, unbroken)]
        runs += 1
    return _verdict(lines, counts, f"in {runs} run(s), {time.monotonic() - began:.0f} s")


def _verdict(lines: Sequence[str], counts: Counter[str], where: str) -> int:
    for fault, number in counts.items():
        print(f"{number:3d} x {fault}")
    print(f"{counts.total()} faults {where}")
    verdict = "FAIL: resumed runs differ from the unbroken one" if lines else "PASS: every bit is equal"
    print("\n".join([*lines[:20], verdict]))
    return 1 if lines else 0


# the smallest batches, and a rate that does not know how long the run will be
LONG = "--dataset DIGITS --device cpu --input_size 8 --batch_size 2 --num_registers 1 --r 1 --mixup 0.5 --sched step"
LONG += " --decay_epochs 1000000 --warmup_epochs 1 --log_every 1000 --save_every_steps 500"
LONG_UPDATES_PER_EPOCH = 359


def long_run(base: Path, minutes: float, updates: int, draw: random.Random) -> int:
    """Play faults on one long run for so many minutes, let it finish, and compare it with an unbroken one.

    Memory and open files of rank 0 are measured in the unbroken run, which is the longest that one process lives.
    """
    began, counts, names = time.monotonic(), Counter[str](), list(FAULTS)
    folder, unbroken = base / "tortured", base / "unbroken"
    epochs = math.ceil(updates / LONG_UPDATES_PER_EPOCH)
    flags = f"{LONG} --epochs {epochs}"
    while time.monotonic() - began < 60 * minutes:
        fault = names[counts.total() % len(names)]
        if not strike(launch(folder, flags, TINY), fault, draw, latest=12.0):
            raise RunError(f"the run ended by itself; see {folder}.txt")
        counts[fault] += 1
        if counts.total() % 10 == 0:
            print(f"{time.monotonic() - began:5.0f} s: {counts.total()} faults, {progress(folder)}", flush=True)
    print(f"{time.monotonic() - began:5.0f} s: the last of {counts.total()} faults, {progress(folder)}", flush=True)
    _check_end(launch(folder, flags, TINY), math.inf)
    running, measured = launch(unbroken, flags, TINY), []
    while running.process.poll() is None:
        measured += [_resources(pid) for pid in running.ranks()[:1] if (unbroken / "checkpoint.pth").exists()]
        time.sleep(2)
    _check_end(running, 0)
    measured = measured[:-2] or measured  # at the very end the process takes itself apart
    done = epochs * checkpoint(unbroken)["sampler"]["micro_batches"]
    print(f"{epochs} epochs, {done} updates; rank 0 of the unbroken run holds:")
    for part, name in enumerate(("at the start", "at a quarter", "at half", "at three quarters", "at the end")):
        memory, files = measured[part * (len(measured) - 1) // 4]
        print(f"  {name}: {memory / 2**20:.0f} MiB, {files} files")
    lines = differing_runs(folder, unbroken)
    found = [line["epoch"] for line in log_lines(folder)]
    lines += [] if found == list(range(epochs)) else [f"log.txt has the epochs {found}"]
    return _verdict(lines, counts, f"in {time.monotonic() - began:.0f} s")


def _resources(pid: int) -> tuple[int, int]:
    """Bytes of memory and number of open files of a process."""
    pages = read(f"/proc/{pid}/statm").split()
    with contextlib.suppress(OSError):
        return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else 0, len(os.listdir(f"/proc/{pid}/fd"))
    return 0, 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0 if everything came out as it must, else 1."""
    return exit_status("kill_test.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
