"""Time operator by operator, to see where a merging model spends what its ideal does not."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

REPEATS = 5


def operator_times(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Measure the milliseconds per call of `run` in every operator itself, without those it calls; on a GPU of kernels.

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
    times = {event.key: getattr(event, key) / 1000 / REPEATS for event in profiler.key_averages()}
    return {name: round(milliseconds, 4) for name, milliseconds in times.items() if milliseconds > 0}
