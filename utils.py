"""Errors, seeds, stop signals, files, run metadata and logging: what every other module may build on.

This module imports nothing of the program but `models.errors`, and knows no model and no method.
"""

import argparse
import ctypes
import dataclasses
import difflib
import hashlib
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np
import torch
import torch._dynamo
import torch.distributed as c10d
from tensorboardX import SummaryWriter
from tqdm import tqdm

from models.errors import UserError

T = TypeVar("T")

RESUMABLE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the launcher may run the same command again
INTERRUPTED_STATUS = 130  # 128 + SIGINT, what a shell expects after Ctrl-C
STOP_MARKER = "stopped.json"
_PR_SET_PDEATHSIG = 1  # prctl(2)


class RunError(RuntimeError):
    """A run that cannot go on; the message is one line, the exit status 1."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def without_credentials(text: str) -> str:
    """Leave user, password and query out of every URL in a text: the last may be a signature that opens the door."""
    return re.sub(r"(https?://)(?:[^\s/?#@'\"]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", r"\1\2", text)


def nearest(name: str, choices: Iterable[str], kind: str = "name") -> str:
    """Word an unknown name in one line, with the closest of the choices and all of them."""
    options = [str(choice) for choice in choices]
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"unknown {kind} '{name}'; {hint}(choices: {', '.join(options)})"


# Randomness


def mix_seed(*ints: int) -> int:
    """Hash integers into one seed in [0, 2**63), the same on every machine and Python version."""
    text = ",".join(str(int(i)) for i in ints)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_all(*ints: int) -> None:
    """Seed the global streams of python, numpy and torch (CPU and accelerators) from `mix_seed(*ints)`."""
    seed = mix_seed(*ints)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# Ranks


def is_initialized() -> bool:
    """Tell whether this process belongs to a process group."""
    return c10d.is_available() and c10d.is_initialized()


def is_main_process() -> bool:
    """Tell whether this is rank 0, also before `init_distributed` in a process that a launcher has numbered."""
    if is_initialized():
        return c10d.get_rank() == 0
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


# Launchers


def started_by_launcher() -> bool:
    """Tell whether torchrun, or submitit on this machine, is the parent; Slurm ends what it started by itself."""
    return "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("SUBMITIT_EXECUTOR") == "local"


def die_with_launcher(grace: float = 60.0) -> None:
    """Let this process end with the launcher that started it.

    On Linux the kernel sends SIGTERM at that moment, on which a training run saves and leaves; one that cannot, because
    it waits for processes that are gone, is ended `grace` seconds later. Elsewhere `StopSignal` notices at the next
    update.
    """
    if not started_by_launcher():
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        time.sleep(grace)
        print(f"process {os.getpid()}: its launcher is gone; leaving without a save", file=sys.stderr, flush=True)
        os._exit(1)

    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    threading.Thread(target=watch, name="end of the launcher", daemon=True).start()


# Stop signals


class StopSignal:
    """Context in which SIGTERM, SIGUSR1, SIGUSR2 and SIGINT ask for a stop after the running step.

    `requested` is None or the name of the first signal; under torchrun the end of the launcher counts as one. A second
    SIGINT raises KeyboardInterrupt at once. Outside the main thread Python allows no handlers: none is installed, and
    `request` is the only way. The handlers from before return at exit, with one exception: in a process that ends with
    its run (`ends_process`), signals after a finished run are ignored to the very end, where Python would let them kill
    a process that has nothing left to lose but its exit status.
    """

    ends_process = False  # set by programs, in the process that is theirs

    def __init__(self) -> None:
        self.finished = False
        self._requested: str | None = None
        self._interrupts = 0
        self._before: dict[int, Any] = {}
        self._launcher = os.getppid() if started_by_launcher() else None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"):
                if name in signal.Signals.__members__:  # Windows has no SIGUSR1
                    number = signal.Signals[name]
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            ignore = self.finished and self.ends_process
            signal.signal(number, signal.SIG_IGN if ignore else signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    @property
    def requested(self) -> str | None:
        if self._requested is None and self._launcher is not None and os.getppid() != self._launcher:
            self.request("the end of the launcher")
        return self._requested

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        self.request(signal.Signals(number).name)

    def request(self, name: str) -> None:
        """Ask for a stop by hand, as a launcher's callback does; the name of the first request stays."""
        self._requested = self._requested or name

    @property
    def status(self) -> int:
        """The exit status of a stopped run: 130 after Ctrl-C, else 75, also where another rank got the signal."""
        return INTERRUPTED_STATUS if self.requested == "SIGINT" else RESUMABLE_STATUS


