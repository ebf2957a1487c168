"""The synthetic heart cohort: repeatable, anatomically ordered, and not solved by intensity alone."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation, label

from kaf_model.phantom import HEART_CLASSES, HeartPhantom, make_heart, write_cohort

RIGHT, MYOCARDIUM, LEFT = 1, 2, 3
SMALL = {"shape": (5, 48, 64), "spacing": (12.0, 3.0, 3.0)}


@pytest.fixture(scope="module")
def cohort() -> list[HeartPhantom]:
    return [make_heart(seed) for seed in range(8)]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    first, second, other = make_heart(3, **SMALL), make_heart(3, **SMALL), make_heart(4, **SMALL)
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.affine, second.affine)
    assert not np.array_equal(first.labels, other.labels)
    assert not np.array_equal(first.affine, other.affine)


def test_shapes_types_and_classes() -> None:
    heart = make_heart(0, shape=(7, 48, 64), spacing=(10.0, 2.5, 2.0))
    assert heart.image.shape == heart.labels.shape == (7, 48, 64)
    assert heart.image.dtype == np.int16
    assert heart.labels.dtype == np.uint8
    assert heart.spacing == (10.0, 2.5, 2.0)
    assert heart.classes == HEART_CLASSES == {1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
    assert heart.image.min() >= 0
    np.testing.assert_allclose(np.linalg.norm(heart.affine[:3, :3], axis=0), [2.0, 2.5, 10.0])
    turned = np.abs(heart.affine[:3, :3] / [2.0, 2.5, 10.0])
    assert turned.max() < 0.9999, "the short axis is oblique"


def test_every_subject_has_every_class_in_plausible_amounts(cohort: list[HeartPhantom]) -> None:
    for heart in cohort:
        ml = np.bincount(heart.labels.ravel(), minlength=4) * np.prod(heart.spacing) / 1000
        assert 10 < ml[RIGHT] < 150
        assert 40 < ml[MYOCARDIUM] < 200
        assert 15 < ml[LEFT] < 180


def test_the_cavity_is_wrapped_in_myocardium(cohort: list[HeartPhantom]) -> None:
    for heart in cohort:
        for labels in heart.labels:
            if not (labels == LEFT).any():
                continue
            _, parts = label(labels == LEFT)
            assert parts == 1, "papillary muscles belong to the cavity and leave no holes or pieces"
            around = binary_dilation(labels == LEFT, np.ones((3, 3))) & (labels != LEFT)
            assert set(np.unique(labels[around])) == {MYOCARDIUM}


def test_papillary_muscles_are_dark_inside_the_cavity(cohort: list[HeartPhantom]) -> None:
    darkest = []
    for heart in cohort:
        middle = heart.labels.shape[0] // 2
        image, labels = heart.image[middle], heart.labels[middle]
        border = (np.mean(image[labels == LEFT]) + np.mean(image[labels == MYOCARDIUM])) / 2
        darkest.append(np.mean(image[labels == LEFT] < border))
    assert np.median(darkest) > 0.03
    assert max(darkest) < 0.5


def test_the_ventricle_tapers_to_the_apex_and_some_ends_hold_no_heart(cohort: list[HeartPhantom]) -> None:
    for heart in cohort:
        areas = (heart.labels >= MYOCARDIUM).sum(axis=(1, 2))
        held = np.flatnonzero(areas)
        assert np.array_equal(held, np.arange(held[0], held[-1] + 1)), "no gaps"
        assert areas[held[-1]] < 0.6 * areas.max()
        assert areas[held[0]] > 0.8 * areas.max()
    empty = [not heart.labels[end].any() for heart in cohort for end in (0, -1)]
    assert 0 < sum(empty) < len(empty)


def test_subjects_differ_in_place_size_and_brightness(cohort: list[HeartPhantom]) -> None:
    centres = np.array([np.argwhere(heart.labels[5] > 0).mean(axis=0) for heart in cohort])
    assert (centres.std(axis=0) > 3).all()
    wall_to_cavity = [(heart.labels == MYOCARDIUM).sum() / (heart.labels == LEFT).sum() for heart in cohort]
    assert max(wall_to_cavity) > 1.5 * min(wall_to_cavity)
    brightness = [heart.image[heart.labels == LEFT].mean() for heart in cohort]
    assert max(brightness) > 1.5 * min(brightness)


def test_breathing_moves_neighbouring_slices(cohort: list[HeartPhantom]) -> None:
    steps = []
    for heart in cohort:
        centres = [np.argwhere(s == LEFT).mean(axis=0) for s in heart.labels if (s == LEFT).sum() > 100]
        steps.append(np.abs(np.diff(centres, axis=0)).max())
    assert 1 < np.median(steps) < 8  # pixels


def test_intensity_alone_does_not_solve_it(cohort: list[HeartPhantom]) -> None:
    """The best interval of intensities, chosen on each volume with its own labels in hand, stays poor."""
    best = np.zeros((len(cohort), 3))
    for row, heart in enumerate(cohort):
        edges = np.quantile(heart.image, np.linspace(0, 1, 41))
        edges[-1] += 1
        for column, value in enumerate((RIGHT, MYOCARDIUM, LEFT)):
            inside = np.histogram(heart.image[heart.labels == value], edges)[0]
            everywhere = np.histogram(heart.image, edges)[0]
            for low in range(40):
                hits, chosen = np.cumsum(inside[low:]), np.cumsum(everywhere[low:])
                best[row, column] = max(best[row, column], np.max(2 * hits / (chosen + inside.sum())))
    assert best.max() < 0.7
    assert best.mean() < 0.5


def test_the_anatomy_of_a_seed_is_the_same_on_a_finer_grid() -> None:
    """Up to breathing, which belongs to the acquisition, cavity volumes agree."""
    coarse = make_heart(2, shape=(16, 96, 96), spacing=(5.0, 2.0, 2.0))
    fine = make_heart(2, shape=(16, 192, 192), spacing=(5.0, 1.0, 1.0))
    for value in HEART_CLASSES:
        ml = [(h.labels == value).sum() * np.prod(h.spacing) for h in (coarse, fine)]
        assert ml[0] == pytest.approx(ml[1], rel=0.05)


def test_one_slice_is_a_volume() -> None:
    heart = make_heart(0, shape=(1, 64, 48), spacing=(8.0, 2.5, 2.5))
    assert set(np.unique(heart.labels)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"shape": (10, 128)}, "shape must be 3 positive"),
        ({"shape": (0, 128, 128)}, "shape must be 3 positive"),
        ({"spacing": (8.0, -1.5, 1.5)}, "spacing must be 3 positive"),
    ],
)
def test_impossible_grids_are_refused(keywords: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_heart(0, **keywords)  # type: ignore[arg-type]


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed must be 0 or more"):
        make_heart(-1)


def test_a_cohort_on_disk_reads_back_as_drawn(tmp_path: Path) -> None:
    written = write_cohort(tmp_path, num_subjects=2, first_seed=7, **SMALL)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "images/heart_007.nii.gz",
        "images/heart_008.nii.gz",
    ]
    heart = make_heart(7, **SMALL)
    for folder, expected in (("images", heart.image), ("labels", heart.labels)):
        stored = nib.load(tmp_path / folder / "heart_007.nii.gz")
        assert stored.get_data_dtype() == expected.dtype
        np.testing.assert_array_equal(np.asarray(stored.dataobj).transpose(2, 1, 0), expected)
        np.testing.assert_allclose(stored.get_sform(), heart.affine, atol=1e-4)
        np.testing.assert_allclose(stored.get_qform(), heart.affine, atol=1e-3)
        assert stored.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(stored.header.get_zooms(), (3.0, 3.0, 12.0))
    names = json.loads((tmp_path / "labels" / "labels.json").read_text())
    assert names == {"0": "background", "1": "right ventricle", "2": "myocardium", "3": "left ventricle"}


def test_an_unlabelled_cohort_has_images_only(tmp_path: Path) -> None:
    write_cohort(tmp_path, num_subjects=1, labelled=False, **SMALL)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["heart_000.nii.gz", "images"]
