"""Labels carried from the finished slices of a volume to its other slices.

What a person labelled moves from slice to slice along the dense optical flow between neighbours (Kroeger et
al., Fast Optical Flow using Dense Inverse Search, ECCV 2016); where two finished slices enclose a slice, the
shapes that arrive from both are blended by their signed distances (shape-based interpolation: Raya and Udupa,
IEEE TMI 9(1), 1990), and the one whose picture fits better where it arrives counts more. The farther the nearest
finished slice, the less a distance says, so that the slice's own intensities (`appearance.py`) and a network's
probabilities decide where the shapes cannot. No training is needed: it is there as soon as one slice is done.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional

from kaf_model.appearance import Appearance
from kaf_model.config import SliceConfig
from kaf_model.labels import LabelledVolume
from kaf_model.preparation import SliceStore
from kaf_model.progress import Progress
from kaf_model.slices import Slices, likeliest
from kaf_model.volume_write import smallest_type

BLUR = 0.5
"""Uncertainty of a border on a finished slice, in pixels of the network's grid."""

SLANT = 0.1
"""Growth of that uncertainty with the distance to the nearest finished slice, mm per mm."""

END = 0.75
"""Part of the way to a finished slice without it on which a structure ends, round like an ellipsoid."""

EMPTY_END = 1.0
"""The same where that slice shows no structure at all: most likely it was marked because it is the first such."""

BORDER = 6.0
"""Distance in mm to a structure's border within which it is seen how well a carried picture fits a slice."""

LIKENESS_POWER = 4
"""Exponent on the correlation there, by which shapes that arrive from two sides are weighed beside their distances."""

LEAST_LIKENESS = 0.3
"""Lowest correlation that is told from a lower one."""

ABSENT = 15.0
"""Distance in mm to a structure that no neighbouring finished slice shows."""

_LEAST_SIDE = 16  # of a picture whose flow OpenCV can find


@dataclass(frozen=True)
class Propagation:
    """What the finished slices of a volume say of all its slices, on the network's grid.

    Attributes:
        case: The labelled volume.
        values: Label value of each channel.
        slices: Preprocessing that makes the network's grid.
        finished: Slices that are complete or verified empty.
        distances: (Z, K, H, W) signed distance to the border of each channel's structure, mm, inside positive.
        blur: (Z,) uncertainty of the distances, mm.
        appearance: What the structures look like on the finished slices; None lets the shapes speak alone.
    """

    case: LabelledVolume
    values: tuple[int, ...]
    slices: SliceConfig
    finished: tuple[int, ...]
    distances: NDArray[np.float16]
    blur: NDArray[np.float32]
    appearance: Appearance | None

    def fits(self, case: LabelledVolume, values: Iterable[int], slices: SliceConfig) -> bool:
        """Whether it was made of these very labels, for these channels and this grid."""
        same = self.case.volume is case.volume and self.case.labels is case.labels
        same = same and dict(self.case.statuses) == dict(case.statuses)
        alone: dict[str, None] = {"context": None, "context_step": None}  # nothing is read together here
        same = same and self.slices.override(**alone) == slices.override(**alone)
        return same and self.values == tuple(values)

    def log_probabilities(self, rows: Sequence[int]) -> Tensor:
        """Logarithms of the class probabilities of some slices by shapes and intensities, (n, K, H, W) float32."""
        chosen = self.distances[list(rows)].astype(np.float32)  # (n, K, H, W)
        blur = torch.from_numpy(self.blur[list(rows)])[:, None, None, None]
        shapes = functional.logsigmoid(torch.from_numpy(chosen) / blur).log_softmax(1)
        if self.appearance is not None:
            for z, by_shape, distances in zip(rows, shapes.numpy(), chosen, strict=True):
                by_shape[:] = self.appearance.refined(z, by_shape, distances)
        return shapes

    def fused(self, probabilities: Tensor, rows: Sequence[int], weight: float = 1.0) -> Tensor:
        """Combine a network's probabilities with those of `log_probabilities`, as a product of experts.

        Args:
            probabilities: (n, K, H, W) of the slices `rows`.
            rows: Slices.
            weight: Exponent on what the finished slices say; 0 changes nothing.

        Returns:
            (n, K, H, W) float32 probabilities.
        """
        shapes = self.log_probabilities(rows).to(probabilities.device)
        return (probabilities.clamp_min(1e-4).log() + weight * shapes).softmax(1)

    def labels(self) -> NDArray[np.integer]:
        """The most probable label of each voxel without a network, (Z, Y, X) on the volume's grid."""
        stack = Slices(self.case.volume, self.slices)
        values = np.array(self.values, smallest_type(min(self.values), max(self.values)))
        labels = np.zeros(self.case.volume.shape, values.dtype)
        for z in range(len(labels)):
            maps = stack.to_source(self.log_probabilities([z]))
            labels[z] = values[likeliest(maps[0])]
        self.case.put_back(labels, self.values)
        return labels


