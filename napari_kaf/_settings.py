"""Settings that are remembered, as the manifest declares them and napari keeps them."""

from __future__ import annotations

from typing import Any

from napari.settings import get_plugin_settings

PLUGIN = "napari-kaf"
DEVICES = ("auto", "cpu", "cuda", "mps")  # as the engine names them, which only a worker may ask
NETWORKS = {"unet": "UNet", "kaf-unet": "KAF-UNet"}  # that a finetuning may start afresh, with their names
_SECTION = "training"


def settings() -> Any:
    """Return the remembered settings; assigning to one writes it to napari's settings folder."""
    return getattr(get_plugin_settings(PLUGIN), _SECTION)


def description(name: str) -> str:
    """Return what the manifest says a setting does, for a tooltip."""
    return str(type(settings()).model_fields[name].description)
