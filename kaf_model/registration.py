"""A labelled volume laid onto another one: an affine map, then a smooth invertible one, by what the images show.

The likeness of two images is their squared correlation in small windows (Avants et al., Symmetric diffeomorphic
image registration with cross-correlation, Medical Image Analysis 12(1), 2008), which does not mind that the same
tissue is brighter in one of them. The second map is the exponential of a velocity that does not change in time
(Arsigny et al., A log-Euclidean framework for statistics on diffeomorphisms, MICCAI 2006), found by gradient descent
on likeness and smoothness, from coarse to fine, in the box around the labelled structures alone. Nothing is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Box = tuple[slice, slice, slice]
"""Voxels of an image: slices along z, y and x with a start and a stop."""

LEAST_VARIANCE = 1e-4
"""Variance in a window, of images with variance 1, below which it counts as this much: nothing is to be seen there."""

MARGIN = 4.0
"""Margin around the structures in which the images have to fit, in units of the registration."""

MOST_VOXELS = 100_000
"""About how many voxels are compared at once; larger volumes and structures are compared more coarsely."""

_AFFINE_STEPS, _AFFINE_RATE = 40, 0.02
_LEVELS = ((2, 4, 40), (1, 2, 15))  # units a voxel, units between velocities, steps
_VELOCITY_RATE = 0.15  # units
_WINDOW = 5  # voxels of a level along an axis; the finest has two more
_SMOOTHNESS = 0.02
_HALVINGS = 3  # of the velocity, before it is followed that often, each time twice as far
_STEPS_A_PAUSE = 5
_SOME = 0.1  # of a window that is structure: enough to look there


@dataclass(frozen=True)
class Picture:
    """An image to register.

    Attributes:
        values: (Z, H, W) float32 with mean 0 and standard deviation 1, or nearly.
        spacing: mm a voxel (z, y, x).
    """

    values: Tensor
    spacing: tuple[float, float, float]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, H, W)."""
        depth, height, width = self.values.shape
        return depth, height, width

    def mm(self, like: Tensor) -> Tensor:
        """The spacing as a tensor beside another."""
        return torch.tensor(self.spacing, dtype=torch.float32, device=like.device)

    def middle(self) -> Tensor:
        """Voxel coordinates of the centre, (3,)."""
        return (torch.tensor(self.shape, dtype=torch.float32, device=self.values.device) - 1) / 2

    def smoothed(self, steps: Sequence[int]) -> Tensor:
        """The values as they may be looked at every so many voxels, (Z, H, W)."""
        return windowed(self.values[None], [2 * (step // 2) + 1 for step in steps])[0]

    def steps(self, distance: float) -> list[int]:
        """How many voxels along each axis come nearest to a distance in mm, at least one."""
        return [max(1, round(distance / size)) for size in self.spacing]


@dataclass(frozen=True)
class Registered:
    """Where the voxels of a box of the fixed image lie in the moving one.

    Attributes:
        box: The box, with what was to be carried and a margin.
        points: (z, h, w, 3) voxel coordinates in the moving image.
        likeness: (z, h, w) squared correlation 0..1 of the images around each voxel of the box.
    """

    box: Box
    points: Tensor
    likeness: Tensor


def register(moving: Picture, structure: Tensor, fixed: Picture) -> Generator[None, None, Registered | None]:
    """Find where a structure of one image lies in another one, of the same body part in the same orientation.

    Args:
        moving: The image with the structure.
        structure: (Z, H, W) true where it is.
        fixed: The other image.

    Yields:
        Nothing, several times a second or after each few steps; it may be closed.

    Returns:
        None if there is no structure, or all of it comes to lie outside of the fixed image.
    """
    if not structure.any():
        return None
    unit = _unit(moving, structure, fixed)
    affine = yield from _affine(moving, fixed, unit)
    box = _box(moving, structure, fixed, affine, unit)
    if box is None:
        return None
    points = yield from _diffeomorphism(moving, fixed, affine, box, unit)
    around = _windows(_WINDOW * unit, fixed.spacing)
    seen = fixed.values[box]
    fit = _Likeness(seen, around)(sampled(moving.values[None], points)[0])
    return Registered(box, points, windowed(fit[None], around)[0])


def sampled(maps: Tensor, points: Tensor, *, beyond: Literal["border", "zeros"] = "border") -> Tensor:
    """Read maps between their voxels; beyond their borders they go on as they end, or are zero.

    Shape: (C, Z, H, W), (z, h, w, 3) voxel coordinates -> (C, z, h, w).
    """
    last = torch.tensor(maps.shape[1:], dtype=torch.float32, device=maps.device) - 1
    grid = (2 * points / last.clamp_min(1) - 1).flip(-1)[None]
    return functional.grid_sample(maps[None], grid, padding_mode=beyond, align_corners=True)[0]


def windowed(maps: Tensor, sizes: Sequence[int], stride: int = 1) -> Tensor:
    """Means over windows, of what lies within the maps.

    Args:
        maps: (C, Z, H, W).
        sizes: Odd size of a window along each axis; where the maps are smaller, the next odd size below theirs.
        stride: Means are wanted every so many voxels, along axes whose windows are larger than that.
    """
    maps = maps[:, None]
    for axis in (2, 1, 0):  # the axis along which memory runs first, so that the next have less to do
        size = min(sizes[axis], maps.shape[2 + axis] - 1 | 1)
        if size > 1:
            kernel, step, padding = ([fill] * 3 for fill in (1, 1, 0))
            kernel[axis], padding[axis] = size, size // 2
            step[axis] = stride if stride < size else 1
            maps = functional.avg_pool3d(maps, kernel, step, padding, count_include_pad=False)
    return maps[:, 0]


def exponential(velocity: Tensor) -> Tensor:
    """Displacement after following a velocity for a unit of time, by scaling and squaring.

    Shape: (3, z, h, w) in voxels of its own grid -> the same.
    """
    moved: Tensor = velocity / 2.0**_HALVINGS
    at = _voxels(velocity.shape[1:], velocity.device)
    for _ in range(_HALVINGS):
        moved = moved + sampled(moved, at + moved.permute(1, 2, 3, 0))
    return moved


class _Likeness:
    """How well images fit a fixed one around each voxel, or every few voxels."""

    def __init__(self, fixed: Tensor, sizes: Sequence[int], stride: int = 1) -> None:
        self._fixed, self._sizes, self._stride = fixed, sizes, stride
        self._mean, square = windowed(torch.stack([fixed, fixed * fixed]), sizes, stride)
        self._variance = (square - self._mean**2).clamp_min(LEAST_VARIANCE)

    def __call__(self, moved: Tensor) -> Tensor:
        """Squared correlation 0..1, (z, h, w), fewer with a stride."""
        maps = torch.stack([moved, moved * moved, moved * self._fixed])
        mean, square, product = windowed(maps, self._sizes, self._stride)
        variance = (square - mean * mean).clamp_min(LEAST_VARIANCE)
        covariance = product - mean * self._mean
        squared: Tensor = covariance * covariance / (variance * self._variance)
        return squared


def _unit(moving: Picture, structure: Tensor, fixed: Picture) -> float:
    """Side in mm of the voxels that are compared: pixels of the fixed image, larger ones if those were too many."""
    there = structure.nonzero()
    sides = (there.amax(0) - there.amin(0) + 1).tolist()
    pixel = fixed.spacing[1]
    volume = math.prod(n * size + 2 * MARGIN * pixel for n, size in zip(sides, moving.spacing, strict=True))
    return max(pixel, math.cbrt(volume / MOST_VOXELS))


@dataclass(frozen=True)
class _Affine:
    """A map of voxels of the fixed image into the moving one.

    Attributes:
        change: (3, 4) what differs from laying the centres onto each other, in coordinates of -1 to 1.
        reach: Half of the longest side of the fixed image, mm.
    """

    moving: Picture
    fixed: Picture
    change: Tensor
    reach: float

    def __call__(self, voxels: Tensor) -> Tensor:
        """Voxel coordinates (..., 3) in the fixed image -> in the moving one."""
        at = (voxels - self.fixed.middle()) * self.fixed.mm(voxels) / self.reach
        moved = at + at @ self.change[:, :3].T + self.change[:, 3]
        there: Tensor = moved * self.reach / self.moving.mm(voxels) + self.moving.middle()
        return there


def _affine(moving: Picture, fixed: Picture, unit: float) -> Generator[None, None, _Affine]:
    apart = _coarse(fixed, unit)
    steps = fixed.steps(apart)
    reach = max(*((n - 1) * mm / 2 for n, mm in zip(fixed.shape, fixed.spacing, strict=True)), 1.0)
    change = torch.zeros(3, 4, device=fixed.values.device, requires_grad=True)
    affine = _Affine(moving, fixed, change, reach)
    seen = moving.smoothed(moving.steps(apart))[None]
    spacing = [mm * step for mm, step in zip(fixed.spacing, steps, strict=True)]
    likeness = _Likeness(fixed.smoothed(steps)[_every(steps)], _windows(_WINDOW * apart, spacing))
    at = _voxels(fixed.shape, fixed.values.device, steps)
    optimiser = torch.optim.Adam([change], lr=_AFFINE_RATE)
    for step in range(_AFFINE_STEPS):
        _descend(optimiser, -likeness(sampled(seen, affine(at))[0]).mean())
        if step % _STEPS_A_PAUSE == 0:
            yield
    return _Affine(moving, fixed, change.detach(), reach)


def _box(moving: Picture, structure: Tensor, fixed: Picture, affine: _Affine, unit: float) -> Box | None:
    """Where the structure comes to lie, with a margin; looked for every few voxels."""
    apart = _coarse(fixed, unit)
    steps = fixed.steps(apart)
    spread = windowed(structure.float()[None], [2 * step + 1 for step in moving.steps(apart / 2)])
    seen = sampled(spread, affine(_voxels(fixed.shape, fixed.values.device, steps)), beyond="zeros")[0]
    there = (seen > _SOME).nonzero() * torch.tensor(steps, device=seen.device)
    if not len(there):
        return None
    margin = [math.ceil(MARGIN * unit / mm) for mm in fixed.spacing]
    low, high = there.amin(0).tolist(), there.amax(0).tolist()
    depth, lines, columns = (
        slice(max(first - more, 0), min(last + more + 1, size))
        for first, last, more, size in zip(low, high, margin, fixed.shape, strict=True)
    )
    return depth, lines, columns


def _coarse(fixed: Picture, unit: float) -> float:
    """Distance in mm at which whole images are compared: two units, more if those were too many voxels."""
    size = math.prod(n * mm for n, mm in zip(fixed.shape, fixed.spacing, strict=True))
    return max(2 * unit, math.cbrt(size / MOST_VOXELS))


def _diffeomorphism(
    moving: Picture, fixed: Picture, affine: _Affine, box: Box, unit: float
) -> Generator[None, None, Tensor]:
    """Where the voxels of a box lie in the moving image, (z, h, w, 3), so that the images fit best."""
    sides = [part.stop - part.start for part in box]
    all_at = _voxels(sides, fixed.values.device)
    corner = torch.tensor([float(part.start) for part in box], device=all_at.device)
    laid = affine(all_at + corner)
    size = torch.tensor(sides, dtype=torch.float32, device=laid.device)
    moving_mm = moving.mm(laid)
    velocity = torch.zeros(3, 2, 2, 2, device=laid.device)  # in units

    def moved(points: Tensor, at: Tensor) -> Tensor:
        grid = torch.tensor(velocity.shape[1:], dtype=torch.float32, device=laid.device) - 1
        voxel = (size - 1).clamp_min(1) * fixed.mm(laid) / grid  # mm a voxel of the velocity
        followed = exponential(velocity * unit / voxel[:, None, None, None])
        displacement = sampled(followed, at * grid / (size - 1).clamp_min(1)).permute(1, 2, 3, 0)
        return points + displacement * voxel / moving_mm

    for units, apart, num_steps in _LEVELS:
        steps = fixed.steps(units * unit)
        every = _every(steps)
        seen = moving.smoothed(moving.steps(units * unit))[None]
        spacing = [mm * step for mm, step in zip(fixed.spacing, steps, strict=True)]
        finest = units == _LEVELS[-1][0]
        windows = _windows((_WINDOW + 2 * finest) * units * unit, spacing)
        likeness = _Likeness(fixed.smoothed(steps)[box][every], windows, stride=2 if finest else 1)
        counts = [
            max(2, math.ceil(n / step)) for n, step in zip(sides, fixed.steps(apart * unit), strict=True)
        ]
        velocity = functional.interpolate(
            velocity.detach()[None], counts, mode="trilinear", align_corners=True
        )[0].requires_grad_()
        optimiser = torch.optim.Adam([velocity], lr=_VELOCITY_RATE)
        some_laid, some_at = laid[every], all_at[every]
        for step in range(num_steps):
            rough = torch.stack([velocity.diff(dim=axis).square().mean() for axis in (1, 2, 3)]).sum()
            fit = likeness(sampled(seen, moved(some_laid, some_at))[0]).mean()
            _descend(optimiser, _SMOOTHNESS * rough - fit)
            if step % _STEPS_A_PAUSE == 0:
                yield
    with torch.no_grad():
        return moved(laid, all_at)


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    optimiser.step()


def _every(steps: Sequence[int]) -> tuple[slice, slice, slice]:
    """Every so many voxels along each axis."""
    depth, lines, columns = (slice(None, None, step) for step in steps)
    return depth, lines, columns


def _voxels(shape: Sequence[int], device: torch.device, steps: Sequence[int] = (1, 1, 1)) -> Tensor:
    """Coordinates of voxels, (Z, H, W, 3): of all, or of every so many along each axis."""
    axes = [
        torch.arange(0, size, step, dtype=torch.float32, device=device)
        for size, step in zip(shape, steps, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def _windows(size: float, spacing: Sequence[float]) -> list[int]:
    """Odd numbers of voxels along each axis that are nearest to a size in mm."""
    return [max(1, 2 * round((size / mm - 1) / 2) + 1) for mm in spacing]
