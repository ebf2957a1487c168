"""A deterministic synthetic cohort of short-axis cardiac MRI, for the demo and for tests.

Each subject is drawn analytically: signed distances to ellipses and rings in millimetres become soft
coverages (partial volume), painted over each other from the chest wall inwards. The left ventricle
tapers from base to apex, holds papillary muscles (labelled as cavity, as in ACDC) and wears the crescent
of the right ventricle. Fat, aorta and stomach are as bright as blood, and liver and chest muscle as dark
as myocardium, so intensity alone does not solve it. A coil's bias field, breathing shifts between slices
and Rician noise (Gudbjartsson and Patz, MRM 34, 1995) come last.

Three random streams hang on a subject's seed: anatomy, texture and acquisition. The anatomy of a seed is
the same on every grid.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Floats = NDArray[np.float32]
_Number = NDArray[np.floating[Any]] | float

HEART_CLASSES: dict[int, str] = {1: "right ventricle", 2: "myocardium", 3: "left ventricle"}

# Anatomy shrinks with a smaller field of view (mm), so that small test grids hold a heart.
_NOMINAL_FIELD_OF_VIEW = 150.0
_FAR = np.float32(99)  # mm; the distance to what a slice does not hold


@dataclass(frozen=True)
class HeartPhantom:
    """One synthetic subject.

    Attributes:
        image: Intensities in arbitrary units, int16, shape (Z, Y, X), Z from base to apex.
        labels: Class of every voxel, uint8, shape (Z, Y, X); 0 is the background.
        spacing: Voxel size in mm (z, y, x).
        affine: Index (x, y, z) -> RAS+ world in mm, (4, 4), oblique as the short axis is.
        classes: Names of the label values, in ACDC's numbering.
    """

    image: NDArray[np.int16]
    labels: NDArray[np.uint8]
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]
    classes: dict[int, str] = field(default_factory=lambda: dict(HEART_CLASSES))


def make_heart(
    seed: int,
    *,
    shape: Sequence[int] = (10, 128, 128),
    spacing: Sequence[float] = (8.0, 1.5, 1.5),
) -> HeartPhantom:
    """Draw the subject of a seed; the same arguments give the same bits.

    Args:
        seed: Non-negative number of the subject.
        shape: Voxels (Z, Y, X). The stack is planned on the heart: its slices run from about the valves
            to about the apex, however many they are.
        spacing: Voxel size in mm (z, y, x).

    Raises:
        ValueError: If the shape or the spacing is not three positive numbers, or the seed is negative.
    """
    num_slices, num_rows, num_columns = _three_positive("shape", shape)
    grid = (int(num_slices), int(num_rows), int(num_columns))
    millimetres = _three_positive("spacing", spacing)
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    anatomy, texture, acquisition = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))

    frame = _Frame.draw(anatomy, acquisition, grid, millimetres)
    contrast = _Contrast.draw(anatomy)
    noise = _Texture(texture, grid, millimetres)
    signal = np.zeros(grid, dtype=np.float32)
    depth = _paint_chest(signal, frame, contrast, noise, anatomy)
    _paint_abdomen(signal, frame, contrast, noise, anatomy, depth)
    labels = _paint_heart(signal, frame, contrast, noise, anatomy)
    image = _acquire(signal, frame, depth, acquisition)
    return HeartPhantom(
        image=image,
        labels=labels,
        spacing=millimetres,
        affine=_oblique_affine(acquisition, grid, millimetres),
    )


def write_cohort(
    folder: str | Path,
    *,
    num_subjects: int,
    first_seed: int = 0,
    labelled: bool = True,
    shape: Sequence[int] = (10, 128, 128),
    spacing: Sequence[float] = (8.0, 1.5, 1.5),
) -> list[Path]:
    """Write subjects as NIfTI: `images/heart_000.nii.gz` and, if labelled, `labels/heart_000.nii.gz`.

    Files are numbered by seed, so that cohorts with other seeds can share the folder. Images are int16 and
    labels uint8, with sform, qform and millimetres set; `labels/labels.json` names the label values.

    Args:
        folder: Where `images` and `labels` go; made if absent.
        num_subjects: How many subjects to write.
        first_seed: Seed of the first subject; the next have the following numbers.
        labelled: Whether to write the labels as well.
        shape: Voxels (Z, Y, X) of each subject.
        spacing: Voxel size in mm (z, y, x).

    Returns:
        The image files, in the order of their seeds.
    """
    images, labels = Path(folder) / "images", Path(folder) / "labels"
    images.mkdir(parents=True, exist_ok=True)
    if labelled:
        labels.mkdir(parents=True, exist_ok=True)
        names = {"0": "background"} | {str(value): name for value, name in HEART_CLASSES.items()}
        (labels / "labels.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    written = []
    for seed in range(first_seed, first_seed + num_subjects):
        heart = make_heart(seed, shape=shape, spacing=spacing)
        name = f"heart_{seed:03d}.nii.gz"
        _write_nifti(images / name, heart.image, heart.affine)
        if labelled:
            _write_nifti(labels / name, heart.labels, heart.affine)
        written.append(images / name)
    return written


def _write_nifti(
    path: Path, array: NDArray[np.int16] | NDArray[np.uint8], affine: NDArray[np.float64]
) -> None:
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine, dtype=array.dtype)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


# --- where things are --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Coordinates of every voxel centre in the subject's own frame, centred on the heart.

    Attributes:
        down: Millimetres towards the diaphragm, (Z, Y, X).
        right: Millimetres towards the image's right, (Z, Y, X).
        depth: Position along the long axis, 0 at the valves and 1 at the apex, (Z, 1, 1).
        pixel: In-plane voxel size in (scaled) mm: the width of a soft edge.
    """

    down: Floats
    right: Floats
    depth: Floats
    pixel: float

    @staticmethod
    def draw(
        anatomy: np.random.Generator,
        acquisition: np.random.Generator,
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float],
    ) -> _Frame:
        num_slices, num_rows, num_columns = shape
        field_of_view = min(num_rows * spacing[1], num_columns * spacing[2])
        scale = min(1.0, field_of_view / _NOMINAL_FIELD_OF_VIEW)
        centre = anatomy.uniform(-22, 22, size=2) * scale
        rotation = np.deg2rad(anatomy.uniform(-25, 25))
        first, last = anatomy.uniform(-0.22, 0.02), anatomy.uniform(0.92, 1.22)
        # Every slice is its own breath-hold: the diaphragm, and all with it, comes to rest elsewhere.
        breathing = np.clip(acquisition.normal(0, (2.8, 1.4), size=(num_slices, 2)), -7, 7) * scale
        rows = (np.arange(num_rows) - (num_rows - 1) / 2) * spacing[1] - centre[0]
        columns = (np.arange(num_columns) - (num_columns - 1) / 2) * spacing[2] - centre[1]
        y = (rows[None, :, None] - breathing[:, 0, None, None]) / scale
        x = (columns[None, None, :] - breathing[:, 1, None, None]) / scale
        down = np.cos(rotation) * y + np.sin(rotation) * x
        right = -np.sin(rotation) * y + np.cos(rotation) * x
        depth = first + (last - first) * (np.arange(num_slices) + 0.5) / num_slices
        return _Frame(
            down=down.astype(np.float32),
            right=right.astype(np.float32),
            depth=depth.astype(np.float32)[:, None, None],
            pixel=float(np.sqrt(spacing[1] * spacing[2])) / scale,
        )

    def ellipse(self, centre: tuple[_Number, _Number], axes: tuple[_Number, _Number]) -> Floats:
        """Signed distance in mm (to first order) to an ellipse in every slice; negative inside.

        Args:
            centre: (down, right) in mm, numbers or one for every slice (Z, 1, 1).
            axes: Half axes (down, right) in mm, likewise.
        """
        return _ellipse(self.down - centre[0], self.right - centre[1], axes[0], axes[1])

    def inside(self, distance: Floats) -> Floats:
        """Fraction of each voxel that lies where the signed distance is negative."""
        return np.asarray(np.clip(0.5 - distance / self.pixel, 0, 1), dtype=np.float32)


