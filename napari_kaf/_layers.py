"""The only place, with its sibling `_explore_layers`, that touches viewer layers, always on the GUI thread.

Arrays (Z, Y, X) become layers here; `_layer_volume` reads an image layer as a volume. A layer made by the
plugin or its reader carries its volume and its part in `layer.metadata[KEY]`, so that it is recognised
whatever it is called, and is written back on the grid of its file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import UserError
from kaf_model.volume import Volume
from napari_kaf._classes import ClassEntry
from napari_kaf._layer_volume import (
    KEY,
    OpenVolume,
    Role,
    finest,
    image_arguments,
    layer_arguments,
    num_frames,
    open_volume,
    remember,
    role_of,
    stack,
    stack_shape,
    volume_of,
)

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image, Labels, Layer

__all__ = [
    "KEY",
    "OpenVolume",
    "Role",
    "add_labels",
    "add_volume",
    "adopt",
    "belongs_to",
    "bring_forward",
    "carry_on",
    "class_names",
    "current_slice",
    "finest",
    "go_to",
    "image_layers",
    "labels_layers",
    "layer_arguments",
    "layers_with_role",
    "num_frames",
    "open_volume",
    "remove",
    "replace_volume",
    "role_of",
    "set_classes",
    "show",
    "show_slice",
    "shows_slices",
    "stack",
    "stack_shape",
    "volume_of",
    "watch_labels",
    "write_into",
]


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
        and layer.data.shape == finest(image).shape
        and belongs_to(viewer, layer, image)
    ]


def layers_with_role(viewer: ViewerModel, role: Role, image: Image | None = None) -> list[Any]:
    """Layers the plugin made for a purpose, of one image or of all."""
    layers = [layer for layer in viewer.layers if role_of(layer) == role]
    if image is None:
        return layers
    shape = stack_shape(image)
    return [layer for layer in layers if stack_shape(layer) == shape and belongs_to(viewer, layer, image)]


def belongs_to(viewer: ViewerModel, layer: Layer, image: Image) -> bool:
    """Whether a layer was not made for another image that is open: two may have one grid."""
    owner = layer.metadata.get(KEY, {}).get("image", id(image))
    return owner == id(image) or owner not in {id(other) for other in image_layers(viewer)}


def bring_forward(viewer: ViewerModel, image: Image) -> None:
    """Show an image with what belongs to it, and hide the others and what belongs to them."""
    others = [layer for layer in image_layers(viewer) if layer is not image]
    own = stack_shape(image)
    for layer in viewer.layers:
        if layer in others or (role_of(layer) and stack_shape(layer) != own):
            layer.visible = False
        elif role_of(layer):
            layer.visible = belongs_to(viewer, layer, image)
    image.visible = True
    count = own[0]
    position = float(image.world_to_data(viewer.dims.point)[0]) if image.ndim == 3 else 0.0
    if not -0.5 <= position < count - 0.5:
        go_to(viewer, image, count // 2)
        viewer.reset_view()


def current_slice(viewer: ViewerModel, layer: Layer) -> int:
    """Index of the slice that is shown, within the layer."""
    if layer.ndim == 2:
        return 0
    position = float(layer.world_to_data(viewer.dims.point)[0])
    return int(np.clip(round(position), 0, stack_shape(layer)[0] - 1))


def shows_slices(viewer: ViewerModel, layer: Layer) -> bool:
    """Whether the viewer shows one slice (Y, X) of a layer at a time."""
    return layer.ndim == 2 or viewer.dims.ndim - layer.ndim in viewer.dims.not_displayed


def go_to(viewer: ViewerModel, layer: Layer, z: int) -> None:
    """Show a slice of a layer."""
    if layer.ndim == 2:
        return
    world = layer.data_to_world((z, *[0] * (layer.ndim - 1)))
    axis = viewer.dims.ndim - layer.ndim
    viewer.dims.set_point(axis, float(world[0]))


def add_volume(viewer: ViewerModel, volume: Volume, name: str, num_frames: int = 1) -> Image:
    """Add a volume as an image layer."""
    layer: Image = viewer.add_image(volume.array, **image_arguments(volume, name, num_frames))
    return layer


def replace_volume(viewer: ViewerModel, opened: OpenVolume, volume: Volume) -> Image:
    """Show a volume in the place of another of other axes; what the plugin showed over that one goes too."""
    old = opened.layer
    for role in ("result", "preview", "comparison", "uncertainty"):
        remove(viewer, role, old)
    name, limits, colormap = old.name, old.contrast_limits, old.colormap
    viewer.layers.remove(old)
    layer = add_volume(viewer, volume, name, num_frames(old))
    layer.contrast_limits, layer.colormap = limits, colormap
    viewer.layers.move(len(viewer.layers) - 1, 0)
    viewer.reset_view()
    go_to(viewer, layer, volume.num_slices // 2)
    return layer


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


def adopt(layer: Labels, opened: OpenVolume) -> None:
    """Let labels carry the volume they are drawn on, unless they were read with a grid of their own."""
    if role_of(layer) is None or not layer.source.path:
        remember(layer, opened.volume)


def carry_on(viewer: ViewerModel, image: Image, old: Volume, new: Volume) -> None:
    """Let the layers that lie on an image, and carry its volume, carry what it became."""
    for layer in viewer.layers:
        carried = volume_of(layer)
        if layer is image or carried is None:
            continue
        if carried.array is old.array or layer.metadata[KEY].get("image") == id(image):
            remember(layer, new)


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
        layer.data = data.reshape(finest(layer).shape)
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


def _add(viewer: ViewerModel, opened: OpenVolume, data: NDArray[Any], name: str, role: Role) -> Any:
    """Add a layer that lies exactly over the image."""
    image = opened.layer
    data = data.reshape(finest(image).shape)
    arguments: dict[str, Any] = {
        "name": name,
        "scale": image.scale,
        "translate": image.translate,
        "rotate": image.rotate,
        "shear": image.shear,
        "affine": image.affine,
        "units": image.units,
        "axis_labels": image.axis_labels,
        "metadata": {KEY: {"volume": opened.volume, "role": role, "image": id(image)}},
    }
    if role == "uncertainty":
        return viewer.add_image(
            data, colormap="magma", blending="additive", opacity=0.5, contrast_limits=(0, 1), **arguments
        )
    return viewer.add_labels(data, **arguments)
