"""What the tests of the panels share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kaf_model.phantom import make_heart, write_cohort
from napari_kaf import _layers
from napari_kaf._ledger import Cell
from napari_kaf._marking import mark


@pytest.fixture
def small_heart(tmp_path: Path) -> Path:
    """A heart of 5 slices of 48 x 64 on disk; its labels lie in `labels` beside `images`."""
    (path,) = write_cohort(
        tmp_path / "hearts", num_subjects=1, first_seed=3, shape=(5, 48, 64), spacing=(16.0, 2.4, 2.4)
    )
    return path


@pytest.fixture
def truth() -> np.ndarray:
    """Labels (5, 48, 64) of the small heart."""
    return make_heart(3, shape=(5, 48, 64), spacing=(16.0, 2.4, 2.4)).labels


@pytest.fixture
def notifications(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is shown to the user, in place of pop-ups."""
    from napari_kaf import _pulse
    from napari_kaf.widgets import _job_row, _panel, _propagate_section, _result_section, _training_section

    shown: list[str] = []
    for module in (_pulse, _panel, _training_section, _propagate_section, _result_section, _job_row):
        for name in ("show_error", "show_info", "show_warning"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, shown.append)
    return shown


@pytest.fixture
def open_panel(make_napari_viewer, plugin_home, nothing_left, notifications, qtbot) -> Callable[..., tuple]:
    """Open a viewer with a panel, after files if any are given."""

    def open_(name: str, *paths: Path) -> tuple:
        viewer = make_napari_viewer()
        for path in paths:
            viewer.open(str(path), plugin="napari-kaf")
        _dock, panel = viewer.window.add_plugin_dock_widget("napari-kaf", name)
        return viewer, panel

    return open_


@pytest.fixture
def labelled(open_panel, small_heart, truth):
    """Viewer and panel with two complete slices drawn."""
    viewer, panel = open_panel("Finetune", small_heart)
    panel.session.new_labels()
    for z in (1, 3):
        _layers.write_into(panel.session.labels, (truth > 0).astype(np.uint8), {z: truth[z] > 0})
    mark(panel.session, Cell.COMPLETE, [1, 3])
    panel.training.form.minutes.setValue(0.1)
    return viewer, panel


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A checkpoint of a small pretraining network with a matcher, KAF layers at levels 2 and 4, random weights."""
    import torch

    from kaf_model.checkpoint import Checkpoint, save_checkpoint
    from kaf_model.config import KeypointConfig, Recipe, SliceConfig
    from kaf_model.pretrain import PretrainingNetwork

    recipe = Recipe.preset("small")
    model = recipe.model.override(
        start_channels=4, embedding_width=8, heads=2, attention_blocks=2, kaf_levels=(2, 4)
    )
    training = recipe.pretrain.override(projection_width=8, sinkhorn_iterations=20, matching_rounds=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        weights = PretrainingNetwork(model, training).state_dict()
    record = {
        "stage": "pretraining",
        "steps": 7,
        "num_volumes": 1,
        "num_slices": 5,
        "losses": {"total": 1.0, "pcl": 1.0, "global": 1.0, "local": 1.0},
        "settings": training.model_dump(mode="json"),
    }
    path = tmp_path_factory.mktemp("pretrained") / "seven_steps.safetensors"
    checkpoint = Checkpoint(
        "pretrained",
        weights,
        model,
        SliceConfig(spacing=None),
        KeypointConfig(contrast_threshold=0.01),
        history=(record,),
    )
    return save_checkpoint(path, checkpoint)
