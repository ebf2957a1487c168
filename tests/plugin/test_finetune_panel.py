"""The Finetune panel: what it says when something is missing, and a short training from click to result."""

from __future__ import annotations

import operator
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QApplication, QFileDialog, QInputDialog, QLabel, QMessageBox, QWidget

from kaf_model.checkpoint import load_header
from kaf_model.errors import UserError
from kaf_model.progress import Progress
from kaf_model.volume import Volume
from napari_kaf import _finetune_task, _layers
from napari_kaf._classes import add_class
from napari_kaf._finetune_task import FinetuneOutcome, FinetuneRequest, SlicePreview
from napari_kaf._jobs import Job, Report
from napari_kaf._keys import KEYS
from napari_kaf._ledger import Cell
from napari_kaf.widgets._panel import completed


def finish(panel, qtbot) -> None:
    qtbot.waitUntil(lambda: not panel.session.busy, timeout=300_000)


def test_it_opens_in_under_a_second_once_napari_is_up(make_napari_viewer, plugin_home, nothing_left):
    viewer = make_napari_viewer()
    import napari_kaf.widgets.finetune  # what the first opening imports is timed by test_manifest's subprocess

    began = time.process_time()
    napari_kaf.widgets.finetune.FinetuneWidget(viewer).close()
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize(("device", "channels", "slices"), [("cpu", 8, 4), ("cuda", 16, 12)])
def test_a_gpu_trains_a_larger_network_with_larger_batches(monkeypatch, device, channels, slices):
    import torch

    monkeypatch.setattr("kaf_model.engine.choose_device", torch.device)
    request = SimpleNamespace(
        device=device, preset="small", architecture="unet", seconds=60.0, hold_out=False, start=None
    )
    assert _finetune_task._origin(request)["config"].start_channels == channels
    training = _finetune_task._training(request)
    assert (training.batch_size, training.time_budget) == (slices, 60.0)


def test_the_empty_state_says_what_to_do(open_panel):
    _viewer, panel = open_panel("Finetune")
    assert "Open a volume" in panel.volume.about.text()
    assert not panel.training.row.button.isEnabled()
    assert not panel.labels.new.isEnabled()


def test_layers_that_are_open_are_picked_up(open_panel, small_heart):
    viewer, panel = open_panel("Finetune", small_heart)
    assert panel.volume.box.currentText() == "heart_003"
    assert "5 slices of 48 x 64" in panel.volume.about.text()
    assert "oblique" in panel.volume.notices.text()
    assert set("".join(viewer.canvas.overlays.text.text.split())) == set("APRL+")


def test_finetune_without_a_marked_slice_says_so(open_panel, small_heart, notifications):
    _viewer, panel = open_panel("Finetune", small_heart)
    panel.labels.new.click()
    panel.training.row.button.click()
    assert "no slice is marked yet" in notifications[-1]
    assert panel.training.row.button.isEnabled()


def test_one_class_only_is_explained_and_everything_stays_usable(
    open_panel, small_heart, notifications, qtbot
):
    _viewer, panel = open_panel("Finetune", small_heart)
    panel.labels.new.click()
    panel.session.labels.data_setitem((np.array([1]), np.array([20]), np.array([20])), 1)
    panel.session.poll()  # partial: nothing is known to be background
    panel.training.row.button.click()
    finish(panel, qtbot)
    assert "no background" in notifications[-1]
    assert panel.training.row.button.isEnabled()
    assert panel.training.row.button.text() == "Finetune"
    assert not panel.session.results.runs


def test_from_click_to_history(labelled, qtbot, notifications):
    viewer, panel = labelled
    drawn = panel.session.labels.data.copy()
    panel.training.row.button.click()
    assert panel.training.row.button.text() == "Cancel"
    panel.session.labels.data_setitem((np.array([0]), np.array([5]), np.array([5])), 1)  # painting goes on
    finish(panel, qtbot)
    session = panel.session
    assert session.results.labels.shape == drawn.shape
    assert not _layers.layers_with_role(viewer, "preview")
    assert session.results.runs[0].labelled == {
        1: "complete",
        3: "complete",
    }  # not what was painted meanwhile
    assert session.results.runs[0].steps >= 1
    assert len(panel.training.curve.points("total")) == session.results.runs[0].steps
    model = load_header(session.results.store.model_path(session.results.runs[0].key))["model"]
    assert model["architecture"] == "unet"
    assert viewer.layers.selection.active is session.labels
    assert panel.training.form.model.box.count() == 2  # from scratch, and this run
    panel.history.table.selectRow(0)
    session.results.store.rename(session.results.runs[0], "best")
    session.results.reload()
    assert panel.history.table.item(0, 0).text() == "best"
    session.results.reject()
    panel.history.show_it.click()
    assert session.results.labels is not None
    panel.history.compare.click()
    assert _layers.layers_with_role(viewer, "comparison")


