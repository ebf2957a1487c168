"""Segmentation losses that leave unlabelled pixels out: cross-entropy, and Dice plus cross-entropy."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from kaf_model.normalization import sum_over_ranks

IGNORED = -1
"""Label of a pixel of which nothing is known: unpainted in a partial slice, or outside the image."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled pixels of the joint batch.

    Args:
        logits: (B, K, H, W)
        labels: (B, H, W) integers 0..K-1, or IGNORED.

    Returns:
        Scalar; 0 if no pixel is labelled.
    """
    total = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    count = sum_over_ranks((labels != IGNORED).sum().float())
    return sum_over_ranks(total) / count.clamp(min=1)


def soft_dice(logits: Tensor, labels: Tensor, *, smooth: float = 1.0) -> Tensor:
    """One minus the mean soft Dice of the foreground classes, pooled over the joint batch.

    Only labelled pixels count. Pooling makes a class that few slices show weigh as much as any other.

    Args:
        logits: (B, K, H, W)
        labels: (B, H, W) integers 0..K-1, or IGNORED.
        smooth: Added to both sides of the fraction, in pixels.

    Returns:
        Scalar in 0..1.
    """
    known = labels != IGNORED
    probabilities = logits.float().softmax(1) * known[:, None]
    truth = functional.one_hot(labels.clamp(min=0), logits.shape[1]).movedim(-1, 1) * known[:, None]
    overlap = sum_over_ranks((probabilities * truth).sum((0, 2, 3)))
    size = sum_over_ranks(probabilities.sum((0, 2, 3)) + truth.sum((0, 2, 3)))
    dice = (2 * overlap + smooth) / (size + smooth)
    return 1 - dice[1:].mean()
