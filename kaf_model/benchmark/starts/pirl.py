"""PIRL: a slice and its jigsaw are one slice (Misra and van der Maaten, CVPR 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kaf_model.benchmark.starts.views import SliceBatch, SliceViews
from kaf_model.config import ModelConfig, PretrainConfig
from kaf_model.datasets import Shard, Views, compact
from kaf_model.engine import generator_for
from kaf_model.errors import UserError
from kaf_model.heads import BottleneckHead
from kaf_model.normalization import gather_over_ranks, mean_over_ranks
from kaf_model.precision import full_precision
from kaf_model.preparation import PreparedVolume
from kaf_model.unet import build_encoder

GRID = 3
NUM_PATCHES = GRID * GRID


@dataclass(frozen=True)
class Pirl:
    """Pretext-invariant representations by jigsaw, with a memory bank.

    Attributes:
        temperature: tau.
        jigsaw_weight: lambda, the weight of the jigsaw's loss; the slice's own has the rest.
        momentum: Part of its old value that a slice keeps in the memory.
        num_negatives: Slices of the memory that each slice is told from, at most.
        projection_width: Width of the embeddings.
    """

    temperature: float = 0.07
    jigsaw_weight: float = 0.5
    momentum: float = 0.5
    num_negatives: int = 1024
    projection_width: int = 128

    def settings(self) -> Mapping[str, Any]:
        """Its name and all that is set here."""
        return {"method": "pirl", **vars(self)}

    def batches(self, volumes: Sequence[PreparedVolume], training: PretrainConfig) -> JigsawViews:
        """Two views of each slice, of which the second becomes the jigsaw."""
        return JigsawViews(SliceViews(volumes, training, num_views=2), self.num_negatives)

    def network(self, model: ModelConfig, training: PretrainConfig, num_slices: int) -> PirlNetwork:
        """The encoder with its two heads and the memory of all slices."""
        return PirlNetwork(model, training, self, num_slices)


class JigsawBatch(NamedTuple):
    """B slices and their jigsaws.

    Attributes:
        slices: Two views of each slice.
        patches: 9 B patches of the second views, in a random order for each slice.
        negatives: (N,) slices of the memory to be told from.
    """

    slices: SliceBatch
    patches: Views
    negatives: Tensor


@dataclass(frozen=True)
class JigsawViews:
    """Adds the patches and the negatives to each batch."""

    views: SliceViews
    num_negatives: int

    def __len__(self) -> int:
        return len(self.views)

    def batch(self, step: int, device: torch.device, shard: Shard) -> JigsawBatch:
        """The views of a step."""
        batch = self.views.batch(step, device, shard)
        rows = shard.rows(self.views.num_slices)
        generator = generator_for(self.views.seed, step, 9)
        draws = torch.rand(self.views.num_slices, NUM_PATCHES, 3, generator=generator)[rows]
        negatives = torch.randperm(len(self), generator=generator)[: self.num_negatives]
        second = Views(*(part[len(rows) :] for part in batch.views))
        patches = jigsaw(second, order=draws[..., 0].argsort(1), jitter=draws[..., 1:])
        return JigsawBatch(batch, patches, negatives.to(device))


def jigsaw(views: Views, *, order: Tensor, jitter: Tensor) -> Views:
    """Cut B slices into a grid of 3 x 3 cells and take a patch out of each, with its keypoints.

    Args:
        views: B slices.
        order: (B, 9) which cell each of a slice's patches is from.
        jitter: (B, 9, 2) in 0..1, where in its cell a patch lies.

    Returns:
        9 B patches, slice after slice; their sides are the largest multiples of 16 that fit a cell.

    Raises:
        UserError: If a cell is smaller than 16 pixels.
    """
    size = torch.tensor(views.images.shape[2:])
    cell = size // GRID
    patch = cell // 16 * 16
    if bool((patch == 0).any()):
        raise UserError(
            f"a jigsaw of 3 x 3 patches needs slices of at least 48 x 48 pixels, got {tuple(size.tolist())}; "
            "raise pretrain.augment.crop"
        )
    place = torch.stack([order // GRID, order % GRID], dim=-1) * cell
    origin = place + (jitter * (cell - patch + 1)).long()  # (B, 9, 2)
    height, width = patch.tolist()
    images = [
        image[:, y : y + height, x : x + width]
        for image, corners in zip(views.images, origin.tolist(), strict=True)
        for y, x in corners
    ]
    corner = origin.to(views.keypoints)[:, :, None]
    points = (views.keypoints[:, None] - corner).flatten(0, 1)  # (9 B, N, 2)
    within = ((points >= -0.5) & (points < patch.to(points) - 0.5)).all(-1)
    keypoints, valid, _ = compact(points, views.valid.repeat_interleave(NUM_PATCHES, 0) & within)
    return Views(torch.stack(images).contiguous(memory_format=torch.channels_last), keypoints, valid)


class PirlNetwork(nn.Module):
    """Maps a batch to {"total", "slice", "jigsaw"} and, in training, remembers what it saw."""

    memory_bank: Tensor

    def __init__(self, model: ModelConfig, training: PretrainConfig, settings: Pirl, num_slices: int) -> None:
        super().__init__()
        width = settings.projection_width
        self.pretext = settings
        self.encoder = build_encoder(model)
        self.head = BottleneckHead(
            self.encoder.bottleneck_width, projection_width=width, normalise=training.normalised_head
        )
        self.patch_head = BottleneckHead(
            self.encoder.bottleneck_width, projection_width=width, normalise=training.normalised_head
        )
        self.jigsaw_head = nn.Linear(NUM_PATCHES * width, width)
        self.register_buffer("memory_bank", functional.normalize(torch.randn(num_slices, width), dim=1))

    def forward(self, batch: JigsawBatch) -> dict[str, Tensor]:
        """Losses of one batch."""
        slices = len(batch.slices.instance)
        first = (part[:slices] for part in batch.slices.views)
        seen = self.head(self.encoder(*first).bottleneck)
        patches = self.patch_head(self.encoder(*batch.patches).bottleneck)
        with full_precision(patches.device):
            puzzled = self.jigsaw_head(patches.view(slices, -1))
        remembered = self.memory_bank[batch.slices.instance]
        negatives = self.memory_bank[batch.negatives]
        told_from = batch.negatives != batch.slices.instance[:, None]
        losses = {
            name: mean_over_ranks(
                noise_contrastive_loss(
                    embeddings, remembered, negatives, told_from, temperature=self.pretext.temperature
                )
            )
            for name, embeddings in (("slice", seen), ("jigsaw", puzzled))
        }
        if self.training:
            self._remember(seen.detach(), batch.slices.instance)
        weight = self.pretext.jigsaw_weight
        return {"total": weight * losses["jigsaw"] + (1 - weight) * losses["slice"], **losses}

    @torch.no_grad()
    def _remember(self, seen: Tensor, instance: Tensor) -> None:
        """Move the memory of the slices towards what they look like now; several looks count with their mean."""
        seen = gather_over_ranks(functional.normalize(seen.float(), dim=1))
        instance = gather_over_ranks(instance)
        looks = torch.zeros_like(self.memory_bank).index_add(0, instance, seen)
        count = self.memory_bank.new_zeros(len(self.memory_bank), 1).index_add(
            0, instance, torch.ones_like(seen[:, :1])
        )
        momentum = self.pretext.momentum
        moved = momentum * self.memory_bank + (1 - momentum) * looks / count.clamp(min=1)
        self.memory_bank.copy_(torch.where(count > 0, functional.normalize(moved, dim=1), self.memory_bank))


def noise_contrastive_loss(
    embeddings: Tensor, remembered: Tensor, negatives: Tensor, told_from: Tensor, *, temperature: float
) -> Tensor:
    """Noise-contrastive loss of PIRL (Misra and van der Maaten, Eq. 4 and 5).

    h is the share of a candidate among the remembered slice and the negatives; the loss is -log h of the
    remembered slice minus the sum of log(1 - h) of the negatives.

    Args:
        embeddings: (B, D)
        remembered: (B, D) memory of the same slices.
        negatives: (N, D) memory of others.
        told_from: (B, N) bool, false where a negative is the slice itself.
        temperature: tau.

    Returns:
        Scalar mean over slices.
    """
    unit = functional.normalize(embeddings.float(), dim=1)
    remembered, negatives = (
        functional.normalize(memory.float(), dim=1) for memory in (remembered, negatives)
    )
    with full_precision(unit.device):
        right = (unit * remembered).sum(1, keepdim=True) / temperature  # (B, 1)
        wrong = (unit @ negatives.T / temperature).masked_fill(~told_from, -torch.inf)  # (B, N)
    log_share = torch.cat([right, wrong], dim=1).log_softmax(1)
    # 1 - h of the most similar negative rounds to 0 when h is nearly 1; beyond e^-20 nothing is learnt.
    log_rest = torch.log(-torch.expm1(log_share[:, 1:].clamp(max=-2e-9)))
    return (-log_share[:, 0] - log_rest.masked_fill(~told_from, 0.0).sum(1)).mean()
