"""Does the self-similarity turn with the image? (paper, section 4 "Qualitative Analysis", Fig. 3).

A slice x is augmented by T. The self-similarity S of a point is computed on x and carried over by T, and
computed on T(x) for the point T carried there. An equivariant network gives the same map twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kaf_model.augment import SpatialTransform
from kaf_model.config import AugmentConfig
from kaf_model.datasets import whole_canvas
from kaf_model.engine import generator_for
from kaf_model.explore.explorer import Explorer
from kaf_model.explore.similarity import similarity_to
from kaf_model.explore.views import LEVELS, SliceFeatures, VolumeView, level_to_pixels
from kaf_model.slices import middle_slice, pad_to_multiple

NUM_VIEWS = 2
AUGMENTATION = AugmentConfig(crop=None, spatial_probability=1.0, intensity_probability=0.0)
"""Rotation, magnification and elastic deformation as they are by default, of the whole slice, at every draw."""
_POINTS_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class MovedSlice:
    """A slice moved by a spatial transform, with its keypoints.

    Attributes:
        transform: The map, of one slice.
        inputs: The moved slice as the network reads it, (S, H', W').
        inside: Which pixels show the slice and not what lies beyond its edge, (H', W') bool.
        kept: Indices of the slice's keypoints that are still there, (n,).
        points: Where those are now, (n, 2) pixels (y, x).
    """

    transform: SpatialTransform
    inputs: NDArray[np.float32]
    inside: NDArray[np.bool_]
    kept: NDArray[np.int64]
    points: NDArray[np.float32]

    @property
    def image(self) -> NDArray[np.float32]:
        """The moved slice, (H', W')."""
        return middle_slice(self.inputs)

    def carry_points(self, points: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Where pixels (y, x) of the slice went, (N, 2), and which of them are still there, (N,)."""
        positions = torch.from_numpy(np.asarray(points, np.float32).reshape(1, -1, 2))
        moved, valid = self.transform.points(positions, torch.ones(positions.shape[:2], dtype=torch.bool))
        return moved[0].numpy(), valid[0].numpy()

    def carry_maps(self, maps: Tensor) -> Tensor:
        """Maps of the slice in pixels, (n, H, W) -> (n, H', W'), bilinear."""
        canvas = pad_to_multiple(maps[None].cpu(), 16)
        return self.transform.images(canvas)[0]


@dataclass(frozen=True, eq=False)
class AugmentedSlice(MovedSlice):
    """A moved slice and what the network makes of it.

    Attributes:
        features: Of the moved slice, with the keypoints that were carried along.
    """

    features: SliceFeatures


@dataclass(frozen=True, eq=False)
class EquivarianceMaps:
    """The self-similarity of one point on an augmented slice, at one level.

    Attributes:
        point: Where the point is on the augmented slice, pixel (y, x).
        computed: S(T(x)) in pixels, (H', W').
        carried: T(S(x)) in pixels, (H', W').
        error: Mean of |computed - carried| over the pixels that show the slice.
    """

    point: tuple[float, float]
    computed: NDArray[np.float32]
    carried: NDArray[np.float32]
    error: float


@dataclass(frozen=True)
class EquivarianceError:
    """How much the self-similarity differs from the one carried over, over many points and transforms.

    Attributes:
        level: The level.
        error: Mean absolute difference of the cosine similarities over the pixels that show the slice, then
            over points and augmentations.
        chance: The same between the map of a point and the carried map of another one: what a network gets
            whose maps depend on the image but not on the point. A network that finds everything alike has
            a small error and a small chance.
        num_points: Pairs of a point and an augmentation that were measured.
    """

    level: int
    error: float
    chance: float
    num_points: int

    @property
    def relative(self) -> float:
        """Error as a part of chance: 0 is equivariant, 1 no better than the map of any other point."""
        return self.error / self.chance if self.chance > 0 else float("nan")


def random_transform(
    shape: Sequence[int], *, seed: int, z: int = 0, augment: AugmentConfig = AUGMENTATION
) -> SpatialTransform:
    """Draw the transform of slice z (H, W) from a seed."""
    sizes = torch.tensor([list(shape)])
    return SpatialTransform.sample(
        augment, sizes, generator=generator_for(seed, z, 7), canvas=whole_canvas(sizes)
    )


def move_slice(
    inputs: NDArray[np.float32], keypoints: NDArray[np.float32], transform: SpatialTransform
) -> MovedSlice:
    """Move a slice as the network reads it (S, H, W) and its keypoints (N, 2) by a transform of one slice."""
    canvas = pad_to_multiple(torch.from_numpy(inputs)[None], 16)
    positions = torch.from_numpy(keypoints)[None]
    points, valid = transform.points(positions, torch.ones(positions.shape[:2], dtype=torch.bool))
    kept = valid[0].nonzero()[:, 0].numpy()
    return MovedSlice(
        transform,
        transform.images(canvas)[0].numpy(),
        transform.inside[0].numpy(),
        kept,
        points[0].numpy()[kept],
    )


