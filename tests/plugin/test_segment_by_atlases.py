"""The Segment panel with labelled volumes that are registered to the one that is open."""

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from kaf_model.checkpoint import Model
from kaf_model.config import KeypointConfig, ModelConfig, SegmentConfig, SliceConfig
from kaf_model.labels import ClassLabel
from kaf_model.phantom import HEART_CLASSES, make_heart
from kaf_model.unet import build_network
from kaf_model.volume import read_labels, read_volume
from napari_kaf._segment_task import OpenSource, SegmentRequest, segment_task


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Registered in a few steps: these hearts lie near to each other."""
    monkeypatch.setattr("kaf_model.registration._AFFINE_STEPS", 25)
    monkeypatch.setattr("kaf_model.registration._LEVELS", ((2, 4, 5), (1, 2, 2)))


def _write(path, array):
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), np.diag([3.0, 3.0, 3.0, 1.0])), path)


@pytest.fixture
def folder(tmp_path):
    """A network that knows nothing, two labelled hearts, and the same one somewhere else."""
    heart = make_heart(3, shape=(20, 48, 48), spacing=(3.0, 3.0, 3.0))
    places = {"images/a": (0, 0, 0), "images/b": (1, -1, 1), "open": (-1, 2, 0)}
    for name, move in places.items():
        _write(tmp_path / f"{name}.nii.gz", np.roll(heart.image.astype(np.float32), move, (0, 1, 2)))
        labels = name.replace("images", "labels") if name != "open" else "truth"
        _write(tmp_path / f"{labels}.nii.gz", np.roll(heart.labels, move, (0, 1, 2)))
    classes = (ClassLabel(0, "background"), *(ClassLabel(v, n) for v, n in HEART_CLASSES.items() if v))
    config = ModelConfig(architecture="unet", start_channels=4, num_classes=len(classes))
    network = build_network(config).eval()
    Model(network, config, SliceConfig(spacing=None), KeypointConfig(), classes).save(
        tmp_path / "model.safetensors"
    )
    return tmp_path


@pytest.fixture
def panel(open_panel, folder):
    _viewer, panel = open_panel("Segment", folder / "open.nii.gz")
    panel.model.add_file(folder / "model.safetensors")
    return panel


def finish(panel, qtbot):
    qtbot.waitUntil(lambda: not panel.session.busy, timeout=300_000)


def test_labelled_volumes_are_registered_to_the_open_one(panel, folder, qtbot):
    panel.atlas_images.line.setText(str(folder / "images"))
    panel.atlas_labels.line.setText(str(folder / "labels"))
    panel.row.button.click()
    finish(panel, qtbot)
    assert "labelled ones were registered to it" in panel.row.status.text()
    assert "enough" not in panel.row.status.text()
    found = panel.session.results.labels > 0
    like = read_volume(folder / "open.nii.gz")
    truth = read_labels(folder / "truth.nii.gz", like=like) > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.8


def test_both_folders_are_needed(panel, folder, notifications):
    panel.atlas_labels.line.setText(str(folder / "labels"))
    panel.row.button.click()
    assert "or neither" in notifications[-1]
    assert not panel.session.busy


def test_volumes_that_cannot_be_registered_are_an_error(panel, folder, qtbot, notifications):
    (folder / "images/b.nii.gz").unlink()
    panel.atlas_images.line.setText(str(folder / "images"))
    panel.atlas_labels.line.setText(str(folder / "labels"))
    panel.row.button.click()
    finish(panel, qtbot)
    assert "two or more volumes are needed" in " ".join([*notifications, panel.row.status.text()])
    assert panel.session.results.labels is None


def request_for(folder):
    source = OpenSource(0, read_volume(folder / "open.nii.gz"))
    atlases = folder / "images", folder / "labels"
    return SegmentRequest(folder / "model.safetensors", SegmentConfig(), "cpu", [source], atlases=atlases)


@pytest.mark.parametrize("stage", ["reading", "comparing labelled volumes", "registering labelled volumes"])
def test_cancel_stops_between_two_steps_of_a_registration(folder, stage):
    control = SimpleNamespace(cancelled=False)
    work = segment_task(request_for(folder), control)
    later = []
    while True:
        try:
            report = next(work)
        except StopIteration as done:
            outcome = done.value
            break
        if control.cancelled:
            later.append(report)
        if report.progress.stage.startswith(stage):
            control.cancelled = True
    assert outcome.stopped
    assert not outcome.scores.rows
    assert len(later) <= 1


def test_what_does_not_fit_is_a_problem_that_is_told(folder):
    request = request_for(folder)
    object.__setattr__(request, "config", SegmentConfig(least_agreement=1.0))
    work = segment_task(request, SimpleNamespace(cancelled=False))
    while True:
        try:
            next(work)
        except StopIteration as done:
            outcome = done.value
            break
    assert "too little to segment others by them" in " ".join(outcome.problems)
    assert outcome.registered == 0
    assert outcome.scores.rows