def propagate(
    case: LabelledVolume, values: Sequence[int], config: SliceConfig
) -> Generator[Progress, None, Propagation | None]:
    """Carry the labels of the finished slices of a volume to all its slices.

    Args:
        case: A labelled volume. Partial slices say nothing of a whole shape and are passed over.
        values: Label value of each channel, the background first; other labels count as background.
        config: Preprocessing of the network.

    Yields:
        Progress in slices.

    Returns:
        None if no finished slice shows a structure.
    """
    finished = case.finished
    if not np.isin(case.labels[list(finished)], values[1:]).any():
        return None
    stack = Slices(case.volume, config)
    carrier = _Carrier(case, values, stack)
    shapes: dict[int, dict[int, NDArray[np.float32]]] = {}  # of three slices at most: there may be hundreds
    lower, upper = (None, *finished[:-1]), (*finished[1:], None)
    seen = 0
    for z, below, above in zip(finished, lower, upper, strict=True):
        shapes |= {
            near: carrier.shapes(near) for near in (z, above) if near is not None and near not in shapes
        }
        for step, end in ((-1, below), (1, above)):
            for _ in carrier.carry(shapes, z, step, end):
                seen += 1
                yield Progress("following labels from slice to slice", seen, None)
        if below is not None:
            del shapes[below]
    places = np.arange(stack.num_slices)
    gaps = np.abs(places[:, None] - np.array(finished)).min(1) * case.volume.spacing[0]
    blur = (BLUR * float(np.mean(stack.spacing)) + SLANT * gaps).astype(np.float32)
    distances = carrier.distances()
    appearance = Appearance(stack, finished, distances)
    return Propagation(case, tuple(values), config, finished, distances, blur, appearance)


