"""Seconds of a forward as a sum over blocks, from times measured on this machine: what --speedup counts in.

Whole forwards of a dozen schedules are timed, in turns with timm's dense model. A block's time is taken as linear and
squared in the tokens N that enter (projections, attention), linear in the M that leave (the MLP), and where tokens
merge as a constant, linear and squared part of N more (matching). The coefficients, all >= 0, for each kind of block,
are those whose sums come closest to the times of the forwards: blocks that are timed one by one would have to wait for
a GPU after each. The table is kept in torch's hub cache, in a file for each model, method, device, batch size, number
of threads, precision and versions.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import Precision, throughput
from models import MergingViT
from models.registry import native_model
from utils import RunError, log, versions, write_json

SECONDS = 40.0  # to measure for, about
RATIOS = (0.04, 0.08, 0.12, 0.2, 0.35, 0.5)  # of the tokens, that timed schedules merge in every block
MOST = 10**6  # a count that asks for all that a block can merge


@dataclass(frozen=True)
class Latency:
    """Seconds of a batch's forward; a `budget.Cost`.

    Attributes:
        native: seconds of timm's dense model.
        outside: seconds outside of the blocks.
        kinds: for each block the number of its kind.
        coefficients: for each kind those of `terms`.
        key: what the times hold for.
    """

    native: float
    outside: float
    kinds: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...]
    key: dict[str, Any]
    unit: str = "s"

    def block(self, layer: int, tokens: int, left: int) -> float:
        """See `budget.Cost.block`."""
        return float(np.dot(self.coefficients[self.kinds[layer]], terms(tokens, left)))

    def rest(self, left: int) -> float:
        """See `budget.Cost.rest`."""
        return self.outside

    @classmethod
    def of(cls, model: MergingViT, name: str, batch_size: int, precision: Precision) -> "Latency":
        """The table of a model on its device, from the cache or measured now and kept there."""
        key = cache_key(model, name, batch_size, precision)
        file = cache_file(key)
        known = cls.read(file, key)
        if known is not None:
            log(f"times of blocks: {file}")
            return known
        log(f"measuring the times of blocks at batch size {batch_size} on {key['device']}")
        table = measure(model, name, batch_size, precision, key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, asdict(table))
            log(f"times of blocks: wrote {file}")
        except (OSError, RunError) as error:
            log(f"warning: the times of blocks are not kept: {error}")
        return table

    @classmethod
    def read(cls, file: Path, key: dict[str, Any]) -> "Latency | None":
        """A table from a file; None for no, a torn or a foreign one."""
        try:
            content = json.loads(file.read_text())
            kinds, coefficients = tuple(content["kinds"]), tuple(map(tuple, content["coefficients"]))
            table = cls(float(content["native"]), float(content["outside"]), kinds, coefficients, content["key"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return table if table.key == key else None


def terms(tokens: int, left: int) -> np.ndarray:
    """What a block's time is linear in; N tokens enter and M leave."""
    n, m, merging = tokens / 100, left / 100, float(left < tokens)
    return np.array([1.0, n, n * n, m, merging, merging * n, merging * n * n])


