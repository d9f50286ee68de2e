"""A real Slurm on this machine for tests: two nodes, private daemons in one folder, gone at the end.

The recipe, and what it took to find it, are in ../shared/slurm. With CI=true a Slurm that cannot be had fails the test.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT.parent / "shared" / "slurm" / "slurm_cluster.sh"
DAEMONS = ("slurmctld", "slurmd", "munged", "squeue")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


@dataclass(frozen=True)
class Cluster:
    """A running cluster: its folder, and the environment for its clients and jobs."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment | extra
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False
        )

    def state(self, job: str) -> str:
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").stdout.strip()

    def restarts(self, job: str) -> int:
        shown = self.run("scontrol", "show", "job", job).stdout
        return int(shown.split("Restarts=")[1].split()[0])


def until(what: str, condition: Callable[[], bool], seconds: float = 900.0) -> None:
    """Wait for a condition; fails the test with `what` if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


def _missing(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"no Slurm for the tests: {reason}")
    pytest.skip(reason)


def _install() -> None:
    """Debian's packages, where they are missing and may be installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if all(shutil.which(name, path=path) for name in DAEMONS):
        return
    if os.geteuid() or not shutil.which("apt-get"):
        _missing("Slurm is not installed, and only root can install it, with apt-get")
    done = subprocess.run(["bash", str(RECIPE), "install"], capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        _missing(f"Slurm could not be installed: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")


@contextmanager
def slurm_cluster(nodes: int = 2) -> Iterator[Cluster]:
    """A Slurm with nodes 127.0.0.1, 127.0.0.2, ...; it is taken down at the end, with its folder."""
    if not RECIPE.is_file():
        _missing("no recipe for a Slurm in ../shared/slurm")
    if sys.platform != "linux" or os.geteuid():
        _missing("a private Slurm needs Linux and root")
    _install()
    # every folder above munge's socket must be open to all, and the path short: not pytest's tmp_path
    folder = Path(tempfile.mkdtemp(prefix="regtome-slurm-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        up = subprocess.run(["bash", str(RECIPE), "up", str(folder), str(nodes)], capture_output=True, text=True)
        if up.returncode:
            _missing(f"Slurm did not start: {(up.stderr.strip() or 'no reason given').splitlines()[-1]}")
        yield Cluster(folder, _environment(folder))
    finally:
        subprocess.run(["bash", str(RECIPE), "down", str(folder)], capture_output=True, timeout=900, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    scratch = folder / "scratch"  # torchrun leaves folders there
    scratch.mkdir()
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"]
    own = {"SLURM_CONF": str(folder / "slurm.conf"), "TMPDIR": str(scratch), "PATH": os.pathsep.join(places)}
    return dict(os.environ) | own | {"OMP_NUM_THREADS": "1"}
