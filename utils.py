"""Distributed helpers, stop signals, checkpoints, run metadata and logging; knows no model and no method."""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar
from urllib.parse import urlparse

import numpy as np
import torch
import torch._dynamo
import torch.distributed as c10d
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboardX import SummaryWriter
from tqdm import tqdm

from models.errors import UserError

T = TypeVar("T")

RESUMABLE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the launcher may run the same command again
INTERRUPTED_STATUS = 130  # 128 + SIGINT, what a shell expects after Ctrl-C
STOP_MARKER = "stopped.json"


class RunError(RuntimeError):
    """A run that must stop while running; the message is one line, the exit status 1."""


class DamagedCheckpoint(UserError):
    """A file that is torn, altered or no checkpoint at all, so that the one before it may serve instead."""


def _first_line(error: BaseException) -> str:
    """First line of an error's text, or its type's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(name: str, choices: Iterable[str], kind: str = "name") -> str:
    """One line for an unknown name, with the closest of the choices and all of them."""
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


def rng_state() -> dict[str, Any]:
    """State of the global streams in tensors and plain values; of CUDA the current device, if it is in use."""
    version, words, gauss = random.getstate()
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)  # type: ignore[assignment]
    inner = numpy_state["state"]
    cached = [int(numpy_state["has_gauss"]), float(numpy_state["gauss"])]
    return {
        "python": [version, list(words), gauss],
        "numpy": [torch.from_numpy(inner["key"].astype(np.int64)), int(inner["pos"]), *cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned; a CUDA state is skipped where there is no CUDA."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key, pos, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", key.cpu().numpy().astype(np.uint32), pos, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


# Distributed


@dataclasses.dataclass(frozen=True)
class Distributed:
    """This process's place among the processes of the run."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.world > 1


@dataclasses.dataclass(frozen=True)
class _Place:
    """Rank, processes and meeting point as the launcher's environment tells them."""

    rank: int = 0
    world: int = 1
    local_rank: int | None = None
    address: str = ""
    port: int = 0
    bound_gpu: bool = False  # the launcher may show each process its own GPU only


def _env_int(name: str, default: int | None = None) -> int:
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.strip().isdecimal():
        shown = "is not set" if value is None else f"is '{value}', not a whole number"
        raise UserError(f"environment variable {name} {shown}; start the run with torchrun or srun")
    return int(value)


def _torchrun_place() -> _Place:
    rank, world = _env_int("RANK"), _env_int("WORLD_SIZE")
    if world < 1 or rank >= world:
        raise UserError(f"RANK={rank} and WORLD_SIZE={world} contradict: RANK counts from 0 to WORLD_SIZE - 1")
    if world == 1:
        return _Place()
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(f"WORLD_SIZE={world} but MASTER_ADDR is not set; start the run with torchrun")
    local = _env_int("LOCAL_RANK") if "LOCAL_RANK" in os.environ else None
    return _Place(rank, world, local, os.environ["MASTER_ADDR"], _env_int("MASTER_PORT"))


def _slurm_address() -> str:
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    if os.environ.get("MASTER_ADDR"):
        return os.environ["MASTER_ADDR"]
    if nodes and "[" not in nodes:
        return nodes.split(",")[0]
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        names = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        names = []
    if not names:
        raise UserError("this Slurm step has several tasks but its first host is unknown; set MASTER_ADDR")
    return names[0]


def _in_slurm_step() -> bool:
    """True in a task of srun; an sbatch script's own shell has SLURM_PROCID=0 and SLURM_NTASKS too, but no step."""
    if "SLURM_PROCID" not in os.environ or _env_int("SLURM_NTASKS", 1) < 2:
        return False
    in_step = "SLURM_STEP_ID" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ
    return in_step or "SLURM_JOB_ID" not in os.environ


