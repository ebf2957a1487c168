"""The session on a viewer model, without a window: labels, ledger, saving, results."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import dask.array as da
import nibabel as nib
import numpy as np
import pytest
from napari.components import ViewerModel
from napari.layers import Labels, Layer
from napari.layers._layer_actions import _duplicate_layer

from kaf_model.errors import UserError
from kaf_model.volume import Volume
from napari_kaf import _autosave, _layers
from napari_kaf._classes import add_class, entries_of, remove_class
from napari_kaf._ledger import Cell
from napari_kaf._marking import mark
from napari_kaf._reader import read_layers
from napari_kaf._runs import Run
from napari_kaf._session import Session, session_for
from napari_kaf._sidecar import Sidecar
from napari_kaf._snapshot import take_snapshot
from napari_kaf._writer import write_labels_layer

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


@pytest.mark.parametrize(("order", "ndisplay"), [((1, 0, 2), 2), ((0, 1, 2), 3)])
def test_a_slice_that_is_not_shown_is_neither_marked_nor_filled(session, viewer, order, ndisplay):
    give_result(session)
    viewer.dims.order, viewer.dims.ndisplay = order, ndisplay
    for act in (lambda: mark(session, Cell.EMPTY), session.results.accept):
        with pytest.raises(UserError, match="not shown one by one"):
            act()
    assert session.ledger.states == (Cell.UNTOUCHED,) * 4
    assert not session.labels.data.any()
    mark(session, Cell.EMPTY, [1])  # said by its number
    viewer.dims.order, viewer.dims.ndisplay = (0, 2, 1), 2
    session.go_to(2)
    mark(session, Cell.EMPTY)
    assert session.ledger.states == (Cell.UNTOUCHED, Cell.EMPTY, Cell.EMPTY, Cell.UNTOUCHED)


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


def test_a_stroke_through_the_volume_completes_only_the_slice_that_is_shown(session):
    give_result(session)
    session.results.accept(range(4))
    session.go_to(2)
    where = np.nonzero(np.broadcast_to(np.eye(12, 16, dtype=bool), SHAPE))
    session.labels.data_setitem(where, 0)
    session.poll()
    accepted, complete = Cell.ACCEPTED, Cell.COMPLETE
    assert session.ledger.states == (accepted, accepted, complete, accepted)
    corrected = session.labels.data.copy()
    give_result(session, value=2)
    session.results.accept(range(4))
    np.testing.assert_array_equal(session.labels.data, corrected)  # it stays as it was corrected
    session.labels.undo()
    session.poll()
    assert session.ledger.states == (accepted,) * 4
    session.results.accept(range(4))
    assert (session.labels.data == session.results.labels).all()  # and is what a result may replace again


def test_accepting_all_leaves_what_was_painted_by_hand_whenever_it_was(session):
    given = np.zeros(SHAPE, np.uint8)
    given[1, 3:6, 4:9] = 3  # painted before anybody watched, so it is untouched
    session.choose_labels(session.viewer.add_labels(given))
    paint(session, 2, value=4)
    assert session.ledger.states == (Cell.UNTOUCHED, Cell.UNTOUCHED, Cell.PARTIAL, Cell.UNTOUCHED)
    drawn = session.labels.data.copy()
    for value in (1, 2):  # the second result replaces the first alone
        result = give_result(session, value)
        session.results.accept(range(4))
        np.testing.assert_array_equal(session.labels.data, np.where(drawn, drawn, result))
    session.labels.undo()
    session.labels.undo()
    session.poll()
    session.go_to(1)
    result = give_result(session, 2)
    session.results.accept()  # of the slice that is looked at, the result counts
    np.testing.assert_array_equal(session.labels.data[1], result[1])


@pytest.mark.parametrize("axis", [None, 1])
def test_what_was_painted_by_hand_is_known_after_a_restart_and_along_another_axis(session, viewer, axis):
    paint(session, 2, value=4)
    give_result(session)
    session.results.accept(range(4))
    session.flush()
    if axis is None:
        viewer.layers.remove(session.labels)
        session.poll()
        session.saved.restore()
    else:
        session.recut(axis)
    drawn = session.labels.data == 4
    assert drawn.any()
    session.results.show(None, np.full(session.labels.data.shape, 2, np.uint8))
    session.results.accept(range(len(session.ledger)))
    np.testing.assert_array_equal(session.labels.data, np.where(drawn, 4, 2))


def test_undo_brings_back_what_the_user_had_said(session):
    give_result(session)
    session.results.accept(range(4))
    mark(session, Cell.COMPLETE, [2])
    session.labels.data_setitem((np.array([2]), np.array([10]), np.array([14])), 1)
    session.poll()
    session.labels.undo()
    session.poll()
    assert session.ledger.training() == {2: "complete"}
    session.labels.undo()
    session.poll()
    assert session.ledger.states == (Cell.UNTOUCHED,) * 4
    session.labels.redo()
    session.poll()
    assert session.ledger.training() == {2: "complete"}


def test_a_dab_that_is_undone_leaves_an_empty_slice_empty(session):
    mark(session, Cell.EMPTY, [3])
    paint(session, 3)
    assert session.ledger.states[3] is Cell.PARTIAL
    session.labels.undo()
    session.poll()
    assert session.ledger.states[3] is Cell.EMPTY


def test_a_slice_marked_complete_stays_so_when_its_last_stroke_is_undone(session):
    paint(session, 1)
    session.labels.data_setitem((np.array([1]), np.array([10]), np.array([14])), 1)
    session.poll()
    mark(session, Cell.COMPLETE, [1])
    session.labels.undo()
    session.poll()
    assert session.ledger.states[1] is Cell.COMPLETE


def test_a_result_is_accepted_into_labels_that_are_hidden(session, viewer):
    """napari keeps no slice of a hidden layer, and would stop half way."""
    result = give_result(session)
    session.labels.visible = False
    session.go_to(3)
    viewer.layers.selection.active = _layers.layers_with_role(viewer, "result")[0]
    session.results.accept(range(4))
    np.testing.assert_array_equal(session.labels.data, result)
    assert session.ledger.states == (Cell.ACCEPTED,) * 4
    assert session.labels.visible
    assert viewer.layers.selection.active is session.labels  # where Ctrl+Z takes it back
    session.labels.undo()
    session.poll()
    assert session.ledger.states == (Cell.UNTOUCHED,) * 4


def test_undo_brings_back_what_was_said_also_after_another_volume(session, viewer):
    paint(session, 1)
    give_result(session)
    session.results.accept(range(4))
    first = session.opened.layer
    second = Volume.from_array(session.opened.volume.array + 1, (8, 1.5, 1.5), name="second")
    session.choose_volume(_layers.add_volume(viewer, second, "second"))
    session.choose_volume(first)
    session.labels.undo()
    session.poll()
    assert session.ledger.states == (Cell.UNTOUCHED, Cell.PARTIAL, Cell.UNTOUCHED, Cell.UNTOUCHED)
    session.choose_volume(None)
    session.choose_volume(first)
    session.labels.redo()
    session.poll()
    assert session.ledger.states == (Cell.ACCEPTED,) * 4


def test_a_mark_is_not_undone_with_the_stroke_before_it_also_after_another_volume(session):
    paint(session, 1)
    first = session.opened.layer
    session.choose_volume(None)
    session.choose_volume(first)
    mark(session, Cell.COMPLETE, [1])
    session.labels.undo()
    session.poll()
    assert session.ledger.states[1] is Cell.COMPLETE


def test_a_result_that_calls_a_value_otherwise_is_told(session):
    said = []
    session.warned.connect(said.append)
    paint(session, 1)
    give_result(session)
    session.results.accept()
    assert not said  # nobody has named it
    session.set_classes(entries_of({1: "right ventricle"}))
    session.results.show(None, give_result(session), {1: "left ventricle"})
    session.results.accept(range(4))
    assert said == [
        "1 is right ventricle in your labels and left ventricle in the result you accepted; if they are not the same, "
        "Ctrl+Z takes it back"
    ]


def test_what_is_shown_of_a_hidden_volume_is_hidden(session, viewer):
    first = session.opened
    second = Volume.from_array(first.volume.array + 1, (8, 1.5, 1.5), name="second")
    layer = _layers.add_volume(viewer, second, "second")
    found = np.ones(SHAPE, np.uint8)
    for seen in (True, False):
        first.layer.visible, layer.visible = seen, not seen
        assert _layers.show(viewer, first, found, "result", name="result").visible is seen
        _layers.remove(viewer, "result")
    first.layer.visible = layer.visible = False
    assert _layers.show(viewer, first, found, "result", name="result").visible  # looked at alone


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


def test_a_result_is_the_shown_one_again_when_its_volume_is_chosen_again(session, viewer):
    result = give_result(session)
    first = session.opened.layer
    volume = Volume.from_array(session.opened.volume.array + 1, (8, 1.5, 1.5), name="second")
    session.choose_volume(_layers.add_volume(viewer, volume, "second"))
    assert session.results.labels is None
    session.choose_volume(first)
    np.testing.assert_array_equal(session.results.labels, result)
    session.results.accept(range(4))
    np.testing.assert_array_equal(session.labels.data, result)


def test_an_accepted_result_brings_its_classes(session, viewer):
    names = {0: "background", 1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
    result = np.zeros(SHAPE, np.uint8)
    result[2, 2:5, 2:10] = 1
    result[2, 5:8, 2:10] = 3
    session.results.show(None, result, names)
    session.results.accept(range(4))
    # Nobody had named or painted the first class of the new labels.
    assert {entry.value: entry.name for entry in session.classes} == {k: names[k] for k in (1, 2, 3)}
    assert _layers.class_names(session.labels) == {k: names[k] for k in (1, 2, 3)}
    session.labels.undo()
    session.poll()
    paint(session, 0, value=4)
    session.results.show(None, result, {1: "muscle", 4: "valve"})
    session.results.accept(range(4))
    assert [entry.name for entry in session.classes] == [*list(names.values())[1:], "class 4"]  # painted so


def test_a_copy_of_a_result_is_the_users(session, viewer):
    give_result(session)
    (result,) = _layers.layers_with_role(viewer, "result")
    copy = Labels(result.data.copy(), name="mine", metadata=result.metadata)
    viewer.add_layer(copy)
    session.results.reject()
    assert copy in viewer.layers
    assert result not in viewer.layers
    session.choose_labels(copy)
    session.set_classes([*session.classes, *entries_of({7: "valve"})])
    assert 7 not in _layers.class_names(result)


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
    assert session.saved.autosave._writing  # still
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


def save_as_nifti(layer, path: Path) -> nib.Nifti1Image:
    """What File > Save makes of a labels layer."""
    data, arguments, _kind = layer.as_layer_data_tuple()
    assert write_labels_layer(str(path), data, arguments) == [str(path)]
    return nib.load(path)


def test_labels_that_napari_made_are_saved_on_the_grid_of_their_volume(viewer, plugin_home, tmp_path):
    affine = np.array([[-1.5, 0, 0, 90], [0, 1.5, 0, -126], [0, 0, 8, -72], [0, 0, 0, 1.0]])
    scan = nib.Nifti1Image(np.arange(768, dtype=np.int16).reshape(16, 12, 4) * 7, affine)
    nib.save(scan, tmp_path / "scan.nii.gz")
    viewer.add_layer(Layer.create(*read_layers(str(tmp_path / "scan.nii.gz"))[0]))
    session = Session(viewer)
    session.poll()
    viewer._new_labels()
    session.poll()
    assert session.labels is viewer.layers[-1]
    paint(session, 2)
    saved = save_as_nifti(session.labels, tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(saved.affine, affine)
    stored = session.opened.volume.to_stored(session.labels.data)
    np.testing.assert_array_equal(np.asarray(saved.dataobj), stored)
    session.close()


def test_a_voxel_size_that_is_given_late_is_saved_with_the_labels(viewer, plugin_home, tmp_path):
    viewer.add_image(np.random.default_rng(1).random(SHAPE).astype(np.float32), name="bare")
    session = Session(viewer)
    session.poll()
    viewer._new_labels()
    session.poll()
    session.new_labels()
    session.give_spacing((8, 1.5, 1.5))
    for number, layer in enumerate(_layers.labels_layers(viewer, session.opened.layer)):
        saved = save_as_nifti(layer, tmp_path / f"{number}.nii.gz")
        assert saved.header.get_zooms() == (1.5, 1.5, 8)
    assert number == 1
    session.close()


def test_voxels_that_are_replaced_are_worked_on_in_the_same_place(session, viewer):
    paint(session, 1)
    drawn, affine, key = session.labels, session.opened.volume.affine, session.saved.volume_key
    layer = session.opened.layer
    filtered = layer.data[:, ::-1] + 1
    told = []
    session.volume_changed.connect(lambda: told.append(session.opened))
    layer.data = filtered
    np.testing.assert_array_equal(told[0].volume.array, filtered)
    np.testing.assert_array_equal(session.opened.volume.affine, affine)
    assert session.opened.spacing_known
    assert session.labels is drawn
    session.choose_volume(None)
    session.choose_volume(layer)
    np.testing.assert_array_equal(session.opened.volume.array, filtered)
    assert session.labels is drawn
    assert session.saved.volume_key == key  # what was saved before is found again, and goes on


def test_a_changed_copy_of_a_volume_is_opened_with_its_own_voxels(session, viewer):
    viewer.layers.selection = {session.opened.layer}
    _duplicate_layer(viewer.layers)
    (copy,) = (layer for layer in _layers.image_layers(viewer) if layer is not session.opened.layer)
    copy.data += 1
    opened = _layers.open_volume(copy)
    np.testing.assert_array_equal(opened.volume.array, session.opened.volume.array + 1)
    np.testing.assert_array_equal(opened.volume.affine, session.opened.volume.affine)


def test_a_volume_that_becomes_another_shape_lets_go_of_its_labels(session, viewer):
    paint(session, 1)
    layer, drawn = session.opened.layer, session.labels
    layer.data = np.zeros((7, 8, 9), np.int16)
    assert session.opened.volume.shape == (7, 8, 9)
    assert session.labels is None
    assert drawn in viewer.layers
    warned = []
    session.warned.connect(warned.append)
    layer.data = np.zeros((7, 8, 9), bool)
    assert session.opened is None
    assert "real numbers" in warned[0]


def test_voxels_that_are_not_finite_are_filled_and_told(viewer, plugin_home):
    array = np.random.default_rng(1).random(SHAPE).astype(np.float32)
    array[0, 0, :2] = np.nan, np.inf
    layer = viewer.add_image(array, name="nan", scale=(8, 1, 1), units="mm", contrast_limits=(0, 1))
    session = Session(viewer)
    session.poll()
    for _ in range(2):
        volume = session.opened.volume
        np.testing.assert_array_equal(volume.array, np.where(np.isfinite(array), array, 0))
        assert volume.notices == ("2 voxels that were NaN or infinite are set to 0",)
        session.give_spacing((5, 1, 1))
    assert np.isnan(layer.data[0, 0, 0])
    layer.data = np.where(array > 0.9, np.nan, 1)
    assert np.isfinite(session.opened.volume.array).all()
    assert "NaN" in session.opened.volume.notices[-1]
    session.close()


def test_a_lazy_array_that_no_memory_holds_is_not_read(viewer, plugin_home):
    lazy = da.zeros((10_000, 20_000, 20_000), dtype=np.uint16, chunks=(1, 20_000, 20_000))
    viewer.add_image(lazy, name="huge", contrast_limits=(0, 1), visible=False)
    session = Session(viewer)
    said = []
    session.warned.connect(said.append)
    session.poll()
    assert session.opened is None
    (told,) = said
    assert told.startswith("huge: its 8000 GB are more than")
    session.close()


def test_a_lazy_array_is_read_once(viewer, plugin_home):
    read = []

    def plane(block_info=None) -> np.ndarray:
        read.append(block_info)
        return np.ones((1, 12, 16), np.int16)

    lazy = da.map_blocks(plane, chunks=((1,) * 4, (12,), (16,)), meta=np.empty((0, 0, 0), np.int16))
    layer = viewer.add_image(lazy, name="lazy", scale=(8, 1, 1), units="mm", contrast_limits=(0, 2))
    session = Session(viewer)
    session.poll()
    session.new_labels()
    opened = len(read)
    session.go_to(3)
    shown = len(read) - opened
    assert session.slice == 3
    assert _layers.labels_layers(viewer, layer) == [session.labels]
    _layers.bring_forward(viewer, layer)
    session.poll()
    assert len(read) == opened + shown
    session.close()


def test_an_image_of_several_scales_is_picked_up_and_let_go(viewer, plugin_home):
    session = Session(viewer)
    session.poll()
    array = np.random.default_rng(1).random((4, 24, 32)).astype(np.float32)
    layer = viewer.add_image([array, array[:, ::2, ::2]], name="pyramid", multiscale=True)
    session.poll()
    assert session.opened is not None
    assert session.opened.volume.shape == array.shape
    viewer.layers.remove(layer)
    session.poll()
    assert session.opened is None
    session.close()


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


def test_what_cannot_be_saved_is_told_and_tried_again(session, viewer, monkeypatch):
    said = []
    session.warned.connect(said.append)
    with monkeypatch.context() as broken:
        broken.setattr(Sidecar, "_write", _full)
        for z in (0, 1):
            paint(session, z)
            session.flush()
            session.poll()
        assert "No space left" in session.unsaved
    assert len(said) == 1
    assert "No space left" in said[0]
    session.flush()  # still pending, and there is room again
    session.poll()
    assert session.saved.autosave.sidecar.load().num_marked == 2
    assert session.unsaved == ""
    with monkeypatch.context() as broken:
        broken.setattr(Sidecar, "_write", _full)
        paint(session, 2)
        session.flush()
        session.poll()
        assert len(said) == 2  # it is news again
        viewer.layers.remove(session.labels)
        session.poll()
        assert painted(session.saved.offer.labels) == [0, 1, 2]  # not what was written before
        session.saved.restore()
        assert painted(session.labels.data) == [0, 1, 2]


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


def test_after_a_cut_the_brush_is_on_the_labels_that_are_kept(session, viewer):
    paint(session, 1)
    reference = viewer.add_labels(np.ones(SHAPE, np.uint8), name="scan reference", scale=(8, 1.5, 1.5))
    _layers.set_classes(reference, entries_of({1: "liver"}))
    _layers.note(reference, file="scan_reference.nii.gz")
    session.recut(0)
    assert viewer.layers.selection.active is session.labels
    assert painted(session.labels.data)
    (cut,) = (layer for layer in viewer.layers if layer.name == "scan reference")
    assert cut is not session.labels
    assert _layers.class_names(cut) == {1: "liver"}
    assert _layers.file_of(cut) == Path("scan_reference.nii.gz")


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


def test_labels_of_files_go_with_the_volume_they_are_named_like(viewer, plugin_home):
    names = ("patient_frame01", "patient_frame01_gt", "patient_frame12", "patient_frame12_gt")
    grey = np.random.default_rng(0).integers(0, 500, (2, *SHAPE)).astype(np.int16)
    for name, array in zip(names[::2], grey, strict=True):
        volume = Volume.from_array(array, (8, 1.5, 1.5), name=name)
        _layers.add_volume(viewer, volume, name)
        viewer.add_labels(np.zeros(SHAPE, np.uint8), name=f"{name}_gt")
    first, first_labels, second, second_labels = viewer.layers
    session = Session(viewer)
    session.poll()  # works on what is seen
    assert (session.opened.layer, session.labels) == (second, second_labels)
    session.choose_volume(first)
    assert session.labels is first_labels
    session.choose_volume(second)
    session.choose_labels(first_labels)  # somebody may want them; once drawn on they are his
    paint(session, 1)
    assert first_labels not in _layers.labels_layers(viewer, first)
    session.choose_volume(first)
    assert session.labels is None
    session.choose_volume(second)
    assert session.labels is first_labels
    session.close()


def test_who_paints_on_other_labels_is_told_once(session, viewer):
    said = []
    session.warned.connect(said.append)
    viewer.add_labels(np.zeros(SHAPE, np.uint8), name="others")
    session.poll()
    assert not said
    viewer.layers.selection.active.mode = "paint"
    session.poll()
    session.poll()
    assert len(said) == 1
    assert "about to paint on others, but scan labels is what is kept" in said[0]
    viewer.layers.selection.active = session.labels
    session.poll()
    viewer.layers.selection.active = viewer.layers["others"]
    session.poll()
    assert len(said) == 2


def test_labels_stay_with_a_volume_that_is_opened_again(session, viewer):
    paint(session, 1)
    drawn, image, volume = session.labels, session.opened.layer, session.opened.volume
    other = _layers.add_volume(
        viewer, Volume.from_array(volume.array + 1, volume.spacing, name="other"), "other"
    )
    viewer.layers.remove(image)
    session.poll()
    session.choose_volume(other)
    assert session.labels is None
    session.choose_volume(_layers.add_volume(viewer, volume, "scan"))
    assert session.labels is drawn
    session.close()


def test_choosing_a_volume_shows_a_slice_of_it(session, viewer):
    volume = Volume.from_array(np.arange(2400, dtype=np.int16).reshape(40, 6, 10), (8, 2, 2), name="long")
    layer = _layers.add_volume(viewer, volume, "long")
    _layers.go_to(viewer, layer, 38)
    _layers.bring_forward(viewer, layer)
    assert _layers.current_slice(viewer, layer) == 38
    _layers.bring_forward(viewer, session.opened.layer)  # it has 4 slices
    assert session.slice == 2
