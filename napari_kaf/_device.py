"""What a task runs on, for people. Called on the worker thread only: it imports torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


def share_processor() -> None:
    """Give torch as many threads as there are processors that other programs leave free, and let them sleep.

    A thread more than that makes every step wait for the slowest; the window needs its share as well. What
    the user has set stays. To be called on the worker thread before torch is used there.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(free_processors())


def free_processors() -> int:
    """Processors that are not taken by other programs, at least one."""
    there = (
        len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
    )
    there = there or 1
    taken = float(psutil.getloadavg()[0])
    return max(1, min(there, round(there - taken)))


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
