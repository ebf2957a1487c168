"""Opening files in napari: volumes as images in millimetres, label files as labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import UserError
from kaf_model.volume import Volume, VolumeError, inspect_volume, read_labels, read_volume, volume_name
from kaf_model.volume_files import find_volumes, format_of
from napari_kaf._classes import entries_of
from napari_kaf._compass import attach_compass
from napari_kaf._layer_volume import image_arguments, layer_arguments

LayerData = tuple[NDArray[Any], dict[str, Any], str]
_LABEL_NAMES = ("label", "seg", "mask", "_gt", "annotation", "ground_truth")
_MAX_UNHINTED = 12  # a file of at most this many whole numbers is taken for labels whatever its name


def get_reader(path: str | list[str]) -> Callable[[str | list[str]], list[LayerData]] | None:
    """Return the function that opens a path, or None if it is nothing that we read."""
    first = Path(path[0] if isinstance(path, list) else path)
    if first.is_dir():
        return read_layers if find_volumes([first]) else None
    return read_layers if format_of(first)[0] else None


def read_layers(path: str | list[str]) -> list[LayerData]:
    """Read files, and folders of files or of DICOM series, as layers.

    Raises:
        UserError: If there is nothing that can be read, saying why.
    """
    from napari import current_viewer
    from napari.utils.notifications import show_info, show_warning

    layers: list[LayerData] = []
    reasons = []
    for volume_path in find_volumes(path if isinstance(path, list) else [path]):
        try:
            layer, notices = read_layer(volume_path)
        except VolumeError as error:
            reasons.append(str(error))
            continue
        layers.append(layer)
        for notice in notices:
            show_info(f"{layer[1]['name']}: {notice}")
    if not layers:
        raise UserError("; ".join(reasons) or f"{path}: there is no volume in it")
    for reason in reasons:
        show_warning(reason)
    viewer = current_viewer()
    if viewer is not None:
        attach_compass(viewer)
    for _, arguments, kind in layers[1:]:
        arguments["visible"] = kind == "labels"  # of several volumes one is looked at first
    return layers


def read_layer(path: Path) -> tuple[LayerData, tuple[str, ...]]:
    """Read one volume or label map, and what to tell about it.

    Raises:
        VolumeError: If it cannot be read.
    """
    notices: tuple[str, ...] = ()
    num_frames = inspect_volume(path).num_frames
    if num_frames > 1:
        notices = (
            f"the file holds {num_frames} frames; the first is shown, another is chosen under Volume in Finetune",
        )
    volume = read_volume(path, frame=0 if num_frames > 1 else None, fill_nan=0)
    name = volume_name(path)
    labels = _labels_in(volume, path)
    if labels is None:
        return (volume.array, image_arguments(volume, name, num_frames), "image"), (*notices, *volume.notices)
    arguments = layer_arguments(volume, "labels", classes=_names_beside(path))
    classes = entries_of(_names_beside(path), np.unique(labels).tolist())
    from napari.utils import DirectLabelColormap

    colors: dict[int | None, Any] = {
        None: (0.6, 0.6, 0.6, 1),
        0: (0, 0, 0, 0),
        **{c.value: c.color for c in classes},
    }
    arguments["colormap"] = DirectLabelColormap(color_dict=colors)
    shown_name = name if any(word in name.lower() for word in _LABEL_NAMES) else f"{name} labels"
    return (labels, {"name": shown_name, **arguments}, "labels"), notices


def _labels_in(volume: Volume, path: Path) -> NDArray[Any] | None:
    """The label map in a file, or None if it is an image."""
    named = any(word in part.lower() for part in (path.name, path.parent.name) for word in _LABEL_NAMES)
    array = volume.array
    if named:
        try:
            array = read_labels(path, volume)
        except VolumeError:
            return None
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > np.iinfo(np.uint16).max:
        return None
    count = int(np.count_nonzero(np.bincount(array.ravel())))
    return array if count <= (256 if named else _MAX_UNHINTED) else None


def _names_beside(path: Path) -> dict[int, str]:
    """Names of label values in a `labels.json` beside a label file; none if it has no usable one."""
    try:
        content = json.loads((path.parent / "labels.json").read_text(encoding="utf-8"))
        return {int(value): str(name) for value, name in content.items() if int(value)}
    except (OSError, ValueError, AttributeError):
        return {}
