"""Volumes keep their geometry: every orientation, every header, there and back voxel by voxel."""

import itertools
import os
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from kaf_model.volume import (
    Volume,
    VolumeError,
    read_labels,
    read_volume,
    same_grid,
    write_labels,
    write_maps,
)

REPOSITORY = Path(__file__).parents[2]
DATA = Path(os.environ.get("KAF_DATA", REPOSITORY.parent / "shared" / "data"))
ORIENTATIONS = [
    "".join(axes[sign] for axes, sign in zip(order, signs, strict=True))
    for order in itertools.permutations(("RL", "AP", "SI"))
    for signs in itertools.product((0, 1), repeat=3)
]


def anatomy(spacing=(1.5, 1.2, 6.0), shape=(7, 9, 5), thick="S"):
    """An asymmetric volume stored towards right, anterior and superior, thick along one direction."""
    order = {"S": (0, 1, 2), "A": (0, 2, 1), "R": (2, 1, 0)}[thick]
    affine = np.diag([*(spacing[axis] for axis in order), 1.0])
    affine[:3, 3] = (-12, 30, 7)
    array = np.random.default_rng(0).integers(-900, 900, size=[shape[axis] for axis in order])
    return nib.Nifti1Image(array.astype(np.int16), affine)


def stored_as(image, codes):
    wanted = nib.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted))


def save(image, path, sform=2, qform=1):
    image.header.set_sform(image.affine, code=sform)
    image.header.set_qform(image.affine, code=qform)
    if not sform and not qform:  # with an affine, nibabel would set the sform's code again
        image = type(image)(np.asanyarray(image.dataobj), None, image.header)
    nib.save(image, path)
    return path


def turned(degrees, spacing=(1.4, 1.4, 8.0)):
    angle = np.radians(degrees)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ np.diag([*spacing, 1.0])
    affine[:3, 3] = (5, -6, 7)
    return affine


def check_labels_lie_on(path, tmp_path, volume, threshold=0):
    """Threshold in display order, write, read with nibabel, compare with the stored image."""
    out = write_labels_and_path(
        tmp_path / "labels.nii.gz", (volume.array > threshold).astype(int) * 3, volume
    )
    image, labels = nib.load(path), nib.load(out)
    stored = np.asarray(image.dataobj)
    frame = stored[..., volume.source.frame] if stored.ndim == 4 and stored.shape[3] > 1 else stored
    assert np.array_equal(np.asarray(labels.dataobj), (frame.reshape(volume.source.shape) > threshold) * 3)
    assert np.array_equal(labels.affine, image.affine)
    assert labels.get_data_dtype() == np.uint8
    for code in ("sform_code", "qform_code", "xyzt_units"):
        expected = image.header[code]
        assert labels.header[code] == expected
    assert np.array_equal(labels.header.get_sform(), image.header.get_sform())
    assert np.allclose(labels.header.get_qform(), image.header.get_qform(), atol=1e-6)
    assert (float(labels.dataobj.slope), float(labels.dataobj.inter)) == (1.0, 0.0)
    assert same_grid(out, volume) == []
    assert np.array_equal(read_labels(out, volume), (volume.array > threshold) * 3)


def write_labels_and_path(path, labels, volume):
    write_labels(path, labels, volume)
    return path


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("thick", ["S", "A", "R"], ids=["axial", "coronal", "sagittal"])
def test_every_orientation_looks_the_same_and_takes_its_labels(codes, thick, tmp_path):
    image = anatomy(thick=thick)
    canonical = np.asarray(image.dataobj)
    # (R, A, S) -> Z along the thick direction, Y and X falling: posterior or inferior, left or posterior.
    axes = {"S": (2, 1, 0), "A": (1, 2, 0), "R": (0, 2, 1)}[thick]
    expected = canonical.transpose(axes)[:, ::-1, ::-1]
    path = save(stored_as(image, codes), tmp_path / "image.nii")
    volume = read_volume(path)
    ascending = thick in codes
    assert np.array_equal(volume.array, expected if ascending else expected[::-1])
    assert np.allclose(volume.slice_positions, np.linspace(0, 1, 5)[:: 1 if ascending else -1])
    assert np.allclose(volume.spacing[0], 6)
    assert volume.notices == ()
    check_labels_lie_on(path, tmp_path, volume)
    assert np.array_equal(volume.to_volume(volume.to_stored(volume.array)), volume.array)
    world = nib.affines.apply_affine(volume.affine, [1, 2, 3])
    index = np.round(nib.affines.apply_affine(np.linalg.inv(nib.load(path).affine), world)).astype(int)
    assert nib.load(path).dataobj[tuple(index)] == volume.array[1, 2, 3]


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


