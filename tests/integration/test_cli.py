"""The command line, from files to files, on tiny phantoms."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from kaf_model.checkpoint import load_model
from kaf_model.cli import main
from kaf_model.cli_options import duration_text, parse_classes, parse_duration, parse_slices
from kaf_model.cli_progress import Interrupted
from kaf_model.cli_settings import choose_settings
from kaf_model.config import Recipe
from kaf_model.errors import UserError
from kaf_model.phantom import HEART_CLASSES, write_cohort
from kaf_model.presets import PRESETS
from kaf_model.progress import Progress
from kaf_model.segment_files import plan_outputs
from kaf_model.training_files import resume_path

SHAPE, SPACING = (5, 48, 64), (8.0, 3.0, 3.0)
_TINY = [
    *("--set", "model.start_channels=4"),
    *("--set", "model.embedding_width=8"),
    *("--set", "model.heads=2"),
    *("--set", "model.attention_blocks=1"),
    *("--set", "slices.spacing=none"),
    *("--device", "cpu"),
]
TINY = {
    "pretrain": [
        *_TINY,
        *("--set", "pretrain.batch_size=2"),
        *("--set", "pretrain.sinkhorn_iterations=5"),
        *("--set", "pretrain.projection_width=16"),
        *("--set", "pretrain.augment.crop=48,48"),
    ],
    "finetune": [
        *_TINY,
        *("--set", "finetune.batch_size=2"),
        *("--set", "finetune.augment.crop=48,48"),
    ],
}
EXACT = ["--precision", "float32"]


@dataclass(frozen=True)
class Run:
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def losses(self) -> dict[str, float]:
        """The losses at the end of a training."""
        (line,) = re.findall(r"^last losses: (.*)$", self.out, re.MULTILINE)
        parts = line.split()
        return {name: float(value) for name, value in zip(parts[::2], parts[1::2], strict=True)}


Kaf = Callable[..., Run]


@pytest.fixture(autouse=True, scope="module")
def _own_cache_and_one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on two busy cores are slower than one
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("KAF_CACHE", str(tmp_path_factory.mktemp("cache")))
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("OMP_WAIT_POLICY", "PASSIVE")
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def kaf(capsys: pytest.CaptureFixture[str]) -> Kaf:
    """Run a command line in this process."""

    def run(*arguments: object) -> Run:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`unlabelled/images` of 2 subjects; `images` and `labels` of heart_100 and heart_101."""
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder / "unlabelled", num_subjects=2, labelled=False, shape=SHAPE, spacing=SPACING)
    write_cohort(folder, num_subjects=2, first_seed=100, shape=SHAPE, spacing=SPACING)
    return folder


