"""The Segment and Pretrain panels, with models trained for a few steps."""

from __future__ import annotations

import csv
import math
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QFileDialog

from kaf_model.errors import UserError
from kaf_model.evaluate import ClassScore, Scores
from kaf_model.progress import Progress
from napari_kaf import _jobs, _layers
from napari_kaf._classes import entries_of
from napari_kaf._jobs import Control, Report
from napari_kaf._ledger import Cell
from napari_kaf._marking import mark
from napari_kaf._pretrain_task import pretrain_task
from napari_kaf._segment_task import SegmentOutcome, SegmentRequest, VolumeSegmented
from napari_kaf.widgets import pretrain, segment
from napari_kaf.widgets.segment import _BESIDE


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A checkpoint trained for two steps on a small heart; what it finds is of no interest."""
    from kaf_model.config import FinetuneConfig, ModelConfig
    from kaf_model.finetune import finetune
    from kaf_model.labels import LabelledVolume, SliceStatus
    from kaf_model.phantom import make_heart
    from kaf_model.volume import Volume

    heart = make_heart(3, shape=(5, 48, 64), spacing=(16.0, 2.4, 2.4))
    case = LabelledVolume(
        Volume.from_array(heart.image, heart.spacing), heart.labels, {2: SliceStatus.COMPLETE}
    )
    path = tmp_path_factory.mktemp("model") / "quick.safetensors"
    training = FinetuneConfig(steps=2, batch_size=2, augment={"crop": (32, 32)})
    architecture = ModelConfig.preset("small", attention_blocks=1)
    for _progress in finetune(
        architecture, [case], training, class_names=heart.classes, output=path, device="cpu"
    ):
        pass
    return path


def finish(panel, qtbot) -> None:
    qtbot.waitUntil(lambda: not panel.session.busy, timeout=300_000)


def test_a_message_is_shown_once_whatever_panels_are_open(open_panel, notifications):
    viewer, first = open_panel("Pretrain")
    viewer.window.add_plugin_dock_widget("napari-kaf", "Segment")
    first.session.told.emit("cut along another axis")
    first.session.warned.emit("no space left")
    assert notifications == ["cut along another axis", "no space left"]
    viewer.window.remove_dock_widget(first)
    first.session.told.emit("deleted")
    assert notifications[2:] == ["deleted"]


def test_segment_without_a_model_says_so(open_panel, notifications):
    _viewer, panel = open_panel("Segment")
    panel.row.button.click()
    assert "no trained model yet" in notifications[-1]


def test_segment_an_open_volume_against_its_labels(
    open_panel, small_heart, model, qtbot, tmp_path, notifications
):
    labels = small_heart.parents[1] / "labels" / small_heart.name
    viewer, panel = open_panel("Segment", small_heart, labels)
    qtbot.waitUntil(lambda: panel.layers.count() == 1)
    panel.model.add_file(model)
    assert "2 steps on 1 labelled slices" in panel.model.about.text()
    panel.uncertainty.setChecked(True)
    panel.reference.setCurrentText(_BESIDE)
    panel.row.button.click()
    finish(panel, qtbot)
    assert "1 volume" in panel.row.status.text()
    assert panel.table.rowCount() == 3
    assert _layers.layers_with_role(viewer, "result")[0].data.shape == (5, 48, 64)
    (uncertainty,) = _layers.layers_with_role(viewer, "uncertainty")
    assert 0 <= uncertainty.data.min() <= uncertainty.data.max() <= 1
    panel.save_csv(tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows} == {"right ventricle", "myocardium", "left ventricle"}
    reference = nib.load(labels)
    voxel_ml = abs(np.linalg.det(reference.affine[:3, :3])) / 1000
    expected = float((np.asarray(reference.dataobj) == 3).sum()) * voxel_ml
    assert float(rows[2]["reference_ml"]) == pytest.approx(expected, rel=1e-3)


def test_segment_asks_for_the_orientation_that_was_chosen(open_panel, small_heart, model, qtbot, monkeypatch):
    from kaf_model import segment

    asked = []

    def prediction(angle, orientation):
        asked.append(orientation)
        return (0.0,)

    monkeypatch.setattr(segment, "angles_at", prediction)
    _viewer, panel = open_panel("Segment", small_heart)
    qtbot.waitUntil(lambda: panel.layers.count() == 1)
    panel.model.add_file(model)
    for orientation in ("best", "fixed", "average"):  # the first is there at first
        if asked:
            panel.orientation.setCurrentIndex(panel.orientation.findData(orientation))
        panel.row.button.click()
        finish(panel, qtbot)
    assert asked == ["best", "fixed", "average"]


@pytest.fixture
def segment_panel(open_panel, small_heart, truth, model):
    """The panel on a heart of which slices 1 and 3 are complete, as painted in classes of the model's names."""
    _viewer, panel = open_panel("Segment", small_heart)
    session = panel.session
    session.new_labels()
    session.set_classes(entries_of({1: "right ventricle", 2: "myocardium", 3: "left ventricle"}))
    for z in (1, 3):
        _layers.write_into(session.labels, truth.astype(np.uint8), {z: np.ones_like(truth[z], bool)})
    mark(session, Cell.COMPLETE, [1, 3])
    panel.model.add_file(model)
    return panel


