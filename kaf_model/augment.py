"""Spatial augmentation: one map moves the image, the labels and the keypoints of a slice.

The map goes from output pixels to input pixels, because that is the direction in which an image is
resampled: `out -> out + u(out) -> matrix (out + u(out)) + offset = in`. The matrix holds mirror,
rotation and magnification, the offset where the crop lies, and `u` is an elastic displacement:
Gaussian-smoothed uniform noise, held at every output pixel and bilinear between. Points go the other
way, through the exact inverse of the same map, instead of the paper's index-map (appendix B,
"Keypoint Preprocessing Details").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from kaf_model.config import AugmentConfig
from kaf_model.elastic import TOLERANCE, Elastic, interpolate, solve, undo_displacement
from kaf_model.precision import full_precision


@dataclass(frozen=True, eq=False, kw_only=True)
class SpatialTransform:
    """One map from output to input pixels for each of B slices.

    Attributes:
        matrix: (B, 2, 2), output to input directions, in (y, x).
        offset: (B, 2), input point onto which the displaced output origin falls.
        displacement: (B, 2, h, w) in output pixels, or None for a purely affine map.
        sizes: (B, 2) true height and width of each slice inside the padded canvas, on the CPU.
        output_size: (h, w) of what comes out.
    """

    matrix: Tensor
    offset: Tensor
    displacement: Tensor | None
    sizes: Tensor
    output_size: tuple[int, int]

    @classmethod
    def sample(
        cls,
        config: AugmentConfig,
        sizes: Tensor,
        *,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        centres: Tensor | None = None,
        canvas: tuple[int, int] | None = None,
        rows: Tensor | None = None,
    ) -> SpatialTransform:
        """Draw the map of each slice of a batch; see `SpatialDraws.draw`.

        Args:
            config: Ranges.
            sizes: (B, 2) true height and width of each slice.
            generator: A CPU generator, the only source of randomness: the same on every device.
            device: Where the slices are.
            centres: (B, 2) input points that shall lie at the centre of the crop, or NaN.
            canvas: Output size when `config.crop` is None; default: the largest of `sizes`.
            rows: (b,) slices of the batch whose maps are returned; default: all.
        """
        draws = SpatialDraws.draw(
            config, sizes, generator=generator, centres=centres, canvas=canvas, rows=rows
        )
        return cls.of(draws, device)

    @classmethod
    def of(cls, draws: SpatialDraws, device: torch.device | str = "cpu") -> SpatialTransform:
        """The maps that were drawn, on a device."""
        device = torch.device(device)
        matrix, offset, displacement = draws.matrix.to(device), draws.offset.to(device), None
        if draws.elastic is not None:
            displacement = draws.elastic.displacement(draws.output_size, device)
            if draws.centred.any():  # the displacement must not carry the wanted point away from the centre
                crop = torch.tensor(draws.output_size, dtype=torch.float32)
                middle = ((crop - 1) / 2).to(device).expand(len(matrix), 1, 2)
                carried = interpolate(displacement, middle)[0]  # (b, 1, 2)
                wanted = draws.centred[:, None].to(device)
                offset = offset - torch.where(wanted, _apply(matrix, carried)[:, 0], 0.0)
        return cls(
            matrix=matrix,
            offset=offset,
            displacement=displacement,
            sizes=draws.sizes,
            output_size=draws.output_size,
        )

    def select(self, indices: slice | Sequence[int] | Tensor) -> SpatialTransform:
        """Return the maps of some slices of the batch, e.g. the share of one rank."""
        rows = torch.arange(len(self.sizes))[indices.cpu() if isinstance(indices, Tensor) else indices]
        there = rows.to(self.matrix.device)
        return SpatialTransform(
            matrix=self.matrix[there],
            offset=self.offset[there],
            displacement=None if self.displacement is None else self.displacement[there],
            sizes=self.sizes[rows],
            output_size=self.output_size,
        )

    @cached_property
    def coordinates(self) -> Tensor:
        """Input (y, x) of every output pixel, (B, 2, h, w)."""
        height, width = self.output_size
        device = self.matrix.device
        rows = torch.arange(height, device=device, dtype=torch.float32)[:, None].expand(height, width)
        columns = torch.arange(width, device=device, dtype=torch.float32).expand(height, width)
        pixels = torch.stack([rows, columns])  # (2, h, w)
        displaced = pixels.expand(len(self.sizes), -1, -1, -1)
        if self.displacement is not None:
            displaced = pixels + self.displacement
        with full_precision(self.matrix.device):
            moved = torch.baddbmm(self.offset[..., None], self.matrix, displaced.flatten(2))
        return moved.view(-1, 2, height, width)

    @cached_property
    def inside(self) -> Tensor:
        """Which output pixels come from within the true size of their slice, (B, h, w) bool."""
        return ((self.coordinates >= -0.5) & (self.coordinates < self._limits - 0.5)).all(dim=1)

    @cached_property
    def _limits(self) -> Tensor:
        return self.sizes.to(self.matrix.device, torch.float32)[..., None, None]  # (B, 2, 1, 1)

    def images(self, images: Tensor, padding_value: float | None = None) -> Tensor:
        """Resample images, or any dense maps, bilinearly.

        Args:
            images: (B, C, H, W), floating; beyond a slice's true size its content does not matter.
            padding_value: What lies outside the slice; None repeats its edge.

        Returns:
            (B, C, h, w) in the type of `images`.
        """
        self._check(images)
        height, width = images.shape[-2:]
        canvas = self.matrix.new_tensor([height, width]).view(1, 2, 1, 1)
        within = self.coordinates.clamp(min=0).minimum(self._limits - 1)
        grid = ((2 * within + 1) / canvas - 1).flip(1).permute(0, 2, 3, 1)  # (B, h, w, 2) as (x, y)
        with full_precision(images.device):
            resampled = functional.grid_sample(
                images.float(), grid, padding_mode="border", align_corners=False
            )
        if padding_value is not None:
            resampled = torch.where(self.inside[:, None], resampled, padding_value)
        return resampled.to(images.dtype)

    def labels(self, labels: Tensor, outside: int) -> Tensor:
        """Resample integer labels by the nearest pixel.

        Args:
            labels: (B, H, W) integers.
            outside: Label of pixels that come from outside the slice's true size.

        Returns:
            (B, h, w) integers.
        """
        self._check(labels)
        nearest = (self.coordinates + 0.5).floor().clamp(min=0).minimum(self._limits - 1).long()
        index = nearest[:, 0] * labels.shape[-1] + nearest[:, 1]  # (B, h, w)
        resampled = labels.flatten(1).gather(1, index.flatten(1)).view_as(index)
        return torch.where(self.inside, resampled, outside)

    def points(self, positions: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Move points with the slice: from input to output pixels.

        The affine part is inverted exactly, the displacement by Newton's method on the very field that
        resamples the image. Accurate to a few hundredths of a pixel.

        Args:
            positions: (B, N, 2), (y, x).
            valid: (B, N) bool.

        Returns:
            (B, N, 2) positions within 0..h-1 and 0..w-1, and (B, N) bool: false, and the position zero, for
            points that were invalid, lay outside their slice, or left the output.
        """
        if not positions.shape[1]:
            return positions.float(), valid
        valid = valid & self._within_slice(positions)
        shifted = torch.where(valid[..., None], positions.float(), 0.0) - self.offset[:, None]
        targets = solve(self.matrix[:, None], shifted)
        moved, exact = targets, torch.ones_like(valid)
        if self.displacement is not None:
            moved, exact = undo_displacement(self.displacement, targets)
        last = self.matrix.new_tensor(self.output_size) - 1
        left = ((moved < -TOLERANCE) | (moved > last + TOLERANCE)).any(dim=-1)
        valid = valid & exact & ~left
        return torch.where(valid[..., None], moved.clamp(min=0).minimum(last), 0.0), valid

    def inverse_points(self, positions: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Move points back: from output to input pixels, exactly where the image is read.

        Args:
            positions: (B, N, 2), (y, x).
            valid: (B, N) bool.

        Returns:
            (B, N, 2) positions and (B, N) bool: false, and zero, for points from outside their slice.
        """
        moved = torch.where(valid[..., None], positions.float(), 0.0)
        if self.displacement is not None:
            moved = moved + interpolate(self.displacement, moved)[0]
        moved = _apply(self.matrix, moved) + self.offset[:, None]
        valid = valid & self._within_slice(moved)
        return torch.where(valid[..., None], moved, 0.0), valid

    def _within_slice(self, positions: Tensor) -> Tensor:
        limits = self._limits[:, None, :, 0, 0]  # (B, 1, 2)
        return ((positions >= -0.5) & (positions < limits - 0.5)).all(dim=-1)

    def _check(self, maps: Tensor) -> None:
        canvas = torch.tensor(maps.shape[-2:])
        if len(maps) != len(self.sizes) or bool((self.sizes > canvas).any()):
            raise ValueError(
                f"the transform is for {len(self.sizes)} slices of sizes up to "
                f"{tuple(self.sizes.amax(dim=0).tolist())}, got maps of shape {tuple(maps.shape)}"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class SpatialDraws:
    """What was drawn for the maps of b slices, as plain numbers on the CPU.

    Attributes:
        matrix: (b, 2, 2) of the map.
        offset: (b, 2) of the map, where nothing is displaced.
        elastic: What the displacement is made from, or None.
        centred: (b,) whether the crop lies about a point that was asked for.
        sizes: (b, 2) true height and width of each slice.
        output_size: (h, w) of what comes out.
    """

    matrix: Tensor
    offset: Tensor
    elastic: Elastic | None
    centred: Tensor
    sizes: Tensor
    output_size: tuple[int, int]

    @classmethod
    def draw(
        cls,
        config: AugmentConfig,
        sizes: Tensor,
        *,
        generator: torch.Generator,
        centres: Tensor | None = None,
        canvas: tuple[int, int] | None = None,
        rows: Tensor | None = None,
    ) -> SpatialDraws:
        """Draw the map of each slice of a batch.

        A slice is turned, scaled and deformed with chance `config.spatial_probability`; otherwise it is only
        cropped, on whole pixels. Mirroring, where it is on, comes on top of either. The crop lies uniformly
        where, magnified, it stays within the slice (rotation and elastic displacement may still carry its
        corners out); along an axis where the slice is too small it is centred. A displacement that would
        squeeze the grid by more than `elastic.MAX_COMPRESSION` anywhere is weakened as a whole, so that no map folds.

        Args:
            config: Ranges.
            sizes: (B, 2) true height and width of each slice.
            generator: A CPU generator, the only source of randomness.
            centres: (B, 2) input points that shall lie at the centre of the crop (the nearest whole pixel for
                slices that are only cropped); rows of NaN are placed at random.
            canvas: Output size when `config.crop` is None; default: the largest of `sizes`.
            rows: (b,) slices of the batch that are returned, e.g. the share of one rank; default: all. The others
                are drawn as well.
        """
        sizes = sizes.to("cpu", torch.int64)
        num_slices = len(sizes)
        if sizes.shape != (num_slices, 2):
            raise ValueError(f"sizes must be (B, 2) heights and widths, got shape {tuple(sizes.shape)}")
        if canvas is None:
            canvas = (int(sizes[:, 0].max()), int(sizes[:, 1].max()))
        output_size = config.crop or canvas

        def draw(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(num_slices, *shape, generator=generator)

        moved = draw(0, 1) < config.spatial_probability  # (B,)
        angle = torch.deg2rad(draw(-config.rotation, config.rotation)) * moved
        magnification = torch.where(moved, draw(*config.scale), 1.0)
        mirrored = (draw(0, 1, 2) < 0.5) & config.mirror  # (B, 2)
        cosine, sine = angle.cos(), angle.sin()
        rotation = torch.stack([cosine, -sine, sine, cosine], dim=-1).view(-1, 2, 2)
        matrix = rotation * torch.where(mirrored, -1.0, 1.0)[:, None] / magnification[:, None, None]

        crop = torch.tensor(output_size, dtype=torch.float32)
        centre = _crop_centres(sizes, crop, magnification, moved, draw(0, 1, 2), centres)
        offset = centre - _apply(matrix, (crop - 1).view(1, 1, 2) / 2)[:, 0]
        rows = torch.arange(num_slices) if rows is None else rows
        elastic = None
        if config.spatial_probability > 0 and max(config.elastic_alpha) > 0:
            spacing, reach = min(config.elastic_sigma), max(config.elastic_sigma)
            alpha, sigma = draw(*config.elastic_alpha) * moved, draw(*config.elastic_sigma)
            elastic = Elastic.draw(alpha, sigma, spacing, reach, output_size, generator).select(rows)
        centred = torch.zeros(num_slices, dtype=torch.bool)
        if centres is not None:
            centred = centres.to("cpu").isfinite().all(dim=-1)
        return cls(
            matrix=matrix[rows],
            offset=offset[rows],
            elastic=elastic,
            centred=centred[rows],
            sizes=sizes[rows],
            output_size=output_size,
        )

    @classmethod
    def join(cls, parts: Sequence[SpatialDraws]) -> SpatialDraws:
        """Those of several batches that were drawn from the same ranges to the same output size, one after another."""
        first = parts[0]
        elastic = None
        if first.elastic is not None:
            elastic = Elastic.join([part.elastic for part in parts if part.elastic is not None])
        return cls(
            matrix=torch.cat([part.matrix for part in parts]),
            offset=torch.cat([part.offset for part in parts]),
            elastic=elastic,
            centred=torch.cat([part.centred for part in parts]),
            sizes=torch.cat([part.sizes for part in parts]),
            output_size=first.output_size,
        )


def _crop_centres(
    sizes: Tensor, crop: Tensor, magnification: Tensor, moved: Tensor, chance: Tensor, wanted: Tensor | None
) -> Tensor:
    """Input points at the centres of the crops, (B, 2); `chance` (B, 2) in 0..1 says where there is room."""
    extent = crop / magnification[:, None]  # (B, 2) input pixels
    room = sizes - extent
    anywhere = torch.where(room > 0, chance * room, room / 2)
    whole = torch.where(room > 0, (chance * (room + 1)).floor().minimum(room), (room / 2).floor())
    centre = torch.where(moved[:, None], anywhere, whole) + (extent - 1) / 2
    if wanted is None:
        return centre
    if wanted.shape != sizes.shape:
        raise ValueError(f"centres must be {tuple(sizes.shape)} like sizes, got {tuple(wanted.shape)}")
    wanted = wanted.to("cpu", torch.float32)
    half = (crop - 1) / 2
    aligned = torch.where(moved[:, None], wanted, (wanted - half).round() + half)
    return torch.where(wanted.isfinite().all(dim=-1, keepdim=True), aligned, centre)


def _apply(matrix: Tensor, points: Tensor) -> Tensor:
    """(B, 2, 2) matrices on (B, N, 2) points, in full precision under autocast too."""
    return (matrix[:, None] * points[..., None, :]).sum(dim=-1)
