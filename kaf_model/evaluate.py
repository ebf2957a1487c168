"""How well a segmentation agrees with a reference: Dice, HD95 and volumes, per class and volume.

Dice and the 95th-percentile Hausdorff distance are MONAI's. Each class is scored alone, inside the box
that holds it in either label map, so that memory follows the organ and not the scan.

Absent classes are stated rather than rewarded or guessed:

- In neither label map: both scores are nan, and no mean counts them.
- In one of the two: Dice is 0. There is no distance to nothing, so HD95 is nan and its mean leaves the
  volume out; the table says in how many volumes that happened.
"""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import UserError
from kaf_model.label_names import class_names
from kaf_model.progress import Progress
from kaf_model.text_files import write_atomically
from kaf_model.volume import find_volumes, inspect_volume, read_labels, read_volume, volume_name

BACKGROUND = 0
MAP_ENDINGS = ("_probabilities", "_uncertainty")  # of maps that a segmentation writes beside its labels

Labels = NDArray[np.integer]
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class ClassScore:
    """One class of one volume.

    Attributes:
        volume: Name of the volume.
        value: Label value of the class.
        name: Name of the class.
        dice: 0..1; 0 when only one of the two holds the class, nan when neither does.
        hd95_mm: 95th percentile of the surface distances, the larger of both directions; nan when prediction
            or reference lacks the class.
        prediction_ml: Volume of the class in the prediction.
        reference_ml: Volume of the class in the reference.
    """

    volume: str
    value: int
    name: str
    dice: float
    hd95_mm: float
    prediction_ml: float
    reference_ml: float


@dataclass(frozen=True)
class ClassSummary:
    """One class over all volumes that hold it in prediction or reference; means and standard deviations.

    Attributes:
        value: Label value of the class.
        name: Name of the class.
        dice: Mean and standard deviation (of the sample, nan for one volume) of the Dice scores.
        hd95_mm: The same of the distances, over the volumes that have one.
        prediction_ml: The same of the predicted volumes.
        reference_ml: The same of the reference volumes.
        num_volumes: Volumes with a Dice score.
        num_one_sided: Those of them in which only prediction or reference holds the class: no distance.
    """

    value: int
    name: str
    dice: tuple[float, float]
    hd95_mm: tuple[float, float]
    prediction_ml: tuple[float, float]
    reference_ml: tuple[float, float]
    num_volumes: int
    num_one_sided: int


