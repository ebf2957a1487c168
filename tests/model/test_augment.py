"""Spatial augmentation: image, labels and points must move by one map."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from kaf_model.augment import SpatialDraws, SpatialTransform
from kaf_model.config import AugmentConfig
from kaf_model.elastic import MAX_COMPRESSION

STILL = {"rotation": 0, "scale": (1, 1), "elastic_alpha": (0, 0)}
CONFIGS = {
    "crop only": AugmentConfig.preset("none", crop=(40, 56)),
    "mirror": AugmentConfig(crop=(40, 56), spatial_probability=1, mirror=True, **STILL),
    "affine": AugmentConfig(crop=(40, 56), spatial_probability=1, rotation=180, elastic_alpha=(0, 0)),
    "elastic": AugmentConfig(
        crop=(72, 96),
        spatial_probability=1,
        **STILL | {"elastic_alpha": (350, 350), "elastic_sigma": (14, 14)},
    ),
    "everything": AugmentConfig.preset("paper", crop=(72, 96), spatial_probability=1),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
SIZES = torch.tensor([[96, 128], [80, 128], [96, 70], [48, 64]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(
    config: AugmentConfig, sizes: Tensor = SIZES, seed: int = 0, **options: object
) -> SpatialTransform:
    return SpatialTransform.sample(config, sizes, generator=generator(seed), **options)


def scattered(sizes: Tensor, num_points: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Points anywhere on slices of the given sizes, all valid."""
    positions = torch.rand(len(sizes), num_points, 2, generator=generator(seed)) * (sizes[:, None] - 1)
    return positions, torch.ones(len(sizes), num_points, dtype=torch.bool)


def searched_inverse(coordinates: np.ndarray, point: np.ndarray) -> tuple[np.ndarray, float]:
    """The output position, on a lattice of 0.04 px, that is read nearest to an input point, and how near."""
    distance = np.hypot(*(coordinates - point[:, None, None]))
    nearest = np.unravel_index(distance.argmin(), distance.shape)
    window = np.arange(-75, 76) * 0.04
    lattice = np.stack(np.meshgrid(nearest[0] + window, nearest[1] + window, indexing="ij"))
    lattice = lattice.reshape(2, -1)
    last = np.array(coordinates.shape[1:])[:, None] - 1
    lattice = lattice[:, ((lattice >= 0) & (lattice <= last)).all(axis=0)]
    read = np.stack([ndimage.map_coordinates(axis, lattice, order=1) for axis in coordinates])
    distance = np.hypot(*(read - point[:, None]))
    return lattice[:, distance.argmin()], distance.min()


# --- points ---


@every_config
@pytest.mark.parametrize("seed", [0, 1])
def test_points_agree_with_a_dense_numeric_inverse(config: AugmentConfig, seed: int) -> None:
    transform = sample(config, seed=seed)
    positions, valid = scattered(SIZES, 12)
    moved, kept = transform.points(positions, valid)
    coordinates = transform.coordinates.double().numpy()
    for b, n in np.ndindex(*valid.shape):
        expected, miss = searched_inverse(coordinates[b], positions[b, n].double().numpy())
        if kept[b, n]:
            assert np.hypot(*(moved[b, n].numpy() - expected)) < 0.1
        else:  # nothing reads it, but for a point that falls onto the very border
            last = np.array(config.crop) - 1
            assert miss > 0.02 or min(*expected, *(last - expected)) < 0.1
    assert kept.any()


@every_config
def test_points_there_and_back(config: AugmentConfig) -> None:
    sizes = torch.tensor([[96, 128]]).repeat(32, 1)
    transform = sample(config, sizes, seed=2)
    last = torch.tensor(config.crop) - 1
    outputs = torch.rand(32, 200, 2, generator=generator(3)) * last
    inputs, kept = transform.inverse_points(outputs, torch.ones(32, 200, dtype=torch.bool))
    back, returned = transform.points(inputs, kept)
    assert torch.equal(returned, kept)
    assert kept.float().mean() > 0.5
    torch.testing.assert_close(back[kept], outputs[kept], atol=1e-3, rtol=0)


