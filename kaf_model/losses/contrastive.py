"""Positional contrastive loss, L_PCL and L_global (paper, Eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kaf_model.precision import full_precision


def positional_contrastive_loss(
    embeddings: Tensor, slice_position: Tensor, *, temperature: float, position_threshold: float
) -> Tensor:
    """Pull together slices from the same height of the body, push apart the others.

    Every view is an anchor; its positives are all other views whose position differs by less than the
    threshold. A view without positives contributes nothing.

    Args:
        embeddings: (V, D), all views of the batch.
        slice_position: (V,) in 0..1 along the volume.
        temperature: tau of Eq. 1.
        position_threshold: Positions closer than this are positive pairs.

    Returns:
        Scalar mean over anchors of Eq. 1.
    """
    unit = functional.normalize(embeddings.float(), dim=1)
    with full_precision(unit.device):  # similar slices differ in the third digit
        similarity = unit @ unit.T / temperature
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    log_share = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    distance = (slice_position[:, None] - slice_position[None, :]).abs()
    positive = (distance < position_threshold) & ~itself
    num_positives = positive.sum(1)
    per_anchor = -(log_share * positive).sum(1) / num_positives.clamp(min=1)
    return per_anchor.sum() / (num_positives > 0).sum().clamp(min=1)
