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
import safetensors
from numpy.typing import NDArray

from kaf_model.errors import UserError
from napari_kaf._paths import data_folder

_HEADER = "napari-kaf"
_being_trained: set[Path] = set()  # checkpoints of trainings of this process that have not ended


@dataclass(frozen=True)
class Run:
    """One finetuning.

    Attributes:
        key: Name of its files, from the time it began.
        name: What it is called.
        when: When it began, ISO 8601.
        labelled: Slices it was trained on and what their labels meant.
        steps: Optimiser steps.
        seconds: How long it trained, previews not counted.
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
    """The runs on one volume: of each a checkpoint, what is known of it, and, once it was made, its result.

    A training that was killed leaves its checkpoint alone; it is a run as well, known by the checkpoint's header.

    Args:
        key: Tells the volume from others.
    """

    def __init__(self, key: str) -> None:
        self.folder = data_folder() / "runs" / key

    def begin(self) -> str:
        """A name for the files of a run that begins now; it is not listed before `ended`."""
        key = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        _being_trained.add(self.model_path(key))
        return key

    def ended(self, key: str) -> None:
        """List a run from now on if it has a checkpoint."""
        _being_trained.discard(self.model_path(key))

    def model_path(self, key: str) -> Path:
        """Checkpoint of a run."""
        return self.folder / f"{key}.safetensors"

    def runs(self) -> list[Run]:
        """All runs, oldest first; those whose files are damaged or gone are passed over."""
        models = [path for path in sorted(self.folder.glob("*.safetensors")) if ".resume." not in path.name]
        found = [_read_run(path) for path in models if path not in _being_trained]
        return [run for run in found if run is not None]

    def add(self, run: Run, labels: NDArray[Any] | None) -> None:
        """Keep a run whose checkpoint has been written, and its result if there is one.

        Raises:
            UserError: If it cannot be written.
        """
        try:
            if labels is not None:
                with open(self._labels_path(run.key), "wb") as file:
                    np.savez_compressed(file, labels=labels)
            self._write(run)
        except OSError as error:
            raise UserError(f"the run cannot be kept in {self.folder}: {error.strerror}") from error

    def labels(self, run: Run) -> NDArray[Any]:
        """The result (Z, Y, X) of a run.

        Raises:
            UserError: If there is none, or its file is damaged.
        """
        if not self.has_result(run):
            raise UserError(f"{run.name} ended before its result was made; Show makes it")
        try:
            with np.load(self._labels_path(run.key), allow_pickle=False) as content:
                labels: NDArray[Any] = content["labels"]
                return labels
        except Exception as error:  # a broken archive raises nearly anything
            raise UserError(f"the result of {run.name} cannot be read: {error}") from error

    def has_result(self, run: Run) -> bool:
        """Whether the volume was segmented by a run's model."""
        return self._labels_path(run.key).is_file()

    def class_names(self, run: Run) -> dict[int, str]:
        """What the values of a run's result are, as its model knows them; nothing if that cannot be read."""
        try:
            classes = checkpoint_header(self.model_path(run.key))["classes"]
            return {int(label["value"]): str(label["name"]) for label in classes}
        except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError):
            return {}

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


def checkpoint_header(model: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        OSError, SafetensorError: If it is missing or broken.
        KeyError: If it is not one of ours.
    """
    with safetensors.safe_open(model, framework="np") as file:
        header: dict[str, Any] = json.loads((file.metadata() or {})[_HEADER])
    return header


def _read_run(model: Path) -> Run | None:
    """What is known of the run of a checkpoint."""
    path = model.with_suffix(".json")
    try:
        if not path.is_file():
            return _interrupted(model)
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values["labelled"] = {int(z): str(status) for z, status in values["labelled"].items()}
        return Run(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, safetensors.SafetensorError):
        return None


def _interrupted(model: Path) -> Run:
    """A run whose program ended before it could say anything of it."""
    record: dict[str, Any] = checkpoint_header(model)["history"][-1]
    slices = (name.rsplit(":", 2)[1:] for name in record["labelled_slices"])
    return Run(
        key=model.stem,
        name="interrupted run",
        when=record["date"],
        labelled={int(z): status for z, status in slices},
        steps=record["steps"],
        seconds=record["seconds"],
        stopped=True,
        held_out_dice=record["held_out_dice"],
        start="what its model tells",
        device=record["device"],
    )