def _slurm_place() -> _Place:
    rank, world = _env_int("SLURM_PROCID"), _env_int("SLURM_NTASKS")
    if rank >= world:
        raise UserError(f"SLURM_PROCID={rank} and SLURM_NTASKS={world} contradict; start the run with srun")
    port = _env_int("MASTER_PORT", 20000 + _env_int("SLURM_JOB_ID", 0) % 20000)
    return _Place(rank, world, _env_int("SLURM_LOCALID"), _slurm_address(), port, bound_gpu=True)


def _find_place() -> _Place:
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return _torchrun_place()
    return _slurm_place() if _in_slurm_step() else _Place()


def _cuda_device(asked: torch.device, place: _Place) -> torch.device:
    if not torch.cuda.is_available():
        raise UserError(f"--device {asked} but torch finds no CUDA GPU; use --device cpu or check the driver")
    count = torch.cuda.device_count()
    if place.world > 1 and asked.index is not None:
        raise UserError(f"--device {asked} names one GPU but there are {place.world} processes; use --device cuda")
    index = asked.index or 0
    if place.world > 1:
        local = place.rank % count if place.local_rank is None else place.local_rank
        index = 0 if place.bound_gpu and count == 1 else local
    if index >= count:
        raise UserError(f"GPU {index} is wanted but this machine shows {count}; start one process per GPU")
    return torch.device("cuda", index)


def _pick_device(name: str | None, place: _Place) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (":" in name and not index.isdecimal()):
        raise UserError(nearest(name, ("cpu", "cuda", "cuda:N", "mps"), "--device"))
    if kind == "cuda":
        return _cuda_device(torch.device(name), place)
    if kind == "mps" and (place.world > 1 or not torch.backends.mps.is_available()):
        why = "cannot be shared by several processes" if place.world > 1 else "is not available here"
        raise UserError(f"--device mps {why}; use --device cpu")
    return torch.device(kind)


