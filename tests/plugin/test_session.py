"""The session on a viewer model, without a window: labels, ledger, saving, results."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from napari.components import ViewerModel

from kaf_model.errors import UserError
from kaf_model.volume import Volume
from napari_kaf import _autosave, _layers
from napari_kaf._classes import add_class, remove_class
from napari_kaf._ledger import Cell
from napari_kaf._marking import mark
from napari_kaf._runs import Run
from napari_kaf._session import Session, session_for
from napari_kaf._sidecar import Sidecar
from napari_kaf._snapshot import take_snapshot

SHAPE = (4, 12, 16)


@pytest.fixture
def viewer() -> ViewerModel:
    return ViewerModel()


@pytest.fixture
def session(viewer, plugin_home, tmp_path) -> Session:
    """A session on a volume that lies in a folder."""
    array = np.random.default_rng(0).integers(0, 500, SHAPE).astype(np.int16)
    volume = Volume.from_array(array, (8, 1.5, 1.5), name="scan")
    viewer.add_image(array, name="scan", **_layers.layer_arguments(volume, "volume"))
    session = session_for(viewer)
    session.poll()
    session.new_labels()
    yield session
    session.close()


def paint(session: Session, z: int, value: int = 1) -> None:
    plane = np.zeros(SHAPE, bool)
    plane[z, 3:6, 4:9] = True
    session.labels.data_setitem(np.nonzero(plane), value)
    session.poll()


def test_the_open_volume_is_picked_up_at_its_scale(session):
    assert session.opened.volume.spacing == (8.0, 1.5, 1.5)
    np.testing.assert_allclose(session.labels.scale, (8, 1.5, 1.5))
    assert session.labels.mode == "paint"


def test_paint_marks_partial_and_undo_takes_it_back(session):
    paint(session, 2)
    assert session.ledger.states[2] is Cell.PARTIAL
    session.labels.undo()
    session.poll()
    assert session.ledger.states[2] is Cell.UNTOUCHED


def test_marking_says_what_contradicts_the_paint(session):
    paint(session, 1)
    with pytest.raises(UserError, match="painted on, so it is not empty"):
        mark(session, Cell.EMPTY, [1])
    said = []
    session.told.connect(said.append)
    mark(session, Cell.COMPLETE, [3])
    assert session.ledger.states[3] is Cell.EMPTY
    assert "verified empty" in said[0]


def test_a_value_nobody_named_becomes_a_class(session):
    paint(session, 0, value=5)
    assert [(entry.value, entry.name) for entry in session.classes] == [(1, "structure"), (5, "class 5")]


def test_a_painted_class_is_not_removed(session):
    paint(session, 0)
    with pytest.raises(UserError, match="15 pixels are painted"):
        remove_class(session, 1)
    add_class(session, "valve")
    remove_class(session, 2)
    assert [entry.value for entry in session.classes] == [1]


def _full(*_arguments: object) -> None:
    raise OSError(28, "No space left on device")


def give_result(session: Session, value: int = 1) -> np.ndarray:
    result = np.zeros(SHAPE, np.uint8)
    result[:, 2:8, 2:10] = value
    run = Run("k", "run 1", "2026-01-01T00:00:00+00:00", {0: "complete"}, 5, 1.0, False, None, "", "CPU")
    session.results.show(run, result)
    return result


def test_a_result_lies_in_its_own_layer_and_leaves_the_drawing_alone(session, viewer):
    paint(session, 1)
    before = session.labels.data.copy()
    give_result(session)
    np.testing.assert_array_equal(session.labels.data, before)
    assert viewer.layers.selection.active is session.labels  # the brush does not change layers
    assert session.ledger.cell(0) is Cell.PREDICTED


def test_accepting_fills_what_is_not_the_users_and_undo_takes_it_back(session):
    paint(session, 0)
    paint(session, 1, value=2)
    mark(session, Cell.COMPLETE, [0])
    drawn = session.labels.data.copy()
    result = give_result(session)
    assert session.results.accept(range(4)) == 3
    np.testing.assert_array_equal(session.labels.data[0], drawn[0])  # complete: as drawn
    np.testing.assert_array_equal(session.labels.data[1], np.where(drawn[1], drawn[1], result[1]))
    np.testing.assert_array_equal(session.labels.data[2:], result[2:])
    assert session.ledger.states == (Cell.COMPLETE, Cell.ACCEPTED, Cell.ACCEPTED, Cell.ACCEPTED)
    session.labels.undo()
    session.poll()
    np.testing.assert_array_equal(session.labels.data, drawn)
    assert session.ledger.states == (Cell.COMPLETE, Cell.PARTIAL, Cell.UNTOUCHED, Cell.UNTOUCHED)
    session.labels.redo()
    session.poll()
    assert session.ledger.states[2] is Cell.ACCEPTED


def test_accepted_slices_are_not_trained_on_until_marked(session):
    give_result(session)
    session.results.accept(range(4))
    assert session.ledger.training() == {}


def test_an_accepted_slice_that_is_corrected_is_complete_until_that_is_undone(session):
    give_result(session)
    session.results.accept(range(4))
    plane = (np.array([2]), np.array([10]), np.array([14]))
    session.labels.data_setitem(plane, 1)
    session.poll()
    assert session.ledger.training() == {2: "complete"}
    session.labels.undo()
    session.poll()
    assert session.ledger.states == (Cell.ACCEPTED,) * 4


def test_accepting_a_finished_slice_is_refused(session):
    paint(session, session.slice)
    mark(session, Cell.COMPLETE)
    give_result(session)
    with pytest.raises(UserError, match="stays as you drew it"):
        session.results.accept()


def test_rejecting_removes_the_layer(session, viewer):
    give_result(session)
    session.results.reject()
    assert not _layers.layers_with_role(viewer, "result")
    with pytest.raises(UserError, match="no result"):
        session.results.accept()


def test_strokes_are_saved_within_seconds_and_come_back_after_a_crash(session, viewer, monkeypatch):
    monkeypatch.setattr(_autosave, "SAVE_AFTER", 0.0)
    paint(session, 2)
    mark(session, Cell.COMPLETE, [2])
    add_class(session, "valve")
    session.saved.autosave.wait()  # the paint
    session.poll()
    session.saved.autosave.wait()
    # The program is killed here: nothing is told to the session. Another one opens the same volume.
    other = ViewerModel()
    volume = session.opened.volume
    other.add_image(volume.array, name="scan", **_layers.layer_arguments(volume, "volume"))
    again = Session(other)
    again.poll()
    assert again.saved.offer is not None
    assert again.saved.offer.num_marked == 1
    again.saved.restore()
    np.testing.assert_array_equal(again.labels.data, session.labels.data)
    assert again.ledger.states == session.ledger.states
    assert [entry.name for entry in again.classes] == ["structure", "valve"]
    again.close()


def test_work_that_was_not_restored_is_set_aside_before_it_is_overwritten(session, plugin_home):
    paint(session, 2)
    session.flush()
    other = ViewerModel()
    volume = session.opened.volume
    other.add_image(volume.array, name="scan", **_layers.layer_arguments(volume, "volume"))
    again = Session(other)
    again.poll()
    again.new_labels()
    paint(again, 0)
    again.flush()
    kept = list((plugin_home / "labels").glob("*.npz"))
    assert len(kept) == 2
    again.close()


@pytest.fixture
def open_again(session) -> Callable[[], Session]:
    """Open the same volume in another window."""
    viewers = []

    def open_() -> Session:
        viewers.append(ViewerModel())
        volume = session.opened.volume
        viewers[-1].add_image(volume.array, name="scan", **_layers.layer_arguments(volume, "volume"))
        again = session_for(viewers[-1])
        again.poll()
        return again

    return open_


def painted(labels: np.ndarray) -> list[int]:
    return np.flatnonzero(labels.any(axis=(1, 2))).tolist()


def test_restored_work_is_what_is_saved_also_after_a_scribble(session, open_again):
    for z in (0, 1, 2):
        paint(session, z)
    session.flush()
    again = open_again()
    again.new_labels()
    paint(again, 3)
    again.flush()
    again.saved.restore()
    again.close()
    last = open_again()
    assert painted(last.saved.offer.labels) == [0, 1, 2]


def test_two_windows_on_one_volume_replace_nothing_of_each_other(session, open_again, plugin_home):
    other = open_again()
    other.new_labels()
    said = []
    session.warned.connect(said.append)
    for one, z in ((session, 0), (other, 1), (session, 2)):
        paint(one, z)
        one.flush()
    session.poll()
    kept = [painted(np.load(path)["labels"]) for path in (plugin_home / "labels").glob("*.npz")]
    assert sorted(kept) == [[0], [0, 2], [1]]
    assert "held other work, which is kept as" in said[0]


def test_starting_afresh_leaves_what_was_drawn_meanwhile(session, open_again):
    paint(session, 0)
    session.flush()
    again = open_again()
    again.new_labels()
    paint(again, 3)
    again.flush()
    again.saved.decline()
    again.close()
    last = open_again()
    assert painted(last.saved.offer.labels) == [3]


def test_a_recut_goes_on_in_the_same_file(session, plugin_home):
    paint(session, 1)
    session.recut(0)
    session.flush()
    assert len(list((plugin_home / "labels").glob("*.npz"))) == 1


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that writes nothing until it is let."""
    let = threading.Event()
    write = Sidecar._write
    monkeypatch.setattr(
        Sidecar, "_write", lambda *arguments: write(*arguments) if let.wait(20) else pytest.fail("never let")
    )
    yield let
    let.set()


