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


_ITERATIONS_A_KERNEL = 5
"""Iterations that share an exponential. The bins, which take from everybody, keep a potential from changing by
more than about the logarithm of the number of keypoints an iteration, so that five stay within float32."""


_LARGEST_TOGETHER = 2**16
"""Entries of a pair's matrix up to which several pairs share their operations: beyond it they leave the cache."""


class _LogSinkhorn(torch.autograd.Function):
    """Potentials of the transport, by few exponentials: between them an iteration is two matrix-vector products.

    With the potentials r, c of an iteration in the kernel K = exp(costs + r + c), the next ones are
    r + log(rows / (K v)) and c + log(columns / (K' u)). The backward pass stores the potentials alone, and the
    gradient of the costs is K times a product of as many columns as there are half iterations.
    """

    @staticmethod
    def forward(
        context: Any,
        costs: Tensor,
        log_rows: Tensor,
        log_columns: Tensor,
        iterations: int,
        tolerance: float,
    ) -> tuple[Tensor, Tensor]:
        row_mass, column_mass = log_rows.exp(), log_columns.exp()
        wanted_rows, least_rows = _scaling_parts(row_mass)
        wanted_columns, least_columns = _scaling_parts(column_mass)
        rows = [log_rows - torch.logsumexp(costs, dim=2)]
        columns = [torch.zeros_like(log_columns)]
        columns.append(log_columns - torch.logsumexp(costs + rows[0][:, :, None], dim=1))
        with full_precision(costs.device):
            while len(rows) < iterations:
                first_rows, first_columns = rows[-1], columns[-1]
                kernel = _kernel(costs, first_rows, first_columns)
                lefts, rights = [], [torch.ones_like(first_columns)]
                for _ in range(min(_ITERATIONS_A_KERNEL, iterations - len(rows))):
                    lefts.append(wanted_rows / _times(kernel, rights[-1], least_rows))
                    rights.append(wanted_columns / _times(kernel.mT, lefts[-1], least_columns))
                rows += (first_rows + torch.stack(lefts).log()).unbind()
                columns += (first_columns + torch.stack(rights[1:]).log()).unbind()
                if tolerance and (columns[-1] - columns[-2]).abs().max() < tolerance:
                    break
        context.save_for_backward(costs, row_mass, column_mass, torch.stack(rows), torch.stack(columns))
        return rows[-1], columns[-1]

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        costs, row_mass, column_mass, rows, columns = context.saved_tensors
        iterations = len(rows)
        of_row, of_column = (torch.where(mass > 0, 1 / mass, 0.0) for mass in (row_mass, column_mass))
        grad_last_rows, grad_columns = gradients
        grad_costs = torch.zeros_like(costs)
        all_grad_rows: list[Tensor] = []
        all_grad_columns: list[Tensor] = []
        with full_precision(costs.device):
            for start in reversed(range(1, iterations, _ITERATIONS_A_KERNEL)):
                stop = min(start + _ITERATIONS_A_KERNEL, iterations)
                kernel = _kernel(costs, rows[start - 1], columns[start])
                left = (rows[start:stop] - rows[start - 1]).exp()
                right = (columns[start : stop + 1] - columns[start]).exp()
                of_left, of_right = left * of_row, right * of_column
                minus_left, minus_right = -left, -right
                lefts, rights = [], []
                for step in reversed(range(stop - start)):
                    all_grad_columns.append(grad_columns)
                    rights.append(of_right[step + 1] * grad_columns)
                    lefts.append(left[step])
                    grad_rows = minus_left[step] * _times(kernel, rights[-1])
                    if not all_grad_rows:
                        grad_rows = grad_rows + grad_last_rows
                    all_grad_rows.append(grad_rows)
                    lefts.append(of_left[step] * grad_rows)
                    rights.append(right[step])
                    grad_columns = minus_right[step] * _times(kernel.mT, lefts[-1])
                grad_costs -= kernel * (torch.stack(lefts, dim=2) @ torch.stack(rights, dim=1))
        all_grad_columns.append(grad_columns)
        share = torch.softmax(costs + rows[0][:, :, None], dim=1) * grad_columns[:, None, :]
        grad_costs -= share
        grad_rows = -share.sum(2)
        if not all_grad_rows:  # one iteration
            grad_rows = grad_rows + grad_last_rows
        all_grad_rows.append(grad_rows)
        grad_costs -= torch.softmax(costs, dim=2) * grad_rows[:, :, None]
        return grad_costs, torch.stack(all_grad_rows).sum(0), torch.stack(all_grad_columns).sum(0), None, None


