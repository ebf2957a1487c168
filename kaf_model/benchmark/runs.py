"""A plan as single trainings: each cell of its table, repeated over folds, draws and seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kaf_model.benchmark.cohort import Case, Cohort
from kaf_model.benchmark.datasets import LAYOUTS
from kaf_model.benchmark.networks import NETWORKS
from kaf_model.benchmark.patients import choose_patients
from kaf_model.benchmark.plan import Plan, RowPlan, Tree, slug
from kaf_model.benchmark.splits import Split, draw_patients, draw_volumes, splits, trials
from kaf_model.benchmark.starts import STARTS
from kaf_model.config import Recipe
from kaf_model.errors import UserError
from kaf_model.settings_layers import layered_recipe


@dataclass(frozen=True, order=True)
class Column:
    """How much is labelled: M patients, or k slices of one volume."""

    kind: Literal["patients", "slices"]
    count: int

    def __str__(self) -> str:
        return f"{'M' if self.kind == 'patients' else 'k'} = {self.count}"


@dataclass(frozen=True)
class Pretraining:
    """A pretraining; runs that may share it have equal ones.

    Attributes:
        start: How it is pretrained.
        recipe: Settings; of its parts, those of the segmentation do not count.
        cases: Volumes it sees.
        reading: How they are read.
    """

    start: str
    recipe: Recipe
    cases: tuple[Case, ...]
    reading: Mapping[str, Any]

    def config(self) -> dict[str, Any]:
        """What it is determined by, ready for YAML."""
        parts = ("slices", "keypoints", "model", "pretrain")
        pretext = STARTS[self.start].pretext
        assert pretext is not None
        return {
            "start": self.start,
            "pretext": dict(pretext.settings()),
            "settings": {part: getattr(self.recipe, part).model_dump(mode="json") for part in parts},
            "volumes": [case.name for case in self.cases],
            "reading": dict(self.reading),
        }

    @property
    def folder(self) -> Path:
        """Its folder below that of the benchmark."""
        text = json.dumps(self.config(), sort_keys=True)
        return Path("pretraining") / f"{slug(self.start)}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Run:
    """A finetuning and its scores.

    Attributes:
        row: Method.
        column: How much is labelled.
        fold: Which split.
        draw: Which draw of patients, or which volume of which slices are labelled.
        seed: Of weights and sampling.
        train: Volumes that are labelled.
        test: Volumes that are scored.
        unlabelled: Volumes whose images are learnt from as well.
        recipe: Settings.
        pretraining: Where it starts; None is random weights.
        rules: What else of the plan decides its scores.
    """

    row: str
    column: Column
    fold: int
    draw: int
    seed: int
    train: tuple[Case, ...]
    test: tuple[Case, ...]
    unlabelled: tuple[Case, ...]
    recipe: Recipe
    pretraining: Pretraining | None
    rules: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Its folder below that of the benchmark."""
        column = f"{self.column.kind}-{self.column.count}"
        return Path("runs") / slug(self.row) / column / f"fold{self.fold}-draw{self.draw}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.row}, {self.column}, fold {self.fold}, draw {self.draw}, seed {self.seed}"

    def config(self) -> dict[str, Any]:
        """What it is determined by, ready for YAML."""
        parts = ("slices", "keypoints", "model", "finetune", "segment")
        return {
            "row": self.row,
            "column": {"kind": self.column.kind, "count": self.column.count},
            "fold": self.fold,
            "draw": self.draw,
            "seed": self.seed,
            "train": [case.name for case in self.train],
            "test": [case.name for case in self.test],
            "unlabelled": [case.name for case in self.unlabelled],
            "pretraining": None if self.pretraining is None else self.pretraining.folder.name,
            "settings": {part: getattr(self.recipe, part).model_dump(mode="json") for part in parts},
            "rules": dict(self.rules),
        }


def read_cohort(plan: Plan, folder: Path) -> Cohort:
    """Find the volumes of a plan's data set.

    Raises:
        UserError: If the folder does not have the layout, or its classes have no names.
    """
    if not folder.is_dir() and plan.data.layout != "phantom":
        raise UserError(f"there is no folder {folder}; give that of the data set with --data")
    cohort = LAYOUTS[plan.data.layout](folder)
    cohort = cohort.restricted(choose_patients(plan.data.patients, cohort.patients))
    classes = plan.data.classes if plan.data.classes is not None else cohort.classes
    if not classes:
        raise UserError(
            f"{folder} does not name its classes; name them in the plan, data: classes: {{1: ...}}"
        )
    return Cohort(cohort.cases, {value: name for value, name in classes.items() if value != 0})


