"""An image layer as a volume, and a volume as the arguments of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil
from numpy.typing import NDArray

from kaf_model.errors import UserError
from kaf_model.volume import Volume, VolumeError, read_volume

if TYPE_CHECKING:
    from napari.layers import Image, Layer

KEY = "napari-kaf"
Role = Literal["volume", "labels", "result", "preview", "comparison", "uncertainty", "explore"]
_UNITS_IN_MM = {"millimeter": 1.0, "micrometer": 1e-3, "centimeter": 10.0, "meter": 1000.0, "nanometer": 1e-6}


@dataclass(frozen=True, eq=False)
class OpenVolume:
    """An image layer as a volume.

    Attributes:
        layer: The image layer.
        volume: Its voxels with their place in the world.
        spacing_known: False when the voxel size is a guess that the user has to confirm.
        origin: Where the voxel size comes from, in words.
    """

    layer: Image
    volume: Volume
    spacing_known: bool
    origin: str

    @property
    def path(self) -> Path | None:
        """File or folder of the volume, or None of an array in memory."""
        if self.volume.source.format != "array":
            return self.volume.source.path
        return Path(self.layer.source.path) if self.layer.source.path else None


def layer_arguments(volume: Volume, role: Role, **metadata: Any) -> dict[str, Any]:
    """Arguments of a layer that shows an array (Z, Y, X) of a volume in millimetres."""
    import nibabel as nib

    known = volume.source.format != "array"
    letters = nib.aff2axcodes(volume.affine) if known else ("z", "y", "x")
    return {
        "scale": volume.spacing,
        "units": ("mm", "mm", "mm"),
        "axis_labels": tuple(str(letter) for letter in letters),
        "metadata": {KEY: {"volume": volume, "role": role, **metadata}},
    }


def image_arguments(volume: Volume, name: str, num_frames: int = 1) -> dict[str, Any]:
    """Arguments of the image layer of a volume.

    Args:
        volume: The volume.
        name: Of the layer.
        num_frames: Volumes in its file.
    """
    return {
        "name": name,
        "colormap": "gray",
        "contrast_limits": contrast_limits(volume.array),
        **layer_arguments(volume, "volume", frames=num_frames),
    }


def contrast_limits(array: NDArray[Any]) -> tuple[float, float]:
    """Grey values from black to white; the brightest thousandth does not darken the rest."""
    step = max(1, int(np.sqrt(array.size / 2_000_000)))
    low, high = (float(value) for value in np.percentile(array[:, ::step, ::step], (0.1, 99.8)))
    return (low, high) if low < high else (float(array.min()), float(array.max()) + 1)


def role_of(layer: Layer) -> Role | None:
    """The part that a layer plays for the plugin, if it has one; a copy of what the plugin made is the user's."""
    known = layer.metadata.get(KEY, {})
    role: Role | None = known.get("role") if known.get("made", id(layer)) == id(layer) else None
    return role


def volume_of(layer: Layer) -> Volume | None:
    """The volume that a layer was made for, if it carries one of its own shape."""
    volume = layer.metadata.get(KEY, {}).get("volume")
    return volume if isinstance(volume, Volume) and volume.shape == stack_shape(layer) else None


def note(layer: Layer, **values: Any) -> None:
    """Keep something with a layer, and not with those it was copied from or to."""
    layer.metadata[KEY] = {**layer.metadata.get(KEY, {}), **values}  # copied layers share the old one


def num_frames(layer: Layer) -> int:
    """Volumes in the file that a layer was read from."""
    return int(layer.metadata.get(KEY, {}).get("frames", 1))


def open_volume(layer: Image, spacing: Sequence[float] | None = None) -> OpenVolume:
    """Return the volume of an image layer: the voxels that it shows, where its file or the user put them.

    A layer carries a volume that was given a spacing or found in its file; it keeps its place, and its name for
    saved work, when other voxels of the same shape are put into it.

    Args:
        layer: An image layer.
        spacing: mm (z, y, x) that the user gave for it, if it was asked for.

    Raises:
        UserError: If its numbers cannot be a volume.
    """
    carried = volume_of(layer)
    if carried is not None and spacing is None:
        made = carried.source.format == "array"
        origin = "as you gave it" if made else "from the file's header"
        return OpenVolume(layer, _with_voxels_of(layer, carried), True, origin)
    _check_room(layer)
    array = stack(layer)
    if spacing is not None:
        volume = Volume.from_array(array, spacing, name=layer.name, fill_nan=0)
        note(layer, volume=volume)
        return OpenVolume(layer, volume, True, "as you gave it")
    known, size, origin = _spacing_of_layer(layer)
    volume = Volume.from_array(array, size, name=layer.name, fill_nan=0)
    from_file = _same_as_file(layer, volume.array)
    if from_file is not None:
        note(layer, volume=from_file)
        return OpenVolume(layer, from_file, True, "from the file's header")
    return OpenVolume(layer, volume, known, origin)


def _check_room(layer: Image) -> None:
    """Refuse to read a lazy layer that the memory cannot hold."""
    data = finest(layer)
    size = math.prod(np.shape(data)) * np.dtype(data.dtype).itemsize
    if not isinstance(data, np.ndarray) and size > psutil.virtual_memory().available / 2:
        raise UserError(
            f"its {size / 1e9:.0f} GB are more than this machine's memory can hold; crop it, or open a coarser scale"
        )


def stack(layer: Layer) -> NDArray[Any]:
    """The array of a layer as (Z, Y, X), read if it is lazy; else a view, so writing to it writes to the layer."""
    data = finest(layer)
    array = data if isinstance(data, np.ndarray) else np.asarray(data)
    return array[None] if array.ndim == 2 else array


def stack_shape(layer: Layer) -> tuple[int, ...]:
    """Shape (Z, Y, X) of a layer; a lazy one is not read for it."""
    shape = np.shape(finest(layer))
    return (1, *shape) if len(shape) == 2 else shape


def finest(layer: Layer) -> Any:
    """The data of a layer, of several scales the finest; it may be lazy."""
    return layer.data[0] if getattr(layer, "multiscale", False) else layer.data


def _with_voxels_of(layer: Image, carried: Volume) -> Volume:
    """The volume that a layer carries, with what the layer shows now."""
    array = stack(layer)
    if array is carried.array:
        return carried
    shown = Volume.from_array(array, fill_nan=0)
    if np.array_equal(shown.array, carried.array):
        return carried
    notices = tuple(dict.fromkeys((*carried.notices, *shown.notices)))
    return replace(carried, array=shown.array, notices=notices)


def _same_as_file(layer: Image, array: NDArray[Any]) -> Volume | None:
    """The volume in the layer's file, if another reader opened it in the order that we would."""
    if not layer.source.path:
        return None
    try:
        volume = read_volume(layer.source.path, fill_nan=0)
    except VolumeError:
        return None
    return volume if volume.shape == array.shape and np.array_equal(volume.array, array) else None


def _spacing_of_layer(layer: Image) -> tuple[bool, tuple[float, ...], str]:
    """Whether a layer's scale is in lengths, the spacing in mm (z, y, x), and where it comes from."""
    scale = [abs(float(size)) for size in layer.scale]
    factors = [_UNITS_IN_MM.get(str(unit)) for unit in layer.units]
    known = all(factor is not None for factor in factors)
    size = [value * (factor or 1.0) for value, factor in zip(scale, factors, strict=True)]
    if len(size) == 2:
        size = [max(size), *size]
    return known, tuple(size), "from the layer's scale" if known else "unknown"