def test_slice_axis_is_the_thick_one_unless_told(tmp_path):
    image = anatomy(thick="A")
    path = save(image, tmp_path / "image.nii")
    assert read_volume(path).source.axes[0] == 1
    for axis in range(3):
        volume = read_volume(path, slice_axis=axis)
        assert volume.source.axes[0] == axis
        assert volume.num_slices == image.shape[axis]
        check_labels_lie_on(path, tmp_path, volume)
    with pytest.raises(VolumeError, match="slice_axis must be a stored axis, 0, 1 or 2, got 3"):
        read_volume(path, slice_axis=3)


@pytest.mark.parametrize(
    ("spacing", "axis"),
    [
        ((1, 1, 1), 2),
        ((1.05, 1, 1), 2),
        ((0.7, 0.7, 0.5), 2),
        ((1, 3, 1), 1),
        ((2, 3, 1), 1),
        ((1.2, 1, 1), 0),
    ],
)
def test_where_no_spacing_stands_out_the_third_axis_is_taken(spacing, axis, tmp_path):
    image = nib.Nifti1Image(np.zeros((4, 5, 6), dtype=np.int16), np.diag([*spacing, 1]))
    assert read_volume(save(image, tmp_path / "image.nii")).source.axes[0] == axis


def test_one_slice_is_sliced_where_it_has_one_voxel(tmp_path):
    image = nib.Nifti1Image(np.zeros((40, 1, 50), dtype=np.int16), np.diag([2, 1, 1, 1]))
    volume = read_volume(save(image, tmp_path / "image.nii"))
    assert volume.shape == (1, 50, 40)
    assert volume.slice_positions.tolist() == [0.5]


@pytest.mark.parametrize("degrees", [-40, 5, 30, 44, 46, 130])
def test_oblique_volumes_keep_their_affine_and_say_so(degrees, tmp_path):
    array = np.random.default_rng(0).normal(size=(6, 7, 4)).astype(np.float32)
    path = save(nib.Nifti1Image(array, turned(degrees)), tmp_path / "image.nii.gz")
    volume = read_volume(path)
    assert volume.source.axes[0] == 2
    assert np.allclose(volume.spacing, (8, 1.4, 1.4))
    assert volume.voxel_ml == pytest.approx(8 * 1.4 * 1.4 / 1000)
    assert "oblique" in volume.notices[0]
    check_labels_lie_on(path, tmp_path, volume)


@pytest.mark.parametrize(("sform", "qform"), [(2, 0), (0, 1), (4, 3), (0, 0)])
def test_header_codes_survive(sform, qform, tmp_path):
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=(6, 7, 4)), turned(20))
    path = save(image, tmp_path / "image.nii", sform, qform)
    volume = read_volume(path)
    check_labels_lie_on(path, tmp_path, volume)
    said = any("neither sform nor qform" in notice for notice in volume.notices)
    assert said == ((sform, qform) == (0, 0))
    assert np.allclose(volume.spacing, (8, 1.4, 1.4))


def test_sform_wins_over_a_different_qform_and_the_user_is_told(tmp_path):
    image = nib.Nifti1Image(np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6), np.diag([1, 1, 5, 1]))
    image.header.set_sform(np.diag([1, 1, 5, 1]), code=1)
    image.header.set_qform(np.diag([-1, 1, 5, 1]), code=1)
    nib.save(image, tmp_path / "image.nii")
    volume = read_volume(tmp_path / "image.nii")
    assert np.array_equal(volume.source.affine, np.diag([1, 1, 5, 1]))
    assert any(
        "sform and qform differ by up to 6 mm; the sform is used" in notice for notice in volume.notices
    )
    check_labels_lie_on(tmp_path / "image.nii", tmp_path, volume, threshold=50)