def test_cancel_stops_soon_and_keeps_the_best_so_far(labelled, qtbot):
    _viewer, panel = labelled
    panel.training.form.minutes.setValue(60)
    panel.training.row.button.click()
    qtbot.waitUntil(lambda: len(panel.training.curve.points("total")) >= 1, timeout=300_000)
    panel.training.row.button.click()
    assert not panel.training.row.button.isEnabled()
    finish(panel, qtbot)
    (run,) = panel.session.results.runs
    assert run.stopped
    assert panel.session.results.store.model_path(run.key).is_file()
    assert not list(panel.session.results.store.folder.glob("*.resume.*"))


def test_cancel_stops_within_a_long_step(labelled, qtbot, monkeypatch):
    _viewer, panel = labelled
    from torch.nn import Conv2d

    slow, forward = threading.Event(), Conv2d.forward

    def slowly(self: Conv2d, image: object) -> object:
        if slow.is_set():
            time.sleep(0.5)  # a step of many layers then takes a quarter of a minute
        return forward(self, image)

    monkeypatch.setattr(Conv2d, "forward", slowly)
    panel.training.form.minutes.setValue(60)
    panel.training.row.button.click()
    curve = panel.training.curve
    qtbot.waitUntil(lambda: len(curve.points("total")) >= 1, timeout=300_000)
    slow.set()
    qtbot.wait(1000)  # well within a step
    asked = time.monotonic()
    panel.training.row.button.click()
    qtbot.waitUntil(lambda: "segmenting" in panel.training.row.status.text(), timeout=120_000)
    slow.clear()
    assert time.monotonic() - asked < 8  # the step alone takes longer
    finish(panel, qtbot)
    (run,) = panel.session.results.runs
    assert run.steps == len(curve.points("total"))
    assert panel.session.results.labels is not None


def test_what_nothing_can_interrupt_is_not_waited_for(labelled, qtbot, monkeypatch):
    _viewer, panel = labelled
    imported = threading.Event()

    def importing(request: FinetuneRequest, control: object):
        yield from ()
        imported.wait(60)

    monkeypatch.setattr("napari_kaf.widgets._training_section.finetune_task", importing)
    panel.training.row.button.click()
    qtbot.wait(100)
    asked = time.monotonic()
    panel.training.row.button.click()
    finish(panel, qtbot)
    assert time.monotonic() - asked < 2
    assert panel.training.row.status.text() == "Stopped before anything was learnt."
    assert panel.training.row.button.isEnabled()
    imported.set()


def test_looking_at_another_volume_leaves_the_preview_on_the_first(labelled, qtbot, monkeypatch):
    viewer, panel = labelled
    waiting = threading.Event()

    elsewhere = threading.Event()

    def learning(request: FinetuneRequest, control: object):
        elsewhere.wait(60)
        yield SlicePreview(2, np.ones((48, 64), np.uint8))
        waiting.wait(60)

    monkeypatch.setattr("napari_kaf.widgets._training_section.finetune_task", learning)
    first = panel.session.opened.layer
    panel.training.row.button.click()
    panel.session.go_to(2)
    assert panel.life.job.control.slice == 2
    longer = Volume.from_array(
        np.arange(48_000, dtype=np.int16).reshape(30, 40, 40), (8, 2, 2), name="longer"
    )
    other = _layers.add_volume(viewer, longer, "longer")
    panel.session.choose_volume(other)
    panel.session.go_to(29)
    assert panel.life.job.control.slice == 2
    first.visible = False
    elsewhere.set()
    qtbot.waitUntil(lambda: bool(_layers.layers_with_role(viewer, "preview")), timeout=30_000)
    (preview,) = _layers.layers_with_role(viewer, "preview", first)
    assert not preview.visible  # nor is its volume
    assert list(_layers.class_names(preview)) == [1]
    assert not _layers.layers_with_role(viewer, "preview", other)
    panel.session.choose_volume(first)
    panel.session.go_to(4)
    assert panel.life.job.control.slice == 4
    panel.training.row.button.click()
    finish(panel, qtbot)
    waiting.set()