def write_stop_marker(output_dir: str | Path | None, reason: str, epoch: int, step: int) -> None:
    """Write stopped.json, which tells a launcher that the run can be resumed and where it stands."""
    if output_dir:
        marker = {"reason": reason, "epoch": epoch, "step": step, "status": RESUMABLE_STATUS}
        write_json(Path(output_dir) / STOP_MARKER, marker)


def clear_stop_marker(output_dir: str | Path | None) -> None:
    """Remove stopped.json of an earlier stop."""
    if output_dir:
        (Path(output_dir) / STOP_MARKER).unlink(missing_ok=True)


# Files


def temporary_path(path: Path, suffix: str = "tmp") -> Path:
    """Return a path beside `path` that no other process uses; the next run in the folder removes what a kill left."""
    return path.with_name(f"{path.name}.{os.getpid()}.{suffix}")


def _open_new(path: Path) -> BinaryIO:
    return open(path, "wb")


def _write_synced(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with _open_new(path) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; file systems that cannot sync a folder are left alone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _write_failure(error: Exception) -> str | None:
    """Say why a write failed; None if the error is about something else.

    torch.save reports a full disk as a RuntimeError of its own, sometimes with the OSError behind it.
    """
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError):
            return cause.strerror or first_line(cause)
    return first_line(error) if re.search(r"Pytorch(Stream|File)Writer|file write failed", str(error)) else None


def atomic_write(
    path: Path, write: Callable[[BinaryIO], object], rename: Callable[[Path, Path], object] | None = None
) -> None:
    """Write a file so that at every instant a reader, or a machine that lost power, finds the old file or the new one.

    The content is written to a temporary file, which is synced before it is renamed (otherwise the new name could
    survive a crash without the content), then the folder is synced, which makes the rename itself durable.

    Args:
        write: called with the open temporary file.
        rename: called with the temporary path and `path` in place of os.replace.

    Raises:
        RunError: the disk is full or fails; the old file is unchanged.
    """
    temporary = temporary_path(path)
    try:
        _write_synced(temporary, write)
        (rename or os.replace)(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        reason = _write_failure(error)
        if reason is None:
            raise
        raise RunError(f"cannot write {path}: {reason}; what was there before is kept") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, obj: Any) -> None:
    """Write an object as JSON so that a reader sees the old file or the new one, never a part."""
    text = json.dumps(to_jsonable(obj), indent=2, allow_nan=False) + "\n"
    atomic_write(Path(path), lambda file: file.write(text.encode()))


def write_table(path: str | Path, record: Any, text: str) -> None:
    """Write a table twice beside each other: its numbers as .json, its markdown as .md."""
    write_json(Path(path).with_suffix(".json"), record)
    Path(path).with_suffix(".md").write_text(text)


def append_json_line(path: str | Path, obj: Any) -> None:
    """Append an object as one line of JSON; a full disk raises RunError."""
    try:
        with open(path, "ab") as file:
            file.write(json.dumps(to_jsonable(obj), allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def truncate_log(path: str | Path, epoch: int) -> None:
    """Drop a log's lines of epochs >= `epoch` and torn lines, so that a resumed log equals an unbroken one."""
    path = Path(path)
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = b"".join(line for line in lines if _logged_epoch(line) < epoch)
    atomic_write(path, lambda file: file.write(kept))


def _logged_epoch(line: bytes) -> float:
    """Return the epoch of a line of the log; infinity for a line that is torn or tells none."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        entry = None
    return entry.get("epoch", math.inf) if isinstance(entry, dict) else math.inf


def to_jsonable(obj: Any) -> Any:
    """Turn args, a dataclass or a nest of them into dicts, lists, str, int, float, bool and None.

    NaN and infinities become None: JSON has no word for them, and readers such as jq refuse a file that holds one.
    What is published in files of a run goes through here, so that URLs lose their passwords.
    """
    if isinstance(obj, str):
        return without_credentials(str(obj))
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    if obj is None or (isinstance(obj, (bool, int, float)) and type(obj).__module__ == "builtins"):
        return obj
    if isinstance(obj, argparse.Namespace):
        return to_jsonable(vars(obj))
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: to_jsonable(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): to_jsonable(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple, set, frozenset)):
        return [to_jsonable(value) for value in (sorted(obj) if isinstance(obj, (set, frozenset)) else obj)]
    if isinstance(obj, (torch.Tensor, np.ndarray, np.generic)):
        return to_jsonable(obj.tolist())
    return without_credentials(str(obj))


# Run metadata


def compile_model(module: torch.nn.Module, **options: Any) -> Any:
    """Compile a module as torch.compile does, with room for a graph per schedule.

    After 8 graphs of one forward the compiler goes back to eager with no more than a warning, and an evaluation of many
    schedules, training with random ones, or a benchmark of many models needs more.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 512)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4096)
    return torch.compile(module, **options)


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the libraries that numbers depend on."""
    result: dict[str, str | None] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("torchvision", "timm", "numpy"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = None
    return result


def _git(*command: str) -> str | None:
    folder = str(Path(__file__).resolve().parent)
    try:
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_revision() -> str | None:
    """Return this project's short commit hash, with '-dirty' for uncommitted changes; None outside its repository."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != Path(__file__).resolve().parent:  # unpacked inside another repository
        return None
    revision = _git("rev-parse", "--short", "HEAD")
    if not revision:
        return None
    return f"{revision}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else revision