def _timeout() -> timedelta:
    text = os.environ.get("REGTOME_DIST_TIMEOUT", "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e8:
        raise UserError(f"environment variable REGTOME_DIST_TIMEOUT is '{text}', not a number of seconds above 0")
    return timedelta(seconds=seconds)


def init_distributed(device: str | None = None) -> Distributed:
    """Join the run's other processes, as torchrun's or srun's environment tells, and pick this process's device.

    `device` None means a GPU if there is one. NCCL on GPUs, gloo on CPUs; every wait ends after REGTOME_DIST_TIMEOUT
    seconds (600). Raises UserError for a contradictory environment or device, RunError if the others do not come.
    """
    place, timeout = _find_place(), _timeout()
    chosen = _pick_device(device, place)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if place.world == 1:
        return Distributed(chosen)
    meeting = f"tcp://{f'[{place.address}]' if ':' in place.address else place.address}:{place.port}"
    with _peers(f"the start of process {place.rank} of {place.world} at {meeting}"):
        c10d.init_process_group(
            backend="nccl" if chosen.type == "cuda" else "gloo",
            init_method=meeting,
            rank=place.rank,
            world_size=place.world,
            timeout=timeout,
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return Distributed(chosen, place.rank, place.world, place.local_rank or 0)


def _joined() -> bool:
    return c10d.is_available() and c10d.is_initialized()


def close_distributed() -> None:
    """Leave the process group, if there is one."""
    if _joined():
        c10d.destroy_process_group()


def is_main_process() -> bool:
    """True on rank 0, also before `init_distributed` in a process that a launcher has numbered."""
    if _joined():
        return c10d.get_rank() == 0
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


@contextmanager
def _peers(what: str) -> Iterator[None]:
    """Tell a lost or late process in one line."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(f"lost contact with the other processes in {what}: {_first_line(error)}") from error


def _wire_device() -> torch.device:
    """Device on which the process group's tensors must lie."""
    return torch.device("cuda", torch.cuda.current_device()) if c10d.get_backend() == "nccl" else torch.device("cpu")


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of every rank's tensor, as a new tensor on the same device and without gradient."""
    if not _joined():
        return tensor.detach().clone()
    total = tensor.detach().to(_wire_device(), copy=True)
    with _peers("a sum"):
        c10d.all_reduce(total)
    return total.to(tensor.device)


def any_rank(flag: bool, dist: Distributed) -> bool:
    """True on every rank if the flag is set on any; all ranks must call it."""
    if not dist.distributed:
        return bool(flag)
    return bool(all_reduce_sum(torch.tensor([int(flag)])).item())


def gather_names(names: Sequence[str]) -> list[str]:
    """Every rank's names in rank order, on every rank."""
    if not _joined():
        return list(names)
    parts: list[Any] = [None] * c10d.get_world_size()
    with _peers("a gathering of names"):
        c10d.all_gather_object(parts, list(names))
    return [name for part in parts for name in part]


def broadcast_object(obj: T) -> T:
    """Rank 0's picklable object, on every rank."""
    if not _joined():
        return obj
    box = [obj]
    with _peers("a broadcast"):
        c10d.broadcast_object_list(box, src=0, device=_wire_device())
    return box[0]


def barrier() -> None:
    """Wait until every rank is here."""
    if _joined():
        all_reduce_sum(torch.zeros(1))


# Stop signals


class StopSignal:
    """Context in which SIGTERM, SIGUSR1, SIGUSR2 and SIGINT ask for a stop after the running step.

    `requested` is None or the name of the first signal. A second SIGINT raises KeyboardInterrupt at once. Outside the
    main thread Python allows no handlers: none is installed, and `request` is the only way. The handlers from before
    return at exit.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._interrupts = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"):
                if name in signal.Signals.__members__:  # Windows has no SIGUSR1
                    number = signal.Signals[name]
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        self.request(signal.Signals(number).name)

    def request(self, name: str) -> None:
        """Ask for a stop by hand, as a launcher's callback does; the first request stays."""
        self.requested = self.requested or name

    @property
    def status(self) -> int:
        """Exit status of a stopped run: 130 after Ctrl-C, else 75, also where another rank got the signal."""
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


def _temporary(path: Path, end: str = "tmp") -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.{end}")


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
    """What went wrong with a write; None if the error is about something else."""
    if isinstance(error, OSError):
        return error.strerror or _first_line(error)
    causes = (error.__cause__, error.__context__)
    for cause in causes:
        if isinstance(cause, OSError):
            return cause.strerror or _first_line(cause)
    return _first_line(error) if re.search(r"Pytorch(Stream|File)Writer|file write failed", str(error)) else None


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is removed at the end, and a failed write becomes a RunError."""
    temporary = _temporary(path)
    try:
        yield temporary
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
    path = Path(path)
    text = json.dumps(to_plain(obj), indent=2) + "\n"
    with _replacing(path) as temporary:
        _write_synced(temporary, lambda file: file.write(text.encode()))
        os.replace(temporary, path)


def append_json_line(path: str | Path, obj: Any) -> None:
    """Append an object as one line of JSON; a full disk raises RunError."""
    try:
        with open(path, "ab") as file:
            file.write(json.dumps(to_plain(obj)).encode() + b"\n")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def truncate_log(path: str | Path, epoch: int) -> None:
    """Drop a log's lines of epochs >= `epoch` and torn lines, so that a resumed log equals an unbroken one."""
    path = Path(path)
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = b"".join(line for line in lines if _logged_epoch(line) < epoch)
    with _replacing(path) as temporary:
        _write_synced(temporary, lambda file: file.write(kept))
        os.replace(temporary, path)


def _logged_epoch(line: bytes) -> float:
    """Epoch of a line of the log; infinite for a line that is torn or tells none."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        entry = None
    return entry.get("epoch", math.inf) if isinstance(entry, dict) else math.inf


def to_plain(obj: Any) -> Any:
    """Turn args, a dataclass or a nest of them into dicts, lists, str, int, float, bool and None."""
    if obj is None or (isinstance(obj, (bool, int, float, str)) and type(obj).__module__ == "builtins"):
        return obj
    if isinstance(obj, argparse.Namespace):
        return to_plain(vars(obj))
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: to_plain(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): to_plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple, set, frozenset)):
        return [to_plain(value) for value in (sorted(obj) if isinstance(obj, (set, frozenset)) else obj)]
    if isinstance(obj, (torch.Tensor, np.ndarray, np.generic)):
        return obj.tolist()
    return str(obj)


# Checkpoints

# DeiT and MCTF save their argparse Namespace; under submitit DeiT's output_dir is a path, read here as a pure one,
# which has no way to the disk. Python 3.13 pickles paths as pathlib._local.
_ALLOWED: list[Any] = [
    argparse.Namespace,
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
]
_RESUME_KEYS = ("model", "optimizer", "lr_scheduler", "epoch")
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before version 1.6


def previous_path(path: str | Path) -> Path:
    """Where the checkpoint before `path` is kept: checkpoint.pth -> checkpoint_prev.pth."""
    path = Path(path)
    return path.with_name(f"{path.stem}_prev{path.suffix}")


def save_checkpoint(path: str | Path, state: Mapping[str, Any], keep_previous: bool = True) -> None:
    """Write a checkpoint so that at every instant a whole one is on the disk; only rank 0 calls this.

    Keys of a run's checkpoint: model, model_ema, optimizer, lr_scheduler, scaler, epoch, step, rng, sampler, merge,
    args, best; tensors and plain values only. The one before is kept at `previous_path(path)`. Raises RunError when
    the disk is full or fails; the files from before are then unchanged.
    """
    path = Path(path)
    with _replacing(path) as temporary:
        _write_synced(temporary, lambda file: torch.save(dict(state), file))
        if keep_previous and path.exists():
            _rotate(temporary, path)
        else:
            os.replace(temporary, path)


def _rotate(new: Path, path: Path) -> None:
    """Rename `new` over `path` and the old `path` over its previous file.

    In this order the previous file is given up only when the new one is in place, even if `path` itself is torn.
    """
    old = _temporary(path, "old.tmp")
    old.unlink(missing_ok=True)
    try:
        try:
            os.link(path, old)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, old)
        os.replace(new, path)
        os.replace(old, previous_path(path))
    finally:
        old.unlink(missing_ok=True)  # rename(2) leaves both names if they are the same file already


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a .pth (also of DeiT, MCTF and torch < 1.6) or .safetensors file or URL; runs no code from it.

    A bare state dict, as safetensors holds, comes back as {"model": state}. Raises UserError in one line: missing,
    unreadable, or objects other than tensors and plain values (named); DamagedCheckpoint: empty, torn, altered
    (each part's checksum is compared) or not a checkpoint.
    """
    file = _download(str(path)) if _is_url(path) else Path(path).expanduser()
    start = _read_start(file)
    if file.suffix == ".safetensors":
        return {"model": _load_safetensors(file, map_location)}
    if start.startswith(b"PK") or zipfile.is_zipfile(file):
        _check_zip(file)
    state = _unpickle(file, start, map_location)
    if not isinstance(state, dict) or not state or not all(isinstance(key, str) for key in state):
        raise DamagedCheckpoint(f"{file} is not a checkpoint: it holds a {type(state).__name__}, not named tensors")
    bare = all(isinstance(value, torch.Tensor) for value in state.values())
    return {"model": state} if bare else state


def _is_url(path: str | Path) -> bool:
    return str(path).startswith(("http://", "https://"))


def _download(url: str) -> Path:
    """Path of a URL's file in torch's hub cache, downloaded if it is not there.

    A name with a hash, as DeiT's, is kept, so that a cache filled elsewhere serves; others get the URL's hash.
    """
    name = os.path.basename(urlparse(url).path) or "checkpoint.pth"
    if not re.search(r"-[0-9a-f]{8,}\.", name):
        name = f"{hashlib.blake2b(url.encode(), digest_size=4).hexdigest()}-{name}"
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), progress=sys.stderr.isatty() and is_main_process())
    except (OSError, ValueError, RuntimeError) as error:  # urllib's errors are OSErrors
        hint = f"download it elsewhere and put it at {target}, or give a local file"
        raise UserError(f"cannot download {url}: {_first_line(error)}; {hint}") from error
    return target


