"""Self-similarity, its equivariance, and look-alikes on the worker thread.

A task that was cancelled returns None: nobody hears it.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.progress import Progress
from napari_kaf._explore_lab import Lab
from napari_kaf._jobs import Control, Report

if TYPE_CHECKING:
    from kaf_model.explore.equivariance import EquivarianceError

NUM_POINTS = 32  # places of a slice that its equivariance error is measured at
THUMBNAIL = 48  # pixels a side
Place = tuple[float, float, float]
Image = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SimilarityAnswer:
    """How similar places are to one place.

    Attributes:
        place: The place, voxel (z, y, x).
        level: The level of `heat`.
        slices: The slices that were looked at.
        images: Each slice as the network reads it, (H, W).
        pixel: The place on its image (y, x).
        maps: Cosine similarity of each cell, by slice and level, (h, w).
        heat: The same at `level` on the voxels of each slice, (K, Y, X).
        seconds: Time it took, without that of the features.
        waited: Time the features took; next to nothing when they were there.
    """

    place: Place
    level: int
    slices: Sequence[int]
    images: Mapping[int, Image]
    pixel: tuple[float, float]
    maps: Mapping[tuple[int, int], Image]
    heat: Image
    seconds: float
    waited: float


@dataclass(frozen=True, eq=False)
class AugmentedView:
    """The similarity map of a place on an augmented slice.

    Attributes:
        image: The augmented slice.
        point: Where the place is on it, (y, x).
        computed: The map computed there.
        carried: The map of the slice, carried over by the transform.
        error: Mean absolute difference of both.
    """

    image: Image
    point: tuple[float, float]
    computed: Image
    carried: Image
    error: float


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """A place that looks like the one asked for.

    Attributes:
        place: Voxel (z, y, x).
        similarity: Cosine similarity.
        image: The surroundings, (THUMBNAIL, THUMBNAIL).
    """

    place: Place
    similarity: float
    image: Image


def similarity_task(
    lab: Lab, place: Place, level: int, neighbours: int, control: Control
) -> Generator[Any, None, SimilarityAnswer | None]:
    """Compare a place with all places of its slice and of its neighbours, at all levels."""
    z = round(place[0])
    last = lab.volume.num_slices - 1
    slices = list(range(max(z - neighbours, 0), min(z + neighbours, last) + 1))
    yield Report(Progress("computing features", 0, len(slices)))
    view = lab.view()
    from kaf_model.explore.similarity import similarity_maps

    asked = time.perf_counter()
    for number, other in enumerate(slices, start=1):
        if control.cancelled:
            return None
        view.features(other)
        yield Report(Progress("computing features", number, len(slices)))
    began = time.perf_counter()
    pixel = view.to_pixels(place)[0]
    found = similarity_maps(view, z, pixel, slices=slices)
    heat = np.stack([view.voxel_map(one.cells, level) for one in found if one.level == level])
    return SimilarityAnswer(
        place,
        level,
        slices,
        {other: view.image(other) for other in slices},
        (float(pixel[0]), float(pixel[1])),
        {(one.z, one.level): one.cells.cpu().numpy() for one in found},
        heat,
        time.perf_counter() - began,
        began - asked,
    )


def equivariance_task(
    lab: Lab, place: Place, level: int, draw: int, control: Control
) -> Generator[Any, None, list[AugmentedView | None] | None]:
    """Compare the similarity map of a place under two random augmentations with the one carried over.

    Returns:
        One view an augmentation; None for one where the place has left the slice.
    """
    yield Report(Progress("augmenting", 0, None))
    view = lab.view()
    from kaf_model.explore.equivariance import equivariance_maps

    z = round(place[0])
    pixel = view.to_pixels(place)[0]
    views: list[AugmentedView | None] = []
    for augmented in lab.augmented(z, draw):
        if control.cancelled:
            return None
        maps = equivariance_maps(view, z, pixel, augmented, level)
        views.append(
            AugmentedView(augmented.image, maps.point, maps.computed, maps.carried, maps.error)
            if maps is not None
            else None
        )
        yield Report(Progress("augmenting", 0, None))
    return views


def error_task(
    lab: Lab, z: int, level: int, draw: int, control: Control
) -> Generator[Any, None, EquivarianceError | None]:
    """Measure the equivariance error of a slice over random places, under the same augmentations."""
    yield Report(Progress("measuring equivariance", 0, None))
    return None if control.cancelled else lab.error(z, level, draw, NUM_POINTS)


def look_alikes_task(
    lab: Lab, place: Place, level: int, count: int, control: Control
) -> Generator[Any, None, list[Thumbnail] | None]:
    """Find the most similar places in other slices; the first thumbnail is the place itself."""
    yield Report(Progress("computing features", 0, None))
    view = lab.view()
    from kaf_model.explore.similarity import look_alikes

    z = round(place[0])
    pixel = view.to_pixels(place)[0]
    work = look_alikes(view, z, pixel, level=level, count=count)
    while not control.cancelled:
        try:
            yield Report(next(work))
        except StopIteration as finished:
            found = finished.value
            break
    else:
        work.close()
        return None
    thumbnails = [Thumbnail(place, 1.0, view.crop(z, pixel, THUMBNAIL))]
    return thumbnails + [
        Thumbnail(one.voxel, one.similarity, view.crop(one.z, one.point, THUMBNAIL)) for one in found
    ]
