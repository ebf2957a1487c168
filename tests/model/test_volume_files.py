"""Formats, types, broken files and mixed folders; and a whole CT in little memory."""

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from kaf_model.volume import (
    Unreadable,
    Volume,
    VolumeError,
    find_volumes,
    inspect_volume,
    read_labels,
    read_volume,
    same_grid,
    scan_volumes,
    volume_name,
    write_labels,
)

AFFINE = np.diag([-1.0, -1.2, 5.0, 1.0])
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def values(shape=(6, 7, 4), dtype=np.int16):
    return np.random.default_rng(0).integers(0, 90, size=shape).astype(dtype)


def nifti(path, array=None, affine=AFFINE, slope=None):
    image = nib.Nifti1Image(values() if array is None else array, affine)
    if slope:
        image.header.set_slope_inter(*slope)
    nib.save(image, path)
    return path


def itk_image(array_kji, tilt=0.0):
    image = sitk.GetImageFromArray(array_kji)
    image.SetSpacing((1.0, 1.2, 5.0)[: image.GetDimension()])
    image.SetOrigin((-10.0, 20.0, 30.0)[: image.GetDimension()])
    if tilt:
        sine, cosine = np.sin(tilt), np.cos(tilt)
        image.SetDirection((1, 0, 0, 0, cosine, -sine, 0, sine, cosine))
    return image


def itk_affine(image):
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return LPS @ affine


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".mhd", ".nhdr"])
@pytest.mark.parametrize("tilt", [0.0, 0.4])
def test_nrrd_and_metaimage(ending, tilt, tmp_path):
    array = values((4, 7, 6))
    image = itk_image(array, tilt)
    path = tmp_path / f"scan{ending}"
    sitk.WriteImage(image, path)
    volume = read_volume(path)
    assert volume.name == "scan"
    assert volume.array.dtype == np.int16
    assert np.array_equal(volume.array, array)
    assert np.allclose(volume.source.affine, itk_affine(image))
    assert bool(volume.notices) == bool(tilt)
    write_labels(tmp_path / "labels.nii.gz", array > 40, volume)
    written = nib.load(tmp_path / "labels.nii.gz")
    assert np.array_equal(written.dataobj, array.T > 40)
    assert np.allclose(written.affine, itk_affine(image), atol=1e-5)
    assert (written.header["sform_code"], written.header["qform_code"]) == (1, 1)
    assert same_grid(tmp_path / "labels.nii.gz", volume) == []
    back = sitk.ReadImage(tmp_path / "labels.nii.gz")
    assert np.allclose(back.GetDirection(), image.GetDirection(), atol=1e-5)
    assert np.allclose(back.GetOrigin(), image.GetOrigin(), atol=1e-4)


def test_flat_and_four_dimensional_metaimages(tmp_path):
    sitk.WriteImage(itk_image(values((7, 6))), tmp_path / "flat.mha")
    assert np.array_equal(read_volume(tmp_path / "flat.mha").array[0], values((7, 6)))
    series = sitk.JoinSeries([itk_image(values((4, 7, 6)) + add) for add in range(3)])
    sitk.WriteImage(series, tmp_path / "series.mha")
    assert inspect_volume(tmp_path / "series.mha").num_frames == 3
    assert np.array_equal(read_volume(tmp_path / "series.mha", frame=2).array, values((4, 7, 6)) + 2)
    with pytest.raises(VolumeError, match="holds 3 frames; choose one with frame=0 to frame=2"):
        read_volume(tmp_path / "series.mha")


def dicom_series(folder, number=4, uid="1.2.3", direction=None, step=5.0, positions=None):
    """Write slices as a scanner would: shuffled names, position and orientation in each, rescaled."""
    import pydicom

    rows, columns = (np.array([1, 0, 0]), np.array([0, 1, 0])) if direction is None else direction
    normal = np.cross(rows, columns)
    array = values((number, 7, 6))
    for index in range(number):
        item = pydicom.Dataset()
        item.file_meta = pydicom.dataset.FileMetaDataset()
        item.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        item.SOPInstanceUID = item.file_meta.MediaStorageSOPInstanceUID = f"{uid}.{index + 1}"
        item.SeriesInstanceUID, item.StudyInstanceUID, item.Modality = uid, "1.2", "CT"
        item.InstanceNumber, item.PatientID = index + 1, "x"
        item.Rows, item.Columns, item.PixelSpacing = 7, 6, [1.2, 1.0]  # rows, columns
        item.ImageOrientationPatient = [float(value) for value in (*rows, *columns)]
        distance = index * step if positions is None else positions[index]
        item.ImagePositionPatient = [float(value) for value in (np.array([-10, 20, 30]) + distance * normal)]
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 16, 15, 0
        item.RescaleSlope, item.RescaleIntercept = 1, -1024
        item.PixelData = array[index].astype("<u2").tobytes()
        folder.mkdir(exist_ok=True, parents=True)
        item.save_as(folder / f"{(index * 7) % 11:02d}-{uid}", enforce_file_format=True)
    return array.astype(np.int32) - 1024


