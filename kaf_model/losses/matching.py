"""Negative log-likelihood of keypoint matching, L_local (paper, Eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from kaf_model.matching import Matches
from kaf_model.normalization import sum_over_ranks

_LARGEST = 100.0


def matching_loss(
    matches: Matches, matches0: Tensor, *, matched_weight: float = 1.0, unmatched_weight: float = 1.0
) -> Tensor:
    """Likelihood of the assumed correspondences under the predicted assignment.

    Eq. 2 sums over all keypoints; as in the published implementation the matched and the unmatched
    keypoints of a pair each count with their mean, so that the weight w3 does not depend on how many
    keypoints a slice has. Each -log P is clamped to [0, 100].

    Args:
        matches: Prediction for P pairs.
        matches0: (P, N) index into the second slice for every keypoint of the first, UNMATCHED = -1.
        matched_weight: Weight of the mean over matched keypoints (M).
        unmatched_weight: Weight of the mean over unmatched keypoints (I and J).

    Returns:
        Scalar mean over the pairs of the joint batch in which both slices have keypoints; 0 if there is none.
    """
    surprise = (-matches.log_assignment).clamp(0.0, _LARGEST)
    matched = (matches0 >= 0) & matches.valid0  # (P, N)
    partner = matches0.clamp(min=0)
    num1 = matches.valid1.shape[1]
    taken1 = torch.zeros_like(matches.valid1, dtype=torch.long)
    taken1 = taken1.scatter_add(1, partner, matched.long()) if num1 else taken1
    unmatched0 = ~matched & matches.valid0
    unmatched1 = (taken1 == 0) & matches.valid1
    pair_surprise = (
        surprise[:, :-1, :-1].gather(2, partner[..., None])[..., 0] if num1 else surprise[:, :-1, -1] * 0
    )
    matched_mean = _masked_sum(pair_surprise, matched) / matched.sum(1).clamp(min=1)
    unmatched_sum = _masked_sum(surprise[:, :-1, -1], unmatched0) + _masked_sum(
        surprise[:, -1, :-1], unmatched1
    )
    unmatched_mean = unmatched_sum / (unmatched0.sum(1) + unmatched1.sum(1)).clamp(min=1)
    usable = matches.valid0.any(1) & matches.valid1.any(1)
    per_pair = matched_weight * matched_mean + unmatched_weight * unmatched_mean
    num_usable = sum_over_ranks(usable.sum().float())
    return sum_over_ranks(_masked_sum(per_pair[None], usable[None])[0]) / num_usable.clamp(min=1)


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0).sum(1)