def test_a_second_cancel_takes_what_was_last_seen(labelled, qtbot, monkeypatch):
    _viewer, panel = labelled
    from napari_kaf import _finetune_task

    monkeypatch.setattr(_finetune_task, "FIRST_VOLUME_PREVIEW", 0.0)
    panel.training.form.minutes.setValue(60)
    seen: list[np.ndarray] = []
    shown = panel.training._show_preview
    panel.training._show_preview = lambda report: (seen.append(report), shown(report))
    panel.training.row.button.click()
    qtbot.waitUntil(lambda: bool(seen), timeout=300_000)
    job = panel.life.job
    job.control.cancel()
    job.control.cancel()
    finish(panel, qtbot)
    np.testing.assert_array_equal(panel.session.results.labels, seen[-1].labels)


def test_previews_are_not_counted_as_training(labelled, qtbot, monkeypatch):
    _viewer, panel = labelled
    from napari_kaf._finetune_task import _Previews

    pauses = iter([10.0])

    def slow(_previews: object, progress: Progress):
        if progress.preview is not None:
            time.sleep(next(pauses, 0.0))
        yield from ()

    monkeypatch.setattr(_Previews, "due", slow)
    panel.training.row.button.click()
    finish(panel, qtbot)
    assert 1.0 < panel.session.results.runs[0].seconds < 15.0  # and not 16
    assert " s of training." in panel.training.row.status.text()


def test_closing_the_panel_ends_the_training(labelled, qtbot):
    viewer, panel = labelled
    panel.training.form.minutes.setValue(60)
    panel.training.row.button.click()
    qtbot.waitUntil(lambda: len(panel.training.curve.points("total")) >= 1, timeout=300_000)
    assert _layers.layers_with_role(viewer, "preview")
    worker, results = panel.life.job._worker, panel.session.results
    viewer.window.remove_dock_widget("all")
    qtbot.waitUntil(lambda: not worker.is_running, timeout=20_000)
    assert "Shift-C" not in [str(key) for key in viewer.keymap]
    assert not _layers.layers_with_role(viewer, "preview")
    _dock, again = viewer.window.add_plugin_dock_widget("napari-kaf", "Finetune")
    (run,) = again.session.results.runs  # what it had learnt is not lost
    assert run.steps >= 1
    again.history.table.selectRow(0)
    assert not results.store.has_result(run)
    again.history.show_it.click()  # makes the result
    finish(again, qtbot)
    assert results.labels.shape == again.session.opened.volume.shape
    assert results.store.has_result(run)


def test_deleting_the_volume_while_it_trains_does_no_harm(labelled, qtbot, notifications):
    viewer, panel = labelled
    panel.training.row.button.click()
    viewer.layers.clear()
    finish(panel, qtbot)
    qtbot.wait(300)
    assert panel.session.opened is None
    assert "choose that volume and Show the run" in notifications[-1]


def test_a_broken_checkpoint_is_answered(open_panel, small_heart, tmp_path):
    _viewer, panel = open_panel("Finetune", small_heart)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"broken\.safetensors cannot be used"):
        panel.training.form.model.add_file(broken)


def test_an_unforeseen_error_becomes_a_message_with_its_details_kept(
    labelled, qtbot, notifications, monkeypatch, plugin_home
):
    _viewer, panel = labelled

    def burst(request: FinetuneRequest, control: object):
        yield from ()
        raise ZeroDivisionError("some library")

    monkeypatch.setattr("napari_kaf.widgets._training_section.finetune_task", burst)
    panel.training.row.button.click()
    finish(panel, qtbot)
    assert "ZeroDivisionError: some library" in notifications[-1]
    assert "ZeroDivisionError" in (plugin_home / "errors.log").read_text()
    assert panel.training.row.button.isEnabled()