def _ellipse(p: Floats, q: Floats, axis_p: _Number, axis_q: _Number) -> Floats:
    """Signed distance to the ellipse (p / axis_p)^2 + (q / axis_q)^2 = 1: its equation over its gradient."""
    v, u = p / axis_p, q / axis_q
    radius = np.sqrt(v * v + u * u) + np.float32(1e-4)
    slope = np.sqrt((v / axis_p) ** 2 + (u / axis_q) ** 2) + np.float32(1e-6)
    return np.asarray((radius - 1) * radius / slope, dtype=np.float32)


# --- how bright things are ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Contrast:
    """Signal of the tissues, relative to blood near 1."""

    blood: float
    right_blood: float
    myocardium: float
    fat: float
    muscle: float
    liver: float
    lung: float

    @staticmethod
    def draw(rng: np.random.Generator) -> _Contrast:
        blood = rng.uniform(0.85, 1.05)
        myocardium = rng.uniform(0.32, 0.46)
        return _Contrast(
            blood=blood,
            right_blood=blood * rng.uniform(0.88, 1.06),
            myocardium=myocardium,
            fat=rng.uniform(0.95, 1.4),
            muscle=myocardium * rng.uniform(0.75, 1.1),
            liver=myocardium * rng.uniform(0.8, 1.4),
            lung=rng.uniform(0.07, 0.15),
        )


