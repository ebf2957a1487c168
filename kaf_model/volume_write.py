"""Label maps and maps of numbers, written as NIfTI on the grid of the volume they belong to.

A NIfTI source lends its header: the same sform and qform with their codes, the same units. Other
sources give a NIfTI with their RAS+ affine. What is written can be compared with `same_grid`.
"""

from __future__ import annotations

import gzip
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kaf_model.errors import VolumeError
from kaf_model.geometry import largest_shift, spacing_of
from kaf_model.volume_files import PathLike, format_of
from kaf_model.volume_read import open_stored

if TYPE_CHECKING:
    from kaf_model.volume import Volume

# In the order of preference; those which few programs read come last.
_LABEL_TYPES = tuple(map(np.dtype, ("uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")))
_REREAD_TOLERANCE = 1e-3  # of a voxel: an affine is stored in float32


def write_labels(path: PathLike, labels: NDArray[Any], like: Volume) -> None:
    """Write a label map on the stored grid of a volume.

    Args:
        path: Ends in .nii or .nii.gz; replaced in one step, so it never holds half a file.
        labels: (Z, Y, X) integers or booleans.
        like: The volume that the labels belong to.

    Raises:
        VolumeError: On another shape, type or ending, or when the file cannot be written.
    """
    labels = np.asanyarray(labels)
    if labels.dtype.kind not in "iub":
        raise VolumeError(f"labels must be integers, got {labels.dtype}; round and convert them first")
    _check_shape("labels", labels.shape, like)
    dtype = smallest_type(int(labels.min()), int(labels.max()))
    header = _header_for(like, like.source.shape, dtype)
    _write(_nifti_path(path), header, [like.to_stored(labels)])


def write_maps(path: PathLike, maps: NDArray[Any], like: Volume) -> None:
    """Write maps of numbers, such as class probabilities, on the stored grid of a volume, as float32.

    Args:
        path: Ends in .nii or .nii.gz; replaced in one step.
        maps: (Z, Y, X) or (K, Z, Y, X) numbers; K becomes the fourth axis. A `numpy.memmap` is read
            slice by slice.
        like: The volume that the maps belong to.

    Raises:
        VolumeError: On another shape, type or ending, or when the file cannot be written.
    """
    maps = np.asanyarray(maps)
    if maps.dtype.kind not in "iubf" or maps.ndim not in (3, 4):
        raise VolumeError(f"maps must be (Z, Y, X) or (K, Z, Y, X) numbers, got {maps.dtype} {maps.shape}")
    _check_shape("maps", maps.shape[-3:], like)
    shape, frames = like.source.shape, maps[None] if maps.ndim == 3 else maps
    if maps.ndim == 4:
        shape = (*(*shape, 1)[:3], len(maps))
    header = _header_for(like, shape, np.dtype(np.float32))
    _write(_nifti_path(path), header, (like.to_stored(frame) for frame in frames))


def same_grid(path: PathLike, like: Volume) -> list[str]:
    """Re-read a file and return in words how its grid differs from a volume's; empty when it does not.

    Raises:
        VolumeError: When the file cannot be read.
    """
    stored, source = open_stored(path), like.source
    differences = []
    if (*stored.shape, 1)[:3] != (*source.shape, 1)[:3]:
        differences.append(f"shape is {stored.shape}, expected {source.shape}")
    apart = largest_shift(stored.affine, source.affine, (*source.shape, 1))
    if not apart <= _REREAD_TOLERANCE * min(spacing_of(source.affine)):
        differences.append(f"voxels lie up to {apart:.3g} mm away from where they should")
    if stored.header is not None and source.header is not None:
        for code in ("sform_code", "qform_code"):
            came, wanted = int(stored.header[code]), int(source.header[code])
            if came != wanted:
                differences.append(f"{code} is {came}, expected {wanted}")
    return differences


def smallest_type(low: int, high: int) -> np.dtype[Any]:
    """Return the smallest integer type for a range of values, of those that other programs read best.

    Raises:
        VolumeError: When none holds them all.
    """
    fits = [kind for kind in _LABEL_TYPES if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max]
    if not fits:
        raise VolumeError(f"no integer type holds labels from {low:g} to {high:g}; give a label map")
    return min(fits, key=lambda kind: kind.itemsize)


def _nifti_path(path: PathLike) -> Path:
    if format_of(Path(path))[0] != "nifti":
        raise VolumeError(f"{path}: labels and maps are written as NIfTI; end the name in .nii.gz or .nii")
    return Path(path)


def _check_shape(what: str, shape: tuple[int, ...], like: Volume) -> None:
    if tuple(shape) != like.shape:
        raise VolumeError(f"{what} must have the shape of {like.name}, (Z, Y, X) = {like.shape}, got {shape}")


def _header_for(like: Volume, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Return a NIfTI header of the given shape and type on the grid of a volume."""
    source = like.source
    if source.header is None:
        import nibabel as nib

        header: Any = (nib.Nifti1Header if max(shape) < 2**15 else nib.Nifti2Header)()
    else:
        header = source.header.copy()
        header.extensions.clear()  # they describe the image, and may name the patient
        header.set_intent("none")
        header["cal_min"] = header["cal_max"] = 0
    pixdim = header["pixdim"][:4].copy()
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header.set_slope_inter(1, 0)
    if source.header is None:
        header.set_sform(source.affine, code=1)
        header.set_qform(source.affine, code=1)
        header.set_xyzt_units("mm")
    else:
        header["pixdim"][:4] = pixdim  # nibabel forgets those beyond the shape; the qform needs them
    return header


def _write(path: Path, header: Any, frames: Iterable[NDArray[Any]]) -> None:
    """Write frames behind a header, slice by slice, so that the path never holds half a file.

    Args:
        path: Ends in .nii or .nii.gz; its folder is made when missing.
        header: NIfTI header that already says shape and type.
        frames: Arrays (i, j, k) or (i, j) in stored order; may be views of a file on disk.
    """
    header["vox_offset"] = 0  # nibabel puts the smallest there is
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            if path.name.lower().endswith(".gz"):
                with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as packed:
                    _write_frames(packed, header, frames)
            else:
                _write_frames(file, header, frames)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise VolumeError(f"{path}: cannot be written ({reason}); choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_frames(file: BinaryIO | gzip.GzipFile, header: Any, frames: Iterable[NDArray[Any]]) -> None:
    header.write_to(file)
    file.write(b"\0" * (int(header["vox_offset"]) - file.tell()))
    dtype: DTypeLike = header.get_data_dtype()
    for frame in frames:
        for piece in frame.T:  # the last axis varies slowest on disk
            file.write(piece.astype(dtype, order="C").tobytes())
