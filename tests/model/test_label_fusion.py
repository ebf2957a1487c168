"""Labels by patches: against a slow version, and what it is for."""

import itertools

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, shift

from kaf_model.label_fusion import HALO, LEAST_DIFFERENCE, by_patches


def texture(shape=(9, 10, 11), seed=0):
    return gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.0).astype(np.float32) * 4


def slowly(seen, image, labels):
    """Voxel by voxel, over patches that are cut at the borders; images go on as they end."""
    shape = seen.shape
    found = np.zeros_like(labels)
    for at in itertools.product(*map(range, shape)):
        window = tuple(slice(max(i - 1, 0), i + 2) for i in at)
        weights, there = [], []
        unlike = []
        for offset in itertools.product((-1, 0, 1), repeat=3):
            places = [np.clip(np.arange(n) + o, 0, n - 1) for n, o in zip(shape, offset, strict=True)]
            difference = seen - image[np.ix_(*places)]
            unlike.append(difference[window].var())
            there.append(labels[:, *(p[i] for p, i in zip(places, at, strict=True))])
        weights = np.exp(-np.array(unlike) / (min(unlike) + LEAST_DIFFERENCE))
        found[:, *at] = (weights[:, None] * np.array(there)).sum(0) / weights.sum()
    return found


def test_fused_labels_are_those_of_a_slow_version():
    shape = (4, 5, 6)
    seen, image = texture(shape), texture(shape, seed=1)
    labels = np.random.default_rng(2).random((2, *shape)).astype(np.float32)
    fused = by_patches(*map(torch.from_numpy, (seen, image, labels)))
    np.testing.assert_allclose(fused.numpy(), slowly(seen, image, labels), rtol=1e-3, atol=1e-4)


def test_what_registration_left_over_is_made_good():
    seen = texture()
    z, y, x = np.ogrid[:9, :10, :11]
    truth = ((z - 4) ** 2 + (y - 5) ** 2 + (x - 5) ** 2 <= 9).astype(np.float32)
    image, labels = (shift(array, (1, 0, -1), order=1, mode="nearest") for array in (seen, truth))
    fused = by_patches(*map(torch.from_numpy, (seen, 0.9 * image + 3, labels[None])))[
        0
    ].numpy()  # also brighter
    inside = (slice(2, -2),) * 3
    before = np.abs(labels - truth)[inside].mean()
    assert np.abs(fused - truth)[inside].mean() < 0.2 * before


def test_a_part_with_its_halo_comes_to_the_same():
    seen, image = torch.from_numpy(texture()), torch.from_numpy(texture(seed=1))
    labels = torch.rand(1, *seen.shape, generator=torch.Generator().manual_seed(0))
    whole = by_patches(seen, image, labels)
    part = by_patches(seen[3 - HALO :], image[3 - HALO :], labels[:, 3 - HALO :])[:, HALO:]
    torch.testing.assert_close(part, whole[:, 3:], rtol=1e-4, atol=1e-5)


def test_images_that_show_nothing_leave_labels_smooth():
    labels = torch.zeros(1, 5, 5, 5)
    labels[:, 2:] = 1
    fused = by_patches(torch.zeros(5, 5, 5), torch.zeros(5, 5, 5), labels)
    torch.testing.assert_close(fused[0, :, 2, 2], torch.tensor([0, 1 / 3, 2 / 3, 1, 1]))
