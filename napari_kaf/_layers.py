"""The only place, with its sibling `_explore_layers`, that touches viewer layers, always on the GUI thread.

Arrays (Z, Y, X) become layers here; `_layer_volume` reads an image layer as a volume. A layer made by the
plugin or its reader carries its volume and its part in `layer.metadata[KEY]`, so that it is recognised
whatever it is called, and is written back on the grid of its file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
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
    note,
    num_frames,
    open_volume,
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
    "claim",
    "claimed",
    "class_names",
    "current_slice",
    "file_of",
    "finest",
    "go_to",
    "goes_with",
    "image_layers",
    "is_brushed",
    "keep_file",
    "labels_layers",
    "layer_arguments",
    "layers_with_role",
    "made_by",
    "num_frames",
    "open_volume",
    "own_labels",
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


def file_of(layer: Layer) -> Path | None:
    """The file that a layer was read from, also if the layer was made anew since."""
    path = layer.source.path or layer.metadata.get(KEY, {}).get("file")
    return Path(path) if path else None


def keep_file(layer: Layer, former: Layer) -> None:
    """Let a layer that was made anew tell the file of the one that it was made from."""
    file = file_of(former)
    if file is not None:
        note(layer, file=str(file))


def labels_layers(viewer: ViewerModel, image: Image) -> list[Labels]:
    """Labels layers on the grid of an image that may be drawn on for it."""
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


def own_labels(viewer: ViewerModel, image: Image) -> list[Labels]:
    """Those of its labels layers that go with an image: what was drawn for it, then what is named like it.

    Among these the selected one is first.
    """
    layers = [layer for layer in labels_layers(viewer, image) if goes_with(viewer, layer, image)]
    active = viewer.layers.selection.active
    return sorted(layers, key=lambda layer: (not claimed(layer), layer is not active))


def claim(layer: Layer, image: Image) -> None:
    """Take in that a layer is drawn on for an image, and so no other image's."""
    note(layer, image=id(image), of=_origin(image))


def claimed(layer: Layer) -> bool:
    """Whether a layer was made for one image or drawn on for it."""
    return "image" in layer.metadata.get(KEY, {})


def belongs_to(viewer: ViewerModel, layer: Layer, image: Image) -> bool:
    """Whether a layer is not another image's: two may have one grid.

    What was made for an image that was removed belongs to the same image when it is opened again.
    """
    made = layer.metadata.get(KEY, {})
    if not claimed(layer) or made["image"] == id(image):
        return True
    there = made["image"] in {id(other) for other in image_layers(viewer)}
    return not there and made["of"] == _origin(image)


def goes_with(viewer: ViewerModel, layer: Layer, image: Image) -> bool:
    """Whether a layer belongs to an image, and, if to several of one grid, is not named more like another."""
    if claimed(layer):
        return belongs_to(viewer, layer, image)
    rivals = (other for other in image_layers(viewer) if finest(other).shape == finest(image).shape)
    return all(_alike(layer.name, image.name) >= _alike(layer.name, other.name) for other in rivals)


def is_brushed(layer: Layer | None) -> bool:
    """Whether a layer holds labels, and a tool is taken up that changes them."""
    from napari.layers import Labels

    return (
        isinstance(layer, Labels)
        and str(layer.mode) not in ("pan_zoom", "transform", "pick")
        and layer.editable
    )


def bring_forward(viewer: ViewerModel, image: Image) -> None:
    """Show an image with what belongs to it, and hide the others and what belongs to them."""
    others = [layer for layer in image_layers(viewer) if layer is not image]
    own = stack_shape(image)
    for layer in viewer.layers:
        if layer in others or (role_of(layer) and stack_shape(layer) != own):
            layer.visible = False
        elif role_of(layer):
            layer.visible = goes_with(viewer, layer, image)
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
        note(layer, volume=opened.volume)


