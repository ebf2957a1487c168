"""Masked-image loss: how well what was hidden of a slice is filled in (He et al., CVPR 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from kaf_model.normalization import sum_over_ranks


def masked_image_loss(predicted: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error over hidden pixels, of intensities that are z-scored.

    Args:
        predicted: (B, 1, H, W)
        images: (B, 1, H, W), what was there.
        hidden: (B, H, W) bool, pixels that the network did not see.

    Returns:
        Scalar over the joint batch; 0 if nothing was hidden.
    """
    error = (predicted.float() - images.float()).square()[:, 0]
    total = sum_over_ranks(error.masked_fill(~hidden, 0.0).sum())
    return total / sum_over_ranks(hidden.sum().float()).clamp(min=1)


def hide_patches(
    num_slices: int, size: tuple[int, int], *, patch: int, share: float, generator: torch.Generator
) -> Tensor:
    """Draw which square patches of slices are hidden.

    Args:
        num_slices: B.
        size: Height and width in pixels; patches at the bottom and right may be cut off.
        patch: Side of a patch in pixels.
        share: Chance that a patch is hidden.
        generator: A CPU generator, the only source of randomness.

    Returns:
        (B, H, W) bool.
    """
    height, width = size
    patches = torch.rand(num_slices, -(-height // patch), -(-width // patch), generator=generator) < share
    return patches.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :height, :width]
