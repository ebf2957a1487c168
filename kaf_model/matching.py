"""Matching the keypoints of two slices by optimal transport (paper, section 3.2; SuperGlue's formulation).

Each keypoint of one slice is assigned to one of the other or to a bin for the unmatched. The soft
assignment is the entropic optimal transport between both sets, by Sinkhorn's iterations in log space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kaf_model.attention import AttentionBlock, PackedKeypoints, PositionEncoder
from kaf_model.precision import full_precision

_ABSENT = -1e9


class _LogSinkhorn(torch.autograd.Function):
    """Potentials of the transport; the backward pass recomputes what the forward pass does not store."""

    @staticmethod
    def forward(
        context: Any, costs: Tensor, log_rows: Tensor, log_columns: Tensor, iterations: int
    ) -> tuple[Tensor, Tensor]:
        columns = torch.zeros_like(log_columns)
        rows = torch.zeros_like(log_rows)
        history = [columns]
        for _ in range(iterations):
            rows = log_rows - torch.logsumexp(costs + columns[:, None, :], dim=2)
            columns = log_columns - torch.logsumexp(costs + rows[:, :, None], dim=1)
            history += [rows, columns]
        context.save_for_backward(costs, *history)
        return rows, columns

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        costs, *history = context.saved_tensors
        grad_rows, grad_columns = gradients
        grad_costs = torch.zeros_like(costs)
        grad_log_rows = torch.zeros_like(grad_rows)
        grad_log_columns = torch.zeros_like(grad_columns)
        for step in range(len(history) - 1, 0, -2):
            before, rows = history[step - 2], history[step - 1]
            grad_log_columns += grad_columns
            share = torch.softmax(costs + rows[:, :, None], dim=1) * grad_columns[:, None, :]
            grad_costs -= share
            grad_rows = grad_rows - share.sum(2)
            grad_log_rows += grad_rows
            share = torch.softmax(costs + before[:, None, :], dim=2) * grad_rows[:, :, None]
            grad_costs -= share
            grad_columns = -share.sum(1)
            grad_rows = torch.zeros_like(grad_rows)
        return grad_costs, grad_log_rows, grad_log_columns, None


def log_optimal_transport(
    scores: Tensor, bin_score: Tensor, valid0: Tensor, valid1: Tensor, *, iterations: int
) -> Tensor:
    """Soft assignment between two keypoint sets, each with a bin for what has no partner.

    Args:
        scores: (P, N, M) similarity of each pair of keypoints.
        bin_score: Scalar score of leaving a keypoint unmatched.
        valid0: (P, N) bool.
        valid1: (P, M) bool.
        iterations: Sinkhorn iterations.

    Returns:
        log P-bar (P, N + 1, M + 1): rows of valid keypoints sum to 1, the bins to the size of the other
        set. Meaningless where padding is.
    """
    scores, bin_score = scores.float(), bin_score.float()
    if scores.device.type == "cpu" and not (valid0.all() and valid1.all()):
        return _transport_each(scores, bin_score, valid0, valid1, iterations)
    return _transport_padded(scores, bin_score, valid0, valid1, iterations)


def _transport_each(
    scores: Tensor, bin_score: Tensor, valid0: Tensor, valid1: Tensor, iterations: int
) -> Tensor:
    """Pair after pair, each without its padding: on CPUs most of the time would go into padding."""
    _, num0, num1 = scores.shape
    assignments = []
    for pair_scores, pair_valid0, pair_valid1 in zip(scores, valid0, valid1, strict=True):
        rows, columns = pair_valid0.nonzero()[:, 0], pair_valid1.nonzero()[:, 0]
        transported = _transport_padded(
            pair_scores[rows[:, None], columns][None],
            bin_score,
            valid0.new_ones(1, len(rows)),
            valid1.new_ones(1, len(columns)),
            iterations,
        )[0]
        rows = torch.cat([rows, rows.new_tensor([num0])])
        columns = torch.cat([columns, columns.new_tensor([num1])])
        padded = transported.new_zeros(num0 + 1, num1 + 1)
        assignments.append(padded.index_put((rows[:, None], columns), transported))
    return torch.stack(assignments)


def _transport_padded(
    scores: Tensor, bin_score: Tensor, valid0: Tensor, valid1: Tensor, iterations: int
) -> Tensor:
    """All pairs at once under masks."""
    pairs, num0, num1 = scores.shape
    with_bins = torch.cat([scores, bin_score.expand(pairs, num0, 1)], dim=2)
    with_bins = torch.cat([with_bins, bin_score.expand(pairs, 1, num1 + 1)], dim=1)
    real0 = torch.cat([valid0, valid0.new_ones(pairs, 1)], dim=1)
    real1 = torch.cat([valid1, valid1.new_ones(pairs, 1)], dim=1)
    with_bins = with_bins.masked_fill(~(real0[:, :, None] & real1[:, None, :]), _ABSENT)
    count0 = valid0.sum(1, keepdim=True).clamp(min=1).float()
    count1 = valid1.sum(1, keepdim=True).clamp(min=1).float()
    norm = -(count0 + count1).log()
    log_rows = torch.cat([norm.expand(pairs, num0), count1.log() + norm], dim=1)
    log_columns = torch.cat([norm.expand(pairs, num1), count0.log() + norm], dim=1)
    rows, columns = _LogSinkhorn.apply(  # type: ignore[no-untyped-call]
        with_bins,
        log_rows.masked_fill(~real0, _ABSENT),
        log_columns.masked_fill(~real1, _ABSENT),
        iterations,
    )
    assignment: Tensor = with_bins + rows[:, :, None] + columns[:, None, :] - norm[:, :, None]
    return assignment


@dataclass(frozen=True)
class Matches:
    """What the matcher predicts for P pairs of slices.

    Attributes:
        log_assignment: log P-bar, (P, N + 1, M + 1); the last row and column are the bins.
        valid0: (P, N) bool.
        valid1: (P, M) bool.
    """

    log_assignment: Tensor
    valid0: Tensor
    valid1: Tensor


class Matcher(nn.Module):
    """Self- and cross-attention over two keypoint sets, then optimal transport between them.

    Args:
        width: Width E of the keypoint features.
        heads: Heads of each attention block.
        rounds: Rounds of one self- and one cross-attention block.
        iterations: Sinkhorn iterations.
        position_reference: Length in pixels that scales positions; None takes the longer side of the slice.
    """

    def __init__(
        self, width: int, *, heads: int, rounds: int, iterations: int, position_reference: float | None
    ) -> None:
        super().__init__()
        self.iterations = iterations
        self.position_reference = position_reference
        self.position_encoder = PositionEncoder(width)
        self.self_attention = nn.ModuleList(AttentionBlock(width, heads=heads) for _ in range(rounds))
        self.cross_attention = nn.ModuleList(AttentionBlock(width, heads=heads) for _ in range(rounds))
        self.projection = nn.Linear(width, width)
        self.bin_score = nn.Parameter(torch.tensor(1.0))

    def forward(
        self,
        features: Tensor,
        keypoints: PackedKeypoints,
        size: tuple[int, int],
    ) -> Matches:
        """Match slice p with slice P + p, for each of P pairs.

        Args:
            features: (T, E) packed keypoint features of 2 P slices: P first views, then P second views.
            keypoints: Layout of the rows.
            size: Height and width of the slices.

        Returns:
            The assignment of each pair.
        """
        pairs = len(keypoints.valid) // 2
        middle = torch.tensor(size, dtype=torch.float32, device=features.device) / 2
        reference = self.position_reference or float(max(size))
        features = features + self.position_encoder(keypoints.positions, middle, reference)
        partners = _Swap.of(keypoints, pairs)
        for self_block, cross_block in zip(self.self_attention, self.cross_attention, strict=True):
            features = self_block(features, keypoints)
            # Both directions in one call: every slice attends to its partner as it was before the call.
            features = cross_block(features, keypoints, partners.rows(features), partners.keypoints)
        padded = keypoints.pad(self.projection(features)).float()  # (2 P, N, E)
        with full_precision(padded.device):
            scores = padded[:pairs] @ padded[pairs:].transpose(1, 2) / padded.shape[-1] ** 0.5
        valid0, valid1 = keypoints.valid[:pairs], keypoints.valid[pairs:]
        return Matches(
            log_optimal_transport(scores, self.bin_score, valid0, valid1, iterations=self.iterations),
            valid0,
            valid1,
        )


@dataclass(frozen=True)
class _Swap:
    """The same packed rows with first and second views exchanged."""

    order: Tensor
    keypoints: PackedKeypoints

    @classmethod
    def of(cls, keypoints: PackedKeypoints, pairs: int) -> _Swap:
        first = keypoints.valid[:pairs].sum()
        rows = torch.arange(len(keypoints), device=keypoints.image.device)
        order = torch.cat([rows[first:], rows[:first]])
        swapped = PackedKeypoints(
            keypoints.positions[order],
            (keypoints.image[order] + pairs) % (2 * pairs),
            torch.cat([keypoints.valid[pairs:], keypoints.valid[:pairs]]),
            keypoints.full,
        )
        return cls(order, swapped)

    def rows(self, packed: Tensor) -> Tensor:
        return packed[self.order]