def test_nothing_waits_for_the_disk_but_what_ends(session, viewer, slow_disk, monkeypatch):
    monkeypatch.setattr(_autosave, "SAVE_AFTER", 0.0)
    first, drawn = session.opened.layer, session.labels
    paint(session, 1)  # begins to save
    paint(session, 2)
    mark(session, Cell.COMPLETE, [1])
    assert take_snapshot(session).statuses == {1: "complete", 2: "partial"}
    second = Volume.from_array(session.opened.volume.array + 1, (8, 1.5, 1.5), name="second")
    session.choose_volume(_layers.add_volume(viewer, second, "second"))
    assert not slow_disk.is_set()
    slow_disk.set()
    session.flush()
    session.choose_volume(first)
    assert session.labels is drawn
    assert painted(session.saved.autosave.load().labels) == [1, 2]


def test_of_a_deleted_layer_the_last_strokes_are_offered(session, viewer, slow_disk):
    paint(session, 1)
    session.save()
    paint(session, 2)
    viewer.layers.remove(session.labels)
    threading.Timer(0.2, slow_disk.set).start()
    session.poll()
    assert painted(session.saved.offer.labels) == [1, 2]


def test_what_could_not_be_saved_is_written_after_another_volume_was_chosen(session, viewer, monkeypatch):
    said = []
    session.warned.connect(said.append)
    first = session.saved.autosave.sidecar
    paint(session, 1)
    with monkeypatch.context() as broken:
        broken.setattr(Sidecar, "_write", _full)
        second = Volume.from_array(session.opened.volume.array + 1, (8, 1.5, 1.5), name="second")
        session.choose_volume(_layers.add_volume(viewer, second, "second"))
        session.saved.autosave.wait()
    session.poll()
    assert "No space left" in said[0]
    session.flush()
    assert painted(first.load().labels) == [1]


