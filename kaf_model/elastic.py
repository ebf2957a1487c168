"""Elastic displacements: smoothed noise that never folds, read between pixels and undone.

A displacement is held at every output pixel and bilinear between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kaf_model.precision import full_precision

MAX_COMPRESSION = 0.75
"""Most by which the elastic displacement may squeeze the output grid in any direction; at 1 it folds."""

_KERNEL_RADIUS = 3.5  # in sigmas; the Gaussian is 0.002 of its peak there
_NEWTON_STEPS = 7
TOLERANCE = 0.02  # pixels; a point that misses it (none is known to) is dropped, and the border is this wide


@dataclass(frozen=True, eq=False)
class Elastic:
    """Elastic displacements as they are drawn: smoothed noise times a strength.

    A Gaussian of `sigma` pixels cannot tell noise at every pixel from noise at knots up to sigma apart with
    the same variance per area, so the noise lives on knots `spacing` apart and smoothing is two small matrix
    products. Uniform noise on -1..1 gives a standard deviation of alpha / sqrt(3) / (2 sqrt(pi) sigma).

    Attributes:
        alpha: (b,) strengths; 0 gives no displacement.
        sigma: (b,) smoothness in output pixels.
        noise: (b, 2, n, m) at the knots.
        spacing: Distance of the knots, the smallest possible sigma.
        reach: Largest possible sigma.
    """

    alpha: Tensor
    sigma: Tensor
    noise: Tensor
    spacing: float
    reach: float

    @classmethod
    def draw(
        cls,
        alpha: Tensor,
        sigma: Tensor,
        spacing: float,
        reach: float,
        output_size: tuple[int, int],
        generator: torch.Generator,
    ) -> Elastic:
        """Draw the noise for an output size (h, w)."""
        if spacing <= 0:
            raise ValueError(f"elastic_sigma must be positive pixels, got {spacing}")
        down, across = (len(knots) for knots in _knots(output_size, spacing, reach))
        noise = 2 * torch.rand(len(alpha), 2, down, across, generator=generator) - 1
        return cls(alpha, sigma, noise, spacing, reach)

    def select(self, rows: Tensor) -> Elastic:
        """Those of some slices."""
        return replace(self, alpha=self.alpha[rows], sigma=self.sigma[rows], noise=self.noise[rows])

    @classmethod
    def join(cls, parts: Sequence[Elastic]) -> Elastic:
        """Those of several batches, one after another."""
        return replace(
            parts[0],
            alpha=torch.cat([part.alpha for part in parts]),
            sigma=torch.cat([part.sigma for part in parts]),
            noise=torch.cat([part.noise for part in parts]),
        )

    def displacement(self, output_size: tuple[int, int], device: torch.device) -> Tensor:
        """The displacement of each output pixel, (b, 2, h, w)."""
        alpha, sigma = self.alpha.to(device), self.sigma.to(device)[:, None, None]

        def kernel(size: int, knots: Tensor) -> Tensor:  # (b, 1, size, knots)
            distance = torch.arange(size, device=device)[:, None] - self.spacing * knots.to(device)
            weights = torch.exp(-0.5 * (distance / sigma) ** 2) / (math.sqrt(2 * math.pi) * sigma)
            return weights[:, None]

        knots = _knots(output_size, self.spacing, self.reach)
        down, across = (kernel(size, along) for size, along in zip(output_size, knots, strict=True))
        with full_precision(device):
            smooth = down @ self.noise.to(device) @ across.mT  # (b, 2, h, w)
        strength = alpha * self.spacing
        squeeze = strength * _compression(smooth, step=max(1, round(self.spacing / 6)))
        strength = strength * (MAX_COMPRESSION / squeeze.clamp(min=MAX_COMPRESSION))
        return smooth * strength[:, None, None, None]


def _knots(output_size: tuple[int, int], spacing: float, reach: float) -> list[Tensor]:
    """Where the noise lies, in knots from the first pixel, along either axis."""
    margin = math.ceil(_KERNEL_RADIUS * reach / spacing)
    return [torch.arange(-margin, math.ceil((size - 1) / spacing) + margin + 1) for size in output_size]


def _compression(displacement: Tensor, *, step: int) -> Tensor:
    """How much a displacement squeezes its grid at most: minus the lowest eigenvalue of its strain.

    The strain is the symmetric part of the gradient. Where this is below 1 everywhere, `out + u(out)` is
    strictly monotone, hence one to one. The gradients in a bilinear cell are mixtures of the four that its
    edges give, and the eigenvalue is concave, so these four are enough. Looking only every `step` pixels, a
    sixth of the smoothness, misses a few hundredths at most.

    Shape: (B, 2, h, w) -> (B,).
    """
    if min(displacement.shape[-2:]) < 2:
        return displacement.new_zeros(len(displacement))
    rows, columns = (
        torch.linspace(0, size - 1, math.ceil((size - 1) / step) + 1, device=displacement.device)
        .round()
        .long()
        for size in displacement.shape[-2:]
    )
    coarse = displacement[..., rows[:, None], columns]
    along_y = coarse.diff(dim=-2) / rows.diff()[:, None]  # (B, 2, h - 1, w)
    along_x = coarse.diff(dim=-1) / columns.diff()  # (B, 2, h, w - 1)
    worst = []
    for gradient_y in (along_y[..., :-1], along_y[..., 1:]):
        for gradient_x in (along_x[..., :-1, :], along_x[..., 1:, :]):
            half_trace = (gradient_y[:, 0] + gradient_x[:, 1]) / 2
            half_difference = (gradient_y[:, 0] - gradient_x[:, 1]) / 2
            shear = (gradient_y[:, 1] + gradient_x[:, 0]) / 2
            lowest = half_trace - (half_difference**2 + shear**2).sqrt()
            worst.append(-lowest.amin(dim=(-2, -1)))
    return torch.stack(worst).amax(dim=0).clamp(min=0)


def undo_displacement(displacement: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Solve `p + u(p) = target` for p by Newton's method.

    Shape: (B, 2, h, w), (B, N, 2) -> (B, N, 2), and (B, N) bool: whether p is accurate.
    """
    identity = torch.eye(2, device=targets.device)
    points = targets
    for _ in range(_NEWTON_STEPS):
        shift, gradient = interpolate(displacement, points)
        points = points - solve(identity + gradient, points + shift - targets)
    miss = points + interpolate(displacement, points)[0] - targets
    # A squeeze of MAX_COMPRESSION makes an error in p up to four times the miss.
    return points, miss.norm(dim=-1) < TOLERANCE * (1 - MAX_COMPRESSION)


