"""Slices: resampling there and back, points beside images, normalisation."""

import numpy as np
import pytest
import torch

from kaf_model.config import SliceConfig
from kaf_model.slices import (
    Intensities,
    Slices,
    crop_to,
    likeliest,
    middle_slice,
    pad_to_multiple,
    with_context,
)
from kaf_model.volume import Volume


def blob(shape, centre, radius):
    """A filled ellipse (Y, X)."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return ((rows - centre[0]) / radius[0]) ** 2 + ((columns - centre[1]) / radius[1]) ** 2 <= 1


def volume(spacing=(8.0, 1.0, 1.3), shape=(3, 96, 128), seed=0):
    array = np.random.default_rng(seed).normal(100, 20, size=shape).astype(np.float32)
    return Volume.from_array(array, spacing)


def dice(first, second):
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def test_shapes_and_spacing_follow_the_target():
    slices = Slices(volume(), SliceConfig(spacing=1.5))
    assert slices.num_slices == 3
    assert slices.shape == (64, 111)  # 96 mm / 1.5, 166.4 mm / 1.5
    assert np.allclose(slices.spacing, (1.5, 166.4 / 111))
    assert slices.positions.tolist() == [0.0, 0.5, 1.0]
    assert slices.images([2, 0]).shape == (2, 64, 111)
    assert slices.images([]).shape == (0, 64, 111)
    assert slices.images(range(3)).dtype == np.float32


@pytest.mark.parametrize(
    ("thickness", "step", "expected"),
    [
        (
            8.0,
            None,
            [[0, 0, 0, 1, 2], [1, 2, 3, 4, 5], [4, 5, 6, 6, 6]],
        ),  # the next ones, whatever their distance
        (1.0, 2.0, [[0, 0, 0, 2, 4], [0, 1, 3, 5, 6], [2, 4, 6, 6, 6]]),
        (1.0, 1.5, [[0, 0, 0, 2, 3], [0, 1, 3, 5, 6], [3, 4, 6, 6, 6]]),
        (5.0, 2.0, [[0, 0, 0, 0, 1], [2, 3, 3, 3, 4], [5, 6, 6, 6, 6]]),  # 4 mm is nearer to 5 than to 0
        (5.0, 1.0, [[0] * 5, [3] * 5, [6] * 5]),
    ],
)
def test_slices_are_read_with_those_at_their_distance(thickness, step, expected):
    one = Volume.from_array(np.arange(7.0)[:, None, None] + np.zeros((7, 4, 6)), (thickness, 1, 1))
    config = SliceConfig(spacing=None, clip_percentiles=(0, 100), context=2, context_step=step)
    stack = Slices(one, config)
    inputs = stack.inputs([0, 3, 6])
    assert inputs.shape == (3, 5, 4, 6)
    read = inputs[:, :, 2, 3] * stack.intensities.std + stack.intensities.mean
    assert np.allclose(read, expected)
    assert np.array_equal(middle_slice(inputs), stack.images([0, 3, 6]))


def test_without_context_a_slice_is_read_alone():
    for config in (SliceConfig(), SliceConfig(context=0), SliceConfig(context=0, context_step=2.0)):
        stack = Slices(volume(), config)
        assert config.input_slices == 1
        assert np.array_equal(stack.inputs([2, 0])[:, 0], stack.images([2, 0]))
        assert stack.inputs([]).shape == (0, 1, *stack.shape)
    with pytest.raises(ValueError, match=r"slices of .* are 0 to 2, got 3"):
        Slices(volume(), SliceConfig(context=1)).inputs([3])


def test_near_slices_are_read_together_unless_it_is_said():
    near, far = volume(spacing=(1.0, 1.0, 1.0)), volume(spacing=(8.0, 1.0, 1.0))
    auto = SliceConfig(spacing=None)
    assert with_context(auto, [near], 8) == auto.override(context=2, context_step=1.0)
    assert with_context(auto, [near, far], 8) == with_context(auto, [far], 8) == auto.override(context=0)
    assert with_context(SliceConfig(spacing=1.6), [near], 8).context_step == 1.0
    thick = volume(spacing=(2.0, 1.0, 1.0))
    assert with_context(auto, [near, thick], 8) == auto.override(context=2, context_step=2.0)
    assert with_context(auto.override(context=0), [near], 8) == auto.override(context=0)
    single = volume(spacing=(1.0, 1.0, 1.0), shape=(1, 96, 128))
    assert with_context(auto, [single], 8) == auto.override(context=0)
    assert with_context(auto, [single, near], 8).context == 2
    assert with_context(auto, [near], 7) == auto.override(context=0)
    asked = auto.override(context=1)
    assert with_context(asked, [far], 8) == asked.override(context_step=8.0)
    exact = auto.override(context=1, context_step=3.0)
    assert with_context(exact, [near], 8) == exact


def test_nothing_is_resampled_without_a_target_or_at_the_target():
    for config in (SliceConfig(spacing=None), SliceConfig(spacing=1.0)):
        slices = Slices(volume(spacing=(8.0, 1.0, 1.0)), config)
        assert slices.shape == (96, 128)
        maps = torch.randn(3, 2, 96, 128, dtype=torch.bfloat16)
        assert slices.to_source(maps) is maps
        use = slices.intensities
        expected = (np.clip(slices.volume.array, use.low, use.high) - use.mean) / use.std
        assert np.allclose(slices.images(range(3)), expected, atol=1e-5)
    assert Slices(volume(), SliceConfig(spacing=None)).shape == (96, 128)


def test_the_volume_is_left_as_it_was():
    one = volume()
    before = one.array.copy()
    Slices(one, SliceConfig(spacing=None)).images([0, 1])
    assert np.array_equal(one.array, before)


@pytest.mark.parametrize("target", [0.6, 1.0, 1.5])
def test_a_label_comes_back_where_it_was(target):
    slices = Slices(volume(), SliceConfig(spacing=target))
    truth = blob((96, 128), (40, 70), (22, 30))
    labels = np.where(np.stack([truth] * 3), 7, -2)
    resampled = slices.labels(labels, [1])
    assert resampled.dtype == np.int64
    assert resampled.shape == (1, *slices.shape)
    assert set(np.unique(resampled)) == {-2, 7}
    maps = torch.from_numpy(np.stack([resampled != 7, resampled == 7], axis=1)).float()
    back = slices.to_source(maps)
    assert back.shape == (1, 2, 96, 128)
    assert dice(back.argmax(1)[0].bool().numpy(), truth) > 0.98


def test_labels_without_resampling_are_exact():
    slices = Slices(volume(spacing=(5, 1.5, 1.5)), SliceConfig(spacing=1.5))
    labels = np.random.default_rng(0).integers(-5, 300, size=(3, 96, 128)).astype(np.int16)
    assert np.array_equal(slices.labels(labels, range(3)), labels)


def test_labels_take_the_nearest_voxel():
    slices = Slices(volume(spacing=(5, 1.0, 1.0), shape=(1, 4, 6)), SliceConfig(spacing=2.0))
    labels = np.arange(24).reshape(1, 4, 6)
    reference = [
        [labels[0, int(np.floor(2 * y + 1)), int(np.floor(2 * x + 1))] for x in range(3)] for y in (0, 1)
    ]
    assert slices.labels(labels, [0])[0].tolist() == reference


@pytest.mark.parametrize("target", [0.5, 0.8, 2.3])
def test_a_bright_dot_lands_where_its_point_does(target):
    rows, columns = np.mgrid[:96, :128]
    dot = np.array([37.0, 81.5])
    image = 1000 * np.exp(-((rows - dot[0]) ** 2 + (columns - dot[1]) ** 2) / (2 * 5.0**2))
    one = Volume.from_array(image[None].astype(np.float32), (5, 1.0, 1.3))
    slices = Slices(one, SliceConfig(spacing=target, clip_percentiles=(0, 100)))
    found = centre(slices.images([0])[0])
    assert np.allclose(slices.points_from_source(dot[None])[0], found, atol=0.02)
    assert np.allclose(slices.points_to_source(torch.tensor(found)), dot, atol=0.02)
    raised = torch.from_numpy(slices.images([0]))[None]
    assert np.allclose(centre(slices.to_source(raised)[0, 0].numpy()), dot, atol=0.02)


def centre(image):
    weight = image - image.min()
    weight = np.where(weight > 0.05 * weight.max(), weight, 0)
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    return np.array([(weight * rows).sum(), (weight * columns).sum()]) / weight.sum()


def test_normalised_slices_have_mean_0_and_deviation_1():
    images = Slices(volume(), SliceConfig(spacing=None)).images(range(3))
    assert abs(images.mean()) < 1e-4
    assert abs(images.std() - 1) < 1e-4


def test_percentiles_of_a_known_ramp():
    use = Intensities.of(np.arange(101, dtype=np.int16).reshape(1, 1, 101), (10.0, 90.0))
    assert (use.low, use.high, use.mean) == (10.0, 90.0, 50.0)
    assert use.std == pytest.approx(np.clip(np.arange(101.0), 10, 90).std())


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float32])
def test_a_constant_volume_becomes_zero(dtype):
    one = Volume.from_array(np.full((2, 48, 64), 100, dtype=dtype), (5, 1, 1))
    assert not Slices(one, SliceConfig()).images([0, 1]).any()


def test_a_nearly_constant_volume_keeps_what_it_shows():
    array = np.zeros((2, 48, 64), dtype=np.int16)
    array[0, 10, 10] = 50
    images = Slices(Volume.from_array(array, (5, 1, 1)), SliceConfig(spacing=None)).images([0])
    assert np.isfinite(images).all()
    assert images[0, 10, 10] > 10


def test_a_large_volume_is_sampled_the_same_way_every_time():
    ramp = np.linspace(-1000, 2000, 600, dtype=np.int16)
    array = np.broadcast_to(ramp[:, None, None], (600, 512, 512))
    use = Intensities.of(array, (1.0, 99.0))
    assert use == Intensities.of(array, (1.0, 99.0))
    exact = np.percentile(ramp, (1, 99))
    assert np.allclose((use.low, use.high), exact, atol=5)


def test_a_flat_image_is_a_volume_of_one_slice():
    one = Volume.from_array(np.random.default_rng(0).normal(size=(48, 64)), (1.0, 1.0, 1.0))
    slices = Slices(one, SliceConfig(spacing=2.0))
    assert slices.images([0]).shape == (1, 24, 32)
    assert slices.positions.tolist() == [0.5]


def test_wrong_requests_are_answered():
    slices = Slices(volume(), SliceConfig(spacing=1.5))
    with pytest.raises(ValueError, match="slices of array are 0 to 2, got 3, -1"):
        slices.images([0, 3, -1])
    with pytest.raises(ValueError, match=r"= \(3, 96, 128\), got int64 \(3, 96, 12\)"):
        slices.labels(np.zeros((3, 96, 12), dtype=np.int64), [0])
    with pytest.raises(ValueError, match="must be integers"):
        slices.labels(np.zeros((3, 96, 128)), [0])
    with pytest.raises(ValueError, match=r"\(64, 111\), got \(1, 2, 64, 112\)"):
        slices.to_source(torch.zeros(1, 2, 64, 112))


def test_padding_repeats_the_bottom_and_right_edge_and_comes_off():
    maps = torch.arange(2 * 3 * 5.0).reshape(1, 2, 3, 5)
    padded = pad_to_multiple(maps, 4)
    assert padded.shape == (1, 2, 4, 8)
    assert torch.equal(crop_to(padded, (3, 5)), maps)
    assert padded[0, 0].tolist() == [
        [0, 1, 2, 3, 4, 4, 4, 4],
        [5, 6, 7, 8, 9, 9, 9, 9],
        [10, 11, 12, 13, 14, 14, 14, 14],
        [10, 11, 12, 13, 14, 14, 14, 14],
    ]
    assert pad_to_multiple(padded, 4) is padded
    with pytest.raises(ValueError, match="cannot crop"):
        crop_to(maps, (4, 5))


def test_the_first_of_the_likeliest_channels_is_taken():
    maps = torch.rand(2, 3, 5, 7, 6)
    maps[:, :, 2] = maps[:, :, 0]
    assert np.array_equal(likeliest(maps), maps.numpy().argmax(2))
    assert np.array_equal(likeliest(maps[0, 0]), maps[0, 0].numpy().argmax(0))