@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_dicom_series(tilt, tmp_path):
    rows, columns = np.array([1, 0, 0]), np.array([0, np.cos(tilt), np.sin(tilt)])
    array = dicom_series(tmp_path / "scan", direction=(rows, columns))
    volume = read_volume(tmp_path / "scan")
    assert (volume.name, volume.source.format) == ("scan", "dicom")
    assert np.array_equal(volume.array, array)
    assert volume.array.dtype.kind == "i"
    assert np.allclose(volume.spacing, (5, 1.2, 1))
    expected = LPS @ np.column_stack([*np.eye(4)[:3], [-10, 20, 30, 1]])
    expected[:3, :3] = LPS[:3, :3] @ np.column_stack([rows, columns * 1.2, np.cross(rows, columns) * 5])
    assert np.allclose(volume.source.affine, expected, atol=1e-6)
    assert any("oblique" in notice for notice in volume.notices) == bool(tilt)
    info = inspect_volume(tmp_path / "scan")
    assert (info.shape, info.num_frames) == (volume.shape, 1)
    assert np.allclose(info.spacing, volume.spacing)
    write_labels(tmp_path / "labels.nii.gz", array > -980, volume)
    assert same_grid(tmp_path / "labels.nii.gz", volume) == []
    assert np.array_equal(read_labels(tmp_path / "labels.nii.gz", volume), array > -980)


def test_the_largest_of_several_dicom_series_is_read_and_uneven_slices_are_told(tmp_path, capfd):
    dicom_series(tmp_path / "scan", number=2, uid="1.2.4")
    array = dicom_series(tmp_path / "scan", number=5, uid="1.2.5", positions=[0, 5, 10, 20, 25])
    volume = read_volume(tmp_path / "scan")
    assert np.array_equal(volume.array, array)
    assert "2 DICOM series of 5, 2 files; the largest is read" in volume.notices[0]
    assert "unevenly spaced, 5 to 10 mm apart" in volume.notices[1]
    assert len(volume.notices) == 2
    assert capfd.readouterr() == ("", "")


def test_one_dicom_slice_is_a_volume(tmp_path):
    array = dicom_series(tmp_path / "scan", number=1)
    volume = read_volume(tmp_path / "scan")
    assert np.array_equal(volume.array, array)
    (file,) = (tmp_path / "scan").iterdir()
    with pytest.raises(VolumeError, match="for DICOM give the folder"):
        read_volume(file)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_integers_stay_what_they_are(dtype, tmp_path):
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(values(dtype=dtype), AFFINE, dtype=dtype), path)
    volume = read_volume(path)
    assert volume.array.dtype == dtype
    assert np.array_equal(volume.array, values().T)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floats_become_float32(dtype, tmp_path):
    array = np.random.default_rng(0).normal(size=(6, 7, 4)).astype(dtype)
    volume = read_volume(nifti(tmp_path / "scan.nii", array))
    assert volume.array.dtype == np.float32
    assert np.array_equal(volume.array, array.T.astype(np.float32))


def test_scaled_integers_become_float32(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_shape((6, 7, 4))
    header.set_data_dtype(np.int16)
    header.set_sform(AFFINE, 1)
    header.set_slope_inter(0.5, -10)
    with open(tmp_path / "scan.nii", "wb") as file:
        header.write_to(file)
        file.write(values().tobytes(order="F"))
    volume = read_volume(tmp_path / "scan.nii")
    assert volume.array.dtype == np.float32
    assert np.array_equal(volume.array, values().T * 0.5 - 10)
    write_labels(tmp_path / "labels.nii", values().T, volume)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "labels.nii").dataobj), values())
    with pytest.raises(VolumeError, match="are not whole numbers"):
        read_labels(tmp_path / "scan.nii", volume)


def test_voxels_that_are_no_numbers_are_counted(tmp_path):
    array = values(dtype=np.float32)
    array[0, 0, 0], array[1, 2, 3], array[2, 2, 2] = np.nan, np.inf, -np.inf
    path = nifti(tmp_path / "scan.nii", array)
    with pytest.raises(VolumeError, match=r"3 of 168 voxels are NaN or infinite; read it with fill_nan=0"):
        read_volume(path)
    volume = read_volume(path, fill_nan=-7)
    assert volume.array[3, 2, 1] == -7
    assert (volume.array == -7).sum() == 3
    assert "3 voxels that were NaN or infinite are set to -7" in volume.notices
    path = nifti(tmp_path / "huge.nii", np.full((2, 2, 2), 1e300))
    with pytest.raises(VolumeError, match="8 of 8 voxels"):
        read_volume(path)


