"""A volume as a network sees it: prepared slices, keypoints and features, each computed once and kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from kaf_model.config import KeypointConfig
from kaf_model.explore.explorer import Explorer
from kaf_model.geometry import level_cells, resample_points
from kaf_model.keypoints import KeypointCache, Keypoints, make_detector
from kaf_model.slices import Slices, crop_to, middle_slice
from kaf_model.unet import NUM_LEVELS
from kaf_model.volume import Volume

LEVELS = tuple(range(1, NUM_LEVELS + 1))
"""Encoder levels as the paper counts them: level l halves the slice l - 1 times."""
FEATURE_BYTES = 2**30
"""Memory that the features of a volume may take; then those that were not used for longest go."""


@dataclass(frozen=True, eq=False)
class SliceFeatures:
    """What the network makes of one slice, or of an augmented one.

    Attributes:
        shape: (H, W) of the slice in pixels, without padding.
        keypoints: Positions (N, 2) the network was given.
        maps: Features of each level, fine to coarse, scaled to unit length, (h_l, w_l, C_l).
        keypoint_features: U^l (N, E) by level, for the levels with a KAF layer.
        attention_inputs: What each attention block reads, (N, E), by level.
    """

    shape: tuple[int, int]
    keypoints: NDArray[np.float32]
    maps: tuple[Tensor, ...]
    keypoint_features: dict[int, Tensor]
    attention_inputs: dict[int, tuple[Tensor, ...]]

    @classmethod
    def compute(
        cls, explorer: Explorer, image: NDArray[np.floating] | Tensor, keypoints: NDArray[np.float32]
    ) -> SliceFeatures:
        """Run the encoder over one slice as it reads it (S, H, W), with keypoints (N, 2)."""
        image = torch.as_tensor(image)
        encoded = explorer.encode(image, torch.from_numpy(np.ascontiguousarray(keypoints)))
        shape = (image.shape[1], image.shape[2])
        maps = []
        for level, features in zip(LEVELS, encoded.maps, strict=True):
            cropped = crop_to(features, cells_shape(shape, level)).permute(1, 2, 0)  # (h, w, C)
            maps.append(functional.normalize(cropped, dim=-1).contiguous())
        return cls(
            shape,
            keypoints,
            tuple(maps),
            dict(encoded.keypoint_features),
            dict(encoded.attention_inputs),
        )

    @property
    def padded_shape(self) -> tuple[int, int]:
        """(H, W) of what the encoder read, sides divisible by 16."""
        return -(-self.shape[0] // 16) * 16, -(-self.shape[1] // 16) * 16

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        tensors = [*self.maps, *self.keypoint_features.values()]
        tensors += [one for inputs in self.attention_inputs.values() for one in inputs]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def level(self, level: int) -> Tensor:
        """Unit features of a level, (h, w, C).

        Raises:
            ValueError: If there is no such level.
        """
        return self.maps[checked_level(level) - 1]

    def at(self, points: ArrayLike, level: int) -> Tensor:
        """Unit features at points, of the cell in which each lies.

        Shape: (N, 2) pixels (y, x) -> (N, C).
        """
        features = self.level(level)
        cells = cells_of(points, level, self.shape)
        return features[cells[:, 0], cells[:, 1]]


def checked_level(level: int) -> int:
    """Return a level that exists.

    Raises:
        ValueError: If it does not.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be 1 (fine) to {NUM_LEVELS} (coarse), got {level}")
    return level