def interpolate(displacement: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolate a displacement bilinearly, constant beyond its edge, and give its gradient.

    Shape: (B, 2, h, w), (B, N, 2) -> (B, N, 2), and (B, N, 2, 2) as component, axis.
    """
    height, width = displacement.shape[-2:]
    last = points.new_tensor([height - 1, width - 1])
    clamped = points.clamp(min=0).minimum(last)
    corner = clamped.floor().minimum((last - 1).clamp(min=0))
    down, across = (clamped - corner)[..., None].unbind(-2)  # (B, N, 1)
    index = corner[..., 0].long() * width + corner[..., 1].long()  # (B, N)
    below, right = width * (height > 1), int(width > 1)
    flat = displacement.flatten(2)

    def at(shift: int) -> Tensor:  # (B, N, 2)
        return flat.gather(2, (index + shift)[:, None].expand(-1, 2, -1)).transpose(1, 2)

    top_left, top_right, bottom_left, bottom_right = at(0), at(right), at(below), at(below + right)
    top, bottom = torch.lerp(top_left, top_right, across), torch.lerp(bottom_left, bottom_right, across)
    along_x = torch.lerp(top_right - top_left, bottom_right - bottom_left, down)
    gradient = torch.stack([bottom - top, along_x], dim=-1)  # (B, N, 2, 2): component, axis
    return torch.lerp(top, bottom, down), gradient * (clamped == points)[..., None, :]


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve 2 x 2 systems, (..., 2, 2) and (..., 2), by Cramer's rule."""
    (a, b), (c, d) = (row.unbind(-1) for row in matrix.unbind(-2))
    y, x = right.unbind(-1)
    return torch.stack([d * y - b * x, a * x - c * y], dim=-1) / (a * d - b * c)[..., None]
