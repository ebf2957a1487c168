"""What the user says of labelled slices, and what the network may learn from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from kaf_model.checkpoint import ClassLabel
from kaf_model.errors import UserError
from kaf_model.losses import IGNORED
from kaf_model.volume import Volume

_MOST_UNNAMED = 256


class SliceStatus(StrEnum):
    """What a slice's labels mean. A slice without a status is not trained on."""

    COMPLETE = "complete"
    """Everything is painted: unpainted pixels are background."""
    PARTIAL = "partial"
    """Only what is painted is known: unpainted pixels are left out of the loss."""
    EMPTY = "empty"
    """Looked at, and nothing is there: all background."""


@dataclass(frozen=True)
class LabelledVolume:
    """A volume with labels on some of its slices.

    Attributes:
        volume: The image.
        labels: (Z, Y, X) integers on the volume's grid, 0 where nothing is painted.
        statuses: Meaning of each labelled slice by its index; slices not named are not trained on.
    """

    volume: Volume
    labels: NDArray[np.integer]
    statuses: Mapping[int, SliceStatus]

    def __post_init__(self) -> None:
        name, shape = self.volume.name, self.volume.shape
        if self.labels.shape != shape:
            raise UserError(f"labels of {name} must be {shape} like the volume, got {self.labels.shape}")
        if not np.issubdtype(self.labels.dtype, np.integer):
            raise UserError(f"labels of {name} must be integers, got {self.labels.dtype}")
        beyond = sorted(z for z in self.statuses if not 0 <= z < shape[0])
        if beyond:
            raise UserError(f"{name} has slices 0..{shape[0] - 1}, slice {beyond[0]} was named as labelled")
        for z, status in self.statuses.items():
            if status is SliceStatus.EMPTY and self.labels[z].any():
                raise UserError(
                    f"slice {z} of {name} is marked empty but {np.count_nonzero(self.labels[z])} pixels are painted"
                )

    @property
    def finished(self) -> tuple[int, ...]:
        """The slices that are complete or verified empty, ascending."""
        return tuple(z for z, status in sorted(self.statuses.items()) if status is not SliceStatus.PARTIAL)

    def put_back(
        self, labels: NDArray[np.integer], values: Iterable[int], rows: Iterable[int] | None = None
    ) -> None:
        """Set finished slices of a segmentation, in place, to what somebody labelled.

        Args:
            labels: (Z, Y, X) labels on the volume's grid.
            values: Label values that are put back, the background among them.
            rows: Only these slices; None is all.
        """
        known = list(values)
        for z in self.finished if rows is None else set(rows).intersection(self.finished):
            drawn = self.labels[z]
            labels[z] = np.where(np.isin(drawn, known), drawn, labels[z])

    def without_unlabelled(self) -> LabelledVolume:
        """The same volume with no trace of labels on slices that do not count as labelled."""
        known = np.zeros_like(self.labels)
        for z in self.statuses:
            known[z] = self.labels[z]
        return LabelledVolume(self.volume, known, self.statuses)


def open_ends(labels: NDArray[np.integer], finished: Sequence[int]) -> list[str]:
    """Where nothing shows yet whether structures end: "before slice 2", "after slice 7".

    An outermost finished slice that is empty, or at the volume's own end, closes that side.

    Args:
        labels: (Z, Y, X).
        finished: Slices of which everything is known.
    """
    ends = []
    if finished and min(finished) > 0 and labels[min(finished)].any():
        ends.append(f"before slice {min(finished)}")
    if finished and max(finished) < len(labels) - 1 and labels[max(finished)].any():
        ends.append(f"after slice {max(finished)}")
    return ends


def painted_values(cases: Sequence[LabelledVolume]) -> set[int]:
    """The label values on the labelled slices, the background among them."""
    return {int(v) for case in cases for z in case.statuses for v in np.unique(case.labels[z])}


@dataclass(frozen=True)
class ClassMap:
    """Which label value is which output channel; channel 0 is the background, value 0.

    Attributes:
        classes: Classes in channel order, background first.
    """

    classes: tuple[ClassLabel, ...]
    _channels: dict[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        values = [label.value for label in self.classes]
        if not values or values[0] != 0 or len(set(values)) != len(values):
            raise UserError(f"classes must start with the background, 0, and differ; got values {values}")
        object.__setattr__(self, "_channels", {value: channel for channel, value in enumerate(values)})

    @classmethod
    def of_labels(cls, cases: Sequence[LabelledVolume], names: Mapping[int, str] | None = None) -> ClassMap:
        """The classes of labelled slices, in ascending order of value.

        Args:
            cases: Labelled volumes.
            names: Names by value. They are all the classes there are, painted or not; None takes the values
                that are painted.

        Raises:
            UserError: If no slice is marked as labelled, nothing is painted, or so many values without names that
                they are hardly labels.
        """
        if not any(case.statuses for case in cases):
            raise UserError("no slice is marked as labelled; mark at least one as complete, partial or empty")
        names = dict(names or {})
        values = (set(names) or painted_values(cases)) - {0}
        if not values:
            raise UserError("no class is painted on the labelled slices; paint at least one structure")
        if not names and len(values) > _MOST_UNNAMED:
            raise UserError(
                f"{len(values)} different values are painted, as if images were taken for labels; "
                "name the classes if there are so many"
            )
        labels = [ClassLabel(0, names.get(0, "background"))]
        labels += [ClassLabel(value, names.get(value, f"class {value}")) for value in sorted(values)]
        return cls(tuple(labels))

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def values(self) -> NDArray[np.int64]:
        """Label value of each channel, (K,)."""
        return np.array([label.value for label in self.classes])

    def channels(self, labels: NDArray[np.integer], status: SliceStatus, where: str) -> NDArray[np.int64]:
        """Label values of a slice -> channels, IGNORED where nothing is known.

        Args:
            labels: (H, W) label values.
            status: What unpainted pixels mean.
            where: Names the slice in an error.

        Raises:
            UserError: If a value is not a class.
        """
        present = np.unique(labels)
        unknown = [int(value) for value in present if int(value) not in self._channels]
        if unknown:
            known = ", ".join(f"{label.value} ({label.name})" for label in self.classes)
            raise UserError(f"{where} has label {unknown[0]}, which is no class; the classes are {known}")
        channels = np.zeros(labels.shape, np.int64)
        for value in present:
            channels[labels == value] = self._channels[int(value)]
        if status is SliceStatus.PARTIAL:
            channels[labels == 0] = IGNORED
        return channels


def check_learnable(labels: Sequence[NDArray[np.int64]], classes: ClassMap) -> None:
    """Check that the labelled pixels can teach a distinction.

    Args:
        labels: Channels of each labelled slice, IGNORED where unknown.
        classes: Their meaning.

    Raises:
        UserError: If nothing is known, or only one class.
    """
    known = sorted({int(value) for slice_labels in labels for value in np.unique(slice_labels)} - {IGNORED})
    if not known:
        raise UserError("the labelled slices are partial and nothing is painted on them; paint something")
    if known == [0]:
        raise UserError(
            "the labelled slices show only background; label a slice on which a structure is painted"
        )
    if len(known) == 1:
        only = classes.classes[known[0]].name
        raise UserError(
            f"only {only!r} is labelled and no background; paint a second class, or mark a slice complete so that "
            "its unpainted pixels count as background"
        )