def cells_shape(shape: Sequence[int], level: int) -> tuple[int, int]:
    """Rows and columns of a level's map of a slice (H, W), cells of padding alone left out."""
    side = 2 ** (level - 1)
    return -(-shape[0] // side), -(-shape[1] // side)


def cells_of(points: ArrayLike, level: int, shape: Sequence[int]) -> NDArray[np.int64]:
    """Cells (row, column) of a level in which pixels (y, x) of a slice (H, W) lie.

    Shape: (N, 2) -> (N, 2); points outside take the nearest cell.
    """
    positions = torch.from_numpy(np.asarray(points, np.float64).reshape(-1, 2))
    cells: NDArray[np.int64] = level_cells(
        positions, checked_level(level) - 1, *cells_shape(shape, level)
    ).numpy()
    return cells


def cell_centres(cells: ArrayLike, level: int) -> NDArray[np.float64]:
    """Pixels (y, x) at the centres of cells (row, column) of a level. Shape: (N, 2) -> (N, 2)."""
    cells = np.asarray(cells, np.float64).reshape(-1, 2)
    return resample_points(cells, float(2 ** (checked_level(level) - 1)))


class VolumeView:
    """A volume through the eyes of a network.

    Points come in three grids: voxels (z, y, x) of the volume, pixels (y, x) of the resampled slice that
    the network reads, and cells of a level's map. Safe to use from several threads.

    Attributes:
        explorer: The network.
        volume: The volume.
        stack: Its slices as the network reads them.
        cache: Keypoints found before; None detects anew.
    """

    def __init__(
        self,
        explorer: Explorer,
        volume: Volume,
        *,
        cache: KeypointCache | None = None,
        limit: int = FEATURE_BYTES,
    ) -> None:
        """View a volume.

        Args:
            explorer: The network.
            volume: The volume.
            cache: Keypoints on disk.
            limit: Bytes of features kept in memory; those of the last slice are always kept.
        """
        self.explorer = explorer
        self.volume = volume
        self.stack = Slices(volume, explorer.slices)
        self.cache = cache
        self.limit = limit
        self._detectors = {explorer.keypoints: make_detector(explorer.keypoints)}
        self._inputs: OrderedDict[int, NDArray[np.float32]] = OrderedDict()
        self._keypoints: dict[tuple[int, KeypointConfig], Keypoints] = {}
        self._features: OrderedDict[int, SliceFeatures] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def num_slices(self) -> int:
        """Z."""
        return self.stack.num_slices

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of a slice as the network reads it, without padding."""
        return self.stack.shape

    def image(self, z: int) -> NDArray[np.float32]:
        """The resampled and normalised slice z, (H, W)."""
        return middle_slice(self.read(z))

    def read(self, z: int) -> NDArray[np.float32]:
        """Slice z with what the network reads besides, (S, H, W)."""
        with self._lock:
            if z not in self._inputs:
                self._inputs[z] = self.stack.inputs([z])[0]
                if len(self._inputs) > 64:
                    self._inputs.popitem(last=False)
            return self._inputs[z]

    def keypoints(self, z: int, config: KeypointConfig | None = None) -> Keypoints:
        """Keypoints of slice z in pixels of the resampled slice.

        Args:
            z: The slice.
            config: Detection; default: that of the network.
        """
        config = config or self.explorer.keypoints
        with self._lock:
            if (z, config) not in self._keypoints:
                if config not in self._detectors:
                    self._detectors[config] = make_detector(config)
                detector, image = self._detectors[config], self.image(z)
                found = detector.detect(image) if self.cache is None else self.cache.detect(image, detector)
                self._keypoints[z, config] = found
            return self._keypoints[z, config]

    def features(self, z: int) -> SliceFeatures:
        """What the network makes of slice z; computed when first asked for."""
        with self._lock:
            if z in self._features:
                self._features.move_to_end(z)
                return self._features[z]
            found = SliceFeatures.compute(self.explorer, self.read(z), self.keypoints(z).positions)
            self._features[z] = found
            kept = sum(one.nbytes for one in self._features.values())
            while kept > self.limit and len(self._features) > 1:
                kept -= self._features.popitem(last=False)[1].nbytes
            return found

    def has_features(self, z: int) -> bool:
        """Whether the features of slice z are there already."""
        with self._lock:
            return z in self._features

    def to_pixels(self, voxels: ArrayLike) -> NDArray[np.float64]:
        """Voxels (z, y, x) to pixels (y, x) of their resampled slices. Shape: (N, 3) -> (N, 2)."""
        voxels = np.asarray(voxels, np.float64).reshape(-1, 3)
        return self.stack.points_from_source(voxels[:, 1:])

    def to_voxels(self, z: int, pixels: ArrayLike) -> NDArray[np.float64]:
        """Pixels (y, x) of the resampled slice z to voxels (z, y, x). Shape: (N, 2) -> (N, 3)."""
        pixels = self.stack.points_to_source(np.asarray(pixels, np.float64).reshape(-1, 2))
        return np.column_stack([np.full(len(pixels), float(z)), pixels])

    def voxel_map(self, cells: Tensor, level: int) -> NDArray[np.float32]:
        """A level's map on the voxels of the volume, to lay over a slice: (h, w) -> (Y, X)."""
        pixels = level_to_pixels(cells[None], level, self.shape)
        voxels: NDArray[np.float32] = self.stack.to_source(pixels[:, None])[0, 0].cpu().numpy()
        return voxels

    def crop(self, z: int, point: ArrayLike, size: int = 48) -> NDArray[np.float32]:
        """A thumbnail of slice z around a pixel (y, x); what lies outside repeats the edge.

        Shape: (size, size), normalised intensities.
        """
        row, column = np.rint(np.asarray(point, np.float64)).astype(int)
        rows = np.clip(np.arange(size) + row - size // 2, 0, self.shape[0] - 1)
        columns = np.clip(np.arange(size) + column - size // 2, 0, self.shape[1] - 1)
        cropped: NDArray[np.float32] = self.image(z)[rows[:, None], columns]
        return cropped


def level_to_pixels(cells: Tensor, level: int, shape: Sequence[int]) -> Tensor:
    """Interpolate a level's maps bilinearly between the centres of its cells.

    Args:
        cells: (n, h, w)
        level: Their level.
        shape: (H, W) of the slice.

    Returns:
        (n, H, W)
    """
    if tuple(cells.shape[-2:]) != cells_shape(shape, level):
        raise ValueError(
            f"level {level} of a slice {tuple(shape)} has {cells_shape(shape, level)} cells, "
            f"got {tuple(cells.shape[-2:])}"
        )
    side = 2 ** (level - 1)
    if side == 1:
        return cells
    padded = functional.interpolate(
        cells[:, None], scale_factor=float(side), mode="bilinear", align_corners=False
    )
    return crop_to(padded[:, 0], shape)
