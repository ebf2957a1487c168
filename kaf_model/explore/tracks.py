"""Keypoints followed from slice to slice: matches of neighbouring slices, chained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class Link:
    """Matches of two slices.

    Attributes:
        z0: First slice.
        z1: Second slice.
        pairs: Keypoint of the first and of the second slice, each at most once, (P, 2).
        values: What is known of each pair, such as its descriptor distance, (P,).
    """

    z0: int
    z1: int
    pairs: ArrayLike
    values: ArrayLike


@dataclass(frozen=True, eq=False)
class Tracks:
    """Vertices of tracks, sorted by track and slice; each track has at least two.

    Attributes:
        tracks: Number of the track, (V,) int64.
        slices: Slice, (V,) int64.
        keypoints: Index of the keypoint in its slice, (V,) int64.
        values: That of the pair which leads to the vertex; the first vertex has that of the pair which
            leads away, (V,) float32.
    """

    tracks: NDArray[np.int64]
    slices: NDArray[np.int64]
    keypoints: NDArray[np.int64]
    values: NDArray[np.float32]

    @property
    def num_tracks(self) -> int:
        """How many tracks there are."""
        return len(np.unique(self.tracks))


def chain(links: Sequence[Link]) -> Tracks:
    """Chain matches into tracks: a keypoint that ends one pair and begins another belongs to both.

    Args:
        links: Matches, in the order of their first slices.
    """
    rows: list[tuple[int, int, int, float]] = []
    at_end: dict[tuple[int, int], int] = {}
    num_tracks = 0
    for link in links:
        pairs = np.asarray(link.pairs, np.int64).reshape(-1, 2)
        values = np.asarray(link.values, np.float32)
        for (first, second), value in zip(pairs.tolist(), values.tolist(), strict=True):
            track = at_end.pop((link.z0, first), None)
            if track is None:
                track, num_tracks = num_tracks, num_tracks + 1
                rows.append((track, link.z0, first, value))
            rows.append((track, link.z1, second, value))
            at_end[link.z1, second] = track
    columns = list(zip(*sorted(rows), strict=True)) or [(), (), (), ()]
    tracks, slices, keypoints = (np.array(column, np.int64) for column in columns[:3])
    return Tracks(tracks, slices, keypoints, np.array(columns[3], np.float32))