def _kernel(costs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return (costs + rows[:, :, None]).add_(columns[:, None, :]).exp_()


def _times(matrices: Tensor, vectors: Tensor, plus: Tensor | None = None) -> Tensor:
    """(P, N, M) times (P, M), plus (P, N) -> (P, N).

    CPUs are slow at batched products with vectors: one is multiplied as a matrix, of several the products are summed.
    """
    if matrices.device.type != "cpu":
        if plus is None:
            return torch.bmm(matrices, vectors[:, :, None])[:, :, 0]
        return torch.baddbmm(plus[:, :, None], matrices, vectors[:, :, None])[:, :, 0]
    alone = len(matrices) == 1
    product = (matrices[0] @ vectors[0])[None] if alone else (matrices * vectors[:, None, :]).sum(2)
    return product if plus is None else product + plus


def _scaling_parts(mass: Tensor) -> tuple[Tensor, Tensor]:
    """What is divided by sums to bring them to a mass, and what is added to the sums before.

    The ratio is 1 for padding, whose mass and sums are 0, and never infinite.
    """
    padding = (mass <= 0).to(mass.dtype)
    return mass + padding, padding + torch.finfo(mass.dtype).tiny


def log_optimal_transport(
    scores: Tensor,
    bin_score: Tensor,
    valid0: Tensor,
    valid1: Tensor,
    *,
    iterations: int,
    tolerance: float = 0.0,
) -> Tensor:
    """Soft assignment between two keypoint sets, each with a bin for what has no partner.

    Args:
        scores: (P, N, M) similarity of each pair of keypoints.
        bin_score: Scalar score of leaving a keypoint unmatched.
        valid0: (P, N) bool.
        valid1: (P, M) bool.
        iterations: Sinkhorn iterations.
        tolerance: Stop before the last of them once an iteration changes no potential by more; 0 never does.

    Returns:
        log P-bar (P, N + 1, M + 1): rows of valid keypoints sum to 1, the bins to the size of the other
        set. Meaningless where padding is.
    """
    scores, bin_score = scores.float(), bin_score.float()
    if scores.device.type == "cpu" and not _go_together(valid0, valid1):
        return _transport_each(scores, bin_score, valid0, valid1, iterations, tolerance)
    return _transport_padded(scores, bin_score, valid0, valid1, iterations, tolerance)


def _go_together(valid0: Tensor, valid1: Tensor) -> bool:
    """Whether a CPU is faster with all pairs at once: small ones with little padding."""
    padded = valid0.shape[1] * valid1.shape[1]
    own = (valid0.sum(1) * valid1.sum(1)).float().mean()
    return padded <= _LARGEST_TOGETHER and bool(own >= 0.7 * padded)


def _transport_each(
    scores: Tensor, bin_score: Tensor, valid0: Tensor, valid1: Tensor, iterations: int, tolerance: float
) -> Tensor:
    """Pair after pair, each without its padding, which large products would not be free of."""
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
            tolerance,
        )[0]
        rows = torch.cat([rows, rows.new_tensor([num0])])
        columns = torch.cat([columns, columns.new_tensor([num1])])
        padded = transported.new_zeros(num0 + 1, num1 + 1)
        assignments.append(padded.index_put((rows[:, None], columns), transported))
    return torch.stack(assignments)


def _transport_padded(
    scores: Tensor, bin_score: Tensor, valid0: Tensor, valid1: Tensor, iterations: int, tolerance: float
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
        tolerance,
    )
    assignment: Tensor = with_bins + rows[:, :, None] + columns[:, None, :] - norm[:, :, None]
    return assignment


def log_dual_softmax(scores: Tensor, bin_score: Tensor, valid0: Tensor, valid1: Tensor) -> Tensor:
    """Soft assignment as the product of the softmax over either set and its bin; no iterations.

    Args:
        scores: (P, N, M) similarity of each pair of keypoints.
        bin_score: Scalar score of leaving a keypoint unmatched.
        valid0: (P, N) bool.
        valid1: (P, M) bool.

    Returns:
        log P-bar (P, N + 1, M + 1) as of `log_optimal_transport`, but that a keypoint's row sums to at most 1.
        The last entry of both bins is 0. Meaningless where padding is.
    """
    pairs, num0, num1 = scores.shape
    absent = ~(valid0[:, :, None] & valid1[:, None, :])
    scores, bin_score = scores.float().masked_fill(absent, _ABSENT), bin_score.float()
    over1 = torch.cat([scores, bin_score.expand(pairs, num0, 1)], dim=2).log_softmax(2)  # (P, N, M + 1)
    over0 = torch.cat([scores, bin_score.expand(pairs, 1, num1)], dim=1).log_softmax(1)  # (P, N + 1, M)
    matched = over1[:, :, :num1] + over0[:, :num0]
    upper = torch.cat([matched, over1[:, :, num1:]], dim=2)
    lower = torch.cat([over0[:, num0:], over0.new_zeros(pairs, 1, 1)], dim=2)
    return torch.cat([upper, lower], dim=1)


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
        iterations: Sinkhorn iterations; 0 takes the dual softmax instead of the transport.
        position_reference: Length in pixels that scales positions; None takes the longer side of the slice.
        tolerance: Change of the potentials below which the iterations stop early; 0 never does.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        rounds: int,
        iterations: int,
        position_reference: float | None,
        tolerance: float = 0.0,
    ) -> None:
        super().__init__()
        self.iterations = iterations
        self.tolerance = tolerance
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
        return Matches(self._assign(scores, valid0, valid1), valid0, valid1)

    def _assign(self, scores: Tensor, valid0: Tensor, valid1: Tensor) -> Tensor:
        if not self.iterations:
            return log_dual_softmax(scores, self.bin_score, valid0, valid1)
        return log_optimal_transport(
            scores, self.bin_score, valid0, valid1, iterations=self.iterations, tolerance=self.tolerance
        )


@dataclass(frozen=True)
class _Swap:
    """The same packed rows with first and second views exchanged."""

    order: Tensor
    keypoints: PackedKeypoints

    @classmethod
    def of(cls, keypoints: PackedKeypoints, pairs: int) -> _Swap:
        rows = torch.arange(len(keypoints), device=keypoints.image.device)
        order = (rows + keypoints.valid[:pairs].sum()) % max(len(keypoints), 1)
        swapped = PackedKeypoints(
            keypoints.positions[order],
            (keypoints.image[order] + pairs) % (2 * pairs),
            keypoints.slot[order],
            torch.cat([keypoints.valid[pairs:], keypoints.valid[:pairs]]),
            keypoints.full,
        )
        return cls(order, swapped)

    def rows(self, packed: Tensor) -> Tensor:
        return packed[self.order]