def test_labels_in_other_number_types(tmp_path):
    volume = read_volume(nifti(tmp_path / "scan.nii"))
    for dtype, expected in [("float64", "uint8"), ("float32", "uint8"), ("int32", "int32")]:
        labels = read_labels(nifti(tmp_path / "labels.nii", values(dtype=dtype)), volume)
        assert labels.dtype == expected
        assert np.array_equal(labels, values().T)
    labels = read_labels(nifti(tmp_path / "labels.nii", values(dtype="float32") - 300), volume)
    assert labels.dtype == np.int16
    assert labels.min() < 0
    array = values(dtype=np.float32)
    array[0, 0, :2] = (0.5, np.nan)
    with pytest.raises(VolumeError, match="2 of 168 voxels are not whole numbers"):
        read_labels(nifti(tmp_path / "labels.nii", array), volume)


def test_labels_of_another_grid_are_refused_with_both_grids(tmp_path):
    volume = read_volume(nifti(tmp_path / "scan.nii"))
    with pytest.raises(VolumeError, match=r"shape \(6, 7, 5\) but scan has \(6, 7, 4\)"):
        read_labels(nifti(tmp_path / "labels.nii", values((6, 7, 5))), volume)
    moved = AFFINE.copy()
    moved[0, 3] = 3
    with pytest.raises(
        VolumeError, match=r"up to 3 mm away .*\[-1.0, 0.0, 0.0, 3.0\].*\[-1.0, 0.0, 0.0, 0.0\]"
    ):
        read_labels(nifti(tmp_path / "labels.nii", affine=moved), volume)
    moved[0, 3] = 0.01  # rounding in a header
    assert read_labels(nifti(tmp_path / "labels.nii", affine=moved), volume).shape == volume.shape


def test_labels_of_a_frame(tmp_path):
    array = values((6, 7, 4, 3))
    path = nifti(tmp_path / "scan.nii", array)
    volume = read_volume(path, frame=1)
    assert np.array_equal(read_labels(path, volume), array[..., 1].T)
    assert np.array_equal(read_labels(path, volume, frame=2), array[..., 2].T)


def test_what_cannot_be_written_is_refused(tmp_path):
    volume = Volume.from_array(values((4, 7, 6)), (5, 1, 1))
    with pytest.raises(VolumeError, match="integers, got float64"):
        write_labels(tmp_path / "labels.nii", np.zeros(volume.shape), volume)
    with pytest.raises(VolumeError, match=r"= \(4, 7, 6\), got \(6, 7, 4\)"):
        write_labels(tmp_path / "labels.nii", np.zeros((6, 7, 4), dtype=int), volume)
    with pytest.raises(VolumeError, match=r"end the name in \.nii\.gz or \.nii"):
        write_labels(tmp_path / "labels.png", np.zeros(volume.shape, dtype=int), volume)
    (tmp_path / "file").write_text("")
    with pytest.raises(VolumeError, match="cannot be written"):
        write_labels(tmp_path / "file" / "labels.nii", np.zeros(volume.shape, dtype=int), volume)
    assert not list(tmp_path.glob("labels*"))


