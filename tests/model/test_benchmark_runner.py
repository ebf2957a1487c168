"""Doing a plan on tiny hearts: what is written, stopped and taken up again, shared, selected, and failed."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from kaf_model.benchmark import runner
from kaf_model.benchmark.costs import costs_of
from kaf_model.benchmark.plan import Plan
from kaf_model.benchmark.records import RunFolder
from kaf_model.benchmark.runner import BenchmarkResult, plan_runs, run_benchmark
from kaf_model.benchmark.scoring import pooled_dice
from kaf_model.checkpoint import CheckpointError, count_parameters, load_checkpoint
from kaf_model.config import ModelConfig
from kaf_model.engine import NonFiniteLoss, make_fabric
from kaf_model.errors import UserError
from kaf_model.keypoints import KeypointCache
from kaf_model.phantom import write_cohort
from kaf_model.progress import Progress
from kaf_model.unet import build_network

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"layout": "pairs"},
    "protocol": {"test": "last 2"},
    "columns": {"patients": [1]},
    "settings": {
        "slices": {"spacing": None},
        "model": {"start_channels": 4, "embedding_width": 8, "heads": 2, "attention_blocks": 1},
        "pretrain": {
            "batch_size": 2,
            "sinkhorn_iterations": 3,
            "projection_width": 8,
            "augment": {"crop": [48, 48]},
        },
        "finetune": {
            "batch_size": 2,
            "augment": {"crop": [48, 48]},
            "learning_rate": 0.01,
            "pseudo_labels": {"least_slices": 1},
        },
    },
    "budgets": {"pretrain": {"steps": 2}, "finetune": {"steps": 4}},
    "rows": [
        {"name": "UNet", "network": "unet", "settings": {"finetune": {"pseudo_labels": {"share": 0}}}},
        {"name": "KAF-SSL", "start": "kaf"},
    ],
}


def tiny(**changes: Any) -> Plan:
    return Plan.model_validate({**TINY, **changes})


@pytest.fixture(scope="module")
def hearts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hearts")
    write_cohort(folder, num_subjects=5, shape=(4, 48, 64), spacing=(10.0, 3.0, 3.0))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> KeypointCache:
    return KeypointCache(tmp_path_factory.mktemp("cache"))


def work(
    plan: Plan, hearts: Path, output: Path, cache: KeypointCache
) -> Generator[Progress, None, BenchmarkResult]:
    fabric = make_fabric("cpu", precision="float32")
    return run_benchmark(plan, hearts, output, fabric=fabric, cache=cache)


def finish(generator: Generator[Progress, None, BenchmarkResult]) -> tuple[BenchmarkResult, list[Progress]]:
    reports = []
    while True:
        try:
            reports.append(next(generator))
        except StopIteration as done:
            return done.value, reports


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run_folders(output: Path) -> dict[str, Path]:
    return {
        str(path.parent.relative_to(output / "runs")): path.parent for path in output.rglob("result.json")
    }


def stop_at(
    generator: Generator[Progress, None, BenchmarkResult], stage: str, step: int, occurrence: int = 1
) -> None:
    """Close the work at the n-th time a stage reports a step."""
    for progress in generator:
        if progress.stage == stage and progress.step == step and (stage == "scoring" or progress.losses):
            occurrence -= 1
            if not occurrence:
                generator.close()
                return
    raise AssertionError(f"{stage} never came to step {step}")


@pytest.fixture(scope="module")
def done(hearts: Path, cache: KeypointCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny benchmark, without interruption."""
    output = tmp_path_factory.mktemp("done")
    result, reports = finish(work(tiny(), hearts, output, cache))
    assert result == BenchmarkResult(2, 0, ())
    assert [(p.step, p.total) for p in reports if p.stage == "runs"] == [(0, 2), (1, 2), (2, 2)]
    return output


