"""The main job on a synthetic heart cohort, from files to files: what `kaf demo` runs.

Unlabelled subjects pretrain the encoder of a KAF-UNet. Three labelled slices of one other subject, and the
unlabelled ones by pseudo-labels, then train two models for as long: that one, and the plain UNet with random weights
that `kaf finetune` takes without a start. Both segment subjects that neither has seen, and their Dice scores are set
side by side; the UNet segments the other slices of the labelled subject as well.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from kaf_model.cases import read_cases
from kaf_model.checkpoint import Model
from kaf_model.config import ModelConfig, Recipe
from kaf_model.demo_volume import RestOfVolume, segment_rest
from kaf_model.errors import UserError
from kaf_model.evaluate import Scores, evaluate_folders
from kaf_model.figures import segmentation_contours
from kaf_model.finetune import finetune
from kaf_model.keypoints import KeypointCache
from kaf_model.label_names import class_names
from kaf_model.labels import SliceStatus
from kaf_model.phantom import HEART_CLASSES, write_cohort
from kaf_model.pretrain import pretrain
from kaf_model.progress import Progress, retold
from kaf_model.segment_files import plan_outputs, segment_files, write_class_names
from kaf_model.volume import read_labels, read_volume

Result = TypeVar("Result")

STARTS = {"pretrained": "pretrained KAF-UNet", "fresh": "plain UNet"}
"""What the finetunings start from, and what comes of it."""
PRETRAINING_SHARE = 0.4
"""Part of the time budget; each of the two finetunings has half of the rest."""


@dataclass(frozen=True)
class DemoSize:
    """How much there is of everything.

    Attributes:
        unlabelled: Subjects to pretrain on.
        unseen: Subjects to test on.
        shape: Voxels (Z, Y, X) of a subject.
        spacing: mm (z, y, x).
        labelled_slices: Slices of the one labelled subject that are learnt from.
    """

    unlabelled: int = 12
    unseen: int = 4
    shape: tuple[int, int, int] = (10, 128, 128)
    spacing: tuple[float, float, float] = (8.0, 1.5, 1.5)
    labelled_slices: tuple[int, ...] = (2, 5, 7)


@dataclass(frozen=True)
class DemoResult:
    """What came of it.

    Attributes:
        folder: Where everything is.
        scores: By start, on the unseen subjects.
        steps: Finetuning steps by start.
        pretraining_steps: Steps of the pretraining.
        rest: The other slices of the labelled subject, by the plain UNet.
        figure: Slices of an unseen subject with contours.
        size: How much there was.
    """

    folder: Path
    scores: dict[str, Scores]
    steps: dict[str, int]
    pretraining_steps: int
    rest: RestOfVolume
    figure: Path
    size: DemoSize


def demo_recipe() -> Recipe:
    """Settings that come far in a minute: those of `small` on coarser pixels and in smaller batches."""
    recipe = Recipe.preset("small")
    augment = recipe.finetune.augment.override(crop=(96, 96))
    return Recipe(
        slices=recipe.slices.override(spacing=2.0),
        keypoints=recipe.keypoints,
        model=recipe.model,
        pretrain=recipe.pretrain.override(batch_size=8, augment=augment),
        finetune=recipe.finetune.override(batch_size=4, learning_rate=3e-3, augment=augment, averaging=0.95),
        segment=recipe.segment,
    )


def run_demo(
    output: Path,
    *,
    time_budget: float = 200.0,
    seed: int = 0,
    device: str = "auto",
    size: DemoSize | None = None,
    recipe: Recipe | None = None,
) -> Generator[Progress, None, DemoResult]:
    """Run the main job.

    Args:
        output: Folder to write to; only files of an earlier demo are replaced.
        time_budget: Seconds until both models are trained; segmenting and evaluating come after.
        seed: Of weights and sampling. The cohort is always the same.
        device: "auto", "cpu", "cuda" or "mps".
        size: How much of everything.
        recipe: Settings; by default those of `demo_recipe`.

    Yields:
        Progress of every stage.

    Returns:
        The scores and where the files are.

    Raises:
        UserError: If the folder cannot be written.
    """
    started = time.monotonic()

    def time_left() -> float:
        """What is left of the budget: a slow start shortens the trainings, but not to nothing."""
        return max(time_budget - (time.monotonic() - started), 0.1 * time_budget)

    size, recipe = size or DemoSize(), recipe or demo_recipe()
    cache = KeypointCache()
    unlabelled, labelled, unseen = yield from _write_cohorts(output, size)
    case = labelled[0].name.removesuffix(".nii.gz")

    pretraining = recipe.pretrain.override(
        steps=None, epochs=None, time_budget=PRETRAINING_SHARE * time_left(), seed=seed
    )
    start = output / "pretrained.safetensors"
    pretrained = yield from pretrain(
        recipe.model,
        unlabelled,
        pretraining,
        slices=recipe.slices,
        keypoints=recipe.keypoints,
        output=start,
        device=device,
        cache=cache,
    )

    cases = yield from read_cases(
        output / "labelled" / "images",
        output / "labelled" / "labels",
        names=[case],
        marks={SliceStatus.COMPLETE: [(case, size.labelled_slices)]},
    )
    finetuning = recipe.finetune.override(
        steps=None, epochs=None, time_budget=time_left() / len(STARTS), seed=seed
    )
    fresh = recipe.model.override(architecture=ModelConfig.fresh("small").architecture)
    models: dict[str, Model] = {}
    steps: dict[str, int] = {}
    for name, title in STARTS.items():
        work = finetune(
            None if name == "pretrained" else fresh,
            cases,
            finetuning,
            start=start if name == "pretrained" else None,
            unlabelled=unlabelled,
            class_names=class_names(output / "labelled" / "labels"),
            slices=recipe.slices,
            keypoints=recipe.keypoints,
            output=output / f"{name}-start.safetensors",
            device=device,
            cache=cache,
        )
        finetuned = yield from _named(f"finetuning, {title}", work)
        models[name], steps[name] = finetuned.model, len(finetuned.curve)

    scores: dict[str, Scores] = {}
    for name, model in models.items():
        predictions = _predictions(output, name)
        planned = plan_outputs(output / "unseen" / "images", predictions, overwrite=True)
        planned = [plan for plan in planned if plan.volume in unseen]
        segmenting = segment_files(model, planned, recipe.segment, cache=cache)
        yield from _quietly(f"segmenting, {STARTS[name]}", segmenting)
        write_class_names(predictions, model.classes, overwrite=True)
        scores[name] = yield from _quietly(
            f"evaluating, {STARTS[name]}", evaluate_folders(predictions, output / "unseen" / "labels")
        )
        scores[name].to_csv(output / f"scores-{name}-start.csv")
    rest = yield from _quietly(
        "segmenting the labelled subject",
        segment_rest(
            models["fresh"], cases[0], output / "labelled" / f"{case}-segmented.nii.gz", cache=cache
        ),
    )
    figure = _draw(output, unseen[0], scores)
    return DemoResult(output, scores, steps, len(pretrained.curve), rest, figure, size)


def demo_report(result: DemoResult) -> str:
    """Return the Dice scores of both models side by side, and where the files are."""
    size, folder = result.size, result.folder
    rows = {
        summary.name: [summary.dice, other.dice]
        for summary, other in zip(*(result.scores[name].by_class() for name in STARTS), strict=True)
    }
    means = [result.scores[name].mean_dice for name in STARTS]
    width = max(map(len, rows))
    lines = [
        textwrap.fill(result.rest.report(), 100),
        "",
        f"Dice on {size.unseen} unseen subjects (mean ± standard deviation), each model trained on "
        f"{len(size.labelled_slices)} labelled slices:",
        "",
        f"  {'':{width}}  {STARTS['pretrained']:>19}  {STARTS['fresh']:>16}",
        *(f"  {name:{width}}  {_dice(dice[0]):>19}  {_dice(dice[1]):>16}" for name, dice in rows.items()),
        f"  {'mean':{width}}  {means[0]:>19.3f}  {means[1]:>16.3f}",
        "",
        textwrap.fill(
            f"{_verdict(means[0] - means[1])} {_effort(result)} One cohort and one seed prove little: longer "
            "trainings and other seeds (--time-budget, --seed) can come out otherwise.",
            100,
        ),
        "",
        f"  figure       {result.figure}",
        f"  label maps   {_predictions(folder, 'pretrained')}/ and {_predictions(folder, 'fresh')}/",
        f"               {result.rest.labels}",
        f"  models       {folder / 'pretrained-start.safetensors'}, {folder / 'fresh-start.safetensors'}",
        f"  scores       {folder / 'scores-pretrained-start.csv'}, {folder / 'scores-fresh-start.csv'}",
    ]
    return "\n".join(lines)


def _dice(mean_and_std: tuple[float, float]) -> str:
    mean, std = mean_and_std
    return f"{mean:.3f}" if math.isnan(std) else f"{mean:.3f} ± {std:.3f}"


def _verdict(difference: float) -> str:
    if abs(difference) < 0.005:
        return "Here the two come out the same."
    better = STARTS["pretrained" if difference > 0 else "fresh"]
    return f"Here the {better} is better by {abs(difference):.3f} Dice."


def _effort(result: DemoResult) -> str:
    before = (
        f"after {result.pretraining_steps} of pretraining on {result.size.unlabelled} unlabelled subjects"
    )
    pretrained, fresh = (result.steps[name] for name in STARTS)
    return f"In the same time they were finetuned for {pretrained} steps, {before}, and for {fresh} steps."


def _predictions(folder: Path, start: str) -> Path:
    return folder / f"predictions-{start}-start"


def _write_cohorts(
    output: Path, size: DemoSize
) -> Generator[Progress, None, tuple[list[Path], list[Path], list[Path]]]:
    """Write subjects to pretrain on, to learn labels from, and to test on; all differ."""
    plan = [("unlabelled", 0, size.unlabelled), ("labelled", 100, 1), ("unseen", 200, size.unseen)]
    total, done = sum(count for _, _, count in plan), 0
    written: dict[str, list[Path]] = {}
    for name, first_seed, count in plan:
        written[name] = []
        for seed in range(first_seed, first_seed + count):
            yield Progress("drawing the cohort", done, total)
            try:
                written[name] += write_cohort(
                    output / name,
                    num_subjects=1,
                    first_seed=seed,
                    labelled=name != "unlabelled",
                    shape=size.shape,
                    spacing=size.spacing,
                )
            except OSError as error:
                raise UserError(
                    f"cannot write to {output}: {error.strerror}; choose another place"
                ) from error
            done += 1
    yield Progress("drawing the cohort", done, total)
    return written["unlabelled"], written["labelled"], written["unseen"]


def _named(stage: str, work: Generator[Progress, None, Result]) -> Generator[Progress, None, Result]:
    """Pass progress on under another name of the stage."""
    return (
        yield from retold(
            work, lambda report: replace(report, stage=stage if report.losses else report.stage)
        )
    )


def _quietly(stage: str, work: Generator[Progress, None, Result]) -> Generator[Progress, None, Result]:
    """Pass progress on without its messages."""
    return (yield from retold(work, lambda report: replace(report, stage=stage, message="")))


def _draw(output: Path, image: Path, scores: dict[str, Scores]) -> Path:
    """Draw slices of one unseen subject, from base to apex, as both models see them."""
    volume = read_volume(image)
    reference = read_labels(output / "unseen" / "labels" / image.name, like=volume)
    labelled = np.flatnonzero(reference.any(axis=(1, 2)))
    shown = np.unique(np.linspace(labelled[0], labelled[-1], 5).round().astype(int))
    predictions = {}
    for name, title in STARTS.items():
        labels = read_labels(_predictions(output, name) / image.name, like=volume)
        own = [row.dice for row in scores[name].rows if row.volume == volume.name]
        predictions[f"{title}\nDice {np.nanmean(own):.2f}"] = labels[shown]
    figure = segmentation_contours(
        volume.array[shown],
        reference[shown],
        predictions,
        classes=HEART_CLASSES,
        spacing=volume.spacing[1:],
        slice_names=[f"slice {z}" for z in shown],
        title=f"{volume.name}, a subject that no training has seen",
    )
    path = output / "comparison.png"
    figure.savefig(path, dpi=150)
    return path