@pytest.mark.parametrize("strength", [{"elastic_alpha": (350, 350)}, {"elastic_alpha": (5000, 5000)}])
def test_no_point_is_lost_to_a_strong_displacement(strength: dict[str, object]) -> None:
    config = CONFIGS["elastic"].override(**strength)
    transform = sample(config, torch.tensor([[200, 200]]).repeat(64, 1))
    last = torch.tensor(config.crop) - 1
    outputs = torch.rand(64, 300, 2, generator=generator(3)) * last
    inputs, kept = transform.inverse_points(outputs, torch.ones(64, 300, dtype=torch.bool))
    back, returned = transform.points(inputs, kept)
    assert kept.sum() > 0.9 * kept.numel()
    assert torch.equal(returned, kept)
    torch.testing.assert_close(back[kept], outputs[kept], atol=1e-3, rtol=0)


@every_config
def test_points_agree_with_the_index_map_of_the_paper(config: AugmentConfig) -> None:
    transform = sample(config, seed=4)
    rows, columns = torch.meshgrid(torch.arange(4, 48, 8), torch.arange(4, 64, 8), indexing="ij")
    positions = torch.stack([rows, columns], dim=-1).view(1, -1, 2).expand(4, -1, 2)
    index_map = torch.zeros(4, 96, 128, dtype=torch.int64)
    index_map[:, positions[0, :, 0], positions[0, :, 1]] = torch.arange(1, positions.shape[1] + 1)
    warped = transform.labels(index_map, outside=0)
    moved, kept = transform.points(positions.float(), torch.ones(positions.shape[:2], dtype=torch.bool))
    last = torch.tensor(config.crop) - 1
    compared = 0
    for b, n in np.ndindex(*kept.shape):
        pixels = (warped[b] == n + 1).nonzero().float()
        if not len(pixels):
            continue
        if (pixels == 0).any() or (pixels == last).any():  # cut by the border: the mean is not the middle
            continue
        assert kept[b, n]
        assert (pixels.mean(dim=0) - moved[b, n]).norm() < 1
        compared += 1
    assert compared > 20


@every_config
def test_a_bright_dot_lands_on_its_point(config: AugmentConfig) -> None:
    transform = sample(config, seed=5)
    positions = torch.tensor([[20.3, 30.6], [35.0, 40.5], [24.5, 20.2], [26.8, 33.3]])[:, None]
    rows, columns = torch.arange(96.0)[:, None], torch.arange(128.0)
    y, x = positions[..., 0, None], positions[..., 1, None]
    dots = torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * 1.5**2))[:, None]
    warped = transform.images(dots, padding_value=0.0)[:, 0]
    moved, kept = transform.points(positions, torch.ones(4, 1, dtype=torch.bool))
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in config.crop), indexing="ij"), dim=-1)
    seen = 0
    for image, point, valid in zip(warped, moved[:, 0], kept[:, 0], strict=True):
        from_border = torch.minimum(point, torch.tensor(config.crop) - 1 - point).min()
        if valid and from_border > 8:
            centroid = (image[..., None] * grid).sum(dim=(0, 1)) / image.sum()
            assert (centroid - point).norm() < 0.2
            seen += 1
    assert seen > 0


def test_points_that_leave_or_were_never_there_are_dropped() -> None:
    transform = sample(AugmentConfig.preset("none", crop=(4, 6)), torch.tensor([[8, 12]]), seed=1)
    top, left = transform.offset[0].tolist()
    positions = torch.tensor([[top, left], [top + 3, left + 5], [top - 1, left], [top, left + 6], [8.0, 3.0]])
    positions = torch.cat([positions, torch.tensor([[torch.nan, 1.0], [top + 1, left + 1]])])
    valid = torch.tensor([[True] * 6 + [False]])
    moved, kept = transform.points(positions[None], valid)
    assert kept.tolist() == [[True, True, False, False, False, False, False]]
    assert moved[0, :2].tolist() == [[0, 0], [3, 5]]
    assert (moved[0, 2:] == 0).all()


def test_points_on_the_padding_of_the_canvas_are_dropped() -> None:
    transform = sample(AugmentConfig.preset("none", crop=None), torch.tensor([[48, 64], [30, 40]]))
    positions = torch.tensor([[[29.0, 39.0], [31.0, 20.0]]]).expand(2, -1, -1)
    kept = transform.points(positions, torch.ones(2, 2, dtype=torch.bool))[1]
    assert kept.tolist() == [[True, True], [True, False]]


