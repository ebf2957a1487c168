"""Threads that wait sleep, unless somebody has said otherwise."""

import os
import subprocess
import sys

import pytest

from kaf_model.openmp import let_threads_sleep

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("PASSIVE", "1000")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
        ({"GOMP_SPINCOUNT": "7"}, ("PASSIVE", "7")),
    ],
)
def test_what_somebody_has_said_stays(monkeypatch, given, expected):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    let_threads_sleep()
    assert tuple(os.environ.get(name) for name in NAMES) == expected
    for name in NAMES:
        os.environ.pop(name, None)


def test_it_is_said_before_torch_is_imported():
    code = "import sys, kaf_model.openmp, napari_kaf._device; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
