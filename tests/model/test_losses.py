"""The losses against the paper's equations written as loops, and against closed forms."""

import math

import pytest
import torch

from kaf_model.losses import (
    IGNORED,
    cross_entropy,
    matching_loss,
    positional_contrastive_loss,
    soft_dice,
)
from kaf_model.matching import Matches


def contrastive_slowly(embeddings, position, tau, threshold):
    """Eq. 1, anchor by anchor; mean over the anchors that have a positive."""

    def similarity(i, j):
        return torch.cosine_similarity(embeddings[i], embeddings[j], dim=0)

    views, terms = range(len(embeddings)), []
    for i in views:
        positives = [j for j in views if j != i and abs(position[i] - position[j]) < threshold]
        if not positives:
            continue
        denominator = sum(torch.exp(similarity(i, k) / tau) for k in views if k != i)
        share = [torch.log(torch.exp(similarity(i, j) / tau) / denominator) for j in positives]
        terms.append(-sum(share) / len(positives))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("threshold", [0.1, 0.35, 1.0])
def test_contrastive_loss_is_equation_1(threshold):
    torch.manual_seed(0)
    embeddings = (torch.randn(10, 6, dtype=torch.float64) * 3).requires_grad_()
    position = torch.rand(5).repeat(2)
    ours = positional_contrastive_loss(embeddings, position, temperature=0.1, position_threshold=threshold)
    theirs = contrastive_slowly(embeddings, position.tolist(), 0.1, threshold)
    assert math.isclose(ours.item(), theirs.item(), rel_tol=1e-5)
    ours_gradient, theirs_gradient = (torch.autograd.grad(loss, embeddings)[0] for loss in (ours, theirs))
    assert torch.allclose(ours_gradient, theirs_gradient, atol=1e-5)


def contrast(embeddings, position, threshold=0.35):
    return positional_contrastive_loss(
        embeddings, torch.tensor(position), temperature=0.1, position_threshold=threshold
    )


def test_contrastive_loss_in_closed_form():
    # Equal views share the probability among the 2N - 1 others.
    assert math.isclose(contrast(torch.ones(8, 4), [0.5] * 8), math.log(7), rel_tol=1e-5)
    # Two orthogonal groups of two: e^(1/tau) against itself and twice e^0.
    groups = torch.eye(2).repeat_interleave(2, dim=0)
    expected = math.log(math.exp(10) + 2) - 10
    assert math.isclose(contrast(groups, [0.0, 0.0, 1.0, 1.0]), expected, rel_tol=1e-2, abs_tol=1e-6)
    # A pair alone has nothing to be told from.
    assert abs(float(contrast(torch.randn(2, 4), [0.2, 0.2]))) < 1e-6


def test_contrastive_loss_does_not_see_lengths_or_order():
    torch.manual_seed(0)
    embeddings, position = torch.randn(8, 4), torch.rand(4).repeat(2)
    order = torch.randperm(8)
    loss = contrast(embeddings, position.tolist())
    assert torch.isclose(contrast(embeddings * torch.rand(8, 1), position.tolist()), loss, atol=1e-5)
    assert torch.isclose(contrast(embeddings[order], position[order].tolist()), loss, atol=1e-5)


def test_views_without_positives_count_for_nothing():
    embeddings = torch.randn(2, 4, requires_grad=True)
    loss = contrast(embeddings, [0.0, 1.0])
    loss.backward()
    assert loss == 0
    assert not embeddings.grad.any()
    lonely = torch.randn(5, 4)
    with_one = contrast(lonely, [0.1, 0.1, 0.2, 0.2, 0.9])
    assert math.isclose(
        with_one, contrastive_slowly(lonely, [0.1, 0.1, 0.2, 0.2, 0.9], 0.1, 0.35), rel_tol=1e-5
    )


def test_zero_embeddings_are_finite():
    embeddings = torch.zeros(4, 3, requires_grad=True)  # what slices without keypoints may give
    loss = contrast(embeddings, [0.0, 0.0, 0.0, 0.0])
    loss.backward()
    assert math.isclose(loss.item(), math.log(3), rel_tol=1e-5)
    assert embeddings.grad.isfinite().all()


def matching_slowly(log_assignment, matches0, valid0, valid1, matched_weight, unmatched_weight):
    """Eq. 2 pair by pair and keypoint by keypoint, with a mean each over matched and unmatched."""
    losses = []
    for log_p, partners, real0, real1 in zip(log_assignment, matches0.tolist(), valid0, valid1, strict=True):
        if not (real0.any() and real1.any()):
            continue

        def surprise(a, b, log_p=log_p):
            return (-log_p[a, b]).clamp(0, 100)

        matched, unmatched, taken = [], [], set()
        for a, b in enumerate(partners):
            if not real0[a]:
                continue
            if b >= 0:
                matched.append(surprise(a, b))
                taken.add(b)
            else:
                unmatched.append(surprise(a, -1))
        unmatched += [surprise(-1, b) for b in range(len(real1)) if real1[b] and b not in taken]
        loss = matched_weight * sum(matched) / max(len(matched), 1)
        losses.append(loss + unmatched_weight * sum(unmatched) / max(len(unmatched), 1))
    return sum(losses) / max(len(losses), 1)


