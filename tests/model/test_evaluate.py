"""Scores by eye, against a slow reference, and for classes that are not there."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from kaf_model.errors import UserError
from kaf_model.evaluate import ClassScore, Scores, evaluate_folders, evaluate_volume
from kaf_model.progress import Progress

SHAPE = (6, 48, 64)
SPACING = (8.0, 1.5, 1.0)


def box(z: tuple[int, int], y: tuple[int, int], x: tuple[int, int], value: int = 1) -> np.ndarray:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[slice(*z), slice(*y), slice(*x)] = value
    return labels


def blob(seed: int, value: int = 1) -> np.ndarray:
    """A lumpy solid somewhere near the middle."""
    rng = np.random.default_rng(seed)
    z, y, x = np.indices(SHAPE)
    distance = np.hypot(y - rng.uniform(20, 28), x - rng.uniform(26, 38)) + rng.normal(0, 1, SHAPE)
    return np.where((distance < 9) & (z > 0) & (z < 5), value, 0).astype(np.uint8)


def slow_dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    both = total = 0
    for p, r in zip(prediction.flat, reference.flat, strict=True):
        both += bool(p and r)
        total += bool(p) + bool(r)
    return 2 * both / total


def slow_hd95(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Every surface voxel to every other one; a surface voxel has a face neighbour outside the object."""

    def surface(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask, 1)
        inner = mask.copy()
        for axis in range(3):
            for shift in (-1, 1):
                inner &= np.roll(padded, shift, axis)[1:-1, 1:-1, 1:-1]
        return np.argwhere(mask & ~inner) * np.array(SPACING)

    a, b = surface(prediction > 0), surface(reference > 0)
    distances = np.linalg.norm(a[:, None] - b[None], axis=2)
    return max(np.percentile(distances.min(axis=1), 95), np.percentile(distances.min(axis=0), 95))


def test_two_overlapping_boxes() -> None:
    """Ten columns each, six of them shared: Dice 2 * 6 / 20."""
    reference, prediction = box((1, 4), (10, 20), (10, 20)), box((1, 4), (10, 20), (14, 24))
    (score,) = evaluate_volume(prediction, reference, spacing=SPACING)
    assert score.dice == pytest.approx(0.6)
    assert score.reference_ml == score.prediction_ml == pytest.approx(3 * 10 * 10 * 8.0 * 1.5 / 1000)


@pytest.mark.parametrize(("axis", "steps"), [(0, 1), (1, 3), (2, 5)])
def test_a_shifted_plate_is_as_far_as_its_shift_in_mm(axis: int, steps: int) -> None:
    """A plate one voxel thick, moved across itself: every surface distance is the shift."""
    spans = [(0, 6), (8, 40), (10, 50)]
    spans[axis] = (2, 3)
    reference = box(*spans)
    spans[axis] = (2 + steps, 3 + steps)
    (score,) = evaluate_volume(box(*spans), reference, spacing=SPACING)
    assert score.hd95_mm == pytest.approx(steps * SPACING[axis])
    assert score.dice == 0


def test_a_perfect_prediction() -> None:
    (score,) = evaluate_volume(blob(0), blob(0), spacing=SPACING)
    assert (score.dice, score.hd95_mm) == (1.0, 0.0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_scores_equal_the_slow_references(seed: int) -> None:
    prediction, reference = blob(seed), blob(seed + 10)
    (score,) = evaluate_volume(prediction, reference, spacing=SPACING)
    assert score.dice == pytest.approx(slow_dice(prediction, reference), abs=1e-6)
    assert score.hd95_mm == pytest.approx(slow_hd95(prediction, reference), abs=1e-4)


def test_swapping_the_two_swaps_the_volumes_only() -> None:
    (one,) = evaluate_volume(blob(1), blob(2), spacing=SPACING)
    (two,) = evaluate_volume(blob(2), blob(1), spacing=SPACING)
    assert (one.dice, one.hd95_mm) == pytest.approx((two.dice, two.hd95_mm))
    assert (one.prediction_ml, one.reference_ml) == (two.reference_ml, two.prediction_ml)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@pytest.mark.parametrize("touching", [False, True])
def test_cropping_changes_nothing(touching: bool) -> None:
    """MONAI on the whole volume gives the same, also for an object that touches the volume's faces."""
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance

    prediction, reference = blob(4), blob(5)
    if touching:
        prediction, reference = prediction[1:5, 15:30, 28:], reference[1:5, 15:30, 28:]
    masks = [torch.from_numpy(labels > 0)[None, None] for labels in (prediction, reference)]
    (score,) = evaluate_volume(prediction, reference, spacing=SPACING)
    assert score.dice == float(compute_dice(*masks))
    whole = compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=SPACING)
    assert score.hd95_mm == float(whole)
    assert score.hd95_mm > 0


def test_a_class_in_neither_is_not_scored_and_counts_in_no_mean() -> None:
    labels = blob(0)
    present, absent = evaluate_volume(labels, labels, spacing=SPACING, classes={1: "liver", 2: "spleen"})
    assert math.isnan(absent.dice)
    assert math.isnan(absent.hd95_mm)
    assert absent.prediction_ml == absent.reference_ml == 0
    assert Scores((present, absent)).mean_dice == 1