class _Texture:
    """Smooth random fields with zero mean and unit variance, reproducible in the order they are asked for."""

    def __init__(
        self, rng: np.random.Generator, shape: tuple[int, int, int], spacing: tuple[float, ...]
    ) -> None:
        self._rng, self._shape, self._spacing = rng, shape, spacing

    def __call__(self, size: float) -> Floats:
        """Return a field (Z, Y, X) whose structures are about `size` mm wide."""
        white = self._rng.standard_normal(self._shape, dtype=np.float32)
        smooth = gaussian_filter(white, [size / step for step in self._spacing], mode="wrap", truncate=3.0)
        return np.asarray((smooth - smooth.mean()) / (smooth.std() + 1e-6), dtype=np.float32)


def _paint(signal: Floats, coverage: Floats, value: Floats | float) -> None:
    """Lay a tissue over the picture, in place."""
    signal += coverage * (value - signal)


def _between(values: NDArray[np.floating[Any]], low: float, high: float) -> Floats:
    return np.asarray(np.clip(values, low, high), dtype=np.float32)


def _waves(angle: Floats, rng: np.random.Generator, amplitudes: Sequence[float]) -> Floats:
    """Sum cosines of a direction: the first amplitude once around, the second twice, in random phases."""
    total = np.zeros_like(angle)
    for order, amplitude in enumerate(amplitudes, start=1):
        total += np.float32(amplitude * rng.uniform(0.4, 1)) * np.cos(
            order * angle + np.float32(rng.uniform(0, 6.283))
        )
    return total


# --- what is there -----------------------------------------------------------------------------------------