@every_config
def test_no_keypoints(config: AugmentConfig) -> None:
    transform = sample(config)
    none = torch.zeros(4, 0, 2), torch.zeros(4, 0, dtype=torch.bool)
    for move in (transform.points, transform.inverse_points):
        moved, kept = move(*none)
        assert moved.shape == (4, 0, 2)
        assert kept.shape == (4, 0)


@every_config
def test_points_move_alone_as_in_company(config: AugmentConfig) -> None:
    transform = sample(config)
    positions, valid = scattered(SIZES, 9)
    moved, kept = transform.points(positions, valid)
    order = torch.randperm(9, generator=generator())
    permuted, permuted_kept = transform.points(positions[:, order], valid[:, order])
    assert torch.equal(permuted_kept, kept[:, order])
    assert torch.equal(permuted, moved[:, order])
    alone, alone_kept = transform.select([2]).points(positions[2:3, :1], valid[2:3, :1])
    assert torch.equal(alone_kept, kept[2:3, :1])
    torch.testing.assert_close(alone, moved[2:3, :1], atol=1e-4, rtol=0)


# --- images and labels ---


@every_config
def test_images_and_labels_agree_with_a_plain_resampling(config: AugmentConfig) -> None:
    transform = sample(config, seed=6)
    images = torch.rand(4, 2, 96, 128, generator=generator())
    labels = torch.randint(0, 5, (4, 96, 128), generator=generator())
    warped, warped_labels = transform.images(images), transform.labels(labels, outside=-1)
    assert warped.shape == (4, 2, *config.crop)
    for b, (height, width) in enumerate(SIZES.tolist()):
        at = transform.coordinates[b].numpy()
        for channel in range(2):
            true = images[b, channel, :height, :width].numpy()
            expected = ndimage.map_coordinates(true, at, order=1, mode="nearest")
            np.testing.assert_allclose(warped[b, channel], expected, atol=2e-4)
        nearest = np.floor(at + 0.5).astype(int)
        inside = (nearest[0] >= 0) & (nearest[0] < height) & (nearest[1] >= 0) & (nearest[1] < width)
        expected = np.full(inside.shape, -1)
        expected[inside] = labels[b].numpy()[nearest[0][inside], nearest[1][inside]]
        np.testing.assert_array_equal(warped_labels[b], expected)


@every_config
def test_labels_and_images_show_the_same_place(config: AugmentConfig) -> None:
    transform = sample(config)
    for axis in (0, 1):  # a ramp: every step of it is an edge
        ramp = torch.arange(SIZES[:, axis].max())
        ramp = ramp.view(-1, 1) if axis == 0 else ramp
        ramp = ramp.expand(4, 96, 128)
        image, labels = transform.images(ramp[:, None].float())[:, 0], transform.labels(ramp, outside=-1)
        away = (image - labels).abs()[labels >= 0]
        assert away.max() <= 0.501
        assert (labels >= 0).any()


def test_crop_only_is_exactly_a_crop() -> None:
    images, labels = torch.rand(6, 1, 48, 64), torch.randint(0, 4, (6, 48, 64))
    transform = sample(AugmentConfig.preset("none", crop=(32, 40)), torch.tensor([[48, 64]]).repeat(6, 1))
    assert len(transform.offset.unique(dim=0)) > 3
    for b, (top, left) in enumerate(transform.offset.int().tolist()):
        part = (slice(top, top + 32), slice(left, left + 40))
        torch.testing.assert_close(transform.images(images)[b, 0], images[b, 0][part], atol=1e-4, rtol=0)
        assert torch.equal(transform.labels(labels, outside=-1)[b], labels[b][part])


def test_without_a_crop_the_canvas_comes_out() -> None:
    config = AugmentConfig.preset("none", crop=None)
    labels = torch.randint(0, 4, (2, 48, 64))
    sizes = torch.tensor([[48, 64], [48, 64]])
    assert torch.equal(sample(config, sizes).labels(labels, outside=-1), labels)
    assert sample(config, sizes, canvas=(64, 80)).labels(labels, outside=-1).shape == (2, 64, 80)


def test_a_slice_smaller_than_the_crop_lies_in_its_middle() -> None:
    transform = sample(AugmentConfig.preset("none", crop=(6, 7)), torch.tensor([[2, 3]]))
    labels = transform.labels(torch.tensor([[[1, 2, 3], [4, 5, 6]]]), outside=-1)[0]
    assert labels[2:4, 2:5].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert (labels == -1).sum() == 6 * 7 - 6
    image = torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]])
    torch.testing.assert_close(transform.images(image)[0, 0, 0], torch.tensor([1.0, 1, 1, 2, 3, 3, 3]))
    assert transform.images(image, padding_value=-9.0)[0, 0, 0].tolist() == [-9.0] * 7