def test_a_second_click_while_a_training_is_begun_begins_no_other(labelled, qtbot, monkeypatch):
    """napari takes clicks while a job is made: it draws its bar."""
    _viewer, panel = labelled
    made = []

    def making(*arguments: object, **options: object):
        panel.training.row.toggle()
        made.append(Job(*arguments, **options))
        return made[-1]

    monkeypatch.setattr("napari_kaf.widgets._job_row.Job", making)
    panel.training.row.button.click()
    assert panel.session.busy
    finish(panel, qtbot)
    assert len(made) == 1
    assert len(panel.session.results.runs) == 1
    assert not panel.session.results.runs[0].stopped


def test_a_file_whose_ending_was_left_out_is_not_replaced_unasked(labelled, tmp_path, monkeypatch):
    _viewer, panel = labelled
    asked = []
    answers = iter([QMessageBox.StandardButton.No, QMessageBox.StandardButton.Yes])
    monkeypatch.setattr(QMessageBox, "question", lambda *words: (asked.append(words[-1]), next(answers))[1])
    endings = (".nii.gz", ".nii")
    assert completed(panel, "", endings) is None
    assert completed(panel, str(tmp_path / "a.nii"), endings) == tmp_path / "a.nii"
    assert completed(panel, str(tmp_path / "a"), endings) == tmp_path / "a.nii.gz"
    assert not asked
    (tmp_path / "a.nii.gz").touch()
    assert completed(panel, str(tmp_path / "a"), endings) is None
    assert completed(panel, str(tmp_path / "a"), endings) == tmp_path / "a.nii.gz"
    assert asked == ["a.nii.gz is there already. Replace it?"] * 2


def test_keys_are_bound_and_listed_once(labelled):
    viewer, panel = labelled
    bound = {str(key) for key in viewer.keymap}
    assert {key.replace("-", "+") for key, _what in KEYS.values()} <= {key.replace("-", "+") for key in bound}
    assert "(Shift+C)" in panel.ledger.buttons[Cell.COMPLETE].toolTip()


def shown_canvas(viewer, qtbot) -> QWidget:
    """The canvas of a window that is shown, with the focus."""
    viewer.window.show()
    viewer.window._qt_window.activateWindow()
    canvas = viewer.window._qt_viewer.canvas.native
    canvas.setFocus()
    qtbot.waitUntil(lambda: QApplication.focusWidget() is canvas, timeout=30_000)
    return canvas


def test_each_key_does_what_it_says(labelled, qtbot):
    viewer, panel = labelled
    canvas = shown_canvas(viewer, qtbot)
    session, shift = panel.session, Qt.KeyboardModifier.ShiftModifier

    def press(key: str, modifier: Qt.KeyboardModifier = shift) -> None:
        qtbot.keyClick(canvas, key, modifier)

    session.go_to(1)
    press("N")
    assert session.slice == 3
    press("B")
    assert session.slice == 1
    press("U")
    assert session.ledger.states[1] is Cell.UNTOUCHED
    press("C")
    assert session.ledger.states[1] is Cell.COMPLETE
    session.go_to(0)
    press("E")
    assert session.ledger.states[0] is Cell.EMPTY
    press("G")
    finish(panel, qtbot)
    assert session.results.labels is not None
    session.go_to(2)
    press("A")
    assert session.ledger.states[2] is Cell.ACCEPTED
    assert session.ledger.states[4] is Cell.UNTOUCHED
    press("A", shift | Qt.KeyboardModifier.AltModifier)
    assert session.ledger.states[4] is Cell.ACCEPTED
    press("R")
    assert session.results.labels is None
    assert panel.result.status.text() == "Result put away; Propagate or Segment makes it again."


