"""`kaf figure` and `kaf explore-report`, from files to files, on tiny phantoms."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from kaf_model.checkpoint import ClassLabel, load_header
from kaf_model.cli import main
from kaf_model.cli_figure import _classes
from kaf_model.cli_views import parse_numbers, parse_whole, with_neighbour
from kaf_model.errors import UserError
from kaf_model.phantom import write_cohort
from kaf_model.volume import read_labels, read_volume

SHAPE, SPACING = (5, 41, 60), (8.0, 3.0, 3.0)
DETECTION = ["--set", "slices.spacing=none", "--set", "keypoints.contrast_threshold=0.01"]
TINY = [
    *("--set", "model.start_channels=4"),
    *("--set", "model.embedding_width=8"),
    *("--set", "model.heads=2"),
    *("--set", "model.attention_blocks=1"),
    *DETECTION,
    *("--set", "pretrain.batch_size=2"),
    *("--set", "pretrain.sinkhorn_iterations=5"),
    *("--set", "pretrain.projection_width=16"),
    *("--set", "pretrain.augment.crop=48,48"),
    *("--device", "cpu"),
]
Kaf = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True, scope="module")
def _own_cache_and_one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("KAF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images` and `labels` of two subjects, and checkpoints: with and without matcher, and finetuned."""
    folder = tmp_path_factory.mktemp("figures")
    write_cohort(folder, num_subjects=2, shape=SHAPE, spacing=SPACING)
    images, steps = str(folder / "images"), ["--steps", "3"]
    assert main(["pretrain", images, "-o", str(folder / "local.safetensors"), *steps, *TINY]) == 0
    no_local = ["--set", "pretrain.weight_local=0"]
    assert main(["pretrain", images, "-o", str(folder / "global.safetensors"), *steps, *no_local, *TINY]) == 0
    line = [
        "finetune",
        "--images",
        images,
        "--labels",
        str(folder / "labels"),
        "--cases",
        "heart_000",
        *steps,
    ]
    line += ["--start", str(folder / "local.safetensors"), "--holdout", "0.4", "--device", "cpu"]
    line += ["--set", "finetune.holdout_every=2", "--set", "finetune.augment.crop=48,48"]
    assert main([*line, "-o", str(folder / "heart.safetensors")]) == 0
    return folder


@pytest.fixture
def kaf(capsys: pytest.CaptureFixture[str]) -> Kaf:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def volume(folder: Path) -> Path:
    return folder / "images" / "heart_000.nii.gz"


