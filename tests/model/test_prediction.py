"""Slices turned for the network and back, and the angle at which it contradicts itself least."""

import numpy as np
import pytest
import torch

from kaf_model.prediction import STEP, angles_at, best_angle, predict_slices, sampled

CPU = torch.device("cpu")


class Pixelwise:
    """A network's stand-in: class 1 where a pixel is bright; remembers what it was shown."""

    def __call__(self, images, positions, valid):
        self.images, self.positions, self.valid = images, positions, valid
        return torch.cat([-images, images], dim=1)


class Upright(Pixelwise):
    """Knows the bright half of a slice while that lies about on top; else it takes the left quarter for it."""

    def __call__(self, images, positions, valid):
        height, width = images.shape[2:]
        if images[:, :, : height // 4].mean() < images[:, :, -height // 4 :].mean() + 0.9:
            images = torch.where(torch.arange(width) < width / 4, 1.0, -1.0).expand_as(images)
        return super().__call__(images, positions, valid)


def smooth_slices(count=2, shape=(40, 60)):
    """Slices that are black at the edges, so that nothing is repeated."""
    y, x = np.mgrid[: shape[0], : shape[1]] / np.array(shape).reshape(2, 1, 1)
    window = np.sin(np.pi * y) * np.sin(np.pi * x)
    waves = [np.cos(3 * y + number) * np.sin(4 * x + number) for number in range(count)]
    return (window * np.stack(waves)).astype(np.float32)[:, None]


def nothing(images):
    return [np.zeros((0, 2), np.float32)] * len(images)


def test_padding_for_the_network_is_cut_off_again():
    images = np.random.default_rng(0).normal(size=(1, 1, 45, 61)).astype(np.float32)
    network = Pixelwise()
    maps = predict_slices(network, images, nothing(images), CPU)
    assert network.images.shape == (1, 1, 48, 64)
    assert torch.equal(maps, torch.from_numpy(np.concatenate([-images, images], 1)).softmax(1))


@pytest.mark.parametrize("angle", [90, 180, 270, -90, 450])
@pytest.mark.parametrize("shape", [(48, 48), (32, 48)])
def test_right_angles_are_exact(angle, shape):
    images = np.random.default_rng(0).normal(size=(2, 1, *shape)).astype(np.float32)
    network = Pixelwise()
    maps = predict_slices(network, images, nothing(images), CPU, angles=[angle])
    clockwise = torch.from_numpy(np.rot90(images, -angle // 90, axes=(2, 3)).copy())
    torch.testing.assert_close(network.images, clockwise, atol=1e-4, rtol=0)
    torch.testing.assert_close(maps, predict_slices(network, images, nothing(images), CPU), atol=1e-4, rtol=0)


@pytest.mark.parametrize("angle", [30, 77, -150])
def test_what_is_turned_comes_back(angle):
    images = smooth_slices()
    network = Pixelwise()
    maps = predict_slices(network, images, nothing(images), CPU, angles=[angle])
    height, width = network.images.shape[2:]
    assert height % 16 == width % 16 == 0
    assert min(height, width) > 40  # nothing is cut off
    expected = predict_slices(network, images, nothing(images), CPU)
    assert (maps - expected).abs().max() < 0.01
    assert (maps.sum(1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("angle", [0, 60, 90, -140])
def test_keypoints_turn_with_their_slice(angle):
    images = smooth_slices()
    points = np.array([[20.0, 30.0], [12.25, 40.5], [30.0, 11.0]], np.float32)
    network = Pixelwise()
    predict_slices(network, images, [points, points[:1]], CPU, angles=[angle])
    assert network.valid.tolist() == [[True] * 3, [True, False, False]]
    turned = network.images[0, 0]
    for (y, x), (turned_y, turned_x) in zip(points, network.positions[0].tolist(), strict=True):
        there = torch.tensor(images[0])[None], turned[None, None]
        values = []
        for picture, (row, column) in zip(there, ((y, x), (turned_y, turned_x)), strict=True):
            high, wide = picture.shape[2:]
            at = torch.tensor([(2 * column + 1) / wide - 1, (2 * row + 1) / high - 1]).view(1, 1, 1, 2)
            values.append(torch.nn.functional.grid_sample(picture, at.float(), align_corners=False).item())
        assert values[0] == pytest.approx(values[1], abs=0.01)


def test_copies_are_averaged():
    images = smooth_slices()
    network = Pixelwise()
    parts = [predict_slices(network, images, nothing(images), CPU, angles=[a]) for a in (0, 30, -30)]
    together = predict_slices(network, images, nothing(images), CPU, angles=[0, 30, -30])
    torch.testing.assert_close(together, torch.stack(parts).mean(0))


def chosen(predict):
    """The angle that is found, and how many were tried."""
    work, reports = best_angle(predict), []
    while True:
        try:
            reports.append(next(work))
        except StopIteration as done:
            assert reports == [(tried, 12) for tried in range(1, len(reports) + 1)]
            return done.value, len(reports)


def half_bright(angle=0):
    """A slice whose upper half is bright, turned clockwise."""
    y, x = np.mgrid[:48, :48] - 23.5
    up = np.cos(np.radians(angle)) * -y + np.sin(np.radians(angle)) * x
    return np.where(up > 0, 1.0, -1.0).astype(np.float32)[None, None]


@pytest.mark.parametrize("lies", [120, 150, 180, 210, 240])
def test_an_angle_at_which_the_network_knows_slices_is_found(lies):
    images = half_bright(lies)

    def predict(angle):
        return [predict_slices(Upright(), images, nothing(images), CPU, angles=[angle])]

    angle, tried = chosen(predict)
    assert abs(angle + lies - 360) <= 60  # anywhere there it knows the slice
    assert tried == 12


def test_where_slices_as_they_lie_will_do_no_other_angle_is_tried():
    images = half_bright(0)

    def predict(angle):
        return [predict_slices(Upright(), images, nothing(images), CPU, angles=[angle])]

    assert chosen(predict) == (0, 3)


def maps_of(*spans):
    """Maps (1, K, 8, 40) of structures, one a row, each from one column to another."""
    maps = torch.zeros(1, 1 + len(spans), 8, 40)
    for row, (start, stop) in enumerate(spans):
        maps[0, 1 + row, row, start:stop] = 1
    maps[:, 0] = 1 - maps[:, 1:].sum(1)
    return maps


NOTHING = (0, 0)


def at_angles(starts):
    """What is found at angles: a structure of 20 pixels that begins where it is told, or else nothing."""
    return lambda angle: [maps_of((starts[angle], starts[angle] + 20) if angle in starts else NOTHING)]


def test_for_a_little_more_agreement_slices_stay_as_they_lie():
    little = {0: 0, 30: 5, 330: 5, 150: 0, 180: 5, 210: 1}  # Dice 0.75 about 0, 0.775 about 180
    assert chosen(at_angles(little)) == (0, 12)
    assert chosen(at_angles(little | {150: 4})) == (180, 12)  # 0.875


def test_every_structure_counts_as_much_and_parts_count_together():
    def predict(angle):
        shift = int(angle // 30 % 2)
        if angle in (90, 120, 150):  # Dice 0.6 and 1
            maps = maps_of((4 * shift, 4 * shift + 10), (0, 3))
        else:  # 0.9 and 0
            maps = maps_of((3 * shift, 3 * shift + 30), (3 * shift, 3 * shift + 3))
        return [maps[:, :, :1], maps[:, :, 1:]]

    assert chosen(predict) == (120, 12)


def test_structures_that_are_not_found_count_as_not_agreed():
    def predict(angle):
        return [maps_of((0, 10), (0, 10) if angle in (90, 120, 150) else NOTHING)]

    assert chosen(predict) == (120, 12)


def test_where_nothing_is_found_slices_stay_as_they_lie():
    assert chosen(lambda angle: [maps_of(NOTHING, NOTHING)]) == (0, 12)


def test_angles_of_an_orientation():
    assert angles_at(120, "best") == (120,)
    assert sorted(angles_at(120, "average")) == [120 - STEP, 120, 120 + STEP]


@pytest.mark.parametrize(
    ("count", "places"),
    [
        (1, [0]),
        (3, [0, 1, 2]),
        (4, [1, 2, 3]),
        (9, [2, 4, 6]),
        (600, [150, 300, 450]),
    ],
)
def test_the_slices_that_are_looked_at(count, places):
    assert sampled(count) == places
