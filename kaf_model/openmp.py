"""How the threads of torch wait for each other on a CPU."""

from __future__ import annotations

import os


def let_threads_sleep() -> None:
    """Let threads that have waited for some microseconds sleep, instead of spinning until they are needed.

    On a machine with other work to do that saves most of the time of a step; to sleep at once would cost an idle one
    a tenth. To be called before torch is imported; what the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
