"""Keeping the weights that are best on the tested fold, as the paper does: they are chosen on what they report."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Generator, Mapping

from kaf_model.benchmark.records import CaseScore, RunFolder
from kaf_model.benchmark.scoring import pooled_dice
from kaf_model.checkpoint import Model
from kaf_model.finetune import FinetuneResult
from kaf_model.progress import Progress

MEASUREMENTS = "selection.csv"

Scoring = Callable[[Model], Generator[Progress, None, list[CaseScore]]]


def steps_between(epochs: float, num_slices: int, batch_size: int) -> int:
    """Steps of some epochs over a number of labelled slices, at least one."""
    return max(1, math.ceil(epochs * num_slices / batch_size))


def keeping_best(
    work: Generator[Progress, None, FinetuneResult], folder: RunFolder, every: int, score: Scoring
) -> Generator[Progress, None, FinetuneResult]:
    """Pass a finetuning on, and keep the weights of the highest pooled Dice in the folder.

    Args:
        work: The finetuning.
        folder: Where the best weights and all measurements go; those of an interrupted training count on.
        every: Steps between measurements; the last step is measured too.
        score: Scores a model on the tested fold.
    """
    measured = read_measurements(folder)
    try:
        while True:
            try:
                progress = next(work)
            except StopIteration as done:
                result: FinetuneResult = done.value
                return result
            last = progress.step == progress.total
            if progress.losses and progress.preview is not None and (progress.step % every == 0 or last):
                model = progress.preview()
                dice = pooled_dice((yield from score(model)))
                if dice > max(measured.values(), default=-1.0):
                    model.save(folder.best)
                measured[progress.step] = dice
                rows = [{"step": step, "pooled dice": value} for step, value in sorted(measured.items())]
                folder.write_curve(rows, MEASUREMENTS)
            yield progress
    finally:
        work.close()


def read_measurements(folder: RunFolder) -> dict[int, float]:
    """Pooled Dice by step, of the measurements so far."""
    path = folder.path / MEASUREMENTS
    if not path.is_file() or not folder.best.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {int(line["step"]): float(line["pooled dice"]) for line in csv.DictReader(file)}


def best_step(measured: Mapping[int, float]) -> int:
    """The first step of the highest Dice."""
    return max(sorted(measured), key=lambda step: measured[step])
