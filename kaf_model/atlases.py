"""Labels that come to an unlabelled volume from others that are labelled throughout (multi-atlas segmentation).

Each of a few labelled volumes, the atlases, is registered to the unlabelled one; the labels that arrive are averaged,
voxel by voxel, by how well each atlas fits there (Artaechevarria et al., Combination strategies in multi-atlas image
segmentation, IEEE TMI 28(8), 2009; a survey: Iglesias and Sabuncu, Medical Image Analysis 24(1), 2015). Whether
that is any good is seen first on the atlases themselves, of which each has labels to compare with.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaf_model.config import SliceConfig
from kaf_model.labels import ClassMap, LabelledVolume, open_ends
from kaf_model.preparation import PreparedVolume
from kaf_model.progress import Progress, reported
from kaf_model.registration import Box, Picture, Registered, register, sampled
from kaf_model.slices import Slices, lie_near, middle_slice
from kaf_model.volume import Volume

LIKENESS_POWER = 2
"""Exponent on the squared correlation of two images around a voxel, by which the labels of atlases are weighed."""

LEAST_LIKENESS = 1e-3
"""Lowest such correlation that is told from a lower one."""


class Atlases:
    """Volumes that are labelled throughout, to be registered to others.

    Only volumes whose slices lie about as near as their pixels can be: others show too little of what is between.

    Args:
        cases: Labelled volumes; of those labelled throughout an even selection is taken.
        classes: Channels of the labels.
        config: Preprocessing of the network.
        most: At most this many.
        device: Where to compute.
    """

    def __init__(
        self,
        cases: Sequence[LabelledVolume],
        classes: ClassMap,
        config: SliceConfig,
        *,
        most: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._num_channels = len(classes)
        self._config = config
        self._device = torch.device(device)
        usable = [case for case in cases if _is_whole(case) and _near(case.volume, config)]
        places = np.unique(np.linspace(0, len(usable) - 1, min(most, len(usable))).round().astype(int))
        self._atlases = [self._atlas(usable[place], classes) for place in places]

    def __len__(self) -> int:
        return len(self._atlases)

    def compare(self) -> Generator[Progress, None, float]:
        """Carry the labels of each atlas to the others, and see how well they fit there.

        Yields:
            Progress in registrations.

        Returns:
            Dice of the labels of each atlas with those that come to it from another one, mean over structures and
            pairs; 0 with fewer than two atlases, of which nothing can be seen.
        """
        pairs = list(itertools.permutations(self._atlases, 2))
        scores = []
        for done, (atlas, other) in enumerate(pairs):
            work = register(atlas.picture, atlas.channels > 0, other.picture)
            found = yield from reported(work, Progress("comparing labelled volumes", done, len(pairs)))
            scores.append(self._dice(atlas, found, other.channels))
        return float(np.mean(scores)) if scores else 0.0

    def can_reach(self, prepared: PreparedVolume, indices: Sequence[int]) -> bool:
        """Whether the slices of a volume lie near enough to each other.

        Args:
            prepared: Some of its slices.
            indices: Which slices of the volume they are.
        """
        return len(indices) > 1 and lie_near(self._spacing(prepared, indices))

    def carry(
        self, prepared: PreparedVolume, indices: Sequence[int]
    ) -> Generator[None, None, NDArray[np.int16] | None]:
        """Carry the labels of all atlases to a volume.

        Args:
            prepared: Slices of the volume.
            indices: Which slices of the volume they are; taken for evenly spaced.

        Yields:
            Nothing, several times a second or after each few steps of a registration.

        Returns:
            (n, H, W) likeliest channel of each pixel of the prepared slices; None if no atlas brings any structure
            into the volume.
        """
        images = torch.from_numpy(middle_slice(np.asarray(prepared.images)).astype(np.float32))
        picture = Picture(images.to(self._device), self._spacing(prepared, indices))
        arrived: list[tuple[_Atlas, Registered]] = []
        for atlas in self._atlases:
            found = yield from register(atlas.picture, atlas.channels > 0, picture)
            if found is not None:
                arrived.append((atlas, found))
        if not arrived:
            return None
        box = _around([found.box for _, found in arrived])
        size = [part.stop - part.start for part in box]
        weights = [_weight(found, box, size) for _, found in arrived]
        background = torch.stack(weights).sum(0)
        best = torch.zeros(size, device=self._device)
        channels = torch.zeros(size, dtype=torch.int16, device=self._device)
        for channel in range(1, self._num_channels):
            brought = torch.zeros(size, device=self._device)
            for (atlas, found), weight in zip(arrived, weights, strict=True):
                inner = _within(found.box, box)
                there = atlas.brought(channel, found.points)
                brought[inner] += weight[inner] * there
            background -= brought
            channels[brought > best] = channel
            best = torch.maximum(best, brought)
        channels[background >= best] = 0
        labels = np.zeros(picture.shape, np.int16)
        labels[box] = channels.cpu().numpy()
        return labels

    def _atlas(self, case: LabelledVolume, classes: ClassMap) -> _Atlas:
        stack = Slices(case.volume, self._config)
        every = range(stack.num_slices)
        values = stack.labels(case.without_unlabelled().labels, every)
        channels = np.zeros(values.shape, np.int16)
        for channel, value in enumerate(classes.values):
            channels[values == value] = channel
        spacing = (case.volume.spacing[0], *stack.spacing)
        images = torch.from_numpy(stack.images(every)).to(self._device)
        return _Atlas(Picture(images, spacing), torch.from_numpy(channels).to(self._device))

    def _spacing(self, prepared: PreparedVolume, indices: Sequence[int]) -> tuple[float, float, float]:
        """Distances in mm between the prepared slices, and of their pixels: nearly what was asked for."""
        apart, height, width = prepared.spacing
        if len(indices) > 1:
            apart *= (indices[-1] - indices[0]) / (len(indices) - 1)
        if self._config.spacing is not None:
            height = width = self._config.spacing
        return apart, height, width

    def _dice(self, atlas: _Atlas, found: Registered | None, truth: Tensor) -> float:
        """Mean over the structures that either of two atlases shows, of what one brings to the other."""
        carried = torch.zeros_like(truth)
        if found is not None:
            for channel in range(1, self._num_channels):
                part = atlas.brought(channel, found.points)
                carried[found.box][part > 0.5] = channel
        scores = []
        for channel in range(1, self._num_channels):
            one, two = carried == channel, truth == channel
            if two.any() or (atlas.channels == channel).any():
                scores.append(2 * float((one & two).sum()) / max(float(one.sum() + two.sum()), 1.0))
        return float(np.mean(scores))


@dataclass(frozen=True)
class _Atlas:
    """A volume with the channel (Z, H, W) of each of its voxels."""

    picture: Picture
    channels: Tensor

    def brought(self, channel: int, points: Tensor) -> Tensor:
        """Part 0..1 of a channel at points (z, h, w, 3) of the atlas, (z, h, w)."""
        there: Tensor = sampled((self.channels == channel).float()[None], points, beyond="zeros")[0]
        return there


def _is_whole(case: LabelledVolume) -> bool:
    """Whether everything that a volume shows of the structures is labelled."""
    finished = case.finished
    if not finished or len(finished) <= finished[-1] - finished[0]:
        return False
    return bool(case.labels[list(finished)].any()) and not open_ends(case.labels, finished)


def _near(volume: Volume, config: SliceConfig) -> bool:
    return volume.num_slices > 1 and lie_near((volume.spacing[0], *Slices(volume, config).spacing))


def _weight(found: Registered, box: Box, size: Sequence[int]) -> Tensor:
    """How much an atlas counts at each voxel of a box that holds its own."""
    weight = torch.full(tuple(size), LEAST_LIKENESS, device=found.points.device)
    weight[_within(found.box, box)] = found.likeness.clamp_min(LEAST_LIKENESS)
    return weight**LIKENESS_POWER


def _around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all."""
    depth, lines, columns = (
        slice(min(part.start for part in parts), max(part.stop for part in parts))
        for parts in zip(*boxes, strict=True)
    )
    return depth, lines, columns


def _within(inner: Box, outer: Box) -> Box:
    """A box in the coordinates of another one that holds it."""
    depth, lines, columns = (
        slice(own.start - other.start, own.stop - other.start)
        for own, other in zip(inner, outer, strict=True)
    )
    return depth, lines, columns
