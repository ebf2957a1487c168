"""A network stops between two layers, forwards and backwards, and only when its own thread is asked to."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from napari_kaf._interrupt import Interrupted, interruptible


class Noted(nn.Module):
    """Notes that it ran, forwards and backwards."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append(f"{self.name} forward")
        result = x * self.weight
        result.register_hook(lambda _gradient: self.log.append(f"{self.name} backward"))
        return result


@pytest.mark.parametrize(
    ("asked_after", "ran"),
    [
        ("a forward", ["a forward"]),
        ("c forward", ["a forward", "b forward", "c forward"]),
        ("c backward", ["a forward", "b forward", "c forward", "c backward"]),
        ("never", [f"{n} forward" for n in "abc"] + [f"{n} backward" for n in "cba"]),
    ],
)
def test_it_stops_before_the_next_layer(asked_after, ran):
    log: list[str] = []
    network = nn.Sequential(*(Noted(name, log) for name in "abc"))
    try:
        with interruptible(lambda: asked_after in log):
            network(torch.ones(2, 3)).sum().backward()
    except Interrupted:
        assert asked_after != "never"
    assert log == ran
    network(torch.ones(1))  # afterwards nothing is looked at


def test_other_threads_are_left_alone():
    done = []
    with interruptible(lambda: True):
        thread = threading.Thread(target=lambda: done.append(nn.Linear(2, 1)(torch.ones(1, 2))))
        thread.start()
        thread.join()
    assert done
