"""Which keypoints of two neighbouring slices are assumed to be the same anatomy.

Paper, section 3.2, "Local SSL Loss": among the keypoints within a Manhattan distance, the one with the
closest descriptor. The pairs M and the unmatched sets I and J supervise L_local (Eq. 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kaf_model.config import CorrespondenceConfig
from kaf_model.keypoints import Keypoints

UNMATCHED = -1


@dataclass(frozen=True, eq=False)
class Correspondences:
    """Index pairs of keypoints in image 0 and image 1 that are assumed true.

    Attributes:
        pairs: Index into image 0 and into image 1, ascending by the first. Shape: (P, 2), int64.
        distances: L2 distance of the descriptors of each pair. Shape: (P,), float32.
        num_keypoints0: N, keypoints of image 0.
        num_keypoints1: M, keypoints of image 1.
    """

    pairs: np.ndarray
    distances: np.ndarray
    num_keypoints0: int
    num_keypoints1: int

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def matches0(self) -> np.ndarray:
        """Index into image 1 for every keypoint of image 0, or UNMATCHED. Shape: (N,), int64."""
        return _partners(self.pairs[:, 0], self.pairs[:, 1], self.num_keypoints0)

    @property
    def matches1(self) -> np.ndarray:
        """Index into image 0 for every keypoint of image 1, or UNMATCHED. Shape: (M,), int64."""
        return _partners(self.pairs[:, 1], self.pairs[:, 0], self.num_keypoints1)

    @property
    def unmatched0(self) -> np.ndarray:
        """Keypoints of image 0 without a partner, the paper's I. Shape: (N - P,), int64."""
        return np.flatnonzero(self.matches0 == UNMATCHED)

    @property
    def unmatched1(self) -> np.ndarray:
        """Keypoints of image 1 without a partner, the paper's J. Shape: (M - P,), int64."""
        return np.flatnonzero(self.matches1 == UNMATCHED)


def find_correspondences(
    keypoints0: Keypoints, keypoints1: Keypoints, config: CorrespondenceConfig | None = None
) -> Correspondences:
    """Return the pairs that are each other's closest descriptor within the radius.

    With a ratio, the closest must also beat that part of the distance to the second closest within the
    radius, seen from both sides. Swapping the images swaps the columns of the pairs: descriptors that are
    equally close are decided by Manhattan distance, then by the place halfway between the two keypoints,
    and only for identical keypoints by index.

    Args:
        keypoints0: N keypoints of image 0.
        keypoints1: M keypoints of image 1.
        config: Radius and ratio; default: the paper's.

    Raises:
        ValueError: If the descriptors have different dimensions.
    """
    config = config or CorrespondenceConfig()
    dimensions = keypoints0.descriptors.shape[1], keypoints1.descriptors.shape[1]
    if dimensions[0] != dimensions[1]:
        raise ValueError(f"descriptors must have one dimension, got {dimensions[0]} and {dimensions[1]}")

    points0, points1 = keypoints0.positions, keypoints1.positions
    manhattan = np.abs(points0[:, None, 0] - points1[:, 0])  # (N, M)
    manhattan += np.abs(points0[:, None, 1] - points1[:, 1])
    squared = _squared_distances(keypoints0.descriptors, keypoints1.descriptors)  # (N, M)
    squared[manhattan >= config.radius] = np.inf
    closest0 = _closest(squared, manhattan, points0, points1, config.ratio)  # (N,)
    closest1 = _closest(np.ascontiguousarray(squared.T), manhattan.T, points1, points0, config.ratio)  # (M,)

    first = np.flatnonzero(closest0 != UNMATCHED)
    first = first[closest1[closest0[first]] == first]
    second = closest0[first]
    return Correspondences(
        pairs=np.column_stack([first, second]).astype(np.int64),
        distances=np.sqrt(squared[first, second]).astype(np.float32),
        num_keypoints0=len(keypoints0),
        num_keypoints1=len(keypoints1),
    )


