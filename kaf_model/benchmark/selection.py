"""Keeping the weights that are best on the tested fold, as the paper does: they are chosen on what they report."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import torch

from kaf_model.benchmark.records import CaseScore, RunFolder
from kaf_model.benchmark.scoring import pooled_dice
from kaf_model.checkpoint import Model, load_header, load_model
from kaf_model.finetune import FinetuneResult
from kaf_model.progress import Progress

MEASUREMENTS = "selection.csv"

Scoring = Callable[[Model], Generator[Progress, None, list[CaseScore]]]


def steps_between(epochs: float, num_slices: int, batch_size: int) -> int:
    """Steps of some epochs over a number of labelled slices, at least one."""
    return max(1, math.ceil(epochs * num_slices / batch_size))


@dataclass(frozen=True)
class Selection:
    """Measures the weights of a run on the tested fold and keeps those of the highest pooled Dice.

    Attributes:
        folder: Where the best weights and all measurements go.
        every: Steps between measurements; the last step is measured too.
        score: Scores a model on the tested fold.
        device: Where saved weights are measured.
    """

    folder: RunFolder
    every: int
    score: Scoring
    device: torch.device

    def measure_saved(self) -> Generator[Progress, None, None]:
        """Measure the saved weights if they are due: a training that is stopped while it is measured saves them."""
        if not self.folder.weights.is_file():
            return
        record = load_header(self.folder.weights)["history"][-1]
        step = record["steps"]
        if self._is_due(step, record["complete"]) and step not in read_measurements(self.folder):
            yield from self._measure(load_model(self.folder.weights, device=self.device), step)

    def keeping_best(
        self, work: Generator[Progress, None, FinetuneResult]
    ) -> Generator[Progress, None, FinetuneResult]:
        """Pass a finetuning on, measuring on the way; measurements of an interrupted training count on."""
        try:
            while True:
                try:
                    progress = next(work)
                except StopIteration as done:
                    result: FinetuneResult = done.value
                    return result
                due = self._is_due(progress.step, progress.step == progress.total)
                if due and progress.losses and progress.preview is not None:
                    yield from self._measure(progress.preview(), progress.step)
                yield progress
        finally:
            work.close()

    def _is_due(self, step: int, last: bool) -> bool:
        return last or step % self.every == 0

    def _measure(self, model: Model, step: int) -> Generator[Progress, None, None]:
        measured = read_measurements(self.folder)
        dice = pooled_dice((yield from self.score(model)))
        if dice > max(measured.values(), default=-1.0):
            model.save(self.folder.best)
        measured[step] = dice
        rows = [{"step": step, "pooled dice": value} for step, value in sorted(measured.items())]
        self.folder.write_curve(rows, MEASUREMENTS)


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
