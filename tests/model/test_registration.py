"""Registration: images that are moved by a known map are found again, and what cannot be seen costs nothing."""

import numpy as np
import pytest
import torch
from atlas_cases import done
from scipy.ndimage import affine_transform, gaussian_filter

from kaf_model import registration
from kaf_model.registration import Picture, exponential, register, sampled, windowed

SHAPE = (24, 36, 30)


def ball(centre, radius):
    at = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"), -1)
    return np.linalg.norm(at - np.array(centre), axis=-1) <= radius


def texture(seed=0):
    values = gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 2.0)
    return (values / values.std()).astype(np.float32)


def picture(array, spacing=(1.0, 1.0, 1.0)):
    return Picture(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)), spacing)


def smooth_velocity(largest):
    velocity = torch.from_numpy(np.stack([gaussian_filter(texture(seed), 3) for seed in (5, 6, 7)]))
    return velocity * largest / velocity.abs().max()


def carried(structure, found, shape=SHAPE):
    there = np.zeros(shape, bool)
    seen = sampled(torch.from_numpy(structure).float()[None], found.points, beyond="zeros")[0]
    there[found.box] = (seen > 0.5).numpy()
    return there


def dice(one, two):
    return 2 * (one & two).sum() / (one.sum() + two.sum())


def test_maps_are_read_between_voxels_and_go_on_beyond_their_borders():
    maps = torch.arange(24.0).reshape(1, 2, 3, 4)
    points = torch.tensor([[[[0.0, 1.0, 2.5], [0.5, 0.0, 0.0], [-3.0, 0.0, 9.0]]]])
    assert torch.allclose(sampled(maps, points).flatten(), torch.tensor([6.5, 6.0, 3.0]))
    assert torch.allclose(sampled(maps, points, beyond="zeros").flatten(), torch.tensor([6.5, 6.0, 0.0]))


@pytest.mark.parametrize("sizes", [(3, 5, 1), (1, 1, 1), (5, 3, 7)])
def test_windows_average_what_lies_within_the_maps(sizes):
    values = torch.rand(2, 6, 7, 8)
    got = windowed(values, sizes)
    for at in ((0, 0, 0), (3, 3, 4), (5, 6, 7)):
        near = tuple(
            slice(max(n - size // 2, 0), n + size // 2 + 1) for n, size in zip(at, sizes, strict=True)
        )
        assert got[(slice(None), *at)].tolist() == pytest.approx(
            values[(slice(None), *near)].mean((1, 2, 3)).tolist()
        )
    every = tuple(slice(None, None, 2 if size > 2 else 1) for size in sizes)
    assert torch.allclose(windowed(values, sizes, stride=2), got[(slice(None), *every)])


def test_a_velocity_and_its_opposite_undo_each_other():
    velocity = smooth_velocity(2.5)
    forth, back = exponential(velocity), exponential(-velocity)
    at = registration._voxels(SHAPE, velocity.device)
    left = forth + sampled(back, at + forth.permute(1, 2, 3, 0))
    inner = (slice(None), slice(6, -6), slice(6, -6), slice(6, -6))
    assert forth[inner].abs().max() > 1.4
    assert left[inner].abs().max() < 0.15


def test_a_constant_velocity_is_a_translation():
    velocity = torch.tensor([1.0, -2.0, 0.5])[:, None, None, None].expand(3, *SHAPE)
    assert torch.allclose(exponential(velocity), velocity, atol=1e-5)


def test_the_likeness_is_one_for_a_linear_change_of_intensities_and_low_for_another_image():
    fixed = torch.from_numpy(texture(0))
    likeness = registration._Likeness(fixed, (5, 5, 5))
    assert likeness(3 * fixed - 1).min() > 0.99
    assert likeness(-fixed).min() > 0.99
    assert likeness(torch.from_numpy(texture(1))).mean() < 0.3


def test_a_turned_shifted_and_brighter_image_is_found():
    moving, structure = texture(), ball((12, 18, 15), 6)
    angle = np.deg2rad(12)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    offset = np.array([12, 18, 15]) - turn @ np.array([11.0, 19.5, 13.0])
    fixed = affine_transform(moving, turn, offset, order=1, mode="nearest")
    truth = affine_transform(structure.astype(float), turn, offset, order=1) > 0.5
    found = done(register(picture(moving), torch.from_numpy(structure), picture(2 * fixed + 1)))
    assert dice(structure, truth) < 0.85
    assert dice(carried(structure, found), truth) > 0.95
    assert found.likeness.median() > 0.9


def test_a_bent_image_is_found():
    moving, structure = texture(), ball((12, 18, 15), 6)
    bent = exponential(smooth_velocity(4))
    points = registration._voxels(SHAPE, bent.device) + bent.permute(1, 2, 3, 0)
    fixed = sampled(torch.from_numpy(moving)[None], points)[0].numpy()
    truth = (sampled(torch.from_numpy(structure).float()[None], points)[0] > 0.5).numpy()
    found = done(register(picture(moving), torch.from_numpy(structure), picture(fixed)))
    assert dice(structure, truth) < 0.85
    assert dice(carried(structure, found), truth) > 0.93


def test_spacings_may_differ():
    """The fixed image has thicker slices than the moving one."""
    moving, structure = texture(), ball((12, 18, 15), 6)
    fixed = gaussian_filter(moving, 0.5)[::2]
    truth = structure[::2]
    found = done(register(picture(moving), torch.from_numpy(structure), picture(fixed, (2.0, 1.0, 1.0))))
    assert dice(carried(structure, found, fixed.shape), truth) > 0.93


def test_large_structures_are_compared_more_coarsely(monkeypatch):
    moving, structure = texture(), ball((12, 18, 15), 6)
    unit = registration._unit(picture(moving), torch.from_numpy(structure), picture(moving))
    assert unit == 1
    monkeypatch.setattr(registration, "MOST_VOXELS", 1000)
    assert registration._unit(picture(moving), torch.from_numpy(structure), picture(moving)) > 2
    fixed = np.roll(moving, 2, axis=1)
    found = done(register(picture(moving), torch.from_numpy(structure), picture(fixed)))
    assert dice(carried(structure, found), np.roll(structure, 2, axis=1)) > 0.9


def test_a_structure_that_ends_with_its_image_does_not_go_on_beyond():
    """The moving image is a part of the fixed one, and its border cuts the structure."""
    fixed, structure = texture(), ball((12, 18, 15), 7)
    found = done(register(picture(fixed[:, :20]), torch.from_numpy(structure[:, :20]), picture(fixed)))
    there = carried(structure[:, :20], found)
    assert 0.7 < there.sum() / structure[:, :20].sum() < 1.2


def test_without_a_structure_nothing_is_looked_for():
    work = register(picture(texture()), torch.zeros(SHAPE, dtype=torch.bool), picture(texture(1)))
    assert done(work) is None


@pytest.mark.parametrize("shape", [(1, 36, 30), (2, 3, 30), (24, 1, 1)])
def test_flat_and_constant_images_do_no_harm(shape):
    structure = torch.from_numpy(ball((12, 18, 15), 6))
    found = done(register(picture(texture()), structure, picture(np.zeros(shape))))
    if found is not None:
        assert torch.isfinite(found.points).all()
        assert torch.isfinite(found.likeness).all()


def test_it_pauses_often_enough_to_be_stopped():
    work = register(picture(texture()), torch.from_numpy(ball((12, 18, 15), 6)), picture(texture()))
    assert sum(1 for _ in work) > 15
    work = register(picture(texture()), torch.from_numpy(ball((12, 18, 15), 6)), picture(texture()))
    next(work)
    work.close()
