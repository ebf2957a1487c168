"""The only place, with its sibling `_explore_layers`, that touches viewer layers, always on the GUI thread.

An image layer becomes an engine `Volume` here, and arrays (Z, Y, X) become layers. A layer made by the
plugin or its reader carries its volume and its part in `layer.metadata[KEY]`, so that it is recognised
whatever it is called, and is written back on the grid of its file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import UserError
from kaf_model.volume import Volume, VolumeError, read_volume
from napari_kaf._classes import ClassEntry

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image, Labels, Layer

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


def role_of(layer: Layer) -> Role | None:
    """The part that a layer plays for the plugin, if it has one."""
    role: Role | None = layer.metadata.get(KEY, {}).get("role")
    return role


def volume_of(layer: Layer) -> Volume | None:
    """The volume that a layer was made for, if it carries one of its own shape."""
    volume = layer.metadata.get(KEY, {}).get("volume")
    return volume if isinstance(volume, Volume) and volume.shape == stack(layer).shape else None


def image_layers(viewer: ViewerModel) -> list[Image]:
    """Image layers that can be volumes: one grey value a voxel, two or three axes."""
    from napari.layers import Image

    return [
        layer
        for layer in viewer.layers
        if isinstance(layer, Image)
        and not layer.rgb
        and layer.ndim in (2, 3)
        and role_of(layer) in (None, "volume")
    ]


def labels_layers(viewer: ViewerModel, image: Image) -> list[Labels]:
    """Labels layers on the grid of an image that a person may have drawn."""
    from napari.layers import Labels

    return [
        layer
        for layer in viewer.layers
        if isinstance(layer, Labels)
        and not layer.multiscale
        and role_of(layer) in (None, "labels")
        and layer.data.shape == _array(image).shape
    ]


def layers_with_role(viewer: ViewerModel, role: Role, image: Image | None = None) -> list[Any]:
    """Layers the plugin made for a purpose, of one image or of all."""
    shape = stack(image).shape if image is not None else None
    return [
        layer for layer in viewer.layers if role_of(layer) == role and shape in (None, stack(layer).shape)
    ]


def open_volume(layer: Image, spacing: Sequence[float] | None = None) -> OpenVolume:
    """Return the volume of an image layer.

    Args:
        layer: An image layer.
        spacing: mm (z, y, x) that the user gave for it, if it was asked for.

    Raises:
        UserError: If its numbers cannot be a volume.
    """
    carried = volume_of(layer)
    if carried is not None and spacing is None:
        return OpenVolume(layer, carried, True, "from the file's header")
    array = stack(layer)
    if spacing is None:
        from_file = _same_as_file(layer, array)
        if from_file is not None:
            return OpenVolume(layer, from_file, True, "from the file's header")
    known, size, origin = spacing is not None, tuple(spacing or ()), "as you gave it"
    if spacing is None:
        known, size, origin = _spacing_of_layer(layer)
    return OpenVolume(layer, Volume.from_array(array, size, name=layer.name), known, origin)


def stack(layer: Layer) -> NDArray[Any]:
    """The array of a layer as (Z, Y, X); a view, so writing to it writes to the layer."""
    array = _array(layer)
    return array[None] if array.ndim == 2 else array


def current_slice(viewer: ViewerModel, layer: Layer) -> int:
    """Index of the slice that is shown, within the layer."""
    if layer.ndim == 2:
        return 0
    position = float(layer.world_to_data(viewer.dims.point)[0])
    return int(np.clip(round(position), 0, stack(layer).shape[0] - 1))


def go_to(viewer: ViewerModel, layer: Layer, z: int) -> None:
    """Show a slice of a layer."""
    if layer.ndim == 2:
        return
    world = layer.data_to_world((z, *[0] * (layer.ndim - 1)))
    axis = viewer.dims.ndim - layer.ndim
    viewer.dims.set_point(axis, float(world[0]))


def add_labels(
    viewer: ViewerModel, opened: OpenVolume, classes: Sequence[ClassEntry], data: NDArray[Any] | None = None
) -> Labels:
    """Add a layer to draw on, with the brush ready on the first class."""
    if data is None:
        data = np.zeros(opened.volume.shape, np.uint8)
    layer = _add(viewer, opened, data, f"{opened.layer.name} labels", "labels")
    viewer.layers.selection.active = layer
    set_classes(layer, classes)
    layer.brush_size = 8
    layer.mode = "paint"
    return layer


def show(
    viewer: ViewerModel,
    opened: OpenVolume,
    data: NDArray[Any],
    role: Role,
    classes: Sequence[ClassEntry] = (),
    *,
    name: str,
) -> Layer:
    """Show an array (Z, Y, X) in the layer of its role, made if needed; what is selected stays selected."""
    selected = viewer.layers.selection.active
    present = layers_with_role(viewer, role, opened.layer)
    if present:
        layer = present[0]
        layer.data = data.reshape(_array(layer).shape)
    else:
        layer = _add(viewer, opened, data, f"{opened.layer.name} {name}", role)
        if role == "comparison":
            layer.contour = 1
        if role in ("result", "preview"):
            layer.opacity = 0.45
    if classes:
        set_classes(layer, classes)
    if role in ("result", "preview", "comparison"):
        layer.editable = False
    if selected is not None and selected in viewer.layers:
        viewer.layers.selection.active = selected
    return layer


def show_slice(layer: Labels, z: int, values: NDArray[Any]) -> None:
    """Replace one slice of a layer that the plugin owns."""
    stack(layer)[z] = values
    layer.refresh()


def remove(viewer: ViewerModel, role: Role, image: Image | None = None) -> None:
    """Remove the layers of a role."""
    for layer in layers_with_role(viewer, role, image):
        viewer.layers.remove(layer)


def write_into(labels: Labels, values: NDArray[Any], where: NDArray[np.bool_]) -> None:
    """Write values (Z, Y, X) into a layer that a person draws on, as one step that Ctrl+Z takes back."""
    if values.max(initial=0) > np.iinfo(labels.data.dtype).max:
        raise UserError(
            f"the labels layer holds numbers up to {np.iinfo(labels.data.dtype).max}, the result has larger ones"
        )
    changed = where & (stack(labels) != values)
    indices = np.nonzero(changed)
    if indices[0].size:
        kept = indices if labels.ndim == 3 else indices[1:]
        labels.data_setitem(kept, values[indices].astype(labels.data.dtype))


def set_classes(layer: Labels, classes: Sequence[ClassEntry]) -> None:
    """Give a layer the colours and names of the classes; a value without a class shows grey."""
    from napari.utils import DirectLabelColormap

    colors: dict[int | None, Any] = {None: (0.6, 0.6, 0.6, 1), 0: (0, 0, 0, 0)}
    colors |= {entry.value: entry.color for entry in classes}
    layer.colormap = DirectLabelColormap(color_dict=colors)
    layer.metadata.setdefault(KEY, {})["classes"] = {entry.value: entry.name for entry in classes}


def class_names(layer: Layer) -> Mapping[int, str]:
    """Names of label values that a layer carries."""
    names: Mapping[int, str] = layer.metadata.get(KEY, {}).get("classes", {})
    return names


def watch_labels(layer: Labels, changed: Callable[..., None]) -> Callable[[], None]:
    """Call back when a layer's labels may have changed, by brush, undo or script; returns what ends it."""
    events = (layer.events.paint, layer.events.set_data, layer.events.data)
    for event in events:
        event.connect(changed)

    def unwatch() -> None:
        for event in events:
            event.disconnect(changed)

    return unwatch


def _array(layer: Layer) -> NDArray[Any]:
    data = layer.data[0] if getattr(layer, "multiscale", False) else layer.data
    return data if isinstance(data, np.ndarray) else np.asarray(data)


def _add(viewer: ViewerModel, opened: OpenVolume, data: NDArray[Any], name: str, role: Role) -> Any:
    """Add a layer that lies exactly over the image."""
    image = opened.layer
    data = data.reshape(_array(image).shape)
    arguments: dict[str, Any] = {
        "name": name,
        "scale": image.scale,
        "translate": image.translate,
        "rotate": image.rotate,
        "shear": image.shear,
        "affine": image.affine,
        "units": image.units,
        "axis_labels": image.axis_labels,
        "metadata": {KEY: {"volume": opened.volume, "role": role}},
    }
    if role == "uncertainty":
        return viewer.add_image(
            data, colormap="magma", blending="additive", contrast_limits=(0, 1), **arguments
        )
    return viewer.add_labels(data, **arguments)


def _same_as_file(layer: Image, array: NDArray[Any]) -> Volume | None:
    """The volume in the layer's file, if another reader opened it in the order that we would."""
    if not layer.source.path:
        return None
    try:
        volume = read_volume(layer.source.path)
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
