"""Does the self-similarity turn with the image? Cases where the answer is known."""

import numpy as np
import pytest
import torch
from explore_cases import constant, heart, tiny_recipe

from kaf_model.augment import SpatialTransform
from kaf_model.explore.equivariance import (
    AUGMENTATION,
    EquivarianceError,
    augment_slice,
    equivariance_errors,
    equivariance_maps,
    look_at,
    move_slice,
)
from kaf_model.explore.explorer import Explorer
from kaf_model.explore.similarity import similarity_maps
from kaf_model.explore.views import VolumeView

STILL = AUGMENTATION.override(spatial_probability=0.0)


@pytest.fixture(scope="module")
def view():
    """A KAF-UNet on slices whose sides the encoder can halve."""
    return VolumeView(Explorer.untrained(tiny_recipe()), heart(shape=(3, 48, 64)))


def moved(view, z, matrix=((1.0, 0.0), (0.0, 1.0)), offset=(0.0, 0.0)):
    transform = SpatialTransform(
        matrix=torch.tensor([matrix]),
        offset=torch.tensor([offset]),
        displacement=None,
        sizes=torch.tensor([view.shape]),
        output_size=(48, 64),
    )
    return look_at(view.explorer, move_slice(view.read(z), view.keypoints(z).positions, transform))


def test_a_slice_that_is_not_moved_has_no_error(view):
    augmented = augment_slice(view, 1, seed=3, augment=STILL)
    np.testing.assert_allclose(augmented.image, view.image(1), atol=1e-4)
    assert augmented.inside.all()
    assert len(augmented.kept) == len(view.keypoints(1))
    maps = equivariance_maps(view, 1, (20.0, 30.0), augmented, 3)
    assert maps.point == (20.0, 30.0)
    assert maps.error == pytest.approx(0, abs=1e-5)
    for found in equivariance_errors(view, 1, num_points=4, augment=STILL):
        assert found.error == pytest.approx(0, abs=1e-5)
        assert found.chance > 1e-4
        assert found.num_points == 8


def test_a_convolution_is_equivariant_to_a_shift():
    # Two 3x3 convolutions see two pixels far, and so far what was beyond the edge makes a difference.
    view = VolumeView(Explorer.untrained(tiny_recipe("unet")), heart(shape=(3, 48, 64)))
    augmented = moved(view, 1, offset=(5.0, -3.0))  # out (y, x) reads (y + 5, x - 3)
    maps = equivariance_maps(view, 1, (20.0, 30.0), augmented, 1)
    assert maps.point == (15.0, 33.0)
    np.testing.assert_allclose(maps.computed[2:41, 5:62], maps.carried[2:41, 5:62], atol=1e-5)
    assert np.abs(maps.computed - maps.carried)[43:].max() > 1e-3
    assert not augmented.inside[43:].any()
    assert augmented.inside[:43, 3:].all()
    expected = np.abs(maps.computed - maps.carried)[:43, 3:].mean()
    assert maps.error == pytest.approx(expected, rel=1e-5)


def test_the_carried_map_is_the_map_carried(view):
    augmented = moved(view, 1, matrix=((-1.0, 0.0), (0.0, 1.0)), offset=(47.0, 0.0))  # upside down
    point = (10.0, 20.0)
    maps = equivariance_maps(view, 1, point, augmented, 1)
    assert maps.point == (37.0, 20.0)
    cells = similarity_maps(view, 1, point, levels=[1])[0].cells.numpy()
    np.testing.assert_allclose(maps.carried, cells[::-1], atol=1e-5)
    np.testing.assert_allclose(augmented.image, view.image(1)[::-1], atol=1e-5)
    positions = view.keypoints(1).positions[augmented.kept]
    np.testing.assert_allclose(augmented.features.keypoints[:, 0], 47 - positions[:, 0], atol=1e-4)


def test_a_point_that_left_has_no_map(view):
    assert equivariance_maps(view, 1, (2.0, 30.0), moved(view, 1, offset=(5.0, 0.0)), 2) is None


def test_a_network_that_finds_everything_alike_is_no_better_than_chance():
    view = VolumeView(Explorer.untrained(tiny_recipe("unet")), constant())
    flat = equivariance_errors(view, 0, num_points=4, seed=1)[0]
    assert flat.error < 0.2
    assert EquivarianceError(1, 0.02, 0.02, 8).relative == 1
    assert np.isnan(EquivarianceError(1, 0.0, 0.0, 8).relative)


def test_errors_are_those_of_the_seed_and_a_mean_of_the_single_ones(view):
    first, again, other = (
        equivariance_errors(view, 1, num_points=5, seed=seed, levels=[3])[0] for seed in (1, 1, 2)
    )
    assert first == again
    assert first.error != other.error
    from kaf_model.engine import generator_for

    points = torch.rand(5, 2, generator=generator_for(1, 1, 8)).double().numpy() * view.shape - 0.5
    augmentations = [augment_slice(view, 1, seed=seed) for seed in (2, 3)]
    errors, chances = [], []
    for augmented in augmentations:
        maps = [equivariance_maps(view, 1, point, augmented, 3) for point in points]
        present = [found for found in maps if found is not None]
        errors += [found.error for found in present]
        for found, another in zip(present, [*present[1:], present[0]], strict=True):
            chances.append(np.abs(found.computed - another.carried)[augmented.inside].mean())
    assert first.num_points == len(errors)
    assert first.error == pytest.approx(np.mean(errors), rel=1e-4)
    assert first.chance == pytest.approx(np.mean(chances), rel=1e-4)
    assert 0 < first.relative < 2


def test_too_few_points_are_refused(view):
    with pytest.raises(ValueError, match="at least 2"):
        equivariance_errors(view, 1, num_points=1)
