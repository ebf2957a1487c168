"""The demo on a very small cohort: every stage, every file."""

import re
from pathlib import Path

import pytest
import torch

from kaf_model.cli import main
from kaf_model.config import AugmentConfig, Recipe
from kaf_model.demo import DemoSize, demo_recipe, demo_report, run_demo

SIZE = DemoSize(unlabelled=2, unseen=2, shape=(5, 48, 64), spacing=(8.0, 3.0, 3.0), labelled_slices=(1, 2, 3))


@pytest.fixture(autouse=True)
def _quick(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("KAF_CACHE", str(tmp_path_factory.getbasetemp() / "keypoints"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_recipe() -> Recipe:
    recipe = demo_recipe()
    augment = AugmentConfig(crop=(48, 48))
    return Recipe(
        slices=recipe.slices.override(spacing=None),
        model=recipe.model.override(start_channels=4, embedding_width=8, heads=2, attention_blocks=1),
        pretrain=recipe.pretrain.override(
            batch_size=2, sinkhorn_iterations=5, projection_width=16, augment=augment
        ),
        finetune=recipe.finetune.override(batch_size=2, augment=augment),
    )


def finish(work):
    stages = []
    while True:
        try:
            progress = next(work)
        except StopIteration as done:
            return done.value, list(dict.fromkeys(stages))
        stages.append(progress.stage)


def test_the_demo_leaves_models_label_maps_scores_and_a_figure(tmp_path: Path) -> None:
    (tmp_path / "unseen/images").mkdir(parents=True)
    theirs = tmp_path / "unseen/images/note.txt"
    theirs.write_text("not ours")
    for _ in range(2):  # the second time into the same folder
        result, stages = finish(
            run_demo(tmp_path, time_budget=3, size=SIZE, recipe=tiny_recipe(), device="cpu")
        )
    sometimes = "labelling other slices"  # a very short training may leave it out
    assert [stage for stage in stages if stage != sometimes] == [
        "drawing the cohort",
        "preparing",
        "pretraining",
        "reading",
        "following labels from slice to slice",
        "finetuning",
        "finetuning, pretrained KAF-UNet",
        "finetuning, plain UNet",
        "segmenting, pretrained KAF-UNet",
        "evaluating, pretrained KAF-UNet",
        "segmenting, plain UNet",
        "evaluating, plain UNet",
        "segmenting the labelled subject",
    ]
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names >= {
        "unlabelled/images/heart_001.nii.gz",
        "labelled/labels/heart_100.nii.gz",
        "unseen/labels/heart_201.nii.gz",
        "pretrained.safetensors",
        "pretrained-start.safetensors",
        "fresh-start.safetensors",
        "predictions-pretrained-start/heart_200.nii.gz",
        "predictions-fresh-start/heart_201.nii.gz",
        "predictions-fresh-start/labels.json",
        "scores-fresh-start.csv",
        "labelled/heart_100-segmented.nii.gz",
        "comparison.png",
    }
    assert theirs.read_text() == "not ours"
    assert not any("unlabelled/labels" in name or "resume" in name for name in names)
    assert result.figure.stat().st_size > 10_000
    assert min(result.steps.values()) >= 1

    rest = result.rest
    assert rest.num_slices == 2
    assert all(0 <= dice <= 1 for dice in (rest.propagated, rest.network, rest.joined))
    assert rest.propagated > 0.2  # base and apex, beside finished slices
    assert rest.joined > rest.network  # which has hardly learnt anything
    report = demo_report(result)
    assert f"{rest.joined:.3f} joined" in report
    for name in ("right ventricle", "myocardium", "left ventricle", "mean"):
        assert re.search(rf"{name} +\d\.\d\d\d( ± \d\.\d\d\d)? +\d\.\d\d\d", report)
    means = [result.scores[name].mean_dice for name in ("pretrained", "fresh")]
    if abs(means[0] - means[1]) >= 0.005:
        better = "pretrained KAF-UNet" if means[0] > means[1] else "plain UNet"
        assert f"the {better} is better by" in report


def test_both_models_learn_from_the_same_three_slices_for_as_long(tmp_path: Path) -> None:
    finish(run_demo(tmp_path, time_budget=1, size=SIZE, recipe=tiny_recipe(), device="cpu"))
    from kaf_model.checkpoint import load_checkpoint

    pretrained, fresh = (
        load_checkpoint(tmp_path / f"{name}-start.safetensors") for name in ("pretrained", "fresh")
    )
    assert [record["stage"] for record in pretrained.history] == ["pretraining", "finetuning"]
    assert [record["stage"] for record in fresh.history] == ["finetuning"]
    ours, theirs = pretrained.history[-1], fresh.history[-1]
    assert theirs["settings"].pop("early_crop") is not None  # not for a network that reads keypoints
    assert ours["settings"].pop("early_crop") is None
    assert ours["settings"] == theirs["settings"]
    assert ours["labelled_slices"] == theirs["labelled_slices"]
    assert len(ours["labelled_slices"]) == 3
    assert fresh.model == pretrained.model.override(architecture="unet")


def test_a_demo_that_cannot_write_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output", str(tmp_path / "file" / "demo")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write to")
    assert error.count("\n") == 1
    assert main(["demo", "--output", str(tmp_path), "--time-budget", "soon"]) == 2