def _read_start(file: Path) -> bytes:
    """First bytes of a file, after the checks that need no format."""
    try:
        if file.is_dir():
            raise UserError(f"{file} is a folder, not a checkpoint; name the .pth file in it")
        with open(file, "rb") as handle:
            start = handle.read(64)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {file} does not exist; check the path") from error
    except OSError as error:
        raise UserError(f"cannot read checkpoint {file}: {error.strerror}") from error
    if not start:
        raise DamagedCheckpoint(f"checkpoint {file} is empty (0 bytes); take another one")
    return start


def _damaged(file: Path, why: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"checkpoint {file} is torn or damaged ({why}); delete it and take another one")


def _check_zip(file: Path) -> None:
    """Compare the checksum of every part, which torch.load does not."""
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
            # torch reads nothing for an entry that is marked as a folder and leaves its tensor uninitialised
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 0x10]
    except Exception as error:  # zipfile raises nearly any type on altered bytes
        raise _damaged(file, _first_line(error)) from error
    if bad is not None or folders:
        raise _damaged(file, f"wrong checksum of {bad}" if bad is not None else f"{folders[0]} is marked as a folder")


def _load_safetensors(file: Path, map_location: str | torch.device) -> dict[str, torch.Tensor]:
    try:
        return load_file(file, device=str(map_location))
    except SafetensorError as error:
        raise _damaged(file, _first_line(error)) from error