def test_saving_takes_less_than_the_promised_ten_seconds():
    from napari_kaf._pulse import INTERVAL

    assert _autosave.SAVE_AFTER + INTERVAL / 1000 < 9


def test_a_deleted_label_layer_can_be_restored(session, viewer):
    paint(session, 2)
    drawn = session.labels.data.copy()
    viewer.layers.remove(session.labels)
    session.poll()
    assert session.labels is None
    session.saved.restore()
    np.testing.assert_array_equal(session.labels.data, drawn)


def test_renaming_layers_changes_nothing(session):
    session.labels.name, session.opened.layer.name = "mine", "other"
    session.poll()
    paint(session, 1)
    assert session.ledger.states[1] is Cell.PARTIAL


def test_a_deleted_volume_leaves_an_empty_state(session, viewer):
    paint(session, 1)
    viewer.layers.clear()
    session.poll()
    assert session.opened is None
    assert len(session.ledger) == 0
    with pytest.raises(UserError, match="no volume"):
        session.new_labels()


def test_labels_of_another_shape_are_not_offered(session, viewer):
    other = viewer.add_labels(np.zeros((3, 12, 16), np.uint8))
    assert _layers.labels_layers(viewer, session.opened.layer) == [session.labels]
    session.labels.data = np.zeros((5, 12, 16), np.uint8)
    said = []
    session.warned.connect(said.append)
    session.poll()
    session.flush()
    assert session.labels is not other
    assert "no longer has the shape" in said[0]


@pytest.mark.parametrize("shape", [(12, 16), (4, 12, 16)])
def test_a_bare_array_asks_for_its_spacing_once(viewer, plugin_home, shape):
    viewer.add_image(np.random.default_rng(1).random(shape).astype(np.float32), name="bare")
    session = Session(viewer)
    session.poll()
    assert not session.opened.spacing_known
    session.new_labels()
    session.give_spacing((5, 1, 1))
    assert session.opened.spacing_known
    assert session.opened.volume.spacing == (5, 1, 1)
    session.labels.data_setitem(tuple(np.array([0]) for _ in shape), 1)
    session.poll()
    assert session.ledger.states[0] is Cell.PARTIAL
    session.flush()
    again = Session(viewer)
    again.poll()
    assert again.opened.volume.spacing == (5, 1, 1)
    session.close()
    again.close()


