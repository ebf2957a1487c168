"""What a task runs on, for people. Called on the worker thread only: it imports torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def let_threads_sleep() -> None:
    """Let torch's threads sleep while they wait, not spin: the window shares the processor with them.

    To be called before torch is first imported; what the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def describe_device(device: torch.device) -> str:
    """Name of a device for people."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return {"mps": "Apple GPU"}.get(device.type, f"CPU, {threads} threads")


def memory_in_use(device: torch.device) -> float:
    """GB in use: of the GPU, or by this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / 1e9
    import psutil

    return float(psutil.Process(os.getpid()).memory_info().rss) / 1e9