def test_segment_keeps_finished_slices_and_carries_them_on(segment_panel, truth, qtbot):
    panel = segment_panel
    assert panel.finished.isEnabled()
    assert panel.finished.text() == "Use the 2 finished slices"
    panel.row.button.click()
    finish(panel, qtbot)
    assert "2 finished slices of yours kept" in panel.row.status.text()
    joined = panel.session.results.labels
    assert np.array_equal(joined[[1, 3]], truth[[1, 3]])
    panel.finished.setChecked(False)
    panel.row.button.click()
    finish(panel, qtbot)
    assert "finished slices" not in panel.row.status.text()
    alone = panel.session.results.labels
    dice = [_foreground_dice(found[2], truth[2]) for found in (joined, alone)]
    assert dice[0] > max(0.8, dice[1])  # the model knows next to nothing


def _foreground_dice(one, other):
    one, other = one > 0, other > 0
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def test_segment_does_not_compare_finished_slices_with_themselves(segment_panel, qtbot):
    panel = segment_panel
    panel.reference.setCurrentText(_BESIDE)
    assert not panel.finished.isEnabled()
    assert "compared with itself" in panel.finished.toolTip()
    panel.row.button.click()
    finish(panel, qtbot)
    assert "finished slices" not in panel.row.status.text()


def test_segment_does_not_mix_structures_up(segment_panel, qtbot):
    panel = segment_panel
    panel.session.set_classes(entries_of({1: "liver", 2: "myocardium", 3: "left ventricle"}))
    panel.row.button.click()
    finish(panel, qtbot)
    assert "1 is liver in them and right ventricle in the model" in panel.row.status.text()


def test_segment_says_that_empty_slices_alone_carry_nothing(segment_panel, qtbot):
    mark(segment_panel.session, Cell.UNTOUCHED, [1, 3])
    segment_panel.session.labels.data = np.zeros_like(segment_panel.session.labels.data)
    mark(segment_panel.session, Cell.EMPTY, [0])
    segment_panel.row.button.click()
    finish(segment_panel, qtbot)
    assert "were not used: they show no structure" in segment_panel.row.status.text()


def test_segment_has_no_finished_slices_to_use(segment_panel):
    mark(segment_panel.session, Cell.PARTIAL, [1, 3])
    assert not segment_panel.finished.isEnabled()
    assert segment_panel.finished.text() == "Use finished slices"


