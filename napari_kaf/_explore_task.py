"""Keypoints, matches, tracks and attention on the worker thread, as arrays in voxels of the volume.

A task that was cancelled returns None: nobody hears it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.config import CorrespondenceConfig, KeypointConfig
from kaf_model.errors import UserError
from kaf_model.progress import Progress
from napari_kaf._explore_lab import Lab
from napari_kaf._jobs import Control, Report

if TYPE_CHECKING:
    from kaf_model.explore.tracks import Tracks
    from kaf_model.explore.views import VolumeView
    from kaf_model.keypoints import Keypoints

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class KeypointTable:
    """Keypoints of some slices.

    Attributes:
        voxels: Places (z, y, x), (N, 3).
        sizes: Diameter of the described neighbourhood in voxels, (N,).
        directions: Orientation as a step of half a diameter in voxels, (N, 3).
        responses: Strength, (N,).
        angles: Orientation in degrees, (N,).
        descriptors: (N, D)
        counts: How many each slice has.
    """

    voxels: Floats
    sizes: Floats
    directions: Floats
    responses: Floats
    angles: Floats
    descriptors: Floats
    counts: dict[int, int]


@dataclass(frozen=True, eq=False)
class PairMatches:
    """The keypoints of two slices, and how they go together.

    Attributes:
        z0: First slice.
        z1: Second slice.
        images: Both slices (H, W), normalised.
        points: Keypoints (N, 2) and (M, 2), pixels (y, x) of the images.
        pairs: By the heuristic, (P, 2).
        distances: Descriptor distance of each pair, (P,).
        learned: By the trained matcher, (Q, 2); None where there is none.
        probabilities: Of each learned pair, (Q,).
    """

    z0: int
    z1: int
    images: tuple[NDArray[np.float32], NDArray[np.float32]]
    points: tuple[NDArray[np.float32], NDArray[np.float32]]
    pairs: NDArray[np.int64]
    distances: Floats
    learned: NDArray[np.int64] | None
    probabilities: Floats


@dataclass(frozen=True, eq=False)
class TrackTable:
    """Tracks through the stack, ready for a layer.

    Attributes:
        vertices: Track, z, y, x in voxels, (V, 4).
        values: Descriptor distance or probability, (V,).
        num_tracks: How many tracks there are.
    """

    vertices: Floats
    values: Floats
    num_tracks: int


@dataclass(frozen=True, eq=False)
class AttentionRow:
    """What one keypoint attends to.

    Attributes:
        z: The slice.
        chosen: Index of the keypoint.
        voxels: All keypoints of the slice (z, y, x), (N, 3).
        weights: How much it attends to each, (N,), sums to 1.
        distance: From the click to the keypoint, mm.
    """

    z: int
    chosen: int
    voxels: Floats
    weights: Floats
    distance: float


def keypoints_task(
    lab: Lab, slices: Sequence[int], config: KeypointConfig, control: Control
) -> Generator[Any, None, KeypointTable | None]:
    """Find the keypoints of slices."""
    yield Report(Progress("finding keypoints", 0, len(slices)))
    view = lab.view()
    found: list[Keypoints] = []
    for number, z in enumerate(slices, start=1):
        if control.cancelled:
            return None
        found.append(view.keypoints(z, config))
        yield Report(Progress("finding keypoints", number, len(slices)))
    ratio = np.divide(view.stack.source_shape, view.stack.shape)  # voxels a pixel (y, x)
    angles = np.concatenate([np.deg2rad(one.angles) for one in found])
    scales = np.concatenate([one.scales for one in found])
    half = scales[:, None] / 2 * np.column_stack([np.sin(angles), np.cos(angles)]) * ratio
    return KeypointTable(
        voxels=np.concatenate(
            [view.to_voxels(z, one.positions) for z, one in zip(slices, found, strict=True)]
        ),
        sizes=scales * float(np.sqrt(ratio.prod())),
        directions=np.column_stack([np.zeros(len(half)), half]),
        responses=np.concatenate([one.responses for one in found]),
        angles=np.rad2deg(angles),
        descriptors=np.concatenate([one.descriptors for one in found]),
        counts={z: len(one) for z, one in zip(slices, found, strict=True)},
    )


def matches_task(
    lab: Lab, z0: int, z1: int, config: CorrespondenceConfig, control: Control
) -> Generator[Any, None, PairMatches | None]:
    """Match the keypoints of two slices by the heuristic, and by the trained matcher if there is one."""
    yield Report(Progress("matching", 0, None))
    view = lab.view()
    if control.cancelled:
        return None
    from kaf_model.correspondences import find_correspondences

    keypoints = [view.keypoints(z) for z in (z0, z1)]
    found = find_correspondences(keypoints[0], keypoints[1], config)
    yield Report(Progress("matching", 0, None))
    if control.cancelled:
        return None
    learned = lab.learned(z0, z1) if view.explorer.matching is not None else None
    return PairMatches(
        z0,
        z1,
        (view.image(z0), view.image(z1)),
        (keypoints[0].positions, keypoints[1].positions),
        found.pairs,
        found.distances,
        learned.pairs if learned is not None else None,
        learned.probabilities if learned is not None else np.zeros(0, np.float32),
    )


def tracks_task(
    lab: Lab,
    step: int,
    config: CorrespondenceConfig,
    probability: float,
    control: Control,
) -> Generator[Any, None, tuple[TrackTable, TrackTable | None] | None]:
    """Follow keypoints through the stack, by the heuristic and by the trained matcher if there is one.

    Args:
        lab: Network and volume.
        step: Distance of the slices that are matched.
        config: Of the heuristic.
        probability: Least one of a learned match.
        control: Of the task.
    """
    total = max(lab.volume.num_slices - step, 0)
    yield Report(Progress("following keypoints", 0, total))
    view = lab.view()
    from kaf_model.correspondences import find_correspondences
    from kaf_model.explore.tracks import Link, chain

    has_matcher = view.explorer.matching is not None
    links: list[Link] = []
    learned: list[Link] = []
    for z in range(total):
        if control.cancelled:
            return None
        found = find_correspondences(view.keypoints(z), view.keypoints(z + step), config)
        links.append(Link(z, z + step, found.pairs, found.distances))
        if has_matcher:
            matches = lab.learned(z, z + step).likelier_than(probability)
            learned.append(Link(z, z + step, matches.pairs, matches.probabilities))
        yield Report(Progress("following keypoints", z + 1, total))
    return _in_voxels(view, chain(links)), _in_voxels(view, chain(learned)) if has_matcher else None


def attention_task(
    lab: Lab,
    place: tuple[float, float, float],
    level: int,
    block: int,
    head: int | None,
    control: Control,
) -> Generator[Any, None, AttentionRow | None]:
    """Look up what the keypoint that is nearest to a voxel (z, y, x) attends to."""
    yield Report(Progress("attending", 0, None))
    view = lab.view()
    if control.cancelled:
        return None
    from kaf_model.explore.attention_weights import attention_weights

    z = round(place[0])
    positions = view.keypoints(z).positions
    if not len(positions):
        raise UserError(f"slice {z} has no keypoints, so nothing attends there; choose another slice")
    apart = np.linalg.norm((positions - view.to_pixels(place)[0]) * view.stack.spacing, axis=1)
    chosen = int(apart.argmin())
    weights = attention_weights(view.explorer, view.features(z), level, block, head)
    return AttentionRow(
        z, chosen, view.to_voxels(z, positions), weights[chosen].cpu().numpy(), float(apart[chosen])
    )


def _in_voxels(view: VolumeView, tracks: Tracks) -> TrackTable:
    vertices = np.zeros((len(tracks.tracks), 4))
    vertices[:, 0] = tracks.tracks
    for z in np.unique(tracks.slices).tolist():
        rows = tracks.slices == z
        vertices[rows, 1:] = view.to_voxels(z, view.keypoints(z).positions[tracks.keypoints[rows]])
    return TrackTable(vertices, tracks.values, tracks.num_tracks)
