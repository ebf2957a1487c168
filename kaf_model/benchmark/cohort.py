"""The volumes of a data set and whose they are: what a split must never tear apart."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kaf_model.errors import UserError
from kaf_model.labels import LabelledVolume, SliceStatus
from kaf_model.volume import read_labels, read_volume


@dataclass(frozen=True)
class Case:
    """One volume of a patient.

    Attributes:
        name: Names the volume among all of its data set.
        patient: Whose it is; volumes of one patient are never on both sides of a split.
        image: The image.
        labels: The label map; None for a volume that can only be pretrained on.
    """

    name: str
    patient: str
    image: Path
    labels: Path | None


@dataclass(frozen=True)
class Cohort:
    """The volumes of a data set.

    Attributes:
        cases: Volumes in natural order of their names.
        classes: Names of the label values, without the background; empty when the data set names none.
    """

    cases: tuple[Case, ...]
    classes: Mapping[int, str]

    @property
    def patients(self) -> tuple[str, ...]:
        """Patients with at least one labelled volume, in natural order."""
        return tuple(sorted({case.patient for case in self.cases if case.labels}, key=natural_key))

    def labelled(self, patients: Collection[str]) -> tuple[Case, ...]:
        """The labelled volumes of some patients."""
        return tuple(case for case in self.cases if case.patient in patients and case.labels)

    def images(self, *, without: Collection[str] = ()) -> tuple[Case, ...]:
        """All volumes, labelled or not, but those of some patients."""
        return tuple(case for case in self.cases if case.patient not in without)

    def restricted(self, patients: Collection[str]) -> Cohort:
        """The cohort without the labelled patients that are not among these."""
        others = set(self.patients) - set(patients)
        return Cohort(self.images(without=others), self.classes)


def cohort_of(cases: Iterable[Case], classes: Mapping[int, str], where: Path, expected: str) -> Cohort:
    """Check and sort what a reader has found.

    Args:
        cases: Volumes.
        classes: Names of the label values; the background is left out.
        where: Folder that was read.
        expected: The layout in words, for the error.

    Raises:
        UserError: If there is no labelled volume, or two volumes have one name.
    """
    found = sorted(cases, key=lambda case: natural_key(case.name))
    if not any(case.labels for case in found):
        raise UserError(f"there is no labelled volume in {where}; expected {expected}")
    for before, after in itertools.pairwise(found):
        if before.name == after.name:
            raise UserError(f"{before.image} and {after.image} have the same name; which of them counts?")
    return Cohort(tuple(found), {value: name for value, name in sorted(classes.items()) if value != 0})


def read_case(
    case: Case,
    *,
    labelled: Sequence[int] | None = None,
    classes: Mapping[int, str] | None = None,
    **reading: Any,
) -> LabelledVolume:
    """Read a volume with its labels.

    Args:
        case: A labelled case.
        labelled: Slices that count as labelled, completely; None is all of them.
        classes: With these given, every other label value counts as background.
        **reading: As for `read_volume`.
    """
    if case.labels is None:
        raise UserError(f"{case.name} has no label map; leave it out")
    volume = read_volume(case.image, **reading)
    labels = read_labels(case.labels, like=volume)
    if classes is not None:
        labels = np.where(np.isin(labels, [*classes]), labels, 0).astype(labels.dtype)
    chosen = range(volume.num_slices) if labelled is None else labelled
    return LabelledVolume(volume, labels, dict.fromkeys(chosen, SliceStatus.COMPLETE))


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts case2 before case10."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts)


def patient_number(patient: str) -> int:
    """The last number in a patient's name: 7 of "patient007".

    Raises:
        UserError: If there is none.
    """
    numbers = re.findall(r"\d+", patient)
    if not numbers:
        raise UserError(f"patient {patient!r} has no number to be chosen by; name patients one by one")
    return int(numbers[-1])
