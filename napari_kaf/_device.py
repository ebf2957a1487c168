"""What a task runs on, for people. Called on the worker thread only: it imports torch."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import psutil

from kaf_model.openmp import let_threads_sleep

if TYPE_CHECKING:
    import torch

_LEAST_LOOK = 0.3  # seconds


def share_processor() -> None:
    """Give torch as many threads as there are processors that other programs leave free, and let them sleep.

    A thread more than that makes every step wait for the slowest; the window needs its share as well. What
    the user has set stays. To be called on the worker thread before torch is used there; what others take is
    measured while torch is imported.
    """
    let_threads_sleep()
    began, busy = time.monotonic(), _seconds_of_others()
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return
    time.sleep(max(0.0, _LEAST_LOOK - (time.monotonic() - began)))
    taken = (_seconds_of_others() - busy) / (time.monotonic() - began)
    torch.set_num_threads(free_processors(taken))


def free_processors(taken: float) -> int:
    """Processors that other programs leave to us, at least one.

    Args:
        taken: Processors that they keep busy.
    """
    everywhere = os.cpu_count() or 1
    ours = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else everywhere
    return max(1, min(ours, round(everywhere - taken)))


def _seconds_of_others() -> float:
    """Processor time that all programs but this one have used since the machine was started."""
    everything, own = psutil.cpu_times(), psutil.Process().cpu_times()
    busy = sum(getattr(everything, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
    return float(busy - own.user - own.system)


def describe_device(device: torch.device) -> str:
    """Name of a device for people."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return {"mps": "Apple GPU"}.get(device.type, f"CPU, {threads} thread{'s' if threads != 1 else ''}")


def memory_in_use(device: torch.device) -> float:
    """GB in use: of the GPU, or by this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / 1e9
    return float(psutil.Process(os.getpid()).memory_info().rss) / 1e9
