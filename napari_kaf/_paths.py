"""Where the plugin keeps its own files: models, runs, samples, and labels that found no other place."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def data_folder() -> Path:
    """Return $KAF_HOME, else the user's data folder for napari-kaf on this platform."""
    own = os.environ.get("KAF_HOME", "")
    return Path(own).expanduser() if own else platformdirs.user_data_path("napari-kaf", appauthor=False)


def models_folder() -> Path:
    """Where pretrained models are written and looked for."""
    from napari_kaf._settings import settings

    chosen = str(settings().models_folder).strip()
    return Path(chosen).expanduser() if chosen else data_folder() / "models"
