"""The folder of a run: one run at a time writes there, and none takes the place of another unasked.

Rank 0 of a training run holds FOLDER/run.lock from its start to its end. The file is made by an exclusive create, which
is atomic on NFS too, says who holds it, and gets a new time of modification every `HEARTBEAT` seconds. Times are only
ever compared with that of another file on the same file system, so that clocks of other machines do not matter. A
holder is dead if it was a process of this machine that is gone, or if its heartbeat is older than `STALE` seconds, or
if it is an earlier attempt of the same job, which the launcher ended before it started this one.
"""

import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from checkpoint import previous_path
from distributed import Distributed, broadcast_object
from models.errors import UserError
from utils import (
    RunError,
    append_json_line,
    atomic_write,
    clear_stop_marker,
    first_line,
    log,
    setup_output,
    temporary_path,
    truncate_log,
    write_json,
)

LOCK = "run.lock"
LAUNCH = "launch.json"  # of a run that was started with --overwrite: the launch whose results the folder holds
HEARTBEAT = 15.0
STALE = 120.0  # well above the minute for which NFS clients may show old times
RESULTS = ("checkpoint.pth", "checkpoint_prev.pth", "best.pth", "log.txt")


# Who runs


@dataclasses.dataclass(frozen=True)
class Launch:
    """The launcher's names of a run and of the attempt at it; "" outside such a launcher.

    submitit on this machine counts as torchrun.
    """

    slurm_job: str = ""
    slurm_attempt: str = ""
    torchrun: str = ""
    torchrun_attempt: str = ""

    @classmethod
    def from_environment(cls) -> "Launch":
        torchrun = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID", "")
        return cls(
            os.environ.get("SLURM_JOB_ID", ""),
            os.environ.get("SLURM_RESTART_COUNT", "0"),
            "" if torchrun == "none" else torchrun,  # what several nodes get that were given no --rdzv_id
            os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    def related(self, other: "Launch") -> bool:
        """Tell whether both are of one job."""
        same_job = bool(self.slurm_job) and self.slurm_job == other.slurm_job
        return same_job or (bool(self.torchrun) and self.torchrun == other.torchrun)

    def restarts(self, other: "Launch") -> bool:
        """Tell whether this is another attempt at the job that `other` is of."""
        attempts = (self.slurm_attempt, self.torchrun_attempt)
        return self.related(other) and attempts != (other.slurm_attempt, other.torchrun_attempt)

    def repeats(self, other: "Launch") -> bool:
        """Tell whether what `other` left is this launch's own: torchrun starts its ranks anew when nodes come or go."""
        same_torchrun = bool(self.torchrun) and self.torchrun == other.torchrun
        return same_torchrun or self.restarts(other)


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    token: str
    host: str
    machine: str  # the running kernel and the namespace in which the process id counts
    pid: int
    process_start: str
    since: str
    launch: Launch

    @classmethod
    def this_process(cls) -> "Holder":
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        start = _process_start(os.getpid()) or ""
        return cls(
            uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), start, since, Launch.from_environment()
        )

    @classmethod
    def from_json(cls, text: bytes) -> "Holder | None":
        """Read a lock's content; None for one that is still being written, or foreign."""
        try:
            content = json.loads(text)
            return cls(**{**content, "launch": Launch(**content["launch"])})
        except (ValueError, TypeError, KeyError):
            return None

    @property
    def here(self) -> bool:
        return self.machine == _machine()

    @property
    def runs_here(self) -> bool:
        """True for a process of this machine that is alive; process ids are used again, so its start counts too."""
        return self.here and _process_start(self.pid) == self.process_start

    def __str__(self) -> str:
        job = f", Slurm job {self.launch.slurm_job}" if self.launch.slurm_job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def _machine() -> str:
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _process_start(pid: int) -> str | None:
    """Return when a process started, in the system's ticks; None if it is gone, "" where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        stat = ""
    if stat:
        state, *fields = stat.rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


# The lock


class RunLock:
    """The exclusive right of one process to write to a folder.

    Raises:
        UserError: a live run holds it. One of the same job is waited for: its end was asked for before this start.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK
        self.holder = Holder.this_process()
        self.lost = ""
        self._ended = threading.Event()
        self._acquire()
        self._heart = threading.Thread(target=self._beat_on, name="heartbeat of run.lock", daemon=True)
        self._heart.start()

    def _acquire(self) -> None:
        deadline, told = time.monotonic() + STALE + 2 * HEARTBEAT, False
        while not self._create():
            found, beat = self._read()
            if beat is None:  # it was released just now
                continue
            if self._is_dead(found, self._now() - beat):
                if self._take_over(found):
                    log(f"note: took over {self.path}; its run is gone: {found or 'unknown'}")
                    return
            elif (found and not self.holder.launch.related(found.launch)) or time.monotonic() > deadline:
                raise UserError(
                    f"{self.folder} is in use by another run ({found or 'unknown'}); wait for its end, stop it, or "
                    "name another --output_dir"
                )
            elif found and not told:
                log(f"waiting for the end of this job's earlier processes, which hold {self.path}: {found}")
                told = True
            time.sleep(0.5)

    def _is_dead(self, found: Holder | None, age: float) -> bool:
        if found is None:
            return age > STALE
        if found.here:
            return not found.runs_here
        return age > STALE or self.holder.launch.restarts(found.launch)

    def _content(self) -> bytes:
        return json.dumps(dataclasses.asdict(self.holder)).encode()

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"cannot lock {self.folder}: {error.strerror}; name another --output_dir") from error
        with open(handle, "wb") as file:
            file.write(self._content())
        return True

    def _read(self) -> tuple[Holder | None, float | None]:
        """Return the holder, and the time of its last heartbeat; None for no lock."""
        try:
            with open(self.path, "rb") as file:
                return Holder.from_json(file.read()), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None, None

    def _now(self) -> float:
        """The time by the clock of the file system."""
        probe = temporary_path(self.folder / "clock")
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            probe.unlink(missing_ok=True)

    def _take_over(self, dead: Holder | None) -> bool:
        """Replace a dead holder; of several processes that try, one succeeds."""
        guard = self.path.with_name(f"{LOCK}.taken")
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            with suppress(OSError):
                if self._now() - guard.stat().st_mtime > STALE:  # its maker died in the few lines below
                    guard.unlink()
            return False
        try:
            found, beat = self._read()
            if beat is None or found != dead:
                return False
            atomic_write(self.path, lambda file: file.write(self._content()))
            return True
        finally:
            guard.unlink(missing_ok=True)

    def _beat_on(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with suppress(OSError, RunError, UserError):  # a file system that is away for a moment
                self._beat()

    def _beat(self) -> None:
        found, beat = self._read()
        if found == self.holder:
            os.utime(self.path)
        elif beat is not None:
            self.lost = f"{self.folder} was taken over by another run ({found or 'unknown'})"
        elif not self.folder.is_dir():
            self.lost = f"{self.folder} was removed while the run wrote to it"
        else:
            self._create()  # only the lock was removed, by hand

    def check(self, now: bool = False) -> None:
        """Raise RunError if this process has lost its lock.

        Args:
            now: look into the file, and do not trust the last heartbeat.
        """
        if now:
            with suppress(OSError, UserError):
                self._beat()
        if self.lost:
            raise RunError(f"{self.lost}; this one ends without saving")

    def release(self) -> None:
        self._ended.set()
        self._heart.join()
        with suppress(OSError):
            if self._read()[0] == self.holder:
                self.path.unlink(missing_ok=True)


# The folder


def results_in(folder: Path) -> list[str]:
    """Name the files of an earlier run's results in a folder."""
    return [name for name in RESULTS if (folder / name).is_file()]


def check_unused(folder: Path, resume: str | None, overwrite: bool) -> None:
    """Refuse a start that neither goes on with the run in the folder nor is told to overwrite it.

    Raises:
        UserError: it names the ways out.
    """
    found = results_in(folder)
    if found and not overwrite and not _continues(resume, folder):
        raise UserError(
            f"{folder} holds {found[0]} of an earlier run; go on with it by --resume auto, name another --output_dir, "
            "or replace it by --overwrite"
        )


def _continues(resume: str | None, folder: Path) -> bool:
    """True if --resume names a checkpoint in the run's own folder."""
    return bool(resume) and (resume == "auto" or Path(str(resume)).expanduser().resolve().parent == folder.resolve())


@dataclasses.dataclass
class RunFolder:
    """What rank 0 may do in the folder of its run; all ranks hold an equal one, without the lock.

    Attributes:
        path: None without --output_dir.
        resume: --resume as it is to be followed.
        pending: files of an earlier run are there, which stay as they are until this run has saved.
        overwrites: that earlier run is another one, which goes then.
    """

    path: Path | None
    resume: str | None
    pending: bool = False
    overwrites: bool = False
    lock: RunLock | None = None

    def begin(self, args: Any, epoch: int) -> None:
        """Write what a run's start writes; `epoch` is the first that it trains."""
        if self.lock is None or self.path is None:
            return
        clear_stop_marker(self.path)
        if not self.pending:
            write_json(self.path / "args.json", args)
            truncate_log(self.path / "log.txt", epoch)

    def saved(self, args: Any, epoch: int) -> None:
        """Give up what an earlier run left, now that this one has saved in `epoch`, the first that it trains."""
        if not self.pending:
            return
        self.pending = False
        if self.lock is None or self.path is None:
            return
        write_json(self.path / "args.json", args)
        if self.overwrites:
            previous_path(self.path / "checkpoint.pth").unlink(missing_ok=True)
            (self.path / "best.pth").unlink(missing_ok=True)
            write_json(self.path / LAUNCH, self.lock.holder.launch)
        truncate_log(self.path / "log.txt", epoch)

    def append_log(self, line: dict[str, Any]) -> None:
        """Append a line to log.txt."""
        if self.lock is not None and self.path is not None:
            append_json_line(self.path / "log.txt", line)

    def check(self, now: bool = False) -> None:
        """Raise RunError if another run has taken the folder, or if it is gone."""
        if self.lock is not None:
            self.lock.check(now)


@contextmanager
def claimed(args: Namespace, dist: Distributed) -> Iterator[RunFolder]:
    """Hold the folder of a run for it, or say why that cannot be; all ranks must call it.

    Raises:
        UserError: another run is at work there, or an earlier one's results are and the options do not say what to do.
    """
    if not args.output_dir:
        yield RunFolder(None, args.resume)
        return
    path = Path(args.output_dir).expanduser()
    lock: RunLock | None = None
    message: str | None = None
    claim = RunFolder(path, args.resume)
    try:
        if dist.is_main:
            try:
                setup_output(path, True)
                lock = RunLock(path)
                claim = _claim(path, args)
            except UserError as error:
                message = str(error)
        claim, message = broadcast_object((claim, message))
        if message is not None:
            raise UserError(message)
        yield dataclasses.replace(claim, lock=lock)
    finally:
        if lock is not None:
            lock.release()


def _claim(path: Path, args: Namespace) -> RunFolder:
    """Decide how a run starts in a folder that it holds."""
    for stale in path.glob("*.pth.*.tmp"):  # of a save that was killed
        stale.unlink(missing_ok=True)
    check_unused(path, args.resume, args.overwrite)
    found = results_in(path)
    if not found:
        return RunFolder(path, args.resume)
    if args.overwrite:
        if _own_results(path):
            log(f"--overwrite: what is in {path} was saved by an earlier attempt of this launch, which goes on")
            return RunFolder(path, "auto")
        log(f"--overwrite: replaces the run in {path} ({', '.join(found)}) at the first save")
        resume = None if args.resume == "auto" else args.resume
        return RunFolder(path, resume, pending=True, overwrites=True)
    # without a checkpoint: the run died between its first line of log.txt and its first save
    died_early = args.resume == "auto" and not any(name in found for name in RESULTS[:2])
    newest = args.resume == "auto" or Path(args.resume).name == RESULTS[0]
    return RunFolder(path, args.resume, pending=died_early or not newest, overwrites=died_early)


def _own_results(path: Path) -> bool:
    try:
        before = Launch(**json.loads((path / LAUNCH).read_text()))
    except (OSError, ValueError, TypeError) as error:
        if not isinstance(error, FileNotFoundError):
            log(f"warning: {path / LAUNCH}: {first_line(error)}")
        return False
    return Launch.from_environment().repeats(before)
