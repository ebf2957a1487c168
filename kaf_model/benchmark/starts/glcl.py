"""GLCL: contrast between parts of the body, and between places within a slice (Chaitanya et al., NeurIPS 2020).

The global loss takes slices of the same part of any volume for similar and contrasts them with slices of
the other parts (their G^D). The local loss contrasts regions of a decoder's map, seen in two intensities of
one view (their L^R). Chaitanya et al. train the two in stages, the encoder frozen in the second; here the
gradient of the local loss stops at the encoder, so that one run under one budget holds both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kaf_model.benchmark.starts.views import SliceBatch, SliceViews
from kaf_model.config import ModelConfig, PretrainConfig
from kaf_model.datasets import Shard, Views
from kaf_model.engine import generator_for
from kaf_model.errors import UserError
from kaf_model.heads import BottleneckHead
from kaf_model.normalization import BatchNorm, gather_over_ranks, mean_over_ranks
from kaf_model.precision import full_precision
from kaf_model.preparation import PreparedVolume
from kaf_model.unet import Decoder, Encoder, EncoderOutput, build_encoder


@dataclass(frozen=True)
class GlobalContrast:
    """GLCL global.

    Attributes:
        num_parts: Equal parts a volume is cut into along its slices (their S, 4 for ACDC).
    """

    num_parts: int = 4

    def settings(self) -> Mapping[str, Any]:
        """Its name and its parts; temperature and projection are those of `PretrainConfig`."""
        return {"method": "glcl-global", "num_parts": self.num_parts}

    def batches(self, volumes: Sequence[PreparedVolume], training: PretrainConfig) -> SliceViews:
        """Two views of each slice."""
        return SliceViews(volumes, training, num_views=2)

    def network(self, model: ModelConfig, training: PretrainConfig, num_slices: int) -> GlobalNetwork:
        """The encoder with a projection of its bottleneck."""
        return GlobalNetwork(model, training, self.num_parts)


@dataclass(frozen=True)
class GlobalLocalContrast:
    """GLCL full: the global loss, and the local one on the first blocks of the decoder.

    Attributes:
        num_parts: Equal parts a volume is cut into along its slices.
        num_blocks: Decoder blocks that are trained, from the coarsest (their l, 3).
        region: Height and width of a region in pixels of the decoder's map (their K, 3).
        num_regions: Regions of a map that are contrasted, drawn anew each step to bound the work.
        projection_width: Channels of the local head.
    """

    num_parts: int = 4
    num_blocks: int = 3
    region: int = 3
    num_regions: int = 64
    projection_width: int = 32

    def settings(self) -> Mapping[str, Any]:
        """Its name and all that is set here."""
        return {"method": "glcl-full", **vars(self)}

    def batches(self, volumes: Sequence[PreparedVolume], training: PretrainConfig) -> RecolouredViews:
        """Two views of each slice, and the first once more in other intensities."""
        return RecolouredViews(SliceViews(volumes, training, num_views=2))

    def network(self, model: ModelConfig, training: PretrainConfig, num_slices: int) -> GlobalLocalNetwork:
        """The encoder and the first blocks of the decoder, with their heads."""
        return GlobalLocalNetwork(model, training, self)


class RecolouredBatch(NamedTuple):
    """Two views of B slices, and the first once more.

    Attributes:
        slices: The two views.
        again: The first views, B slices, in other intensities.
        seed: Decides which regions are looked at.
    """

    slices: SliceBatch
    again: Views
    seed: int


@dataclass(frozen=True)
class RecolouredViews:
    """Adds to each batch its first views in other intensities."""

    views: SliceViews

    def __len__(self) -> int:
        return len(self.views)

    def batch(self, step: int, device: torch.device, shard: Shard) -> RecolouredBatch:
        """The views of a step."""
        batch = self.views.batch(step, device, shard)
        rows = shard.rows(self.views.num_slices)
        first = slice(len(rows))
        changed = self.views.intensity(step, 1, purpose=7).select(rows).apply(batch.restored[first])
        again = Views(
            changed.contiguous(memory_format=torch.channels_last),
            batch.views.keypoints[first],
            batch.views.valid[first],
        )
        return RecolouredBatch(batch, again, generator_for(self.views.seed, step, 8).initial_seed())


class _PartsTold(nn.Module):
    """The encoder with the head of the global loss."""

    def __init__(self, model: ModelConfig, training: PretrainConfig, num_parts: int) -> None:
        super().__init__()
        self.temperature = training.temperature
        self.num_parts = num_parts
        self.encoder = build_encoder(model)
        self.head = BottleneckHead(
            self.encoder.bottleneck_width,
            projection_width=training.projection_width,
            normalise=training.normalised_head,
        )

    def contrast(self, bottleneck: Tensor, slice_position: Tensor) -> Tensor:
        """Global loss of two views of B slices."""
        part = (slice_position * self.num_parts).long().clamp(max=self.num_parts - 1)
        return part_contrastive_loss(
            gather_over_ranks(self.head(bottleneck)),
            gather_over_ranks(part.repeat(2)),
            temperature=self.temperature,
        )


class GlobalNetwork(_PartsTold):
    """Maps two views of B slices to {"total"}, the global loss."""

    def forward(self, batch: SliceBatch) -> dict[str, Tensor]:
        """Losses of one batch."""
        return {"total": self.contrast(self.encoder(*batch.views).bottleneck, batch.slice_position)}


class GlobalLocalNetwork(_PartsTold):
    """Maps recoloured views to {"total", "global", "local"}; its part of the decoder starts a finetuning too."""

    def __init__(self, model: ModelConfig, training: PretrainConfig, settings: GlobalLocalContrast) -> None:
        super().__init__(model, training, settings.num_parts)
        if not isinstance(self.encoder, Encoder) or model.architecture.endswith("fcn"):
            raise UserError(
                f"glcl-full pretrains a part of the UNet's decoder, which a {model.architecture} has not; "
                "choose glcl-global"
            )
        self.region, self.num_regions = settings.region, settings.num_regions
        self.decoder = Decoder(self.encoder)
        self.decoder.upsample = self.decoder.upsample[: settings.num_blocks]
        self.decoder.blocks = self.decoder.blocks[: settings.num_blocks]
        width = self.encoder.decoder_widths[-settings.num_blocks]
        self.local_head = nn.Sequential(
            nn.Conv2d(width, width, 1),
            BatchNorm(width),
            nn.ReLU(),
            nn.Conv2d(width, settings.projection_width, 1),
        )

    def forward(self, batch: RecolouredBatch) -> dict[str, Tensor]:
        """Losses of one batch."""
        slices = len(batch.again.images)
        views = [
            torch.cat([view, again]) for view, again in zip(batch.slices.views, batch.again, strict=True)
        ]
        encoded = self.encoder(*views)
        losses = {"global": self.contrast(encoded.bottleneck[: 2 * slices], batch.slices.slice_position)}
        both = torch.cat([torch.arange(slices), torch.arange(2 * slices, 3 * slices)]).to(views[0].device)
        regions, again = self._regions(encoded, both, batch.seed).chunk(2)
        local = region_contrastive_loss(regions, again, temperature=self.temperature)
        losses["local"] = mean_over_ranks(local)
        return {"total": losses["global"] + losses["local"], **losses}

    def _regions(self, encoded: EncoderOutput, rows: Tensor, seed: int) -> Tensor:
        """Features (n, R, D) of the same R regions in each of n slices of the batch."""
        stopped = EncoderOutput(
            [features[rows].detach() for features in encoded.maps[-len(self.decoder.blocks) :]],
            encoded.bottleneck[rows].detach(),
            [],
            encoded.keypoints,
        )
        features = self.local_head(self.decoder(stopped))
        regions = functional.unfold(features, self.region, stride=self.region).transpose(1, 2)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(regions.shape[1], generator=generator)[: self.num_regions]
        return regions[:, chosen.to(regions.device)]


def part_contrastive_loss(embeddings: Tensor, part: Tensor, *, temperature: float) -> Tensor:
    """Global loss G^D (Chaitanya et al., Eq. 1 and 2): slices of a part are similar, those of other parts are not.

    Args:
        embeddings: (V, D), all views of the batch.
        part: (V,) which part of its volume each view is from.
        temperature: tau.

    Returns:
        Scalar mean over all ordered pairs of views of one part; each is contrasted with the anchor's views of
        other parts only. 0 if there is no pair.
    """
    unit = functional.normalize(embeddings.float(), dim=1)
    with full_precision(unit.device):
        similarity = unit @ unit.T / temperature
    same = part[:, None] == part[None, :]
    itself = torch.eye(len(part), dtype=torch.bool, device=part.device)
    others = similarity.masked_fill(same, -torch.inf).logsumexp(
        1, keepdim=True
    )  # -inf if there is no other part
    surprise = torch.logaddexp(similarity, others) - similarity
    positive = same & ~itself
    return surprise.masked_fill(~positive, 0.0).sum() / positive.sum().clamp(min=1)


def region_contrastive_loss(regions: Tensor, again: Tensor, *, temperature: float) -> Tensor:
    """Local loss L^R (Chaitanya et al., Eq. 3 and 4): a place looks like itself in other intensities.

    Args:
        regions: (B, R, D) features of R places of each slice.
        again: (B, R, D) features of the same places in the other view.
        temperature: tau.

    Returns:
        Scalar mean over both views, slices and places; each is contrasted with the other places of its slice
        in both views.
    """
    first, second = (functional.normalize(features.float(), dim=2) for features in (regions, again))
    with full_precision(first.device):
        across = first @ second.transpose(1, 2) / temperature  # (B, R, R)
        within = [view @ view.transpose(1, 2) / temperature for view in (first, second)]
    itself = torch.eye(first.shape[1], dtype=torch.bool, device=first.device)
    losses = []
    for own, other in ((within[0], across), (within[1], across.transpose(1, 2))):
        candidates = torch.cat([own.masked_fill(itself, -torch.inf), other], dim=2)
        losses.append(candidates.logsumexp(2) - other.diagonal(dim1=1, dim2=2))
    return torch.stack(losses).mean()
