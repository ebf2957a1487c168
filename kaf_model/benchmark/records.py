"""The folder of a run: its settings, losses, weights, scores, and, written last, its result.

A run is finished when its result is there; what else is found in the folder is taken up where it stopped.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

import yaml
from filelock import FileLock, Timeout

from kaf_model.checkpoint import load_header
from kaf_model.errors import UserError
from kaf_model.text_files import write_atomically
from kaf_model.training_files import resume_path


@dataclass(frozen=True)
class CaseScore:
    """One class of one scored volume.

    Attributes:
        case: Name of the volume.
        patient: Whose it is.
        value: Label value of the class.
        name: Name of the class.
        dice: 0..1; nan when neither prediction nor reference holds the class. With k labelled slices, of the
            others alone.
        volume_dice: With k labelled slices, of the whole volume, these taken as labelled; else `dice`.
        hd95_mm: 95th percentile of the surface distances, over the same slices as `volume_dice`; nan when one
            lacks the class.
        prediction_ml: Volume of the class in the prediction, over the same slices.
        reference_ml: The same in the reference.
        voxels: Voxels of the class in prediction and reference together, over the same slices as `dice`: the
            weight of `dice` in a Dice pooled over volumes.
    """

    case: str
    patient: str
    value: int
    name: str
    dice: float
    volume_dice: float
    hd95_mm: float
    prediction_ml: float
    reference_ml: float
    voxels: int


@dataclass(frozen=True)
class RunResult:
    """What is said of a finished run beside its scores.

    Attributes:
        parameters: Trained numbers of the network.
        gigaflops: Of one slice of `flops_shape` with `flops_keypoints` keypoints, multiplications and
            additions counted each.
        flops_shape: Height and width.
        flops_keypoints: Keypoints.
        steps: Steps of the finetuning.
        seconds: Seconds of the finetuning.
        pretraining_steps: Steps of the pretraining, 0 without.
        pretraining_seconds: Seconds of the pretraining, 0 without.
        device: Where it was trained.
        labelled: Labelled slices, `case:index`.
        selected_step: Step whose weights count; that of the last, or the best on the fold.
        date: When it was finished.
    """

    parameters: int
    gigaflops: float
    flops_shape: tuple[int, int]
    flops_keypoints: int
    steps: int
    seconds: float
    pretraining_steps: int
    pretraining_seconds: float
    device: str
    labelled: tuple[str, ...]
    selected_step: int
    date: str


@dataclass(frozen=True)
class RunFolder:
    """The files of a run or a pretraining."""

    path: Path

    @property
    def weights(self) -> Path:
        """Checkpoint that the training writes."""
        return self.path / "model.safetensors"

    @property
    def best(self) -> Path:
        """Checkpoint that was best on the tested fold, under the paper's protocol."""
        return self.path / "best.safetensors"

    @property
    def interrupted(self) -> bool:
        """Whether a training stopped here before its end."""
        return resume_path(self.weights).is_file()

    @property
    def trained(self) -> bool:
        """Whether the training is over."""
        if self.interrupted or not self.weights.is_file():
            return False
        return bool(load_header(self.weights)["history"][-1]["complete"])

    @property
    def finished(self) -> bool:
        """Whether the result is there."""
        return (self.path / "result.json").is_file()

    def check(self, config: Mapping[str, Any]) -> None:
        """Check that the settings which are there, if any, are these.

        Raises:
            UserError: If the folder holds a run with other settings.
        """
        if not self._settings.is_file():
            return
        there = yaml.safe_load(self._settings.read_text(encoding="utf-8"))
        changed = _differences(there, json.loads(json.dumps(config)))
        if changed:
            raise UserError(
                f"{self.path} was made with other settings: {'; '.join(changed[:3])}. Write to another folder "
                "with -o, or delete this one"
            )

    def claim(self, config: Mapping[str, Any]) -> None:
        """Write the settings, or check that those which are there are the same.

        Raises:
            UserError: If the folder holds a run with other settings, or cannot be written.
        """
        self.check(config)
        plain = json.loads(json.dumps(config))
        with _telling_where(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self._settings, lambda file: yaml.safe_dump(plain, file, sort_keys=False))

    @contextlib.contextmanager
    def taken(self) -> Iterator[bool]:
        """Keep other processes off the folder as long as the block runs; False if one of them does so already.

        Raises:
            UserError: If the folder cannot be written.
        """
        with _telling_where(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                free = False
            else:
                free = True
        try:
            yield free
        finally:
            lock.release()

    @property
    def _settings(self) -> Path:
        return self.path / "config.yaml"

    def write_curve(self, curve: Sequence[Mapping[str, float]], name: str = "curve.csv") -> None:
        """Write losses or measurements, a line each."""
        columns = list(dict.fromkeys(key for entry in curve for key in entry))

        def write(file: TextIO) -> None:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(curve)

        write_atomically(self.path / name, write)

    def write_scores(self, scores: Sequence[CaseScore]) -> None:
        """Write one line per volume and class; a cell is empty where there is no score."""

        def write(file: TextIO) -> None:
            writer = csv.writer(file)
            writer.writerow([column.name for column in fields(CaseScore)])
            for score in scores:
                writer.writerow("" if cell != cell else cell for cell in asdict(score).values())

        write_atomically(self.path / "scores.csv", write)

    def read_scores(self) -> list[CaseScore]:
        """Read what `write_scores` wrote."""
        with open(self.path / "scores.csv", newline="", encoding="utf-8") as file:
            return [
                CaseScore(
                    case=line["case"],
                    patient=line["patient"],
                    value=int(line["value"]),
                    name=line["name"],
                    voxels=int(line["voxels"]),
                    **{
                        name: _number(line[name])
                        for name in ("dice", "volume_dice", "hd95_mm", "prediction_ml", "reference_ml")
                    },
                )
                for line in csv.DictReader(file)
            ]

    def write_result(self, result: RunResult) -> None:
        """Write the result, which makes the run finished."""
        text = json.dumps(asdict(result), indent=2) + "\n"
        write_atomically(self.path / "result.json", lambda file: file.write(text))

    def read_result(self) -> RunResult:
        """Read what `write_result` wrote."""
        content = json.loads((self.path / "result.json").read_text(encoding="utf-8"))
        content["flops_shape"] = tuple(content["flops_shape"])
        return RunResult(**{**content, "labelled": tuple(content["labelled"])})


@contextlib.contextmanager
def _telling_where(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another place") from error


def _number(text: str) -> float:
    return float(text) if text else math.nan


def _differences(there: Any, here: Any, path: str = "") -> list[str]:
    """Where two trees differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        return [
            text
            for key in keys
            for text in _differences(there.get(key), here.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if there == here else [f"{path} was {there!r}, now {here!r}"]
