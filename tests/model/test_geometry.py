"""Points, pyramid cells and affines on examples that can be checked by eye."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from kaf_model import geometry


def test_the_flip_to_opencv_is_its_own_inverse():
    points = np.array([[1.0, 2.0], [3.5, -4.0]])
    assert geometry.to_xy(points).tolist() == [[2.0, 1.0], [-4.0, 3.5]]
    assert np.array_equal(geometry.from_xy(geometry.to_xy(points)), points)
    assert torch.equal(geometry.to_xy(torch.tensor([[1.0, 2.0]])), torch.tensor([[2.0, 1.0]]))


def test_cells_of_a_level_split_pixels_evenly():
    positions = torch.tensor([[0.0, 0.0], [1.4, 1.6], [1.5, 3.49], [3.5, 7.0]])
    assert geometry.level_cells(positions, 0, 48, 64).tolist() == [[0, 0], [1, 2], [2, 3], [4, 7]]
    assert geometry.level_cells(positions, 1, 24, 32).tolist() == [[0, 0], [0, 1], [1, 1], [2, 3]]
    assert geometry.level_cells(positions, 3, 6, 8).tolist() == [[0, 0], [0, 0], [0, 0], [0, 0]]


def test_cells_stay_inside_and_keep_leading_axes():
    outside = torch.tensor([[[-3.0, 70.0]], [[48.0, -0.6]]])  # (2, 1, 2)
    assert geometry.level_cells(outside, 2, 12, 16).tolist() == [[[0, 15]], [[11, 0]]]
    assert geometry.level_cells(torch.zeros(0, 2), 1, 24, 32).shape == (0, 2)


def test_a_cell_is_the_mean_pooled_pixel():
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    cells = geometry.level_cells(torch.stack((rows, columns), -1).float(), 2, 12, 16)
    for image in (rows.float(), columns.float()):
        pooled = torch.nn.functional.avg_pool2d(image[None], 4)[0]
        assert (pooled[cells[..., 0], cells[..., 1]] - image).abs().max() <= 1.5


@pytest.mark.parametrize("make", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_resampled_points_keep_the_border_in_place(make):
    corners = make([[-0.5, -0.5], [47.5, 63.5]])
    assert np.allclose(geometry.resample_points(corners, 2.0), [[-0.5, -0.5], [95.5, 127.5]])
    assert np.allclose(geometry.resample_points(corners, (0.5, 2)), [[-0.5, -0.5], [23.5, 127.5]])
    there = geometry.resample_points(corners, (0.3, 1.7))
    assert np.allclose(geometry.resample_points(there, (1 / 0.3, 1 / 1.7)), corners)


def test_integer_points_are_resampled_as_numbers():
    assert np.allclose(geometry.resample_points(np.array([[1, 3]]), (0.5, 0.25)), [[0.25, 0.375]])
    assert np.allclose(geometry.resample_points(torch.tensor([[1, 3]]), (0.5, 0.25)), [[0.25, 0.375]])


def test_voxels_lie_where_the_affine_says():
    affine = np.array([[0, -1.5, 0, 10], [1.2, 0, 0, -20], [0, 0, 5, 3], [0, 0, 0, 1]])
    assert geometry.voxel_to_world(affine, [1, 2, 3]).tolist() == [7.0, -18.8, 18.0]
    points = np.random.default_rng(0).normal(size=(4, 5, 3))
    one_by_one = [[affine[:3, :3] @ point + affine[:3, 3] for point in row] for row in points]
    assert np.allclose(geometry.voxel_to_world(affine, points), one_by_one)
    assert geometry.spacing_of(affine) == (1.2, 1.5, 5.0)


def turned(degrees):
    angle = np.radians(degrees)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return affine @ np.diag([2, -3, 4, 1])


def test_obliquity_is_the_angle_of_the_axes():
    assert geometry.obliquity(turned(0)) == 0
    assert geometry.obliquity(turned(20)) == pytest.approx(20)
    assert geometry.obliquity(turned(80)) == pytest.approx(10)
    assert not geometry.is_oblique(turned(90))
    assert not geometry.is_oblique(turned(1), tolerance_degrees=2)
    assert geometry.is_oblique(turned(3), tolerance_degrees=2)


def test_the_largest_shift_is_in_a_corner():
    moved = np.eye(4)
    moved[0, 3] = 0.25
    assert geometry.largest_shift(np.eye(4), moved, (3, 4, 5)) == pytest.approx(0.25)
    grown = np.diag([1, 1, 1.1, 1])
    assert geometry.largest_shift(np.eye(4), grown, (3, 4, 5)) == pytest.approx(0.4)


def test_importing_volumes_leaves_torch_and_simpleitk_out():
    code = "import sys, kaf_model.volume; print(sorted({'torch', 'SimpleITK', 'napari'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
