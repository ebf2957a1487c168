"""Intensity augmentation: a slice as another scanner, sequence or resolution would have shown it.

Noise, blur, brightness, contrast, coarser sampling and gamma, in this order, each for a random part of
the slices. What happens to a slice is drawn beforehand as plain numbers, so that a batch drawn jointly
can be cut into shares, and a slice changes alike in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from kaf_model.config import AugmentConfig
from kaf_model.precision import full_precision


@dataclass(frozen=True, eq=False, kw_only=True)
class IntensityChange:
    """What happens to each of B slices; (B,) on the CPU, NaN where a change is not made.

    Attributes:
        noise: Standard deviation of additive Gaussian noise.
        noise_seed: (B,) int64, from which the noise of each slice is drawn.
        blur: Sigma of a Gaussian blur, pixels.
        brightness: Added.
        contrast: Factor about the slice's mean.
        low_resolution: Factor by which the sampling is made coarser.
        gamma: Exponent on intensities scaled to 0..1 between the slice's extremes.
    """

    noise: Tensor
    noise_seed: Tensor
    blur: Tensor
    brightness: Tensor
    contrast: Tensor
    low_resolution: Tensor
    gamma: Tensor

    @classmethod
    def sample(cls, config: AugmentConfig, num_slices: int, *, generator: torch.Generator) -> IntensityChange:
        """Draw the changes of a batch; each is made to a slice with chance `config.intensity_probability`."""

        def draw(low: float, high: float) -> Tensor:
            made, where = torch.rand(2, num_slices, generator=generator)
            return torch.where(made < config.intensity_probability, low + (high - low) * where, torch.nan)

        return cls(
            noise=draw(0.0, config.noise),
            noise_seed=torch.randint(2**62, (num_slices,), generator=generator),
            blur=draw(*config.blur),
            brightness=draw(-config.brightness, config.brightness),
            contrast=draw(*config.contrast),
            low_resolution=draw(*config.low_resolution),
            gamma=draw(*config.gamma),
        )

    def select(self, indices: slice | Sequence[int] | Tensor) -> IntensityChange:
        """Return the changes of some slices of the batch, e.g. the share of one rank."""
        return IntensityChange(**{field.name: getattr(self, field.name)[indices] for field in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[IntensityChange]) -> IntensityChange:
        """The changes of several batches, one after another."""
        return cls(
            **{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)}
        )

    def apply(self, images: Tensor) -> Tensor:
        """Return the changed slices; those that nothing happens to are the same to the bit.

        Args:
            images: (B, S, H, W), floating, z-scored; what is read with a slice changes with it.
        """
        if images.ndim != 4 or len(images) != len(self.gamma):
            raise ValueError(
                f"images must be ({len(self.gamma)}, S, H, W) as drawn, got {tuple(images.shape)}"
            )
        changed = images.clone()

        def change(function: Callable[[Tensor, Tensor], Tensor], strength: Tensor) -> None:
            rows = strength.isfinite().nonzero()[:, 0]  # (n,) on the CPU: choosing rows waits for no device
            if len(rows):
                there = rows.to(images.device)
                strength = strength[rows].to(images.device).view(-1, 1, 1, 1)
                with full_precision(images.device):
                    changed[there] = function(changed[there].float(), strength).to(images.dtype)

        change(lambda slices, sigma: slices + sigma * self._noise(slices), self.noise)
        radius = math.ceil(4 * max(self.blur.nan_to_num().tolist(), default=0.0))
        change(lambda slices, sigma: _blur(slices, sigma, radius=radius), self.blur)
        change(lambda slices, shift: slices + shift, self.brightness)
        change(_contrast, self.contrast)
        change(_low_resolution, self.low_resolution)
        change(_gamma, self.gamma)
        return changed

    def _noise(self, slices: Tensor) -> Tensor:
        seeds = self.noise_seed[self.noise.isfinite()].tolist()
        noise = [
            torch.randn(slices.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        return torch.stack(noise).to(slices.device)


def change_intensities(images: Tensor, config: AugmentConfig, *, generator: torch.Generator) -> Tensor:
    """Change the intensities of slices at random.

    Args:
        images: (B, S, H, W), floating, z-scored.
        config: Chances and ranges.
        generator: A CPU generator, the only source of randomness.

    Returns:
        (B, S, H, W); `images` itself where the chance is zero.
    """
    if config.intensity_probability == 0:
        return images
    return IntensityChange.sample(config, len(images), generator=generator).apply(images)


def _blur(slices: Tensor, sigma: Tensor, *, radius: int) -> Tensor:
    """Gaussian blur, each slice by its own sigma; edges repeat. A kernel ends at 4 sigma."""
    num_slices = len(slices)
    reach = (4 * sigma.view(-1, 1)).ceil()  # (n, 1)
    distance = torch.arange(-radius, radius + 1, device=slices.device)
    weights = torch.exp(-0.5 * (distance / sigma.view(-1, 1)) ** 2) * (distance.abs() <= reach)
    weights = (weights / weights.sum(dim=1, keepdim=True))[:, None]  # (n, 1, k)
    padded = functional.pad(slices, (radius,) * 4, mode="replicate").transpose(0, 1)  # (S, n, H + 2r, W + 2r)
    down = functional.conv2d(padded, weights[..., None], groups=num_slices)
    return functional.conv2d(down, weights[..., None, :], groups=num_slices).transpose(0, 1)


def _contrast(slices: Tensor, factor: Tensor) -> Tensor:
    """Contrast about the mean."""
    mean = slices.mean(dim=(-3, -2, -1), keepdim=True)
    return mean + factor * (slices - mean)


def _gamma(slices: Tensor, gamma: Tensor) -> Tensor:
    """Gamma between the extremes of a slice, which stay; a constant slice stays constant."""
    lowest, highest = slices.amin(dim=(-3, -2, -1), keepdim=True), slices.amax(dim=(-3, -2, -1), keepdim=True)
    extent = highest - lowest
    scaled = ((slices - lowest) / extent.clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
    return lowest + extent * scaled**gamma


def _low_resolution(slices: Tensor, factor: Tensor) -> Tensor:
    """Sample each slice at pixels `factor` times larger, then interpolate back; both linearly."""
    height, width = slices.shape[-2:]
    factor = factor.view(-1, 1).clamp(min=1)  # finer sampling would see nothing new
    rows = torch.arange(height, device=slices.device) + 0.5
    columns = torch.arange(width, device=slices.device) + 0.5
    coarse = _resampled(slices, rows * factor - 0.5, columns * factor - 0.5)
    # Coarse pixels whose centre lies beyond the edge must not be seen.
    fine_rows = (rows / factor - 0.5).minimum(height / factor - 1)
    fine_columns = (columns / factor - 0.5).minimum(width / factor - 1)
    return _resampled(coarse, fine_rows, fine_columns)


def _resampled(slices: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear values where given rows (n, H) and columns (n, W) cross; edges repeat."""
    height, width = slices.shape[-2:]
    rows, columns = (2 * rows + 1) / height - 1, (2 * columns + 1) / width - 1
    shape = (len(slices), rows.shape[1], columns.shape[1])
    grid = torch.stack([columns[:, None].expand(shape), rows[..., None].expand(shape)], dim=-1)
    return functional.grid_sample(slices, grid, padding_mode="border", align_corners=False)
