"""Time operator by operator: where a merging model spends what its ideal does not."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

REPEATS = 5
SHOWN = 15


def operator_times(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Milliseconds per call of `run` in every operator itself (not in those it calls): of a GPU's kernels, of a CPU.

    The profiler slows small operators down: these numbers say where the time goes, not how much there is.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    run()
    with profile(activities=activities) as profiler:
        for _ in range(REPEATS):
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = {event.key: getattr(event, key) / 1000 / REPEATS for event in profiler.key_averages()}
    return {name: round(taken, 4) for name, taken in found.items() if taken > 0}


def overhead_table(merging: Mapping[str, float], ideal: Mapping[str, float]) -> str:
    """The operators in which the two differ most, as markdown; last the sum over all."""
    names = sorted(merging.keys() | ideal.keys(), key=lambda name: -abs(merging.get(name, 0) - ideal.get(name, 0)))
    pairs = [(name[:60], merging.get(name, 0.0), ideal.get(name, 0.0)) for name in names[:SHOWN]]
    pairs.append(("all operators", sum(merging.values()), sum(ideal.values())))
    width = max(len(name) for name, _, _ in pairs)
    lines = [f"| {'operator'.ljust(width)} | merging ms | ideal ms | difference |"]
    lines.append(f"| {'-' * width} | ---------- | -------- | ---------- |")
    lines += [
        f"| {name.ljust(width)} | {ours:10.2f} | {least:8.2f} | {ours - least:+10.2f} |" for name, ours, least in pairs
    ]
    return "\n".join(lines)