def test_runs_are_renamed_saved_and_deleted(labelled, qtbot, monkeypatch, tmp_path):
    _viewer, panel = labelled
    panel.training.row.button.click()
    finish(panel, qtbot)
    history, results = panel.history, panel.session.results
    history.table.selectRow(0)
    monkeypatch.setattr(QInputDialog, "getText", lambda *_, **__: ("best", True))
    history.rename.click()
    assert history.table.item(0, 0).text() == "best"
    (run,) = results.runs
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(tmp_path / "mine"), ""))
    history.save.click()
    assert (tmp_path / "mine.safetensors").read_bytes() == results.store.model_path(run.key).read_bytes()
    answers = iter([QMessageBox.StandardButton.No, QMessageBox.StandardButton.Yes])
    monkeypatch.setattr(QMessageBox, "question", lambda *_: next(answers))
    history.delete.click()
    assert results.runs == [run]
    history.delete.click()
    assert results.runs == []
    assert results.labels is None
    assert not results.store.model_path(run.key).exists()
    assert history.isHidden()


def test_held_out_slices_are_measured_when_asked_for(labelled, qtbot):
    _viewer, panel = labelled
    panel.training.form.hold_out.setChecked(True)
    panel.training.row.button.click()
    finish(panel, qtbot)
    (run,) = panel.session.results.runs
    assert run.held_out_dice is not None
    assert f"Held-out Dice {run.held_out_dice:.3f}" in panel.training.row.status.text()


def test_a_key_leads_into_the_panel_and_escape_back(labelled, qtbot):
    viewer, panel = labelled
    canvas = shown_canvas(viewer, qtbot)
    qtbot.keyClick(canvas, "T", Qt.KeyboardModifier.ShiftModifier)
    assert QApplication.focusWidget() is panel.volume.box
    visited = []
    for _ in range(40):
        qtbot.keyClick(QApplication.focusWidget(), Qt.Key.Key_Tab)
        if not panel.isAncestorOf(QApplication.focusWidget()):
            break
        visited.append(QApplication.focusWidget())
    order = [
        panel.labels.new,
        panel.ledger.strip,
        panel.ledger.buttons[Cell.COMPLETE],
        panel.training.row.button,
    ]
    places = [visited.index(widget) for widget in (*order, panel.result.export, panel.keys)]
    assert places == sorted(places)  # from top to bottom
    panel.training.row.button.setFocus()
    qtbot.keyClick(panel.training.row.button, Qt.Key.Key_Escape)
    assert QApplication.focusWidget() is canvas
    qtbot.keyClick(canvas, "T", Qt.KeyboardModifier.ShiftModifier)
    assert QApplication.focusWidget() is panel.training.row.button


@pytest.mark.parametrize("place", ["labels.box", "labels.table", "training.form.minutes", "ledger.strip"])
def test_keys_work_wherever_the_focus_is(labelled, qtbot, place):
    viewer, panel = labelled
    viewer.window.show()
    viewer.window._qt_window.activateWindow()
    widget = operator.attrgetter(place)(panel)
    widget.setFocus()
    qtbot.waitUntil(lambda: QApplication.focusWidget() is widget, timeout=30_000)
    panel.session.go_to(3)
    qtbot.keyClick(widget, "P", Qt.KeyboardModifier.ShiftModifier)
    assert panel.session.ledger.states[3] is Cell.PARTIAL


def test_export_says_same_grid(labelled, tmp_path):
    _viewer, panel = labelled
    panel.result.export_to(tmp_path / "mine.nii.gz")
    assert panel.result.status.text() == "mine.nii.gz: same grid as source"
    with pytest.raises(UserError, match="the file of the volume itself"):
        panel.result.export_to(panel.session.opened.path)


def test_settings_are_remembered(open_panel):
    _viewer, panel = open_panel("Finetune")
    panel.training.form.minutes.setValue(7)
    from napari_kaf._settings import settings

    assert settings().minutes == 7
    assert (
        panel.training.form.minutes.toolTip()
        == "How long a finetuning trains before it hands over its result."
    )


def test_the_network_is_chosen_by_name(open_panel):
    _viewer, panel = open_panel("Finetune")
    from napari_kaf._settings import settings

    form = panel.training.form
    assert (form.network.currentText(), form.architecture, settings().network) == ("UNet", "unet", "unet")
    assert "minutes on a CPU" in form.network.toolTip()
    form.network.setCurrentText("KAF-UNet")
    assert (form.architecture, settings().network) == ("kaf-unet", "kaf-unet")
    panel.close()
    _viewer, panel = open_panel("Finetune")
    assert panel.training.form.network.currentText() == "KAF-UNet"


