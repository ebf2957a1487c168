"""Self-similarity of features (paper, section 4 "Qualitative Analysis", Fig. 3 and 8), and look-alikes.

The similarity of two places is the cosine of the angle between their features at one encoder level.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kaf_model.explore.views import LEVELS, SliceFeatures, VolumeView, cell_centres
from kaf_model.progress import Progress


@dataclass(frozen=True, eq=False)
class SimilarityMap:
    """How similar every cell of a slice is to one place.

    Attributes:
        z: The slice.
        level: The level, 1 (fine) to 4 (coarse).
        cells: Cosine similarity -1..1 of each cell, (h, w).
    """

    z: int
    level: int
    cells: Tensor


@dataclass(frozen=True)
class LookAlike:
    """A place in another slice that looks to the network like the one asked for.

    Attributes:
        z: The slice.
        point: Pixel (y, x) of the resampled slice, the centre of its cell.
        voxel: The same place in the volume, (z, y, x).
        similarity: Cosine similarity -1..1.
    """

    z: int
    point: tuple[float, float]
    voxel: tuple[float, float, float]
    similarity: float


def similarity_to(query: Tensor, features: SliceFeatures, level: int) -> Tensor:
    """Cosine similarity of every cell of a slice with each of N unit features.

    Args:
        query: (N, C) unit features of the level, as from `SliceFeatures.at`.
        features: The slice.
        level: The level.

    Returns:
        (N, h, w)
    """
    maps = features.level(level)
    height, width, channels = maps.shape
    return (query @ maps.view(-1, channels).T).clamp(-1, 1).view(len(query), height, width)


def similarity_maps(
    view: VolumeView,
    z: int,
    point: ArrayLike,
    *,
    slices: Sequence[int] | None = None,
    levels: Sequence[int] = LEVELS,
) -> list[SimilarityMap]:
    """Similarity of one place with all places of its slice and of others.

    Args:
        view: The volume.
        z: The slice of the place.
        point: The place, pixel (y, x) of the resampled slice.
        slices: The slices to look at; default: z alone.
        levels: The levels to look at.

    Returns:
        One map a slice and level, all levels of the first slice first.
    """
    queries = {level: view.features(z).at(point, level) for level in levels}
    return [
        SimilarityMap(other, level, similarity_to(queries[level], view.features(other), level)[0])
        for other in ([z] if slices is None else slices)
        for level in levels
    ]


def look_alikes(
    view: VolumeView,
    z: int,
    point: ArrayLike,
    *,
    level: int = 3,
    count: int = 8,
    distance: float = 16.0,
    slices: Sequence[int] | None = None,
) -> Generator[Progress, None, list[LookAlike]]:
    """Find the places in other slices that are most similar to one place.

    Of places in one slice that are closer than `distance` along both axes only the most similar counts.

    Args:
        view: The volume.
        z: The slice of the place.
        point: The place, pixel (y, x) of the resampled slice.
        level: The level whose features are compared.
        count: How many places to return at most.
        distance: In pixels of the resampled slice.
        slices: Where to look; default: all slices but z.

    Yields:
        One report a slice.

    Returns:
        The places, the most similar first.
    """
    query = view.features(z).at(point, level)
    others = [other for other in range(view.num_slices) if other != z] if slices is None else list(slices)
    found: list[LookAlike] = []
    for number, other in enumerate(others, start=1):
        similarity = similarity_to(query, view.features(other), level)[0]
        cells, values = peaks(similarity, count, distance / 2 ** (level - 1))
        points = np.minimum(cell_centres(cells, level), np.array(view.shape) - 1)  # the last may go beyond
        for pixel, voxel, value in zip(points, view.to_voxels(other, points), values, strict=True):
            place = LookAlike(
                z=other,
                point=(float(pixel[0]), float(pixel[1])),
                voxel=(float(voxel[0]), float(voxel[1]), float(voxel[2])),
                similarity=float(value),
            )
            found.append(place)
        found = sorted(found, key=lambda place: (-place.similarity, place.z, place.point))[:count]
        yield Progress("looking for similar places", number, len(others))
    return found


def peaks(cells: Tensor, count: int, distance: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The highest cells of a map, none closer to a higher one than a distance along both axes.

    Args:
        cells: (h, w)
        count: At most this many.
        distance: In cells.

    Returns:
        Cells (row, column) (n, 2) and their values (n,), highest first.
    """
    left = cells.clone()
    reach = max(int(np.ceil(distance)) - 1, 0)
    chosen: list[tuple[int, int]] = []
    while len(chosen) < count:
        row, column = divmod(int(left.argmax()), left.shape[1])
        if not torch.isfinite(left[row, column]):
            break
        chosen.append((row, column))
        left[max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1] = -torch.inf
    found = np.array(chosen, np.int64).reshape(-1, 2)
    return found, cells[found[:, 0], found[:, 1]].cpu().numpy()