def some_matches(seed=0):
    """Four pairs: ordinary, no second view, all matched, none matched; padding is garbage."""
    generator = torch.Generator().manual_seed(seed)
    log_assignment = torch.randn(4, 7, 6, generator=generator) * 3 - 3
    valid0 = torch.arange(6) < torch.tensor([5, 4, 3, 6])[:, None]
    valid1 = torch.arange(5) < torch.tensor([4, 0, 3, 5])[:, None]
    matches0 = torch.tensor(
        [[2, -1, 0, -1, 3, -1], [-1] * 6, [1, 2, 0, -1, -1, -1], [-1] * 6],
    )
    log_assignment[:, :6, :5][~(valid0[:, :, None] & valid1[:, None, :])] = -1e9
    return log_assignment.requires_grad_(), matches0, valid0, valid1


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.45, 1.0), (1.0, 0.0)])
def test_matching_loss_is_equation_2(weights):
    log_assignment, matches0, valid0, valid1 = some_matches()
    ours = matching_loss(
        Matches(log_assignment, valid0, valid1),
        matches0,
        matched_weight=weights[0],
        unmatched_weight=weights[1],
    )
    theirs = matching_slowly(log_assignment, matches0, valid0, valid1, *weights)
    assert torch.isclose(ours, theirs, atol=1e-5)
    assert torch.allclose(
        *(torch.autograd.grad(loss, log_assignment)[0] for loss in (ours, theirs)), atol=1e-6
    )


def test_matching_loss_is_clamped_to_0_and_100():
    everything = torch.ones(1, 1, dtype=torch.bool)

    def loss(log_p, partner):
        log_assignment = torch.full((1, 2, 2), log_p)
        return float(
            matching_loss(Matches(log_assignment, everything, everything), torch.tensor([[partner]]))
        )

    assert loss(-3.0, 0) == 3
    assert loss(-3.0, -1) == 3
    assert loss(-1e6, 0) == 100
    assert loss(0.5, 0) == 0


def test_certain_and_right_matches_cost_nothing():
    log_assignment = torch.full((1, 3, 3), -1e4)
    log_assignment[0, 0, 1] = log_assignment[0, 1, 2] = log_assignment[0, 2, 0] = 0
    everything = torch.ones(1, 2, dtype=torch.bool)
    assert matching_loss(Matches(log_assignment, everything, everything), torch.tensor([[1, -1]])) == 0


@pytest.mark.parametrize(("num0", "num1"), [(0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("slots", [True, False])
def test_pairs_without_keypoints_cost_nothing(num0, num1, slots):
    shape = (2, 3, 3) if slots else (2, num0, num1)
    log_assignment = torch.randn(2, shape[1] + 1, shape[2] + 1, requires_grad=True)
    valid0 = (torch.arange(shape[1]) < num0).expand(2, -1)
    valid1 = (torch.arange(shape[2]) < num1).expand(2, -1)
    loss = matching_loss(Matches(log_assignment, valid0, valid1), torch.full(shape[:2], -1))
    loss.backward()
    assert loss == 0
    assert not log_assignment.grad.any()


def labelled(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, 6, 8, generator=generator) * 2
    labels = torch.randint(0, 4, (3, 6, 8), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORED
    labels[1] = IGNORED
    return logits.requires_grad_(), labels


def segmentation_slowly(logits, labels):
    """Cross-entropy and soft Dice, pixel by pixel."""
    entropies, overlap, size = [], [0.0] * 4, [0.0] * 4
    for b in range(logits.shape[0]):
        for y in range(logits.shape[2]):
            for x in range(logits.shape[3]):
                truth = int(labels[b, y, x])
                if truth == IGNORED:
                    continue
                exponentials = logits[b, :, y, x].exp()
                p = exponentials / exponentials.sum()
                entropies.append(-p[truth].log())
                for k in range(4):
                    overlap[k] = overlap[k] + p[k] * (k == truth)
                    size[k] = size[k] + p[k] + (k == truth)
    dice = [(2 * overlap[k] + 1) / (size[k] + 1) for k in range(1, 4)]
    return sum(entropies) / len(entropies), 1 - sum(dice) / 3


def test_segmentation_losses_are_the_slow_ones():
    logits, labels = labelled()
    ours = cross_entropy(logits, labels), soft_dice(logits, labels)
    for loss, expected in zip(ours, segmentation_slowly(logits, labels), strict=True):
        assert torch.isclose(loss, expected, atol=1e-5)
        gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)]
        assert torch.allclose(*gradients, atol=1e-6)
        assert not gradients[0].movedim(1, -1)[labels == IGNORED].any()


def test_what_is_ignored_has_no_influence():
    logits, labels = labelled()
    with torch.no_grad():
        other = torch.where((labels == IGNORED)[:, None], torch.randn_like(logits) * 50, logits)
    for loss in (cross_entropy, soft_dice):
        assert torch.isclose(loss(other, labels), loss(logits, labels), atol=1e-6)


def test_perfect_predictions_cost_nothing():
    labels = torch.randint(0, 4, (2, 48, 64), generator=torch.Generator().manual_seed(0))
    logits = 50.0 * torch.nn.functional.one_hot(labels, 4).movedim(-1, 1)
    assert cross_entropy(logits, labels) < 1e-6
    assert soft_dice(logits, labels) < 1e-6
    assert soft_dice(-logits, labels) > 0.9


def test_nothing_labelled_costs_nothing():
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    labels = torch.full((2, 4, 5), IGNORED)
    loss = cross_entropy(logits, labels) + soft_dice(logits, labels)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_contrast_keeps_full_precision_under_autocast():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, 16, generator=generator) + 0.02 * torch.randn(6, 16, generator=generator)
    position = torch.linspace(0, 1, 6)
    exact = positional_contrastive_loss(embeddings, position, temperature=0.1, position_threshold=0.35)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = positional_contrastive_loss(embeddings, position, temperature=0.1, position_threshold=0.35)
    assert mixed == exact
