"""How many threads the steps of a training take on a CPU: as many as make them quickest.

Small crops are done before many threads have woken up, and one thread more than other programs leave a processor for
makes every step wait for it. Both change while a training runs, so it is tried now and then instead of guessed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

_STEPS = 9  # of a trial with one number; the first, in which threads start, does not count
_GAIN = 0.93  # of the time of a step, which another number has to stay below
_PAUSE = 30.0  # seconds between trials
_TRIALS_SHARE = 20  # and as many times as long as the last one took
_OTHERWISE = 1.5  # times as long, or as short, as steps were in the last trial
_STEPS_OTHERWISE = 8  # of them one after the other begin a trial early
_LEAST_PAUSE = 0.2  # of the pause, which passes all the same


def may_choose_threads(device: torch.device) -> bool:
    """Whether work on a device has a number of threads that nobody has set."""
    return device.type == "cpu" and torch.get_num_threads() > 1 and "OMP_NUM_THREADS" not in os.environ


class ThreadChoice:
    """Finds the number of threads with which steps take least time: halves or doubles it, keeps what is quicker.

    Args:
        most: The highest number, with which it begins.
    """

    def __init__(self, most: int) -> None:
        self._counts = [1]
        while self._counts[-1] < most:
            self._counts.append(min(2 * self._counts[-1], most))
        self._best = len(self._counts) - 1
        self._trial = self._neighbours()
        self._times: dict[int, list[float]] = {}
        self._typical = 0.0
        self._pause = self._left = 0.0
        self._otherwise = 0

    @property
    def count(self) -> int:
        """Threads for the next step."""
        return self._counts[self._trial[0] if self._trial else self._best]

    def took(self, seconds: float) -> None:
        """Hear how long a step with `count` threads took."""
        if not self._trial:
            self._left -= seconds
            usual = self._typical / _OTHERWISE < seconds < self._typical * _OTHERWISE
            self._otherwise = 0 if usual else self._otherwise + 1
            changed = self._otherwise >= _STEPS_OTHERWISE
            if self._left <= 0 or (changed and self._left < (1 - _LEAST_PAUSE) * self._pause):
                self._trial = self._neighbours()
            return
        times = self._times.setdefault(self._trial[0], [])
        times.append(seconds)
        if len(times) >= _STEPS:
            self._trial.pop(0)
            if not self._trial:
                self._decide()

    def _neighbours(self) -> list[int]:
        """Places of what is tried: the number that was best, a lower and a higher one."""
        return [
            place for place in (self._best, self._best - 1, self._best + 1) if 0 <= place < len(self._counts)
        ]

    def _decide(self) -> None:
        typical = {place: median(times[1:]) for place, times in self._times.items()}
        quickest = min(typical, key=lambda place: typical[place])
        spent = sum(sum(times) for times in self._times.values())
        self._times = {}
        if typical[quickest] < _GAIN * typical[self._best]:
            self._best = quickest
            self._trial = self._neighbours()
            return
        self._typical, self._otherwise = typical[self._best], 0
        self._pause = self._left = max(_PAUSE, _TRIALS_SHARE * spent)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Give torch back, after the block, the threads that it has now."""
        before = torch.get_num_threads()
        try:
            yield
        finally:
            _set_threads(before)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Do a step inside the block with `count` of torch's threads, and hear how long it took."""
        _set_threads(self.count)
        began = time.monotonic()
        yield
        self.took(time.monotonic() - began)


def _set_threads(count: int) -> None:
    """Have torch use some threads; it forgets all that it has prepared to compute when that is said anew."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
