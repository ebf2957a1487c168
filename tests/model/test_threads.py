"""The number of threads of a CPU is the one with which steps are quickest, also when that changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from kaf_model.threads import ThreadChoice, may_choose_threads


def work(choice: ThreadChoice, seconds: Callable[[int], float], steps: int) -> list[int]:
    """Take steps that last as long as `seconds` says of a number of threads; returns the numbers."""
    counts = []
    for _ in range(steps):
        counts.append(choice.count)
        choice.took(seconds(choice.count))
    return counts


@pytest.mark.parametrize("most", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("best", [1, 2, 4, 8, 12])
def test_the_quickest_of_the_numbers_is_found(most: int, best: int) -> None:
    numbers = {1, 2, 4, 8, most}
    counts = work(ThreadChoice(most), lambda count: 0.1 + 0.05 * abs(count - best), 100)
    reached = [number for number in numbers if number <= most]
    assert counts[-1] == min(reached, key=lambda number: abs(number - best))


def test_steps_begin_with_all_threads_and_keep_them_where_they_pay() -> None:
    counts = work(ThreadChoice(6), lambda count: 1 / count, 1000)
    assert counts[0] == counts[-1] == 6
    assert counts.count(6) > 800


def test_where_numbers_hardly_differ_nothing_changes() -> None:
    counts = work(ThreadChoice(2), lambda count: {1: 0.098, 2: 0.1}[count], 500)
    assert counts.count(2) > 400


def test_what_other_programs_take_meanwhile_is_noticed() -> None:
    choice = ThreadChoice(2)
    assert work(choice, lambda count: 0.1 / count, 50)[-1] == 2
    busy = work(choice, lambda count: 0.1 * count, 400)
    assert busy[-1] == 1
    assert busy[:80].count(1) > 20  # soon
    assert work(choice, lambda count: 0.06 / count, 400)[-1] == 2


def test_steps_that_last_longer_from_now_on_begin_a_trial_early() -> None:
    choice = ThreadChoice(2)
    work(choice, {1: 0.039, 2: 0.038}.__getitem__, 100)
    larger = work(choice, {1: 0.104, 2: 0.075}.__getitem__, 60)
    assert 1 in larger
    assert larger[-1] == 2


def test_steps_of_all_lengths_are_not_tried_all_the_time() -> None:
    choice, lengths = ThreadChoice(2), itertools.cycle([0.1] * 10 + [0.5] * 10)
    counts = work(choice, lambda count: next(lengths) * (3 - count), 2000)
    assert counts.count(1) < 600


@pytest.mark.parametrize("step", [0.01, 1.0])
def test_trying_takes_little_of_the_time(step: float) -> None:
    durations = {1: 3 * step, 2: step, 4: 3 * step}
    counts = work(ThreadChoice(4), durations.__getitem__, 5000)
    lost = sum(durations[count] for count in counts) / (5000 * step) - 1
    assert lost < 0.1


def test_a_slow_first_step_decides_nothing() -> None:
    times = iter([5.0])
    counts = work(ThreadChoice(2), lambda count: next(times, 0.1 / count), 50)
    assert counts[-1] == 2


def test_steps_have_the_chosen_threads_and_leave_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before, said = torch.get_num_threads(), []
    plain = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda count: said.append(count) or plain(count))
    choice = ThreadChoice(before + 1)
    with choice.used():
        for _ in range(3):
            with choice.step():
                assert torch.get_num_threads() == before + 1
    assert said == [before + 1, before]  # torch forgets what it has prepared each time
    with pytest.raises(RuntimeError), choice.used(), choice.step():
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_a_number_that_somebody_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert may_choose_threads(torch.device("cpu"))
        assert not may_choose_threads(torch.device("cuda"))
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert not may_choose_threads(torch.device("cpu"))
        monkeypatch.delenv("OMP_NUM_THREADS")
        torch.set_num_threads(1)
        assert not may_choose_threads(torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