def restrict(correspondences: Correspondences, kept0: np.ndarray, kept1: np.ndarray) -> Correspondences:
    """Return the correspondences after some keypoints were dropped, with the indices of those that are left.

    A pair survives if both its keypoints do; a keypoint whose partner was dropped becomes unmatched.

    Args:
        correspondences: Of N and M keypoints.
        kept0: True where a keypoint of image 0 is left. Shape: (N,), bool.
        kept1: True where a keypoint of image 1 is left. Shape: (M,), bool.

    Raises:
        ValueError: If a mask is not boolean or has another length than the keypoints.
    """
    kept0, kept1 = np.asarray(kept0), np.asarray(kept1)
    for name, kept, count in (
        ("kept0", kept0, correspondences.num_keypoints0),
        ("kept1", kept1, correspondences.num_keypoints1),
    ):
        if kept.dtype != np.bool_ or kept.shape != (count,):
            raise ValueError(
                f"{name} must be bool of shape ({count},), got {kept.dtype} of shape {kept.shape}"
            )
    first, second = correspondences.pairs.T
    survives = kept0[first] & kept1[second]
    new0, new1 = np.cumsum(kept0) - 1, np.cumsum(kept1) - 1
    return Correspondences(
        pairs=np.column_stack([new0[first[survives]], new1[second[survives]]]).astype(np.int64),
        distances=correspondences.distances[survives],
        num_keypoints0=int(kept0.sum()),
        num_keypoints1=int(kept1.sum()),
    )


def _closest(
    squared: np.ndarray, manhattan: np.ndarray, points0: np.ndarray, points1: np.ndarray, ratio: float | None
) -> np.ndarray:
    """Return for each keypoint of image 0 the closest of image 1, or UNMATCHED. Shape: (N, M) -> (N,)."""
    lowest = squared.min(axis=1, initial=np.inf)
    leading = np.flatnonzero(squared == np.where(np.isfinite(lowest), lowest, np.nan)[:, None])
    own, other = np.divmod(leading, max(squared.shape[1], 1))
    middle = points0[own].astype(np.float64) + points1[other]
    # Every key after the first is the same seen from the other image.
    ties = (np.minimum(own, other), np.maximum(own, other), middle[:, 1], middle[:, 0], manhattan[own, other])
    order = np.lexsort([*ties, own])
    own, other = own[order], other[order]
    leads = np.diff(own, prepend=-1) > 0
    own, other = own[leads], other[leads]
    if ratio is not None:
        others = squared.copy()
        others[own, other] = np.inf
        second = others.min(axis=1, initial=np.inf)
        clear = np.sqrt(lowest[own]) < ratio * np.sqrt(second[own])
        own, other = own[clear], other[clear]
    return _partners(own, other, len(points0))


def _squared_distances(descriptors0: np.ndarray, descriptors1: np.ndarray) -> np.ndarray:
    """Return squared L2 distances that are exact, so equal ones compare equal however they are computed.

    A matrix product rounds by the order of its sums, which changes when the images are swapped. Whole
    numbers below 2^19 are summed exactly in float64: SIFT's are whole already, others are scaled to that.
    """
    largest = max(np.abs(descriptors0).max(initial=0), np.abs(descriptors1).max(initial=0))
    if largest == 0:
        return np.zeros((len(descriptors0), len(descriptors1)))
    scale = 2.0 ** (19 - np.ceil(np.log2(float(largest))))
    whole0, whole1 = (np.rint(part.astype(np.float64) * scale) for part in (descriptors0, descriptors1))
    squared: np.ndarray = whole0 @ whole1.T
    squared *= -2
    squared += np.square(whole0).sum(axis=1)[:, None]
    squared += np.square(whole1).sum(axis=1)
    squared /= scale**2
    return squared


def _partners(own: np.ndarray, other: np.ndarray, count: int) -> np.ndarray:
    partners = np.full(count, UNMATCHED, np.int64)
    partners[own] = other
    return partners
