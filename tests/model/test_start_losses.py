"""The losses of the compared starts, against their papers' equations written as loops, and against closed forms."""

import math

import pytest
import torch

from kaf_model.benchmark.starts.glcl import part_contrastive_loss, region_contrastive_loss
from kaf_model.benchmark.starts.pirl import noise_contrastive_loss
from kaf_model.benchmark.starts.simclr import instance_loss


def cosine(first, second):
    return torch.cosine_similarity(first, second, dim=0)


def agree(ours, theirs, variable):
    assert math.isclose(ours.item(), theirs.item(), rel_tol=1e-4)
    ours_gradient, theirs_gradient = (torch.autograd.grad(loss, variable)[0] for loss in (ours, theirs))
    assert torch.allclose(ours_gradient, theirs_gradient, atol=1e-5)


# SimCLR


def nt_xent_slowly(embeddings, tau):
    """Chen et al., Algorithm 1, with the two views of slice k at k and B + k."""
    views = len(embeddings)

    def loss(i, j):
        others = [torch.exp(cosine(embeddings[i], embeddings[k]) / tau) for k in range(views) if k != i]
        return -torch.log(torch.exp(cosine(embeddings[i], embeddings[j]) / tau) / sum(others))

    half = views // 2
    return sum(loss(k, half + k) + loss(half + k, k) for k in range(half)) / views


def test_simclr_is_nt_xent():
    torch.manual_seed(0)
    embeddings = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    ours = instance_loss(embeddings, torch.tensor([9, 0, 4, 1, 70]), temperature=0.3)
    agree(ours, nt_xent_slowly(embeddings, 0.3), embeddings)


def test_simclr_in_closed_form():
    # B slices at right angles to each other, both views alike: 1 against 1 and 2 (B - 1) zeros.
    embeddings = torch.eye(5).repeat(2, 1)
    expected = math.log(math.exp(2) + 8) - 2
    assert math.isclose(instance_loss(embeddings, torch.arange(5), temperature=0.5), expected, rel_tol=1e-5)
    # A slice that came twice has three views to be found.
    twice = torch.eye(2).repeat(4, 1)
    expected = math.log(3 * math.exp(2) + 4) - 2
    instance = torch.tensor([3, 8, 3, 8])
    assert math.isclose(instance_loss(twice, instance, temperature=0.5), expected, rel_tol=1e-5)


# GLCL


def part_slowly(embeddings, part, tau):
    """Chaitanya et al., Eq. 1 and 2, with the pairs and the negatives of G^D."""
    views, terms = range(len(embeddings)), []
    for i in views:
        for j in views:
            if i != j and part[i] == part[j]:
                pair = torch.exp(cosine(embeddings[i], embeddings[j]) / tau)
                others = [cosine(embeddings[i], embeddings[k]) for k in views if part[k] != part[i]]
                terms.append(-torch.log(pair / (pair + sum(torch.exp(other / tau) for other in others))))
    return sum(terms) / len(terms)


def test_the_global_loss_is_that_of_the_paper():
    torch.manual_seed(0)
    embeddings = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    part = torch.tensor([0, 3, 1, 0, 0, 3, 1, 0])
    ours = part_contrastive_loss(embeddings, part, temperature=0.1)
    agree(ours, part_slowly(embeddings, part.tolist(), 0.1), embeddings)


def test_the_global_loss_in_closed_form():
    # Two parts of three equal views: 1 against three zeros.
    embeddings = torch.eye(2).repeat_interleave(3, dim=0)
    part = torch.tensor([0, 0, 0, 2, 2, 2])
    expected = math.log(math.exp(4) + 3) - 4
    assert math.isclose(part_contrastive_loss(embeddings, part, temperature=0.25), expected, rel_tol=1e-5)
    # All alike: one in 1 + 3.
    same = part_contrastive_loss(torch.ones(6, 4), part, temperature=0.1)
    assert math.isclose(same, math.log(4), rel_tol=1e-5)