def test_broken_files_are_answered_in_one_line(tmp_path):
    whole = nifti(tmp_path / "whole.nii.gz", values((30, 30, 30))).read_bytes()
    plain = nifti(tmp_path / "whole.nii").read_bytes()
    sitk.WriteImage(itk_image(values((4, 7, 6))), tmp_path / "whole.mha")
    colour = np.zeros((6, 7, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nifti(tmp_path / "colour.nii", colour)
    nifti(tmp_path / "complex.nii", values(dtype=np.complex64))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 7, 6, 3)), isVector=True), tmp_path / "colour.nrrd")
    nib.save(nib.Nifti1Image(values((6, 7, 4, 1, 3)), AFFINE), tmp_path / "vectors.nii")
    nib.save(nib.Nifti1Image(values((6,)), AFFINE), tmp_path / "line.nii")
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.nii").write_bytes(plain[:400])
    (tmp_path / "header.nii").write_bytes(plain[:100])
    (tmp_path / "type.nii").write_bytes(plain[:70] + b"\x99\x09" + plain[72:])
    (tmp_path / "cut.mha").write_bytes((tmp_path / "whole.mha").read_bytes()[:-50])
    (tmp_path / "text.nrrd").write_text("hello")
    (tmp_path / "text.nii.gz").write_text("hello")
    (tmp_path / "empty.nii").touch()
    (tmp_path / "photo.png").write_text("png")
    (tmp_path / "folder").mkdir()
    expected = {
        "colour.nii": "3 components a voxel",
        "complex.nii": "complex64",
        "colour.nrrd": "3 component",
        "vectors.nii": "6 x 7 x 4 x 1 x 3",
        "line.nii": "got shape 6",
        "cut.nii.gz": "cannot be read",
        "cut.nii": "cannot be read",
        "header.nii": "cannot be read",
        "type.nii": "cannot be read",
        "cut.mha": "cannot be read",
        "text.nrrd": "cannot be read",
        "text.nii.gz": "cannot be read",
        "empty.nii": "the file is empty",
        "photo.png": "unknown kind of file, expected one of .nii.gz",
        "folder": "holds no DICOM series",
        "missing.nii": "no such file",
    }
    for name, reason in expected.items():
        with pytest.raises(VolumeError) as caught:
            read_volume(tmp_path / name)
        message = str(caught.value)
        assert reason in message, name
        assert message.startswith(str(tmp_path / name))
        assert "\n" not in message


def test_a_mixed_folder_goes_on_past_a_broken_file(tmp_path, capfd):
    nifti(tmp_path / "a.nii.gz")
    nifti(tmp_path / "c.NII", values((9, 8, 3)))
    (tmp_path / "b.nii.gz").write_bytes(b"broken")
    (tmp_path / "notes.txt").write_text("x")
    nifti(tmp_path / ".hidden.nii")
    sitk.WriteImage(itk_image(values((4, 7, 6))), tmp_path / "d.mha")
    nifti_below = tmp_path / "below"
    nifti_below.mkdir()
    nifti(nifti_below / "unseen.nii")
    dicom_series(tmp_path / "patient" / "series")
    found = find_volumes([tmp_path, tmp_path / "a.nii.gz", tmp_path / "missing.nii"])
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["a.nii.gz", "b.nii.gz", "c.NII", "d.mha", "patient/series", "missing.nii"]
    results = list(scan_volumes([tmp_path, tmp_path / "missing.nii"]))
    assert [result.name for result in results if isinstance(result, Volume)] == ["a", "c", "d", "series"]
    passed_over = [result for result in results if isinstance(result, Unreadable)]
    assert [result.path.name for result in passed_over] == ["b.nii.gz", "missing.nii"]
    assert "cannot be read" in passed_over[0].reason
    assert find_volumes(str(nifti_below)) == [nifti_below / "unseen.nii"]
    assert capfd.readouterr() == ("", "")


def test_a_header_tells_shape_and_spacing(tmp_path):
    array = values((6, 7, 4, 3))
    info = inspect_volume(nifti(tmp_path / "scan.nii.gz", array))
    assert (info.name, info.shape, info.num_frames) == ("scan", (4, 7, 6), 3)
    assert np.allclose(info.spacing, (5, 1.2, 1))


def test_names_lose_only_known_endings():
    assert volume_name("a/b.c.nii.gz") == "b.c"
    assert volume_name("b.NRRD") == "b"
    assert volume_name("series.1.2") == "series.1.2"


MEMORY = """
import resource, sys
import numpy as np
from kaf_model.config import SliceConfig
from kaf_model.slices import Slices
from kaf_model.volume import read_volume, write_labels
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
volume = read_volume(sys.argv[1])
slices = Slices(volume, SliceConfig())
labels = np.empty(volume.shape, dtype=np.uint8)
for first in range(0, 600, 8):
    images = slices.images(range(first, first + 8))
    labels[first : first + 8] = images.mean() > 0
write_labels(sys.argv[2], labels, volume)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured in kB on Linux only")
def test_a_whole_ct_needs_little_memory(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_shape((512, 512, 600))
    header.set_data_dtype(np.int16)
    header.set_sform(np.diag([0.7, -0.7, 1.0, 1]), 1)  # in-plane flips: the array must be copied once
    piece = values((512, 512)).tobytes()
    with open(tmp_path / "ct.nii", "wb") as file:  # a sparse file: most slices are zero
        header.write_to(file)
        for index in range(0, 600, 20):
            file.seek(352 + index * len(piece))
            file.write(piece)
        file.truncate(352 + 600 * len(piece))
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "ct.nii"), str(tmp_path / "labels.nii")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) / 2**20 < 1.2  # GiB; the voxels are 0.3
    assert nib.load(tmp_path / "labels.nii").shape == (512, 512, 600)
    for path in tmp_path.iterdir():
        path.unlink()
