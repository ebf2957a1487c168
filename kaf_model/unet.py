"""The segmentation networks: the KAF-UNet and the plain UNets it is compared with (paper, Fig. 1, Table 7).

Four encoder blocks, a centre, four decoder blocks. In the KAF-UNet a KAF layer follows the chosen
encoder blocks and doubles the channels of their maps, for the next block and for the decoder alike.
The c2 network is as wide, but each map is concatenated with itself instead. The FCN (`fcn`) and the Swin
networks (`swin`) are built from the same parts: an encoder, a decoder and a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kaf_model.attention import PackedKeypoints
from kaf_model.config import ModelConfig
from kaf_model.fcn import FcnHead
from kaf_model.fusion import KafLayer
from kaf_model.layers import Convolution, Halve, Upsample
from kaf_model.normalization import BatchNorm

NUM_LEVELS = 4


@dataclass(frozen=True)
class EncoderOutput:
    """What the encoder knows of a batch.

    Attributes:
        maps: One map a level, fine to coarse, (B, C_l, H / 2**l, W / 2**l).
        bottleneck: (B, C, H / 16, W / 16)
        keypoint_features: U^l of each level with a KAF layer, (T, E) packed.
        keypoints: Layout of the packed rows.
    """

    maps: list[Tensor]
    bottleneck: Tensor
    keypoint_features: list[Tensor]
    keypoints: PackedKeypoints


def _convolution_block(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        Convolution(channels_in, channels),
        BatchNorm(channels),
        nn.LeakyReLU(0.01, inplace=True),
        Convolution(channels, channels),
        BatchNorm(channels),
        nn.LeakyReLU(0.01, inplace=True),
    )


class FeatureEncoder(nn.Module):
    """What every encoder offers to decoders and to the heads of the pretraining.

    Maps slices with what is read with them (B, S, H, W), their keypoints (B, N, 2) and which of these are valid
    (B, N) to `EncoderOutput`.
    """

    input_slices: int
    """Slices S that are read to encode one."""
    widths: list[int]
    """Channels of each level's map, with what is concatenated to it."""
    bottleneck_width: int
    """Channels of the bottleneck."""
    kaf_layers: nn.ModuleDict
    """The KAF layers by level, 1 the finest; empty where keypoints are not read."""
    same_operations: bool = False
    """Whether what is computed depends on the shape of the slices alone."""


class Encoder(FeatureEncoder):
    """Four convolution blocks, each perhaps followed by a KAF layer, and the centre."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        levels = config.kaf_levels if config.reads_keypoints else ()
        self.input_slices = config.input_slices
        self.widths = []
        self.duplicate = config.architecture == "unet-c2"
        self.blocks = nn.ModuleList()
        self.kaf_layers = nn.ModuleDict()
        self.decoder_widths: list[int] = []
        """Channels of each level of the decoder."""
        channels_in: int = config.input_slices
        for level in range(NUM_LEVELS):
            channels = config.start_channels * 2**level
            self.blocks.append(_convolution_block(channels_in, channels))
            has_kaf = level + 1 in levels
            if has_kaf:
                self.kaf_layers[str(level + 1)] = KafLayer(
                    channels,
                    width=config.embedding_width,
                    heads=config.heads,
                    attention_blocks=config.attention_blocks,
                    diffusion_channels=config.diffusion_channels,
                    level=level,
                    position_reference=config.position_reference,
                    start=config.kaf_start,
                )
            channels_in = 2 * channels if has_kaf or self.duplicate else channels
            self.widths.append(channels_in)
            self.decoder_widths.append(channels_in if config.decoder == "wide" else channels)
        self.same_operations = not self.kaf_layers
        self.bottleneck_width = 2 * self.decoder_widths[-1]
        self.pool: nn.Module = Halve()
        self.centre = nn.Sequential(
            Convolution(channels_in, self.bottleneck_width),
            nn.ReLU(inplace=True),
            Convolution(self.bottleneck_width, self.bottleneck_width),
            nn.ReLU(inplace=True),
        )

    def forward(
        self, images: Tensor, keypoints: Tensor | None = None, valid: Tensor | None = None
    ) -> EncoderOutput:
        """Encode slices.

        Args:
            images: (B, S, H, W), H and W divisible by 16; S as configured.
            keypoints: (B, N, 2) float (y, x) pixels; None is no keypoints.
            valid: (B, N) bool, which keypoints are real; None is all.

        Raises:
            ValueError: If shapes do not fit together.
        """
        packed = pack_inputs(images, keypoints, valid, input_slices=self.input_slices)
        maps: list[Tensor] = []
        keypoint_features: list[Tensor] = []
        features = images
        for level, block in enumerate(self.blocks):
            features = block(features)
            if str(level + 1) in self.kaf_layers:
                features, embeddings = self.kaf_layers[str(level + 1)](features, packed)
                keypoint_features.append(embeddings)
            elif self.duplicate:
                features = torch.cat([features, features], dim=1)
            maps.append(features)
            features = self.pool(features)
        return EncoderOutput(maps, self.centre(features), keypoint_features, packed)


class Decoder(nn.Module):
    """Four blocks of upsampling, concatenation with the encoder's map, and two convolutions."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.upsample = nn.ModuleList()
        self.blocks = nn.ModuleList()
        channels_in = encoder.bottleneck_width
        for skip, channels in zip(reversed(encoder.widths), reversed(encoder.decoder_widths), strict=True):
            self.upsample.append(Upsample(channels_in, channels))
            self.blocks.append(_convolution_block(channels + skip, channels))
            channels_in = channels

    def forward(self, encoded: EncoderOutput) -> Tensor:
        """Encoder output -> (B, C, H, W)."""
        features = encoded.bottleneck
        for step, skip in enumerate(reversed(encoded.maps)):
            features = self.join(step, features, skip)
        return features

    def join(self, step: int, features: Tensor, skip: Tensor) -> Tensor:
        """One step up: (B, C, H, W), and the encoder's map (B, S, 2 H, 2 W) -> (B, D, 2 H, 2 W)."""
        joined: Tensor = self.blocks[step](torch.cat([self.upsample[step](features), skip], dim=1))
        return joined