def test_a_second_volume_has_labels_of_its_own(session, viewer):
    paint(session, 1)
    volume = Volume.from_array(np.arange(60, dtype=np.int16).reshape(3, 4, 5), (2, 1, 1), name="second")
    layer = viewer.add_image(volume.array, name="second", **_layers.layer_arguments(volume, "volume"))
    session.poll()
    assert session.opened.layer is not layer  # what is worked on does not change by itself
    first, first_labels = session.opened.layer, session.labels
    session.choose_volume(layer)
    assert session.labels is None
    session.choose_volume(first)
    assert session.labels is first_labels
    assert session.ledger.states[1] is Cell.PARTIAL
    assert session.saved.offer is None


def test_what_cannot_be_saved_is_told_once_and_tried_again(session, monkeypatch):
    said = []
    session.warned.connect(said.append)
    with monkeypatch.context() as broken:
        broken.setattr(Sidecar, "_write", _full)
        for z in (0, 1):
            paint(session, z)
            session.flush()
            session.poll()
    assert len(said) == 1
    assert "No space left" in said[0]
    session.flush()  # still pending, and there is room again
    assert session.saved.autosave.sidecar.load().num_marked == 2


def test_a_shapes_layer_does_no_harm(make_napari_viewer, plugin_home, nothing_left):
    viewer = make_napari_viewer()
    viewer.add_image(np.zeros((3, 8, 9)))
    viewer.add_shapes([np.array([[0, 0, 0], [0, 4, 4]]), np.zeros((5, 3))], shape_type="path")
    session = session_for(viewer)
    session.poll()
    assert session.opened is not None


def test_a_volume_is_cut_along_another_axis_with_its_labels(session, viewer):
    paint(session, 1)
    paint(session, 2, value=2)
    mark(session, Cell.COMPLETE, [1])
    drawn = session.labels.data.copy()
    session.recut(0)
    assert session.opened.volume.shape == (16, 4, 12)  # stored (x, y, z); Y runs down from the top slice
    assert {layer.data.shape for layer in viewer.layers} == {(16, 4, 12)}
    assert np.count_nonzero(session.labels.data) == np.count_nonzero(drawn)
    assert session.ledger.states[4:9] == (Cell.PARTIAL,) * 5
    assert session.ledger.states[3] is Cell.UNTOUCHED
    assert [entry.value for entry in session.classes] == [1, 2]
    session.recut(2)
    np.testing.assert_array_equal(session.labels.data, drawn)


def test_work_on_another_cut_is_restored_in_that_cut(session, viewer):
    paint(session, 1)
    session.recut(0)
    mark(session, Cell.PARTIAL, [4])
    drawn = session.labels.data.copy()
    session.flush()
    other = ViewerModel()
    volume = session.opened.volume.along(2)
    other.add_image(volume.array, name="scan", **_layers.layer_arguments(volume, "volume"))
    again = Session(other)
    again.poll()
    assert again.opened.volume.shape == SHAPE
    again.saved.restore()
    assert again.opened.volume.shape == (16, 4, 12)
    np.testing.assert_array_equal(again.labels.data, drawn)
    again.close()


def test_while_a_task_runs_the_volume_is_not_recut(session):
    session.set_busy("Finetuning")
    with pytest.raises(UserError, match="Finetuning is running"):
        session.recut(0)


def test_labels_of_another_height_and_width_are_noticed(session):
    said = []
    session.warned.connect(said.append)
    session.labels.data = np.zeros((SHAPE[0], 10, 10), np.uint8)
    session.poll()
    assert "no longer has the shape" in said[0]
    assert session.labels is None


def test_two_volumes_of_one_grid_share_no_labels(session, viewer):
    paint(session, 1)
    give_result(session)
    volume = session.opened.volume
    second = Volume.from_array(volume.array + 1, volume.spacing, name="second")
    layer = _layers.add_volume(viewer, second, "second")
    first, first_labels = session.opened.layer, session.labels
    session.choose_volume(layer)
    assert session.labels is None
    assert not _layers.layers_with_role(viewer, "result", layer)
    _layers.bring_forward(viewer, layer)
    assert [shown.name for shown in viewer.layers if shown.visible] == ["second"]
    session.choose_volume(first)
    assert session.labels is first_labels


def test_choosing_a_volume_shows_a_slice_of_it(session, viewer):
    volume = Volume.from_array(np.arange(2400, dtype=np.int16).reshape(40, 6, 10), (8, 2, 2), name="long")
    layer = _layers.add_volume(viewer, volume, "long")
    _layers.go_to(viewer, layer, 38)
    _layers.bring_forward(viewer, layer)
    assert _layers.current_slice(viewer, layer) == 38
    _layers.bring_forward(viewer, session.opened.layer)  # it has 4 slices
    assert session.slice == 2
