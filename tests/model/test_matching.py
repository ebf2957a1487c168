"""Optimal transport against Sinkhorn's own iterations, and the matcher's laws."""

import pytest
import torch

from kaf_model.attention import PackedKeypoints
from kaf_model.losses import matching_loss
from kaf_model.matching import (
    Matcher,
    _LogSinkhorn,
    _transport_each,
    _transport_padded,
    log_dual_softmax,
    log_optimal_transport,
)

SIZE = (48, 64)


def masks(count, slots, pairs=1):
    return (torch.arange(slots) < count).expand(pairs, -1)


def transport(scores, *, bin_score=1.0, iterations=50, valid0=None, valid1=None):
    pairs, num0, num1 = scores.shape
    return log_optimal_transport(
        scores,
        torch.as_tensor(bin_score),
        masks(num0, num0, pairs) if valid0 is None else valid0,
        masks(num1, num1, pairs) if valid1 is None else valid1,
        iterations=iterations,
    )


def sinkhorn_slowly(scores, bin_score, iterations):
    """Scale rows, then columns, of exp(scores), again and again. One pair, (N, M) -> (N + 1, M + 1)."""
    num0, num1 = scores.shape
    matrix = torch.full((num0 + 1, num1 + 1), float(bin_score), dtype=torch.float64)
    matrix[:num0, :num1] = scores
    matrix = matrix.exp()
    mass0 = torch.ones(num0 + 1, dtype=torch.float64)
    mass1 = torch.ones(num1 + 1, dtype=torch.float64)
    mass0[-1], mass1[-1] = num1, num0  # the bin can take all of the other side
    for _ in range(iterations):
        matrix = matrix * (mass0 / matrix.sum(1))[:, None]
        matrix = matrix * (mass1 / matrix.sum(0))[None, :]
    return matrix


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 7), (8, 2)])
@pytest.mark.parametrize("iterations", [1, 3, 100])
def test_transport_is_sinkhorn(shape, iterations):
    scores = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)) * 2
    ours = transport(scores, bin_score=0.7, iterations=iterations).exp()
    for pair in range(2):
        expected = sinkhorn_slowly(scores[pair].double(), 0.7, iterations)
        assert torch.allclose(ours[pair].double(), expected, atol=1e-5)


def test_marginals():
    scores = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) * 3
    assignment = transport(scores, iterations=200).exp()
    assert torch.allclose(assignment.sum(2), torch.tensor([1.0] * 5 + [8]).expand(3, -1), atol=1e-4)
    assert torch.allclose(assignment.sum(1), torch.tensor([1.0] * 8 + [5]).expand(3, -1), atol=1e-4)


def test_an_example_to_check_by_eye():
    """Two keypoints alike, one in each slice, and one that is like none."""
    scores = torch.tensor([[[9.0, -9.0], [-9.0, -9.0]]])
    assignment = transport(scores, bin_score=0.0, iterations=100)[0].exp()
    expected = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 1]])
    assert torch.allclose(assignment, expected, atol=0.05)


def test_swapping_the_slices_transposes():
    scores = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    there = transport(scores, iterations=300)
    back = transport(scores.transpose(1, 2), iterations=300)
    assert torch.allclose(there, back.transpose(1, 2), atol=1e-4)


def test_padding_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 4, 6, generator=generator) * 2
    padded = torch.randn(1, 7, 9, generator=generator) * 100
    padded[:, :4, :6] = scores
    alone = transport(scores)
    inside = transport(padded, valid0=masks(4, 7), valid1=masks(6, 9))
    rows, columns = [0, 1, 2, 3, 7], [0, 1, 2, 3, 4, 5, 9]
    assert torch.allclose(inside[0][rows][:, columns], alone[0], atol=1e-5)


def potentials_slowly(costs, log_rows, log_columns, iterations):
    columns = torch.zeros_like(log_columns)
    for _ in range(iterations):
        rows = log_rows - torch.logsumexp(costs + columns[:, None, :], dim=2)
        columns = log_columns - torch.logsumexp(costs + rows[:, :, None], dim=1)
    return rows, columns


@pytest.mark.parametrize("iterations", [1, 2, 4, 6, 13])
def test_gradients_of_the_iterations(iterations):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((2, 3, 4), (2, 3), (2, 4))
    ]
    assert torch.autograd.gradcheck(
        lambda *given: _LogSinkhorn.apply(*given, iterations, 0.0), inputs, fast_mode=True
    )
    weights = [torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)]
    gradients = []
    for work in (lambda *given: _LogSinkhorn.apply(*given, 0.0), potentials_slowly):
        outputs = work(*inputs, iterations)
        gradients.append(
            torch.autograd.grad(sum((w * o).sum() for w, o in zip(weights, outputs, strict=True)), inputs)
        )
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("strength", [30, 200])
def test_scores_far_apart_stay_finite_and_exact(strength):
    scores = torch.randn(1, 40, 60, generator=torch.Generator().manual_seed(0)) * strength
    results = []
    for work in (transport, transport_slowly):
        given = scores.clone().requires_grad_()
        out = work(given, iterations=100)
        likely = out.exp()
        gradient = torch.autograd.grad(
            (likely * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), given
        )
        results.append((likely, *gradient))
    for ours, theirs in zip(*results, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs.float(), atol=2e-3, rtol=1e-3)


