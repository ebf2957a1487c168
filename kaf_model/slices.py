"""A volume as network-ready slices, and the network's maps back on the volume's own grid.

Slices are clipped at two percentiles of their volume, z-scored, and resampled in plane to square
pixels. Resampling keeps the borders of the image in place (pixel centres at integers, borders at
-0.5 and size - 0.5), so `geometry.resample_points` moves keypoints by exactly the same map. Padding
is at the bottom and the right and moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from kaf_model.config import SliceConfig
from kaf_model.geometry import Points, resample_points
from kaf_model.volume import Volume

Value = TypeVar("Value", bound=np.generic)

_SAMPLE_VOXELS = 4_000_000  # of a larger volume the statistics look at about this many


@dataclass(frozen=True)
class Intensities:
    """How the voxels of a volume are normalised: clip to (low, high), subtract mean, divide by std.

    Attributes:
        low: Lower clipping value.
        high: Upper clipping value.
        mean: Mean of the clipped voxels.
        std: Standard deviation of the clipped voxels; 1 for a constant volume.
    """

    low: float
    high: float
    mean: float
    std: float

    @classmethod
    def of(cls, array: NDArray[Any], percentiles: tuple[float, float]) -> Intensities:
        """Measure an array (Z, Y, X); of a large one every n-th row and column counts."""
        step = max(1, int(np.ceil(np.sqrt(array.size / _SAMPLE_VOXELS))))
        sample = array[:, ::step, ::step].ravel()
        low, high = (float(value) for value in np.percentile(sample, percentiles))
        if not low < high:  # nearly all voxels are equal: clipping there would wipe out the rest
            low, high = float(array.min()), float(array.max())
        clipped = np.clip(sample, low, high, dtype=np.float64)
        return cls(low=low, high=high, mean=float(clipped.mean()), std=float(clipped.std()) or 1.0)


class Slices:
    """The slices of one volume, made when asked for.

    Attributes:
        volume: The volume.
        config: Resampling and clipping.
        num_slices: Z.
        source_shape: (Y, X) of the volume.
        shape: (H, W) after resampling.
        spacing: Pixel size (y, x) in mm after resampling; the whole number of pixels makes it differ a
            little from the configured one.
        positions: (Z,) from 0 to 1 along the volume.
    """

    def __init__(self, volume: Volume, config: SliceConfig) -> None:
        self.volume = volume
        self.config = config
        self.num_slices = volume.num_slices
        self.positions = volume.slice_positions
        self.source_shape = (volume.shape[1], volume.shape[2])
        pixel = volume.spacing[1:]
        target = pixel if config.spacing is None else (config.spacing, config.spacing)
        height, width = (
            max(1, round(size * old / new))
            for size, old, new in zip(self.source_shape, pixel, target, strict=True)
        )
        self.shape = (height, width)
        self.spacing = (pixel[0] * self.source_shape[0] / height, pixel[1] * self.source_shape[1] / width)

    @cached_property
    def intensities(self) -> Intensities:
        """Clipping values, mean and standard deviation of the volume, measured once."""
        return Intensities.of(self.volume.array, self.config.clip_percentiles)

    def images(self, indices: Iterable[int]) -> NDArray[np.float32]:
        """Return normalised and resampled slices.

        Args:
            indices: Slices, in any order.

        Returns:
            (n, H, W) float32, mean about 0 and standard deviation about 1 over the volume.
        """
        use = self.intensities
        chosen = self.volume.array[self._checked(indices)].astype(np.float32)  # (n, Y, X), a copy
        np.clip(chosen, use.low, use.high, out=chosen)
        chosen -= np.float32(use.mean)
        chosen /= np.float32(use.std)
        if self.shape == self.source_shape or not len(chosen):
            return chosen.reshape(-1, *self.shape)
        resampled: NDArray[np.float32] = _resample(torch.from_numpy(chosen)[:, None], self.shape)[
            :, 0
        ].numpy()
        return resampled

    def inputs(self, indices: Iterable[int]) -> NDArray[np.float32]:
        """Return what the network reads: slices, each between those that `SliceConfig.context` adds to it.

        Those are the nearest ones at the configured distance; beyond the ends of the volume the last slice is
        repeated, and so is the slice itself where the next one is more than twice as far away.

        Args:
            indices: Slices, in any order.

        Returns:
            (n, S, H, W) float32 with S = `SliceConfig.input_slices`; the slices themselves are at S // 2.
        """
        middle = np.array(self._checked(indices), dtype=np.int64)
        reach, step = self.config.context or 0, self.config.context_step
        steps = np.arange(-reach, reach + 1)
        if step is not None:
            steps = np.rint(steps * step / self.volume.spacing[0]).astype(np.int64)
        wanted = (middle[:, None] + steps).clip(0, self.num_slices - 1)  # (n, S)
        each, place = np.unique(wanted, return_inverse=True)
        return self.images(each)[place.reshape(wanted.shape)]

    def labels(self, labels: NDArray[Any], indices: Iterable[int]) -> NDArray[np.int64]:
        """Return resampled slices of a label map, each pixel the class of the nearest voxel.

        Args:
            labels: (Z, Y, X) integers of any value.
            indices: Slices, in any order.

        Returns:
            (n, H, W) int64.
        """
        if labels.shape != self.volume.shape or labels.dtype.kind not in "iub":
            raise ValueError(
                f"labels must be integers of shape (Z, Y, X) = {self.volume.shape}, "
                f"got {labels.dtype} {labels.shape}"
            )
        chosen = labels[self._checked(indices)]  # (n, Y, X)
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(np.int64)
            for old, new in zip(self.source_shape, self.shape, strict=True)
        )
        return chosen[:, rows[:, None], columns].astype(np.int64)  # (n, H, W)

    def to_source(self, maps: torch.Tensor) -> torch.Tensor:
        """Resample maps bilinearly onto the pixels of the volume; the same tensor if nothing was resampled.

        Shape: (n, C, H, W) -> (n, C, Y, X).
        """
        if maps.ndim != 4 or tuple(maps.shape[-2:]) != self.shape:
            raise ValueError(
                f"maps must have shape (n, C, H, W) with (H, W) = {self.shape}, got {tuple(maps.shape)}; "
                "crop the padding first"
            )
        return maps if self.shape == self.source_shape else _resample(maps, self.source_shape)

    def points_to_source(self, points: Points) -> Points:
        """Move (..., 2) points (y, x) from resampled pixels to pixels of the volume."""
        return resample_points(points, _ratio(self.source_shape, self.shape))

    def points_from_source(self, points: Points) -> Points:
        """Move (..., 2) points (y, x) from pixels of the volume to resampled pixels."""
        return resample_points(points, _ratio(self.shape, self.source_shape))

    def _checked(self, indices: Iterable[int]) -> list[int]:
        chosen = [int(index) for index in indices]
        wrong = [index for index in chosen if not 0 <= index < self.num_slices]
        if wrong:
            name, last = self.volume.name, self.num_slices - 1
            raise ValueError(f"slices of {name} are 0 to {last}, got {', '.join(map(str, wrong))}")
        return chosen


_CONTEXT = 2
_NEAR = 2.0  # pixels
_ENOUGH = 8  # from fewer labelled slices a network learns by heart what lies beside them


def lie_near(spacing: Sequence[float]) -> bool:
    """Whether slices lie so near to each other that the next one shows the same: at most two pixels apart.

    Args:
        spacing: mm between slices, and of their pixels (z, y, x).
    """
    return spacing[0] <= _NEAR * max(spacing[1:])


def with_context(config: SliceConfig, volumes: Sequence[Volume], num_labelled: int) -> SliceConfig:
    """The configuration with a context that suits labelled volumes, as far as it names none itself.

    Slices are read together at the distance of those of the volumes, the largest if they differ; not at all where
    the slices of any of the volumes lie too far apart, none has two, or few are labelled.

    Args:
        config: The configuration.
        volumes: The labelled volumes.
        num_labelled: Labelled slices of all of them.
    """
    pixel = max(max(Slices(volume, config).spacing) for volume in volumes)
    apart = max(volume.spacing[0] for volume in volumes)
    context = config.context
    if context is None:
        enough = num_labelled >= _ENOUGH and any(volume.num_slices > 1 for volume in volumes)
        context = _CONTEXT if enough and lie_near((apart, pixel, pixel)) else 0
    step = config.context_step or round(apart, 4)
    return config.override(context=context, context_step=step if context else None)


def pad_to_multiple(images: torch.Tensor, divisor: int) -> torch.Tensor:
    """Repeat the bottom row and the right column until both sides divide by the divisor, as training does.

    Shape: (B, C, H, W) -> (B, C, H', W').
    """
    bottom, right = -images.shape[-2] % divisor, -images.shape[-1] % divisor
    return functional.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def middle_slice(inputs: NDArray[Value]) -> NDArray[Value]:
    """The slices themselves, out of what is read with them: (..., S, H, W) -> (..., H, W), a view."""
    return inputs[..., inputs.shape[-3] // 2, :, :]


def crop_to(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Undo `pad_to_multiple`.

    Shape: (..., H', W') -> (..., H, W), a view.
    """
    height, width = shape
    if tensor.shape[-2] < height or tensor.shape[-1] < width:
        raise ValueError(f"cannot crop {tuple(tensor.shape[-2:])} to the larger {(height, width)}")
    return tensor[..., :height, :width]


def likeliest(maps: torch.Tensor) -> NDArray[np.int64]:
    """Channel of the highest value, the first of several.

    Shape: (..., K, H, W) -> (..., H, W).
    """
    # Over any but the last dimension argmax is many times slower on CPUs.
    return maps.max(-3).indices.cpu().numpy()


def _ratio(new: tuple[int, int], old: tuple[int, int]) -> tuple[float, float]:
    return new[0] / old[0], new[1] / old[1]


def _resample(maps: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Resample (n, C, H, W) bilinearly, with a wider kernel where it shrinks."""
    shrinks = shape[0] < maps.shape[-2] or shape[1] < maps.shape[-1]
    return functional.interpolate(
        maps.float(), size=shape, mode="bilinear", align_corners=False, antialias=shrinks
    )