@pytest.mark.parametrize("ending", ["slow", "broken"])
def test_segment_saves_what_was_done_before_it_ended(
    open_panel, model, qtbot, monkeypatch, tmp_path, notifications, ending
):
    go_on = threading.Event()
    row = ClassScore("first", 1, "valve", math.nan, math.nan, 1.5, math.nan)

    def one_volume(request: SegmentRequest, control: Control):
        yield VolumeSegmented(None, "first", None, {1: "valve"}, [row])
        if ending == "broken":
            raise OSError("gone")
        while not control.cancelled:
            yield Report(Progress("segmenting", 0, None))
            time.sleep(0.01)
        go_on.wait(20)  # nothing can interrupt this
        return SegmentOutcome(Scores((row,), ()), stopped=True)

    monkeypatch.setattr(segment, "segment_task", one_volume)
    monkeypatch.setattr(_jobs, "PATIENCE", 100)
    _viewer, panel = open_panel("Segment")
    panel.model.add_file(model)
    panel.source.setCurrentIndex(1)
    panel.input.set_path(tmp_path)
    panel.output.set_path(tmp_path / "out")
    panel.row.button.click()
    qtbot.waitUntil(lambda: panel.table.rowCount() == 1)
    if ending == "slow":
        panel.row.button.click()
    finish(panel, qtbot)
    go_on.set()
    assert panel.csv.isEnabled()
    panel.save_csv(tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", newline="") as file:
        assert [line["prediction_ml"] for line in csv.DictReader(file)] == ["1.5"]


def test_segment_takes_the_voxel_sizes_that_were_given(open_panel, model, qtbot, monkeypatch):
    asked = []

    def ask(request: SegmentRequest, control: object):
        asked.append(request)
        yield Report(Progress("segmenting", 0, None))
        return SegmentOutcome(Scores((), ()))

    monkeypatch.setattr(segment, "segment_task", ask)
    viewer, panel = open_panel("Segment")
    panel.model.add_file(model)
    first, second = (
        viewer.add_image(np.random.default_rng(seed).random((4, 12, 16)).astype(np.float32), name=name)
        for seed, name in enumerate(("first", "second"))
    )
    session = panel.session
    session.poll()  # works on the one that is seen
    with pytest.raises(UserError, match="voxel size of second is not known"):
        panel.start()
    session.give_spacing((5, 1, 1))
    session.choose_volume(first)
    with pytest.raises(UserError, match="voxel size of first is not known"):
        panel.start()
    session.give_spacing((8, 1.5, 1.5))
    panel.start()
    finish(panel, qtbot)
    assert [source.volume.spacing for source in asked[0].sources] == [(8, 1.5, 1.5), (5, 1, 1)]
    session.choose_volume(second)
    assert session.opened.volume.spacing == (5, 1, 1)


def test_segment_a_folder_into_a_folder(open_panel, small_heart, model, qtbot, tmp_path, notifications):
    (small_heart.parent / "broken.nii.gz").write_bytes(b"no volume")
    _viewer, panel = open_panel("Segment")
    panel.model.add_file(model)
    panel.source.setCurrentIndex(1)
    panel.input.set_path(small_heart.parent)
    panel.output.set_path(tmp_path / "out")
    panel.row.button.click()
    finish(panel, qtbot)
    written = nib.load(tmp_path / "out" / small_heart.name)
    np.testing.assert_allclose(written.affine, nib.load(small_heart).affine)
    assert "passed over" in panel.row.status.text()
    assert "broken.nii.gz" in panel.row.status.text()


def test_segment_refuses_to_write_among_the_volumes(open_panel, small_heart, model):
    _viewer, panel = open_panel("Segment")
    panel.model.add_file(model)
    panel.source.setCurrentIndex(1)
    panel.input.set_path(small_heart.parent)
    panel.output.set_path(small_heart.parent)
    with pytest.raises(UserError, match="among the volumes"):
        panel.start()


@pytest.fixture
def pretrain_panel(open_panel, small_heart, qtbot):
    """The panel on a folder with one usable volume and one broken file."""
    (small_heart.parent / "broken.nii.gz").write_bytes(b"no volume")
    _viewer, panel = open_panel("Pretrain")
    panel.folder.set_path(small_heart.parent)
    finish(panel, qtbot)
    return panel


def test_the_folder_is_looked_at_before_training(pretrain_panel):
    assert "1 usable volume, 5 slices; 1 cannot be used" in pretrain_panel.found.text()
    reasons = [pretrain_panel.table.item(row, 1).text() for row in range(2)]
    assert any("cannot be read" in reason for reason in reasons)
    assert pretrain_panel.table.item(1, 2).text() == "48 x 64"


def test_an_empty_folder_is_answered(open_panel, tmp_path, qtbot, notifications):
    _viewer, panel = open_panel("Pretrain")
    (tmp_path / "empty").mkdir()
    panel.folder.set_path(tmp_path / "empty")
    finish(panel, qtbot)
    assert "holds no volume" in notifications[-1]
    panel.row.button.click()
    assert "no volume to pretrain on" in notifications[-1]


def test_a_folder_can_be_chosen_again_after_a_failure(
    open_panel, small_heart, qtbot, notifications, monkeypatch
):
    _viewer, panel = open_panel("Pretrain")
    panel.session.set_busy("Finetuning")
    panel.folder.set_path(small_heart.parent)
    assert "Finetuning is running" in notifications[-1]
    panel.session.set_busy("")
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *_: str(small_heart.parent))
    panel.folder.browse.click()
    finish(panel, qtbot)
    assert "1 usable volume" in panel.found.text()