@pytest.mark.parametrize("missed", [True, False])
def test_a_class_in_one_only_has_dice_zero_and_no_distance(missed: bool) -> None:
    pair = [np.zeros(SHAPE, dtype=np.uint8), blob(0)]
    (score,) = evaluate_volume(*(pair if missed else pair[::-1]), spacing=SPACING)
    assert score.dice == 0
    assert math.isnan(score.hd95_mm)
    assert (score.prediction_ml == 0) == missed
    (summary,) = Scores((score,)).by_class()
    assert (summary.num_volumes, summary.num_one_sided) == (1, 1)
    assert "1 (1 without HD95)" in Scores((score,)).table()


def test_values_need_not_be_contiguous_and_background_is_never_scored() -> None:
    reference = box((1, 3), (0, 9), (0, 9), 7) + box((4, 6), (20, 30), (20, 30), 200)
    scores = evaluate_volume(reference.astype(np.int32), reference, spacing=SPACING)
    assert [(score.value, score.name, score.dice) for score in scores] == [(7, "7", 1), (200, "200", 1)]
    named = evaluate_volume(reference, reference, spacing=SPACING, classes={0: "air", 200: "far"})
    assert [(score.value, score.name) for score in named] == [(200, "far")]


def test_voxels_of_a_sheared_grid_have_the_volume_they_are_given() -> None:
    (score,) = evaluate_volume(blob(0), blob(0), spacing=SPACING, voxel_ml=0.5)
    assert score.reference_ml == np.count_nonzero(blob(0)) * 0.5


def test_borders_of_a_picture_lie_within_it() -> None:
    """Not its two faces, which would be border everywhere: a disc moved by 3 voxels of 2 mm is 6 mm away."""
    y, x = np.indices((1, 64, 64))[1:]
    discs = [(np.hypot(y - 30, x - 30 - shift) < 20).astype(np.uint8) for shift in (0, 3)]
    (score,) = evaluate_volume(*discs, spacing=(8.0, 1.0, 2.0))
    assert 5 < score.hd95_mm <= 6.5
    volumes = [np.concatenate([disc, np.zeros_like(disc)]) for disc in discs]  # there the faces are borders
    (score,) = evaluate_volume(*volumes, spacing=(8.0, 1.0, 2.0))
    assert score.hd95_mm < 4


def test_unlike_shapes_and_probabilities_are_refused() -> None:
    with pytest.raises(UserError, match="same shape"):
        evaluate_volume(blob(0), blob(0)[:-1], spacing=SPACING)
    with pytest.raises(UserError, match="prediction must hold integer labels"):
        evaluate_volume(blob(0).astype(np.float32), blob(0), spacing=SPACING)  # type: ignore[arg-type]


def row(volume: str, value: int, dice: float, hd95: float = 2.0) -> ClassScore:
    return ClassScore(volume, value, {1: "one", 2: "two"}[value], dice, hd95, 1.5, 3.0)


def test_the_mean_is_over_classes_of_means_over_volumes() -> None:
    scores = Scores((row("a", 1, 0.9), row("b", 1, 0.7), row("a", 2, 0.4), row("b", 2, math.nan, math.nan)))
    assert scores.mean_dice == pytest.approx((0.8 + 0.4) / 2)
    one, two = scores.by_class()
    assert one.dice == pytest.approx((0.8, math.sqrt(0.02)))
    assert (two.num_volumes, two.num_one_sided) == (1, 0)
    assert math.isnan(Scores(()).mean_dice)


def test_the_table() -> None:
    scores = Scores((row("a", 1, 0.9), row("b", 1, 0.7, 4.0), row("a", 2, 0.4)))
    assert scores.table() == (
        "| class | Dice          | HD95 (mm) | prediction (ml) | reference (ml) | volumes |\n"
        "| ----- | ------------- | --------- | --------------- | -------------- | ------- |\n"
        "| 1 one | 0.800 ± 0.141 | 3.0 ± 1.4 | 1.5 ± 0.0       | 3.0 ± 0.0      | 2       |\n"
        "| 2 two | 0.400         | 2.0       | 1.5             | 3.0            | 1       |\n"
        "| mean  | 0.600         | 2.5       |                 |                | 2       |\n"
    )


