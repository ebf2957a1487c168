"""CAiD: tell slices apart and restore their context (Taher et al., MIDL 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from kaf_model.benchmark.starts.simclr import instance_loss
from kaf_model.benchmark.starts.views import SliceBatch, SliceViews
from kaf_model.config import ModelConfig, PretrainConfig
from kaf_model.heads import BottleneckHead
from kaf_model.normalization import BatchNorm, mean_over_ranks
from kaf_model.preparation import PreparedVolume
from kaf_model.unet import NUM_LEVELS, build_encoder


@dataclass(frozen=True)
class Caid:
    """Context-aware instance discrimination, with SimCLR's loss as the instance discrimination.

    Attributes:
        context_weight: Weight of the restoration beside the instance discrimination.
    """

    context_weight: float = 1.0

    def settings(self) -> Mapping[str, Any]:
        """Its name and all that is set here; temperature and projection are those of `PretrainConfig`."""
        return {"method": "caid", **vars(self)}

    def batches(self, volumes: Sequence[PreparedVolume], training: PretrainConfig) -> SliceViews:
        """Two views of each slice."""
        return SliceViews(volumes, training, num_views=2)

    def network(self, model: ModelConfig, training: PretrainConfig, num_slices: int) -> CaidNetwork:
        """The encoder with a projection and a restoring decoder."""
        return CaidNetwork(model, training, self.context_weight)


class CaidNetwork(nn.Module):
    """Maps two views of B slices to {"total", "instance", "context"}."""

    def __init__(self, model: ModelConfig, training: PretrainConfig, context_weight: float) -> None:
        super().__init__()
        self.temperature = training.temperature
        self.context_weight = context_weight
        self.encoder = build_encoder(model)
        width = self.encoder.bottleneck_width
        self.head = BottleneckHead(
            width, projection_width=training.projection_width, normalise=training.normalised_head
        )
        self.restoration = Restoration(width, self.encoder.input_slices)

    def forward(self, batch: SliceBatch) -> dict[str, Tensor]:
        """Losses of one batch; what is to be restored is each view with the intensities it had."""
        bottleneck = self.encoder(*batch.views).bottleneck
        restored = self.restoration(bottleneck, batch.restored.shape[-2:])
        losses = {
            "instance": instance_loss(self.head(bottleneck), batch.instance, temperature=self.temperature),
            "context": mean_over_ranks(functional.mse_loss(restored.float(), batch.restored)),
        }
        return {"total": losses["instance"] + self.context_weight * losses["context"], **losses}


class Restoration(nn.Module):
    """A decoder that sees the bottleneck alone: over skip connections a slice would restore itself."""

    def __init__(self, channels: int, slices: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(NUM_LEVELS):
            layers += [
                nn.ConvTranspose2d(channels, channels // 2, 2, stride=2),
                BatchNorm(channels // 2),
                nn.LeakyReLU(0.01, inplace=True),
            ]
            channels //= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, slices, 3, padding=1))

    def forward(self, bottleneck: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) -> (B, S, *size), the slices that were read."""
        restored: Tensor = self.layers(bottleneck)
        if restored.shape[-2:] != size:  # the bottleneck of Swin encoders is twice as coarse
            restored = functional.interpolate(restored, size=size, mode="bilinear", align_corners=False)
        return restored
