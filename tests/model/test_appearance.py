from __future__ import annotations

import numpy as np
import pytest
import torch

from kaf_model.appearance import MARGIN, WEIGHT, Appearance
from kaf_model.config import SliceConfig
from kaf_model.slices import Slices
from kaf_model.volume import Volume

H, W = 48, 64


def disc(y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:H, :W]
    return np.hypot(rows - y, columns - x) <= radius


def distance_to_disc(y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:H, :W]
    return radius + 0.5 - np.hypot(rows - y, columns - x)


def stack_of(images: np.ndarray) -> Slices:
    volume = Volume.from_array(np.asarray(images, np.float32), (5.0, 1.0, 1.0), name="v")
    return Slices(volume, SliceConfig(spacing=None))


def dice(ours: np.ndarray, theirs: np.ndarray) -> float:
    return 2 * np.count_nonzero(ours & theirs) / (np.count_nonzero(ours) + np.count_nonzero(theirs))


def noisy(structures: np.ndarray, seed: int = 0) -> np.ndarray:
    return structures + np.random.default_rng(seed).normal(0, 0.15, structures.shape)


def two_channels(inside: np.ndarray) -> np.ndarray:
    return np.stack([-inside, inside]).astype(np.float32)


def log_of(distances: np.ndarray, blur: float) -> np.ndarray:
    scaled = torch.from_numpy(distances / blur)
    return torch.nn.functional.logsigmoid(scaled).log_softmax(0).numpy()


def test_intensities_move_a_border_to_where_it_is():
    """The shape says a disc of radius 8, two pixels off; the picture shows where it is."""
    truth = disc(24, 34, 9)
    stack = stack_of(noisy(np.stack([disc(24, 32, 8), truth])))
    drawn, arrived = two_channels(distance_to_disc(24, 32, 8)), two_channels(distance_to_disc(24, 32, 8))
    appearance = Appearance(stack, [0], np.stack([drawn, arrived]))
    before = log_of(arrived, 2.0)
    after = appearance.refined(1, before, arrived)
    assert dice(before[1] > before[0], truth) < 0.9
    assert dice(after[1] > after[0], truth) > 0.97
    assert np.allclose(np.exp(after).sum(0), 1, atol=1e-4)


def test_a_picture_that_shows_nothing_leaves_the_shapes():
    inside = distance_to_disc(24, 32, 8)
    distances = np.stack([two_channels(inside)] * 2)
    before = log_of(distances[1], 2.0)
    after = Appearance(stack_of(np.ones((2, H, W))), [0], distances).refined(1, before, distances[1])
    assert np.allclose(after, before, atol=0.02)


def test_a_structure_too_small_to_be_known_stays_as_small_as_its_shape():
    inside = distance_to_disc(24, 32, 1.2)
    assert np.count_nonzero(inside > 0) < 20
    distances = np.stack([two_channels(inside)] * 2)
    stack = stack_of(noisy(np.zeros((2, H, W))))
    before = log_of(distances[1], 1.25)
    after = Appearance(stack, [0], distances).refined(1, before, distances[1])
    drawn, found = (np.count_nonzero(maps[1] > maps[0]) for maps in (before, after))
    assert abs(found - drawn) <= 0.25 * drawn


def test_finished_slices_and_what_is_far_away_are_left_alone():
    inside = distance_to_disc(24, 12, 6)
    distances = np.stack([two_channels(inside)] * 2)
    before = log_of(distances[1], 2.0)
    appearance = Appearance(stack_of(noisy(np.stack([disc(24, 12, 6)] * 2))), [0], distances)
    assert appearance.refined(0, before, distances[0]) is before
    after = appearance.refined(1, before, distances[1])
    far = inside < -MARGIN
    assert far.any()
    assert np.array_equal(after[:, far], before[:, far])
    assert not np.array_equal(after[:, ~far], before[:, ~far])


def test_brighter_slices_change_little_where_the_shape_is_right():
    """A slice half as bright again as the finished one: its own histogram counts as well."""
    structure = np.stack([disc(24, 32, 10).astype(float)] * 2)
    images = noisy(structure)
    images[1] = images[1] * 1.5 + 0.3
    distances = np.stack([two_channels(distance_to_disc(24, 32, 10))] * 2)
    before = log_of(distances[1], 2.0)
    after = Appearance(stack_of(images), [0], distances).refined(1, before, distances[1])
    assert dice(after[1] > after[0], structure[0] > 0) > 0.95


def test_what_an_intensity_says_is_bounded():
    structure = np.stack([disc(24, 32, 10).astype(float)] * 2)
    distances = np.stack([two_channels(distance_to_disc(24, 32, 10))] * 2)
    before = log_of(distances[1], 2.0)
    after = Appearance(stack_of(structure), [0], distances).refined(1, before, distances[1])
    odds = after[1] - after[0] - (before[1] - before[0])
    assert odds[24, 32] > 0 > odds[24, 48]
    assert WEIGHT * np.log(10) < odds[24, 32] < WEIGHT * np.log(48 / 1e-3)  # an empty bin has 1e-3 / 48


@pytest.mark.parametrize("shape", [(1, 1), (3, 40)])
def test_too_few_pixels_say_nothing(shape):
    distances = np.full((2, 2, *shape), 1.0, np.float32)
    appearance = Appearance(stack_of(np.random.default_rng(0).normal(size=(2, *shape))), [0], distances)
    before = np.log(np.full((2, *shape), 0.5, np.float32))
    assert np.isfinite(appearance.refined(1, before, distances[1])).all()
