from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kaf_model.config import SliceConfig
from kaf_model.labels import LabelledVolume, SliceStatus
from kaf_model.propagation import Propagation, propagate
from kaf_model.volume import Volume

H, W = 48, 64
COMPLETE, EMPTY, PARTIAL = SliceStatus.COMPLETE, SliceStatus.EMPTY, SliceStatus.PARTIAL
AS_STORED = SliceConfig(spacing=None)


def disc(y: float, x: float, radius: float, shape=(H, W)) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(rows - y, columns - x) <= radius


def volume_of(images: np.ndarray, spacing=(5.0, 1.0, 1.0)) -> Volume:
    return Volume.from_array(np.asarray(images, np.float32), spacing, name="v")


def carried(images, labels, statuses, values=(0, 1), config=AS_STORED, spacing=(5.0, 1.0, 1.0)):
    work = propagate(LabelledVolume(volume_of(images, spacing), labels, statuses), values, config)
    while True:
        try:
            next(work)
        except StopIteration as done:
            result: Propagation | None = done.value
            return result


def by_shapes(found: Propagation) -> Propagation:
    return replace(found, appearance=None)


def texture(seed: int = 0) -> np.ndarray:
    """A smooth random image, larger than a slice, so that it can be moved."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 1, 20, 24, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(100, 120), mode="bicubic")[0, 0].numpy()


def dice(ours: np.ndarray, theirs: np.ndarray) -> float:
    return 2 * np.count_nonzero(ours & theirs) / (np.count_nonzero(ours) + np.count_nonzero(theirs))


def test_what_does_not_move_stays():
    image, shape = texture()[:H, :W], disc(20, 30, 9)
    labels = np.zeros((5, H, W), np.uint8)
    labels[2] = shape
    found = by_shapes(carried(np.stack([image] * 5), labels, {2: COMPLETE}))
    assert (found.labels() == shape).all()


def test_labels_follow_the_anatomy_from_slice_to_slice():
    """The image moves by (2, -3) pixels from slice to slice, 12 in all: a disc of radius 8 leaves its place."""
    big = texture()
    images = np.stack([big[20 + 2 * z : 20 + 2 * z + H, 30 - 3 * z : 30 - 3 * z + W] for z in range(5)])
    truth = np.stack([disc(30 - 2 * z, 24 + 3 * z, 8) for z in range(5)])
    labels = np.where(np.arange(5)[:, None, None] == 0, truth, False).astype(np.uint8)
    found = by_shapes(carried(images, labels, {0: COMPLETE})).labels() == 1
    assert dice(truth[0], truth[4]) < 0.3
    assert min(dice(found[z], truth[z]) for z in range(5)) > 0.95


def test_between_two_slices_shapes_are_blended():
    labels = np.zeros((5, H, W), np.uint8)
    labels[0], labels[4] = disc(24, 32, 6), disc(24, 32, 14)
    found = carried(np.ones((5, H, W)), labels, {0: COMPLETE, 4: COMPLETE}).labels()
    areas = (found == 1).sum((1, 2))
    for z, radius in enumerate((6, 8, 10, 12, 14)):
        assert np.sqrt(areas[z] / np.pi) == pytest.approx(radius, abs=0.5)


def test_borders_follow_intensities():
    """The disc grows beyond the finished slice; carried by its shape alone it keeps its size."""
    truth = np.stack([disc(24, 32, radius) for radius in (8, 8, 10)])
    images = truth + np.random.default_rng(0).normal(0, 0.15, truth.shape)
    found = carried(
        images, np.where([[[True]], [[False]], [[False]]], truth, 0).astype(np.uint8), {0: COMPLETE}
    )
    alone = by_shapes(found)
    assert dice(alone.labels()[2] == 1, truth[2]) < dice(found.labels()[2] == 1, truth[2])
    assert dice(found.labels()[2] == 1, truth[2]) > 0.95


def test_of_two_sides_the_one_that_looks_alike_counts_more():
    """Slice 2 shows what slice 0 shows; slice 4 shows something else, and its disc is larger."""
    images = np.stack([texture(0)[:H, :W]] * 4 + [texture(1)[:H, :W]])
    labels = np.zeros((5, H, W), np.uint8)
    labels[0], labels[4] = disc(24, 32, 8), disc(24, 32, 14)
    found = by_shapes(carried(images, labels, {0: COMPLETE, 4: COMPLETE})).labels() == 1
    assert dice(found[2], labels[0] == 1) > 0.85  # 0.69 for a disc half-way between the two


@pytest.mark.parametrize(("other_there", "end"), [(False, 8), (True, 6)])
def test_a_structure_ends_round_at_an_empty_slice_and_before_one_with_others(other_there, end):
    labels = np.zeros((9, H, W), np.uint8)
    labels[0] = disc(24, 32, 10)
    labels[8, :4, :4] = 2 * other_there
    statuses = {0: COMPLETE, 8: COMPLETE if other_there else EMPTY}
    distances = carried(np.ones((9, H, W)), labels, statuses, values=(0, 1, 2)).distances[:, 1]
    width = distances.max((1, 2)) / distances[0].max()
    for z in range(end):
        assert width[z] == pytest.approx(np.sqrt(1 - (z / end) ** 2), abs=0.01)
    assert (width[end:] <= 0).all()


def test_turning_the_volume_over_turns_the_result_over():
    generator = np.random.default_rng(0)
    images = np.stack([texture(0)[:H, :W] + 0.2 * texture(z + 1)[:H, :W] for z in range(7)])
    labels = np.zeros((7, H, W), np.uint8)
    for z in (1, 4):
        labels[z] = 1 * disc(*generator.uniform(15, 30, 2), 8)
        labels[z][disc(30, 45, 5)] = 2
    one = carried(images, labels, {1: COMPLETE, 4: COMPLETE}, (0, 1, 2))
    other = carried(images[::-1].copy(), labels[::-1].copy(), {5: COMPLETE, 2: COMPLETE}, (0, 1, 2))
    assert np.allclose(one.distances, other.distances[::-1], atol=0.1)
    assert np.array_equal(one.blur, other.blur[::-1])


def test_the_order_of_channels_changes_nothing():
    labels = np.zeros((4, H, W), np.uint8)
    labels[1] = 3 * disc(20, 20, 6) + 7 * disc(30, 45, 8)
    images = np.stack([texture()[:H, :W]] * 4)
    one = carried(images, labels, {1: COMPLETE}, (0, 3, 7)).labels()
    other = carried(images, labels, {1: COMPLETE}, (0, 7, 3)).labels()
    assert set(np.unique(one)) == {0, 3, 7}
    assert np.array_equal(one, other)


def test_distances_are_in_mm_and_borders_lie_between_pixels():
    labels = np.zeros((1, H, W), np.uint8)
    labels[0, :, 20:] = 1
    found = carried(np.ones((1, H, W)), labels, {0: COMPLETE}, spacing=(5.0, 2.0, 2.0))
    row = found.distances[0, 1, 10, 17:23].astype(float)
    assert row.tolist() == [-5, -3, -1, 1, 3, 5]
    assert np.array_equal(found.distances[0, 0], -found.distances[0, 1])


def test_the_farther_the_less_is_said():
    labels = np.zeros((4, H, W), np.uint8)
    labels[0] = disc(24, 32, 10)
    found = carried(np.ones((4, H, W)), labels, {0: COMPLETE})
    assert (np.diff(found.blur) > 0).all()
    sure = found.log_probabilities(range(4)).exp()[:, 1, 24, 32]
    assert (sure.diff() < 0).all()


def test_probabilities_are_fused_as_a_product_of_experts():
    labels = np.zeros((2, H, W), np.uint8)
    labels[0] = disc(24, 32, 10) + disc(24, 32, 5)
    found = carried(np.ones((2, H, W)), labels, {0: COMPLETE}, (0, 1, 2))
    network = torch.rand(2, 3, H, W).softmax(1)
    fused = found.fused(network, [0, 1], weight=0.5)
    shapes = found.log_probabilities([0, 1]).exp()
    for row, y, x in ((0, 24, 32), (1, 24, 40), (1, 0, 0)):
        product = [float(network[row, k, y, x] * shapes[row, k, y, x] ** 0.5) for k in range(3)]
        expected = [value / sum(product) for value in product]
        assert fused[row, :, y, x].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(found.fused(network, [0, 1], weight=0), network, atol=1e-5)


def test_what_is_not_finished_says_nothing():
    labels = np.zeros((3, H, W), np.uint8)
    labels[0], labels[1] = disc(24, 32, 10), disc(10, 10, 5)
    statuses = {0: COMPLETE, 1: PARTIAL}
    both = carried(np.ones((3, H, W)), labels, statuses)
    labels[1:] = 0
    alone = carried(np.ones((3, H, W)), labels, {0: COMPLETE})
    assert np.array_equal(both.distances, alone.distances)
    assert both.finished == (0,)


@pytest.mark.parametrize("statuses", [{}, {1: EMPTY}, {0: PARTIAL}, {1: COMPLETE}])
def test_nothing_comes_of_slices_that_show_nothing(statuses):
    labels = np.zeros((3, H, W), np.uint8)
    labels[0] = disc(24, 32, 10)
    assert carried(np.ones((3, H, W)), labels, statuses) is None


def test_finished_slices_come_back_as_they_were_drawn():
    config = SliceConfig(spacing=3.0)  # coarser than the labels
    labels = np.zeros((3, H, W), np.uint8)
    labels[1] = np.random.default_rng(0).integers(0, 2, (H, W))
    assert np.array_equal(
        carried(np.ones((3, H, W)), labels, {1: COMPLETE}, config=config).labels()[1], labels[1]
    )


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (9, 40)])
def test_slices_may_be_tiny(shape):
    labels = np.ones((3, *shape), np.uint8)
    images = np.random.default_rng(0).normal(size=(3, *shape))
    for finished in ({1: COMPLETE}, {0: COMPLETE, 2: COMPLETE}):
        found = carried(images, labels, finished)
        assert np.isfinite(found.distances).all()
        assert (found.labels() == 1).all()
