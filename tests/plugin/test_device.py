"""How many threads a task takes."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from napari_kaf import _device


@pytest.mark.parametrize(("taken", "threads"), [(0.1, 4), (0.6, 3), (2.9, 1), (7.0, 1)])
def test_processors_that_others_leave_free_are_taken(monkeypatch, taken, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 1, 2, 3], raising=False)
    assert _device.free_processors(taken) == threads
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 1], raising=False)
    assert _device.free_processors(taken) == min(threads, 2)


def test_our_own_work_is_not_that_of_others(monkeypatch):
    everything = psutil.cpu_times()
    monkeypatch.setattr(
        psutil, "cpu_times", lambda: everything
    )  # as if all that was used were these 0.3 s of ours
    before, end = _device._seconds_of_others(), time.process_time() + 0.3
    while time.process_time() < end:
        pass
    assert before - _device._seconds_of_others() == pytest.approx(0.3, abs=0.1)
