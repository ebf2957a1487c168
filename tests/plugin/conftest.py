"""What the tests of the panels share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kaf_model.phantom import make_heart, write_cohort


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
    from napari_kaf.widgets import _job_row, _panel, _result_section, _training_section

    shown: list[str] = []
    for module in (_panel, _training_section, _result_section, _job_row):
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
