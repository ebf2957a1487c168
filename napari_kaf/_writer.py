"""Saving labels from napari on the grid of the volume they were drawn on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import UserError
from kaf_model.volume import Volume, read_labels, same_grid, write_labels
from napari_kaf._layers import KEY


def write_labels_layer(path: str, data: Any, attributes: dict[str, Any]) -> list[str]:
    """Write a labels layer as NIfTI; without a known volume its scale becomes the spacing.

    Returns:
        The path, or nothing if it could not be written; a notification then says why.
    """
    from napari.utils.notifications import show_error, show_info

    array = np.asarray(data)
    labels = array[None] if array.ndim == 2 else array
    volume = attributes.get("metadata", {}).get(KEY, {}).get("volume")
    try:
        if labels.ndim != 3:
            raise UserError(f"labels of 2 or 3 axes can be written, these have {labels.ndim}")
        if not isinstance(volume, Volume) or volume.shape != labels.shape:
            scale = [abs(float(size)) for size in attributes.get("scale", (1, 1, 1))][-3:]
            spacing = scale if len(scale) == 3 else [max(scale), *scale]
            volume = Volume.from_array(labels, spacing, name=str(attributes.get("name", "labels")))
        differences = write_and_compare(Path(path), labels, volume)
    except UserError as error:
        show_error(str(error))
        return []
    if differences:
        show_error(f"{Path(path).name}: " + "; ".join(differences))
    elif volume.source.format != "array":
        show_info(f"{Path(path).name}: same grid as {volume.name}")
    return [path]


def write_and_compare(path: Path, labels: NDArray[Any], volume: Volume) -> list[str]:
    """Write labels (Z, Y, X), read them back and return in words what differs; nothing if all is well.

    Raises:
        UserError: If they cannot be written or read back.
    """
    write_labels(path, labels, volume)
    differences = same_grid(path, volume)
    if not differences and not np.array_equal(read_labels(path, volume), labels):
        differences = ["the labels that were read back differ from those that were written"]
    return differences