@every_config
def test_the_padding_of_the_canvas_never_shows(config: AugmentConfig) -> None:
    sizes = torch.tensor([[30, 40], [48, 20]])
    images, labels = torch.full((2, 1, 48, 64), 1000.0), torch.full((2, 48, 64), 9)
    for b, (height, width) in enumerate(sizes.tolist()):
        images[b, :, :height, :width], labels[b, :height, :width] = 1, 1
    transform = sample(config, sizes)
    assert (transform.images(images) - 1).abs().max() < 0.05
    assert set(transform.labels(labels, outside=-1).unique().tolist()) == {-1, 1}
    assert set(transform.images(images, padding_value=0.0).round().unique().tolist()) == {0, 1}


def test_mirrors_each_axis_half_of_the_time() -> None:
    transform = sample(CONFIGS["mirror"], torch.tensor([[40, 56]]).repeat(400, 1))
    labels = torch.arange(40 * 56).view(1, 40, 56).expand(400, -1, -1)
    mirrored = transform.labels(labels, outside=-1)
    found = [
        sum(torch.equal(row, labels[0].flip(axes)) for row in mirrored) for axes in ((), (0,), (1,), (0, 1))
    ]
    assert sum(found) == 400
    assert min(found) > 70


# --- what is drawn ---


def test_rotation_and_magnification_keep_their_ranges() -> None:
    config = AugmentConfig(crop=(32, 40), spatial_probability=1, rotation=30, scale=(0.75, 1.3))
    matrix = sample(config, torch.tensor([[48, 64]]).repeat(2000, 1)).matrix.double()
    magnification = torch.linalg.det(matrix) ** -0.5
    angle = torch.rad2deg(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    for values, low, high in ((magnification, 0.75, 1.3), (angle, -30, 30)):
        assert low - 1e-4 <= values.min() < low + 0.02 * (high - low)
        assert high + 1e-4 >= values.max() > high - 0.02 * (high - low)
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))


def test_magnification_makes_things_larger() -> None:
    config = AugmentConfig(crop=(48, 64), spatial_probability=1, **STILL | {"scale": (2, 2)})
    square = torch.zeros(1, 48, 64, dtype=torch.int64)
    square[:, 20:28, 28:36] = 1
    transform = sample(config, torch.tensor([[48, 64]]), centres=torch.tensor([[23.5, 31.5]]))
    assert transform.labels(square, outside=-1).eq(1).sum() == 16 * 16


def test_a_chance_of_moving() -> None:
    config = AugmentConfig(crop=(32, 40), spatial_probability=0.6)
    transform = sample(config, torch.tensor([[48, 64]]).repeat(1000, 1))
    still = (transform.matrix == torch.eye(2)).all(dim=(1, 2))
    assert still.float().mean() == pytest.approx(0.4, abs=0.05)
    assert (transform.displacement[still] == 0).all()
    assert (transform.offset[still] == transform.offset[still].round()).all()


def test_slices_that_are_only_cropped_are_mirrored_too() -> None:
    config = AugmentConfig(crop=(32, 40), spatial_probability=0, mirror=True)
    matrix = sample(config, torch.tensor([[48, 64]]).repeat(1000, 1)).matrix
    assert (matrix.abs() == torch.eye(2)).all()
    mirrored = matrix.diagonal(dim1=1, dim2=2) < 0
    assert mirrored.float().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.06)


@pytest.mark.parametrize("magnification", [0.75, 1.0, 1.5])
def test_the_crop_lies_anywhere_within_the_slice(magnification: float) -> None:
    config = AugmentConfig(
        crop=(32, 20), spatial_probability=1, **STILL | {"scale": (magnification, magnification)}
    )
    transform = sample(config, torch.tensor([[48, 20]]).repeat(500, 1))
    assert transform.inside.all() == (magnification >= 1)
    reach = torch.tensor([48 - 32 / magnification, 20 - 20 / magnification])
    start = transform.offset - (1 / magnification - 1) / 2  # of the first pixel's area, from the slice's edge
    for axis, room in enumerate(reach.tolist()):
        if room > 0:
            assert -1e-3 <= start[:, axis].min() < 0.05 * room
            assert 0.95 * room < start[:, axis].max() <= room + 1e-3
        else:
            torch.testing.assert_close(start[:, axis], torch.full((500,), room / 2), atol=1e-4, rtol=0)


