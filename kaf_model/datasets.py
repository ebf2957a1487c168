"""The batch of each step: augmented views of slices.

A batch is a pure function of the data, the settings, the seed and the step, so nothing but the step number
is needed to go on after a break, and each of several processes makes its share of the joint batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from kaf_model.augment import SpatialDraws, SpatialTransform
from kaf_model.config import AugmentConfig, CorrespondenceConfig
from kaf_model.correspondences import UNMATCHED, find_correspondences
from kaf_model.engine import generator_for
from kaf_model.intensity import IntensityChange
from kaf_model.losses import IGNORED
from kaf_model.preparation import LabelledSlice, PreparedVolume


class Views(NamedTuple):
    """A padded batch of B slices.

    Attributes:
        images: (B, S, H, W), the slices and what is read with each of them.
        keypoints: (B, N, 2) (y, x) pixels.
        valid: (B, N) bool.
    """

    images: Tensor
    keypoints: Tensor
    valid: Tensor


class PretrainingBatch(NamedTuple):
    """P pairs of views: P first, then their P partners.

    Attributes:
        views: 2 P slices.
        slice_position: (2 P,), a pair shares the position of its first slice.
        matches0: (P, N) index into the partner for each keypoint of the first view, or UNMATCHED.
    """

    views: Views
    slice_position: Tensor
    matches0: Tensor


class LabelledBatch(NamedTuple):
    """B labelled views.

    Attributes:
        views: B slices.
        labels: (B, H, W) class indices, or IGNORED.
    """

    views: Views
    labels: Tensor


def stack_padded(slices: Sequence[NDArray[np.generic]], fill: float | None = None) -> Tensor:
    """Stack slices of mixed sizes (..., H_i, W_i) into (B, ..., H, W), padded at the bottom and right.

    Args:
        slices: The slices.
        fill: Value of the padding; None repeats the edge.
    """
    height = max(image.shape[-2] for image in slices)
    width = max(image.shape[-1] for image in slices)
    padded = []
    for image in slices:
        tensor = torch.from_numpy(np.ascontiguousarray(image))
        missing = (0, width - image.shape[-1], 0, height - image.shape[-2])
        if any(missing) and fill is None:
            above = image.shape[:-2]
            flat = tensor.float().reshape(1, -1, *image.shape[-2:])
            tensor = functional.pad(flat, missing, mode="replicate").view(*above, height, width)
        elif any(missing):
            tensor = functional.pad(tensor, missing, value=fill)
        padded.append(tensor)
    return torch.stack(padded)


def whole_canvas(sizes: Tensor, divisor: int = 16) -> tuple[int, int]:
    """Height and width that hold slices of the given sizes (B, 2) and that the networks can halve four times."""
    height, width = (-(-int(side) // divisor) * divisor for side in sizes.max(0).values)
    return height, width


def pad_keypoints(positions: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """Positions (N_i, 2) of B slices -> padded (B, N, 2) and valid (B, N)."""
    longest = max((len(points) for points in positions), default=0)
    padded = torch.zeros(len(positions), longest, 2)
    valid = torch.zeros(len(positions), longest, dtype=torch.bool)
    for row, points in enumerate(positions):
        padded[row, : len(points)] = torch.from_numpy(np.asarray(points))
        valid[row, : len(points)] = True
    return padded, valid


def compact(keypoints: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move valid keypoints to the front and cut the padding to what the batch needs.

    Returns:
        Keypoints (B, M, 2), valid (B, M), and the slot (B, M) each came from.
    """
    order = torch.argsort(~valid, dim=1, stable=True)
    order = order[:, : int(valid.sum(1).max()) if valid.numel() else 0]
    return keypoints.gather(1, order[..., None].expand(-1, -1, 2)), valid.gather(1, order), order


_MOST_STEPS_TOGETHER = 8
_PIXELS_TOGETHER = 2**24
"""Pixels of the slices that a GPU augments at once, at most: 64 MiB a map of them."""


