"""Files as they are stored: NIfTI, NRRD, MetaImage and DICOM series.

This room knows formats and nothing of anatomy: an opened file has a shape, an affine and voxels in
its own index order (i, j, k). `volume.py` turns that into slices that look the same whatever the
order was, and back. Every failure of a foreign library leaves here as a one-line `VolumeError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import VolumeError
from kaf_model.geometry import largest_shift, spacing_of
from kaf_model.volume_files import FORMATS, PathLike, format_of, is_dicom_file

SAME_GRID_TOLERANCE = 0.05  # of a voxel: headers round, and some programs store a quaternion only

_IMAGE_POSITION = "0020|0032"  # DICOM's Image Position (Patient)
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}


class Stored(Protocol):
    """An opened file whose voxels have not been read yet.

    Attributes:
        path: The file, or the folder of a DICOM series.
        format: "nifti", "nrrd", "metaimage" or "dicom".
        shape: Voxels along the stored axes, two or three of them; a time axis is not among them.
        num_frames: Volumes in the file.
        affine: (4, 4) index (i, j, k) -> RAS+ mm, always invertible.
        header: The nibabel header as stored, or None for other formats.
        notices: What the user should know, in plain words; reading voxels may add to it.
    """

    path: Path
    format: str
    shape: tuple[int, ...]
    num_frames: int
    affine: NDArray[np.float64]
    header: Any
    notices: list[str]

    def voxels(self, frame: int) -> tuple[NDArray[Any], float, float]:
        """Return raw values with the stored shape, and slope and intercept that are still to be applied."""


def open_stored(path: PathLike) -> Stored:
    """Open a file or a folder with a DICOM series.

    Raises:
        VolumeError: On a missing, unknown, broken or unsupported file.
    """
    path = Path(path)
    if path.is_dir():
        with readable(path):
            return DicomSeries(path)
    kind, _ = format_of(path)
    if not path.exists():
        raise VolumeError(f"{path}: no such file or folder; check the path")
    if not kind:
        hint = "; for DICOM give the folder that holds the series" if is_dicom_file(path) else ""
        raise VolumeError(f"{path}: unknown kind of file, expected one of {', '.join(FORMATS)}{hint}")
    if path.stat().st_size == 0:
        raise VolumeError(f"{path}: the file is empty; copy it again from its source")
    with readable(path):
        return NiftiFile(path) if kind == "nifti" else ItkFile(path, kind)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn whatever a reading library raises into a one-line `VolumeError`."""
    try:
        yield
    except VolumeError:
        raise
    except Exception as error:  # foreign readers raise nearly anything on a broken file
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1].removeprefix("sitk::ERROR: ") if lines else type(error).__name__
        message = f"{path}: cannot be read, it may be damaged or not what its name says ({reason})"
        raise VolumeError(message) from error


