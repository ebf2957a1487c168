"""Intensity changes: each against a plain per-slice reference; what is not touched stays to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from kaf_model.config import AugmentConfig
from kaf_model.intensity import IntensityChange, change_intensities

CHANGES = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma")


def slices(num_slices: int = 5) -> Tensor:
    images = torch.randn(num_slices, 1, 48, 64, generator=torch.Generator().manual_seed(1))
    smooth = torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, 2, 2)))
    return (smooth - smooth.mean()) / smooth.std()


def only(name: str, *strengths: float) -> IntensityChange:
    """One kind of change, with a strength for every slice (NaN: none)."""
    nothing = torch.full((len(strengths),), torch.nan)
    changes = dict.fromkeys(CHANGES, nothing) | {name: torch.tensor(strengths)}
    return IntensityChange(**changes, noise_seed=torch.arange(len(strengths)))


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(image, sigma, mode="nearest", truncate=5)


def coarsened(image: np.ndarray, factor: float) -> np.ndarray:
    for axis, size in enumerate(image.shape):
        pixels = np.arange(size) + 0.5
        for centres, last in ((pixels * factor - 0.5, size - 1), (pixels / factor - 0.5, size / factor - 1)):
            at = np.clip(centres, 0, last)
            below = np.minimum(np.floor(at).astype(int), size - 2)
            part = np.expand_dims(at - below, 1 - axis)
            image = (1 - part) * image.take(below, axis) + part * image.take(below + 1, axis)
    return image


def bent(image: np.ndarray, gamma: float) -> np.ndarray:
    low, high = image.min(), image.max()
    return low + (high - low) * ((image - low) / (high - low)) ** gamma


REFERENCES = {
    "blur": blurred,
    "brightness": lambda image, shift: image + shift,
    "contrast": lambda image, factor: image.mean() + factor * (image - image.mean()),
    "low_resolution": coarsened,
    "gamma": bent,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_each_change_does_what_a_plain_reference_does(name: str) -> None:
    images, strengths = slices(), (1.3, torch.nan, 1.0, 1.7, torch.nan)
    changed = only(name, *strengths).apply(images)
    for image, result, strength in zip(images[:, 0], changed[:, 0], strengths, strict=True):
        if np.isnan(strength):
            assert torch.equal(result, image)
        else:
            np.testing.assert_allclose(result, REFERENCES[name](image.numpy(), strength), atol=1e-3)


def test_a_change_by_eye() -> None:
    image = torch.tensor([[0.0, 1.0], [2.0, 4.0]])[None, None]
    assert only("brightness", 0.5).apply(image).flatten().tolist() == [0.5, 1.5, 2.5, 4.5]
    assert only("contrast", 2.0).apply(image).flatten().tolist() == [-1.75, 0.25, 2.25, 6.25]
    assert only("gamma", 2.0).apply(image).flatten().tolist() == [0.0, 0.25, 1.0, 4.0]


def test_low_resolution_by_two_averages_neighbours_and_by_one_changes_nothing() -> None:
    image = torch.tensor([0.0, 2.0, 4.0, 6.0]).expand(1, 1, 4, 4)
    halved = only("low_resolution", 2.0).apply(image)[0, 0, 0]  # coarse pixels 1, 5
    torch.testing.assert_close(halved, torch.tensor([1.0, 2.0, 4.0, 5.0]))
    images = slices()
    torch.testing.assert_close(only("low_resolution", *[1.0] * 5).apply(images), images)


def test_noise_has_its_strength_and_no_other() -> None:
    images = slices(3)
    added = only("noise", 0.1, torch.nan, 0.3).apply(images) - images
    assert added[0].std() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(added[1], torch.zeros_like(added[1]))
    assert added[2].std() == pytest.approx(0.3, rel=0.05)
    correlation = torch.corrcoef(torch.stack([added[0].flatten(), added[2].flatten()]))[0, 1]
    assert abs(correlation) < 0.1


@pytest.mark.parametrize("name", ["contrast", "gamma"])
def test_slices_that_are_read_together_change_alike(name: str) -> None:
    """Equal intensities stay equal, whichever of the slices they are on."""
    together = torch.cat([slices(2), 2 * slices(2) - 1, slices(2)], 1)  # (2, 3, H, W)
    together[:, 1, :8] = together[:, 0, :8]
    changed = only(name, 0.7, 1.3).apply(together)
    torch.testing.assert_close(changed[:, 1, :8], changed[:, 0, :8])
    torch.testing.assert_close(changed[:, 2], changed[:, 0])
    for changed_stack, stack, strength in zip(changed, together, (0.7, 1.3), strict=True):
        expected = torch.from_numpy(REFERENCES[name](stack.numpy(), strength))
        torch.testing.assert_close(changed_stack, expected, atol=1e-4, rtol=0)


def test_gamma_keeps_the_extremes() -> None:
    images = slices()
    changed = only("gamma", 0.5, 0.8, 1.0, 1.2, 2.0).apply(images)
    for reduce in (torch.amin, torch.amax):
        torch.testing.assert_close(reduce(changed, (1, 2, 3)), reduce(images, (1, 2, 3)))


def test_constant_slices_stay_finite() -> None:
    changed = change_intensities(
        torch.full((6, 1, 48, 64), 0.3),
        AugmentConfig(intensity_probability=1),
        generator=torch.Generator().manual_seed(0),
    )
    assert changed.isfinite().all()
    constant = torch.full((1, 1, 48, 64), 0.3)
    for name in REFERENCES.keys() - {"brightness"}:
        torch.testing.assert_close(only(name, 1.3).apply(constant), constant)


def test_probability_zero_returns_the_input() -> None:
    images = slices()
    config = AugmentConfig(intensity_probability=0)
    assert change_intensities(images, config, generator=torch.Generator()) is images


def test_the_input_is_not_written_to() -> None:
    images = slices()
    before = images.clone()
    change_intensities(images, AugmentConfig(intensity_probability=1), generator=torch.Generator())
    assert torch.equal(images, before)


def test_draws_keep_chance_and_ranges() -> None:
    config = AugmentConfig(intensity_probability=0.3)
    change = IntensityChange.sample(config, 4000, generator=torch.Generator().manual_seed(0))
    ranges = {
        "noise": (0, config.noise),
        "blur": config.blur,
        "brightness": (-config.brightness, config.brightness),
        "contrast": config.contrast,
        "low_resolution": config.low_resolution,
        "gamma": config.gamma,
    }
    for name, (low, high) in ranges.items():
        strengths = getattr(change, name)
        made = strengths[strengths.isfinite()]
        assert len(made) / 4000 == pytest.approx(0.3, abs=0.03)
        assert made.min() >= low
        assert made.max() <= high
        assert made.mean() == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


def test_a_generator_decides_everything_and_the_batch_nothing() -> None:
    images, config = slices(8), AugmentConfig(intensity_probability=0.7)
    first, again = (
        change_intensities(images, config, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, again)
    change = IntensityChange.sample(config, 8, generator=torch.Generator().manual_seed(3))
    shares = [
        change.select(rows).apply(images[rows]) for rows in (slice(0, 3), torch.tensor([3, 4, 5, 6, 7]))
    ]
    torch.testing.assert_close(torch.cat(shares), first, atol=1e-5, rtol=0)


def test_half_precision_under_autocast_keeps_its_type() -> None:
    images = slices().bfloat16()
    config = AugmentConfig(intensity_probability=1)
    with torch.autocast("cpu", torch.bfloat16):
        changed = change_intensities(images, config, generator=torch.Generator().manual_seed(0))
    plain = change_intensities(images.float(), config, generator=torch.Generator().manual_seed(0))
    assert changed.dtype == torch.bfloat16
    torch.testing.assert_close(changed.float(), plain, atol=0.1, rtol=0.02)


def test_no_slices_and_a_wrong_shape() -> None:
    config = AugmentConfig(intensity_probability=1)
    none = torch.zeros(0, 1, 8, 8)
    assert change_intensities(none, config, generator=torch.Generator()).shape == none.shape
    with pytest.raises(ValueError, match=r"\(2, S, H, W\)"):
        change_intensities(torch.zeros(2, 8, 8), config, generator=torch.Generator())