def test_a_start_brings_its_network(open_panel, pretrained):
    _viewer, panel = open_panel("Finetune")
    form = panel.training.form
    form.model.add_file(pretrained)
    assert not form.network.isEnabled()
    assert not form.preset.isEnabled()
    assert form.network.toolTip() == "The network is that of the model"


def test_the_strip_goes_where_it_is_clicked(labelled, qtbot):
    _viewer, panel = labelled
    strip = panel.ledger.strip
    strip.resize(300, 30)

    qtbot.mouseClick(strip, Qt.MouseButton.LeftButton, pos=strip.cell_rect(3).center().toPoint())
    assert panel.session.slice == 3
    qtbot.keyClick(strip, Qt.Key.Key_Left)
    assert panel.session.slice == 2
    panel.ledger.next.click()
    assert panel.session.slice == 3


def test_closing_the_viewer_ends_the_training_and_keeps_the_strokes(labelled, qtbot):
    viewer, panel = labelled
    panel.training.form.minutes.setValue(60)
    panel.training.row.button.click()
    qtbot.waitUntil(lambda: len(panel.training.curve.points("total")) >= 1, timeout=300_000)
    worker, volume_path = panel.life.job._worker, panel.session.opened.path
    panel.session.labels.data_setitem((np.array([2]), np.array([9]), np.array([9])), 1)
    viewer.close()
    qtbot.waitUntil(lambda: not worker.is_running, timeout=20_000)
    with np.load(volume_path.parent / "heart_003.kaf-labels.npz") as kept:
        assert kept["labels"][2, 9, 9] == 1


def test_the_wheel_scrolls_and_changes_no_value(labelled, qtbot):
    _viewer, panel = labelled
    panel.show()
    from qtpy.QtCore import QPoint, QPointF
    from qtpy.QtGui import QWheelEvent

    panel.training.form.minutes.clearFocus()
    turn = QWheelEvent(
        QPointF(5, 5),
        QPointF(5, 5),
        QPoint(0, 0),
        QPoint(0, -120),
        Qt.MouseButton.NoButton,
        Qt.KeyboardModifier.NoModifier,
        Qt.ScrollPhase.NoScrollPhase,
        False,
    )
    before = panel.training.form.minutes.value()
    panel.resize(340, 300)
    scroll_bar = panel.verticalScrollBar()
    qtbot.waitUntil(lambda: scroll_bar.maximum() > 100)
    QApplication.sendEvent(panel.training.form.minutes, turn)
    QApplication.sendEvent(scroll_bar, turn)
    assert scroll_bar.value() > 0
    assert panel.training.form.minutes.value() == before


def test_a_class_that_is_not_painted_is_not_trained(labelled, qtbot, monkeypatch):
    _viewer, panel = labelled
    add_class(panel.session, "never painted")
    asked: list[FinetuneRequest] = []

    def ask(request: FinetuneRequest, control: object):
        asked.append(request)
        yield from ()
        raise UserError("enough")

    monkeypatch.setattr("napari_kaf.widgets._training_section.finetune_task", ask)
    panel.training.start()
    qtbot.waitUntil(lambda: bool(asked), timeout=30_000)
    finish(panel, qtbot)
    assert asked[0].class_names == {1: "structure"}


def test_while_it_trains_nothing_moves_in_the_window_by_itself(labelled, qtbot, monkeypatch):
    _viewer, panel = labelled
    ended = threading.Event()

    def waiting(request: FinetuneRequest, control: object):
        yield Report(Progress("loading the engine", 0, None))
        ended.wait(60)
        return FinetuneOutcome(request.run, None)

    monkeypatch.setattr("napari_kaf.widgets._training_section.finetune_task", waiting)
    panel.training.row.button.click()
    bar = panel.training.row.bar
    qtbot.waitUntil(lambda: panel.training.row.status.text() == "Loading the engine", timeout=30_000)
    assert bar.maximum() > bar.minimum()  # a bar without a range is animated, and each frame draws the canvas
    assert bar.value() == 0
    (spinner,) = (label.movie() for label in panel.window().findChildren(QLabel) if label.movie() is not None)
    assert spinner.speed() < 10  # the wheel of napari's activity dock: thirty frames a second otherwise
    panel.training.row.button.click()
    ended.set()
    finish(panel, qtbot)
    assert spinner.speed() == 100
