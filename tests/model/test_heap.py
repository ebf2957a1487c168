"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import numpy
from kaf_model.heap import keep_freed_memory

assert {keep} is None or keep_freed_memory()
for _ in range(200):
    numpy.ones(2**20, numpy.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no glibc")
def test_freed_memory_is_used_again() -> None:
    def page_faults(keep: object) -> int:
        # What is freed is given back at once if the threshold does not adapt: so it is for larger blocks.
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(keep=keep)],
            env={"MALLOC_MMAP_THRESHOLD_": "131072"},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    assert page_faults(True) < page_faults(None) - 100 * 2**20 // 4096