def _paint_chest(
    signal: Floats, frame: _Frame, contrast: _Contrast, noise: _Texture, rng: np.random.Generator
) -> Floats:
    """Paint fat, muscle, ribs and lungs; return the depth below the skin in mm, (Z, Y, X)."""
    axes = (rng.uniform(92, 118), rng.uniform(105, 140))
    centre = (axes[0] - rng.uniform(64, 84), axes[1] - rng.uniform(84, 104))
    angle = np.arctan2(frame.down - np.float32(centre[0]), frame.right - np.float32(centre[1]))
    depth = -frame.ellipse(centre, axes) + _waves(angle, rng, (4, 4, 3, 1.5))
    fat = rng.uniform(6, 15) * (1 + _waves(angle, rng, (0.3, 0.3, 0.15)))
    muscle = fat + rng.uniform(7, 12) * (1 + _waves(angle, rng, (0.2, 0.2, 0.1, 0.1)))

    _paint(signal, frame.inside(-depth), contrast.fat * (1 + 0.05 * noise(6.0)))
    _paint(signal, frame.inside(fat - depth), contrast.muscle * (1 + 0.12 * noise(3.0)))
    # Ribs cross the slice in another place at every level: dark cortex around fatty marrow.
    ribs = np.cos(rng.integers(11, 16) * angle + frame.depth * np.float32(rng.uniform(3, 7)))
    across = 5.5 * (1 - ribs) / 0.5  # about 0..5.5 mm from a rib's middle line where the cosine is above 0.5
    along = np.abs(depth - 0.5 * (fat + muscle))
    distance = np.sqrt(across**2 + along**2)
    _paint(signal, frame.inside(distance - 4.5), 0.35 * contrast.muscle)
    _paint(signal, frame.inside(distance - 2.5), 0.6 * contrast.fat)

    _paint(signal, frame.inside(muscle - depth), contrast.lung * (1 + 0.2 * noise(5.0)))
    # Vessels crowd towards the root of the lung, beside the base of the heart.
    root = 1.1 - frame.ellipse((rng.uniform(-25, 5), rng.uniform(30, 50)), (40, 40)) / 60 - 0.5 * frame.depth
    branches = np.maximum(noise(1.7), 0.9 * noise(3.2)) + 0.35 * _between(root, -0.5, 1.5)
    vessels = _between((branches - 2.2) * 1.5, 0, 1) * frame.inside(muscle + 5 - depth)
    _paint(signal, vessels, 0.8 * contrast.blood)
    return depth


def _paint_abdomen(
    signal: Floats,
    frame: _Frame,
    contrast: _Contrast,
    noise: _Texture,
    rng: np.random.Generator,
    depth: Floats,
) -> None:
    """Paint what lies under the dome of the diaphragm, and the spine and aorta beside it."""
    within = frame.inside(30 - depth)
    towards_apex = np.float32(rng.uniform(12, 26)) * frame.depth  # the dome rises from base to apex
    dome = rng.uniform(30, 46) - towards_apex
    curve = np.float32(rng.uniform(0.0015, 0.004)) * (frame.right - np.float32(rng.uniform(-15, 25))) ** 2
    below = dome + curve - frame.down
    mottled = _between(0.5 + 0.3 * noise(4.0) + 0.15 * noise(1.5), 0.05, 1.3)
    _paint(signal, within * frame.inside(below), contrast.fat * 0.75 * mottled)

    under = within * frame.inside(below + 2.5)
    liver = frame.ellipse(
        (dome + rng.uniform(35, 48), rng.uniform(-50, -25)), (rng.uniform(32, 42), rng.uniform(42, 58))
    )
    vessels = _between((noise(2.6) - 1.9) * 1.5, 0, 1)
    body = contrast.liver * (1 + 0.05 * noise(2.0))
    _paint(signal, under * frame.inside(liver), body + vessels * (0.75 * contrast.blood - body))

    # A stomach is a dark wall around bright contents: a ring that resembles a ventricle.
    for _ in range(int(rng.integers(1, 4))):
        radius, wall = rng.uniform(11, 24), rng.uniform(3, 7)
        middle = (dome + radius + rng.uniform(2, 26), rng.uniform(5, 65))
        stomach = frame.ellipse(middle, (radius, radius * rng.uniform(0.8, 1.5)))
        _paint(signal, under * frame.inside(stomach), contrast.myocardium * rng.uniform(0.8, 1.2))
        filling = float(rng.choice([0.15, 0.7, 0.95])) * contrast.blood * (1 + 0.1 * noise(3.0))
        _paint(signal, under * frame.inside(stomach + wall), filling)

    beside = (rng.uniform(25, 45), rng.uniform(62, 80))
    vertebra = frame.ellipse((beside[0] + 8, beside[1] + 24), (17, 19))
    _paint(signal, within * frame.inside(vertebra), 0.5 * contrast.fat * (1 + 0.15 * noise(2.0)))
    aorta = frame.ellipse(beside, (rng.uniform(9, 12.5), rng.uniform(9, 12.5)))
    _paint(signal, within * frame.inside(aorta), contrast.blood * rng.uniform(0.9, 1.05))


