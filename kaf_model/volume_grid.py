"""The stored grid of a file and the display order of its slices, and the lossless way between them.

A file stores voxels along its own axes (i, j, k). Reading picks one of them as the slice axis Z and
permutes and flips the two others, without interpolation, to the display order that is closest to
the radiological one:

    slice axis      Y runs towards   X runs towards
    axial           posterior        left
    coronal         inferior         left
    sagittal        inferior         posterior

Z keeps the stored direction, so slice z is the file's slice z. `slice_positions` carries the
anatomical direction instead. The slice axis is the one whose spacing is the largest by more than
10 %; when none stands out it is the stored third axis, and an image of one slice has its slice axis
where it has one voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import VolumeError
from kaf_model.geometry import spacing_of
from kaf_model.volume_read import Stored

_ISOTROPIC = 1.1  # spacings whose ratio is below this are taken for equal


@dataclass(frozen=True, eq=False)
class Source:
    """Where a volume came from: all that is needed to put a (Z, Y, X) map back on the stored grid.

    Attributes:
        path: File or DICOM folder.
        format: "nifti", "nrrd", "metaimage", "dicom" or "array".
        shape: Stored shape (i, j, k), or (i, j) of a 2-D file.
        affine: (4, 4) stored index (i, j, k) -> RAS+ mm.
        axes: The stored axis that became Z, Y and X.
        flips: Whether Z, Y and X run against their stored axis; Z never does.
        header: The nibabel header as stored, or None.
        frame: Index of the frame that was read from a 4-D file.
    """

    path: Path
    format: str
    shape: tuple[int, ...]
    affine: NDArray[np.float64]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    header: Any = None
    frame: int = 0

    def to_display(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Return a (Z, Y, X) view of an array in stored order."""
        if stored.shape != self.shape:
            raise VolumeError(
                f"a stored array of {self.path.name} has shape {self.shape}, got {stored.shape}"
            )
        return stored.reshape((*self.shape, 1)[:3]).transpose(self.axes)[self._turns]

    def to_stored(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a view in stored order of a (Z, Y, X) array; the inverse of `to_display`."""
        shape = self.display_shape
        if array.shape != shape:
            raise VolumeError(f"expected (Z, Y, X) = {shape} for {self.path.name}, got {array.shape}")
        stored = array[self._turns].transpose(np.argsort(self.axes).tolist())
        return stored[..., 0] if len(self.shape) == 2 else stored

    @property
    def display_shape(self) -> tuple[int, int, int]:
        """(Z, Y, X)."""
        size = (*self.shape, 1)
        return size[self.axes[0]], size[self.axes[1]], size[self.axes[2]]

    @property
    def display_affine(self) -> NDArray[np.float64]:
        """(4, 4) index (z, y, x) -> RAS+ mm."""
        moves = np.zeros((4, 4))  # (z, y, x, 1) -> (i, j, k, 1)
        moves[3, 3] = 1
        for index, (axis, flip, size) in enumerate(
            zip(self.axes, self.flips, self.display_shape, strict=True)
        ):
            moves[axis, index] = -1 if flip else 1
            moves[axis, 3] = size - 1 if flip else 0
        product: NDArray[np.float64] = self.affine @ moves
        return product

    @property
    def _turns(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)


def choose_source(stored: Stored | Source, slice_axis: int | None, frame: int) -> Source:
    """Choose Z, Y and X among the stored axes, as the module says.

    Args:
        stored: An opened file, or the grid of one.
        slice_axis: The stored axis that becomes Z; None picks it.
        frame: To be remembered.

    Raises:
        VolumeError: When `slice_axis` is not an axis.
    """
    size = (*stored.shape, 1)[:3]
    if slice_axis is None:
        slice_axis = _slice_axis(size, spacing_of(stored.affine))
    elif slice_axis not in (0, 1, 2):
        raise VolumeError(f"{stored.path}: slice_axis must be a stored axis, 0, 1 or 2, got {slice_axis}")
    from nibabel.orientations import io_orientation

    orientation = io_orientation(stored.affine)  # (3, 2): world axis and sign of each stored axis
    others = [axis for axis in range(3) if axis != slice_axis]
    across, down = sorted(others, key=lambda axis: float(orientation[axis, 0]))
    axes = (slice_axis, down, across)
    # Left, posterior and inferior are the falling directions of RAS+.
    flips = (False, bool(orientation[down, 1] > 0), bool(orientation[across, 1] > 0))
    return Source(
        path=stored.path,
        format=stored.format,
        shape=stored.shape,
        affine=stored.affine,
        axes=axes,
        flips=flips,
        header=stored.header,
        frame=frame,
    )


def _slice_axis(size: Sequence[int], spacing: Sequence[float]) -> int:
    single = [axis for axis in range(3) if size[axis] == 1]
    if len(single) == 1:
        return single[0]
    *_, second, largest = np.argsort(spacing, kind="stable").tolist()
    return int(largest) if spacing[largest] > _ISOTROPIC * spacing[second] else 2