def test_whole_pixel_crops_are_uniform() -> None:
    transform = sample(AugmentConfig.preset("none", crop=(46, 64)), torch.tensor([[48, 64]]).repeat(3000, 1))
    tops, counts = transform.offset[:, 0].unique(return_counts=True)
    assert tops.tolist() == [0, 1, 2]
    assert counts.min() > 900


@every_config
def test_a_wanted_centre_is_at_the_centre(config: AugmentConfig) -> None:
    centres = torch.tensor([[10.0, 100.0], [40.2, 60.7], [torch.nan, torch.nan], [46.0, 0.0]])
    transform = sample(config, centres=centres)
    middle = ((torch.tensor(config.crop) - 1) / 2).expand(4, 1, 2)
    found = transform.inverse_points(middle, torch.ones(4, 1, dtype=torch.bool))[0][:, 0]
    tolerance = 0.5 if config.spatial_probability == 0 else 1e-3
    for b in (0, 1, 3):
        assert (found[b] - centres[b]).abs().max() <= tolerance
    assert transform.matrix.isfinite().all()
    assert transform.offset.isfinite().all()


def test_the_displacement_is_smoothed_noise() -> None:
    alpha, sigma = 60.0, 10.0
    config = AugmentConfig(
        crop=(96, 128),
        spatial_probability=1,
        **STILL | {"elastic_alpha": (alpha, alpha), "elastic_sigma": (sigma, sigma)},
    )
    field = sample(config, torch.tensor([[96, 128]]).repeat(100, 1)).displacement
    theory = alpha / math.sqrt(3) / (2 * math.sqrt(math.pi) * sigma)
    noise = np.random.default_rng(0).uniform(-1, 1, (100, 200, 232))
    slow = alpha * ndimage.gaussian_filter(noise, (0, sigma, sigma))[:, 50:-50, 50:-50]
    for values in (field[:, 0], field[:, 1], torch.from_numpy(slow)):
        assert values.std() == pytest.approx(theory, rel=0.05)
        assert values.mean() == pytest.approx(0, abs=0.1 * theory)
        for lag in (5, 10, 20):  # the correlation of smoothed noise is a Gaussian, along both axes
            expected = math.exp(-((lag / sigma) ** 2) / 4)
            for axis in (-1, -2):
                length = values.shape[axis] - lag
                product = values.narrow(axis, 0, length) * values.narrow(axis, lag, length)
                assert product.mean() / values.var() == pytest.approx(expected, abs=0.06)


def test_the_displacement_is_as_strong_at_the_edges() -> None:
    config = AugmentConfig(crop=(96, 128), spatial_probability=1, **STILL | {"elastic_alpha": (60, 60)})
    field = sample(config, torch.tensor([[96, 128]]).repeat(400, 1)).displacement
    edges = torch.cat([field[..., 0, ::16].flatten(), field[..., -1, ::16].flatten()])
    assert edges.std() == pytest.approx(field.std().item(), rel=0.05)


@pytest.mark.parametrize(("alpha", "sigma"), [(350, 14), (250, 9), (5000, 20), (200, 4), (50, 1)])
def test_no_map_folds(alpha: float, sigma: float) -> None:
    config = AugmentConfig(
        crop=(72, 96),
        spatial_probability=1,
        **STILL | {"elastic_alpha": (alpha, alpha), "elastic_sigma": (sigma, sigma)},
    )
    field = sample(config, torch.tensor([[96, 128]]).repeat(32, 1)).displacement
    along_y, along_x = field.diff(dim=2)[..., :-1], field.diff(dim=3)[..., :-1, :]
    strain = torch.stack([along_y, along_x], dim=-1).permute(0, 2, 3, 1, 4)
    lowest = torch.linalg.eigvalsh((strain + strain.mT) / 2).min()
    assert lowest > -0.85
    if alpha / sigma**2 > 3:  # weakened, and no more than needed
        assert lowest < -0.9 * MAX_COMPRESSION


# --- batches ---


