"""What the folders of a benchmark hold, gathered into the cells of its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from kaf_model.benchmark.plan import Plan
from kaf_model.benchmark.records import CaseScore, RunFolder, RunResult
from kaf_model.benchmark.runs import Column, columns
from kaf_model.benchmark.splits import trials
from kaf_model.benchmark.statistics import (
    Comparison,
    Pair,
    Spread,
    class_dice,
    compare_paired,
    dice_by_volume,
    mean_dice,
    trial_dice,
)
from kaf_model.errors import UserError
from kaf_model.settings_layers import validated

Repetition = tuple[int, int, int]
"""Fold, draw and seed."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that has its result."""

    row: str
    column: Column
    fold: int
    draw: int
    seed: int
    scores: tuple[CaseScore, ...]
    result: RunResult

    @property
    def repetition(self) -> Repetition:
        """Which repetition of its cell it is."""
        return self.fold, self.draw, self.seed

    def dice(self) -> dict[Pair, float]:
        """Mean Dice of each volume, by what pairs it with those of other rows."""
        return {
            (case, self.fold, self.draw, self.seed): dice
            for case, dice in dice_by_volume(self.scores).items()
        }


@dataclass(frozen=True)
class Cell:
    """A method with so much labelled.

    Attributes:
        row: Method.
        column: How much is labelled.
        dice: Over the repetitions.
        volume_dice: With k labelled slices, of the whole volumes, these taken as labelled; else per-volume Dice.
        classes: Mean Dice by class name.
        comparison: The reference row against this one; None for the reference itself.
        runs: The repetitions.
    """

    row: str
    column: Column
    dice: Spread
    volume_dice: Spread
    classes: dict[str, float]
    comparison: Comparison | None
    runs: tuple[FinishedRun, ...]

    def mean(self, field: str) -> float:
        """Mean over the runs of a number of `RunResult`."""
        return Spread.of(float(getattr(run.result, field)) for run in self.runs).mean


@dataclass(frozen=True)
class Results:
    """A benchmark's table.

    Attributes:
        plan: What was to be done.
        cells: By row and column; those without any finished run are missing.
    """

    plan: Plan
    cells: dict[tuple[str, Column], Cell]

    @property
    def rows(self) -> list[str]:
        """Rows that have a cell, in the order of the plan."""
        return [row.name for row in self.plan.rows if any(name == row.name for name, _ in self.cells)]

    @property
    def columns(self) -> list[Column]:
        """Columns that have a cell, in the order of the plan."""
        return [column for column in columns(self.plan) if any(other == column for _, other in self.cells)]

    @property
    def planned_columns(self) -> list[Column]:
        """All columns of the plan."""
        return columns(self.plan)

    def num_done(self, row: str, column: Column) -> int:
        """Finished repetitions of a row and column."""
        cell = self.cells.get((row, column))
        return len(cell.runs) if cell is not None else 0

    def num_planned(self, column: Column) -> int:
        """Repetitions of each row of a column by the plan; the most, where it leaves that to the data."""
        most = max(_possible_draws(self.plan, column))
        return _num_folds(self.plan) * len(trials(most, self.plan.protocol))

    def unfinished_rows(self) -> list[str]:
        """Rows of the plan with fewer repetitions than planned in some column."""
        return [
            row.name
            for row in self.plan.rows
            if any(
                self.num_done(row.name, column) < self.num_planned(column) for column in self.planned_columns
            )
        ]


def possible_repetitions(plan: Plan, column: Column) -> set[Repetition]:
    """The repetitions that a plan has for a column, whatever the data."""
    return {
        (fold, trial.draw, trial.seed)
        for fold in range(_num_folds(plan))
        for num_draws in _possible_draws(plan, column)
        for trial in trials(num_draws, plan.protocol)
    }


def _possible_draws(plan: Plan, column: Column) -> Sequence[int]:
    """How many draws a column may have: a number of volumes is cut short if fewer patients are tested."""
    if column.kind == "patients":
        return (plan.protocol.num_draws,)
    volumes = plan.k_slices.volumes
    return range(1, volumes + 1) if isinstance(volumes, int) else (len(volumes),)


def _num_folds(plan: Plan) -> int:
    return plan.protocol.folds or 1


def read_results(output: Path, reference: str | None = None) -> Results:
    """Gather the finished runs of a benchmark, but those that its plan does not have.

    Args:
        output: Its folder.
        reference: Row that the others are tested against; None takes the plan's.

    Raises:
        UserError: If there is no benchmark, no such row, or nothing is finished.
    """
    path = output / "plan.yaml"
    if not path.is_file():
        raise UserError(f"{output} holds no benchmark: there is no plan.yaml; run kaf benchmark run first")
    plan = validated(Plan, yaml.safe_load(path.read_text(encoding="utf-8")))
    rows = [row.name for row in plan.rows]
    if reference is not None and reference not in rows:
        raise UserError(f"there is no row {reference!r}; the rows are: {', '.join(rows)}")
    planned = {column: possible_repetitions(plan, column) for column in columns(plan)}
    runs = [
        run for run in _finished(output) if run.row in rows and run.repetition in planned.get(run.column, ())
    ]
    if not runs:
        raise UserError(f"no run in {output} is finished yet")
    chosen = plan.reference_row if reference is None else reference
    cells = {
        (row, column): _cell(plan, row, column, runs, chosen)
        for row in rows
        for column in columns(plan)
        if any((run.row, run.column) == (row, column) for run in runs)
    }
    return Results(plan.override(reference=chosen), cells)


def _cell(plan: Plan, row: str, column: Column, runs: Sequence[FinishedRun], reference: str) -> Cell:
    own = [run for run in runs if (run.row, run.column) == (row, column)]
    against = [run for run in runs if (run.row, run.column) == (reference, column)]
    scores = [score for run in own for score in run.scores]
    comparison = None
    if row != reference:
        comparison = compare_paired(_paired(against), _paired(own))
    ddof = 0 if plan.protocol.kind == "paper" else 1  # its Table 9 divides by the number of folds
    dice = Spread.of((trial_dice(run.scores, plan.protocol.kind) for run in own), ddof=ddof)
    volume_dice = Spread.of((mean_dice(run.scores, "volume_dice") for run in own), ddof=ddof)
    return Cell(row, column, dice, volume_dice, class_dice(scores), comparison, tuple(own))


def _paired(runs: Sequence[FinishedRun]) -> dict[Pair, float]:
    return {pair: dice for run in runs for pair, dice in run.dice().items()}


def _finished(output: Path) -> list[FinishedRun]:
    found = []
    for path in sorted((output / "runs").glob("*/*/*/result.json")):
        folder = RunFolder(path.parent)
        config = yaml.safe_load((path.parent / "config.yaml").read_text(encoding="utf-8"))
        found.append(
            FinishedRun(
                config["row"],
                Column(**config["column"]),
                config["fold"],
                config["draw"],
                config["seed"],
                tuple(folder.read_scores()),
                folder.read_result(),
            )
        )
    return found
