"""What labels tell of a structure's shape, and cleaning a segmentation by it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kaf_model.labels import LabelledVolume, SliceStatus

LEAST_SLICES = 2
"""Slices that must show a structure before anything is concluded about its shape.

With three labelled slices a structure that ends before one of them is on two. Two that agree are enough for
structures that are one; one of two pieces is taken for one if both slices happen to miss the other piece.
"""

ONE_PIECE = 0.95
"""Part of a structure's pixels on a slice that its largest piece holds on average if it is in one piece."""


def values_in_one_piece(cases: Sequence[LabelledVolume]) -> frozenset[int]:
    """Label values whose structure is in one piece wherever somebody painted all of it.

    Only complete slices count: on partial ones a structure may be painted in dabs. Pieces are counted slice
    by slice (8 neighbours), since labelled slices need not be next to each other.

    Args:
        cases: Labelled volumes.

    Returns:
        Values that `LEAST_SLICES` or more complete slices show, with `ONE_PIECE` of their pixels in the
        largest piece, on average.
    """
    shares: dict[int, list[float]] = {}
    for case in cases:
        complete = [z for z, status in case.statuses.items() if status is SliceStatus.COMPLETE]
        for z in complete:
            for value in np.unique(case.labels[z]):
                pieces, _ = ndimage.label(case.labels[z] == value, np.ones((3, 3)))
                sizes = np.bincount(pieces.ravel())[1:]
                shares.setdefault(int(value), []).append(sizes.max() / sizes.sum())
    return frozenset(
        value
        for value, found in shares.items()
        if value and len(found) >= LEAST_SLICES and np.mean(found) >= ONE_PIECE
    )


def keep_largest_components(
    labels: NDArray[np.integer], values: Sequence[int] | None = None, *, fill: int = 0
) -> None:
    """Keep, in place, only the largest connected component (26 neighbours) of each class.

    Args:
        labels: (Z, Y, X) integers.
        values: Classes that are cleaned; None takes all but 0.
        fill: What the cut pieces become.
    """
    structure = np.ones((3, 3, 3))
    for value in np.unique(labels) if values is None else values:
        if value in (0, fill):
            continue
        components, count = ndimage.label(labels == value, structure)
        if count > 1:
            sizes = np.bincount(components.ravel())
            sizes[0] = 0
            labels[(components > 0) & (components != sizes.argmax())] = fill
