"""A benchmark as a YAML file: what is compared, on what, how often, and with which budgets.

A plan may `extends: NAME` one that comes with the package; each of its keys replaces that one's as a whole.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from kaf_model.config import Settings
from kaf_model.errors import UserError
from kaf_model.presets import PresetName
from kaf_model.settings_layers import validated

Layout = Literal["acdc", "pairs", "imagechd", "synapse", "decathlon", "phantom"]
Tree = dict[str, Any]
"""Settings by section, as in the file of `kaf settings`."""

SHIPPED = resources.files("kaf_model.benchmark") / "plans"


class DataPlan(Settings):
    """Which volumes there are."""

    layout: Layout = Field(description="How the folder of the data set is laid out.")
    patients: str = Field("all", description="Patients that take part at all.")
    classes: dict[int, str] | None = Field(
        None, description="Names of the label values; none takes those of the data set."
    )
    other_labels: Literal["error", "background"] = Field(
        "error", description="What label values that are not among the classes count as."
    )
    frame: int | None = Field(None, ge=0, description="Which volume of 4-D files.")
    slice_axis: int | None = Field(None, ge=0, le=2, description="Stored axis to slice along.")
    fill_nan: float | None = Field(None, description="Value for voxels that are NaN or infinite.")

    @property
    def reading(self) -> dict[str, Any]:
        """Keywords for `read_volume`."""
        return {"frame": self.frame, "slice_axis": self.slice_axis, "fill_nan": self.fill_nan}


class ProtocolPlan(Settings):
    """Who is tested, who is learnt from, how often, and which weights count."""

    kind: Literal["strict", "paper"] = Field(
        "strict",
        description="strict: last step, per-volume Dice, tested patients kept out of pretraining. paper: best "
        "epoch on the tested fold, pooled Dice, pretraining on all patients.",
    )
    test: str | None = Field(None, description="Patients that are tested, and nothing else is done with.")
    pool: str | None = Field(
        None,
        description="Patients whose labels may be learnt from; none takes all that are not tested.",
    )
    folds: int | None = Field(
        None, ge=2, description="Instead of `test`: as many folds over all patients, each tested once."
    )
    draws: int | tuple[tuple[str, ...], ...] = Field(
        1,
        description="How many draws of labelled patients, or the draws themselves; the first M of a draw count.",
    )
    seeds: tuple[int, ...] = Field(
        (0,), min_length=1, description="Seeds of weights, sampling and pretraining."
    )
    combine: Literal["zip", "all"] = Field(
        "zip", description="zip: each draw with the next seed in turn. all: every draw with every seed."
    )
    select_every: float = Field(
        1.0, gt=0, description="paper: epochs between looks at the tested fold for the best weights."
    )

    @field_validator("draws", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Let numbers name patients."""
        return [[str(patient) for patient in draw] for draw in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _who_is_tested(self) -> Self:
        if (self.test is None) == (self.folds is None):
            raise ValueError(
                "a protocol tests either the patients of `test` or all in `folds`; give one of them"
            )
        if self.pool is not None and self.test is None:
            raise ValueError(
                "`pool` goes with `test`; with folds, all patients outside the fold are the pool"
            )
        if self.kind == "paper" and self.folds is None:
            raise ValueError("the paper's protocol needs folds: 5")
        if self.draws in (0, ()):
            raise ValueError("draws must be at least 1")
        return self

    @property
    def num_draws(self) -> int:
        """How many draws there are."""
        return self.draws if isinstance(self.draws, int) else len(self.draws)


class SlicesPlan(Settings):
    """k labelled slices of one volume, the rest of which is segmented."""

    volumes: int | tuple[str, ...] = Field(
        10, description="How many tested volumes, of a patient each, or the names of their files."
    )
    span: Literal["volume", "structures"] = Field(
        "volume",
        description="The slices are spaced evenly over the whole volume, or over the slices that show a structure.",
    )
    unlabelled: Literal["own", "all"] = Field(
        "own",
        description="own: recipes that learn from unlabelled slices get the rest of the volume. all: they get the "
        "volumes of the pretraining as well.",
    )


class ColumnsPlan(Settings):
    """How much is labelled."""

    patients: tuple[int, ...] = Field((), description="M: labelled patients.")
    slices: tuple[int, ...] = Field((), description="k: labelled slices of one volume.")

    @model_validator(mode="after")
    def _some(self) -> Self:
        counts = (*self.patients, *self.slices)
        if not counts or min(counts) < 1:
            raise ValueError("columns need at least one number of patients or slices, each at least 1")
        return self


class Budget(Settings):
    """How long a training is; what ends first counts."""

    steps: int | None = Field(None, gt=0, description="Optimiser steps.")
    epochs: float | None = Field(None, gt=0, description="Passes over the training slices.")
    seconds: float | None = Field(None, gt=0, description="Seconds of training.")

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.steps is None and self.epochs is None and self.seconds is None:
            raise ValueError("a budget needs steps, epochs or seconds")
        return self

    @property
    def settings(self) -> dict[str, float | None]:
        """As fields of a training's settings."""
        return {"steps": self.steps, "epochs": self.epochs, "time_budget": self.seconds}


class Budgets(Settings):
    """Budgets of both trainings; none keeps the preset's."""

    pretrain: Budget | None = Field(None, description="Of the pretraining.")
    finetune: Budget | None = Field(None, description="Of the finetuning.")

    @property
    def layer(self) -> Tree:
        """As a layer of settings."""
        sections = {"pretrain": self.pretrain, "finetune": self.finetune}
        return {name: budget.settings for name, budget in sections.items() if budget is not None}


class RowPlan(Settings):
    """A method."""

    name: str = Field(min_length=1, description="Its name in the tables.")
    network: str = Field("kaf-unet", description="Architecture, one of those of the model settings.")
    start: str = Field("random", description="random, or how the encoder is pretrained.")
    recipes: tuple[str, ...] = Field((), description="Named sets of settings, a later one over an earlier.")
    settings: Tree = Field(default_factory=dict, description="Its own settings.")
    budgets: Budgets = Field(default_factory=Budgets, description="Its own budgets.")


class Plan(Settings):
    """A benchmark."""

    name: str = Field(min_length=1, description="Its name.")
    description: str = Field("", description="What it is to show, for the report.")
    data: DataPlan = Field(description="Data set.")
    protocol: ProtocolPlan = Field(description="Protocol.")
    columns: ColumnsPlan = Field(description="How much is labelled.")
    k_slices: SlicesPlan = Field(default_factory=SlicesPlan, description="For columns of slices.")
    preset: PresetName = Field("small", description="Settings to start from.")
    settings: Tree = Field(default_factory=dict, description="Settings of all rows.")
    budgets: Budgets = Field(default_factory=Budgets, description="Budgets of all rows.")
    recipes: dict[str, Tree] = Field(default_factory=dict, description="Named sets of settings.")
    rows: tuple[RowPlan, ...] = Field(min_length=1, description="Methods that are compared.")
    reference: str | None = Field(
        None, description="Row that the others are tested against; none takes the last."
    )
    pretraining_seed: int | None = Field(
        None, ge=0, description="One seed for all pretrainings; none pretrains anew for each seed."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [row.name for row in self.rows]
        if len(set(map(slug, names))) < len(names):
            raise ValueError(f"rows must have different names, also as names of folders, got {names}")
        if self.reference is not None and self.reference not in names:
            raise ValueError(f"reference must be one of the rows {names}, got {self.reference!r}")
        for row in self.rows:
            unknown = [name for name in row.recipes if name not in self.recipes]
            if unknown:
                raise ValueError(f"row {row.name!r} uses recipe {unknown[0]!r}, which the plan does not have")
        if self.columns.slices and self.protocol.kind == "paper":
            raise ValueError("columns of slices need the strict protocol")
        return self

    @property
    def summary(self) -> str:
        """The first sentence of the description."""
        first, stop, _ = " ".join(self.description.split()).partition(". ")
        return first + stop.strip()

    @property
    def reference_row(self) -> str:
        """Row that the others are tested against."""
        return self.reference if self.reference is not None else self.rows[-1].name


def slug(name: str) -> str:
    """A name as part of a path: lower case, letters and digits."""
    return "-".join("".join(char if char.isalnum() else " " for char in name.lower()).split())


def shipped_plans() -> list[str]:
    """Names of the plans that come with the package."""
    return sorted(
        item.name.removesuffix(".yaml") for item in SHIPPED.iterdir() if item.name.endswith(".yaml")
    )


def plan_text(name: str) -> str:
    """The text of a plan: of a file, or of one that comes with the package.

    Raises:
        UserError: If there is no such plan.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the plan {path}: {error}") from error
    if name not in shipped_plans():
        raise UserError(
            f"there is no plan {name!r}; give a file NAME.yaml or one of {', '.join(shipped_plans())}"
        )
    return (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")


def load_plan(name: str) -> Plan:
    """Read a plan.

    Args:
        name: A file, or the name of a plan that comes with the package.

    Raises:
        UserError: If it does not exist or does not make sense, naming the key.
    """
    return validated(Plan, _content(name))


def _content(name: str) -> dict[str, Any]:
    """The keys of a plan, over those of the plan that it extends."""
    try:
        content = yaml.safe_load(plan_text(name))
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} must hold a plan; kaf benchmark plans --show quick prints one")
    base = content.pop("extends", None)
    if base is None:
        return content
    if base not in shipped_plans() or base == name:
        raise UserError(f"{name} extends {base!r}; only these can be extended: {', '.join(shipped_plans())}")
    return {**_content(base), **content}