def augment_slice(
    view: VolumeView, z: int, *, seed: int, augment: AugmentConfig = AUGMENTATION
) -> AugmentedSlice:
    """Move slice z and its keypoints by a random transform and run the network over it.

    Args:
        view: The volume.
        z: The slice.
        seed: Of the transform.
        augment: Ranges of the transform; intensities are not changed.
    """
    transform = random_transform(view.shape, seed=seed, z=z, augment=augment)
    moved = move_slice(view.read(z), view.keypoints(z).positions, transform)
    return look_at(view.explorer, moved)


def look_at(explorer: Explorer, moved: MovedSlice) -> AugmentedSlice:
    """Run the network over a moved slice."""
    features = SliceFeatures.compute(explorer, moved.inputs, moved.points)
    return AugmentedSlice(moved.transform, moved.inputs, moved.inside, moved.kept, moved.points, features)


def equivariance_maps(
    view: VolumeView, z: int, point: ArrayLike, augmented: AugmentedSlice, level: int
) -> EquivarianceMaps | None:
    """Self-similarity of a point of slice z on an augmented slice, computed there and carried over.

    Args:
        view: The volume.
        z: The slice.
        point: Pixel (y, x) of the resampled slice.
        augmented: Slice z, augmented.
        level: The level.

    Returns:
        The maps, or None if the point has left the augmented slice.
    """
    moved, valid = augmented.carry_points(point)
    if not valid[0]:
        return None
    carried = _carried(view, z, np.asarray(point, np.float64).reshape(1, 2), augmented, level)
    computed = _computed(augmented, moved, level)
    inside = torch.from_numpy(augmented.inside)
    return EquivarianceMaps(
        (float(moved[0, 0]), float(moved[0, 1])),
        computed[0].numpy(),
        carried[0].numpy(),
        float((computed - carried).abs()[0][inside].mean()),
    )


def equivariance_errors(
    view: VolumeView,
    z: int,
    *,
    num_points: int = 32,
    seed: int = 0,
    levels: Sequence[int] = LEVELS,
    augment: AugmentConfig = AUGMENTATION,
) -> list[EquivarianceError]:
    """Equivariance error of slice z over random points, each on two random augmentations.

    Points are drawn uniformly over the pixels of the slice; on each augmentation those count that are still
    on it.

    Args:
        view: The volume.
        z: The slice.
        num_points: N, at least 2.
        seed: Of points and transforms.
        levels: The levels to measure.
        augment: Ranges of the transforms.

    Returns:
        One error a level.
    """
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2, to tell one point from another; got {num_points}")
    draws = torch.rand(num_points, 2, generator=generator_for(seed, z, 8)).double().numpy()
    points = draws * view.shape - 0.5
    augmentations = [
        augment_slice(view, z, seed=seed * NUM_VIEWS + number, augment=augment) for number in range(NUM_VIEWS)
    ]
    results = []
    for level in levels:
        sums, count = np.zeros(2), 0
        for augmented in augmentations:
            added, measured = _differences(view, z, points, augmented, level)
            sums += added
            count += measured
        error, chance = sums / count if count else (np.nan, np.nan)
        results.append(EquivarianceError(level, float(error), float(chance), count))
    return results


def _differences(
    view: VolumeView, z: int, points: NDArray[np.float64], augmented: AugmentedSlice, level: int
) -> tuple[NDArray[np.float64], int]:
    """Sums over points of the mean difference to the own and to the next point's carried map, and the points."""
    moved, valid = augmented.carry_points(points)
    points, moved = points[valid], moved[valid]
    inside = torch.from_numpy(augmented.inside)
    sums = np.zeros(2)
    if len(points) < 2 or not inside.any():
        return sums, 0
    for start in range(0, len(points), _POINTS_AT_ONCE):
        rows = np.arange(start, min(start + _POINTS_AT_ONCE, len(points)))
        computed = _computed(augmented, moved[rows], level)[:, inside]  # (n, pixels)
        others = (rows + 1) % len(points)
        for column, chosen in enumerate((rows, others)):
            carried = _carried(view, z, points[chosen], augmented, level)[:, inside]
            sums[column] += float((computed - carried).abs().mean(1).sum())
    return sums, len(points)


def _computed(augmented: AugmentedSlice, moved: NDArray[np.float32], level: int) -> Tensor:
    """S(T(x)) in pixels for points (n, 2) of the augmented slice, (n, H', W')."""
    features = augmented.features
    cells = similarity_to(features.at(moved, level), features, level)
    return level_to_pixels(cells, level, features.shape).cpu()


def _carried(
    view: VolumeView, z: int, points: NDArray[np.float64], augmented: AugmentedSlice, level: int
) -> Tensor:
    """T(S(x)) in pixels for points (n, 2) of the slice, (n, H', W')."""
    features = view.features(z)
    cells = similarity_to(features.at(points, level), features, level)
    return augmented.carry_maps(level_to_pixels(cells, level, features.shape).cpu())