def transport_slowly(scores, *, iterations):
    """One pair in double precision, with the gradients of torch, bin score 1."""
    num0, num1 = scores.shape[1:]
    costs = torch.nn.functional.pad(scores.double(), (0, 1, 0, 1), value=1.0)
    norm = -torch.tensor(float(num0 + num1)).double().log()
    log_rows, log_columns = (norm.expand(1, count + 1).clone() for count in (num0, num1))
    log_rows[:, -1] += torch.tensor(float(num1)).log()
    log_columns[:, -1] += torch.tensor(float(num0)).log()
    rows, columns = potentials_slowly(costs, log_rows, log_columns, iterations)
    return costs + rows[:, :, None] + columns[:, None, :] - norm


def test_a_tolerance_stops_early_near_the_end():
    scores = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(0))
    calls = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: calls.append(x.shape), lambda x: x):
        early = log_optimal_transport(
            scores.requires_grad_(),
            torch.tensor(1.0),
            masks(6, 6),
            masks(9, 9),
            iterations=300,
            tolerance=1e-4,
        )
    assert len(calls) < 100  # two potentials an iteration are saved
    assert torch.allclose(early, transport(scores, iterations=300), atol=1e-3)


def test_dual_softmax_by_hand():
    scores = torch.tensor([[[2.0, 0.0, 1.0], [0.5, 3.0, -1.0]]])
    assignment = log_dual_softmax(scores, torch.tensor(0.5), masks(2, 2), masks(3, 3))[0].exp()
    rows = torch.cat([scores[0], torch.full((2, 1), 0.5)], dim=1).exp()
    columns = torch.cat([scores[0], torch.full((1, 3), 0.5)], dim=0).exp()
    over1, over0 = rows / rows.sum(1, keepdim=True), columns / columns.sum(0)
    assert torch.allclose(assignment[:2, :3], over1[:, :3] * over0[:2])
    assert torch.allclose(assignment[:2, 3], over1[:, 3])
    assert torch.allclose(assignment[2, :3], over0[2])


def test_dual_softmax_of_padded_pairs():
    scores = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    alone = log_dual_softmax(scores, torch.tensor(0.3), masks(4, 4), masks(6, 6))[0]
    padded = torch.full((1, 7, 9), 5.0)
    padded[:, :4, :6] = scores
    inside = log_dual_softmax(padded, torch.tensor(0.3), masks(4, 7), masks(6, 9))[0]
    assert torch.allclose(inside[[0, 1, 2, 3, -1]][:, [0, 1, 2, 3, 4, 5, -1]], alone, atol=1e-6)


def test_gradients_under_padding_are_those_without():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 4, 6, generator=generator)
    padded = torch.zeros(1, 7, 9)
    padded[:, :4, :6] = scores
    weight = torch.randn(1, 5, 7, generator=generator)
    gradients = []
    for given, count in ((scores, (4, 6)), (padded, (7, 9))):
        given = given.clone().requires_grad_()
        bin_score = torch.tensor(0.3, requires_grad=True)
        out = transport(given, bin_score=bin_score, valid0=masks(4, count[0]), valid1=masks(6, count[1]))
        kept = out[:, [0, 1, 2, 3, -1]][:, :, [0, 1, 2, 3, 4, 5, -1]]
        gradients.append(torch.autograd.grad((kept * weight).sum(), [given, bin_score]))
    assert torch.allclose(gradients[1][0][:, :4, :6], gradients[0][0], atol=1e-5)
    assert gradients[1][0][:, 4:].abs().max() < 1e-6
    assert torch.allclose(gradients[0][1], gradients[1][1], atol=1e-4)


def matcher():
    torch.manual_seed(0)
    module = Matcher(16, heads=2, rounds=2, iterations=300, position_reference=None)
    for name, value in module.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(std=0.2)
        elif value.dim() > 1:
            value.mul_(2)
    module.projection.weight.data.mul_(0.2)  # scores with which the iterations converge
    return module.eval()


def pairs(counts0, counts1, slots=None, seed=0):
    """Packed features of first, then second views; every keypoint keeps its own whatever the padding."""
    counts = [*counts0, *counts1]
    slots = slots or max(counts)
    positions = torch.zeros(len(counts), slots, 2)
    rows = []
    for index, count in enumerate(counts):
        generator = torch.Generator().manual_seed(100 * seed + index)
        positions[index, :count] = torch.rand(count, 2, generator=generator) * torch.tensor(SIZE)
        rows.append(torch.randn(count, 16, generator=generator))
    valid = torch.arange(slots) < torch.tensor(counts)[:, None]
    return torch.cat(rows), PackedKeypoints.from_padded(positions, valid)