def all_runs(plan: Plan, cohort: Cohort) -> list[Run]:
    """Every run of a plan: repetition after repetition, so that all rows are compared early.

    Raises:
        UserError: If settings or numbers of patients do not fit.
    """
    recipes = {row.name: row_recipe(plan, row) for row in plan.rows}
    runs: list[Run] = []
    for split in splits(cohort, plan.protocol):
        for column in columns(plan):
            for draw, seed, train, test in _repetitions(plan, cohort, split, column):
                for row in plan.rows:
                    recipe = _seeded(recipes[row.name], seed, plan.pretraining_seed)
                    learns = STARTS[row.start].pretext is not None
                    start = (
                        Pretraining(row.start, recipe, split.pretraining, plan.data.reading)
                        if learns
                        else None
                    )
                    others = _unlabelled(plan, split, column, train, recipe)
                    runs.append(
                        Run(
                            *(row.name, column, split.fold, draw, seed, train, test, others, recipe, start),
                            _rules(plan, cohort, column),
                        )
                    )
    return sorted(runs, key=lambda run: (run.fold, run.draw, run.seed))


def _rules(plan: Plan, cohort: Cohort, column: Column) -> dict[str, Any]:
    """What decides the scores of a column beside settings and volumes."""
    protocol = plan.protocol
    return {
        **plan.data.reading,
        "classes": sorted(cohort.classes),
        "other_labels": plan.data.other_labels,
        "protocol": protocol.kind,
        "select_every": protocol.select_every if protocol.kind == "paper" else None,
        "span": plan.k_slices.span if column.kind == "slices" else None,
    }


def columns(plan: Plan) -> list[Column]:
    """The columns of a plan's table."""
    listed = [Column("patients", count) for count in plan.columns.patients]
    return listed + [Column("slices", count) for count in plan.columns.slices]


def row_recipe(plan: Plan, row: RowPlan) -> Recipe:
    """All settings of a row: those of the plan, of its recipes, its network, its own, and its start, in this order.

    Raises:
        UserError: If they do not fit, naming the row.
    """
    for what, name, known in (("start", row.start, STARTS), ("network", row.network, NETWORKS)):
        if name not in known:
            raise UserError(f"row {row.name!r}: unknown {what} {name!r}; choose one of {', '.join(known)}")
    layers: list[Tree] = [plan.settings, plan.budgets.layer, *(plan.recipes[name] for name in row.recipes)]
    own: list[Tree] = [row.settings, row.budgets.layer, {"pretrain": dict(STARTS[row.start].overrides)}]
    try:
        sized = NETWORKS[row.network].configure(layered_recipe(plan.preset, layers).model)
        network = {"architecture": sized.architecture, "start_channels": sized.start_channels}
        return layered_recipe(plan.preset, [*layers, {"model": network}, *own])
    except UserError as error:
        raise UserError(f"row {row.name!r}: {error}") from error


def _repetitions(
    plan: Plan, cohort: Cohort, split: Split, column: Column
) -> list[tuple[int, int, tuple[Case, ...], tuple[Case, ...]]]:
    """Draw, seed, labelled volumes and scored volumes of each repetition of a cell."""
    if column.kind == "slices":
        volumes = draw_volumes(cohort, split, plan.k_slices)
        return [
            (trial.draw, trial.seed, (volumes[trial.draw],), (volumes[trial.draw],))
            for trial in trials(len(volumes), plan.protocol)
        ]
    repetitions = []
    test = cohort.labelled(split.test)
    for trial in trials(plan.protocol.num_draws, plan.protocol):
        drawn = draw_patients(split, trial.draw, plan.protocol)
        if column.count > len(drawn):
            raise UserError(f"{column} patients are to be labelled, but draw {trial.draw} has {len(drawn)}")
        repetitions.append((trial.draw, trial.seed, cohort.labelled(drawn[: column.count]), test))
    return repetitions


def _unlabelled(
    plan: Plan, split: Split, column: Column, train: tuple[Case, ...], recipe: Recipe
) -> tuple[Case, ...]:
    """The volumes that a recipe with pseudo-labels may look at: those of the pretraining, as far as not labelled."""
    if not recipe.finetune.pseudo_labels.share:
        return ()
    if column.kind == "slices" and plan.k_slices.unlabelled == "own":
        return ()
    return tuple(case for case in split.pretraining if case not in train)


def _seeded(recipe: Recipe, seed: int, pretraining_seed: int | None) -> Recipe:
    pretrain = recipe.pretrain.override(seed=seed if pretraining_seed is None else pretraining_seed)
    finetune = recipe.finetune.override(seed=seed)
    return recipe.model_copy(update={"pretrain": pretrain, "finetune": finetune})
