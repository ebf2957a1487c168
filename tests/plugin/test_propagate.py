"""Carrying labels from finished slices to the others: by itself, and as what a finetuning begins with."""

from __future__ import annotations

import numpy as np
import pytest

from kaf_model.volume import Volume
from napari_kaf import _layers
from napari_kaf._finetune_task import VolumePreview
from napari_kaf._ledger import Cell
from napari_kaf._marking import mark


def finish(panel, qtbot) -> None:
    qtbot.waitUntil(lambda: not panel.session.busy, timeout=300_000)


def test_a_click_carries_finished_slices_to_the_others(labelled, qtbot):
    viewer, panel = labelled  # slices 1 and 3 of 5 are complete
    session, drawn = panel.session, panel.session.labels.data.copy()
    panel.propagate.row.button.click()
    assert not panel.training.row.button.isEnabled()
    finish(panel, qtbot)
    found = session.results.labels
    assert np.array_equal(found[[1, 3]], drawn[[1, 3]])
    assert found[2].any()
    assert np.array_equal(session.labels.data, drawn)  # the result came in a layer of its own
    assert _layers.layers_with_role(viewer, "result")
    assert "Accept what is right" in panel.propagate.row.status.text()
    assert not session.results.runs
    panel.result.accept_whole.click()
    assert session.ledger.states[2] is Cell.ACCEPTED
    assert np.array_equal(session.labels.data[2], found[2])
    session.labels.undo()
    assert np.array_equal(session.labels.data, drawn)


def test_a_result_waits_while_another_volume_is_looked_at(labelled, qtbot):
    viewer, panel = labelled
    session, volume = panel.session, panel.session.opened.volume
    other = Volume.from_array(volume.array + 1, volume.spacing, name="other")
    panel.propagate.row.button.click()
    finish(panel, qtbot)
    found, labels = session.results.labels.copy(), session.labels
    _layers.add_volume(viewer, other, "other")
    session.poll()
    for index in (1, 0):  # there and back
        panel.volume.box.setCurrentIndex(index)
        panel.volume.box.activated.emit(index)
        assert (session.results.labels is None) == bool(index)
        assert panel.result.accept_whole.isEnabled() != bool(index)
        assert not panel.propagate.row.status.text()
    assert viewer.layers.selection.active is labels
    np.testing.assert_array_equal(session.results.labels, found)


def test_where_structures_end_is_asked_for_until_it_is_shown(labelled, qtbot):
    _viewer, panel = labelled
    session, status = panel.session, panel.propagate.row.status
    for empty, told in ([], "before slice 1 and after slice 3"), ([0], "after slice 3"), ([0, 4], ""):
        mark(session, Cell.EMPTY, empty)
        panel.propagate.row.button.click()
        finish(panel, qtbot)
        assert f"{told} is a guess" in status.text() if told else "guess" not in status.text()


@pytest.mark.parametrize(
    ("marks", "says"),
    [
        ({}, "no slice is marked yet"),
        ({1: Cell.PARTIAL, 3: Cell.PARTIAL}, "no slice is marked complete yet"),
        ({1: Cell.PARTIAL, 0: Cell.EMPTY}, "no complete slice shows a structure"),
    ],
)
def test_what_is_missing_is_said(labelled, qtbot, notifications, marks, says):
    _viewer, panel = labelled
    session = panel.session
    mark(session, Cell.UNTOUCHED, [1, 3])
    for z, state in marks.items():
        mark(session, state, [z])
    panel.propagate.row.button.click()
    finish(panel, qtbot)
    assert says in notifications[-1]
    assert panel.propagate.row.button.isEnabled()
    assert session.results.labels is None


def test_a_finetuning_begins_with_what_was_carried(labelled, qtbot):
    _viewer, panel = labelled
    seen = []
    shown = panel.training._show_preview
    panel.training._show_preview = lambda report: (seen.append((report, _steps(panel))), shown(report))
    panel.training.row.button.click()
    qtbot.waitUntil(lambda: bool(seen), timeout=300_000)
    panel.training.row.button.click()
    finish(panel, qtbot)
    first, steps = seen[0]
    assert isinstance(first, VolumePreview)
    assert not steps
    drawn = panel.session.labels.data
    assert np.array_equal(first.labels[[1, 3]], drawn[[1, 3]])
    assert first.labels[2].any()
    assert np.array_equal(panel.session.results.labels[[1, 3]], drawn[[1, 3]])
    assert "before slice 1 and after slice 3 is a guess" in panel.training.row.status.text()


def _steps(panel) -> int:
    return len(panel.training.curve.points("total"))
