"""The layers of the Explore panel: made, changed and removed here alone, on the GUI thread.

A sibling of `_layers` for points, arrows, tracks and heat maps. They carry the role "explore" and their part
in `layer.metadata[KEY]`, are named "Explore: ...", lie together above the others, and never take the
selection from the layer that is drawn on, except while a person picks places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from napari_kaf._layers import KEY, OpenVolume, role_of, stack_shape

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Layer

Part = Literal[
    "keypoints",
    "orientations",
    "tracks",
    "learned tracks",
    "attention",
    "attention arrows",
    "similarity",
    "places",
]
PARTS: tuple[Part, ...] = get_args(Part)
Floats = NDArray[np.floating[Any]]


class Descriptor(np.ndarray[Any, np.dtype[np.float32]]):
    """A descriptor as an entry of a layer's table; napari prints the table's entries while the pointer moves."""

    def __str__(self) -> str:
        return f"{len(self)} numbers"


def descriptor_column(descriptors: Floats) -> NDArray[np.object_]:
    """Descriptors (N, D) as one column of a table, (N,); `np.stack` makes the array again."""
    column = np.empty(len(descriptors), object)
    column[:] = list(descriptors.view(Descriptor))
    return column


def part_of(layer: Layer) -> Part | None:
    """The part that a layer plays in Explore, if it has one."""
    part: Part | None = layer.metadata.get(KEY, {}).get("part")
    return part


def find(viewer: ViewerModel, part: Part) -> Any | None:
    """The layer of a part, if it is there."""
    return next((layer for layer in viewer.layers if part_of(layer) == part), None)


def remove(viewer: ViewerModel, parts: Sequence[Part] = PARTS) -> None:
    """Remove the layers of some parts, or all."""
    for layer in [layer for layer in viewer.layers if part_of(layer) in parts]:
        viewer.layers.remove(layer)


def set_visible(viewer: ViewerModel, parts: Sequence[Part], visible: bool) -> None:
    """Show or hide the layers of some parts."""
    for layer in viewer.layers:
        if part_of(layer) in parts and layer.visible != visible:
            layer.visible = visible


def show_points(
    viewer: ViewerModel,
    opened: OpenVolume,
    part: Part,
    voxels: Floats,
    *,
    sizes: Floats,
    colors: Floats,
    symbol: str,
    outline: float = 0.0,
    features: dict[str, Any] | None = None,
) -> None:
    """Show points of a volume.

    Args:
        viewer: The viewer.
        opened: The volume.
        part: Which layer.
        voxels: (N, 3) voxels (z, y, x).
        sizes: (N,) diameters in voxels.
        colors: (N, 4) RGBA.
        symbol: A symbol of napari's points.
        outline: Width of the outline in voxels; 0 fills the symbols instead.
        features: Columns of the layer's table, each (N,).
    """
    points = voxels[:, 3 - opened.layer.ndim :]
    layer = find(viewer, part)
    if layer is None:
        with _selection_kept(viewer):
            layer = viewer.add_points(
                points,
                ndim=opened.layer.ndim,
                border_width=0,
                border_width_is_relative=False,
                **_place(opened, part),
            )
    else:
        layer.data = points
    layer.editable = False
    layer.features = features or {}
    if len(points):
        layer.symbol = symbol
        layer.size = sizes
        layer.border_width = outline
        layer.border_color = colors
        layer.face_color = "transparent" if outline else colors
    layer.refresh()


def show_arrows(
    viewer: ViewerModel,
    opened: OpenVolume,
    part: Part,
    voxels: Floats,
    steps: Floats,
    *,
    colors: Floats,
    width: float,
    style: str,
) -> None:
    """Show arrows, or lines, of a volume.

    Args:
        viewer: The viewer.
        opened: The volume.
        part: Which layer.
        voxels: Where they begin, (N, 3) voxels (z, y, x).
        steps: To where they end, (N, 3).
        colors: (N, 4) RGBA.
        width: In voxels.
        style: "arrow" or "line".
    """
    first = 3 - opened.layer.ndim
    data = np.stack([voxels[:, first:], steps[:, first:]], axis=1)  # (N, 2, ndim)
    layer = find(viewer, part)
    if layer is None:
        with _selection_kept(viewer):
            layer = viewer.add_vectors(
                data, ndim=opened.layer.ndim, vector_style=style, opacity=1.0, **_place(opened, part)
            )
    else:
        layer.data = data
    layer.edge_width = width
    if len(data):
        layer.edge_color = colors


def show_tracks(
    viewer: ViewerModel,
    opened: OpenVolume,
    part: Part,
    vertices: Floats,
    features: dict[str, Floats],
    *,
    color_by: str,
    colormap: str,
    step: int,
) -> None:
    """Show tracks through the stack, coloured by a measure; of no tracks no layer is left.

    Args:
        viewer: The viewer.
        opened: The volume.
        part: Which layer.
        vertices: Track, z, y, x in voxels, (V, 4).
        features: Columns of the layer's table, each (V,).
        color_by: The column that gives the colours.
        colormap: Name of a colormap of napari's.
        step: Slices from one vertex to the next: as far as a track is seen from the shown slice.
    """
    remove(viewer, [part])
    if not len(vertices):
        return
    with _selection_kept(viewer):
        layer = viewer.add_tracks(
            vertices,
            features=features,
            colormap=colormap,
            tail_width=3,
            tail_length=step,
            head_length=step,
            blending="translucent",
            **_place(opened, part),
        )
        layer.color_by = color_by


def show_heat(
    viewer: ViewerModel,
    opened: OpenVolume,
    part: Part,
    maps: NDArray[np.float32],
    *,
    first: int,
    limits: tuple[float, float],
) -> None:
    """Lay heat maps over some slices.

    Args:
        viewer: The viewer.
        opened: The volume.
        part: Which layer.
        maps: (K, Y, X) of the slices from `first` on.
        first: The first slice.
        limits: Values of the darkest and the brightest colour.
    """
    from napari.utils.transforms import Affine

    image = opened.layer
    data = maps if image.ndim == 3 else maps[0]
    place = _place(opened, part)
    linear = Affine(scale=image.scale, rotate=image.rotate, shear=image.shear).linear_matrix
    offset = linear @ np.array([first, 0, 0])[3 - image.ndim :] if image.ndim == 3 else 0
    place["translate"] = np.asarray(image.translate) + offset
    layer = find(viewer, part)
    if layer is None:
        with _selection_kept(viewer):
            layer = viewer.add_image(
                data,
                colormap="inferno",
                blending="translucent",
                opacity=0.55,
                contrast_limits=limits,
                **place,
            )
    else:
        layer.data = data
        layer.translate = place["translate"]
    layer.contrast_limits_range = (-1.0, 1.0)
    layer.contrast_limits = limits


def take_clicks(viewer: ViewerModel, opened: OpenVolume) -> Layer | None:
    """Select the layer of places, so that a click draws nowhere; returns what was selected before."""
    before: Layer | None = viewer.layers.selection.active
    layer = find(viewer, "places")
    if layer is None:
        empty = np.zeros((0, 3))
        show_points(
            viewer, opened, "places", empty, sizes=empty[:, 0], colors=np.zeros((0, 4)), symbol="cross"
        )
        layer = find(viewer, "places")
    viewer.layers.selection.active = layer
    return None if before is not None and role_of(before) == "explore" else before


def has_clicks(viewer: ViewerModel) -> bool:
    """Whether the layer of places is selected, and nothing else."""
    active = viewer.layers.selection.active
    return active is not None and part_of(active) == "places"


def give_back(viewer: ViewerModel, layer: Layer | None) -> None:
    """Select a layer again, if it is still there and places are what is selected."""
    if has_clicks(viewer):
        if layer is not None and layer in viewer.layers:
            viewer.layers.selection.active = layer
        else:
            viewer.layers.selection.clear()


def voxel_at(opened: OpenVolume, position: Sequence[float]) -> tuple[float, float, float] | None:
    """The voxel (z, y, x) of a volume at a position of the world, or None outside of it."""
    layer = opened.layer
    inside = np.asarray(layer.world_to_data(position), float)[-layer.ndim :]
    voxel = np.concatenate([np.zeros(3 - layer.ndim), inside])
    voxel[0] = np.round(voxel[0])
    if np.any(voxel < -0.5) or np.any(voxel > np.array(stack_shape(layer)) - 0.5):
        return None
    return float(voxel[0]), float(voxel[1]), float(voxel[2])


def look_at(viewer: ViewerModel, opened: OpenVolume, voxel: Sequence[float]) -> None:
    """Bring a voxel (z, y, x) to the middle of the canvas."""
    layer = opened.layer
    world = np.asarray(layer.data_to_world(tuple(voxel[3 - layer.ndim :])), float)
    ahead = viewer.dims.ndim - layer.ndim
    if layer.ndim == 3:
        viewer.dims.set_point(ahead, float(world[0]))
    shown = [axis - ahead for axis in viewer.dims.displayed if axis >= ahead]
    camera = viewer.scene.camera
    centre = np.array(camera.center, float)
    centre[3 - len(shown) :] = world[shown]
    camera.center = tuple(centre)


def _place(opened: OpenVolume, part: Part) -> dict[str, Any]:
    """Arguments that put a layer over the image and say whose it is."""
    image = opened.layer
    return {
        "name": f"Explore: {part}",
        "scale": image.scale,
        "translate": image.translate,
        "rotate": image.rotate,
        "shear": image.shear,
        "affine": image.affine,
        "units": image.units,
        "axis_labels": image.axis_labels,
        "metadata": {KEY: {"role": "explore", "part": part}},
    }


@contextmanager
def _selection_kept(viewer: ViewerModel) -> Iterator[None]:
    """Add a layer to its group without taking the selection."""
    selected = viewer.layers.selection.active
    yield
    _gather(viewer)
    if selected is not None and selected in viewer.layers:
        viewer.layers.selection.active = selected
    else:
        viewer.layers.selection.clear()


def _gather(viewer: ViewerModel) -> None:
    """Put the layer that was added last on top of the others of Explore, but under the places."""
    *others, newest = [layer for layer in viewer.layers if part_of(layer) is not None]
    if others:
        above = 0 if part_of(others[-1]) == "places" else 1
        viewer.layers.move(viewer.layers.index(newest), viewer.layers.index(others[-1]) + above)