def _unpickle(file: Path, start: bytes, map_location: str | torch.device) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED):
            warnings.simplefilter("ignore")  # of foreign files; the error below says it in one line
            return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # the unpickler raises nearly any type on foreign bytes
        raise _unpickle_error(file, start, error) from error


def _unpickle_error(file: Path, start: bytes, error: Exception) -> UserError:
    """Why torch refused: pickled code or objects (named), a damaged old file, or no checkpoint."""
    named = re.search(r"GLOBAL ([\w.]*\w) ", str(error))
    if named:
        rule = "only tensors and plain values are read, no code is run; save its state_dict() instead"
        return UserError(f"checkpoint {file} holds the Python object {named[1]}; {rule}")
    why = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0] or type(error).__name__
    if start.startswith(_LEGACY_START):
        return _damaged(file, why)
    detail = f" ({why[:100]})" if start.startswith(b"PK") else ""  # of other kinds it tells about random bytes
    return DamagedCheckpoint(
        f"{file} is not a checkpoint that torch can read{detail}; give a .pth or .safetensors file"
    )


def _newest_good(output_dir: str | Path | None) -> tuple[dict[str, Any], str] | tuple[None, None]:
    """Newest whole checkpoint of a run, with one warning for a torn one; (None, None) if there is none."""
    if not output_dir:
        raise UserError("--resume auto looks into --output_dir, which is not given; add it")
    current = Path(output_dir).expanduser() / "checkpoint.pth"
    torn = ""
    for path in (current, previous_path(current)):
        if not path.exists():
            continue
        try:
            state = load_checkpoint(path)
        except DamagedCheckpoint as error:
            torn = torn or str(error)
            continue
        if torn:
            log(f"warning: {torn}: resuming from {path}")
        return state, str(path)
    if torn:
        raise UserError(f"no checkpoint to resume in {output_dir}: {torn}, or start anew in another --output_dir")
    return None, None


def find_resume(output_dir: str | Path) -> Path | None:
    """Checkpoint that --resume auto takes: the newest whole one, or None for a fresh start.

    A torn checkpoint.pth falls back to checkpoint_prev.pth with a warning; UserError if no file is whole.
    """
    path = _newest_good(output_dir)[1]
    return Path(path) if path else None


