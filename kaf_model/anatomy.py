"""What labels tell of a structure's shape, and cleaning a segmentation by it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

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
    for labels in _complete_slices(cases):
        for value in np.unique(labels[labels != 0]):
            shares.setdefault(int(value), []).append(_share_of_largest(labels == value))
    return frozenset(value for value, found in shares.items() if _is_one(found))


def values_together(cases: Sequence[LabelledVolume], one_piece: Collection[int]) -> frozenset[int]:
    """Label values whose structures lie against each other wherever somebody painted all of them.

    Args:
        cases: Labelled volumes.
        one_piece: Values to ask this of: those whose structures are in one piece each.

    Returns:
        All of them if `LEAST_SLICES` or more complete slices show at least two, and these make up one piece
        there as `values_in_one_piece` has it; else none.
    """
    shares = [
        _share_of_largest(np.isin(labels, list(one_piece)))
        for labels in _complete_slices(cases)
        if len(np.intersect1d(labels, list(one_piece))) > 1
    ]
    return frozenset(one_piece) if _is_one(shares) else frozenset()


def keep_together(labels: NDArray[np.integer], values: Collection[int], *, fill: int = 0) -> None:
    """Keep, in place, of structures that lie against each other only what is in one piece with most of them.

    Of the connected pieces (26 neighbours) of all of them together that one is kept which holds the largest parts
    of them, summed: an organ that is taken for one of them may be larger than it, but the others are not
    there. A structure that would vanish is left as it is.

    Args:
        labels: (Z, Y, X) integers.
        values: Classes that lie against each other.
        fill: What the rest of them becomes.
    """
    if len(values) < 2:
        return
    there = np.isin(labels, list(values))
    box = _box(there)
    labels = labels[box]
    pieces, count = ndimage.label(there[box], np.ones((3, 3, 3)))
    if count < 2:
        return
    voxels = {value: np.bincount(pieces[labels == value], minlength=count + 1) for value in values}
    best = int(sum(found / max(1, found.sum()) for found in voxels.values()).argmax())
    for value, found in voxels.items():
        if found[best]:
            labels[(labels == value) & (pieces != best)] = fill


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
        there = labels == value
        box = _box(there)
        components, count = ndimage.label(there[box], structure)
        if count > 1:
            sizes = np.bincount(components.ravel())
            sizes[0] = 0
            labels[box][(components > 0) & (components != sizes.argmax())] = fill


def _box(there: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box that holds all voxels that are set: pieces need four bytes for each voxel in it."""
    (box,) = ndimage.find_objects(there.view(np.uint8), max_label=1)
    return box or (slice(0),) * there.ndim


def _complete_slices(cases: Sequence[LabelledVolume]) -> Iterator[NDArray[np.integer]]:
    """Labels (H, W) of the slices on which somebody painted everything."""
    for case in cases:
        for z, status in case.statuses.items():
            if status is SliceStatus.COMPLETE:
                yield case.labels[z]


def _share_of_largest(there: NDArray[np.bool_]) -> float:
    """Part of the pixels (H, W) that is in the largest piece (8 neighbours)."""
    pieces, _ = ndimage.label(there, np.ones((3, 3)))
    sizes = np.bincount(pieces.ravel())[1:]
    return float(sizes.max() / sizes.sum())


def _is_one(shares: Sequence[float]) -> bool:
    """Whether what slices show counts as one piece, given the part of it in its largest piece on each."""
    return len(shares) >= LEAST_SLICES and bool(np.mean(shares) >= ONE_PIECE)