def test_a_folder_is_looked_into_again_by_enter_and_not_by_leaving_it(
    open_panel, tmp_path, qtbot, notifications
):
    _viewer, panel = open_panel("Pretrain")
    (tmp_path / "empty").mkdir()
    panel.folder.set_path(tmp_path / "empty")
    finish(panel, qtbot)
    assert len(notifications) == 1
    panel.folder.line.editingFinished.emit()
    assert not panel.session.busy
    qtbot.keyClick(panel.folder.line, Qt.Key.Key_Return)
    finish(panel, qtbot)
    assert len(notifications) == 2
    assert "holds no volume" in notifications[1]


def test_pretrain_cancel_resume_finish(pretrain_panel, qtbot, notifications):
    panel = pretrain_panel
    panel.steps.setValue(6)
    panel.row.button.click()
    qtbot.waitUntil(lambda: len(panel.curve.points("pcl")) >= 1, timeout=300_000)
    panel.pause.click()
    panel.row.button.click()  # cancels, also while it is paused
    finish(panel, qtbot)
    assert "can be used, or resumed" in panel.row.status.text()
    assert "correspondences" in panel.pair_title.text()
    assert panel.output.is_file()
    panel.row.button.click()
    assert "already" in notifications[-1]
    assert panel.resume.isEnabled()
    panel.resume.click()
    finish(panel, qtbot)
    assert panel.row.status.text() == f"Finished after 6 steps: {panel.output}"
    assert [name for name, _ in panel.curve._points.items()] == ["pcl", "global", "local"]
    assert not panel.resume.isEnabled()
    from napari_kaf._models import choices

    (found,) = choices([], None, ["pretrained"])
    assert found.about == "pretrained 6 steps on 1 volumes, 5 slices"


def test_the_estimate_is_measured(pretrain_panel, qtbot, monkeypatch):
    pretrain_panel.trial.click()
    finish(pretrain_panel, qtbot)
    assert "2000 steps" in pretrain_panel.estimate.text()
    assert not pretrain_panel.output.is_file()

    def three_seconds(request: object, control: object):
        yield from ()
        return 3.0

    monkeypatch.setattr(pretrain, "trial_task", three_seconds)
    pretrain_panel.trial.click()
    finish(pretrain_panel, qtbot)
    assert pretrain_panel.estimate.text() == "About 1.7 h: 2000 steps of 3.00 s each, measured just now."


def test_a_paused_pretraining_takes_no_step(pretrain_panel, monkeypatch):
    request, control = pretrain_panel._request(resume=False), Control()
    losses: list[Progress] = []

    def listen() -> None:
        for report in pretrain_task(request, control):
            if isinstance(report, Report) and report.progress.losses:
                control.pause(True)
                losses.append(report.progress)

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        for count in (1, 2):
            deadline = time.monotonic() + 300
            while len(losses) < count and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(1.0)
            assert len(losses) == count
            control.pause(False)
    finally:
        control.cancel()
        thread.join(300)
    assert not thread.is_alive()


def test_panels_of_one_side_are_tabs_and_the_newest_is_in_front(
    make_napari_viewer, plugin_home, nothing_left, qtbot
):
    viewer = make_napari_viewer(show=True)
    window = viewer.window._qt_window
    first, finetune = viewer.window.add_plugin_dock_widget("napari-kaf", "Finetune")
    second, segment = viewer.window.add_plugin_dock_widget("napari-kaf", "Segment")
    qtbot.waitUntil(lambda: window.tabifiedDockWidgets(first) == [second])
    qtbot.waitUntil(lambda: segment.isVisible() and finetune.visibleRegion().isEmpty())
    finetune.enter()  # as Shift+T does
    qtbot.waitUntil(lambda: not finetune.visibleRegion().isEmpty())
    third, _explore = viewer.window.add_plugin_dock_widget("napari-kaf", "Explore")
    qtbot.waitUntil(lambda: set(window.tabifiedDockWidgets(first)) == {second, third})
