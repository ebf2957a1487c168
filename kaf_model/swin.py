"""Transformer baselines: Swin UNETR (Tang et al., CVPR 2022) and Swin-Unet (Cao et al., ECCV Workshops 2022).

Both are MONAI's Swin transformer as encoder. Swin UNETR has MONAI's convolutional decoder; Swin-Unet, which
MONAI does not have, mirrors the transformer in its decoder. They read slices of any size: a slice is padded
to what five halvings need, and a map smaller than an attention window to one window, because MONAI reads the
learnt position biases wrongly in smaller windows. No dropout and no stochastic depth: all randomness of a
training is drawn from its seed and step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets.swin_unetr import (
    BasicLayer,
    SwinTransformer,
    SwinUNETR,
    compute_mask,
    get_window_size,
)
from torch import Tensor, nn
from torch.nn import functional

from kaf_model.config import ModelConfig
from kaf_model.slices import pad_to_multiple
from kaf_model.unet import EncoderOutput, FeatureEncoder, pack_inputs

WINDOW = 7
DEPTHS = (2, 2, 2, 2)
HEADS = (3, 6, 12, 24)


class SwinEncoder(FeatureEncoder):
    """Four stages of windowed self-attention.

    In Swin UNETR patches are 2 pixels wide and every stage ends in patch merging; in Swin-Unet they are 4
    wide and the last stage, the bottleneck, keeps its size. Either way the bottleneck is 1/32 of the slice.
    """

    def __init__(self, config: ModelConfig, depths: Sequence[int] = DEPTHS) -> None:
        """Build the encoder of a Swin network.

        Args:
            config: Architecture.
            depths: Attention blocks of each stage.
        """
        super().__init__()
        self.input_slices = config.input_slices
        self.is_unetr = config.architecture == "swin-unetr"
        channels = config.start_channels
        patch = 2 if self.is_unetr else 4
        self.transformer = SwinTransformer(
            in_chans=config.input_slices,
            embed_dim=channels,
            window_size=(WINDOW, WINDOW),
            patch_size=(patch, patch),
            depths=depths,
            num_heads=HEADS,
            patch_norm=not self.is_unetr,
            spatial_dims=2,
        )
        stages = range(len(DEPTHS) if self.is_unetr else len(DEPTHS) - 1)
        self.widths = [channels * 2**stage for stage in stages]
        self.bottleneck_width = channels * 2 ** len(stages)
        self.kaf_layers = nn.ModuleDict()
        if not self.is_unetr:
            self.transformer.layers4[0].downsample = None
            self.norm = nn.LayerNorm(self.bottleneck_width)

    def forward(
        self, images: Tensor, keypoints: Tensor | None = None, valid: Tensor | None = None
    ) -> EncoderOutput:
        """Encode slices; see `unet.Encoder.forward`. Keypoints are not read.

        Returns:
            The maps after the patch embedding and after each merging but the last; in Swin UNETR the slice
            itself, padded, is the first of them.
        """
        packed = pack_inputs(images, keypoints, valid, input_slices=self.input_slices)
        single = self.is_unetr and max(images.shape[2:]) <= 32  # its decoder cannot normalise a single pixel
        images = pad_to_multiple(images, 64 if single else 32).contiguous()
        transformer = self.transformer
        features = transformer.patch_embed(images)
        stages = [transformer.layers1, transformer.layers2, transformer.layers3, transformer.layers4]
        outputs = [features]
        for (stage,) in stages:
            features = attend_in_windows(stage, features)
            outputs.append(features)
        if self.is_unetr:
            *maps, bottleneck = (_normalised(output) for output in outputs)
            return EncoderOutput([images, *maps], bottleneck, [], packed)
        bottleneck = _channels_first(self.norm(_channels_last(outputs[-1])))
        return EncoderOutput(outputs[:3], bottleneck, [], packed)


class UnetrDecoder(nn.Module):
    """MONAI's convolutional decoder of Swin UNETR, with residual blocks on all maps of the encoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = SwinUNETR(
            in_channels=config.input_slices,
            out_channels=1,
            feature_size=config.start_channels,
            spatial_dims=2,
        )
        del self.blocks.swinViT, self.blocks.out  # the encoder and the head are their own parts here

    def forward(self, encoded: EncoderOutput) -> Tensor:
        """Encoder output -> (B, C, H, W), padded as the encoder pads."""
        blocks = self.blocks
        image, half, quarter, eighth, sixteenth = encoded.maps
        features = blocks.decoder5(blocks.encoder10(encoded.bottleneck), sixteenth)
        features = blocks.decoder4(features, blocks.encoder4(eighth))
        features = blocks.decoder3(features, blocks.encoder3(quarter))
        features = blocks.decoder2(features, blocks.encoder2(half))
        features = blocks.decoder1(features, blocks.encoder1(image))
        return torch.as_tensor(features)