@dataclass(frozen=True)
class Shard:
    """The part of each joint batch that one process, and one micro-batch of it, works on."""

    rank: int = 0
    world: int = 1
    part: int = 0
    parts: int = 1

    def rows(self, size: int) -> Tensor:
        """Indices of this shard's items in a joint batch of a size; at least one."""
        number, total = self.rank * self.parts + self.part, self.world * self.parts
        rows = torch.arange(size * number // total, size * (number + 1) // total)
        return rows if len(rows) else torch.tensor([number % size])


def items_of_step(step: int, batch_size: int, num_items: int, seed: int) -> Iterator[tuple[int, int]]:
    """What a step sees when every epoch shows every item once, in an order of its own.

    Yields:
        How many items came before since the first step, and the item's index.
    """
    for number in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(number, num_items)
        yield number, int(_order(num_items, seed, epoch)[place])


@lru_cache(maxsize=8)
def _order(num_items: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_items, generator=generator_for(seed, epoch, 1))


def augment_views(
    images: Tensor,
    keypoints: Tensor,
    valid: Tensor,
    *,
    transform: SpatialTransform,
    intensity: IntensityChange,
) -> Views:
    """Apply one spatial map to images and keypoints, then change intensities.

    Args:
        images: (B, S, H, W) padded canvas.
        keypoints: (B, N, 2)
        valid: (B, N)
        transform: The map of each slice.
        intensity: The intensity changes of each slice.

    Returns:
        Views whose keypoints keep their slots; those that left are not valid.
    """
    moved, inside = transform.points(keypoints, valid)
    warped = transform.images(images.float())
    return Views(intensity.apply(warped).contiguous(memory_format=torch.channels_last), moved, inside)


class PretrainingPairs:
    """Draws the pairs of neighbouring slices of each step.

    Args:
        volumes: Prepared volumes.
        augment: Augmentation.
        neighbour_range: The partner is a slice within this part of the volume, never itself.
        correspondences: Which keypoints of a pair count as the same.
        batch_size: Pairs in the joint batch of all processes.
        seed: Of sampling and augmentation.
    """

    def __init__(
        self,
        volumes: Sequence[PreparedVolume],
        *,
        augment: AugmentConfig,
        neighbour_range: float,
        correspondences: CorrespondenceConfig,
        batch_size: int,
        seed: int,
    ) -> None:
        self.volumes = volumes
        self.augment = augment
        self.neighbour_range = neighbour_range
        self.correspondences = correspondences
        self.batch_size = batch_size
        self.seed = seed
        self.index = [(v, z) for v, volume in enumerate(volumes) for z in range(len(volume))]
        self._matches: dict[tuple[int, int, int], NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self.index)

    def pairs(self, step: int) -> list[tuple[int, int, int]]:
        """The joint batch of a step as (volume, slice, partner slice)."""
        chosen = []
        for number, item in items_of_step(step, self.batch_size, len(self.index), self.seed):
            v, z = self.index[item]
            near = self.neighbours(v, z)
            pick = torch.randint(len(near), (1,), generator=generator_for(self.seed, number, 2))
            chosen.append((v, z, near[int(pick)]))
        return chosen

    def neighbours(self, volume: int, z: int) -> list[int]:
        """Slices that may be the partner of a slice: those in range, else the next ones, else itself alone."""
        positions = self.volumes[volume].positions
        others = [other for other in range(len(positions)) if other != z]
        near = [other for other in others if abs(positions[other] - positions[z]) < self.neighbour_range]
        return near or [other for other in others if abs(other - z) == 1] or [z]

    def matches0(self, volume: int, z0: int, z1: int) -> NDArray[np.int64]:
        """Correspondences of two slices of a volume, found once."""
        key = (volume, z0, z1)
        if key not in self._matches:
            keypoints = self.volumes[volume].keypoints
            found = find_correspondences(keypoints[z0], keypoints[z1], self.correspondences)
            self._matches[key] = found.matches0
        return self._matches[key]

    def batch(self, step: int, device: torch.device, shard: Shard | None = None) -> PretrainingBatch:
        """The augmented views of a step."""
        shard = shard or Shard()
        pairs = self.pairs(step)
        rows = shard.rows(len(pairs))
        both = torch.cat([rows, rows + len(pairs)])  # rows of the joint batch of first and second views
        slots = [(v, z0) for v, z0, _ in pairs] + [(v, z1) for v, _, z1 in pairs]
        sizes = torch.tensor([self.volumes[v].images.shape[2:] for v, _ in slots])
        transform = SpatialTransform.sample(
            self.augment,
            sizes,
            generator=generator_for(self.seed, step, 3),
            device=device,
            canvas=whole_canvas(sizes),
            rows=both,
        )
        intensity = IntensityChange.sample(
            self.augment, len(slots), generator=generator_for(self.seed, step, 4)
        ).select(both)
        own = [slots[row] for row in both.tolist()]
        keypoints, valid = pad_keypoints([self.volumes[v].keypoints[z].positions for v, z in own])
        views = augment_views(
            stack_padded([self.volumes[v].images[z] for v, z in own]).to(device),
            keypoints.to(device),
            valid.to(device),
            transform=transform,
            intensity=intensity,
        )
        matches0 = torch.full((len(rows), keypoints.shape[1]), UNMATCHED)
        for row, pair in enumerate(rows.tolist()):
            found = self.matches0(*pairs[pair])
            matches0[row, : len(found)] = torch.from_numpy(found)
        position = torch.tensor(
            [float(self.volumes[pairs[r][0]].positions[pairs[r][1]]) for r in rows.tolist()]
        )
        return _compact_pairs(views, matches0.to(device), position.repeat(2).to(device))


def concatenate(batches: Sequence[LabelledBatch]) -> LabelledBatch:
    """Join labelled batches; smaller images are padded at the bottom and right, where nothing is known."""
    longest = max(batch.views.valid.shape[1] for batch in batches)
    height, width = (max(batch.labels.shape[axis] for batch in batches) for axis in (1, 2))
    images, keypoints, valid, labels = [], [], [], []
    for batch in batches:
        margin = (0, width - batch.labels.shape[2], 0, height - batch.labels.shape[1])
        missing = longest - batch.views.valid.shape[1]
        images.append(functional.pad(batch.views.images, margin, mode="replicate"))
        keypoints.append(functional.pad(batch.views.keypoints, (0, 0, 0, missing)))
        valid.append(functional.pad(batch.views.valid, (0, missing)))
        labels.append(functional.pad(batch.labels, margin, value=IGNORED))
    return LabelledBatch(Views(torch.cat(images), torch.cat(keypoints), torch.cat(valid)), torch.cat(labels))


def _compact_pairs(views: Views, matches0: Tensor, position: Tensor) -> PretrainingBatch:
    pairs = len(matches0)
    keypoints, valid, order = compact(views.keypoints, views.valid)
    if not keypoints.shape[1]:
        return PretrainingBatch(Views(views.images, keypoints, valid), position, matches0[:, :0])
    partner = matches0.gather(1, order[:pairs])  # slots of the second view before it was compacted
    place = torch.full_like(views.valid[pairs:], UNMATCHED, dtype=torch.long)
    slots = torch.arange(order.shape[1], device=order.device).expand_as(order[pairs:])
    place.scatter_(1, order[pairs:], torch.where(valid[pairs:], slots, UNMATCHED))
    moved = place.gather(1, partner.clamp(min=0))
    matched = (partner >= 0) & valid[:pairs]
    return PretrainingBatch(
        Views(views.images, keypoints, valid), position, torch.where(matched, moved, UNMATCHED)
    )


class LabelledSlices:
    """Draws the augmented labelled slices of each step.

    Args:
        slices: Labelled slices.
        augment: Augmentation.
        foreground: Part of the crops that are centred on a labelled structure.
        batch_size: Slices in the joint batch of all processes.
        seed: Of sampling and augmentation.
    """

    def __init__(
        self,
        slices: Sequence[LabelledSlice],
        *,
        augment: AugmentConfig,
        foreground: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self.slices = slices
        self.augment = augment
        self.foreground = foreground
        self.batch_size = batch_size
        self.seed = seed
        self._where = [np.argwhere(labelled.labels > 0) for labelled in slices]
        self._made: list[LabelledBatch] = []
        self._made_for: tuple[int, torch.device, Shard] | None = None

    def __len__(self) -> int:
        return len(self.slices)

    def batch(self, step: int, device: torch.device, shard: Shard | None = None) -> LabelledBatch:
        """The augmented slices of a step.

        A GPU augments those of several steps at once: it takes as long as for one.
        """
        shard, together = shard or Shard(), self._steps_together(device)
        first = step - step % together
        if self._made_for != (first, device, shard):
            self._made = self._batches(range(first, first + together), device, shard)
            self._made_for = (first, device, shard)
        return self._made[step - first]

    def _steps_together(self, device: torch.device) -> int:
        crop = self.augment.crop
        if device.type == "cpu" or crop is None:
            return 1
        return max(1, min(_MOST_STEPS_TOGETHER, _PIXELS_TOGETHER // (self.batch_size * crop[0] * crop[1])))

    def _batches(self, steps: Sequence[int], device: torch.device, shard: Shard) -> list[LabelledBatch]:
        own, transforms, intensities, counts = [], [], [], []
        for step in steps:
            chosen = [item for _, item in items_of_step(step, self.batch_size, len(self), self.seed)]
            rows = shard.rows(len(chosen))
            sizes = torch.tensor([self.slices[s].image.shape[1:] for s in chosen])
            transforms.append(
                SpatialDraws.draw(
                    self.augment,
                    sizes,
                    generator=generator_for(self.seed, step, 3),
                    centres=self._centres(chosen, step),
                    canvas=whole_canvas(sizes),
                    rows=rows,
                )
            )
            change = IntensityChange.sample(
                self.augment, len(chosen), generator=generator_for(self.seed, step, 4)
            )
            intensities.append(change.select(rows))
            own += [self.slices[chosen[row]] for row in rows.tolist()]
            counts.append(len(rows))
        transform = SpatialTransform.of(SpatialDraws.join(transforms), device)
        keypoints, valid = pad_keypoints([labelled.keypoints for labelled in own])
        views = augment_views(
            stack_padded([labelled.image for labelled in own]).to(device),
            keypoints.to(device),
            valid.to(device),
            transform=transform,
            intensity=IntensityChange.join(intensities),
        )
        labels = stack_padded([labelled.labels for labelled in own], fill=IGNORED).to(device)
        moved = transform.labels(labels, outside=IGNORED)
        return [
            LabelledBatch(Views(images, *compact(points, there)[:2]), of_step)
            for images, points, there, of_step in zip(
                *(torch.split(part, counts) for part in (*views, moved)), strict=True
            )
        ]

    def _centres(self, chosen: Sequence[int], step: int) -> Tensor:
        """A labelled foreground pixel for some slices, NaN for those that are cropped anywhere."""
        generator = generator_for(self.seed, step, 5)
        draws = torch.rand(len(chosen), 2, generator=generator)
        centres = torch.full((len(chosen), 2), torch.nan)
        for row, (index, (chance, place)) in enumerate(zip(chosen, draws.tolist(), strict=True)):
            where = self._where[index]
            if len(where) and chance < self.foreground:
                centres[row] = torch.from_numpy(where[int(place * len(where))]).float()
        return centres
