"""Paths, threads and fixtures that the tests share."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"

for _folder in (ROOT, Path(__file__).resolve().parent):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))


def pytest_configure(config: pytest.Config) -> None:
    # tiny models: threads cost more than they bring, and one thread sums in one order
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of recorded outputs of the published implementations, which are not part of the repository."""
    if not (GOLDEN / "golden.safetensors").is_file():
        pytest.skip("no recorded outputs of the published implementations in ../shared/golden")
    return GOLDEN


@pytest.fixture(scope="session")
def golden(golden_dir: Path) -> dict[str, torch.Tensor]:
    """Recorded inputs and outputs by name (its README says which)."""
    return load_file(golden_dir / "golden.safetensors")