@every_config
def test_the_generator_decides_everything(config: AugmentConfig) -> None:
    first, again, other = sample(config, seed=7), sample(config, seed=7), sample(config, seed=8)
    assert torch.equal(first.coordinates, again.coordinates)
    assert not torch.equal(first.coordinates, other.coordinates)


@every_config
@pytest.mark.parametrize("rows", [slice(1, 3), [3, 0], torch.tensor([2])], ids=["slice", "list", "tensor"])
def test_selected_slices_move_as_in_the_batch(
    config: AugmentConfig, rows: slice | list[int] | Tensor
) -> None:
    whole = sample(config)
    part = whole.select(rows)
    images = torch.rand(4, 1, 96, 128)
    torch.testing.assert_close(part.images(images[rows]), whole.images(images)[rows], atol=1e-4, rtol=0)
    assert torch.equal(part.coordinates, whole.coordinates[rows])
    assert torch.equal(part.sizes, whole.sizes[rows])


@every_config
@pytest.mark.parametrize("centred", [False, True])
def test_a_share_is_drawn_as_in_the_batch(config: AugmentConfig, centred: bool) -> None:
    centres = torch.tensor([[40.0, 50.0], [torch.nan, torch.nan], [30.0, 60.0], [20.0, 20.0]])
    options = {"centres": centres if centred else None}
    rows = torch.tensor([3, 1])
    part, expected = sample(config, rows=rows, **options), sample(config, **options).select(rows)
    torch.testing.assert_close(part.coordinates, expected.coordinates, atol=1e-4, rtol=0)
    assert torch.equal(part.sizes, expected.sizes)
    assert part.output_size == expected.output_size


def test_coordinates_stay_exact_under_autocast() -> None:
    plain = sample(CONFIGS["everything"])
    images = torch.rand(4, 1, 96, 128)
    positions, valid = scattered(SIZES, 20)
    expected, points = plain.images(images), plain.points(positions, valid)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sample(CONFIGS["everything"])
        assert torch.equal(mixed.coordinates, plain.coordinates)
        assert torch.equal(mixed.images(images), expected)
        assert torch.equal(mixed.points(positions, valid)[0], points[0])
    assert plain.images(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_moves_slices_alike() -> None:
    images, labels = torch.rand(4, 1, 96, 128), torch.randint(0, 4, (4, 96, 128))
    positions, valid = scattered(SIZES, 50)
    here, there = sample(CONFIGS["everything"]), sample(CONFIGS["everything"], device="cuda")
    torch.testing.assert_close(there.coordinates.cpu(), here.coordinates, atol=1e-3, rtol=0)
    torch.testing.assert_close(there.images(images.cuda()).cpu(), here.images(images), atol=5e-3, rtol=0)
    differing = there.labels(labels.cuda(), outside=-1).cpu() != here.labels(labels, outside=-1)
    assert differing.float().mean() < 1e-3
    moved, kept = there.points(positions.cuda(), valid.cuda())
    both = kept.cpu() & here.points(positions, valid)[1]
    torch.testing.assert_close(moved.cpu()[both], here.points(positions, valid)[0][both], atol=1e-2, rtol=0)


def test_draws_of_two_batches_can_be_joined() -> None:
    for name in ("everything", "affine"):
        draws = [
            SpatialDraws.draw(CONFIGS[name], SIZES, generator=generator(seed), centres=centres)
            for seed, centres in ((0, None), (1, SIZES / 2))
        ]
        joined = SpatialTransform.of(SpatialDraws.join(draws))
        one_by_one = [SpatialTransform.of(draw).coordinates for draw in draws]
        torch.testing.assert_close(joined.coordinates, torch.cat(one_by_one), atol=1e-4, rtol=0)
        assert torch.equal(joined.sizes, SIZES.repeat(2, 1))


def test_says_what_does_not_fit() -> None:
    transform = sample(CONFIGS["affine"])
    with pytest.raises(ValueError, match="4 slices of sizes up to"):
        transform.images(torch.zeros(3, 1, 96, 128))
    with pytest.raises(ValueError, match="4 slices of sizes up to"):
        transform.labels(torch.zeros(4, 48, 64, dtype=torch.int64), outside=-1)
    with pytest.raises(ValueError, match="centres must be"):
        sample(CONFIGS["affine"], centres=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="heights and widths"):
        sample(CONFIGS["affine"], torch.zeros(4, 3))
