"""What structures look like on the finished slices of a volume, and what that says of its other slices.

Shapes that were carried to a slice miss its borders by a little; its intensities show where they are. Each
structure, and what lies close around all of them, has a histogram of intensities on the nearest finished slices.
Together with the carried shapes these say what each pixel is, and the slice's own histograms are made of that in
turn: expectation maximisation with the shapes as an atlas (Van Leemput et al., IEEE TMI 18(10), 1999), but with
histograms instead of Gaussians.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from kaf_model.slices import Slices

WEIGHT = 0.5
"""Exponent on the likelihood of an intensity: neighbouring pixels do not err independently."""

MARGIN = 9.0
"""Distance in mm around all structures within which intensities are looked at."""

_OWN = 0.5  # weight of a slice's own histogram, beside those of the finished slices
_ROUNDS = 3
_NEAREST = 2  # finished slices
_BINS = 48
_BIN_SMOOTHING = 1.5  # bins
_SMOOTHING = 0.6  # of the likelihood, pixels
_FEWEST = 20.0  # pixels that make a histogram


class Appearance:
    """Histograms of the intensities of structures on finished slices.

    Args:
        stack: The slices of the volume.
        finished: Finished slices.
        distances: (Z, K, H, W) signed distances, mm, positive inside; on finished slices those that were drawn.
    """

    def __init__(self, stack: Slices, finished: Sequence[int], distances: NDArray[np.floating]) -> None:
        self._stack = stack
        use = stack.intensities
        self._low = (use.low - use.mean) / use.std
        self._bin = (use.high - use.low) / use.std / _BINS or 1.0
        self._histograms: dict[int, list[NDArray[np.float64] | None]] = {}
        for z in finished:
            near = _near(distances[z])
            bins = self._bins(z)
            self._histograms[z] = [_histogram(bins[near & (inside > 0)]) for inside in distances[z]]

    def refined(
        self, z: int, log_shapes: NDArray[np.float32], distances: NDArray[np.floating]
    ) -> NDArray[np.float32]:
        """Combine what the shapes say of a slice with its intensities.

        Args:
            z: The slice.
            log_shapes: (K, H, W) logarithms of the class probabilities by the shapes.
            distances: (K, H, W) signed distances of the shapes.

        Returns:
            (K, H, W) logarithms of class probabilities; those of the shapes on finished slices and far from all
            structures.
        """
        near = _near(distances)
        places = np.flatnonzero(near)
        if z in self._histograms or not len(places):
            return log_shapes
        bins = self._bins(z).take(places)  # (n,)
        learnt, any_structure = self._learnt(z), _histogram(bins)
        room = _smooth(near.astype(np.float32)).take(places)
        shapes = log_shapes.reshape(len(log_shapes), -1).take(places, axis=1)  # (K, n)
        combined = shapes
        for _ in range(_ROUNDS):
            fit = np.zeros((len(shapes), near.size), np.float32)
            for channel, (histogram, probability) in enumerate(zip(learnt, np.exp(combined), strict=True)):
                own = _histogram(bins, probability)
                known = [part for part in (histogram, own) if part is not None]
                if not known and any_structure is not None:
                    known = [
                        any_structure
                    ]  # too small to be known: as likely by its intensities as any other
                if known:
                    mixed = known[0] if len(known) == 1 else (1 - _OWN) * known[0] + _OWN * known[1]
                    fit[channel, places] = np.log(mixed).astype(np.float32).take(bins)
            smooth = np.stack([_smooth(values.reshape(near.shape)).take(places) for values in fit]) / room
            combined = shapes + WEIGHT * smooth
            combined -= combined.max(0)
            combined -= np.log(np.exp(combined).sum(0))
        result = log_shapes.copy()
        result.reshape(len(result), -1)[:, places] = combined
        return result

    def _learnt(self, z: int) -> list[NDArray[np.float64] | None]:
        """The histogram of each channel on the nearest finished slices that show it, nearer ones weighing more."""
        nearest = sorted(self._histograms, key=lambda other: abs(other - z))[:_NEAREST]
        learnt: list[NDArray[np.float64] | None] = []
        for parts in zip(*(self._histograms[other] for other in nearest), strict=True):
            shown = {other: part for other, part in zip(nearest, parts, strict=True) if part is not None}
            weights = [1 / abs(other - z) for other in shown]
            learnt.append(np.average(list(shown.values()), axis=0, weights=weights) if shown else None)
        return learnt

    def _bins(self, z: int) -> NDArray[np.int64]:
        """The bin of each pixel of a slice, (H, W)."""
        places = (self._stack.images([z])[0] - self._low) / self._bin
        return np.asarray(np.clip(places, 0, _BINS - 1).astype(np.int64))


def _near(distances: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Pixels (H, W) in or close to a structure."""
    near: NDArray[np.bool_] = distances[1:].max(0) > -MARGIN
    return near


def _smooth(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(cv2.GaussianBlur(values, (0, 0), _SMOOTHING), dtype=np.float32)


def _histogram(
    bins: NDArray[np.int64], weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64] | None:
    """Smoothed probabilities (BINS,), none of them 0; None of too few pixels."""
    counts = np.bincount(bins, weights, minlength=_BINS).astype(np.float64)
    total = counts.sum()
    if total < _FEWEST:
        return None
    return np.asarray(gaussian_filter1d(counts / total, _BIN_SMOOTHING, mode="nearest") + 1e-3 / _BINS)
