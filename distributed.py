"""The processes of a run: what the launcher says about them, their devices, and the collectives between them."""

import dataclasses
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as c10d
from torch.distributed.rendezvous import rendezvous

from models.errors import UserError
from utils import RunError, first_line, is_initialized, nearest

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Distributed:
    """This process among the processes of the run: its device and its rank."""

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
class LaunchInfo:
    """Rank, number of processes and meeting point, as the launcher's environment gives them."""

    rank: int = 0
    world: int = 1
    local_rank: int | None = None
    address: str = ""
    port: int = 0
    bound_gpu: bool = False  # the launcher may show each process its own GPU only, which is then cuda:0


def _env_int(name: str, default: int | None = None) -> int:
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.strip().isdecimal():
        shown = "is not set" if value is None else f"is '{value}', not a whole number"
        raise UserError(f"environment variable {name} {shown}; start the run with torchrun or srun")
    return int(value)


def _read_torchrun() -> LaunchInfo:
    rank, world = _env_int("RANK"), _env_int("WORLD_SIZE")
    if world < 1 or rank >= world:
        raise UserError(f"RANK={rank} and WORLD_SIZE={world} contradict: RANK counts from 0 to WORLD_SIZE - 1")
    if world == 1:
        return LaunchInfo()
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(f"WORLD_SIZE={world} but MASTER_ADDR is not set; start the run with torchrun")
    local = _env_int("LOCAL_RANK") if "LOCAL_RANK" in os.environ else None
    return LaunchInfo(rank, world, local, os.environ["MASTER_ADDR"], _env_int("MASTER_PORT"))


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
    """Tell a task of srun from an sbatch script's own shell.

    The shell has SLURM_PROCID=0 and SLURM_NTASKS too, but no step; joining a group from there would wait for tasks that
    do not exist.
    """
    if "SLURM_PROCID" not in os.environ or _env_int("SLURM_NTASKS", 1) < 2:
        return False
    in_step = "SLURM_STEP_ID" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ
    return in_step or "SLURM_JOB_ID" not in os.environ


def _read_slurm() -> LaunchInfo:
    rank, world = _env_int("SLURM_PROCID"), _env_int("SLURM_NTASKS")
    if rank >= world:
        raise UserError(f"SLURM_PROCID={rank} and SLURM_NTASKS={world} contradict; start the run with srun")
    port = _env_int("MASTER_PORT", 20000 + _env_int("SLURM_JOB_ID", 0) % 20000)
    return LaunchInfo(rank, world, _env_int("SLURM_LOCALID"), _slurm_address(), port, bound_gpu=True)


