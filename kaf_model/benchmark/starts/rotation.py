"""Rotation prediction: by how many quarter turns was a slice turned? (Gidaris et al., ICLR 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kaf_model.benchmark.starts.views import SliceBatch, SliceViews
from kaf_model.config import ModelConfig, PretrainConfig
from kaf_model.datasets import Views, compact
from kaf_model.heads import BottleneckHead
from kaf_model.normalization import mean_over_ranks
from kaf_model.preparation import PreparedVolume
from kaf_model.unet import build_encoder

NUM_TURNS = 4
MAX_ROTATION = 30.0
"""Degrees by which augmentation may turn a slice without giving a wrong answer to the question."""


class RotationPrediction:
    """Four-way classification; each slice is seen in all four turns at once, as Gidaris et al. found best."""

    def settings(self) -> Mapping[str, Any]:
        """Its name."""
        return {"method": "rotation"}

    def batches(self, volumes: Sequence[PreparedVolume], training: PretrainConfig) -> SliceViews:
        """One view of half a batch of slices: with their turns as many images as two views of a batch.

        Steps, and so images, are those of the other pretexts; an epoch of theirs shows it half of the slices.

        Augmentation is without mirroring and turns by `MAX_ROTATION` at most: what it turns by is not asked.
        """
        rotation = min(training.augment.rotation, MAX_ROTATION)
        calm = training.override(augment=training.augment.override(rotation=rotation, mirror=False))
        return SliceViews(volumes, calm, num_views=1, num_slices=max(1, training.batch_size // 2))

    def network(self, model: ModelConfig, training: PretrainConfig, num_slices: int) -> RotationNetwork:
        """The encoder with a classifier of its bottleneck."""
        return RotationNetwork(model)


class RotationNetwork(nn.Module):
    """Maps one view of B slices to {"total"}, the cross-entropy over their four turns."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.encoder = build_encoder(model)
        self.head = BottleneckHead(self.encoder.bottleneck_width, projection_width=NUM_TURNS)

    def forward(self, batch: SliceBatch) -> dict[str, Tensor]:
        """Losses of one batch."""
        turned, turns = quarter_turns(batch.views)
        logits = self.head(self.encoder(*turned).bottleneck)
        return {"total": mean_over_ranks(functional.cross_entropy(logits.float(), turns))}


def quarter_turns(views: Views) -> tuple[Views, Tensor]:
    """The middle square of B slices, turned 0, 1, 2 and 3 times anticlockwise with its keypoints.

    Returns:
        Views of 4 B slices, turn after turn, and the turn (4 B,) of each.
    """
    height, width = views.images.shape[2:]
    side = min(height, width) // 16 * 16
    top, left = (height - side) // 2, (width - side) // 2
    square = views.images[:, :, top : top + side, left : left + side]
    points = views.keypoints - views.keypoints.new_tensor([top, left])
    inside = views.valid & ((points >= -0.5) & (points < side - 0.5)).all(-1)
    images, keypoints = [], []
    for turn in range(NUM_TURNS):
        images.append(square.rot90(turn, (2, 3)))
        keypoints.append(points)
        points = torch.stack([side - 1 - points[..., 1], points[..., 0]], dim=-1)  # one more turn
    moved, valid, _ = compact(torch.cat(keypoints), inside.repeat(NUM_TURNS, 1))
    turned = torch.cat(images).contiguous(memory_format=torch.channels_last)
    turns = torch.arange(NUM_TURNS, device=square.device).repeat_interleave(len(square))
    return Views(turned, moved, valid), turns