def _taper(depth: Floats, end: float, power: float) -> Floats:
    """Radius along the long axis, 1 at the valves and above, 0 from `end` on: a rounded cone."""
    return np.asarray(np.sqrt(1 - _between(depth / end, 0, 1) ** power), dtype=np.float32)


@dataclass(frozen=True)
class _HeartShape:
    """Signed distances in mm, negative inside, (Z, Y, X)."""

    cavity: Floats
    epicardium: Floats
    papillaries: Floats
    right: Floats
    groove_fat: Floats

    @staticmethod
    def draw(frame: _Frame, rng: np.random.Generator) -> _HeartShape:
        depth = frame.depth
        drift = rng.normal(0, 5, size=2).astype(np.float32)  # the stack never quite follows the long axis
        v, u = frame.down - drift[0] * depth, frame.right - drift[1] * depth
        angle, radius = np.arctan2(v, u), np.sqrt(v * v + u * u)
        # One heart phase a subject: a full, thin-walled ventricle or an empty, thick-walled one.
        filling = rng.uniform(0, 1)
        size = 15 + 10 * filling + rng.normal(0, 1.2)
        septum = np.deg2rad(rng.uniform(145, 225))
        power, apex = rng.uniform(1.8, 2.8), rng.uniform(1.02, 1.08)

        wall = (13.5 - 5 * filling + rng.normal(0, 1)) * (1 + _waves(angle, rng, (0.1, 0.08, 0.06)))
        wall *= np.where(depth < 0, np.float32(0.3), 1 - 0.2 * _between(depth, 0, 1))
        outline = size * (1 + _waves(angle, rng, (0.0, 0.09, 0.04, 0.02)))
        cavity = radius - outline * _taper(depth, 1.0, power)
        epicardium = radius - (outline + wall) * _taper(depth, apex, power)

        papillaries = np.full_like(cavity, _FAR)
        for side in (0.9, -0.8):
            direction = septum + np.pi + side + rng.normal(0, 0.2)
            reach = size * rng.uniform(0.55, 0.72) * _taper(depth, 1.0, power)
            distance = np.hypot(v - reach * float(np.sin(direction)), u - reach * float(np.cos(direction)))
            belly = 1 - np.abs(depth - rng.uniform(0.4, 0.55)) / rng.uniform(0.25, 0.35)
            thickness = size * rng.uniform(0.16, 0.24) * _between(belly, 0, 1) ** 0.5
            papillaries = np.minimum(papillaries, np.where(belly > 0, distance - thickness, _FAR))

        # The right ventricle sits on the septum: the crescent that the left one leaves of an ellipse.
        end = rng.uniform(0.78, 0.95)
        taper = np.maximum(_taper(depth, end, rng.uniform(1.5, 2.5)), np.float32(0.02))
        offset = (size + 8) * rng.uniform(0.75, 0.95) * (0.35 + 0.65 * taper)
        across = (size + 6) * rng.uniform(0.8, 1.1) * taper
        along = (size + 8) * rng.uniform(1.0, 1.3) * taper
        bent = angle - np.float32(septum)
        right = _ellipse(radius * np.cos(bent) - offset, radius * np.sin(bent), across, along)
        right += _waves(angle, rng, (0, 0, 1, 0.8, 0.6))
        return _HeartShape(
            cavity=np.where(depth < 1, cavity, _FAR),
            epicardium=np.where(depth < apex, epicardium, _FAR),
            papillaries=papillaries,
            right=np.where(depth < end, right, _FAR),
            groove_fat=3.5 * _between(_waves(angle, rng, (1.6, 1.2, 0.8)) + 0.4, 0.05, 1),
        )