def test_csv_round_trip(tmp_path: Path) -> None:
    scores = Scores((row("a", 1, 1 / 3), row("b, with a comma", 2, math.nan, math.nan)))
    scores.to_csv(tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2
    assert list(lines[0]) == ["volume", "value", "name", "dice", "hd95_mm", "prediction_ml", "reference_ml"]
    assert float(lines[0]["dice"]) == 1 / 3
    assert (lines[1]["volume"], lines[1]["dice"], lines[1]["hd95_mm"]) == ("b, with a comma", "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"], "nothing else is left behind"


def finish(work: Generator[Progress, None, Scores]) -> tuple[list[Progress], Scores]:
    reports = []
    while True:
        try:
            reports.append(next(work))
        except StopIteration as stop:
            return reports, stop.value


def save(path: Path, labels: np.ndarray, spacing: tuple[float, float, float] = SPACING) -> None:
    path.parent.mkdir(exist_ok=True)
    image: Any = nib.Nifti1Image(labels.transpose(2, 1, 0), np.diag([*spacing[::-1], 1.0]))
    nib.save(image, path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Volumes a and b in both, "extra" only predicted, "missed" only in the references."""
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    for name, seed in (("a", 1), ("b", 2), ("extra", 3)):
        save(predictions / f"{name}.nii.gz", blob(seed))
    for name, seed in (("a", 11), ("b", 2), ("missed", 3)):
        save(references / f"{name}.nii.gz", blob(seed))
    (references / "labels.json").write_text(json.dumps({"0": "background", "1": "heart", "5": "lung"}))
    return predictions, references


def test_folders_pair_by_file_name(folders: tuple[Path, Path]) -> None:
    reports, scores = finish(evaluate_folders(*folders))
    assert [(score.volume, score.name) for score in scores.rows] == [
        ("a", "heart"),
        ("a", "lung"),
        ("b", "heart"),
        ("b", "lung"),
    ]
    (expected,) = evaluate_volume(blob(1), blob(11), spacing=SPACING, classes={1: "heart"}, volume="a")
    assert scores.rows[0].dice == expected.dice
    assert scores.rows[0].hd95_mm == pytest.approx(expected.hd95_mm, abs=1e-4)
    assert scores.rows[0].reference_ml == pytest.approx(expected.reference_ml)
    assert scores.rows[2].dice == 1
    assert math.isnan(scores.rows[1].dice)
    assert len(scores.notices) == 2
    assert "extra.nii.gz was not scored: no reference" in scores.notices[0]
    assert "missed.nii.gz was not scored: no prediction" in scores.notices[1]
    assert (reports[-1].step, reports[-1].total) == (2, 2)
    assert [report.message for report in reports if report.message] == list(scores.notices)


@pytest.mark.parametrize("place", ["labels.json", "dataset.json", "../labels.json", "../dataset.json"])
def test_named_classes_are_not_all_there_are(folders: tuple[Path, Path], place: str) -> None:
    predictions, references = folders
    (references / "labels.json").unlink()
    names = {"background": 0, "heart": 1}
    content = {"labels": names} if place.endswith("dataset.json") else names
    (references / place).write_text(json.dumps(content))
    save(predictions / "a.nii.gz", np.where(blob(1) == 0, 2, blob(1)))
    _, scores = finish(evaluate_folders(predictions, references))
    assert [(row.name, row.dice) for row in scores.rows if row.volume == "a"][1:] == [("2", 0.0)]
    assert scores.rows[0].name == "heart"


def test_two_files_pair_whatever_their_names_and_a_file_finds_its_partner(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    _, scores = finish(evaluate_folders(predictions / "extra.nii.gz", references / "missed.nii.gz"))
    assert [(score.volume, score.dice) for score in scores.rows if score.value == 1] == [("missed", 1.0)]
    assert not scores.notices
    _, scores = finish(evaluate_folders(predictions / "b.nii.gz", references))
    assert [score.volume for score in scores.rows if score.value == 1] == ["b"]
    assert not scores.notices


def test_a_pair_on_different_grids_is_named_and_the_rest_goes_on(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    save(predictions / "a.nii.gz", blob(1)[:, :, 4:])
    _, scores = finish(evaluate_folders(predictions, references))
    assert {score.volume for score in scores.rows} == {"b"}
    assert "a was not scored" in scores.notices[-1]
    with pytest.raises(UserError, match="nothing could be scored"):
        finish(evaluate_folders(predictions / "a.nii.gz", references / "a.nii.gz"))


def test_one_of_the_label_maps_of_4d_files_is_scored(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    frames = np.stack([blob(1), blob(2)])
    image: Any = nib.Nifti1Image(frames.transpose(3, 2, 1, 0), np.diag([*SPACING[::-1], 1.0]))
    nib.save(image, references / "b.nii.gz")
    pair = predictions / "b.nii.gz", references / "b.nii.gz"
    with pytest.raises(UserError, match="holds 2 frames; choose one"):
        finish(evaluate_folders(*pair))
    dice = [finish(evaluate_folders(*pair, frame=frame))[1].rows[0].dice for frame in (0, 1)]
    assert dice[0] < 1
    assert dice[1] == 1


def test_folders_that_do_not_fit_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    with pytest.raises(UserError, match="there is no file or folder"):
        finish(evaluate_folders(predictions, tmp_path / "nowhere"))
    with pytest.raises(UserError, match="they pair by file name"):
        finish(evaluate_folders(predictions / "extra.nii.gz", references))
    save(predictions / "a.nii", blob(1))
    with pytest.raises(UserError, match="same name"):
        finish(evaluate_folders(predictions, references))
    (predictions / "a.nii").unlink()
    (references / "labels.json").write_text('["heart"]')
    with pytest.raises(UserError, match="must name label values"):
        finish(evaluate_folders(predictions, references))