@pytest.mark.parametrize("size", [0.0, np.nan, -2.0])
@pytest.mark.parametrize("codes", [(0, 0), (0, 1), (1, 0)])
def test_voxel_sizes_that_are_none_count_as_1_mm(size, codes, tmp_path):
    header = nib.Nifti1Header()
    header.set_data_shape((4, 5, 6))
    header.set_data_dtype(np.int16)
    header["pixdim"][1:4] = (1, size, 3)
    header["sform_code"], header["qform_code"] = codes
    for row, value in zip(("srow_x", "srow_y", "srow_z"), np.diag([1.0, 2.0, 3.0]), strict=True):
        header[row][:3] = value
    header["vox_offset"], header["magic"] = 352, b"n+1"
    values = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    path = tmp_path / "image.nii"
    path.write_bytes(header.binaryblock + b"\0" * 4 + values.tobytes(order="F"))
    volume = read_volume(path)
    assert np.array_equal(volume.to_stored(volume.array), values)
    assert np.isfinite(volume.affine).all()
    told = any("1 mm is taken" in notice for notice in volume.notices)
    assert told == (codes != (1, 0))
    if codes == (1, 0):
        assert sorted(volume.spacing) == [1, 2, 3]
    write_labels(tmp_path / "labels.nii", volume.array, volume)
    assert same_grid(tmp_path / "labels.nii", volume) == []
    assert np.array_equal(read_labels(tmp_path / "labels.nii", volume), volume.array)


@pytest.mark.parametrize("row", [(0, 0, 0, 0), (np.nan, 0, 0, 0), (1, 0, 0, 0)])
def test_an_affine_that_cannot_be_used_is_replaced_and_told(row, tmp_path):
    image = nib.Nifti1Image(np.zeros((4, 5, 6), dtype=np.int16), np.diag([1, 2, 5, 1]))
    path = save(image, tmp_path / "image.nii", qform=0)
    content = bytearray(path.read_bytes())
    content[280 + 16 : 280 + 32] = np.array(row, dtype=np.float32).tobytes()  # srow_y
    path.write_bytes(bytes(content))
    volume = read_volume(path)
    assert "position and orientation are unknown" in volume.notices[0]
    assert volume.spacing == (5, 2, 1)
    write_labels(tmp_path / "labels.nii", volume.array, volume)
    assert same_grid(tmp_path / "labels.nii", volume) == []
    assert (tmp_path / "labels.nii").read_bytes()[280:328] == bytes(content[280:328])


@pytest.mark.parametrize("quaternion", [0.0, 2.0])
def test_without_a_usable_sform_the_qform_is_used(quaternion, tmp_path):
    path = save(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), turned(30)), tmp_path / "image.nii")
    content = bytearray(path.read_bytes())
    content[280:328] = bytes(48)  # the sform
    if quaternion:  # longer than 1: the qform is no rotation either
        content[256:260] = np.float32(quaternion).tobytes()
    path.write_bytes(bytes(content))
    volume = read_volume(path)
    told = " ".join(volume.notices)
    assert "differ" not in told
    assert ("the qform is used" in told) == (not quaternion)
    assert ("orientation are unknown" in told) == bool(quaternion)
    expected = turned(30) if not quaternion else np.diag([-1.4, -1.4, 8.0, 1])
    assert np.allclose(volume.source.affine, expected, atol=1e-4)
    write_labels(tmp_path / "labels.nii", volume.array, volume)
    assert same_grid(tmp_path / "labels.nii", volume) == []


def test_lengths_in_other_units_become_mm(tmp_path):
    image = nib.Nifti1Image(np.zeros((4, 5, 6), dtype=np.int16), np.diag([100, 100, 500, 1]))
    image.header.set_xyzt_units("micron")
    path = save(image, tmp_path / "image.nii")
    volume = read_volume(path)
    assert np.allclose(volume.spacing, (0.5, 0.1, 0.1))
    assert "micron" in volume.notices[0]
    check_labels_lie_on(path, tmp_path, volume)


def test_a_flat_image_has_one_slice(tmp_path):
    array = np.random.default_rng(0).integers(-5, 5, size=(48, 64)).astype(np.int16)
    path = save(nib.Nifti1Image(array, np.diag([2, 2, 1, 1])), tmp_path / "image.nii")
    volume = read_volume(path)
    assert volume.shape == (1, 64, 48)
    assert volume.slice_positions.tolist() == [0.5]
    check_labels_lie_on(path, tmp_path, volume)
    maps = np.random.default_rng(0).random((3, *volume.shape), dtype=np.float32)
    write_maps(tmp_path / "maps.nii", maps, volume)
    assert np.array_equal(nib.load(tmp_path / "maps.nii").get_fdata()[:, :, 0, 1], maps[1, 0, ::-1, ::-1].T)
    assert same_grid(tmp_path / "maps.nii", volume) == []