class NiftiFile:
    """A NIfTI-1 or NIfTI-2 file, 2-D to 4-D, plain or compressed."""

    format = "nifti"

    def __init__(self, path: Path) -> None:
        import nibabel as nib  # half a second that opening a panel should not wait for
        from nibabel.imageglobals import LoggingOutputSuppressor
        from nibabel.openers import ImageOpener

        self.path = path
        self.notices: list[str] = []
        with LoggingOutputSuppressor():  # what nibabel would print becomes a notice
            image = nib.load(path, mmap=False)  # a mapped file could change or vanish under the volume
            if not isinstance(image, (nib.Nifti1Image, nib.Nifti2Image)):
                raise VolumeError(f"{path}: expected a NIfTI volume, got {type(image).__name__}; convert it")
            with ImageOpener(path) as file:
                self.header = type(image.header).from_fileobj(file)
            with ImageOpener(path) as file:
                unchecked = type(image.header).from_fileobj(file, check=False)
        self._data = image.dataobj
        _check_type(path, self._data.dtype)
        shape = tuple(int(size) for size in self._data.shape)
        self.shape, self.num_frames = _split_frames(path, shape)
        self.affine = self._affine(np.asarray(unchecked["pixdim"][1:4], dtype=np.float64))

    def _affine(self, pixdim: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sform, else the qform, else the voxel sizes alone: the first invertible one, in mm."""
        header = self.header
        sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        if sform_code <= 0:
            used = pixdim[: len(self.shape)]
            if not (np.isfinite(used) & (used > 0)).all():
                sizes = " x ".join(f"{size:g}" for size in used)
                self.notices.append(
                    f"the header's voxel sizes are {sizes}; 1 mm is taken for those not positive"
                )
            if qform_code <= 0:
                self.notices.append(
                    "the header has neither sform nor qform: spacing is taken from pixdim, and left, right, "
                    "front and back are unknown"
                )
        if sform_code > 0 and qform_code > 0:
            if _is_invertible(affine):
                self._compare_forms(affine)
            else:
                affine = self._qform_instead_of(affine)
        affine = usable_affine(affine, np.abs(pixdim), self.notices)
        unit = header.get_xyzt_units()[0]
        if unit in _MM_PER_UNIT:
            self.notices.append(f"the header gives lengths in units of one {unit}; they are converted to mm")
            affine = np.diag([_MM_PER_UNIT[unit]] * 3 + [1.0]) @ affine
        return affine

    def _qform_instead_of(self, sform: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the qform if it can be used, else the sform as it is."""
        from nibabel.spatialimages import HeaderDataError

        try:
            qform = np.asarray(self.header.get_qform(), dtype=np.float64)
        except (ValueError, HeaderDataError):
            return sform
        if not _is_invertible(qform):
            return sform
        self.notices.append("the header's sform is singular or not finite; the qform is used")
        return qform

    def _compare_forms(self, sform: NDArray[np.float64]) -> None:
        from nibabel.spatialimages import HeaderDataError

        try:
            apart = largest_shift(sform, self.header.get_qform(coded=False), (*self.shape, 1))
        except (ValueError, HeaderDataError):
            self.notices.append("the header's qform is not a rotation; the sform is used")
            return
        if not apart <= SAME_GRID_TOLERANCE * min(spacing_of(sform)):
            self.notices.append(
                f"the header's sform and qform differ by up to {apart:.3g} mm; the sform is used"
            )

    def voxels(self, frame: int) -> tuple[NDArray[Any], float, float]:
        """Return raw values (i, j, k) or (i, j) of one frame, and slope and intercept."""
        with readable(self.path):
            if self.num_frames > 1:
                extra = self._data.ndim - 4
                index = (slice(None), slice(None), slice(None), frame, *[0] * extra)
                return np.asarray(self._data[index]).reshape(self.shape), 1.0, 0.0
            raw = np.asarray(self._data.get_unscaled()).reshape(self.shape)
            return raw, float(self._data.slope), float(self._data.inter)


class ItkFile:
    """An NRRD or MetaImage file, 2-D to 4-D, read by SimpleITK."""

    header = None

    def __init__(self, path: Path, kind: str) -> None:
        import SimpleITK as sitk

        self.path, self.format = path, kind
        self.notices: list[str] = []
        with _quiet_itk():
            reader = sitk.ImageFileReader()
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
        _check_components(path, reader)
        self.shape, self.num_frames = _split_frames(path, tuple(int(size) for size in reader.GetSize()))
        self.affine = usable_affine(_itk_affine(reader), np.asarray(reader.GetSpacing()), self.notices)
        self._reader = reader

    def voxels(self, frame: int) -> tuple[NDArray[Any], float, float]:
        """Return values (i, j, k) or (i, j) of one frame; SimpleITK has no slope of its own."""
        import SimpleITK as sitk

        with readable(self.path), _quiet_itk():
            array = sitk.GetArrayFromImage(self._reader.Execute())
        if self.num_frames > 1:
            array = array[frame]
        return array.T.reshape(self.shape), 1.0, 0.0


class DicomSeries:
    """A folder of DICOM files; of several series the one with most files."""

    format = "dicom"
    header = None
    num_frames = 1

    def __init__(self, path: Path) -> None:
        import SimpleITK as sitk

        self.path = path
        self.notices: list[str] = []
        with _quiet_itk():
            series = sitk.ImageSeriesReader
            uids = series.GetGDCMSeriesIDs(str(path))
            found = [series.GetGDCMSeriesFileNames(str(path), uid) for uid in uids]
            if not found:
                raise VolumeError(
                    f"{path}: the folder holds no DICOM series; give a file or the series' folder"
                )
            self._files = max(found, key=len)
            first, last = (_itk_information(file) for file in (self._files[0], self._files[-1]))
        if len(found) > 1:
            counts = ", ".join(str(len(files)) for files in sorted(found, key=len, reverse=True))
            self.notices.append(
                f"the folder holds {len(found)} DICOM series of {counts} files; the largest is read"
            )
        _check_components(path, first)
        columns, rows, *depth = (int(size) for size in first.GetSize())
        affine = _itk_affine(first)
        if len(self._files) > 1:  # the true step, gantry tilt included
            affine[:3, 2] = (_itk_affine(last)[:3, 3] - affine[:3, 3]) / (len(self._files) - 1)
            depth = [len(self._files)]
        self.shape = (columns, rows, *(depth or [1]))
        self.affine = usable_affine(affine, np.asarray(first.GetSpacing()), self.notices)

    def voxels(self, frame: int) -> tuple[NDArray[Any], float, float]:
        """Return values (i, j, k), rescaled to the modality's units by GDCM."""
        import SimpleITK as sitk

        with readable(self.path), _quiet_itk():
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(self._files)
            reader.MetaDataDictionaryArrayUpdateOn()
            image = reader.Execute()
            self._check_steps(reader)
            return sitk.GetArrayFromImage(image).T.reshape(self.shape), 1.0, 0.0

    def _check_steps(self, reader: Any) -> None:
        """Tell of missing or doubled slices."""
        slices = range(len(self._files))
        if len(slices) < 2 or not all(reader.HasMetaDataKey(index, _IMAGE_POSITION) for index in slices):
            return
        positions = [reader.GetMetaData(index, _IMAGE_POSITION).split("\\") for index in slices]
        steps = np.linalg.norm(np.diff(np.array(positions, dtype=np.float64), axis=0), axis=1)  # (Z - 1,)
        if np.ptp(steps) > SAME_GRID_TOLERANCE * np.median(steps):
            self.notices.append(
                f"the slices are unevenly spaced, {steps.min():.3g} to {steps.max():.3g} mm apart: "
                "some may be missing, and distances along them are not exact"
            )


def usable_affine(
    affine: NDArray[np.float64], sizes: NDArray[np.float64], notices: list[str]
) -> NDArray[np.float64]:
    """Return the affine, or one made from voxel sizes when it is singular or not finite.

    Args:
        affine: (4, 4) as the header has it.
        sizes: Voxel sizes in mm to fall back on; those not positive count as 1.
        notices: Told when the affine had to be replaced.
    """
    if _is_invertible(affine):
        return affine
    notices.append("the header's affine is singular or not finite: position and orientation are unknown")
    filled = np.ones(3)
    filled[: len(sizes[:3])] = sizes[:3]
    filled[~(np.isfinite(filled) & (filled > 0))] = 1.0
    return _LPS_TO_RAS @ np.diag([*filled, 1.0])


def _is_invertible(affine: NDArray[np.float64]) -> bool:
    if not np.isfinite(affine).all():
        return False
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(lengths.min() > 0 and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-6)


def _split_frames(path: Path, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Part a stored shape into that of one volume (2-D or 3-D) and the number of volumes."""
    shown = " x ".join(map(str, shape)) or "nothing"
    frames = shape[3] if len(shape) > 3 else 1
    if len(shape) < 2 or min(shape) < 1 or any(size > 1 for size in shape[4:]):
        raise VolumeError(f"{path}: expected 2-D, 3-D or 4-D with a voxel at least a side, got shape {shown}")
    return shape[:3], frames


def _check_type(path: Path, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "iuf":
        what = f"{len(dtype.names)} components a voxel (colour)" if dtype.names else f"voxels of type {dtype}"
        raise VolumeError(f"{path}: expected one real number a voxel, got {what}; convert it to grey values")


def _check_components(path: Path, reader: Any) -> None:
    import SimpleITK as sitk

    number, kind = reader.GetNumberOfComponents(), sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if number != 1 or "complex" in kind:
        raise VolumeError(
            f"{path}: expected one real number a voxel, got {number} component(s) of {kind}; "
            "convert it to grey values"
        )


def _itk_information(file: str) -> Any:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return reader


def _itk_affine(reader: Any) -> NDArray[np.float64]:
    """Return the (4, 4) index -> RAS+ affine of an ITK image of 2 to 4 dimensions; ITK's world is LPS."""
    dimension = reader.GetDimension()
    used = min(dimension, 3)
    affine = np.eye(4)
    direction = np.asarray(reader.GetDirection(), dtype=np.float64).reshape(dimension, dimension)
    affine[:used, :used] = (direction * np.asarray(reader.GetSpacing(), dtype=np.float64))[:used, :used]
    affine[:used, 3] = reader.GetOrigin()[:used]
    return _LPS_TO_RAS @ affine


@contextmanager
def _quiet_itk() -> Iterator[None]:
    """Keep ITK from printing its warnings to the terminal."""
    import SimpleITK as sitk

    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