class SegmentationNetwork(nn.Module):
    """Encoder, decoder and the head that gives each pixel its class logits: a 1x1 convolution but in the FCN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.decoder: nn.Module
        self.head: nn.Module
        if isinstance(self.encoder, Encoder) and config.architecture.endswith("fcn"):
            self.decoder, self.head = nn.Identity(), FcnHead(self.encoder, config.num_classes)
            return
        if isinstance(self.encoder, Encoder):
            self.decoder, width = Decoder(self.encoder), self.encoder.decoder_widths[0]
        else:
            from kaf_model import swin

            self.decoder, width = swin.build_decoder(config), config.start_channels
        self.head = nn.Conv2d(width, config.num_classes, 1, bias=False)

    def forward(self, images: Tensor, keypoints: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Segment slices.

        Args:
            images: (B, S, H, W), H and W divisible by 16; S as configured.
            keypoints: (B, N, 2) float (y, x) pixels; None is no keypoints. Without KAF layers they are not read.
            valid: (B, N) bool, which keypoints are real; None is all.

        Returns:
            Logits (B, K, H, W).
        """
        logits: Tensor = self.head(self.decoder(self.encoder(images, keypoints, valid)))
        return logits[..., : images.shape[2], : images.shape[3]]  # Swin encoders pad what they read


def build_encoder(config: ModelConfig) -> FeatureEncoder:
    """Build the encoder of a network, with random weights."""
    if config.architecture.startswith("swin"):
        from kaf_model.swin import SwinEncoder  # MONAI is slow to import

        return SwinEncoder(config)
    return Encoder(config)


def build_network(config: ModelConfig) -> SegmentationNetwork:
    """Build the network a configuration describes, with random weights."""
    return SegmentationNetwork(config)


def pack_inputs(
    images: Tensor, keypoints: Tensor | None, valid: Tensor | None, *, input_slices: int
) -> PackedKeypoints:
    """Check the shapes of what goes into a network, and pack its keypoints; see `Encoder.forward`."""
    if images.dim() != 4 or images.shape[1] != input_slices or images.shape[2] % 16 or images.shape[3] % 16:
        raise ValueError(
            f"images must be (B, {input_slices}, H, W) with H and W divisible by 16, got {tuple(images.shape)}"
        )
    if keypoints is None:
        return PackedKeypoints.none(len(images), images.device)
    if keypoints.dim() != 3 or len(keypoints) != len(images) or keypoints.shape[2] != 2:
        raise ValueError(f"keypoints must be ({len(images)}, N, 2) as (y, x), got {tuple(keypoints.shape)}")
    if valid is None:
        valid = torch.ones(keypoints.shape[:2], dtype=torch.bool, device=images.device)
    if valid.shape != keypoints.shape[:2] or valid.dtype != torch.bool:
        raise ValueError(
            f"valid must be bool {tuple(keypoints.shape[:2])}, got {valid.dtype} {tuple(valid.shape)}"
        )
    if not valid.numel():
        return PackedKeypoints.none(len(images), images.device)
    return PackedKeypoints.from_padded(keypoints, valid)
