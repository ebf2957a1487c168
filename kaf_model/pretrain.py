"""Self-supervised pretraining on unlabelled volumes (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from kaf_model.config import KeypointConfig, ModelConfig, PretrainConfig, SliceConfig
from kaf_model.datasets import PretrainingBatch, PretrainingPairs
from kaf_model.engine import NonFiniteLoss, OutOfMemory
from kaf_model.errors import UserError
from kaf_model.fusion import KafLayer
from kaf_model.heads import BottleneckHead, KeypointHead, KeypointProjection
from kaf_model.keypoints import KeypointCache
from kaf_model.losses import matching_loss, positional_contrastive_loss
from kaf_model.matching import Matcher
from kaf_model.normalization import gather_over_ranks
from kaf_model.preparation import PreparedVolume
from kaf_model.pretext import PretrainResult, train_pretext
from kaf_model.progress import Progress
from kaf_model.unet import Encoder, build_encoder
from kaf_model.volume import Unreadable, Volume


class PretrainingNetwork(nn.Module):
    """The encoder with the heads that the weighted losses need.

    Maps a batch of pairs to {"total", "pcl", "global", "local"} of Eq. 1-3; losses of weight zero, and for
    a network without KAF layers those on keypoints, have no head and are not computed.
    """

    def __init__(self, model: ModelConfig, config: PretrainConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(model)
        self.same_operations = self.encoder.same_operations
        num_kaf = len(self.encoder.kaf_layers)
        if config.weight_pcl:
            self.bottleneck_head = BottleneckHead(
                self.encoder.bottleneck_width,
                projection_width=config.projection_width,
                normalise=config.normalised_head,
            )
        self.has_global = bool(config.weight_global and num_kaf)
        self.has_local = bool(config.weight_local and num_kaf)
        if not (config.weight_pcl or self.has_global or self.has_local):
            raise UserError(
                "pretraining has nothing to learn: all loss weights that apply to this network are 0"
            )
        if not config.weight_pcl:
            _freeze_unread(self.encoder)
        width = model.embedding_width
        if self.has_global or self.has_local:
            self.keypoint_projection = KeypointProjection(num_kaf * width, width=width)
        if self.has_global:
            self.keypoint_head = KeypointHead(width, projection_width=config.projection_width)
        if self.has_local:
            self.matcher = Matcher(
                width,
                heads=model.heads,
                rounds=config.matching_rounds,
                iterations=config.sinkhorn_iterations,
                tolerance=config.sinkhorn_tolerance,
                position_reference=model.position_reference,
            )

    def forward(self, batch: PretrainingBatch) -> dict[str, Tensor]:
        """Losses of one batch; both views of all pairs go through the encoder at once."""
        views, config = batch.views, self.config
        encoded = self.encoder(views.images, views.keypoints, views.valid)
        losses: dict[str, Tensor] = {}
        total = encoded.bottleneck.new_zeros((), dtype=torch.float32)
        if config.weight_pcl:
            losses["pcl"] = self._contrast(self.bottleneck_head(encoded.bottleneck), batch)
            total = total + config.weight_pcl * losses["pcl"]
        if self.has_global or self.has_local:
            projected = self.keypoint_projection(torch.cat(encoded.keypoint_features, dim=1))  # (T, E)
        if self.has_global:
            losses["global"] = self._contrast(self.keypoint_head(projected, encoded.keypoints), batch)
            total = total + config.weight_global * losses["global"]
        if self.has_local:
            height, width = views.images.shape[-2:]
            losses["local"] = matching_loss(
                self.matcher(projected, encoded.keypoints, (height, width)),
                batch.matches0,
                matched_weight=config.matched_weight,
                unmatched_weight=config.unmatched_weight,
            )
            total = total + config.weight_local * losses["local"]
        return {"total": total, **losses}

    def _contrast(self, embeddings: Tensor, batch: PretrainingBatch) -> Tensor:
        return self.config.contrastive_scale * positional_contrastive_loss(
            gather_over_ranks(embeddings.float()),
            gather_over_ranks(batch.slice_position),
            temperature=self.config.temperature,
            position_threshold=self.config.position_threshold,
        )


def _freeze_unread(encoder: nn.Module) -> None:
    """Freeze what comes after the last keypoint features, which losses on them alone do not read.

    Several processes would wait for its gradients.
    """
    assert isinstance(encoder, Encoder)  # no other has keypoint features
    last = max(map(int, encoder.kaf_layers))
    fusion = encoder.kaf_layers[str(last)]
    assert isinstance(fusion, KafLayer)
    for part in (fusion.diffusion, *encoder.blocks[last:], encoder.centre):
        part.requires_grad_(False)


class KeypointAugmented:
    """The paper's pretext: pairs of neighbouring slices, and the losses that `PretrainConfig` weights."""

    def settings(self) -> Mapping[str, Any]:
        """Nothing: all of it is in `PretrainConfig`."""
        return {}

    def batches(self, volumes: Sequence[PreparedVolume], training: PretrainConfig) -> PretrainingPairs:
        """Pairs of neighbouring slices."""
        return PretrainingPairs(
            volumes,
            augment=training.augment,
            neighbour_range=training.neighbour_range,
            correspondences=training.correspondences,
            batch_size=training.batch_size,
            seed=training.seed,
        )

    def network(self, model: ModelConfig, training: PretrainConfig, num_slices: int) -> PretrainingNetwork:
        """The encoder with the heads that the weighted losses need."""
        return PretrainingNetwork(model, training)


def pretrain(
    config: ModelConfig,
    volumes: Iterable[Volume | Unreadable | str | Path],
    training: PretrainConfig | None = None,
    *,
    slices: SliceConfig | None = None,
    keypoints: KeypointConfig | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    fabric: Fabric | None = None,
    cache: KeypointCache | None = None,
) -> Generator[Progress, None, PretrainResult]:
    """Pretrain an encoder on unlabelled volumes.

    Can be closed at any yield: with `output`, once a step is done, a usable checkpoint and what is needed to
    resume are then written.

    Args:
        config: Architecture.
        volumes: Volumes or their paths; what cannot be read is named and passed over.
        training: Losses, budgets and optimiser.
        slices: Preprocessing.
        keypoints: Detection.
        output: Checkpoint file to write.
        resume: Go on from an interrupted training with the same `output`.
        device: "auto", "cpu", "cuda" or "mps".
        fabric: Use this set-up instead of one made for `device`.
        cache: Keypoints found before.

    Yields:
        Progress with the losses of each step.

    Returns:
        The trained encoder.

    Raises:
        UserError: If nothing can be trained on, or a resumed training does not fit.
        NonFiniteLoss: If a loss becomes NaN; the last good weights are written first.
    """
    return (
        yield from train_pretext(
            KeypointAugmented(),
            config,
            volumes,
            training or PretrainConfig(),
            slices=slices,
            keypoints=keypoints,
            output=output,
            resume=resume,
            device=device,
            fabric=fabric,
            cache=cache,
        )
    )


__all__ = [
    "KeypointAugmented",
    "NonFiniteLoss",
    "OutOfMemory",
    "PretrainResult",
    "PretrainingNetwork",
    "pretrain",
]