class _Carrier:
    """Carries the shapes of finished slices through a volume and adds up what arrives at each slice.

    Channel 0 stands for all structures together while shapes are carried.
    """

    def __init__(self, case: LabelledVolume, values: Sequence[int], stack: Slices) -> None:
        self._sums = SliceStore().empty((stack.num_slices, len(values), *stack.shape))
        self._sums[:] = 0
        self._weights = np.zeros((stack.num_slices, len(values)), np.float32)
        self._case, self._values, self._stack = case, values, stack
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self._flow.setFinestScale(0)  # at full resolution
        height, width = stack.shape
        self._x, self._y = np.meshgrid(
            np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
        )

    def shapes(self, z: int) -> dict[int, NDArray[np.float32]]:
        """Signed distances (H, W) in mm of the channels that a finished slice shows, inside positive."""
        labels = self._stack.labels(self._case.labels, [z])[0]
        masks = {channel: labels == value for channel, value in enumerate(self._values) if channel}
        masks[0] = np.isin(labels, self._values[1:])
        return {channel: self._distance(mask) for channel, mask in masks.items() if mask.any()}

    def carry(
        self, shapes: Mapping[int, Mapping[int, NDArray[np.float32]]], start: int, step: int, end: int | None
    ) -> Generator[None, None, None]:
        """Carry shapes from one finished slice towards the next, or, where there is none, to the last slice.

        A structure that the next finished slice does not show ends on the way there.
        """
        if step > 0:  # once for each finished slice
            for channel, distance in shapes[start].items():
                self._add(start, channel, distance)
        stop = end if end is not None else (self._stack.num_slices if step > 0 else -1)
        x, y, before = self._x, self._y, self._picture(start)
        first = before.astype(np.float32)
        for z in range(start + step, stop, step):
            picture = self._picture(z)
            flow = self._flow.calc(picture, before, None)[: self._y.shape[0], : self._y.shape[1]]  # (H, W, 2)
            into = self._x + flow[..., 0], self._y + flow[..., 1]
            x, y, before = _sampled(x, into), _sampled(y, into), picture
            arriving = _sampled(first, (x, y))
            share = 1.0 if end is None else abs(end - z) / abs(end - start)
            for channel, distance in shapes[start].items():
                moved = _sampled(distance, (x, y))
                if end is None:
                    self._add(z, channel, moved)
                elif channel in shapes[end]:
                    border = np.abs(moved) < BORDER
                    likeness = _likeness(arriving[border], picture[: len(border), : border.shape[1]][border])
                    self._add(z, channel, moved, share * likeness**LIKENESS_POWER)
                else:
                    ends = END if shapes[end] else EMPTY_END
                    self._add(
                        z, channel, moved - (1 - _width_left((1 - share) / ends)) * float(distance.max())
                    )
            yield

    def distances(self) -> NDArray[np.float16]:
        """What arrived, (Z, K, H, W), with the background as the outside of all structures."""
        for sums, weights in zip(self._sums, self._weights, strict=True):
            sums /= np.where(weights > 0, weights, 1).astype(np.float16)[:, None, None]
            sums[weights == 0] = -ABSENT
        self._sums[:, 0] *= -1
        return self._sums

    def _add(self, z: int, channel: int, distance: NDArray[np.float32], weight: float = 1.0) -> None:
        self._sums[z, channel] += (weight * distance).astype(np.float16)
        self._weights[z, channel] += weight

    def _distance(self, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
        spacing = self._stack.spacing
        half = float(np.mean(spacing)) / 2  # borders lie between pixels
        inside = distance_transform_edt(mask, spacing) if not mask.all() else np.full(mask.shape, ABSENT)
        outside = distance_transform_edt(~mask, spacing)
        return np.where(mask, inside - half, half - outside).astype(np.float32)

    def _picture(self, z: int) -> NDArray[np.uint8]:
        """A slice as the flow compares it: 8 bits between the clipping values, slightly smoothed."""
        use = self._stack.intensities
        image = self._stack.images([z])[0] * use.std + use.mean
        scaled = np.clip((image - use.low) / ((use.high - use.low) or 1.0), 0, 1)
        smooth = cv2.GaussianBlur((255 * scaled).astype(np.uint8), (0, 0), 1.0)
        bottom, right = (max(0, _LEAST_SIDE - side) for side in smooth.shape)
        padded = cv2.copyMakeBorder(smooth, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
        return np.asarray(padded, dtype=np.uint8)


def _likeness(one: NDArray[np.float32], other: NDArray[np.uint8]) -> float:
    """Correlation of the same pixels of two pictures, LEAST_LIKENESS at the least, and where nothing is seen."""
    if not one.size or not one.std() or not other.std():
        return LEAST_LIKENESS
    return max(LEAST_LIKENESS, float(np.corrcoef(one, other)[0, 1]))


def _width_left(along: float) -> float:
    """Half width of a structure, as a part of what it was, on its way (0..1) to where it ends.

    Beyond its end below 0: as far outside as it was inside.
    """
    return math.sqrt(1 - along**2) if along < 1 else -along


def _sampled(
    field: NDArray[np.float32], at: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """A field (H, W) at places (x, y), bilinearly."""
    sampled = cv2.remap(field, at[0], at[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(sampled, dtype=np.float32)
