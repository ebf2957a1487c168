"""Scoring a trained model on the volumes of a run."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kaf_model.atlases import Atlases
from kaf_model.benchmark.cohort import Case
from kaf_model.benchmark.records import CaseScore
from kaf_model.checkpoint import Model
from kaf_model.config import SegmentConfig
from kaf_model.evaluate import ClassScore, evaluate_volume
from kaf_model.keypoints import KeypointCache
from kaf_model.labels import LabelledVolume
from kaf_model.progress import Progress, retold
from kaf_model.propagation import Propagation, propagate
from kaf_model.segment import segment


def score_cases(
    model: Model,
    cases: Sequence[tuple[Case, LabelledVolume]] | Iterable[tuple[Case, LabelledVolume]],
    classes: Mapping[int, str],
    config: SegmentConfig,
    *,
    total: int,
    atlases: Atlases | None = None,
    cache: KeypointCache,
    without_labelled: bool = False,
) -> Generator[Progress, None, list[CaseScore]]:
    """Segment volumes and compare them with their labels, no slice left out.

    Args:
        model: A trained model.
        cases: Volumes with their labels, perhaps read one by one.
        classes: Classes to score.
        config: How to segment.
        total: Number of cases.
        atlases: Labelled volumes that are registered to each.
        cache: Keypoints found before.
        without_labelled: Score the slices that are not labelled, see `CaseScore`.

    Yields:
        Progress in volumes, at least once a batch of slices.
    """
    scores: list[CaseScore] = []
    for number, (case, truth) in enumerate(cases):
        carried = (yield from _carried(model, truth)) if without_labelled and config.propagation else None
        here = partial(replace, stage="scoring", step=number, total=total)
        brought = None
        if atlases is not None:
            brought = yield from retold(atlases.labels_of(truth.volume), here)
        work = segment(model, truth.volume, config, propagation=carried, atlas_labels=brought, cache=cache)
        predicted = yield from retold(work, here)
        scores += compare(case, predicted.labels, truth, classes, without_labelled=without_labelled)
        yield Progress("scoring", number + 1, total)
    return scores


def _carried(model: Model, truth: LabelledVolume) -> Generator[Progress, None, Propagation | None]:
    """What the labelled slices say of the others, whose own labels are not even there."""
    values = [label.value for label in model.classes]
    return (yield from propagate(truth.without_unlabelled(), values, model.slices))


def compare(
    case: Case,
    predicted: NDArray[np.integer],
    truth: LabelledVolume,
    classes: Mapping[int, str],
    *,
    without_labelled: bool = False,
) -> list[CaseScore]:
    """Score one volume; see `CaseScore` for what `without_labelled` changes."""
    labelled = sorted(truth.statuses) if without_labelled else []
    rest = [z for z in range(truth.volume.num_slices) if z not in labelled]
    completed = predicted.copy()
    completed[labelled] = truth.labels[labelled].astype(predicted.dtype)
    whole = _scores(case, completed, truth.labels, truth, classes)
    of_rest = _scores(case, predicted[rest], truth.labels[rest], truth, classes) if labelled else whole
    return [
        CaseScore(
            case=case.name,
            patient=case.patient,
            value=score.value,
            name=score.name,
            dice=counted.dice,
            volume_dice=score.dice,
            hd95_mm=score.hd95_mm,
            prediction_ml=score.prediction_ml,
            reference_ml=score.reference_ml,
            voxels=round((counted.prediction_ml + counted.reference_ml) / truth.volume.voxel_ml),
        )
        for score, counted in zip(whole, of_rest, strict=True)
    ]


def pooled_dice(scores: Iterable[CaseScore]) -> float:
    """Mean over classes of the Dice over the voxels of all volumes together, the paper's measure.

    Twice the overlap over the sum of both sizes, summed over volumes, is the mean of their Dice weighted by
    that sum.
    """
    overlap: dict[int, float] = {}
    sizes: dict[int, int] = {}
    for score in scores:
        if score.voxels:
            overlap[score.value] = overlap.get(score.value, 0.0) + score.dice * score.voxels
            sizes[score.value] = sizes.get(score.value, 0) + score.voxels
    return float(np.mean([overlap[value] / size for value, size in sizes.items()])) if sizes else float("nan")


def _scores(
    case: Case,
    predicted: NDArray[np.integer],
    reference: NDArray[np.integer],
    truth: LabelledVolume,
    classes: Mapping[int, str],
) -> list[ClassScore]:
    return evaluate_volume(
        predicted,
        reference,
        spacing=truth.volume.spacing,
        voxel_ml=truth.volume.voxel_ml,
        classes=classes,
        volume=case.name,
    )