@pytest.mark.parametrize("part", [[1, 1, 1], [0, 1, 2]])
def test_without_pairs_or_others_the_global_loss_is_nothing(part):
    embeddings = torch.randn(3, 4, requires_grad=True)
    loss = part_contrastive_loss(embeddings, torch.tensor(part), temperature=0.1)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert embeddings.grad.isfinite().all()


def region_slowly(regions, again, tau):
    """Chaitanya et al., Eq. 3 and 4: each place against all others of both maps, from either side."""
    terms = []
    for first, second in zip(regions, again, strict=True):
        for own, other in ((first, second), (second, first)):
            for place in range(len(own)):
                pair = torch.exp(cosine(own[place], other[place]) / tau)
                elsewhere = [
                    torch.exp(cosine(own[place], features[there]) / tau)
                    for there in range(len(own))
                    if there != place
                    for features in (own, other)
                ]
                terms.append(-torch.log(pair / (pair + sum(elsewhere))))
    return sum(terms) / len(terms)


def test_the_local_loss_is_that_of_the_paper():
    torch.manual_seed(0)
    regions = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    again = torch.randn(2, 4, 5, dtype=torch.float64)
    ours = region_contrastive_loss(regions, again, temperature=0.2)
    agree(ours, region_slowly(regions, again, 0.2), regions)


def test_the_local_loss_in_closed_form():
    # Places at right angles, unchanged by the other intensities: 1 against 2 (R - 1) zeros.
    regions = torch.eye(4).repeat(3, 1, 1)
    expected = math.log(math.exp(2) + 6) - 2
    assert math.isclose(region_contrastive_loss(regions, regions, temperature=0.5), expected, rel_tol=1e-5)
    # A single place has nothing to be told from.
    assert region_contrastive_loss(torch.randn(2, 1, 4), torch.randn(2, 1, 4), temperature=0.5) == 0


# PIRL


def noise_slowly(embeddings, remembered, negatives, told_from, tau):
    """Misra and van der Maaten, Eq. 4 and 5, slice by slice."""
    terms = []
    for number, embedding in enumerate(embeddings):
        right = torch.exp(cosine(embedding, remembered[number]) / tau)
        wrong = [
            torch.exp(cosine(embedding, negative) / tau)
            for negative, told in zip(negatives, told_from[number], strict=True)
            if told
        ]
        every = right + sum(wrong)
        terms.append(-torch.log(right / every) - sum(torch.log(1 - one / every) for one in wrong))
    return sum(terms) / len(terms)


def test_the_noise_contrast_is_that_of_the_paper():
    torch.manual_seed(0)
    embeddings = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    remembered, negatives = torch.randn(3, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    told_from = torch.rand(3, 6) < 0.7
    ours = noise_contrastive_loss(embeddings, remembered, negatives, told_from, temperature=0.4)
    agree(ours, noise_slowly(embeddings, remembered, negatives, told_from, 0.4), embeddings)


def test_the_noise_contrast_in_closed_form():
    # Everything alike, N negatives: a share of 1 / (N + 1) each.
    alike = torch.ones(2, 4)
    told_from = torch.ones(2, 3, dtype=torch.bool)
    loss = noise_contrastive_loss(alike, alike, torch.ones(3, 4), told_from, temperature=0.07)
    assert math.isclose(loss, -4 * math.log(1 / 4) + 3 * (math.log(1 / 4) - math.log(3 / 4)), rel_tol=1e-5)
    # Without negatives there is nothing to lose.
    nothing = noise_contrastive_loss(alike, alike, torch.ones(3, 4), ~told_from, temperature=0.07)
    assert nothing == 0


def test_the_noise_contrast_is_finite_where_it_is_certain_and_wrong():
    embeddings = torch.tensor([[1.0, 0.0]], requires_grad=True)
    told_from = torch.tensor([[True, False]])
    negatives = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = noise_contrastive_loss(
        embeddings, torch.tensor([[-1.0, 0.0]]), negatives, told_from, temperature=0.01
    )
    loss.backward()
    assert 200 < loss.item() < 230
    assert embeddings.grad.isfinite().all()