@pytest.fixture(scope="module")
def models(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pretrained.safetensors`, and `model.safetensors` that was finetuned from it."""
    folder = tmp_path_factory.mktemp("models")
    pretrained = folder / "pretrained.safetensors"
    assert (
        main(
            [
                "pretrain",
                str(cohort / "unlabelled/images"),
                "-o",
                str(pretrained),
                "--steps",
                "2",
                *TINY["pretrain"],
            ]
        )
        == 0
    )
    line = ["finetune", *labelled(cohort), "--slices", "heart_100:1,2,3", "--start", str(pretrained)]
    line += ["-o", str(folder / "model.safetensors"), "--steps", "2", "--device", "cpu"]
    assert main(line) == 0
    return folder


def labelled(cohort: Path) -> list[str]:
    return ["--images", str(cohort / "images"), "--labels", str(cohort / "labels")]


def assert_one_error_line(run: Run, *words: str) -> None:
    assert run.code == 2, run
    assert run.err.startswith("error: "), run.err
    assert run.err.count("\n") == 1, run.err
    for word in words:
        assert word in run.err


def in_a_process(arguments: Sequence[str], *launcher: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *(launcher or ("kaf_model",)), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], so_far: str = "") -> Run:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return Run(process.returncode, so_far + out, err)


# --- the main job ------------------------------------------------------------------------------------------


def test_an_unknown_orientation_is_named(cohort: Path, models: Path, tmp_path: Path, kaf: Kaf) -> None:
    line = ("segment", cohort / "images", "--model", models / "model.safetensors", "-o", tmp_path / "out")
    run = kaf(*line, "--orientation", "sideways")
    assert_one_error_line(run, "segment.orientation", "'fixed', 'best' or 'average', got 'sideways'")
    assert not (tmp_path / "out").exists()


def test_the_main_job_on_files(cohort: Path, models: Path, tmp_path: Path, kaf: Kaf) -> None:
    out = tmp_path / "out"
    model = models / "model.safetensors"
    run = kaf("segment", cohort / "images", "--model", model, "-o", out, "--probabilities", "--uncertainty")
    assert (run.code, run.err) == (0, "")
    assert run.out.count("same grid as source") == 2
    assert re.search(r"left ventricle [\d.]+ ml", run.out)
    assert "segmented 2 of 2 volumes" in run.out
    assert json.loads((out / "labels.json").read_text()) == {
        "0": "background",
        **{str(value): name for value, name in HEART_CLASSES.items()},
    }
    source = nib.load(cohort / "images/heart_100.nii.gz")
    labels = nib.load(out / "heart_100.nii.gz")
    assert labels.shape == source.shape
    np.testing.assert_array_equal(labels.affine, source.affine)
    assert nib.load(out / "heart_100_probabilities.nii.gz").shape == (*source.shape, 4)
    assert nib.load(out / "heart_101_uncertainty.nii.gz").shape == source.shape

    scores = tmp_path / "scores.csv"
    run = kaf("evaluate", out, cohort / "labels", "-o", scores)
    assert run.code == 0
    assert "| 2 myocardium" in run.out
    rows = list(csv.DictReader(scores.read_text().splitlines()))
    assert {(row["volume"], row["name"]) for row in rows} >= {("heart_101", "left ventricle")}

    single = tmp_path / "single.nii.gz"
    run = kaf("segment", cohort / "images/heart_100.nii.gz", "--model", model, "-o", single)
    drawn = single.read_bytes()
    again = ("segment", cohort / "images/heart_100.nii.gz", "--model", model, "-o", single)
    assert_one_error_line(kaf(*again), "--overwrite to replace label maps")
    assert single.read_bytes() == drawn
    assert kaf(*again, "--overwrite").code == 0
    assert run.code == 0
    np.testing.assert_array_equal(np.asarray(nib.load(single).dataobj), np.asarray(labels.dataobj))


def test_a_folder_half_segmented_is_gone_on_with(
    cohort: Path, models: Path, tmp_path: Path, kaf: Kaf
) -> None:
    line = ("segment", cohort / "images", "--model", models / "model.safetensors", "-o", tmp_path)
    assert kaf(*line).code == 0
    drawn = (tmp_path / "heart_100.nii.gz").read_bytes()
    (tmp_path / "heart_101.nii.gz").unlink()
    assert_one_error_line(kaf(*line), "--skip-existing to segment the others")
    assert_one_error_line(kaf(*line, "--skip-existing", "--overwrite"), "give one")
    run = kaf(*line, "--skip-existing")
    assert run.code == 0, run.err
    assert "segmented 1 of 2 volumes" in run.out
    assert ", 1 were there" in run.out
    assert (tmp_path / "heart_100.nii.gz").read_bytes() == drawn
    assert (tmp_path / "heart_101.nii.gz").is_file()
    run = kaf(*line, "--skip-existing")
    assert run.code == 0, run.err
    assert "all 2 label maps are there" in run.out


def test_an_interrupted_segmentation_says_how_it_goes_on(
    cohort: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kaf: Kaf
) -> None:
    def stopped(*_: object, **__: object) -> Iterator[Progress]:
        raise Interrupted(trained=False)
        yield

    monkeypatch.setattr("kaf_model.segment_files.segment_files", stopped)
    model = ("--model", models / "model.safetensors")
    run = kaf("segment", cohort / "images", *model, "-o", tmp_path)
    assert run.code == 130
    assert "go on with --skip-existing" in run.out
    run = kaf("segment", cohort / "images", *model, "-o", tmp_path, "--overwrite")
    assert "the same line does it again" in run.out


def test_propagate_carries_finished_slices_to_the_others(kaf: Kaf, cohort: Path, tmp_path: Path) -> None:
    finished = ("--slices", "heart_100:1,3", "--empty", "heart_100:0")
    sparse = tmp_path / "labels"
    sparse.mkdir()
    truth = nib.load(cohort / "labels/heart_100.nii.gz")
    labels = np.asarray(truth.dataobj).copy()
    labels[..., [0, 2, 4]] = 0
    nib.save(nib.Nifti1Image(labels, truth.affine, truth.header), sparse / "heart_100.nii.gz")
    folders = ("--images", cohort / "images", "--labels", sparse)
    out = tmp_path / "out"
    run = kaf("propagate", *folders, *finished, "-o", out)
    assert run.code == 0, run.err
    assert "same grid as source" in run.out
    assert "structures end after slice 3 is a guess" in run.out
    assert "--empty heart_100:Z" in run.out
    found = np.asarray(nib.load(out / "heart_100.nii.gz").dataobj)
    assert np.array_equal(found[..., [1, 3]], labels[..., [1, 3]])
    assert not found[..., 0].any()
    between = np.asarray(truth.dataobj)[..., 2]
    right = (found[..., 2] > 0) & (between > 0)
    assert 2 * right.sum() / ((found[..., 2] > 0).sum() + (between > 0).sum()) > 0.8

    assert_one_error_line(kaf("propagate", *folders, *finished, "-o", out), "heart_100.nii.gz exists")
    assert kaf("propagate", *folders, *finished, "-o", out, "--overwrite").code == 0
    drawn = ("-o", sparse, "--overwrite")
    assert_one_error_line(kaf("propagate", *folders, *finished, *drawn), "holds what was drawn")
    assert_one_error_line(kaf("propagate", *folders, "-o", out), "say which slices are finished")
    scans = tmp_path / "scans"
    shutil.copytree(cohort / "images", scans)
    scan = (scans / "heart_100.nii.gz").read_bytes()
    over = kaf("propagate", "--images", scans, "--labels", sparse, *finished, "-o", scans, "--overwrite")
    assert_one_error_line(over, "heart_100.nii.gz is an input and would be overwritten")
    assert (scans / "heart_100.nii.gz").read_bytes() == scan
    nothing = ("--empty", "heart_100:0", "-o", tmp_path / "other")
    assert_one_error_line(kaf("propagate", *folders, *nothing), "no class is painted")


def test_segment_keeps_finished_slices_and_follows_them(
    kaf: Kaf, cohort: Path, models: Path, tmp_path: Path
) -> None:
    model = ("--model", models / "model.safetensors")
    labels = ("--labels", cohort / "labels")
    out = tmp_path / "out"
    run = kaf("segment", cohort / "images", *model, *labels, "--slices", "heart_100:1,3", "-o", out)
    assert run.code == 0, run.err
    assert "structures end before slice 1 and after slice 3 is a guess" in run.out
    truth, found = (np.asarray(nib.load(f / "heart_100.nii.gz").dataobj) for f in (cohort / "labels", out))
    assert np.array_equal(found[..., [1, 3]], truth[..., [1, 3]])
    assert (found[..., 2] == truth[..., 2])[truth[..., 2] > 0].mean() > 0.6
    assert (out / "heart_101.nii.gz").is_file()

    one = cohort / "images/heart_100.nii.gz"
    file = tmp_path / "one.nii.gz"
    assert kaf("segment", one, *model, *labels, "--slices", "heart_100:1,3", "-o", file).code == 0
    assert np.array_equal(np.asarray(nib.load(file).dataobj), found)
    another = kaf("segment", one, *model, *labels, "--slices", "heart_101:1", "-o", tmp_path / "b.nii.gz")
    assert_one_error_line(another, "slices of heart_101 are named")
    alone = kaf("segment", one, *model, *labels, "-o", tmp_path / "c.nii.gz")
    assert_one_error_line(alone, "--labels needs --slices or --empty")


def test_segment_keeps_empty_slices_also_if_they_are_all_that_is_finished(
    kaf: Kaf, cohort: Path, models: Path, tmp_path: Path
) -> None:
    truth = nib.load(cohort / "labels/heart_100.nii.gz")
    drawn = tmp_path / "drawn"
    drawn.mkdir()

    def draw(value: int) -> None:
        labels = np.zeros(truth.shape, np.uint8)
        labels[:4, :4, 1] = value
        nib.save(nib.Nifti1Image(labels, truth.affine, truth.header), drawn / "heart_100.nii.gz")

    draw(0)
    line = ("segment", cohort / "images", "--model", models / "model.safetensors", "--labels", drawn)
    plain = kaf(*line[:4], "-o", tmp_path / "plain")
    assert plain.code == 0
    assert np.asarray(nib.load(tmp_path / "plain/heart_100.nii.gz").dataobj)[..., 2].any()
    run = kaf(*line, "--empty", "heart_100:1,2", "-o", tmp_path / "out")
    assert run.code == 0, run.err
    assert "the finished slices of heart_100 show no structure: they stay" in run.out
    assert "without label map" not in run.out  # the other volume is segmented, not passed over
    assert not np.asarray(nib.load(tmp_path / "out/heart_100.nii.gz").dataobj)[..., [1, 2]].any()

    draw(9)
    unknown = kaf(*line, "--slices", "heart_100:1", "-o", tmp_path / "other")
    assert_one_error_line(unknown, "slice 1 of heart_100 has label 9, which is not among the classes")
    over = kaf(*line, "--slices", "heart_100:1", "-o", drawn, "--overwrite")
    assert_one_error_line(over, "holds what was drawn")


def test_a_training_says_where_the_file_is_and_how_it_went(cohort: Path, tmp_path: Path, kaf: Kaf) -> None:
    target = tmp_path / "new" / "pretrained.safetensors"
    files = sorted((cohort / "unlabelled/images").iterdir())
    run = kaf(
        "pretrain", *files, "-o", target, "--steps", 3, "--seed", 7, "--preset", "small", *TINY["pretrain"]
    )
    assert (run.code, run.err) == (0, "")
    assert f"wrote {target}: 3 steps" in run.out
    assert {"total", "pcl", "global", "local"} == set(run.losses)
    assert "trained on 10 slices of 2 of 2 volumes" in run.out
    lines = [line for line in run.out.splitlines() if line.startswith("pretraining ")]
    assert lines[0].startswith("pretraining 1/3  total ")
    assert lines[-1].startswith("pretraining 3/3  total ")
    content = json.loads(kaf("info", target, "--json").out)
    assert content["kind"] == "pretrained"
    assert content["history"][0]["settings"]["seed"] == 7
    assert content["history"][0]["losses"]["total"] == pytest.approx(run.losses["total"], abs=1e-4)


def test_info_in_words(cohort: Path, models: Path, kaf: Kaf) -> None:
    run = kaf("info", models / "model.safetensors")
    assert run.code == 0
    for words in (
        "segmentation model",
        "kaf-unet, 4 channels",
        "3 left ventricle",
        "pretraining, ",
        "finetuning, ",
        "in one piece right ventricle, myocardium, left ventricle; smaller pieces are left out when segmenting",
        "together right ventricle, myocardium, left ventricle; what lies apart is left out when segmenting",
    ):
        assert words in " ".join(run.out.split())
    assert "3 labelled slices" in run.out
    run = kaf("info", cohort / "images/heart_100.nii.gz")
    assert "5 of 48 x 64 pixels" in run.out
    assert "8 mm between slices" in run.out
    content = json.loads(kaf("info", cohort / "images/heart_100.nii.gz", "--json").out)
    assert content["shape"] == list(SHAPE)


def test_labelled_slices_mean_what_was_said(cohort: Path, tmp_path: Path, kaf: Kaf) -> None:
    target = tmp_path / "model.safetensors"
    line = ["finetune", *labelled(cohort), "--cases", "heart_100.nii.gz,heart_101", "-o", target]
    line += ["--slices", "heart_100:1-2", "--partial", "heart_101:3", "--network", "unet", "--steps", "2"]
    line += ["--holdout", "0.3", *TINY["finetune"]]
    run = kaf(*line)
    assert (run.code, run.err) == (0, "")
    assert "best Dice on held-out slices" in run.out
    content = json.loads(kaf("info", target, "--json").out)
    assert content["model"]["architecture"] == "unet"
    assert content["history"][0]["labelled_slices"] == [
        "heart_100:1:complete",
        "heart_100:2:complete",
        "heart_101:3:partial",
    ]


def test_without_slices_every_slice_of_a_chosen_case_counts(cohort: Path, tmp_path: Path, kaf: Kaf) -> None:
    target = tmp_path / "model.safetensors"
    classes = "1=RV,2=MYO,3=LV"
    run = kaf(
        *("finetune", *labelled(cohort), "--cases", "heart_101", "-o", target, "--steps", 2),
        *("--classes", classes, *TINY["finetune"]),
    )
    assert run.code == 0
    content = json.loads(kaf("info", target, "--json").out)
    assert len(content["history"][0]["labelled_slices"]) == SHAPE[0]
    assert [label["name"] for label in content["classes"]] == ["background", "RV", "MYO", "LV"]


def test_class_names_come_from_dataset_json_above_the_labels(cohort: Path, tmp_path: Path, kaf: Kaf) -> None:
    labels = tmp_path / "labelsTr"
    labels.mkdir()
    (labels / "heart_100.nii.gz").write_bytes((cohort / "labels/heart_100.nii.gz").read_bytes())
    names = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": names}))
    target = tmp_path / "model.safetensors"
    run = kaf(
        *("finetune", "--images", cohort / "images", "--labels", labels, "-o", target),
        *("--slices", "heart_100:2", "--steps", 1, *TINY["finetune"]),
    )
    assert run.code == 0
    assert "without label map: heart_101" in run.out
    assert [label.name for label in load_model(target).classes] == ["background", "RV", "MYO", "LV"]


def test_what_cannot_be_read_is_named_and_passed_over(
    cohort: Path, models: Path, tmp_path: Path, kaf: Kaf
) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "good.nii.gz").write_bytes((cohort / "images/heart_100.nii.gz").read_bytes())
    (mixed / "broken.nii.gz").write_bytes(b"not a volume")
    run = kaf("pretrain", mixed, "-o", tmp_path / "p.safetensors", "--steps", 1, *TINY["pretrain"])
    assert run.code == 0
    assert "passed over broken.nii.gz" in run.out
    assert "of 1 of 2 volumes" in run.out
    run = kaf("segment", mixed, "--model", models / "model.safetensors", "-o", tmp_path / "out")
    assert run.code == 0
    assert "passed over: " in run.out
    assert "segmented 1 of 2 volumes" in run.out
    assert "1 failed" in run.out


def test_published_weights_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kaf: Kaf) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "model")
    from published_reference import SegmentationReference

    network = SegmentationReference(f=4, num_classes=4, blocks=1, width=16, diffusion=8)
    torch.save({"net": network.state_dict()}, tmp_path / "authors.pth")
    target = tmp_path / "imported.safetensors"
    run = kaf("import", tmp_path / "authors.pth", "-o", target)
    assert (run.code, run.err) == (0, "")
    assert f"wrote {target}: segmentation" in run.out
    run = kaf("info", target)
    assert "kaf-unet, 4 channels" in run.out
    assert "authors.pth" in run.out


# --- settings ----------------------------------------------------------------------------------------------


def test_settings_printed_are_settings_read(tmp_path: Path, kaf: Kaf) -> None:
    for preset in PRESETS:
        file = tmp_path / f"{preset}.yaml"
        file.write_text(kaf("settings", "--preset", preset).out)
        assert choose_settings(config=file).recipe == Recipe.preset(preset)


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("finetune: {batch_size: 3, seed: 3, learning_rate: 0.3}")
    recipe = choose_settings(
        "base",
        file,
        ["finetune.seed=4", "finetune.learning_rate=4e-4", "pretrain.augment.crop=64,96"],
        {"finetune": {"seed": 5, "steps": None}},
    ).recipe
    tuned = recipe.finetune
    assert (tuned.batch_size, tuned.learning_rate, tuned.seed) == (3, 4e-4, 5)
    assert tuned.steps == Recipe.preset("base").finetune.steps
    assert recipe.pretrain.augment.crop == (64, 96)
    assert recipe.pretrain.augment.rotation == Recipe.preset("base").pretrain.augment.rotation


@pytest.mark.parametrize(
    ("given", "architecture", "channels"),
    [
        ({}, "unet", 8),
        ({"assignments": ["model.start_channels=12"]}, "unet", 12),
        ({"assignments": ["model.architecture=unet"]}, "unet", 8),
        ({"preset": "base"}, "kaf-unet", 32),
        ({"assignments": ["model.kaf_levels=[4]"]}, "kaf-unet", 16),
        ({"assignments": ["model.architecture=kaf-unet"]}, "kaf-unet", 16),
        ({"options": {"model": {"architecture": "kaf-unet"}}}, "kaf-unet", 16),
        ({"options": {"model": {"architecture": None}}}, "unet", 8),
    ],
)
def test_what_a_finetuning_without_a_start_takes(given, architecture, channels) -> None:
    chosen = choose_settings(**given)
    expected = chosen.recipe.model.override(architecture=architecture, start_channels=channels)
    assert chosen.fresh_model() == expected


def test_a_gpu_gets_larger_networks_and_batches_unless_told_otherwise() -> None:
    chosen = choose_settings(assignments=["finetune.steps=7"], options={"finetune": {"time_budget": 60.0}})
    there = chosen.on_a_gpu()
    assert there.fresh_model() == chosen.fresh_model().override(start_channels=16)
    assert there.recipe.finetune == chosen.recipe.finetune.override(batch_size=12, early_crop=None)
    assert there.recipe.finetune.steps is None  # the later budget replaces the one before
    assert there.recipe.pretrain == chosen.recipe.pretrain
    told = ["finetune.batch_size=2", "finetune.early_crop=32,32", "model.start_channels=4"]
    stubborn = choose_settings(assignments=told)
    assert stubborn.on_a_gpu().recipe == stubborn.recipe
    assert stubborn.on_a_gpu().fresh_model() == stubborn.fresh_model()
    assert choose_settings("base").on_a_gpu().recipe == choose_settings("base").recipe


def test_none_is_a_word_for_some_settings(kaf: Kaf) -> None:
    assert "largest_component: none" in kaf("settings", "--set", "segment.largest_component=none").out
    assert kaf("settings").out.startswith("# Keep only the lines that you change")


@pytest.mark.parametrize(
    ("given", "budgets"),
    [
        ({"time_budget": 60.0}, (None, None, 60.0)),
        ({"steps": 5}, (5, None, None)),
        ({"steps": 5, "time_budget": 60.0}, (5, None, 60.0)),
        ({}, (None, 50, None)),
    ],
)
def test_a_budget_that_is_given_replaces_those_of_the_preset(
    given: dict[str, float], budgets: tuple[float | None, ...]
) -> None:
    training = choose_settings("paper-chd", options={"pretrain": given}).recipe.pretrain
    assert (training.steps, training.epochs, training.time_budget) == budgets


def test_options_of_finetune_and_evaluate_reach_the_engine(cohort: Path, tmp_path: Path, kaf: Kaf) -> None:
    target, config = tmp_path / "m.safetensors", tmp_path / "settings.yaml"
    config.write_text("finetune: {pseudo_labels: {least_slices: 1}}")
    line = (
        "finetune",
        *labelled(cohort),
        "--slices",
        "heart_100:1,2",
        "--network",
        "unet",
        *TINY["finetune"],
    )
    run = kaf(
        *line, "--unlabelled", cohort / "unlabelled/images", "--config", config, "-o", target, "--steps", 2
    )
    assert run.code == 0, run.err
    assert json.loads(kaf("info", target, "--json").out)["history"][-1]["unlabelled_slices"] == 3 + 2 * 5
    timed = kaf(*line, "-o", tmp_path / "t.safetensors", "--time-budget", "1s")
    assert timed.code == 0, timed.err
    settings = json.loads(kaf("info", tmp_path / "t.safetensors", "--json").out)["history"][-1]["settings"]
    assert (settings["steps"], settings["time_budget"]) == (None, 1.0)

    labels = cohort / "labels"
    run = kaf("evaluate", labels, labels, "--classes", "2=muscle")
    assert "| 2 muscle" in run.out
    assert "| 3 " not in run.out


def test_one_of_several_frames_is_read_along_the_axis_that_was_asked_for(
    cohort: Path, models: Path, tmp_path: Path, kaf: Kaf
) -> None:
    source = nib.load(cohort / "images/heart_100.nii.gz")
    stored = np.asarray(source.dataobj)
    frames = np.stack([stored[..., ::-1], stored], axis=-1)
    nib.save(nib.Nifti1Image(frames, source.affine), tmp_path / "beat.nii.gz")
    line = ("segment", tmp_path / "beat.nii.gz", "--model", models / "model.safetensors", "-o")
    assert_one_error_line(
        kaf(*line, tmp_path / "x.nii.gz"), "holds 2 frames; choose one with --frame 0 to --frame 1"
    )
    assert kaf(*line, tmp_path / "one.nii.gz", "--frame", 1).code == 0
    alone = ("segment", cohort / "images/heart_100.nii.gz", *line[2:])
    assert kaf(*alone, tmp_path / "alone.nii.gz").code == 0
    assert kaf(*alone, tmp_path / "across.nii.gz", "--slice-axis", 0).code == 0
    one, expected, across = (
        np.asarray(nib.load(tmp_path / f"{name}.nii.gz").dataobj) for name in ("one", "alone", "across")
    )
    np.testing.assert_array_equal(one, expected)
    assert across.shape == expected.shape
    assert not np.array_equal(across, expected)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("finetune.learning_rat=1", "nearest: finetune.learning_rate"),
        ("finetun.steps=1", "nearest: finetune"),
        ("finetune.augment.crops=none", "nearest: finetune.augment.crop"),
        ("finetune.steps=-3", "finetune.steps: Input should be greater than 0, got -3"),
        ("finetune.augment=3", "finetune.augment holds settings of its own"),
        ("finetune.steps", "SECTION.FIELD=VALUE"),
        ("model.kaf_levels=[9]", "within 1..4"),
    ],
)
def test_a_wrong_setting_is_named(assignment: str, words: str, kaf: Kaf) -> None:
    assert_one_error_line(kaf("settings", "--set", assignment), words)


@pytest.mark.parametrize(("command", "other"), [("pretrain", "finetune"), ("finetune", "pretrain")])
def test_what_is_set_for_another_command_is_refused(
    command: str, other: str, tmp_path: Path, kaf: Kaf
) -> None:
    inputs = ["nowhere"] if command == "pretrain" else ["--images", "nowhere", "--labels", "nowhere"]
    line = (command, *inputs, "-o", tmp_path / "m.safetensors", "--set")
    run = kaf(*line, f"{other}.steps=5")
    assert_one_error_line(
        run, f"--set {other}.steps=5 would change nothing", f"reads slices, keypoints, model, {command}"
    )
    assert_one_error_line(kaf(*line, f"{command}.step=5"), f"there is no setting {command}.step")
    assert_one_error_line(kaf(*line, "fintune.steps=5"), "there is no section fintune")


def test_a_file_may_hold_the_settings_of_other_commands(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text("pretrain: {steps: 5}\nfinetune: {steps: 7}\n")
    recipe = choose_settings(config=path, reads=("model", "finetune")).recipe
    assert (recipe.pretrain.steps, recipe.finetune.steps) == (5, 7)


def test_wrong_values_of_options_are_named(tmp_path: Path, kaf: Kaf) -> None:
    assert_one_error_line(kaf("settings", "--preset", "smal"), "choose small")
    broken = tmp_path / "broken.yaml"
    broken.write_text("finetune: [")
    assert_one_error_line(kaf("settings", "--config", broken), "broken.yaml is not YAML")
    assert_one_error_line(kaf("settings", "--config", tmp_path / "none.yaml"), "cannot read")


def test_durations_slices_and_classes_are_read() -> None:
    read = [parse_duration(text) for text in ("90s", "10m", "1.5h", "1h30m", "45")]
    assert read == [90, 600, 5400, 5400, 45]
    for wrong in ("", "soon", "-5m", "0", "5 days"):
        with pytest.raises(UserError, match="10m"):
            parse_duration(wrong)
    assert [duration_text(seconds) for seconds in (42, 725, 3723)] == ["0:42", "12:05", "1:02:03"]
    assert parse_slices("a:b:3,5,7-9") == ("a:b", [3, 5, 7, 8, 9])
    for wrong in ("name", "name:", "name:a", ":3", "name:5-3", "name:1,5-3"):
        with pytest.raises(UserError, match=r"slices|range"):
            parse_slices(wrong)
    assert parse_classes("1=RV, 2=MYO") == {1: "RV", 2: "MYO"}
    with pytest.raises(UserError, match="1=RV"):
        parse_classes("RV")


# --- a user's mistakes -------------------------------------------------------------------------------------


def test_mistakes_in_a_pretraining(cohort: Path, tmp_path: Path, kaf: Kaf) -> None:
    target = tmp_path / "p.safetensors"
    empty = tmp_path / "empty"
    empty.mkdir()
    volumes = cohort / "unlabelled/images"
    assert_one_error_line(kaf("pretrain", tmp_path / "nowhere", "-o", target), "no such file or folder")
    assert_one_error_line(kaf("pretrain", empty, "-o", target), "there is no volume in")
    assert_one_error_line(kaf("pretrain", volumes, "-o", tmp_path / "p.pth"), "NAME.safetensors")
    assert_one_error_line(kaf("pretrain", volumes, "-o", target, "--resume"), "nothing to resume")
    assert_one_error_line(kaf("pretrain", volumes, "-o", target, "--device", "tpu"), "unknown device")
    assert_one_error_line(kaf("pretrain", volumes, "-o", target, "--precision", "half"), "float32")
    assert_one_error_line(kaf("pretrain", volumes, "-o", target, "--time-budget", "long"), "10m")
    assert_one_error_line(kaf("pretrain", volumes, "-o", target, "--steps", "many"), "--steps")
    assert_one_error_line(kaf("pretrain", volumes, "-o", target, "--stepz", "3"), "--stepz", "--help")
    assert_one_error_line(kaf("pretrain"), "kaf pretrain --help")
    assert_one_error_line(kaf("pretraim"), "pretrain")
    occupied = tmp_path / "file"
    occupied.write_text("")
    assert_one_error_line(kaf("pretrain", volumes, "-o", occupied / "p.safetensors"), "cannot write to")
    (empty / "a.nii.gz").write_bytes(b"broken")
    assert_one_error_line(kaf("pretrain", empty, "-o", target), "no volume can be used: a.nii.gz")
    assert not target.exists()


def test_mistakes_in_a_finetuning(cohort: Path, models: Path, tmp_path: Path, kaf: Kaf) -> None:
    target = tmp_path / "m.safetensors"

    def wrong(*arguments: object, words: str, data: Sequence[object] = tuple(labelled(cohort))) -> None:
        run = kaf("finetune", *data, "-o", target, "--steps", 1, *arguments)
        assert_one_error_line(run, words)

    wrong("--cases", "heart_9", words="there are: heart_100, heart_101")
    wrong("--slices", "heart_9:1", words="no case 'heart_9'")
    wrong("--slices", "heart_100:77", words="slice 77")
    wrong("--slices", "heart_100", words="patient_01:3,5,7-9")
    wrong("--slices", "heart_100:1", "--empty", "heart_100:1", words="both complete and empty")
    wrong("--empty", "heart_100:2", words="is marked empty but")
    wrong("--cases", "heart_101", "--slices", "heart_100:1", words="--cases leaves it out")
    wrong("--classes", "1=RV,2=MYO", words="has label 3")
    wrong("--classes", "RV", words="1=RV")
    wrong("--network", "vnet", words="model.architecture")
    wrong("--start", tmp_path / "nothing.safetensors", words="no checkpoint at")
    wrong("--holdout", "0.5", "--slices", "heart_100:2", words="at least 2 labelled slices")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"x" * 100)
    wrong("--start", broken, words="broken")
    pretrained = models / "pretrained.safetensors"
    wrong("--start", pretrained, "--set", "model.heads=4", words="another architecture: heads")
    wrong("--start", pretrained, "--set", "slices.spacing=1.0", words="slices.spacing is None")
    nowhere = ("--images", tmp_path / "nowhere", "--labels", cohort / "labels")
    wrong(words="there is no folder", data=nowhere)
    unpaired = ("--images", cohort / "unlabelled/images", "--labels", cohort / "labels")
    wrong(words="pair by file name", data=unpaired)
    assert not target.exists()


def test_labels_that_cannot_be_learnt_from(cohort: Path, tmp_path: Path, kaf: Kaf) -> None:
    image = nib.load(cohort / "labels/heart_100.nii.gz")
    cases = {
        "unpainted": (np.zeros(image.shape, np.uint8), "no class is painted"),
        "smaller": (np.ones((64, 40, 5), np.uint8), "the labels have shape (64, 40, 5)"),
        "broken": (np.full(image.shape, 0.5, np.float32), "not whole numbers"),
    }
    for name, (array, words) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        nib.save(nib.Nifti1Image(array, image.affine), folder / "heart_100.nii.gz")
        run = kaf(
            *("finetune", "--images", cohort / "images", "--labels", folder),
            *("--cases", "heart_100", "-o", tmp_path / "m.safetensors"),
        )
        assert_one_error_line(run, words)


def test_mistakes_in_a_segmentation(cohort: Path, models: Path, tmp_path: Path, kaf: Kaf) -> None:
    model = ("--model", models / "model.safetensors")
    images, out = cohort / "images", tmp_path / "out"
    assert_one_error_line(kaf("segment", tmp_path / "nowhere", *model, "-o", out), "no such file")
    assert_one_error_line(kaf("segment", images, *model, "-o", images), "would be overwritten")
    assert_one_error_line(kaf("segment", images, *model, "-o", tmp_path / "a.nii.gz"), "holds 2 volumes")
    assert_one_error_line(kaf("segment", images, *model, "-o", tmp_path / "a.nrrd"), ".nii.gz")
    pretrained = ("--model", models / "pretrained.safetensors")
    assert_one_error_line(kaf("segment", images, *pretrained, "-o", out), "cannot segment yet")
    assert_one_error_line(kaf("segment", images, "--model", tmp_path / "m.pth", "-o", out), "no checkpoint")
    occupied = tmp_path / "file"
    occupied.write_text("")
    assert_one_error_line(kaf("segment", images, *model, "-o", occupied / "out"), "cannot write to")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_one_error_line(kaf("segment", empty, *model, "-o", out), "there is no volume in")
    array = np.zeros((64, 48, 5), np.float32)
    array[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(array, np.eye(4)), empty / "nan.nii.gz")
    assert_one_error_line(kaf("segment", empty / "nan.nii.gz", *model, "-o", out), "--fill-nan 0")
    assert_one_error_line(
        kaf("segment", empty / "nan.nii.gz", *model, "-o", out, "--fill-nan", "nan"), "finite number, not nan"
    )
    assert kaf("segment", empty / "nan.nii.gz", *model, "-o", out, "--fill-nan", 0).code == 0
    own = ("--set", "slices.spacing=20")
    assert_one_error_line(kaf("segment", images, *model, "-o", out, *own), "the model brings its own")


def test_names_that_are_beside_segmented_volumes_stay(
    cohort: Path, models: Path, tmp_path: Path, kaf: Kaf
) -> None:
    line = ("segment", cohort / "images", "--model", models / "model.safetensors", "-o", tmp_path)
    names = tmp_path / "labels.json"
    names.write_text('{"1": "liver", "2": "spleen"}')
    run = kaf(*line)
    assert run.code == 0
    assert "labels.json is not what the model calls its classes and stays" in run.out
    assert json.loads(names.read_text()) == {"1": "liver", "2": "spleen"}
    assert "and stays" not in kaf(*line, "--overwrite").out
    assert json.loads(names.read_text())["0"] == "background"


def test_volumes_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [tmp_path / patient / "CT" for patient in ("P1", "P2")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "1.dcm").write_bytes(bytes(128) + b"DICM")
    planned = plan_outputs(tmp_path, tmp_path / "out")
    assert [plan.labels.name for plan in planned] == ["P1_CT.nii.gz", "P2_CT.nii.gz"]
    with pytest.MonkeyPatch.context() as inside:
        inside.chdir(folders[0])
        (plan,) = plan_outputs(Path(), Path("../out"))
        assert plan.labels.name == "CT.nii.gz"


def test_images_taken_for_labels_are_noticed(cohort: Path, tmp_path: Path, kaf: Kaf) -> None:
    target = tmp_path / "m.safetensors"
    same = ("--images", cohort / "images", "--labels", cohort / "images")
    assert_one_error_line(kaf("finetune", *same, "-o", target, *TINY["finetune"]), "are the same folder")
    swapped = ("--images", cohort / "labels", "--labels", cohort / "images")
    for path in (cohort / "images").iterdir():
        assert np.unique(nib.load(path).dataobj).size > 257
    assert_one_error_line(
        kaf("finetune", *swapped, "-o", target, *TINY["finetune"]), "as if images were taken for labels"
    )


def test_mistakes_in_evaluate_info_and_import(cohort: Path, tmp_path: Path, kaf: Kaf) -> None:
    labels = cohort / "labels"
    assert_one_error_line(kaf("evaluate", tmp_path / "nowhere", labels), "no file or folder")
    occupied = tmp_path / "file"
    occupied.write_text("")
    assert_one_error_line(kaf("evaluate", labels, labels, "-o", occupied / "s.csv"), "cannot write")
    assert_one_error_line(kaf("info", tmp_path / "nothing.safetensors"), "no checkpoint at")
    assert_one_error_line(kaf("info", tmp_path / "weights.pth"), "no checkpoint at")
    assert_one_error_line(
        kaf("import", tmp_path / "weights.pth", "-o", tmp_path / "w.pth"), "NAME.safetensors"
    )


def test_what_is_unexpected_is_one_line_and_a_traceback_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, kaf: Kaf
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the sky\nfell")

    monkeypatch.setattr("kaf_model.cli.choose_settings", fail)
    run = kaf("settings")
    assert run.code == 1
    assert run.err == "error: unexpected RuntimeError: the sky fell; the same line with --debug shows where\n"
    with pytest.raises(RuntimeError, match="the sky"):
        kaf("settings", "--debug")


def test_a_loss_that_is_not_a_number_ends_with_its_one_line(cohort: Path, tmp_path: Path, kaf: Kaf) -> None:
    target = tmp_path / "m.safetensors"
    run = kaf(
        *(
            "finetune",
            *labelled(cohort),
            "-o",
            target,
            "--slices",
            "heart_100:2",
            "--steps",
            20,
            *TINY["finetune"],
        ),
        *(
            "--set",
            "finetune.learning_rate=1e30",
            "--set",
            "finetune.gradient_clip=none",
            "--network",
            "unet",
        ),
        *("--set", "finetune.optimizer=sgd", *EXACT),
    )
    assert run.code == 1
    assert re.fullmatch(r"error: the .* loss is (nan|inf) at step \d+; .*\n", run.err)


# --- interruption, and many processes ----------------------------------------------------------------------


def test_a_training_replaces_neither_its_start_nor_one_that_waits(
    cohort: Path, models: Path, tmp_path: Path, kaf: Kaf
) -> None:
    start = tmp_path / "start.safetensors"
    shutil.copy(models / "model.safetensors", start)
    line = ("finetune", *labelled(cohort), "--slices", "heart_100:1,2", "--steps", 2, *TINY["finetune"])
    again = kaf(*line, "--start", start, "-o", start)
    assert_one_error_line(again, "is the start and would be overwritten")
    resume_path(start).touch()
    assert_one_error_line(kaf(*line, "-o", start), "is of an interrupted training: go on with --resume")
    anew = kaf("pretrain", cohort / "unlabelled/images", "-o", start, "--steps", 2, *TINY["pretrain"])
    assert_one_error_line(anew, "is of an interrupted training: go on with --resume")
    assert start.read_bytes() == (models / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("command", "number"), [("pretrain", signal.SIGINT), ("finetune", signal.SIGTERM)])
def test_an_interrupted_training_goes_on_to_the_same_result(
    command: str, number: signal.Signals, cohort: Path, tmp_path: Path, kaf: Kaf
) -> None:
    inputs = [str(cohort / "unlabelled/images")]
    if command == "finetune":
        inputs = [*labelled(cohort), "--slices", "heart_100:1,2,3"]
    line = [command, *inputs, "--steps", "60", *TINY[command], *EXACT, "-o"]
    whole = kaf(*line, tmp_path / "whole.safetensors")
    assert whole.code == 0

    target = tmp_path / "interrupted.safetensors"
    process = in_a_process([*line, str(target)])
    assert process.stdout is not None
    seen = ""
    while "total" not in seen:  # the line of the first step
        seen += process.stdout.readline()
        assert process.poll() is None, finish(process, seen)
    process.send_signal(number)
    run = finish(process, seen)
    assert run.code == 130, run
    assert f"interrupted: {target} is usable" in run.out
    assert resume_path(target).is_file()
    stopped = json.loads(kaf("info", target, "--json").out)["history"][-1]
    assert not stopped["complete"]
    assert 1 <= stopped["steps"] < 60
    assert kaf("info", resume_path(target)).code == 0

    command_line = shlex.split(run.out.splitlines()[-1])
    assert command_line[-1] == "--resume"
    resumed = kaf(*command_line[command_line.index(command) :])
    assert resumed.code == 0
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-4)
    assert not resume_path(target).exists()


def test_a_second_signal_aborts_at_once() -> None:
    code = (
        "import time\n"
        "from kaf_model.cli_progress import Output\n"
        "from kaf_model.progress import Progress\n"
        "def work():\n"
        "    yield Progress('waiting', 1, 3)\n"
        "    print('asleep', flush=True)\n"
        "    time.sleep(600)\n"
        "Output().run(work())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert "waiting 1/3" in process.stdout.readline()
    assert "asleep" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said = process.stderr.readline() + process.stderr.readline()  # after what the terminal shows of Ctrl-C
    assert "once more aborts at once" in said
    time.sleep(0.5)  # or it would be taken for the same press
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130


def test_two_processes_train_as_one(cohort: Path, tmp_path: Path, kaf: Kaf) -> None:
    sgd = ("--set", "pretrain.optimizer=sgd")  # Adam makes much of the last digit of a small gradient
    line = [
        "pretrain",
        str(cohort / "unlabelled/images"),
        "--steps",
        "3",
        *TINY["pretrain"],
        *EXACT,
        *sgd,
        "-o",
    ]
    one = kaf(*line, tmp_path / "one.safetensors")
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kaf_model")
    two = finish(in_a_process([*line, str(tmp_path / "two.safetensors")], *launcher))
    assert two.code == 0, two.err
    assert two.losses == pytest.approx(one.losses, abs=1e-3)
    assert two.out.count("wrote ") == 1  # only the first process prints


# --- the program -------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; from kaf_model.cli import main; main(['--help']); "
        "print(sorted({'torch', 'numpy', 'nibabel', 'monai', 'cv2'} & set(sys.modules))); "
        "print(time.process_time())"  # what others do on this machine does not count
    )
    times = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        heavy, seconds = run.stdout.splitlines()[-2:]
        times.append(float(seconds))
    assert heavy == "[]"
    for command in (
        "demo",
        "pretrain",
        "finetune",
        "segment",
        "evaluate",
        "info",
        "import",
        "settings",
        "benchmark",
    ):
        assert f" {command} " in run.stdout
    assert min(times) < 2.0  # 0.4 s on a machine that has nothing else to do


def test_every_command_has_help(kaf: Kaf) -> None:
    for command in (
        "demo",
        "pretrain",
        "finetune",
        "segment",
        "evaluate",
        "info",
        "import",
        "settings",
        "benchmark",
    ):
        run = kaf(command, "--help")
        assert run.code == 0
        assert f"kaf {command}" in run.out
    assert kaf("--version").out.startswith("kaf ")
    bare = kaf()
    assert bare.code == 2
    assert "pretrain" in bare.out


def test_the_engine_needs_no_viewer() -> None:
    code = (
        "import sys, pkgutil, importlib, kaf_model\n"
        "for module in pkgutil.walk_packages(kaf_model.__path__, 'kaf_model.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(sorted({'qtpy', 'napari', 'PyQt6', 'PyQt5', 'PySide6'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert run.stdout == "[]\n", run.stderr
