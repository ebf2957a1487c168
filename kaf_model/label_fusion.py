"""Labels of a registered volume, taken from where its image looks most like the other one.

What registration leaves over, a voxel or so, is made good by looking around each voxel (Coupé et al., Patch-based
segmentation using expert priors, NeuroImage 54(2), 2011).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from kaf_model.registration import windowed

REACH = 1
"""Voxels along each axis that are looked at around a voxel."""

PATCH = 3
"""Side in voxels of the patches that are compared."""

HALO = REACH + PATCH // 2
"""Voxels along each axis that what is found for a voxel depends on."""

LEAST_DIFFERENCE = 1e-3
"""Of two patches, of images with variance 1, that is told from none."""


def by_patches(seen: Tensor, image: Tensor, labels: Tensor) -> Tensor:
    """Average labels over the voxels around each one, by how like their patches are to the patch that is seen there.

    Patches are unlike by the variance of their difference, so that one may be brighter than the other. One that is
    twice as unlike as the most alike one counts 1 / e as much.

    Args:
        seen: (z, h, w) of the image that is to be labelled.
        image: (z, h, w) of the labelled image as it was registered to it.
        labels: (C, z, h, w) its labels.

    Returns:
        (C, z, h, w).
    """
    around = list(itertools.product(range(2 * REACH + 1), repeat=3))
    images = functional.pad(image[None, None], [REACH] * 6, mode="replicate")[0, 0]
    known = functional.pad(labels[None], [REACH] * 6, mode="replicate")[0]
    unlike = torch.stack([_variance(seen - _moved(images, offset, seen)) for offset in around])
    weights = torch.exp(-unlike / (unlike.amin(0) + LEAST_DIFFERENCE))
    weights /= weights.sum(0)
    fused = torch.zeros_like(labels)
    for weight, offset in zip(weights, around, strict=True):
        fused += weight * _moved(known, offset, seen)
    return fused


def _variance(difference: Tensor) -> Tensor:
    """Variance in the patch around each voxel."""
    mean, square = windowed(torch.stack([difference, difference * difference]), [PATCH] * 3)
    variance: Tensor = (square - mean * mean).clamp_min(0)
    return variance


def _moved(padded: Tensor, offset: tuple[int, ...], like: Tensor) -> Tensor:
    """The part of padded maps (..., z, h, w) that begins at an offset."""
    depth, height, width = (
        slice(first, first + size) for first, size in zip(offset, like.shape, strict=True)
    )
    return padded[..., depth, height, width]