def test_a_run_leaves_everything_in_its_folder(done: Path, hearts: Path) -> None:
    folders = run_folders(done)
    assert sorted(folders) == [
        "kaf-ssl/patients-1/fold0-draw0-seed0",
        "unet/patients-1/fold0-draw0-seed0",
    ]
    path = folders["kaf-ssl/patients-1/fold0-draw0-seed0"]
    names = {".lock", "config.yaml", "curve.csv", "model.safetensors", "result.json", "scores.csv"}
    assert {item.name for item in path.iterdir()} == names
    assert [int(line["step"]) for line in read_csv(path / "curve.csv")] == [1, 2, 3, 4]
    scores = RunFolder(path).read_scores()
    assert [(score.case, score.value) for score in scores] == [
        (f"heart_{number:03d}", value) for number in (3, 4) for value in (1, 2, 3)
    ]
    assert all(0 <= score.dice <= 1 for score in scores)
    result = RunFolder(path).read_result()
    config = yaml.safe_load((path / "config.yaml").read_text())
    (trained_on,) = config["train"]
    assert result.labelled == tuple(f"{trained_on}:{z}" for z in range(4))
    assert (result.steps, result.pretraining_steps, result.device) == (4, 2, "cpu")
    checkpoint = load_checkpoint(path / "model.safetensors")
    assert result.parameters == count_parameters(checkpoint.weights)
    assert [record["stage"] for record in checkpoint.history] == ["pretraining", "finetuning"]
    assert checkpoint.history[0]["num_volumes"] == 3  # not the two that are tested
    assert [label.name for label in checkpoint.classes][1:] == [
        "right ventricle",
        "myocardium",
        "left ventricle",
    ]
    assert Plan.model_validate(yaml.safe_load((done / "plan.yaml").read_text())) == tiny()


@pytest.mark.parametrize(
    ("stage", "step", "occurrence"),
    [("finetuning", 2, 1), ("scoring", 1, 1), ("pretraining", 1, 1), ("finetuning", 3, 2), ("scoring", 1, 3)],
)
def test_stopped_anywhere_it_goes_on_to_the_same_result(
    hearts: Path, done: Path, cache: KeypointCache, tmp_path: Path, stage: str, step: int, occurrence: int
) -> None:
    stop_at(work(tiny(), hearts, tmp_path, cache), stage, step, occurrence)
    assert len(run_folders(tmp_path)) < 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    result, reports = finish(work(tiny(), hearts, tmp_path, cache))
    assert result.finished == 2
    assert result.skipped == len(before)
    if stage != "scoring":
        taken_up = next(p for p in reports if p.stage == stage and p.losses)
        assert taken_up.step == step + 1
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    for name, path in run_folders(tmp_path).items():
        assert (path / "scores.csv").read_text() == (done / "runs" / name / "scores.csv").read_text()
        assert (path / "curve.csv").read_text() == (done / "runs" / name / "curve.csv").read_text()
    assert not list(tmp_path.rglob("*.resume.safetensors"))


def test_what_is_finished_is_not_done_again(
    hearts: Path, done: Path, cache: KeypointCache, tmp_path: Path
) -> None:
    shutil.copytree(done, tmp_path / "copy")
    more = [
        *TINY["rows"],
        {"name": "KAF-SSL cleaned", "start": "kaf", "settings": {"segment": {"flips": True}}},
    ]
    result, reports = finish(work(tiny(rows=more), hearts, tmp_path / "copy", cache))
    assert (result.finished, result.skipped) == (3, 2)
    assert not any(progress.stage == "pretraining" for progress in reports)  # shared
    assert len(list((tmp_path / "copy" / "pretraining").iterdir())) == 1
    first = next(progress for progress in reports if progress.stage == "runs")
    assert first.message == "2 of 3 runs were finished before"


def test_other_settings_are_refused_before_anything_is_done(
    hearts: Path, done: Path, cache: KeypointCache
) -> None:
    plan = tiny(budgets={"finetune": {"steps": 5}, "pretrain": {"steps": 2}})
    before = sorted(path.stat().st_mtime_ns for path in done.rglob("*"))
    with pytest.raises(UserError, match=r"settings\.finetune\.steps was 4, now 5"):
        next(work(plan, hearts, done, cache))
    assert sorted(path.stat().st_mtime_ns for path in done.rglob("*")) == before


OTHER = {**TINY["settings"], "finetune": {**TINY["settings"]["finetune"], "holdout": 0.5}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"layout": "pairs", "slice_axis": 0}}, r"rules\.slice_axis was None, now 0"),
        ({"k_slices": {"volumes": 1, "span": "structures"}}, None),  # no column of slices
        (
            {"rows": [TINY["rows"][1], {"name": "new"}], "settings": OTHER},
            r"finetune\.holdout was 0.0, now 0.5",
        ),
    ],
)
def test_other_reading_and_rows_that_are_not_asked_for_count_as_well(
    hearts: Path,
    done: Path,
    cache: KeypointCache,
    tmp_path: Path,
    changes: dict[str, Any],
    words: str | None,
) -> None:
    shutil.copytree(done, tmp_path / "copy")
    plan = tiny(**changes)
    generator = run_benchmark(
        plan, hearts, tmp_path / "copy", only=[plan.rows[-1].name], fabric=make_fabric("cpu"), cache=cache
    )
    if words is None:
        next(generator)
        return
    with pytest.raises(UserError, match=words):
        next(generator)


