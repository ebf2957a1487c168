"""From volumes and networks to figures: what the commands of `kaf figure` draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from kaf_model.config import CorrespondenceConfig
from kaf_model.correspondences import Correspondences, find_correspondences, restrict
from kaf_model.errors import UserError
from kaf_model.explore.equivariance import (
    AugmentedSlice,
    EquivarianceMaps,
    MovedSlice,
    augment_slice,
    equivariance_errors,
    equivariance_maps,
    move_slice,
    random_transform,
)
from kaf_model.explore.matches import match_features
from kaf_model.explore.similarity import similarity_to
from kaf_model.explore.views import VolumeView, level_to_pixels
from kaf_model.figures.correspondences import PairPanel, correspondence_figure, radius_figure
from kaf_model.figures.keypoints import KeypointRow, keypoint_figure
from kaf_model.figures.similarity import (
    AugmentedImage,
    NeighbourRow,
    SimilarityRow,
    neighbour_similarity_figure,
    similarity_figure,
)

_ATTEMPTS = 100


def draw_keypoints_of(
    view: VolumeView, slices: Sequence[int], *, seed: int = 0, orientation: bool = False, title: str = ""
) -> Figure:
    """Draw the keypoints of slices before and after augmentation."""
    rows = []
    for z in slices:
        keypoints, moved = view.keypoints(z), _moved(view, z, seed)
        rows.append(
            KeypointRow(f"slice {z}", view.image(z), keypoints, moved.image, moved.kept, moved.points)
        )
    _need_keypoints(view, slices)
    return keypoint_figure(rows, orientation=orientation, title=title)


def draw_correspondences_of(
    view: VolumeView,
    z0: int,
    z1: int,
    config: CorrespondenceConfig,
    *,
    seed: int = 0,
    probability: float = 0.2,
    title: str = "",
) -> Figure:
    """Draw the correspondences of two slices before and after augmentation, and learned matches if there are.

    Learned matches are those of a network with a matcher that are likelier than `probability`; the network
    sees the augmented slices, so after augmentation they are matched anew.
    """
    _need_keypoints(view, (z0, z1))
    keypoints0, keypoints1 = view.keypoints(z0), view.keypoints(z1)
    found = find_correspondences(keypoints0, keypoints1, config)
    moved0, moved1 = _moved(view, z0, 2 * seed), _moved(view, z1, 2 * seed + 1)
    left = restrict(found, _mask(moved0.kept, len(keypoints0)), _mask(moved1.kept, len(keypoints1)))
    points = keypoints0.positions, keypoints1.positions
    before = _pair(f"slices {z0} and {z1}", (view.image(z0), view.image(z1)), points, found)
    after = _pair("augmented", (moved0.image, moved1.image), (moved0.points, moved1.points), left)
    if view.explorer.matching is None:
        return correspondence_figure([before, after], title=title)
    seen0, seen1 = augment_slice(view, z0, seed=2 * seed), augment_slice(view, z1, seed=2 * seed + 1)
    learned = []
    for panel, features in (
        (before, (view.features(z0), view.features(z1))),
        (after, (seen0.features, seen1.features)),
    ):
        sure = match_features(view.explorer, *features).likelier_than(probability)
        learned.append(
            replace(
                panel,
                name=f"{panel.name}, learned",
                pairs=sure.pairs,
                values=sure.probabilities,
                quantity="probability",
            )
        )
    return correspondence_figure([before, learned[0], after, learned[1]], columns=2, title=title)


def draw_radii_of(
    view: VolumeView,
    z0: int,
    z1: int,
    radii: Sequence[float],
    *,
    ratio: float | None = None,
    title: str = "",
) -> Figure:
    """Draw the correspondences of two slices for a row of radii."""
    _need_keypoints(view, (z0, z1))
    keypoints0, keypoints1 = view.keypoints(z0), view.keypoints(z1)
    images = view.image(z0), view.image(z1)
    points = keypoints0.positions, keypoints1.positions
    panels = []
    for radius in radii:
        found = find_correspondences(keypoints0, keypoints1, CorrespondenceConfig(radius=radius, ratio=ratio))
        panels.append(_pair(f"radius {radius:g} pixels", images, points, found))
    return radius_figure(panels, title=title)


def draw_similarity_of(
    views: Mapping[str, VolumeView],
    z: int,
    *,
    point: ArrayLike | None = None,
    levels: Sequence[int] = (3, 4),
    num_points: int = 32,
    seed: int = 0,
    title: str = "",
) -> Figure:
    """Draw self-similarity under two augmentations for several networks that look at one volume.

    Args:
        views: The volume as each network sees it, by what to call the network.
        z: The slice.
        point: Voxel (y, x); default: the strongest keypoint that stays on both augmentations.
        levels: The levels to draw.
        num_points: Random points for the mean equivariance error.
        seed: Of augmentations and points.
        title: Heading of the figure.

    Raises:
        UserError: If the networks read slices of different sizes, or the point leaves all augmentations.
    """
    first = _same_grid(views)
    seeds, chosen = _augmentations_with(first, z, point, seed)
    rows = []
    shown: list[AugmentedSlice] = []
    for name, view in views.items():
        augmented = [augment_slice(view, z, seed=one) for one in seeds]
        shown = shown or augmented
        rows.append(
            SimilarityRow(
                name,
                {
                    level: (
                        _maps(view, z, chosen, augmented[0], level),
                        _maps(view, z, chosen, augmented[1], level),
                    )
                    for level in levels
                },
                {
                    error.level: error
                    for error in equivariance_errors(view, z, num_points=num_points, seed=seed, levels=levels)
                },
            )
        )
    images = AugmentedImage(shown[0].image, shown[0].inside), AugmentedImage(shown[1].image, shown[1].inside)
    return similarity_figure(first.image(z), chosen.tolist(), images, rows, title=title)


def draw_neighbours_of(
    views: Mapping[str, VolumeView],
    slices: Sequence[int],
    *,
    point: ArrayLike | None = None,
    levels: Sequence[int] = (3, 4),
    title: str = "",
) -> Figure:
    """Draw the self-similarity of a point of the first slice on it and on others, for several networks.

    Args:
        views: The volume as each network sees it, by what to call the network.
        slices: The slice of the point, then others.
        point: Voxel (y, x); default: the strongest keypoint.
        levels: The levels to draw.
        title: Heading of the figure.

    Raises:
        UserError: If the networks read slices of different sizes.
    """
    first = _same_grid(views)
    z = slices[0]
    chosen = _pixel(first, z, point) if point is not None else _strongest(first, z)[0]
    rows = []
    for name, view in views.items():
        maps = {}
        for level in levels:
            query = view.features(z).at(chosen, level)
            maps[level] = [
                level_to_pixels(similarity_to(query, view.features(other), level), level, view.shape)[0]
                .cpu()
                .numpy()
                for other in slices
            ]
        rows.append(NeighbourRow(name, maps))
    names = [f"slice {other}" for other in slices]
    return neighbour_similarity_figure(
        [first.image(other) for other in slices], names, chosen.tolist(), rows, title=title
    )


def _pair(
    name: str,
    images: tuple[NDArray[np.float32], NDArray[np.float32]],
    points: tuple[NDArray[np.float32], NDArray[np.float32]],
    found: Correspondences,
) -> PairPanel:
    return PairPanel(
        name=name,
        image0=images[0],
        image1=images[1],
        points0=points[0],
        points1=points[1],
        pairs=found.pairs,
        values=found.distances,
        quantity="descriptor distance",
    )


def _moved(view: VolumeView, z: int, seed: int) -> MovedSlice:
    transform = random_transform(view.shape, seed=seed, z=z)
    return move_slice(view.read(z), view.keypoints(z).positions, transform)


def _maps(
    view: VolumeView, z: int, point: NDArray[np.float64], augmented: AugmentedSlice, level: int
) -> EquivarianceMaps:
    maps = equivariance_maps(view, z, point, augmented, level)
    assert maps is not None  # the augmentations were chosen so
    return maps


def _augmentations_with(
    view: VolumeView, z: int, point: ArrayLike | None, seed: int
) -> tuple[tuple[int, int], NDArray[np.float64]]:
    """Seeds of the first two augmentations on which a point stays, and the point in pixels."""
    candidates = _strongest(view, z) if point is None else _pixel(view, z, point)[None]
    staying = [
        (number, _moved(view, z, number).carry_points(candidates)[1])
        for number in range(2 * seed, 2 * seed + (_ATTEMPTS if point is not None else 2))
    ]
    for index, candidate in enumerate(candidates):
        seeds = [number for number, valid in staying if valid[index]]
        if len(seeds) >= 2:
            return (seeds[0], seeds[1]), candidate
    raise UserError("the point leaves the augmented slices; choose one nearer to the middle with --point Y,X")


def _strongest(view: VolumeView, z: int) -> NDArray[np.float64]:
    """Keypoints of a slice, the strongest first; its middle if there are none."""
    positions = view.keypoints(z).positions
    return np.asarray(positions if len(positions) else [np.array(view.shape) / 2], np.float64)


def _pixel(view: VolumeView, z: int, point: ArrayLike) -> NDArray[np.float64]:
    y, x = np.asarray(point, np.float64)
    height, width = view.volume.shape[1:]
    if not (0 <= y < height and 0 <= x < width):
        raise UserError(f"the point must lie on the slice of {height} x {width} voxels, got {y:g},{x:g}")
    pixel: NDArray[np.float64] = view.to_pixels([(z, y, x)])[0]
    return pixel


def _same_grid(views: Mapping[str, VolumeView]) -> VolumeView:
    first = next(iter(views.values()))
    for name, view in views.items():
        if view.shape != first.shape:
            raise UserError(
                f"{name} reads slices of {view.shape[0]} x {view.shape[1]} pixels, others of "
                f"{first.shape[0]} x {first.shape[1]}: draw them in figures of their own"
            )
    return first


def _need_keypoints(view: VolumeView, slices: Sequence[int]) -> None:
    if not any(len(view.keypoints(z)) for z in slices):
        names = ", ".join(map(str, slices))
        raise UserError(
            f"no keypoints on slice {names} of {view.volume.name}; choose other slices, or a lower "
            "keypoints.contrast_threshold, which a checkpoint brings with it"
        )


def _mask(kept: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    mask = np.zeros(count, bool)
    mask[kept] = True
    return mask