# Logging


def setup_output(output_dir: str | Path | None, is_main: bool) -> Path | None:
    """Create the output folder, if one is named, and try to write in it; UserError if that fails."""
    if not output_dir:
        return None
    folder = Path(output_dir).expanduser()
    if not is_main:
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_path(folder / "probe")
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--output_dir {folder} is a file or lies below one; name a folder") from error
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}; name another folder") from error
    return folder


def log(message: str) -> None:
    """Print a line on rank 0, above a progress bar if one is shown."""
    if is_main_process():
        with tqdm.external_write_mode(file=sys.stdout):
            print(without_credentials(message), flush=True)


class Progress(Iterable[T]):
    """Iterate with a bar on a terminal, else with a line every `log_every` steps; quiet if not `is_main`.

    By default there is a line every ten steps, and in short loops five lines in all.

    Ask `due` inside the loop and call `show` only then: reading a value may wait for the GPU. `start` steps of `total`
    were done before (a resumed epoch).
    """

    def __init__(
        self,
        items: Iterable[T],
        total: int,
        title: str,
        log_every: int | None = None,
        is_main: bool = True,
        start: int = 0,
    ) -> None:
        self.items, self.total, self.title, self.is_main = items, total, title, is_main
        self.log_every = log_every or max(1, min(10, total // 5))
        self.start = self.step = start
        self._began = time.monotonic()
        self._bar: tqdm | None = None

    def __iter__(self) -> Iterator[T]:
        self._began = time.monotonic()
        if self.is_main and sys.stderr.isatty():
            self._bar = tqdm(total=self.total, initial=self.start, desc=self.title, leave=False, dynamic_ncols=True)
        try:
            for item in self.items:
                self.step += 1
                yield item
                if self._bar is not None:
                    self._bar.update()
        finally:
            if self._bar is not None:
                self._bar.close()
            self._bar = None

    @property
    def due(self) -> bool:
        """True where `show` has something to do: every `log_every` steps and at the last."""
        return self.is_main and (self.step % self.log_every == 0 or self.step == self.total)

    def show(self, **values: Any) -> None:
        """Show named numbers or strings of this rank."""
        if not self.is_main:
            return
        text = "  ".join(f"{k} {v}" if isinstance(v, str) else f"{k} {float(v):.4g}" for k, v in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        seconds = (time.monotonic() - self._began) / max(1, self.step - self.start)
        left = timedelta(seconds=round(seconds * (self.total - self.step)))
        log(f"{self.title} [{self.step}/{self.total}]  {text}  {seconds:.3g} s/step  {left} left")


def tensorboard(output_dir: str | Path | None, is_main: bool, purge_step: int | None = None) -> SummaryWriter:
    """Return a writer of tensorboard events on rank 0, and elsewhere one that writes nothing.

    A resumed run's `purge_step` hides the steps from there on that the stopped run had written.
    """
    if not output_dir or not is_main:
        return SummaryWriter(logdir="unused", write_to_disk=False)
    return SummaryWriter(logdir=str(output_dir), purge_step=purge_step)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, markdown: bool = True) -> str:
    """Format a table of texts, aligned so that it reads as text too; columns that are empty in every row are left out.

    Args:
        left: number of columns, from the first, that are aligned left; the others hold numbers and are aligned right.
        markdown: draw bars, and a rule under the headers; else plain columns.
    """
    columns = [column for column in zip(headers, *rows, strict=True) if any(column[1:])]
    # a markdown rule that says "right" takes two characters: "-:"
    widths = [max(1 if i < left else 2, *map(len, column)) for i, column in enumerate(columns)]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [
        [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in zip(*columns, strict=True)
    ]
    if not markdown:
        plain_rule = ["-" * width for width in widths]
        return "\n".join("  ".join(line).rstrip() for line in [lines[0], plain_rule, *lines[1:]])
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