def assert_written(path: Path, result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert (code, err) == (0, "")
    assert f"wrote {path}" in out
    start = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[path.suffix]
    assert path.read_bytes().startswith(start)
    assert path.stat().st_size > 5000
    return out


def test_keypoints(kaf: Kaf, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "keypoints.svg"
    out = assert_written(
        path,
        kaf(
            "figure", "keypoints", volume(folder), "-o", path, "--slices", "1-2", "--orientation", *DETECTION
        ),
    )
    assert [line.split(":")[0] for line in out.splitlines()[:2]] == ["slice 1", "slice 2"]
    assert ">augmented<" in path.read_text()


@pytest.mark.parametrize(
    "extra", [["--radii", "5,20"], ["--distance", "-2"], ["--ratio", "0.7"], ["--radius", "4"]]
)
def test_correspondences(kaf: Kaf, folder: Path, tmp_path: Path, extra: list[str]) -> None:
    path = tmp_path / "pairs.pdf"
    line = ["figure", "correspondences", volume(folder), "-o", path, "--slice", 2, *extra]
    out = assert_written(path, kaf(*line, "--model", folder / "global.safetensors"))
    found = counts(out)
    assert len(found) == 2
    assert ("slices 2 and 0" in out) == ("-2" in extra)
    assert ("radius 5 pixels" in out) == ("radius 20 pixels" in out) == ("--radii" in extra)
    if "--distance" not in extra:  # fewer may be matched than by default
        plain = assert_written(path, kaf(*line[:7], "--model", folder / "global.safetensors"))
        assert found[0] < counts(plain)[0]


def counts(out: str) -> list[int]:
    return [int(number) for number in re.findall(r"(\d+) matched, unmatched ", out)]


def test_learned_matches_stand_beside_the_heuristic_ones(kaf: Kaf, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.png"
    line = ["figure", "correspondences", volume(folder), "-o", path, "--probability", 0]
    out = assert_written(path, kaf(*line, "--model", folder / "local.safetensors"))
    assert out.count("learned: ") == 2


@pytest.mark.parametrize(
    ("extra", "titles"),
    [
        (["--levels", "2,4", "--points", "2"], {"level 2", "level 4"}),
        (["--neighbours", "-1,1", "--point", "20,30"], {"slice 1", "slice 3"}),
    ],
)
def test_similarity(kaf: Kaf, folder: Path, tmp_path: Path, extra: list[str], titles: set[str]) -> None:
    path = tmp_path / "similarity.svg"
    line = ["figure", "similarity", volume(folder), "-o", path, "--untrained", *extra, "--device", "cpu"]
    models = ["--model", folder / "global.safetensors", "--model", f"fine={folder / 'heart.safetensors'}"]
    out = assert_written(path, kaf(*line, *models))
    assert [text.split(":")[0] for text in out.splitlines()[:3]] == ["untrained", "global", "fine"]
    assert "random weights (seed 0)" in out
    drawn = set(re.findall(r">((?:level|slice) \d)[<,]", path.read_text()))
    assert drawn >= titles


def test_segmentation(kaf: Kaf, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "segmentation.svg"
    line = ["figure", "segmentation", volume(folder), "-o", path, "--model", folder / "heart.safetensors"]
    assert_written(path, kaf(*line, "--labels", folder / "labels" / "heart_000.nii.gz", "--device", "cpu"))
    text = path.read_text()
    assert ">truth<" in text
    assert ">myocardium<" in text


def test_the_figure_shows_what_kaf_segment_writes(
    kaf: Kaf, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kaf_model.figures

    drawn: list[np.ndarray] = []
    real = kaf_model.figures.segmentation_comparison

    def noting(images: np.ndarray, reference: np.ndarray, predictions: dict[str, np.ndarray], **options: Any):
        drawn.extend(predictions.values())
        return real(images, reference, predictions, **options)

    monkeypatch.setattr(kaf_model.figures, "segmentation_comparison", noting)
    model, truth = folder / "heart.safetensors", folder / "labels" / "heart_000.nii.gz"
    line = ["figure", "segmentation", volume(folder), "--model", model, "--labels", truth, "--slices", "1,3"]
    assert kaf(*line, "-o", tmp_path / "x.png", "--device", "cpu")[0] == 0
    written, uncleaned = tmp_path / "written.nii.gz", tmp_path / "uncleaned.nii.gz"
    line = ["segment", volume(folder), "--model", model, "--device", "cpu"]
    assert kaf(*line, "-o", written)[0] == 0
    assert kaf(*line, "-o", uncleaned, "--largest-component", "none")[0] == 0
    shown = read_labels(written, read_volume(volume(folder)))[[1, 3]]
    assert np.array_equal(drawn[0], shown)
    assert not np.array_equal(shown, read_labels(uncleaned, read_volume(volume(folder)))[[1, 3]])


def test_curves(kaf: Kaf, folder: Path, tmp_path: Path) -> None:
    header = load_header(folder / "heart.safetensors")
    assert [record["curve"]["step"] for record in header["history"]] == [[1, 2, 3], [1, 2, 3]]
    assert [value is not None for value in header["history"][1]["curve"]["held-out dice"]] == [
        False,
        True,
        True,
    ]
    path = tmp_path / "curves.svg"
    named = f"mine={folder / 'heart.safetensors'}"
    assert_written(path, kaf("figure", "curves", named, folder / "global.safetensors", "-o", path))
    text = path.read_text()
    for legend in ("mine, pretraining", "mine, finetuning", "global", "Dice on held-out slices"):
        assert f">{legend}<" in text


def test_each_of_two_finetunings_has_its_curve(kaf: Kaf, folder: Path, tmp_path: Path) -> None:
    from kaf_model.checkpoint import load_tensors, save_tensors

    twice = tmp_path / "twice.safetensors"
    header = load_header(folder / "heart.safetensors")
    header = {**header, "history": [*header["history"], header["history"][-1]]}
    save_tensors(twice, load_tensors(folder / "heart.safetensors"), header)
    path = tmp_path / "curves.svg"
    assert_written(path, kaf("figure", "curves", twice, "-o", path))
    for legend in ("twice, pretraining", "twice, finetuning 1", "twice, finetuning 2"):
        assert f">{legend}<" in path.read_text()


def test_compute(kaf: Kaf, tmp_path: Path) -> None:
    path = tmp_path / "compute.pdf"
    line = ["figure", "compute", "-o", path, "--edges", "64,96", "--blocks", "4", "--keypoints", 9]
    out = assert_written(path, kaf(*line, "--preset", "small", "--device", "cpu"))
    rows = [row.split()[:3] for row in out.splitlines() if row.startswith(("KAF-UNet", "SwinUNETR"))]
    assert rows == [[name, "4", edge] for name in ("KAF-UNet", "SwinUNETR") for edge in ("64", "96")]


def test_explore_report(kaf: Kaf, folder: Path, tmp_path: Path) -> None:
    (folder / "labels" / "heart_001.nii.gz").rename(tmp_path / "aside.nii.gz")
    models = [
        "--untrained",
        "--model",
        folder / "global.safetensors",
        "--model",
        folder / "local.safetensors",
    ]
    line = ["explore-report", folder / "images", "--labels", folder / "labels", *models, "--radii", "4,30"]
    line += ["--slices", 1, "--points", 2, "-o", tmp_path / "report.csv", "--device", "cpu"]
    try:
        code, out, err = kaf(*line)
    finally:
        (tmp_path / "aside.nii.gz").rename(folder / "labels" / "heart_001.nii.gz")
    assert (code, err) == (0, "")
    assert "| untrained | global | local |" in out
    assert "2 volumes, 1 of them with labels" in out
    with open(tmp_path / "report.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {(row["quantity"], row["condition"]) for row in rows if row["model"] == "local"}
    assert {
        ("keypoints a slice", "median"),
        ("share on foreground", "keypoints"),
        ("matched share", "radius 4"),
        ("precision", "by matcher"),
        ("equivariance error", "level 4"),
    } <= found
    assert not [row for row in rows if row["model"] == "global" and row["condition"] == "by matcher"]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder, a file that is no volume, a constant volume, and a checkpoint without curve."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "empty").mkdir()
    (folder / "bad.nii.gz").write_text("no volume")
    nib.save(
        nib.Nifti1Image(np.full((32, 40, 3), 5, np.int16), np.diag([1, 1, 5, 1])), folder / "flat.nii.gz"
    )
    nib.save(nib.Nifti1Image(np.full((32, 40), 5, np.int16), np.eye(4)), folder / "one.nii.gz")
    return folder


ERRORS = [
    ("figure keypoints {heart} -o x.jpg", "figures are named NAME.png, NAME.pdf or NAME.svg, got x.jpg"),
    ("figure keypoints {broken}/flat.nii.gz -o x.png", "no keypoints on slice 1, 2 of flat"),
    ("figure keypoints {broken}/bad.nii.gz -o x.png", "bad.nii.gz"),
    ("figure keypoints {heart} -o x.png --slices 9", "slices of heart_000 are 0 to 4, got 9"),
    ("figure keypoints {heart} -o x.png --slices 2,x", "--slices takes whole numbers such as 3,4; got '2,x'"),
    (
        "figure keypoints {heart} -o x.png --model {local} --preset base",
        "a checkpoint brings its own settings",
    ),
    ("figure keypoints {heart} -o x.png --slices 3,2-1", "a range runs upwards, like 3-5"),
    ("figure correspondences {heart} -o x.png --distance 0", "--distance is that to another slice"),
    ("figure correspondences {heart} -o x.png --slice 4", "slices of heart_000 are 0 to 4, got 5"),
    ("figure correspondences {broken}/one.nii.gz -o x.png", "one has one slice"),
    ("figure correspondences {heart} -o x.png --radii 5,0", "greater than 0"),
    ("figure similarity {heart} -o x.png", "give at least one --model FILE, or --untrained"),
    ("figure similarity {heart} -o x.png --untrained --levels 5", "levels are 1 (fine) to 4 (coarse), got 5"),
    ("figure similarity {heart} -o x.png --untrained --point 3", "--point is Y,X"),
    (
        "figure similarity {heart} -o x.png --untrained --point 90,3",
        "must lie on the slice of 41 x 60 voxels",
    ),
    ("figure similarity {heart} -o x.png --model {local} --model {local}", "two models are called local"),
    ("figure similarity {heart} -o x.png --model {local} --preset base", "--preset is that of an untrained"),
    ("figure similarity {heart} -o x.png --model {broken}/none.safetensors", "no checkpoint at"),
    ("figure segmentation {heart} -o x.png --labels {labels} --model {local}", "cannot segment yet"),
    ("figure segmentation {heart} -o x.png --labels {labels}", "give at least one finetuned checkpoint"),
    ("figure curves {broken}/none.safetensors -o x.png", "no checkpoint at"),
    ("figure compute -o x.png --edges 100", "from 64 that divide by 32, got 100"),
    (
        "figure similarity {heart} -o x.png --untrained --model untrained={local}",
        "give the checkpoint another name",
    ),
    ("explore-report {broken}/empty --untrained", "there is no volume in"),
    ("explore-report {broken}/bad.nii.gz --untrained", "no volume can be read"),
    ("explore-report {broken}/flat.nii.gz --untrained", "no slice has a keypoint"),
    ("explore-report {heart}", "give at least one --model FILE, or --untrained"),
    ("explore-report {heart} --untrained --labels {broken}/empty", "there is no volume in"),
    ("explore-report {heart} --untrained --radii -3", "--radii are above 0"),
]


@pytest.mark.parametrize(("line", "message"), ERRORS)
def test_mistakes_are_answered_in_one_line(
    kaf: Kaf,
    folder: Path,
    broken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = line.format(
        heart=volume(folder),
        labels=folder / "labels" / "heart_000.nii.gz",
        local=folder / "local.safetensors",
        broken=broken,
    ).split()
    code, _, err = kaf(*words)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_curve_is_named(kaf: Kaf, folder: Path, tmp_path: Path) -> None:
    from kaf_model.checkpoint import load_tensors, save_tensors

    header = load_header(folder / "global.safetensors")
    header = {**header, "history": [{**header["history"][0], "curve": {}}]}
    assert json.dumps(header)
    save_tensors(tmp_path / "old.safetensors", load_tensors(folder / "global.safetensors"), header)
    code, _, err = kaf("figure", "curves", tmp_path / "old.safetensors", "-o", tmp_path / "x.png")
    assert code == 2
    assert "holds no curve" in err


def test_a_neighbour_is_looked_for_near_the_middle(folder: Path) -> None:
    heart = read_volume(volume(folder))
    assert heart.num_slices == 5
    pairs = {distance: with_neighbour(heart, None, distance) for distance in (1, -1, 4, -4, 3)}
    assert pairs == {1: [2, 3], -1: [2, 1], 4: [0, 4], -4: [4, 0], 3: [1, 4]}


def test_classes_of_all_models_are_drawn() -> None:
    first, second = (
        (ClassLabel(0, "background"), ClassLabel(1, "a")),
        (ClassLabel(1, "b"), ClassLabel(2, "c")),
    )
    found = _classes([*first, *second], np.array([0, 5]))
    assert list(found.items()) == [(1, "a"), (2, "c"), (5, "5")]  # in the order of their colours


def test_numbers_are_read_as_people_write_them() -> None:
    assert parse_whole("--slices", "3, 5-7") == [3, 5, 6, 7]
    assert parse_whole("--neighbours", "-1,1") == [-1, 1]
    assert parse_numbers("--radii", "2.5,4") == [2.5, 4.0]
    for text in ("", "7-5", "a", "1.5"):
        with pytest.raises(UserError, match="--slices"):
            parse_whole("--slices", text)
    with pytest.raises(UserError, match="--radii takes numbers"):
        parse_numbers("--radii", "5;6")
