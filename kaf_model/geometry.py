"""Where things are: points in a slice, cells of a feature pyramid, and voxels in the scanner's world.

Points are float (y, x) in pixels with pixel centres at integers, so an image of height H covers
-0.5 .. H - 0.5. OpenCV speaks (x, y): `to_xy` and `from_xy` are the only place where that is known.
Affines map voxel indices to RAS+ millimetres.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch

    Points = TypeVar("Points", NDArray[Any], torch.Tensor)
else:
    Points = TypeVar("Points")


def to_xy(points: Points) -> Points:
    """Flip (y, x) points to OpenCV's (x, y).

    Shape: (..., 2) -> (..., 2), a copy.
    """
    return points[..., [1, 0]]


def from_xy(points: Points) -> Points:
    """Flip OpenCV's (x, y) points to (y, x).

    Shape: (..., 2) -> (..., 2), a copy.
    """
    return points[..., [1, 0]]


def resample_points(points: Points, scale: float | Sequence[float]) -> Points:
    """Return where points lie after their image was resampled.

    Pixel centres are at integers, so a pixel's centre is half a pixel from the border on either grid.

    Args:
        points: (..., 2) positions (y, x) on the old grid.
        scale: New size over old size, one factor or one each for (y, x).
    """
    if isinstance(points, np.ndarray):
        factor = np.asarray(scale, dtype=points.dtype if points.dtype.kind == "f" else np.float64)
        moved: NDArray[Any] = (points + 0.5) * factor - 0.5
        return moved
    if not isinstance(scale, (int, float)):
        import torch

        points = points if points.is_floating_point() else points.float()
        return (points + 0.5) * torch.as_tensor(scale, dtype=points.dtype, device=points.device) - 0.5
    return (points + 0.5) * scale - 0.5


def level_cells(positions: torch.Tensor, level: int, height: int, width: int) -> torch.Tensor:
    """Return the cell of a pyramid level in which each position lies.

    Args:
        positions: (..., 2) float (y, x) in full-resolution pixels.
        level: Number of halvings; 0 is full resolution.
        height: Rows of the level's map.
        width: Columns of the level's map.

    Returns:
        (..., 2) int64 (row, column), positions outside of the map clamped to its nearest cell.
    """
    import torch

    cells = torch.floor((positions + 0.5) / 2**level).long()
    return torch.stack((cells[..., 0].clamp(0, height - 1), cells[..., 1].clamp(0, width - 1)), dim=-1)


def voxel_to_world(affine: ArrayLike, points: ArrayLike) -> NDArray[np.float64]:
    """Map voxel indices to millimetres.

    Shape: affine (4, 4), points (..., 3) in the index order of the affine -> (..., 3) RAS+.
    """
    matrix = np.asarray(affine, dtype=np.float64)
    return np.asarray(points, dtype=np.float64) @ matrix[:3, :3].T + matrix[:3, 3]


def spacing_of(affine: ArrayLike) -> tuple[float, float, float]:
    """Return the distance in mm between neighbouring voxels along each index axis of a (4, 4) affine."""
    first, second, third = np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0)
    return float(first), float(second), float(third)


def obliquity(affine: ArrayLike) -> float:
    """Return the largest angle in degrees between an index axis and the world axis closest to it."""
    matrix = np.asarray(affine, dtype=np.float64)[:3, :3]
    cosines = np.abs(matrix).max(axis=0) / np.linalg.norm(matrix, axis=0)
    return float(np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0))).max())


def is_oblique(affine: ArrayLike, tolerance_degrees: float = 0.5) -> bool:
    """Return whether any index axis is further than the tolerance from every world axis."""
    return obliquity(affine) > tolerance_degrees


def largest_shift(affine0: ArrayLike, affine1: ArrayLike, shape: Sequence[int]) -> float:
    """Return how far apart in mm two affines put the same voxel, at worst.

    The difference of two affine maps is largest in a corner of the grid.

    Args:
        affine0: (4, 4) voxel index -> mm.
        affine1: (4, 4) voxel index -> mm.
        shape: Voxels along each index axis.
    """
    ends = [(0, size - 1) for size in shape[:3]]
    corners = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1)  # (2, 2, 2, 3)
    apart = voxel_to_world(affine0, corners) - voxel_to_world(affine1, corners)
    return float(np.linalg.norm(apart, axis=-1).max())
