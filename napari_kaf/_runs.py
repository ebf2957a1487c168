"""The history of finetunings on a volume: model, result and what is known of each, kept as files."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import UserError
from napari_kaf._paths import data_folder


@dataclass(frozen=True)
class Run:
    """One finetuning.

    Attributes:
        key: Name of its files, from the time it began.
        name: What it is called.
        when: When it began, ISO 8601.
        labelled: Slices it was trained on and what their labels meant.
        steps: Optimiser steps.
        seconds: How long it trained.
        stopped: Whether it was cancelled before its budget was spent.
        held_out_dice: Dice on held-out slices, if asked for.
        start: What it started from, in words.
        device: Where it ran.
    """

    key: str
    name: str
    when: str
    labelled: dict[int, str]
    steps: int
    seconds: float
    stopped: bool
    held_out_dice: float | None
    start: str
    device: str

    def cells(self) -> tuple[str, str, str, str, str]:
        """Name, time, labelled slices, steps and Dice, for a row of a table."""
        dice = "" if self.held_out_dice is None else f"{self.held_out_dice:.3f}"
        return self.name, self._when(), str(len(self.labelled)), str(self.steps), dice

    def summary(self) -> str:
        """All that is known, in words."""
        slices = ", ".join(f"{z} {status}" for z, status in sorted(self.labelled.items()))
        dice = "" if self.held_out_dice is None else f"; Dice on held-out slices {self.held_out_dice:.3f}"
        end = "stopped" if self.stopped else "finished"
        return (
            f"{self.name}, {self._when()}: from {self.start} on slices {slices}; {end} after {self.steps} steps, "
            f"{self.seconds:.0f} s on {self.device}{dice}"
        )

    def _when(self) -> str:
        return datetime.datetime.fromisoformat(self.when).strftime("%d %b %H:%M")


def next_name(runs: Sequence[Run]) -> str:
    """A name that no run has yet."""
    taken = {run.name for run in runs}
    return next(name for number in range(len(runs) + 1, 10**9) if (name := f"run {number}") not in taken)


class RunStore:
    """The runs on one volume.

    Args:
        key: Tells the volume from others.
    """

    def __init__(self, key: str) -> None:
        self.folder = data_folder() / "runs" / key

    def new_key(self) -> str:
        """A name for the files of a run that begins now."""
        return datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")

    def model_path(self, key: str) -> Path:
        """Checkpoint of a run."""
        return self.folder / f"{key}.safetensors"

    def runs(self) -> list[Run]:
        """All runs, oldest first; those whose files are damaged or gone are passed over."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                values["labelled"] = {int(z): str(status) for z, status in values["labelled"].items()}
                run = Run(**values)
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                continue
            if self.model_path(run.key).is_file() and self._labels_path(run.key).is_file():
                found.append(run)
        return found

    def add(self, run: Run, labels: NDArray[Any]) -> None:
        """Keep a run whose checkpoint has been written.

        Raises:
            UserError: If it cannot be written.
        """
        try:
            with open(self._labels_path(run.key), "wb") as file:
                np.savez_compressed(file, labels=labels)
            self._write(run)
        except OSError as error:
            raise UserError(f"the run cannot be kept in {self.folder}: {error.strerror}") from error

    def labels(self, run: Run) -> NDArray[Any]:
        """The result (Z, Y, X) of a run.

        Raises:
            UserError: If its file is gone or damaged.
        """
        try:
            with np.load(self._labels_path(run.key), allow_pickle=False) as content:
                labels: NDArray[Any] = content["labels"]
                return labels
        except Exception as error:  # a broken archive raises nearly anything
            raise UserError(f"the result of {run.name} cannot be read: {error}") from error

    def rename(self, run: Run, name: str) -> Run:
        """Give a run another name."""
        renamed = replace(run, name=name.strip() or run.name)
        self._write(renamed)
        return renamed

    def save_model(self, run: Run, path: Path) -> None:
        """Copy a run's model to a place of the user's.

        Raises:
            UserError: If it cannot be written.
        """
        try:
            shutil.copyfile(self.model_path(run.key), path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from error

    def delete(self, run: Run) -> None:
        """Remove the files of a run."""
        for path in self.folder.glob(f"{run.key}.*"):
            path.unlink(missing_ok=True)

    def _labels_path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"

    def _write(self, run: Run) -> None:
        path = self.folder / f"{run.key}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(run)), encoding="utf-8")
        os.replace(temporary, path)
