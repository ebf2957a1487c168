"""SimCLR: tell two views of a slice from the views of all others (Chen et al., ICML 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kaf_model.benchmark.starts.views import SliceBatch, SliceViews
from kaf_model.config import ModelConfig, PretrainConfig
from kaf_model.heads import BottleneckHead
from kaf_model.losses import positional_contrastive_loss
from kaf_model.normalization import gather_over_ranks
from kaf_model.preparation import PreparedVolume
from kaf_model.unet import build_encoder


class SimCLR:
    """Instance discrimination with the other views of the batch as negatives."""

    def settings(self) -> Mapping[str, Any]:
        """Its name: temperature and projection are those of `PretrainConfig`."""
        return {"method": "simclr"}

    def batches(self, volumes: Sequence[PreparedVolume], training: PretrainConfig) -> SliceViews:
        """Two views of each slice."""
        return SliceViews(volumes, training, num_views=2)

    def network(self, model: ModelConfig, training: PretrainConfig, num_slices: int) -> SimCLRNetwork:
        """The encoder with a projection of its bottleneck."""
        return SimCLRNetwork(model, training)


class SimCLRNetwork(nn.Module):
    """Maps two views of B slices to {"total"}, the NT-Xent loss."""

    def __init__(self, model: ModelConfig, training: PretrainConfig) -> None:
        super().__init__()
        self.temperature = training.temperature
        self.encoder = build_encoder(model)
        self.same_operations = self.encoder.same_operations
        self.head = BottleneckHead(
            self.encoder.bottleneck_width,
            projection_width=training.projection_width,
            normalise=training.normalised_head,
        )

    def forward(self, batch: SliceBatch) -> dict[str, Tensor]:
        """Losses of one batch."""
        encoded = self.encoder(*batch.views)
        return {
            "total": instance_loss(
                self.head(encoded.bottleneck), batch.instance, temperature=self.temperature
            )
        }


def instance_loss(embeddings: Tensor, instance: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent (Chen et al., Eq. 1): the views of a slice are each other's only positives.

    It is Eq. 1 of the paper with a slice's number in place of its position, and a threshold below 1.

    Args:
        embeddings: (2 B, D), first views, then second views; B of each process.
        instance: (B,) which slice.
        temperature: tau.
    """
    return positional_contrastive_loss(
        gather_over_ranks(embeddings.float()),
        gather_over_ranks(instance.repeat(2)).double(),
        temperature=temperature,
        position_threshold=0.5,
    )