def test_a_training_that_ended_before_its_curve_was_written_is_not_done_again(
    done: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(done / "runs/unet/patients-1/fold0-draw0-seed0", path)
    (path / "curve.csv").unlink()
    assert RunFolder(path).trained


def test_one_row_alone(hearts: Path) -> None:
    _, runs = plan_runs(tiny(), hearts, ["UNet"])
    assert [run.row for run in runs] == ["UNet"]
    with pytest.raises(UserError, match="there is no row 'VNet'; the rows are: UNet, KAF-SSL"):
        plan_runs(tiny(), hearts, ["VNet"])


THREE_ROWS = [*TINY["rows"], {"name": "PCL", "network": "unet", "start": "pcl"}]


def test_several_processes_take_what_the_others_have_not_begun(
    hearts: Path, cache: KeypointCache, tmp_path: Path
) -> None:
    plan = tiny(rows=THREE_ROWS)
    _, (unet, _, _) = plan_runs(plan, hearts)
    with RunFolder(tmp_path / unet.folder).taken() as free:  # another process is at it
        assert free
        result, reports = finish(work(plan, hearts, tmp_path, cache))
    assert result == BenchmarkResult(2, 0, (), elsewhere=1)
    assert [p.step for p in reports if p.stage == "runs"] == [0, 1, 2]
    assert sorted(run_folders(tmp_path)) == [
        f"{row}/patients-1/fold0-draw0-seed0" for row in ("kaf-ssl", "pcl")
    ]
    assert finish(work(plan, hearts, tmp_path, cache))[0] == BenchmarkResult(3, 2, ())


def test_what_another_process_finishes_meanwhile_is_not_done_again(
    hearts: Path, done: Path, cache: KeypointCache, tmp_path: Path
) -> None:
    benchmark = work(tiny(), hearts, tmp_path, cache)
    next(benchmark)
    shutil.copytree(done / "runs", tmp_path / "runs")
    result, reports = finish(benchmark)
    assert result == BenchmarkResult(2, 0, ())
    assert reports == []


def test_a_pretraining_that_another_process_does_is_waited_for(
    hearts: Path, done: Path, cache: KeypointCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, runs = plan_runs(tiny(rows=THREE_ROWS), hearts)
    theirs = next(run.pretraining.folder for run in runs if run.row == "KAF-SSL" and run.pretraining)
    other = contextlib.ExitStack()
    waits = []

    def until_it_is_done(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            shutil.copytree(done / theirs, tmp_path / theirs, dirs_exist_ok=True)
            other.close()

    monkeypatch.setattr(time, "sleep", until_it_is_done)
    with other:
        assert other.enter_context(RunFolder(tmp_path / theirs).taken())
        result, reports = finish(work(tiny(rows=THREE_ROWS), hearts, tmp_path, cache))
    assert result == BenchmarkResult(3, 0, ())
    assert len(waits) == 3
    told = [progress.message for progress in reports if progress.stage == "runs" and progress.message]
    assert [message.split(":")[0].split(",")[0] for message in told] == [
        "UNet",
        "PCL",  # what can be done is done first
        f"waiting for {theirs.name}",
        "KAF-SSL",
    ]
    before = (done / theirs / "model.safetensors").read_bytes()
    assert (tmp_path / theirs / "model.safetensors").read_bytes() == before


def test_a_stopped_benchmark_lets_others_have_its_run(
    hearts: Path, cache: KeypointCache, tmp_path: Path
) -> None:
    _, runs = plan_runs(tiny(), hearts)
    stop_at(work(tiny(), hearts, tmp_path, cache), "pretraining", 1)
    pretraining = runs[1].pretraining
    assert pretraining is not None
    for folder in (runs[0].folder, runs[1].folder, pretraining.folder):
        with RunFolder(tmp_path / folder).taken() as free:
            assert free


def test_slices_of_one_volume(hearts: Path, cache: KeypointCache, tmp_path: Path) -> None:
    plan = tiny(columns={"slices": [2]}, k_slices={"volumes": 1}, rows=TINY["rows"][:1])
    result, _ = finish(work(plan, hearts, tmp_path, cache))
    assert result.finished == 1
    (path,) = run_folders(tmp_path).values()
    written = json.loads((path / "result.json").read_text())
    (case,) = yaml.safe_load((path / "config.yaml").read_text())["test"]
    assert written["labelled"] == [f"{case}:1", f"{case}:3"]
    assert {score.case for score in RunFolder(path).read_scores()} == {case}
    record = load_checkpoint(path / "model.safetensors").history[-1]
    assert record["labelled_slices"] == [f"{case}:1:complete", f"{case}:3:complete"]
    assert record["unlabelled_slices"] == 0


def test_a_recipe_sees_the_images_of_others_and_no_label_that_it_must_not(
    hearts: Path, done: Path, cache: KeypointCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_folders(done)["kaf-ssl/patients-1/fold0-draw0-seed0"]
    config = yaml.safe_load((path / "config.yaml").read_text())
    assert sorted(config["unlabelled"] + config["train"]) == ["heart_000", "heart_001", "heart_002"]
    assert load_checkpoint(path / "model.safetensors").history[-1]["unlabelled_slices"] == 2 * 4

    given: list[Any] = []
    real = runner.finetune

    def noting(config: ModelConfig | None, cases: Any, *arguments: Any, **options: Any) -> Any:
        given.append((cases, options["unlabelled"]))
        return real(config, cases, *arguments, **options)

    monkeypatch.setattr(runner, "finetune", noting)
    plan = tiny(
        columns={"slices": [1]}, k_slices={"volumes": 1}, rows=[{"name": "recipe", "network": "unet"}]
    )
    finish(work(plan, hearts, tmp_path, cache))
    (((case,), unlabelled),) = given
    assert [z for z in range(4) if case.labels[z].any()] == [2] == list(case.statuses)
    assert unlabelled == ()


@pytest.fixture(scope="module")
def paper(hearts: Path, cache: KeypointCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("paper")
    finish(work(paper_plan(), hearts, output, cache))
    return output


def paper_plan() -> Plan:
    return tiny(protocol={"kind": "paper", "folds": 2}, rows=TINY["rows"][:1], columns={"patients": [1]})


def test_the_paper_keeps_the_epoch_that_is_best_on_the_fold(paper: Path) -> None:
    folders = run_folders(paper)
    assert len(folders) == 2
    for path in folders.values():
        measured = {
            int(line["step"]): float(line["pooled dice"]) for line in read_csv(path / "selection.csv")
        }
        assert list(measured) == [2, 4]  # an epoch is four slices in batches of two
        folder = RunFolder(path)
        assert pooled_dice(folder.read_scores()) == pytest.approx(max(measured.values()))
        assert measured[folder.read_result().selected_step] == max(measured.values())
        assert folder.read_result().steps == 4


@pytest.mark.parametrize(
    ("stage", "step", "occurrence"),
    [("finetuning", 3, 1), ("scoring", 1, 1), ("scoring", 1, 3)],
    ids=["between measurements", "in the first measurement", "in that of the last step"],
)
def test_the_selection_survives_a_stop(
    paper: Path, hearts: Path, cache: KeypointCache, tmp_path: Path, stage: str, step: int, occurrence: int
) -> None:
    stop_at(work(paper_plan(), hearts, tmp_path, cache), stage, step, occurrence)
    finish(work(paper_plan(), hearts, tmp_path, cache))
    for name, path in run_folders(tmp_path).items():
        whole = paper / "runs" / name
        for file in ("selection.csv", "scores.csv", "curve.csv"):
            assert (path / file).read_text() == (whole / file).read_text()
        assert_same_weights(path / "best.safetensors", whole / "best.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = load_checkpoint(first).weights, load_checkpoint(second).weights
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_measurement_that_is_missing_at_the_last_step_is_made_up_for(
    hearts: Path, cache: KeypointCache, tmp_path: Path
) -> None:
    only_last = {"kind": "paper", "folds": 2, "select_every": 100}
    plan = tiny(protocol=only_last, rows=TINY["rows"][:1], columns={"patients": [1]})
    stop_at(work(plan, hearts, tmp_path, cache), "scoring", 1)
    assert finish(work(plan, hearts, tmp_path, cache))[0] == BenchmarkResult(2, 0, ())
    for path in run_folders(tmp_path).values():
        for file in ("result.json", "selection.csv", "best.safetensors"):
            (path / file).unlink()
    assert finish(work(plan, hearts, tmp_path, cache))[0] == BenchmarkResult(2, 0, ())
    for path in run_folders(tmp_path).values():
        assert [line["step"] for line in read_csv(path / "selection.csv")] == ["4"]
        assert_same_weights(path / "best.safetensors", path / "model.safetensors")


def test_a_run_that_fails_does_not_stop_the_others(
    hearts: Path, cache: KeypointCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runner.finetune

    def fails_for_unet(config: ModelConfig | None, *arguments: Any, **options: Any) -> Any:
        if config is not None and config.architecture == "unet":
            raise NonFiniteLoss("the dice loss is nan at step 1")
        return real(config, *arguments, **options)

    monkeypatch.setattr(runner, "finetune", fails_for_unet)
    result, reports = finish(work(tiny(), hearts, tmp_path, cache))
    assert result.finished == 1
    ((name, reason),) = result.failed
    assert name.startswith("UNet, M = 1")
    assert "nan at step 1" in reason
    assert any("failed: the dice loss" in progress.message for progress in reports)
    monkeypatch.undo()
    result, _ = finish(work(tiny(), hearts, tmp_path, cache))
    assert result == BenchmarkResult(2, 1, ())


def test_what_cannot_be_saved_when_it_is_stopped_is_said(
    hearts: Path, cache: KeypointCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise CheckpointError("cannot write: no space left")

    monkeypatch.setattr("kaf_model.finetune.save_checkpoint", full)
    with pytest.raises(CheckpointError, match="no space left"):
        stop_at(work(tiny(), hearts, tmp_path / "b", cache), "finetuning", 2)


def test_a_pretraining_that_fails_is_tried_once(hearts: Path, cache: KeypointCache, tmp_path: Path) -> None:
    weights = {"weight_pcl": 0.0, "weight_global": 0.0, "weight_local": 0.0}
    rows = [
        {"name": "nothing", "start": "kaf", "settings": {"pretrain": weights}},
        {
            "name": "nothing cleaned",
            "start": "kaf",
            "settings": {"pretrain": weights, "segment": {"flips": True}},
        },
    ]
    result, _ = finish(work(tiny(rows=rows), hearts, tmp_path, cache))
    assert result.finished == 0
    assert "nothing to learn" in result.failed[0][1]
    assert result.failed[1][1].startswith("pretraining kaf-")


def test_labels_without_a_name_can_count_as_background(
    hearts: Path, cache: KeypointCache, tmp_path: Path
) -> None:
    data = {"layout": "pairs", "classes": {3: "left ventricle"}}
    result, _ = finish(work(tiny(rows=TINY["rows"][:1], data=data), hearts, tmp_path / "a", cache))
    assert "which is no class" in result.failed[0][1]
    data["other_labels"] = "background"
    result, _ = finish(work(tiny(rows=TINY["rows"][:1], data=data), hearts, tmp_path / "b", cache))
    (path,) = run_folders(tmp_path / "b").values()
    assert {score.value for score in RunFolder(path).read_scores()} == {3}


def test_data_that_is_not_there(hearts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*; give that of the data set with --data"):
        plan_runs(tiny(), tmp_path / "none")
    (hearts_copy := tmp_path / "copy").mkdir()
    shutil.copytree(hearts / "images", hearts_copy / "images")
    shutil.copytree(hearts / "labels", hearts_copy / "labels")
    (hearts_copy / "labels" / "labels.json").unlink()
    with pytest.raises(UserError, match="does not name its classes; name them in the plan"):
        plan_runs(tiny(), hearts_copy)


def test_operations_of_a_convolution_by_hand() -> None:
    class OneConvolution(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = torch.nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, images: torch.Tensor, _keypoints: torch.Tensor) -> torch.Tensor:
            return self.convolution(images)

    costs = costs_of(OneConvolution(), (48, 64))
    assert costs.parameters == 2 * 9 + 2
    assert costs.gigaflops == pytest.approx(2 * 9 * 2 * 48 * 64 / 1e9)


def test_counting_leaves_a_network_as_it_was() -> None:
    network = build_network(
        ModelConfig(architecture="kaf-unet", start_channels=4, embedding_width=8, heads=2)
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    costs = costs_of(network, (48, 64))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    plain = costs_of(build_network(ModelConfig(architecture="unet", start_channels=4)), (48, 64))
    assert costs.gigaflops > plain.gigaflops > 0
    assert np.isfinite(costs.gigaflops)
