"""Augmented views of single slices: what pretexts other than the paper's look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kaf_model.augment import SpatialTransform
from kaf_model.config import PretrainConfig
from kaf_model.datasets import (
    Shard,
    Views,
    compact,
    items_of_step,
    pad_keypoints,
    stack_padded,
    whole_canvas,
)
from kaf_model.engine import generator_for
from kaf_model.intensity import IntensityChange
from kaf_model.preparation import PreparedVolume


class SliceBatch(NamedTuple):
    """V views of each of B slices: the first views of all, then the second views.

    Attributes:
        views: V * B slices, moved and with changed intensities.
        restored: (V * B, S, H, W) the same views with the intensities they had.
        instance: (B,) which of all slices each is.
        slice_position: (B,) in 0..1 along the volume.
    """

    views: Views
    restored: Tensor
    instance: Tensor
    slice_position: Tensor


class SliceViews:
    """Draws the slices of each step and independent augmented views of each.

    Args:
        volumes: Prepared volumes.
        training: Augmentation, batch size and seed.
        num_views: Views V of each slice.
        num_slices: Slices B in the joint batch of all processes; None takes the batch size.
    """

    def __init__(
        self,
        volumes: Sequence[PreparedVolume],
        training: PretrainConfig,
        *,
        num_views: int,
        num_slices: int | None = None,
    ) -> None:
        self.volumes = volumes
        self.augment = training.augment
        self.num_views = num_views
        self.num_slices = num_slices or training.batch_size
        self.seed = training.seed
        self.index = [(v, z) for v, volume in enumerate(volumes) for z in range(len(volume))]

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, step: int, device: torch.device, shard: Shard) -> SliceBatch:
        """The views of a step."""
        chosen = [item for _, item in items_of_step(step, self.num_slices, len(self), self.seed)]
        rows = shard.rows(len(chosen))
        every = torch.cat([rows + view * len(chosen) for view in range(self.num_views)])
        sizes = torch.tensor([self.volumes[self.index[item][0]].images.shape[2:] for item in chosen])
        transform = SpatialTransform.sample(
            self.augment,
            sizes.repeat(self.num_views, 1),
            generator=generator_for(self.seed, step, 3),
            device=device,
            canvas=whole_canvas(sizes),
            rows=every,
        )
        own = [chosen[row % len(chosen)] for row in every.tolist()]
        places = [self.index[item] for item in own]
        images = stack_padded([self.volumes[v].images[z] for v, z in places]).to(device)
        keypoints, valid = pad_keypoints([self.volumes[v].keypoints[z].positions for v, z in places])
        restored = transform.images(images.float())
        moved, inside, _ = compact(*transform.points(keypoints.to(device), valid.to(device)))
        changed = self.intensity(step, self.num_views).select(every).apply(restored)
        first = own[: len(rows)]
        positions = [float(self.volumes[v].positions[z]) for v, z in places[: len(rows)]]
        return SliceBatch(
            Views(changed.contiguous(memory_format=torch.channels_last), moved, inside),
            restored,
            torch.tensor(first, device=device),
            torch.tensor(positions, device=device),
        )

    def intensity(self, step: int, num_views: int, purpose: int = 4) -> IntensityChange:
        """Intensity changes of the joint batch, views after views; each purpose draws its own."""
        return IntensityChange.sample(
            self.augment, num_views * self.num_slices, generator=generator_for(self.seed, step, purpose)
        )