@torch.no_grad()
def test_swapping_views_transposes_the_matches():
    module = matcher()
    there = module(*pairs([3, 6, 2], [5, 4, 2]), SIZE)
    rows, keypoints = pairs([3, 6, 2], [5, 4, 2])
    order = torch.cat([(keypoints.image >= 3).nonzero()[:, 0], (keypoints.image < 3).nonzero()[:, 0]])
    positions = keypoints.pad(keypoints.positions)
    swapped = PackedKeypoints.from_padded(
        torch.cat([positions[3:], positions[:3]]), torch.cat([keypoints.valid[3:], keypoints.valid[:3]])
    )
    back = module(rows[order], swapped, SIZE)
    assert torch.equal(back.valid0, there.valid1)
    real = there.valid0[:, :, None] & there.valid1[:, None, :]
    differences = (there.log_assignment - back.log_assignment.transpose(1, 2))[:, :-1, :-1][real]
    assert differences.abs().max() < 1e-3
    assert there.log_assignment[:, :-1, :-1][real].std() > 0.1


@torch.no_grad()
def test_a_pair_alone_is_the_pair_in_a_batch():
    module = matcher()
    together = module(*pairs([3, 0, 6], [5, 4, 6], slots=8), SIZE).log_assignment
    rows, keypoints = pairs([3, 0, 6], [5, 4, 6], slots=8)
    for pair, (num0, num1) in enumerate([(3, 5), (0, 4), (6, 6)]):
        own = (keypoints.image == pair) | (keypoints.image == 3 + pair)
        positions = keypoints.pad(keypoints.positions)[[pair, 3 + pair]]
        alone = PackedKeypoints.from_padded(positions, keypoints.valid[[pair, 3 + pair]])
        matches = module(rows[own], alone, SIZE).log_assignment[0]
        assert torch.allclose(matches[:num0, :num1], together[pair, :num0, :num1], atol=1e-4)
        assert torch.allclose(matches[:num0, -1], together[pair, :num0, -1], atol=1e-4)


@pytest.mark.parametrize("counts", [([0, 0], [0, 0]), ([0, 3], [4, 0]), ([0, 3], [4, 2])])
def test_slices_without_keypoints_match_nothing(counts):
    module = matcher().train()
    for slots in (max(*counts[0], *counts[1]), 6):
        rows, keypoints = pairs(*counts, slots=slots)
        rows.requires_grad_()
        matches = module(rows, keypoints, SIZE)
        loss = matching_loss(matches, torch.full(matches.valid0.shape, -1))
        loss.backward()
        assert loss.isfinite()
        assert (loss == 0) == (counts != ([0, 3], [4, 2]))
        assert rows.grad is None or rows.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_matching_learns_to_match():
    """Rows that are noisy copies of each other, shuffled: after a few steps they are assigned to each other."""
    module = matcher().train()
    optimiser = torch.optim.Adam(module.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(6, generator=generator)
    first = torch.randn(6, 16, generator=generator)
    positions = torch.rand(1, 6, 2, generator=generator) * 40
    keypoints = PackedKeypoints.from_padded(
        torch.cat([positions, positions[:, order]]), torch.ones(2, 6, dtype=torch.bool)
    )
    matches0 = order.argsort()[None]
    rows = torch.cat([first, first[order]])
    losses = []
    for _ in range(25):
        loss = matching_loss(module(rows, keypoints, SIZE), matches0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    best = module(rows, keypoints, SIZE).log_assignment[0, :-1].argmax(1)
    assert torch.equal(best, matches0[0])


def test_pairs_one_by_one_are_transported_as_the_padded_batch_is():
    generator = torch.Generator().manual_seed(3)
    valid0 = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    valid1 = torch.tensor([[True, True, False], [True] * 3, [True, False, False]])
    results = []
    for way in (_transport_each, _transport_padded):
        scores = torch.randn(3, 4, 3, generator=generator.manual_seed(3), requires_grad=True)
        bin_score = torch.tensor(0.5, requires_grad=True)
        assignment = way(scores, bin_score, valid0, valid1, 20, 0.0)
        real0 = torch.cat([valid0, torch.ones(3, 1, dtype=torch.bool)], 1)
        real1 = torch.cat([valid1, torch.ones(3, 1, dtype=torch.bool)], 1)
        kept = assignment[real0[:, :, None] & real1[:, None, :]]
        results.append((kept, *torch.autograd.grad(kept.exp().square().sum(), (scores, bin_score))))
    for each, padded in zip(*results, strict=True):
        torch.testing.assert_close(each, padded, atol=1e-5, rtol=1e-4)
