"""The FCN of the paper's Table 9: class scores at three resolutions, added up (Long et al., CVPR 2015).

The paper replaces each block of FCN's VGG encoder by two convolutions, which is the encoder of the UNet
here; with KAF layers after its blocks it is the KAF-FCN. What remains of an FCN is its head: 1x1
convolutions score the classes on the centre and on the two coarsest maps, and the coarser scores are
upsampled and added to the finer ones (Long et al., section 4.2, "FCN-8s").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from kaf_model.unet import Encoder, EncoderOutput

NUM_SKIPS = 2
"""Encoder maps, from the coarsest, that are scored beside the centre: Long et al. found no gain in more."""


class FcnHead(nn.Module):
    """Class logits from the centre and the coarsest maps of an encoder.

    Upsampling by two starts as bilinear interpolation and is learnt; the last one, to the size of the slice,
    stays bilinear, both as in Long et al., section 4.3.
    """

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        widths = [encoder.bottleneck_width, *reversed(encoder.widths[-NUM_SKIPS:])]
        self.scores = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in widths)
        self.upsample = nn.ModuleList(_bilinear_upsampling(num_classes) for _ in range(NUM_SKIPS))

    def forward(self, encoded: EncoderOutput) -> Tensor:
        """Encoder output -> logits (B, K, H, W)."""
        maps = [encoded.bottleneck, *reversed(encoded.maps[-NUM_SKIPS:])]
        logits: Tensor = self.scores[0](maps[0])
        for upsample, score, features in zip(self.upsample, self.scores[1:], maps[1:], strict=True):
            logits = upsample(logits) + score(features)
        height, width = encoded.maps[0].shape[-2:]
        return functional.interpolate(
            logits.float(), size=(height, width), mode="bilinear", align_corners=False
        )


def _bilinear_upsampling(channels: int) -> nn.ConvTranspose2d:
    """A transposed convolution by two that interpolates each channel bilinearly until it has learnt better."""
    upsample = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, bias=False)
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    with torch.no_grad():
        upsample.weight.zero_()
        upsample.weight[range(channels), range(channels)] = line[:, None] * line
    return upsample
