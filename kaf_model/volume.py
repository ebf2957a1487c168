"""A volume as (Z, Y, X) slices that look the same however its file is laid out, and the way back.

A file is read without interpolation: integers stay integers, and its axes are only permuted and
flipped, as `volume_grid` says. What belongs to a volume is written back on the grid of its file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kaf_model.errors import UserError, VolumeError
from kaf_model.geometry import is_oblique, largest_shift, obliquity, spacing_of
from kaf_model.volume_files import PathLike, find_volumes, volume_name
from kaf_model.volume_grid import Source, choose_source
from kaf_model.volume_read import SAME_GRID_TOLERANCE, Stored, open_stored
from kaf_model.volume_write import same_grid, smallest_type, write_labels, write_maps

__all__ = [
    "Source",
    "Unreadable",
    "Volume",
    "VolumeError",
    "VolumeInfo",
    "find_volumes",
    "inspect_volume",
    "read_labels",
    "read_volume",
    "same_grid",
    "scan_volumes",
    "volume_name",
    "write_labels",
    "write_maps",
]


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels in display order with their place in the world.

    Attributes:
        array: (Z, Y, X), contiguous; integers as stored, else float32.
        spacing: mm between voxels along (z, y, x).
        affine: (4, 4) index (z, y, x) -> RAS+ mm.
        source: The stored grid.
        notices: What the user should know about this volume, in plain words.
    """

    array: NDArray[Any]
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]
    source: Source
    notices: tuple[str, ...] = ()

    @classmethod
    def from_array(
        cls,
        array: NDArray[Any],
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        affine: ArrayLike | None = None,
        name: str = "array",
        fill_nan: float | None = None,
    ) -> Volume:
        """Make a volume from an array in memory, already in display order.

        Args:
            array: (Z, Y, X) numbers, or one slice (Y, X).
            spacing: mm along (z, y, x); not used when an affine is given.
            affine: (4, 4) index (z, y, x) -> RAS+ mm. Without it Z runs up, Y back and X left.
            name: What to call it.
            fill_nan: Value for voxels that are NaN or infinite, in a copy; None leaves them.
        """
        array = np.ascontiguousarray(array[None] if array.ndim == 2 else array)
        if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "iuf":
            raise VolumeError(f"a volume needs (Z, Y, X) real numbers, got {array.dtype} {array.shape}")
        size = np.asarray(spacing, dtype=np.float64)
        if size.shape != (3,) or not (np.isfinite(size) & (size > 0)).all():
            raise VolumeError(f"spacing must be 3 positive mm values (z, y, x), got {spacing}")
        if affine is None:
            affine = np.array([[0, 0, -size[2], 0], [0, -size[1], 0, 0], [size[0], 0, 0, 0], [0, 0, 0, 1]])
        stored = np.asarray(affine, dtype=np.float64)[:, [2, 1, 0, 3]]  # stored as (x, y, z)
        source = Source(
            path=Path(name),
            format="array",
            shape=array.shape[::-1],
            affine=stored,
            axes=(2, 1, 0),
            flips=(False, False, False),
        )
        notices: tuple[str, ...] = ()
        if fill_nan is not None and not all(np.isfinite(plane).all() for plane in array):
            array, num_bad = _intensities(array.copy(), 1.0, 0.0, fill_nan)
            notices = (_filled(num_bad, fill_nan),)
        return _volume(array, source, notices)

    @property
    def name(self) -> str:
        """File name without its ending."""
        return volume_name(self.source.path)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, Y, X)."""
        return self.source.display_shape

    @property
    def num_slices(self) -> int:
        """Z."""
        return self.shape[0]

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3])) / 1000)

    @property
    def slice_positions(self) -> NDArray[np.float32]:
        """(Z,) from 0 to 1 towards right, front or top, however the file is stored; 0.5 of one slice."""
        if self.num_slices == 1:
            return np.full(1, 0.5, dtype=np.float32)
        positions = np.linspace(0, 1, self.num_slices, dtype=np.float32)
        from nibabel.orientations import io_orientation

        ascending = io_orientation(self.affine)[0, 1] > 0
        return positions if ascending else positions[::-1].copy()

    def along(self, slice_axis: int) -> Volume:
        """Return the same voxels cut into slices along another stored axis.

        Args:
            slice_axis: Stored axis (0, 1 or 2) that becomes Z.
        """
        source = choose_source(self.source, slice_axis, self.source.frame)
        array = np.ascontiguousarray(source.to_display(self.to_stored(self.array)))
        return _volume(array, source, self.notices)

    def to_stored(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a (Z, Y, X) map on the grid of the file: a view of shape (i, j, k), or (i, j) if 2-D."""
        return self.source.to_stored(array)

    def to_volume(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Return an array on the grid of the file as (Z, Y, X): the inverse of `to_stored`."""
        return self.source.to_display(stored)


@dataclass(frozen=True)
class VolumeInfo:
    """What the header of a file tells, before its voxels are read.

    Attributes:
        path: File or DICOM folder.
        name: File name without its ending.
        shape: (Z, Y, X).
        spacing: mm along (z, y, x).
        num_frames: Volumes in the file; more than one needs a choice of frame.
    """

    path: Path
    name: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    num_frames: int


@dataclass(frozen=True)
class Unreadable:
    """A file that was passed over, and why."""

    path: Path
    reason: str


def read_volume(
    path: PathLike, *, slice_axis: int | None = None, frame: int | None = None, fill_nan: float | None = None
) -> Volume:
    """Read a volume into display order, without interpolation.

    Args:
        path: NIfTI, NRRD or MetaImage file, or a folder with a DICOM series.
        slice_axis: Stored axis (0, 1 or 2) to slice along; None picks it as the module says.
        frame: Which volume of a 4-D file, from 0; needed when there is more than one.
        fill_nan: Value for voxels that are NaN or infinite; None makes them an error.

    Returns:
        The volume; integers stay integers unless the file scales them, everything else is float32.

    Raises:
        VolumeError: On anything that cannot be read as one volume of finite numbers.
        UserError: If `fill_nan` is not finite itself.
    """
    if fill_nan is not None and not math.isfinite(fill_nan):
        raise UserError(f"voxels that are NaN or infinite can only be set to a finite number, not {fill_nan}")
    stored = open_stored(path)
    frame = _frame(stored, frame)
    source = choose_source(stored, slice_axis, frame)
    raw, slope, intercept = stored.voxels(frame)
    array, num_bad = _intensities(source.to_display(raw), slope, intercept, fill_nan)
    if num_bad:
        if fill_nan is None:
            raise VolumeError(
                f"{path}: {num_bad} of {array.size} voxels are NaN or infinite; read it with fill_nan=0, "
                "or another value for them"
            )
        stored.notices.append(_filled(num_bad, fill_nan))
    if is_oblique(source.affine):
        stored.notices.append(
            f"oblique: its axes are turned by up to {obliquity(source.affine):.0f} degrees from the "
            "body's; it is shown along its own axes and its affine is kept"
        )
    return _volume(array, source, tuple(stored.notices))


def inspect_volume(path: PathLike, *, slice_axis: int | None = None) -> VolumeInfo:
    """Return shape and spacing of a volume from its header alone.

    Raises:
        VolumeError: When the header cannot be read.
    """
    stored = open_stored(path)
    source = choose_source(stored, slice_axis, 0)
    return VolumeInfo(
        path=stored.path,
        name=volume_name(stored.path),
        shape=source.display_shape,
        spacing=spacing_of(source.display_affine),
        num_frames=stored.num_frames,
    )


def scan_volumes(paths: Iterable[PathLike], **options: Any) -> Iterator[Volume | Unreadable]:
    """Read the volumes in files and folders one by one; those that cannot be read are named.

    Args:
        paths: As for `find_volumes`.
        **options: As for `read_volume`.
    """
    for path in find_volumes(paths):
        try:
            yield read_volume(path, **options)
        except VolumeError as error:
            yield Unreadable(path=path, reason=str(error))


def read_labels(path: PathLike, like: Volume, *, frame: int | None = None) -> NDArray[Any]:
    """Read the label map that belongs to a volume.

    Args:
        path: A file on the same grid as the volume: same stored shape, same affine.
        like: The volume.
        frame: Which map of a 4-D file; None takes the frame of the volume.

    Returns:
        (Z, Y, X) integers, of the stored type, or of the smallest type when the file holds whole
        numbers in another form.

    Raises:
        VolumeError: On another grid, or on values that are not whole numbers.
    """
    stored, source = open_stored(path), like.source
    if (*stored.shape, 1)[:3] != (*source.shape, 1)[:3]:
        raise VolumeError(
            f"{path}: the labels have shape {stored.shape} but {like.name} has {source.shape}; "
            "give labels drawn on this volume, or resample them to it"
        )
    apart = largest_shift(stored.affine, source.affine, (*source.shape, 1))
    if not apart <= SAME_GRID_TOLERANCE * min(spacing_of(source.affine)):
        raise VolumeError(
            f"{path}: the labels lie up to {apart:.3g} mm away from {like.name}: their affine is "
            f"{_shown(stored.affine)}, expected {_shown(source.affine)}; resample them to the volume"
        )
    if frame is None and stored.num_frames > 1 and source.frame < stored.num_frames:
        frame = source.frame
    raw, slope, intercept = stored.voxels(_frame(stored, frame))
    return _whole_numbers(source.to_display(raw.reshape(source.shape)), slope, intercept, Path(path))


def _volume(array: NDArray[Any], source: Source, notices: tuple[str, ...]) -> Volume:
    affine = source.display_affine
    return Volume(array=array, spacing=spacing_of(affine), affine=affine, source=source, notices=notices)


def _frame(stored: Stored, frame: int | None) -> int:
    """Return the frame to read, or say how to choose one."""
    count = stored.num_frames
    if frame is None and count > 1:
        raise VolumeError(
            f"{stored.path}: holds {count} frames; choose one with frame=0 to frame={count - 1}"
        )
    if frame is not None and not 0 <= frame < count:
        raise VolumeError(f"{stored.path}: has no frame {frame}, it holds {count}, counted from 0")
    return frame or 0


def _filled(num_bad: int, fill_nan: float) -> str:
    return f"{num_bad} voxels that were NaN or infinite are set to {fill_nan:g}"


def _scaled(view: NDArray[Any], slope: float, intercept: float) -> Iterator[NDArray[np.float64]]:
    """Yield the slabs of an array as the numbers they stand for; the whole of it would be large."""
    for values in view:
        yield values.astype(np.float64) * slope + intercept


def _intensities(
    view: NDArray[Any], slope: float, intercept: float, fill_nan: float | None
) -> tuple[NDArray[Any], int]:
    """Return a contiguous (Z, Y, X) array in a native type, and how many voxels were not finite."""
    scaled = (slope, intercept) != (1.0, 0.0)
    if view.dtype.kind in "iu" and not scaled:  # writeable, or torch complains
        return np.require(view, dtype=view.dtype.newbyteorder("="), requirements=["C", "W"]), 0
    same = view.dtype == np.float32 and view.flags.c_contiguous and view.flags.writeable and not scaled
    array = view if same else np.empty(view.shape, dtype=np.float32)
    num_bad = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for target, values in zip(array, _scaled(view, slope, intercept) if scaled else view, strict=True):
            if not same:
                target[...] = values
            bad = ~np.isfinite(target)
            if bad.any():
                num_bad += int(bad.sum())
                target[bad] = 0 if fill_nan is None else fill_nan
    return array, num_bad


def _whole_numbers(view: NDArray[Any], slope: float, intercept: float, path: Path) -> NDArray[Any]:
    """Return a contiguous array of integers in a native type."""
    if view.dtype.kind in "iu" and (slope, intercept) == (1.0, 0.0):
        return np.require(view, dtype=view.dtype.newbyteorder("="), requirements=["C", "W"])
    num_bad, low, high = 0, 0, 0
    for values in _scaled(view, slope, intercept):
        fine = np.isfinite(values) & (values == np.round(values))
        num_bad += int((~fine).sum())
        low, high = min(low, int(values[fine].min(initial=0))), max(high, int(values[fine].max(initial=0)))
    if num_bad:
        raise VolumeError(
            f"{path}: {num_bad} of {view.size} voxels are not whole numbers, so this is no label map; "
            "give the file with the labels"
        )
    try:
        dtype = smallest_type(low, high)
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}") from error
    labels = np.empty(view.shape, dtype)
    for target, values in zip(labels, _scaled(view, slope, intercept), strict=True):
        target[...] = values
    return labels


def _shown(affine: NDArray[np.float64]) -> str:
    return str(np.round(affine[:3], 3).tolist())
