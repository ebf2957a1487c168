"""The slice ledger: what a person has said of each slice, and what that means for training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from psygnal import Signal


class Cell(StrEnum):
    """State of one slice."""

    UNTOUCHED = "untouched"
    PARTIAL = "partial"
    COMPLETE = "complete"
    EMPTY = "empty"
    PREDICTED = "predicted"
    ACCEPTED = "accepted"


MEANING = {
    Cell.UNTOUCHED: "nothing was said of it; what is painted on it is not used for training",
    Cell.PARTIAL: "only what is painted is known; unpainted pixels are not taken for background",
    Cell.COMPLETE: "everything is painted; unpainted pixels count as background",
    Cell.EMPTY: "looked at and nothing is there; all of it counts as background",
    Cell.PREDICTED: "untouched, and the shown result has something to accept or reject; used like untouched",
    Cell.ACCEPTED: "a result you took into your labels; not trained on until you mark it complete, or correct it "
    "by hand, which makes it complete",
}
FINISHED = (Cell.COMPLETE, Cell.EMPTY)
"""States of slices of which everything is known."""

_TRAINED_ON = (Cell.PARTIAL, *FINISHED)


class Ledger:
    """State of each slice of a volume.

    Attributes:
        changed: Emitted after any change.
        by_hand: Of accepted slices, where (Y, X) somebody had painted before.
    """

    changed = Signal()

    def __init__(
        self,
        num_slices: int,
        states: Sequence[str] = (),
        by_hand: Mapping[int, NDArray[np.bool_]] | None = None,
    ) -> None:
        self._states = [Cell(state) for state in states] or [Cell.UNTOUCHED] * num_slices
        if len(self._states) != num_slices:
            raise ValueError(f"a ledger of {num_slices} slices needs as many states, got {len(self._states)}")
        self._predicted: frozenset[int] = frozenset()
        self.by_hand = dict(by_hand or {})

    def __len__(self) -> int:
        return len(self._states)

    def cell(self, z: int) -> Cell:
        """State of a slice as it is shown."""
        if self._states[z] is Cell.UNTOUCHED and z in self._predicted:
            return Cell.PREDICTED
        return self._states[z]

    @property
    def states(self) -> tuple[Cell, ...]:
        """What the user said of each slice; never PREDICTED."""
        return tuple(self._states)

    @property
    def finished(self) -> list[int]:
        """The slices of which everything is known."""
        return [z for z, state in enumerate(self._states) if state in FINISHED]

    @property
    def predicted(self) -> frozenset[int]:
        """Slices of which the shown result says something."""
        return self._predicted

    def mark(self, slices: Iterable[int], state: Cell) -> None:
        """Say what slices are."""
        for z in slices:
            self._states[z] = state
        self.changed.emit()

    def after_paint(self, z: int, has_paint: bool) -> Cell:
        """What a slice is after the paint on it changed.

        A complete slice stays complete, and an accepted result that is corrected becomes it: who mends a slice
        has looked at all of it. Any other is partial while something is painted, else untouched.
        """
        if self._states[z] is Cell.COMPLETE:
            return Cell.COMPLETE
        painted = Cell.COMPLETE if self._states[z] is Cell.ACCEPTED else Cell.PARTIAL
        return painted if has_paint else Cell.UNTOUCHED

    def restate(self, states: Mapping[int, Cell]) -> None:
        """Set what slices are, by slice."""
        if any(self._states[z] is not state for z, state in states.items()):
            for z, state in states.items():
                self._states[z] = state
            self.changed.emit()

    def set_predicted(self, slices: Iterable[int]) -> None:
        """Tell which slices the shown result says something of."""
        self._predicted = frozenset(slices)
        self.changed.emit()

    def training(self) -> dict[int, str]:
        """The slices to train on and what their labels mean, in the engine's words."""
        return {z: str(state) for z, state in enumerate(self._states) if state in _TRAINED_ON}

    def labelled_after(self, z: int, step: int) -> int | None:
        """The next labelled slice in a direction (1 or -1), or None."""
        along = range(z + step, len(self) if step > 0 else -1, step)
        return next((other for other in along if self._states[other] is not Cell.UNTOUCHED), None)