def carry_on(viewer: ViewerModel, image: Image, old: Volume, new: Volume) -> None:
    """Let the layers that lie on an image, and carry its volume, carry what it became."""
    for layer in viewer.layers:
        carried = volume_of(layer)
        if layer is image or carried is None:
            continue
        if carried.array is old.array or layer.metadata[KEY].get("image") == id(image):
            note(layer, volume=new)


def show(
    viewer: ViewerModel,
    opened: OpenVolume,
    data: NDArray[Any],
    role: Role,
    classes: Sequence[ClassEntry] = (),
    *,
    name: str,
    made_by: str = "",
) -> Layer:
    """Show an array (Z, Y, X) in the layer of its role, made if needed; what is selected stays selected.

    Args:
        viewer: Where.
        opened: The volume that it belongs to.
        data: (Z, Y, X).
        role: What it is shown as.
        classes: What its values are.
        name: Of the layer, after that of the volume.
        made_by: Key of the run that made it.
    """
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
    note(layer, run=made_by)
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


def write_into(labels: Labels, values: NDArray[Any], where: Mapping[int, NDArray[np.bool_]]) -> None:
    """Write into a layer that a person draws on, as one step that Ctrl+Z takes back.

    Args:
        labels: The layer.
        values: (Z, Y, X) to write.
        where: By slice, (Y, X) where to write them.
    """
    largest = np.iinfo(labels.data.dtype).max
    if values.max(initial=0) > largest:
        raise UserError(f"the labels layer holds numbers up to {largest}, the result has larger ones")
    array = stack(labels)
    changed = {z: np.nonzero(plane & (array[z] != values[z])) for z, plane in where.items()}
    rows = np.concatenate([np.full(len(y), z) for z, (y, _x) in changed.items()] or [np.zeros(0, int)])
    if rows.size:
        labels.visible = True  # napari keeps no slice of a hidden layer that it could write into
        indices = (rows, *(np.concatenate(axis) for axis in zip(*changed.values(), strict=True)))
        kept = indices if labels.ndim == 3 else indices[1:]
        labels.data_setitem(kept, values[indices].astype(labels.data.dtype))


def set_classes(layer: Labels, classes: Sequence[ClassEntry]) -> None:
    """Give a layer the colours and names of the classes; a value without a class shows grey."""
    from napari.utils import DirectLabelColormap

    colors: dict[int | None, Any] = {None: (0.6, 0.6, 0.6, 1), 0: (0, 0, 0, 0)}
    colors |= {entry.value: entry.color for entry in classes}
    layer.colormap = DirectLabelColormap(color_dict=colors)
    note(layer, classes={entry.value: entry.name for entry in classes})


def class_names(layer: Layer) -> Mapping[int, str]:
    """Names of label values that a layer carries."""
    names: Mapping[int, str] = layer.metadata.get(KEY, {}).get("classes", {})
    return names


def made_by(layer: Layer) -> str:
    """Key of the run that made what a layer shows, or nothing."""
    key: str = layer.metadata.get(KEY, {}).get("run", "")
    return key


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
    others = (other for other in image_layers(viewer) if other is not image)
    arguments: dict[str, Any] = {
        "name": name,
        "visible": role == "labels" or image.visible or not any(other.visible for other in others),
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
        layer = viewer.add_image(
            data, colormap="magma", blending="additive", opacity=0.5, contrast_limits=(0, 1), **arguments
        )
    else:
        layer = viewer.add_labels(data, **arguments)
    claim(layer, image)
    note(layer, made=id(layer))
    return layer


def _alike(name: str, other: str) -> int:
    """Letters in a row that two names share."""
    return SequenceMatcher(None, name, other, autojunk=False).find_longest_match().size


def _origin(image: Layer) -> tuple[str, int]:
    """Where an image came from, to know it again: file or name, and frame."""
    volume = volume_of(image)
    if volume is None:
        return str(image.source.path or image.name), 0
    return str(volume.source.path), volume.source.frame
