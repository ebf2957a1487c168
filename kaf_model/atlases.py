"""Labels that come to a volume from others that are labelled throughout (multi-atlas segmentation).

Each of a few labelled volumes, the atlases, is registered to the volume; the labels that arrive are taken from where
patches look alike (`label_fusion.py`), and averaged, voxel by voxel, by how well each atlas fits there (Artaechevarria
et al., Combination strategies in multi-atlas image segmentation, IEEE TMI 28(8), 2009; a survey: Iglesias and Sabuncu,
Medical Image Analysis 24(1), 2015). Whether that is any good is seen first on the atlases themselves, of which each has
labels to compare with.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaf_model.config import SliceConfig
from kaf_model.engine import is_out_of_memory, release_memory
from kaf_model.label_fusion import HALO, by_patches
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

_VOXELS_AT_ONCE = 1_000_000

LEAST_SHARE = 0.01
"""Lowest share of a channel in what arrives at a voxel, where a network is asked as well."""


@dataclass(frozen=True)
class AtlasLabels:
    """What atlases say of a volume, on the network's grid.

    Attributes:
        shape: (n, H, W) of the slices.
        box: Where anything arrives; elsewhere is background.
        shares: (K, z, h, w) share 0..1 of each channel in what arrives at the voxels of the box, float16 on the CPU.
    """

    shape: tuple[int, int, int]
    box: Box
    shares: Tensor

    def channels(self) -> NDArray[np.int16]:
        """The likeliest channel of each pixel, (n, H, W)."""
        labels = np.zeros(self.shape, np.int16)
        labels[self.box] = self.shares.max(0).indices.numpy()
        return labels

    def fused(self, probabilities: Tensor, rows: Sequence[int], weight: float = 1.0) -> Tensor:
        """Combine a network's probabilities with the shares, as a product of experts.

        Args:
            probabilities: (n, K, H, W) of the slices `rows`.
            rows: Slices.
            weight: Exponent on what the atlases say; 0 changes nothing.

        Returns:
            (n, K, H, W) float32 probabilities.
        """
        depth, *inner = self.box
        shares = torch.zeros(probabilities.shape)
        shares[:, 0] = 1
        for place, row in enumerate(rows):
            if depth.start <= row < depth.stop:
                shares[place][:, *inner] = self.shares[:, row - depth.start].float()
        said = shares.to(probabilities.device).clamp_min(LEAST_SHARE).log()
        return (probabilities.clamp_min(1e-4).log() + weight * said).softmax(1)


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

    def agreement(self, least: float, aim: str) -> Generator[Progress, None, float | None]:
        """Compare, and tell whether the atlases fit each other well enough for something.

        Args:
            least: Dice that is enough.
            aim: What it is enough or too little for: "label others by them".

        Yields:
            Progress in registrations, the last with a message.

        Returns:
            The Dice of `compare`; None if it is less.
        """
        dice = yield from self.compare()
        fits = dice >= least
        found = f"registered to each other, the labelled volumes agree to a Dice of {dice:.2f}"
        so = f"{'enough' if fits else 'too little'} to {aim}"
        yield Progress("comparing labelled volumes", len(self), len(self), message=f"{found}: {so}")
        return dice if fits else None

    def can_reach(self, prepared: PreparedVolume, indices: Sequence[int]) -> bool:
        """Whether the slices of a volume lie near enough to each other.

        Args:
            prepared: Some of its slices.
            indices: Which slices of the volume they are.
        """
        return len(indices) > 1 and lie_near(self._spacing(prepared, indices))

    def carry(
        self, prepared: PreparedVolume, indices: Sequence[int]
    ) -> Generator[None, None, AtlasLabels | None]:
        """Carry the labels of all atlases to prepared slices of a volume.

        Args:
            prepared: Slices of the volume.
            indices: Which slices of the volume they are; taken for evenly spaced.

        Yields:
            Nothing, several times a second or after each few steps of a registration.

        Returns:
            What arrives at the prepared slices; None if no atlas brings any structure into the volume.
        """
        images = torch.from_numpy(middle_slice(np.asarray(prepared.images)).astype(np.float32))
        return (yield from self._carry(Picture(images.to(self._device), self._spacing(prepared, indices))))

    def labels_of(self, volume: Volume) -> Generator[Progress, None, AtlasLabels | None]:
        """Carry the labels of all atlases to all slices of a volume, as far as that can be done.

        Yields:
            Progress, with a message if it cannot.

        Returns:
            What arrives; None if the slices lie too far apart, no atlas brings any structure into the volume, or
            memory runs out.
        """
        report = Progress("registering labelled volumes", 0, None)
        found = None
        why = f"the slices of {volume.name} lie too far apart for labelled volumes to be registered to it"
        if _near(volume, self._config):
            why = f"no labelled volume could be registered to {volume.name}"
            try:
                found = yield from reported(self._carry(self._picture(volume)), report)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                why = f"memory ran out while labelled volumes were registered to {volume.name}"
                release_memory()
        if found is None:
            yield replace(report, message=f"{why}: it is segmented without them")
        return found

    def _carry(self, picture: Picture) -> Generator[None, None, AtlasLabels | None]:
        arrived: list[tuple[_Atlas, Registered]] = []
        for atlas in self._atlases:
            found = yield from register(atlas.picture, atlas.channels > 0, picture)
            if found is not None:
                arrived.append((atlas, found))
        if not arrived:
            return None
        box = _around([found.box for _, found in arrived])
        size = [part.stop - part.start for part in box]
        shares = torch.zeros(self._num_channels, *size, dtype=torch.float16)
        thickness = max(1, _VOXELS_AT_ONCE // (size[1] * size[2]))
        for first in range(box[0].start, box[0].stop, thickness):
            slab = (slice(first, min(first + thickness, box[0].stop)), *box[1:])
            total = torch.zeros([part.stop - part.start for part in slab], device=self._device)
            brought = torch.zeros(self._num_channels - 1, *total.shape, device=self._device)
            for atlas, found in arrived:
                weight = torch.full_like(total, LEAST_LIKENESS)
                rows = slice(max(first, found.box[0].start), min(slab[0].stop, found.box[0].stop))
                if rows.start < rows.stop:
                    inner = _within((rows, *found.box[1:]), slab)
                    own = _within((rows, *found.box[1:]), found.box)[0]
                    weight[inner] = found.likeness[own].clamp_min(LEAST_LIKENESS)
                    labels = atlas.labels_at(found, own, picture.values, range(1, self._num_channels))
                    brought[:, *inner] += weight[inner] ** LIKENESS_POWER * labels
                total += weight**LIKENESS_POWER
                yield
            brought /= total
            place = _within(slab, box)[0]
            shares[1:, place] = brought.half().cpu()
            shares[0, place] = (1 - brought.sum(0)).half().cpu()
        return AtlasLabels(picture.shape, box, shares)

    def _picture(self, volume: Volume) -> Picture:
        stack = Slices(volume, self._config)
        images = torch.from_numpy(stack.images(range(stack.num_slices)))
        return Picture(images.to(self._device), (volume.spacing[0], *stack.spacing))

    def _atlas(self, case: LabelledVolume, classes: ClassMap) -> _Atlas:
        stack = Slices(case.volume, self._config)
        values = stack.labels(case.without_unlabelled().labels, range(stack.num_slices))
        channels = np.zeros(values.shape, np.int16)
        for channel, value in enumerate(classes.values):
            channels[values == value] = channel
        return _Atlas(self._picture(case.volume), torch.from_numpy(channels).to(self._device))

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

    def labels_at(self, found: Registered, rows: slice, seen: Tensor, channels: Iterable[int]) -> Tensor:
        """What comes to some rows of the box in which this atlas was registered to an image, (C, z, h, w) of 0..1.

        Args:
            found: The registration.
            rows: Rows of its box.
            seen: (Z, H, W) of the image.
            channels: C of them.
        """
        near = slice(max(rows.start - HALO, 0), min(rows.stop + HALO, len(found.points)))
        points = found.points[near]
        labels = torch.stack([self.brought(channel, points) for channel in channels])
        image = sampled(self.picture.values[None], points)[0]
        fused = by_patches(seen[found.box][near], image, labels)
        return fused[:, rows.start - near.start : rows.stop - near.start]


def _is_whole(case: LabelledVolume) -> bool:
    """Whether everything that a volume shows of the structures is labelled."""
    finished = case.finished
    if not finished or len(finished) <= finished[-1] - finished[0]:
        return False
    return bool(case.labels[list(finished)].any()) and not open_ends(case.labels, finished)


def _near(volume: Volume, config: SliceConfig) -> bool:
    return volume.num_slices > 1 and lie_near((volume.spacing[0], *Slices(volume, config).spacing))


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