def read_launcher() -> LaunchInfo:
    """Read the environment that torchrun or srun made; without one there is a single process.

    Raises:
        UserError: variables that are missing or contradict each other.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return _read_torchrun()
    return _read_slurm() if _in_slurm_step() else LaunchInfo()


def _cuda_device(asked: torch.device, launch: LaunchInfo) -> torch.device:
    if not torch.cuda.is_available():
        raise UserError(f"--device {asked} but torch finds no CUDA GPU; use --device cpu or check the driver")
    count = torch.cuda.device_count()
    if launch.world > 1 and asked.index is not None:
        raise UserError(f"--device {asked} names one GPU but there are {launch.world} processes; use --device cuda")
    index = asked.index or 0
    if launch.world > 1:
        local = launch.rank % count if launch.local_rank is None else launch.local_rank
        index = 0 if launch.bound_gpu and count == 1 else local
    if index >= count:
        raise UserError(f"GPU {index} is wanted but this machine shows {count}; start one process per GPU")
    return torch.device("cuda", index)


def _pick_device(name: str | None, launch: LaunchInfo) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device_type, _, index = name.partition(":")
    if device_type not in ("cpu", "cuda", "mps") or (":" in name and not index.isdecimal()):
        raise UserError(nearest(name, ("cpu", "cuda", "cuda:N", "mps"), "--device"))
    if device_type == "cuda":
        return _cuda_device(torch.device(name), launch)
    if device_type == "mps" and (launch.world > 1 or not torch.backends.mps.is_available()):
        why = "cannot be shared by several processes" if launch.world > 1 else "is not available here"
        raise UserError(f"--device mps {why}; use --device cpu")
    return torch.device(device_type)


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

    NCCL connects GPUs, gloo CPUs; every wait ends after REGTOME_DIST_TIMEOUT seconds (600).

    Args:
        device: None means a GPU if there is one.

    Raises:
        UserError: a contradictory environment or device.
        RunError: the other processes do not come.
    """
    launch, timeout = read_launcher(), _timeout()
    chosen = _pick_device(device, launch)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if launch.world == 1:
        return Distributed(chosen)
    meeting = f"tcp://{f'[{launch.address}]' if ':' in launch.address else launch.address}:{launch.port}"
    with distributed_errors(f"the start of process {launch.rank} of {launch.world} at {meeting}"):
        if launch.rank:
            _wait_for_meeting_point(launch, timeout.total_seconds())
        store, _, _ = next(rendezvous(meeting, launch.rank, launch.world, timeout=timeout))
        store.set_timeout(timeout)
        # torchrun starts its ranks anew on the same store, where the addresses of their dead predecessors are
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        c10d.init_process_group(
            backend="nccl" if chosen.type == "cuda" else "gloo",
            store=c10d.PrefixStore(f"attempt{attempt}of{launch.world}", store),
            rank=launch.rank,
            world_size=launch.world,
            timeout=timeout,
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return Distributed(chosen, launch.rank, launch.world, launch.local_rank or 0)


def _wait_for_meeting_point(launch: LaunchInfo, seconds: float) -> None:
    """Wait until somebody listens there: torch's own wait ends with forty frames of its stack on stderr."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=seconds).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nobody answers there within {seconds:g} s ({error.strerror or error})") from error
        time.sleep(0.2)


def close_distributed() -> None:
    """Leave the process group, if there is one."""
    if is_initialized():
        c10d.destroy_process_group()


@contextmanager
def distributed_errors(what: str) -> Iterator[None]:
    """Turn torch's error about a lost or late process into a RunError of one line."""
    try:
        yield
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise RunError(
                f"{what} failed: another program uses that port; choose a free one (MASTER_PORT, or torchrun's "
                "--master_port), or give torchrun --standalone"
            ) from error
        raise lost_contact(what, error) from error


def lost_contact(what: str, error: RuntimeError) -> RunError:
    """Word the error of a process that waits for another one, which is not its own fault."""
    return RunError(
        f"lost contact with the other processes in {what}: {plain_reason(error)}; this process is whole, another one "
        "was killed or hangs: see the launcher's last lines"
    )


def plain_reason(error: BaseException) -> str:
    """Say in plain words what a message of gloo, NCCL or torch's store means, without source lines and wishes."""
    text = first_line(error)
    if found := re.search(r"[Cc]onnection (?:closed by|reset by) peer(?: \[([\w.:]+)\])?|Broken pipe", text):
        return f"a process on {found[1]} closed the connection" if found[1] else "another process closed the connection"
    if found := re.search(r"(?:[Tt]imed out waiting|timed out after) (\d+) ?ms", text):
        return f"no answer within {int(found[1]) / 1000:g} s"
    return re.sub(r"\[[^\]]*\.cc:\d+\] |(?: GLHF!.*| This is typically caused by.*)$", "", text)


def collective_device() -> torch.device:
    """Return the device on which tensors of the process group must lie."""
    return torch.device("cuda", torch.cuda.current_device()) if c10d.get_backend() == "nccl" else torch.device("cpu")


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum every rank's tensor; returns a new tensor on the same device, without gradient."""
    return _all_reduce(tensor, c10d.ReduceOp.SUM, "a sum")


def max_over_ranks(value: int, dist: Distributed) -> int:
    """Return the largest value of any rank; all ranks must call it."""
    return int(_all_reduce(torch.tensor(value), c10d.ReduceOp.MAX, "a maximum")) if dist.distributed else value


def _all_reduce(tensor: torch.Tensor, operation: Any, what: str) -> torch.Tensor:
    if not is_initialized():
        return tensor.detach().clone()
    result = tensor.detach().to(collective_device(), copy=True)
    with distributed_errors(what):
        c10d.all_reduce(result, operation)
    return result.to(tensor.device)


def any_rank(flag: bool, dist: Distributed) -> bool:
    """Tell every rank whether the flag is set on any; all ranks must call it."""
    if not dist.distributed:
        return bool(flag)
    return bool(all_reduce_sum(torch.tensor([int(flag)])).item())


def gather_names(names: Sequence[str]) -> list[str]:
    """Return every rank's names in rank order, on every rank."""
    if not is_initialized():
        return list(names)
    parts: list[Any] = [None] * c10d.get_world_size()
    with distributed_errors("a gathering of names"):
        c10d.all_gather_object(parts, list(names))
    return [name for part in parts for name in part]


def broadcast_object(obj: T) -> T:
    """Return rank 0's picklable object, on every rank."""
    if not is_initialized():
        return obj
    box = [obj]
    with distributed_errors("a broadcast"):
        c10d.broadcast_object_list(box, src=0, device=collective_device())
    return box[0]


def barrier() -> None:
    """Wait until every rank is here."""
    if is_initialized():
        all_reduce_sum(torch.zeros(1))  # a sum tells a lost rank in one line and in bounded time, as elsewhere
