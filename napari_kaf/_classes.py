"""The classes a person paints: value, name, colour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import UserError

if TYPE_CHECKING:
    from napari_kaf._session import Session

# Okabe and Ito's colours, told apart by colour-blind people, then lighter and darker ones.
_COLORS = (
    (0.90, 0.62, 0.00, 1.0),
    (0.34, 0.71, 0.91, 1.0),
    (0.00, 0.62, 0.45, 1.0),
    (0.94, 0.89, 0.26, 1.0),
    (0.84, 0.37, 0.00, 1.0),
    (0.80, 0.47, 0.65, 1.0),
    (0.00, 0.45, 0.70, 1.0),
    (0.60, 0.85, 0.55, 1.0),
    (0.95, 0.60, 0.60, 1.0),
    (0.65, 0.55, 0.85, 1.0),
)
Color = tuple[float, float, float, float]
FIRST_NAME = "structure"
"""What the first class of new labels is called until somebody names it."""


@dataclass(frozen=True)
class ClassEntry:
    """A structure that is painted.

    Attributes:
        value: Its number in the labels, 1 or more.
        name: What it is called.
        color: Red, green, blue and opacity, 0..1.
    """

    value: int
    name: str
    color: Color


def default_color(value: int) -> Color:
    """Colour of a class of which nobody has chosen one."""
    return _COLORS[(value - 1) % len(_COLORS)]


def entries_of(names: Mapping[int, str], values: Iterable[int] = ()) -> list[ClassEntry]:
    """Classes for named values and for others that are painted, in ascending order."""
    present = sorted({*names, *values} - {0})
    return [ClassEntry(value, names.get(value, f"class {value}"), default_color(value)) for value in present]


def values_in(labels: NDArray[np.integer[Any]]) -> set[int]:
    """The values that are painted in (Z, Y, X) labels; quick where most of it is background."""
    return {int(value) for plane in labels for value in np.unique(plane[plane != 0])}


def joined_classes(
    classes: Iterable[ClassEntry], others: Iterable[ClassEntry], labels: NDArray[np.integer[Any]]
) -> list[ClassEntry]:
    """Classes with those of a result added; where nobody named or painted one of a value, the result's name is taken.

    Args:
        classes: What was painted so far.
        others: Of the result.
        labels: (Z, Y, X) what was painted so far.
    """
    joined = {entry.value: entry for entry in classes}
    for other in others:
        own = joined.setdefault(other.value, other)
        unnamed = own.name in (FIRST_NAME, f"class {own.value}") and own.name != other.name
        if unnamed and not (labels == own.value).any():
            joined[other.value] = replace(own, name=other.name)
    return list(joined.values())


def called_otherwise(value: int, name: str, other: str) -> bool:
    """Whether two people named a value and mean different things by it; a name that nobody chose is none."""
    unnamed = {FIRST_NAME.casefold(), f"class {value}"}
    names = {name.casefold(), other.casefold()}
    return len(names) > 1 and not names & unnamed


def free_value(entries: Iterable[ClassEntry]) -> int:
    """The smallest value that no class has."""
    taken = {entry.value for entry in entries}
    return next(value for value in range(1, len(taken) + 2) if value not in taken)


def add_class(session: Session, name: str = "") -> ClassEntry:
    """Add a class to what is painted, and take its brush."""
    value = free_value(session.classes)
    entry = ClassEntry(value, name or f"class {value}", default_color(value))
    session.set_classes([*session.classes, entry])
    session.pick_class(value)
    return entry


def remove_class(session: Session, value: int) -> None:
    """Remove a class that is not painted.

    Raises:
        UserError: If it is painted: removing strokes is left to the eraser.
    """
    if session.labels is not None and (count := int((session.labels.data == value).sum())):
        raise UserError(f"{count} pixels are painted with this class; erase or repaint them first")
    session.set_classes([entry for entry in session.classes if entry.value != value])