@pytest.mark.parametrize("scaled", [False, True])
def test_a_frame_of_a_series_is_chosen(scaled, tmp_path):
    array = np.random.default_rng(0).integers(-5, 5, size=(6, 7, 4, 3)).astype(np.int16)
    image = nib.Nifti1Image(array, np.diag([-1, -1, 5, 1]))
    image.header.set_slope_inter(*((0.5, 1) if scaled else (1, 0)))
    path = save(image, tmp_path / "image.nii.gz")
    with pytest.raises(VolumeError, match="holds 3 frames; choose one with frame=0 to frame=2"):
        read_volume(path)
    with pytest.raises(VolumeError, match="has no frame 3, it holds 3"):
        read_volume(path, frame=3)
    volume = read_volume(path, frame=2)
    assert volume.array.dtype == (np.float32 if scaled else np.int16)
    assert np.allclose(volume.array, nib.load(path).get_fdata()[..., 2].T)
    check_labels_lie_on(path, tmp_path, volume)


def test_a_series_of_one_frame_is_a_volume(tmp_path):
    array = np.random.default_rng(0).normal(size=(6, 7, 4, 1))
    path = save(nib.Nifti1Image(array, np.diag([1, 1, 5, 1])), tmp_path / "image.nii.gz")
    assert read_volume(path, frame=0).shape == (4, 7, 6)
    check_labels_lie_on(path, tmp_path, read_volume(path))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 3], "uint8"),
        ([0, 255], "uint8"),
        ([-1, 3], "int16"),
        ([0, 300], "int16"),
        ([0, 40_000], "uint16"),
        ([0, 70_000], "int32"),
        ([0, 3 * 10**9], "uint32"),
        ([-1, 3 * 10**9], "int64"),
    ],
)
def test_labels_take_the_smallest_type(values, expected, tmp_path):
    volume = Volume.from_array(np.zeros((2, 3, 4), dtype=np.int16), (5, 1, 1))
    labels = np.resize(np.array(values, dtype=np.int64), volume.shape)
    write_labels(tmp_path / "labels.nii", labels, volume)
    assert nib.load(tmp_path / "labels.nii").get_data_dtype() == expected
    assert np.array_equal(read_labels(tmp_path / "labels.nii", volume), labels)


@pytest.mark.parametrize("value", [3.4e38, -3.4e38])
def test_numbers_beyond_any_integer_are_no_labels(value, tmp_path):
    array = np.zeros((4, 5, 6), np.float32)
    array[1, 2, 3] = value
    path = save(nib.Nifti1Image(array, np.diag([1, 1, 5, 1])), tmp_path / "labels.nii")
    with pytest.raises(VolumeError, match=r"labels\.nii: no integer type holds labels from .*3\.4e\+38"):
        read_labels(path, read_volume(path))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_either_byte_order_and_nifti_version(kind, order, tmp_path):
    array = np.random.default_rng(0).integers(-5, 5, size=(6, 7, 4)).astype(f"{order}i2")
    image = kind(array, turned(0), header=kind.header_class(endianness=order))
    image.header.set_data_dtype(np.int16)
    path = save(image, tmp_path / "image.nii")
    volume = read_volume(path)
    assert volume.array.dtype.isnative
    assert volume.array.flags.c_contiguous
    assert volume.array.flags.writeable
    check_labels_lie_on(path, tmp_path, volume)
    labels = nib.load(tmp_path / "labels.nii.gz")
    assert (type(labels), labels.header.endianness) == (kind, order)


def test_maps_are_written_as_float32_from_disk_too(tmp_path):
    path = save(stored_as(anatomy(), "PIL"), tmp_path / "image.nii")
    volume = read_volume(path)
    maps = np.memmap(tmp_path / "maps.dat", np.float16, mode="w+", shape=(2, *volume.shape))
    maps[:] = np.random.default_rng(0).random(maps.shape)
    write_maps(tmp_path / "maps.nii.gz", maps, volume)
    written = nib.load(tmp_path / "maps.nii.gz")
    assert written.get_data_dtype() == np.float32
    assert np.array_equal(written.affine, nib.load(path).affine)
    for index in range(2):
        assert np.array_equal(written.dataobj[..., index], volume.to_stored(maps[index]).astype(np.float32))
    write_maps(tmp_path / "one.nii", maps[0].astype(float), volume)
    assert nib.load(tmp_path / "one.nii").shape == volume.source.shape


def test_writing_leaves_the_image_s_extensions_and_display_range_behind(tmp_path):
    image = anatomy()
    image.header["cal_max"] = 400
    image.header.set_intent("z score")
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"name of the patient"))
    volume = read_volume(save(image, tmp_path / "image.nii"))
    write_labels(tmp_path / "labels.nii", np.zeros(volume.shape, dtype=bool), volume)
    labels = nib.load(tmp_path / "labels.nii")
    assert not labels.header.extensions
    assert labels.header["cal_max"] == 0
    assert labels.header.get_intent()[0] == "none"
    assert len(volume.source.header.extensions) == 1