@dataclass(frozen=True)
class Scores:
    """Scores of any number of volumes.

    Attributes:
        rows: One score per volume and class.
        notices: What was passed over and why, for the user.
    """

    rows: tuple[ClassScore, ...]
    notices: tuple[str, ...] = ()

    @property
    def mean_dice(self) -> float:
        """Mean over the classes of each class's mean Dice over volumes; nan when nothing was scored."""
        return _mean([summary.dice[0] for summary in self.by_class()])

    def by_class(self) -> list[ClassSummary]:
        """Summarise each class over the volumes, in the order of the label values."""
        values = sorted({row.value for row in self.rows})
        return [_summarise([row for row in self.rows if row.value == value]) for value in values]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line per volume and class; a cell is empty where there is no score.

        The file appears complete or not at all.
        """
        columns = [column.name for column in fields(ClassScore)]

        def write(file: TextIO) -> None:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in self.rows:
                cells = [getattr(row, column) for column in columns]
                writer.writerow("" if cell != cell else cell for cell in cells)

        write_atomically(Path(path), write)

    def table(self) -> str:
        """Return a Markdown table: mean and standard deviation of each class, and the mean over classes."""
        summaries = self.by_class()
        header = ["class", "Dice", "HD95 (mm)", "prediction (ml)", "reference (ml)", "volumes"]
        lines = [
            [
                f"{s.value} {s.name}" if s.name != str(s.value) else s.name,
                _plus_minus(s.dice, 3),
                _plus_minus(s.hd95_mm, 1),
                _plus_minus(s.prediction_ml, 1),
                _plus_minus(s.reference_ml, 1),
                str(s.num_volumes) + (f" ({s.num_one_sided} without HD95)" if s.num_one_sided else ""),
            ]
            for s in summaries
        ]
        distance = _mean([s.hd95_mm[0] for s in summaries])
        num_volumes = len({row.volume for row in self.rows})
        lines.append(["mean", _number(self.mean_dice, 3), _number(distance, 1), "", "", str(num_volumes)])
        return _markdown([header, *lines])


def evaluate_volume(
    prediction: Labels,
    reference: Labels,
    *,
    spacing: Sequence[float],
    voxel_ml: float | None = None,
    classes: Mapping[int, str] | None = None,
    volume: str = "",
) -> list[ClassScore]:
    """Score the classes of one volume.

    Args:
        prediction: Label values, shape (Z, Y, X). They need not be contiguous.
        reference: Label values, shape (Z, Y, X).
        spacing: Voxel size in mm (z, y, x).
        voxel_ml: Volume of a voxel in ml; by default the product of the spacing.
        classes: Label values to score and their names; by default every value found in either, named by
            its number. The background, 0, is never scored.
        volume: Name to put into the scores.

    Returns:
        One score per class, in the order of the values.

    Raises:
        UserError: If the shapes differ or an array does not hold integers.
    """
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise UserError(
            f"prediction and reference must have the same shape (Z, Y, X), "
            f"got {prediction.shape} and {reference.shape}"
        )
    for role, labels in (("prediction", prediction), ("reference", reference)):
        if labels.dtype.kind not in "iub":
            raise UserError(f"the {role} must hold integer labels, got values of type {labels.dtype}")
    if classes is None:
        classes = {value: str(value) for value in sorted(_values(prediction) | _values(reference))}
    if voxel_ml is None:
        voxel_ml = math.prod(spacing) / 1000
    return [
        _score_class(prediction, reference, value, classes[value], spacing, voxel_ml, volume)
        for value in sorted(classes)
        if value != BACKGROUND
    ]


def evaluate_folders(
    predictions: str | os.PathLike[str],
    references: str | os.PathLike[str],
    *,
    classes: Mapping[int, str] | None = None,
    frame: int | None = None,
) -> Generator[Progress, None, Scores]:
    """Score label files against reference files of the same name.

    A file without a partner, or a pair that cannot be read or lies on different grids, is named in a notice
    and passed over; the rest goes on.

    Args:
        predictions: A folder of label files, or one file.
        references: A folder of label files, or one file. Two single files pair whatever their names.
        classes: Label values to score and their names; by default those that are named beside the references, see
            `class_names`, and every other value found.
        frame: Which label map of 4-D files, from 0; files that hold one map are not asked for it.

    Yields:
        Progress in volumes, with each notice as a message.

    Returns:
        The scores.

    Raises:
        UserError: If a path does not exist or no pair could be scored.
    """
    pairs, unpaired = _pair(Path(predictions), Path(references))
    notices = list(unpaired)
    for notice in notices:
        yield Progress("evaluating", 0, len(pairs), message=notice)
    folder = Path(references) if Path(references).is_dir() else Path(references).parent
    names = {} if classes is not None else class_names(folder)
    rows: list[ClassScore] = []
    yield Progress("evaluating", 0, len(pairs))
    for step, (name, prediction, reference) in enumerate(pairs, start=1):
        message = ""
        try:
            rows += _evaluate_files(name, prediction, reference, classes, names, frame)
        except UserError as error:
            message = f"{name} was not scored: {error}"
            notices.append(message)
        yield Progress("evaluating", step, len(pairs), message=message)
    if not rows and notices:
        raise UserError(f"nothing could be scored; {notices[0]}")
    return Scores(rows=tuple(rows), notices=tuple(notices))


# --- one class ---------------------------------------------------------------------------------------------


def _score_class(
    prediction: Labels,
    reference: Labels,
    value: int,
    name: str,
    spacing: Sequence[float],
    voxel_ml: float,
    volume: str,
) -> ClassScore:
    boxes = [_bounding_box(labels, value) for labels in (prediction, reference)]
    box = _union(boxes)
    dice = hd95_mm = math.nan
    counts = [0, 0]
    if box is not None:
        masks = [labels[box] == value for labels in (prediction, reference)]
        counts = [int(np.count_nonzero(mask)) for mask in masks]
        dice = 0.0
        if all(counts):
            dice, hd95_mm = _monai_scores(masks[0], masks[1], spacing, picture=reference.shape[0] == 1)
    return ClassScore(
        volume=volume,
        value=value,
        name=name,
        dice=dice,
        hd95_mm=hd95_mm,
        prediction_ml=counts[0] * voxel_ml,
        reference_ml=counts[1] * voxel_ml,
    )


def _monai_scores(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: Sequence[float], *, picture: bool
) -> tuple[float, float]:
    """Return Dice and HD95 in mm of two masks, neither of them empty.

    The borders of a picture, a volume of one slice, are those within it, not its two faces.
    """
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance

    masks = [torch.from_numpy(mask)[None, None] for mask in (prediction, reference)]  # (1, 1, Z, Y, X)
    dice = compute_dice(*masks, include_background=True)
    if picture:
        masks, spacing = [mask[:, :, 0] for mask in masks], spacing[1:]
    # MONAI 1.6 passes an argument to itself that it has deprecated. Not in catch_warnings, which would undo what
    # another thread, the viewer's, has in one at that moment.
    warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
    # Outside of the array counts as background, so the box needs no margin around the masks.
    distance = compute_hausdorff_distance(
        *masks, include_background=True, percentile=95, spacing=[float(step) for step in spacing]
    )
    return float(dice), float(distance)


def _bounding_box(labels: Labels, value: int) -> Box | None:
    """Return the box of a label value, slice by slice so that no mask of the whole volume is made."""
    rows = np.zeros(labels.shape[1], dtype=bool)
    columns = np.zeros(labels.shape[2], dtype=bool)
    slices = np.zeros(labels.shape[0], dtype=bool)
    for index, image in enumerate(labels):
        mask = image == value
        if mask.any():
            slices[index] = True
            rows |= mask.any(axis=1)
            columns |= mask.any(axis=0)
    if not slices.any():
        return None
    spans = [np.flatnonzero(axis) for axis in (slices, rows, columns)]
    z, y, x = (slice(int(span[0]), int(span[-1]) + 1) for span in spans)
    return z, y, x


def _union(boxes: Sequence[Box | None]) -> Box | None:
    held = [box for box in boxes if box is not None]
    if not held:
        return None
    z, y, x = (
        slice(min(s.start for s in spans), max(s.stop for s in spans)) for spans in zip(*held, strict=True)
    )
    return z, y, x


def _values(labels: Labels) -> set[int]:
    return {int(value) for image in labels for value in np.unique(image)}


# --- files -------------------------------------------------------------------------------------------------


def _evaluate_files(
    name: str,
    prediction_path: Path,
    reference_path: Path,
    classes: Mapping[int, str] | None,
    names: Mapping[int, str],
    frame: int | None,
) -> list[ClassScore]:
    grid = read_volume(reference_path, frame=_frame_in(reference_path, frame))
    reference = read_labels(reference_path, like=grid)
    prediction = read_labels(prediction_path, like=grid, frame=_frame_in(prediction_path, frame))
    if classes is None:
        found = _values(prediction) | _values(reference) | set(names)
        classes = {value: names.get(value, str(value)) for value in found}
    return evaluate_volume(
        prediction,
        reference,
        spacing=grid.spacing,
        voxel_ml=grid.voxel_ml,
        classes=classes,
        volume=name,
    )


def _frame_in(path: Path, frame: int | None) -> int | None:
    return frame if frame is not None and inspect_volume(path).num_frames > 1 else None


def _pair(predictions: Path, references: Path) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """Return (name, prediction, reference) for each name in both, and a notice for each name in one only."""
    for role, path in (("predictions", predictions), ("references", references)):
        if not path.exists():
            raise UserError(f"{role}: there is no file or folder {path}")
    if predictions.is_file() and references.is_file():
        return [(volume_name(references), predictions, references)], []
    predicted, expected = _by_name(predictions), _by_name(references)
    pairs = [(name, predicted[name], expected[name]) for name in sorted(predicted.keys() & expected.keys())]
    if not pairs:
        raise UserError(
            f"no prediction in {predictions} ({len(predicted)} volumes) has the name of a reference "
            f"in {references} ({len(expected)} volumes): they pair by file name"
        )
    notices = []
    if references.is_dir():
        maps = {
            name for name in predicted if name.endswith(MAP_ENDINGS) and name.rpartition("_")[0] in predicted
        }
        for name in sorted(predicted.keys() - expected.keys() - maps):
            notices.append(f"{predicted[name]} was not scored: no reference of that name in {references}")
    if predictions.is_dir():
        for name in sorted(expected.keys() - predicted.keys()):
            notices.append(f"{expected[name]} was not scored: no prediction of that name in {predictions}")
    return pairs, notices


def _by_name(path: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in find_volumes([path]):
        name = volume_name(file)
        if name in found:
            raise UserError(f"{found[name]} and {file} have the same name; which of them counts?")
        found[name] = file
    return found


# --- tables ------------------------------------------------------------------------------------------------


def _summarise(rows: Sequence[ClassScore]) -> ClassSummary:
    """Summarise the rows of one class."""
    scored = [row for row in rows if not math.isnan(row.dice)]
    return ClassSummary(
        value=rows[0].value,
        name=rows[0].name,
        dice=_mean_and_std([row.dice for row in scored]),
        hd95_mm=_mean_and_std([row.hd95_mm for row in scored]),
        prediction_ml=_mean_and_std([row.prediction_ml for row in scored]),
        reference_ml=_mean_and_std([row.reference_ml for row in scored]),
        num_volumes=len(scored),
        num_one_sided=sum(math.isnan(row.hd95_mm) for row in scored),
    )


def _mean(values: Sequence[float]) -> float:
    return _mean_and_std(values)[0]


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation of the values that are not nan."""
    known = [value for value in values if not math.isnan(value)]
    mean = float(np.mean(known)) if known else math.nan
    return mean, float(np.std(known, ddof=1)) if len(known) > 1 else math.nan


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _plus_minus(mean_and_std: tuple[float, float], digits: int) -> str:
    mean, std = (_number(value, digits) for value in mean_and_std)
    return mean if std == "-" else f"{mean} ± {std}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lay out a header and lines as a Markdown table that also reads well as plain text."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [lines[0], rule, *lines[1:]]
    ]
    return "\n".join(padded) + "\n"