class SwinUnetDecoder(nn.Module):
    """Patch expanding, concatenation with the encoder's map and two transformer blocks, three times (Cao et al., 3.4).

    The last expansion, by four, restores the size of the slice.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.expand = nn.ModuleList()
        self.reduce = nn.ModuleList()
        self.stages = nn.ModuleList()
        for level in (2, 1, 0):
            channels = config.start_channels * 2**level
            self.expand.append(PatchExpanding(2 * channels, channels, factor=2))
            self.reduce.append(nn.Linear(2 * channels, channels))
            self.stages.append(
                BasicLayer(
                    dim=channels,
                    depth=DEPTHS[level],
                    num_heads=HEADS[level],
                    window_size=(WINDOW, WINDOW),
                    drop_path=[0.0] * DEPTHS[level],
                    qkv_bias=True,
                )
            )
        channels = config.start_channels
        self.norm = nn.LayerNorm(channels)
        self.restore = PatchExpanding(channels, channels, factor=4)

    def forward(self, encoded: EncoderOutput) -> Tensor:
        """Encoder output -> (B, C, H, W), padded as the encoder pads."""
        features = encoded.bottleneck
        parts = zip(self.expand, self.reduce, self.stages, reversed(encoded.maps), strict=True)
        for expand, reduce, stage, skip in parts:
            both = torch.cat([expand(features), skip], dim=1)
            features = attend_in_windows(stage, _channels_first(reduce(_channels_last(both))))
        restored: Tensor = self.restore(_channels_first(self.norm(_channels_last(features))))
        return restored


class PatchExpanding(nn.Module):
    """A linear layer whose channels become pixels: (B, C, H, W) -> (B, D, factor H, factor W)."""

    def __init__(self, channels_in: int, channels: int, *, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(channels_in, factor**2 * channels, bias=False)
        self.norm = nn.LayerNorm(channels)

    def forward(self, features: Tensor) -> Tensor:
        """Expand a map."""
        expanded = _channels_first(self.linear(_channels_last(features)))
        pixels = functional.pixel_shuffle(expanded, self.factor)
        return _channels_first(self.norm(_channels_last(pixels)))


def build_decoder(config: ModelConfig) -> UnetrDecoder | SwinUnetDecoder:
    """Build the decoder of a Swin network; it returns `start_channels` channels."""
    return UnetrDecoder(config) if config.architecture == "swin-unetr" else SwinUnetDecoder(config)


def attend_in_windows(stage: BasicLayer, features: Tensor) -> Tensor:
    """Run the blocks of a stage, and its patch merging if it has one, on a map (B, C, H, W).

    As MONAI's `BasicLayer`, but a map smaller than a window is padded with zeros to a whole one.
    """
    height, width = features.shape[2:]
    padding = (0, max(0, WINDOW - width), 0, max(0, WINDOW - height))
    rows = _channels_last(functional.pad(features, padding)).contiguous()
    size = rows.shape[1:3]
    window, shift = get_window_size(size, stage.window_size, stage.shift_size)
    mask = compute_mask([-(-side // WINDOW) * WINDOW for side in size], window, shift, rows.device)
    for block in stage.blocks:
        rows = block(rows, mask)
    rows = rows[:, :height, :width]
    return _channels_first(rows if stage.downsample is None else stage.downsample(rows))


def _normalised(features: Tensor) -> Tensor:
    """Layer normalisation without learnt factors, as MONAI applies it to what its decoder reads."""
    rows = _channels_last(features)
    return _channels_first(functional.layer_norm(rows, rows.shape[-1:]))


def _channels_last(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1)


def _channels_first(features: Tensor) -> Tensor:
    return features.permute(0, 3, 1, 2)
