"""Matches that the network has learned to see between two slices (paper, section 3.2, "Local SSL Loss")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kaf_model.attention import PackedKeypoints
from kaf_model.correspondences import UNMATCHED
from kaf_model.datasets import pad_keypoints
from kaf_model.errors import UserError
from kaf_model.explore.explorer import Explorer
from kaf_model.explore.views import SliceFeatures, VolumeView


@dataclass(frozen=True, eq=False)
class LearnedMatches:
    """Pairs of keypoints that are each other's likeliest partner.

    Attributes:
        pairs: Index into slice 0 and into slice 1, ascending by the first, (P, 2) int64.
        probabilities: P-bar of each pair, 0..1, (P,) float32.
        unmatched0: Probability that a keypoint of slice 0 has no partner, (N,) float32.
        unmatched1: Probability that a keypoint of slice 1 has no partner, (M,) float32.
    """

    pairs: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    unmatched0: NDArray[np.float32]
    unmatched1: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def matches0(self) -> NDArray[np.int64]:
        """Index into slice 1 for every keypoint of slice 0, or UNMATCHED, (N,)."""
        partners = np.full(len(self.unmatched0), UNMATCHED, np.int64)
        partners[self.pairs[:, 0]] = self.pairs[:, 1]
        return partners

    def likelier_than(self, probability: float) -> LearnedMatches:
        """Return the pairs of at least a probability."""
        kept = self.probabilities >= probability
        return LearnedMatches(self.pairs[kept], self.probabilities[kept], self.unmatched0, self.unmatched1)


def learned_matches(view: VolumeView, z0: int, z1: int) -> LearnedMatches:
    """Match the keypoints of two slices of a volume with the trained matcher.

    Raises:
        UserError: If the network has no matcher.
    """
    return match_features(view.explorer, view.features(z0), view.features(z1))


def match_features(explorer: Explorer, features0: SliceFeatures, features1: SliceFeatures) -> LearnedMatches:
    """Match the keypoints of two slices, or of a slice and an augmented one, with the trained matcher.

    As in SuperGlue, a pair counts when each is the other's likeliest partner among the keypoints; use
    `likelier_than` to keep the sure ones.

    Raises:
        UserError: If the network has no matcher.
    """
    if explorer.matching is None:
        raise UserError(
            f"this {explorer.kind} network has no matcher; matches come from a checkpoint of kaf pretrain with "
            "pretrain.weight_local above 0"
        )
    num0, num1 = len(features0.keypoints), len(features1.keypoints)
    if not (num0 and num1):
        return LearnedMatches(
            np.zeros((0, 2), np.int64),
            np.zeros(0, np.float32),
            np.ones(num0, np.float32),
            np.ones(num1, np.float32),
        )
    positions, valid = pad_keypoints([features0.keypoints, features1.keypoints])
    packed = PackedKeypoints.from_padded(positions.to(explorer.device), valid.to(explorer.device))
    joint = [
        torch.cat([features0.keypoint_features[level], features1.keypoint_features[level]])
        for level in explorer.kaf_levels
    ]
    height, width = np.maximum(features0.padded_shape, features1.padded_shape).tolist()
    with torch.no_grad():
        matches = explorer.matching(joint, packed, (height, width))
    assignment = matches.log_assignment[0].exp().cpu().numpy()  # (N + 1, M + 1), padded to the longer
    likely = assignment[:num0, :num1]
    partner = likely.argmax(1)
    own = np.flatnonzero(likely.argmax(0)[partner] == np.arange(num0))
    return LearnedMatches(
        np.column_stack([own, partner[own]]).astype(np.int64),
        likely[own, partner[own]].astype(np.float32),
        assignment[:num0, -1].astype(np.float32),
        assignment[-1, :num1].astype(np.float32),
    )
