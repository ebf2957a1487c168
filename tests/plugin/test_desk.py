"""Only the newest question counts."""

from __future__ import annotations

import pytest

from kaf_model.progress import Progress
from napari_kaf._desk import CANCELLED, Desk
from napari_kaf._jobs import Report


@pytest.fixture
def desk(plugin_home, nothing_left):
    desk = Desk()
    yield desk
    desk.close()


def waiting(answer, gate):
    """A task that answers once a gate is open."""

    def task(control):
        while not (gate or control.cancelled):
            yield Report(Progress("waiting", 1, 4))
        return answer

    return task


def test_an_earlier_answer_is_dropped(desk, qtbot):
    answers, gate = [], []
    for number in range(3):
        desk.ask("z", "asking", waiting(number, gate), on_done=answers.append, on_failed=pytest.fail)
    desk.ask("y", "also", waiting("other", gate), on_done=answers.append, on_failed=pytest.fail)
    gate.append(True)
    qtbot.waitUntil(lambda: not desk.busy, timeout=20_000)
    assert set(answers) == {2, "other"}


def test_it_says_what_it_does_and_how_far_it_is(desk, qtbot):
    gate, told = [], []
    desk.changed.connect(lambda: told.append(desk.doing))
    desk.ask("z", "asking", waiting(1, gate), on_done=told.append, on_failed=pytest.fail)
    qtbot.waitUntil(lambda: "asking, 1 of 4" in told, timeout=20_000)
    gate.append(True)
    qtbot.waitUntil(lambda: 1 in told, timeout=20_000)
    assert told[-2:] == ["", 1]


def test_cancel_tells_who_asked_and_drop_does_not(desk, qtbot):
    failed = []
    desk.ask("a", "asking", waiting(1, []), on_done=pytest.fail, on_failed=failed.append)
    desk.ask("b", "asking", waiting(1, []), on_done=pytest.fail, on_failed=pytest.fail)
    desk.drop("b")
    assert desk.pending("a")
    assert not desk.pending("b")
    desk.cancel()
    assert failed == [CANCELLED]
    assert not desk.busy


def test_a_failure_is_told(desk, qtbot):
    failed = []

    def burst(control):
        yield Report(Progress("waiting", 0, None))
        raise ZeroDivisionError("some library")

    desk.ask("a", "asking", burst, on_done=pytest.fail, on_failed=failed.append)
    qtbot.waitUntil(lambda: bool(failed), timeout=20_000)
    assert "ZeroDivisionError: some library" in failed[0]