def _paint_heart(
    signal: Floats, frame: _Frame, contrast: _Contrast, noise: _Texture, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Paint both ventricles and return their labels; above the valves the chambers are atria, unlabelled."""
    heart = _HeartShape.draw(frame, rng)
    muscle = contrast.myocardium * (1 + 0.06 * noise(2.0))
    covering = np.minimum(heart.right - 3, heart.epicardium) - heart.groove_fat
    _paint(signal, frame.inside(covering), 0.85 * contrast.fat)

    _paint(signal, frame.inside(heart.right - 2.5), muscle)
    blood = contrast.right_blood * (1 + 0.05 * noise(4.0))
    strands = _between(0.8 * noise(1.6) - 0.96, 0, 0.7) * frame.inside(np.abs(heart.right) - 6)
    _paint(signal, frame.inside(heart.right), blood + strands * (muscle - blood))

    _paint(signal, frame.inside(heart.epicardium), muscle)
    blood = contrast.blood * (1 + 0.05 * noise(4.0))
    strands = _between(0.8 * noise(1.5) - 0.96, 0, 0.6) * frame.inside(-heart.cavity - 5)
    _paint(signal, frame.inside(heart.cavity), blood + strands * (muscle - blood))
    _paint(signal, frame.inside(heart.cavity) * frame.inside(heart.papillaries), muscle)

    labels = np.zeros(signal.shape, dtype=np.uint8)
    ventricles = frame.depth >= 0
    labels[(heart.right < 0) & ventricles] = 1
    labels[(heart.epicardium < 0) & ventricles] = 2
    labels[(heart.cavity < 0) & ventricles] = 3
    return labels


# --- how it is measured ------------------------------------------------------------------------------------


def _acquire(signal: Floats, frame: _Frame, depth: Floats, rng: np.random.Generator) -> NDArray[np.int16]:
    """Apply the surface coil's bias field, the receiver's gain and Rician noise."""
    reach = rng.uniform(90, 240)
    coil = np.exp(-np.clip(depth, 0, None) / np.float32(reach))
    v, u = frame.down / 100, frame.right / 100
    slow = rng.normal(0, 0.15, size=5).astype(np.float32)
    field = coil * np.exp(slow[0] * v + slow[1] * u + slow[2] * v * u + slow[3] * v * v + slow[4] * u * u)
    measured = signal * field / np.float32(np.exp(-70 / reach))  # 1 at about the heart's depth
    sigma = np.float32(rng.uniform(0.02, 0.06))
    real = measured + sigma * rng.standard_normal(signal.shape, dtype=np.float32)
    imaginary = sigma * rng.standard_normal(signal.shape, dtype=np.float32)
    magnitude: Floats = np.sqrt(real * real + imaginary * imaginary)
    gain = np.float32(np.exp(rng.uniform(5.7, 7.3)))
    scaled: NDArray[np.int16] = np.clip(np.rint(gain * magnitude), 0, 32767).astype(np.int16)
    return scaled


def _oblique_affine(
    rng: np.random.Generator, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> NDArray[np.float64]:
    """Index (x, y, z) -> RAS+ millimetres, turned about all axes, the volume's middle near the origin."""
    a, b, c = np.deg2rad(rng.uniform((-30, -30, -20), (30, 30, 20)))
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_y @ about_x @ np.diag([-spacing[2], -spacing[1], spacing[0]])
    middle = (np.array(shape[::-1]) - 1) / 2
    affine[:3, 3] = rng.normal(0, 15, size=3) - affine[:3, :3] @ middle
    return affine


def _three_positive(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3 or not all(number > 0 and np.isfinite(number) for number in numbers):
        raise ValueError(f"{name} must be 3 positive numbers (z, y, x), got {tuple(values)}")
    return numbers[0], numbers[1], numbers[2]
