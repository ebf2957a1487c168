"""Running a function in two processes that know of each other, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kaf_model.engine import leave_processes

_PATIENCE = 300.0  # seconds


def run_in_two(work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """What a function of the rank and a folder returns in each; one that does not come to an end fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = torch.multiprocessing.spawn(_run, (work, folder, port), nprocs=2, join=False)
    deadline = time.monotonic() + _PATIENCE
    while not processes.join(timeout=5):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"two processes did not come to an end within {_PATIENCE:.0f} s")
    return [torch.load(folder / f"result{rank}.pt") for rank in range(2)]


def _run(rank: int, work: Callable[[int, Path], Any], folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in {**ranks, **where}.items()})
    torch.save(work(rank, folder), folder / f"result{rank}.pt")
    leave_processes()