def probes(depth: int) -> list[Any]:
    """The schedules that are timed: ratios in all blocks, and all that one block, early or late, can merge."""
    places = sorted({depth * part // 4 for part in range(4)})
    return [*RATIOS, *(tuple(MOST if layer == place else 0 for layer in range(depth)) for place in places)]


@torch.no_grad()
def measure(model: MergingViT, name: str, batch_size: int, precision: Precision, key: dict[str, Any]) -> Latency:
    """Time whole forwards on random images, and fit the times of their blocks."""
    device, size = next(model.parameters()).device, model.patch_embed.img_size
    schedules = [0, *probes(len(model.blocks))]
    images = torch.randn(batch_size, 3, *size, device=device)
    training = model.training
    model.eval()
    runs: dict[str, Callable[[Tensor], Any]] = {str(i): _forward(model, r) for i, r in enumerate(schedules)}
    runs["native"] = native_of(model, name)
    speeds = throughput(runs, images, precision, seconds=SECONDS)
    model.train(training)
    seconds = {run: batch_size / speed["median"] for run, speed in speeds.items()}
    kinds = block_kinds(model)
    rows = [forward_terms(model, r, kinds) for r in schedules]
    outside, coefficients = fit(np.array(rows), np.array([seconds[str(i)] for i in range(len(schedules))]))
    return Latency(seconds["native"], outside, kinds, coefficients, key)


def measured_speedup(model: MergingViT, name: str, r: Any, batch_size: int, precision: Precision) -> float:
    """Measure how many times faster a schedule is than timm's dense model, in interleaved rounds."""
    images = torch.randn(batch_size, 3, *model.patch_embed.img_size, device=next(model.parameters()).device)
    training = model.training
    model.eval()
    with torch.no_grad():
        runs: dict[str, Callable[[Tensor], Any]] = {"r": _forward(model, r), "native": native_of(model, name)}
        speeds = throughput(runs, images, precision, seconds=SECONDS / 4)
    model.train(training)
    return speeds["r"]["median"] / speeds["native"]["median"]


def _forward(model: torch.nn.Module, r: Any) -> Callable[[Tensor], Any]:
    return partial(model, r=r)


def native_of(model: MergingViT, name: str) -> torch.nn.Module:
    """timm's dense model of the same size, on the same device."""
    device, size = next(model.parameters()).device, model.patch_embed.img_size
    return native_model(name, num_classes=model.num_classes, img_size=size).to(device).eval()


def block_kinds(model: MergingViT) -> tuple[int, ...]:
    """Number the kinds of blocks: those whose parameters have the same shapes."""
    shapes = [tuple(tuple(p.shape) for p in block.parameters()) for block in model.blocks]
    kinds = list(dict.fromkeys(shapes))
    return tuple(kinds.index(shape) for shape in shapes)


def forward_terms(model: MergingViT, r: Any, kinds: tuple[int, ...]) -> np.ndarray:
    """The `terms` of a forward, (kinds, terms): sums over the blocks of each kind."""
    plan, prefixes = model.plan(r), model.prefixes()
    sums = np.zeros((max(kinds) + 1, len(terms(2, 1))))
    left = model.patch_embed.num_patches
    for kind, prefix, merged in zip(kinds, prefixes, plan.merges, strict=True):
        sums[kind] += terms(left + prefix, left + prefix - merged)
        left -= merged
    return sums


def fit(rows: np.ndarray, seconds: np.ndarray) -> tuple[float, tuple[tuple[float, ...], ...]]:
    """Fit seconds (S,) of forwards by their terms (S,kinds,terms), by squares of relative errors.

    Returns:
        Seconds outside of blocks, and the coefficients of each kind.
    """
    from scipy.optimize import nnls  # which only a search needs

    table = np.concatenate([np.ones((len(rows), 1)), rows.reshape(len(rows), -1)], axis=1) / seconds[:, None]
    scale = np.linalg.norm(table, axis=0)
    scale[scale == 0] = 1.0
    found = nnls(table / scale, np.ones(len(rows)))[0] / scale
    return float(found[0]), tuple(tuple(map(float, kind)) for kind in found[1:].reshape(rows.shape[1:]))


# The cache


def cache_key(model: MergingViT, name: str, batch_size: int, precision: Precision) -> dict[str, Any]:
    """All that the times of a model depend on, in plain values."""
    device = next(model.parameters()).device
    gpu = device.type == "cuda"
    merge = {key: value for key, value in model.merge.as_dict().items() if key != "r"}
    return {
        "model": name,
        "input_size": list(model.patch_embed.img_size),
        "classes": model.num_classes,
        "prefix": list(model.prefixes()),
        "merge": merge,
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "threads": None if gpu else torch.get_num_threads(),
        "batch_size": batch_size,
        "dtype": str(precision.dtype or torch.float32),
        "versions": versions(),
        "terms": len(terms(2, 1)),
    }


def _processor() -> str:
    """Name the machine and its processor; two machines of one kind may differ by what else they do."""
    names: list[str] = []
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")][:1]
    return ", ".join([platform.node(), *(names or [platform.machine()]), f"{os.cpu_count()} cores"])


def cache_file(key: dict[str, Any]) -> Path:
    """The file of a table, in torch's hub cache."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return Path(torch.hub.get_dir()) / "regtome_latency" / f"{key['model'].replace('/', '_')}-{digest}.json"