def test_writing_is_atomic_and_repeatable(tmp_path):
    volume = Volume.from_array(np.zeros((2, 3, 4), dtype=np.int16), (5, 1, 1))
    path = tmp_path / "new" / "labels.nii.gz"
    write_labels(path, np.ones(volume.shape, dtype=np.uint8), volume)
    first = path.read_bytes()

    class Broken(np.ndarray):
        def astype(self, *_, **__):
            raise OSError("disk on fire")

    with pytest.raises(VolumeError, match="cannot be written"):
        write_maps(path, np.zeros(volume.shape).view(Broken), volume)
    assert path.read_bytes() == first
    assert [entry.name for entry in path.parent.iterdir()] == ["labels.nii.gz"]
    write_labels(path, np.ones(volume.shape, dtype=np.uint8), volume)
    assert path.read_bytes() == first


def test_a_grid_that_differs_is_told(tmp_path):
    first = Volume.from_array(np.zeros((2, 3, 4), dtype=np.int16), (5, 1, 1))
    path = save(anatomy(), tmp_path / "image.nii", sform=2, qform=1)
    other = read_volume(path)
    write_labels(tmp_path / "labels.nii", np.zeros(first.shape, dtype=np.uint8), first)
    differences = " ".join(same_grid(tmp_path / "labels.nii", other))
    assert "shape is (4, 3, 2), expected (7, 9, 5)" in differences
    assert "mm away" in differences
    assert "sform_code is 1, expected 2" in differences


def test_a_volume_in_memory_is_written_like_any_other(tmp_path):
    array = np.random.default_rng(0).integers(0, 5, size=(3, 4, 5)).astype(np.uint8)
    volume = Volume.from_array(array, (5, 1.5, 1), name="phantom")
    assert (volume.name, volume.spacing, volume.num_slices) == ("phantom", (5, 1.5, 1), 3)
    assert volume.slice_positions.tolist() == [0, 0.5, 1]
    write_labels(tmp_path / "phantom.nii.gz", array, volume)
    again = read_volume(tmp_path / "phantom.nii.gz")
    assert np.array_equal(again.array, array)
    assert np.allclose(again.affine, volume.affine)
    tilted = Volume.from_array(array, affine=volume.affine[:, [0, 2, 1, 3]])
    assert tilted.spacing == (5, 1, 1.5)
    with pytest.raises(VolumeError, match="3 positive mm values"):
        Volume.from_array(array, (5, 0, 1))
    with pytest.raises(VolumeError, match=r"\(Z, Y, X\) real numbers, got complex128"):
        Volume.from_array(array.astype(complex))


def test_a_volume_travels_between_processes(tmp_path):
    volume = read_volume(save(anatomy(), tmp_path / "image.nii"))
    again = pickle.loads(pickle.dumps(volume))
    assert np.array_equal(again.array, volume.array)
    write_labels(tmp_path / "labels.nii", np.zeros(again.shape, dtype=np.uint8), again)
    assert same_grid(tmp_path / "labels.nii", volume) == []


@pytest.mark.skipif(not (DATA / "acdc").is_dir(), reason="the ACDC volumes are not here; set KAF_DATA")
def test_real_volumes_and_their_labels(tmp_path):
    paths = sorted((DATA / "acdc" / "images").glob("*.nii.gz"))[::20]
    assert paths
    for path in paths:
        volume = read_volume(path)
        assert volume.array.dtype == np.int16
        assert volume.source.axes[0] == 2
        labels = read_labels(DATA / "acdc" / "labels" / path.name, volume)
        assert set(np.unique(labels)) <= {0, 1, 2, 3}
        check_labels_lie_on(path, tmp_path, volume, threshold=100)


def test_a_volume_cut_along_another_axis_is_the_one_that_reading_cuts(tmp_path):
    path = tmp_path / "scan.nii.gz"
    stored = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4)
    nib.save(nib.Nifti1Image(stored, np.diag([1.5, -2.0, 8.0, 1.0])), path)
    volume = read_volume(path)
    for axis in range(3):
        ours, wanted = volume.along(axis), read_volume(path, slice_axis=axis)
        np.testing.assert_array_equal(ours.array, wanted.array)
        np.testing.assert_allclose(ours.affine, wanted.affine)
        np.testing.assert_array_equal(ours.to_stored(ours.array), stored)