def load_resume(resume: str | None, output_dir: str | Path | None) -> tuple[dict[str, Any], str] | None:
    """State and path for --resume FILE, URL or auto; None for no --resume, or auto in a new folder.

    Rank 0 decides for all ranks, so that they never resume different files; all ranks must call it.
    """
    if not resume:
        return None
    state, path, message = None, None, None
    if is_main_process():
        try:
            state, path = _newest_good(output_dir) if resume == "auto" else (load_checkpoint(resume), resume)
        except UserError as error:
            message = str(error)
    path, message = broadcast_object((path, message))
    if message is not None:
        raise UserError(message)
    if path is None:
        return None
    return state if state is not None else load_checkpoint(path), path


def check_resumable(state: Mapping[str, Any], path: str | Path) -> None:
    """Raise UserError if a checkpoint holds weights only, from which training cannot go on."""
    missing = [key for key in _RESUME_KEYS if key not in state]
    if missing:
        raise UserError(f"{path} cannot resume training: it has no {', '.join(missing)}; use --finetune {path}")


# Run metadata


def compile_model(module: torch.nn.Module, **options: Any) -> Any:
    """torch.compile, with room for a graph per schedule.

    After 8 graphs of one forward the compiler goes back to eager with no more than a warning, and an evaluation of many
    schedules, training with random ones, or a benchmark of many models needs more.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 512)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4096)
    return torch.compile(module, **options)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that numbers depend on."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("torchvision", "timm", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _git(*command: str) -> str | None:
    folder = str(Path(__file__).resolve().parent)
    try:
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_revision() -> str | None:
    """Short commit hash of this project, '-dirty' with uncommitted changes; None outside its own repository."""
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
        for stale in folder.glob("*.pth.*.tmp"):  # of a save that was killed
            stale.unlink(missing_ok=True)
        probe = _temporary(folder / "probe")
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
            print(message, flush=True)


class Progress(Iterable[T]):
    """Iterate with a bar on a terminal, else with a line every `log_every` steps; quiet if not `is_main`.

    Ask `due` inside the loop and call `show` only then: reading a value may wait for the GPU. `start` steps of `total`
    were done before (a resumed epoch).
    """

    def __init__(
        self, items: Iterable[T], total: int, title: str, log_every: int = 10, is_main: bool = True, start: int = 0
    ) -> None:
        self.items, self.total, self.title, self.is_main = items, total, title, is_main
        self.log_every, self.start, self.step = max(1, log_every), start, start
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
    """Writer of tensorboard events on rank 0, elsewhere one that writes nothing.

    A resumed run's `purge_step` hides the steps from there on that the stopped run had written.
    """
    if not output_dir or not is_main:
        return SummaryWriter(logdir="unused", write_to_disk=False)
    return SummaryWriter(logdir=str(output_dir), purge_step=purge_step)


def _double(value: torch.Tensor | float) -> torch.Tensor | float:
    if not isinstance(value, torch.Tensor):
        return float(value)
    return (value.detach().cpu() if value.device.type == "mps" else value.detach()).double()  # MPS has no doubles


class Mean:
    """Running weighted mean in double precision; tensors stay on their device until `value` is read."""

    def __init__(self) -> None:
        self.total: torch.Tensor | float = 0.0
        self.count: torch.Tensor | float = 0.0

    def update(self, value: torch.Tensor | float, n: torch.Tensor | float = 1) -> None:
        """Add the mean `value` of `n` samples; n = 0 adds nothing, even for a value that is nan."""
        if isinstance(n, (int, float)) and n == 0:
            return
        weight = _double(n)
        self.total = self.total + _double(value) * weight
        self.count = self.count + weight

    @property
    def value(self) -> float:
        """Mean on this rank; nan before the first update."""
        count = float(self.count)
        return float(self.total) / count if count else math.nan

    def all_reduce(self) -> float:
        """Mean over the samples of all ranks; all ranks must call it."""
        return reduce_means({"": self})[""]


def reduce_means(means: Mapping[str, Mean]) -> dict[str, float]:
    """Means over the samples of all ranks in one exchange; all ranks must hold the same names in the same order."""
    pairs = [[float(mean.total), float(mean.count)] for mean in means.values()]
    sums = all_reduce_sum(torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)).tolist()
    return {name: total / count if count else math.nan for name, (total, count) in zip(means, sums, strict=True)}
