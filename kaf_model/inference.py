"""The network as inference runs it: the same function of a slice, with less work.

In evaluation mode batch normalisation is an affine map of each channel, so it goes into the weights of the
convolution or linear layer before it; the linear layer that merges the heads of an attention block goes into
the block's MLP. Weights are cast once to the type that the device computes in.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from kaf_model import engine
from kaf_model.attention import AttentionBlock
from kaf_model.normalization import BatchNorm
from kaf_model.unet import Encoder, SegmentationNetwork

_PRODUCTS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class InferenceNetwork(nn.Module):
    """A folded copy of a segmentation network; later changes of the original's weights do not reach it.

    Args:
        network: The network, on its device.
    """

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.device = next(network.parameters()).device
        folded = copy.deepcopy(network).eval().requires_grad_(False)
        fold_normalisation(folded)
        for block in (module for module in folded.modules() if isinstance(module, AttentionBlock)):
            fold_merge(block)
        if isinstance(folded.encoder, Encoder):
            folded.encoder.pool = _HalvingMaximum()
        for activation in (module for module in folded.modules() if isinstance(module, nn.ReLU)):
            activation.inplace = True
        if engine.has_bfloat16(self.device):
            for layer in (module for module in folded.modules() if isinstance(module, _PRODUCTS)):
                layer.to(torch.bfloat16)
        engine.channels_last(folded)
        self.network = folded

    @torch.inference_mode()
    def forward(self, images: Tensor, keypoints: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Segment slices, as `SegmentationNetwork` does in evaluation mode, without gradients.

        Args:
            images: (B, S, H, W), H and W divisible by 16.
            keypoints: (B, N, 2) float (y, x) pixels; None is no keypoints.
            valid: (B, N) bool, which keypoints are real; None is all.

        Returns:
            Logits (B, K, H, W), float32.
        """
        with engine.autocast(self.device):
            logits: Tensor = self.network(images, keypoints, valid)
        return logits.float()


def fold_normalisation(network: nn.Module) -> None:
    """Put each normalisation of a network in evaluation mode into the layer before it, in place."""
    for layers in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for index, normalise in enumerate(layers):
            if not isinstance(normalise, BatchNorm):
                continue
            before = layers[index - 1]
            if isinstance(before, nn.Linear):
                layers[index - 1] = fuse_linear_bn_eval(before, normalise)
            else:
                assert isinstance(before, nn.Conv2d)
                layers[index - 1] = fuse_conv_bn_eval(before, normalise)
            layers[index] = nn.Identity()


@torch.no_grad()
def fold_merge(block: AttentionBlock) -> None:
    """Put the linear layer that merges the heads of an attention block into its MLP, in place.

    The MLP's first layer reads the keypoint beside its merged message: W [x, M a + m] + b is
    [W_x, W_a M] [x, a] + (b + W_a m).
    """
    first, merge = block.mlp[0], block.merge
    assert isinstance(first, nn.Linear)
    assert isinstance(merge, nn.Linear)
    reads_message = first.weight[:, block.width :].clone()
    first.bias.add_(reads_message @ merge.bias)
    first.weight[:, block.width :] = reads_message @ merge.weight
    block.merge = nn.Identity()


class _HalvingMaximum(nn.Module):
    """Maximum of 2 x 2 pixels: max pooling that does not note where the maximum was."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) of even H and W -> (B, C, H / 2, W / 2)."""
        rows = torch.maximum(features[..., ::2, :], features[..., 1::2, :])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])
