"""What finetunings on a volume gave: their history, the result that is shown, and taking it into the labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import UserError
from napari_kaf import _layers
from napari_kaf._ledger import FINISHED, Cell
from napari_kaf._marking import shown_slice
from napari_kaf._runs import Run, RunStore

if TYPE_CHECKING:
    from napari_kaf._session import Session


class Results:
    """Runs and the shown result of a session.

    Args:
        session: Told by its `runs_changed` what changes here.

    Attributes:
        store: Where the runs on the volume are kept, or None without a volume.
        runs: All of them, oldest first.
        shown: The run whose result is shown; None also while one without a run is.
        labels: (Z, Y, X) of the shown result.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.store: RunStore | None = None
        self.runs: list[Run] = []
        self.shown: Run | None = None
        self.labels: NDArray[Any] | None = None

    def follow(self, store: RunStore | None) -> None:
        """Keep the runs of another volume from now on."""
        self.store, self.shown, self.labels = store, None, None
        self.runs = store.runs() if store is not None else []

    def reload(self) -> None:
        """Read the history again after it changed."""
        self.runs = self.store.runs() if self.store is not None else []
        if self.shown is not None:
            self.shown = next((run for run in self.runs if run.key == self.shown.key), None)
        self._session.runs_changed.emit()

    def show(self, run: Run | None, labels: NDArray[Any] | None = None) -> None:
        """Show the result of a run, or labels of no run, in a layer of their own; or nothing."""
        session = self._session
        assert session.opened is not None
        assert self.store is not None
        if run is not None and labels is None:
            labels = self.store.labels(run)
        self.shown, self.labels = run, labels
        if labels is None:
            _layers.remove(session.viewer, "result", session.opened.layer)
        else:
            classes = session.classes
            _layers.show(session.viewer, session.opened, labels.copy(), "result", classes, name="result")
        session.show_predicted()
        session.runs_changed.emit()

    def delete(self, run: Run) -> None:
        """Remove a run with its model and its result."""
        assert self.store is not None
        if self.shown is not None and self.shown.key == run.key:
            self.show(None)
        self.store.delete(run)
        self.reload()

    def forget_removed_layer(self) -> None:
        """Take in that the layer of the result may have been deleted."""
        session = self._session
        if session.opened is None or self.labels is None:
            return
        if not _layers.layers_with_role(session.viewer, "result", session.opened.layer):
            self.shown, self.labels = None, None
            session.show_predicted()
            session.runs_changed.emit()

    def predicted(self) -> list[int]:
        """Slices on which the shown result has something."""
        return [] if self.labels is None else np.flatnonzero(self.labels.any(axis=(1, 2))).tolist()

    def reject(self) -> None:
        """Put the shown result away; its run stays in the history.

        Raises:
            UserError: If there is none.
        """
        if self.labels is None:
            raise UserError("there is no result to reject")
        self.show(None)

    def accept(self, slices: Iterable[int] | None = None) -> int:
        """Take the shown result into the labels, on the shown slice or the given ones.

        Untouched and accepted slices take all of it, partial ones only where nothing is painted; complete
        and empty ones are the user's and stay as they are. Ctrl+Z takes it back in one step.

        Returns:
            How many slices took it.

        Raises:
            UserError: If there is no result or no layer for it, nothing could be accepted, or slices are not shown
                one by one.
        """
        session = self._session
        if self.labels is None:
            raise UserError("there is no result to accept; click Finetune first")
        if session.labels is None:
            session.new_labels()
        session.poll()
        assert session.labels is not None
        assert session.paint is not None
        states = session.ledger.states
        wanted = [shown_slice(session)] if slices is None else list(slices)
        taking = [z for z in wanted if states[z] not in FINISHED]
        if slices is None and not taking:
            z = wanted[0]
            raise UserError(
                f"slice {z} is marked {states[z]}, so it stays as you drew it; "
                "mark it untouched to take the result instead"
            )
        array = _layers.stack(session.labels)
        where = np.zeros(array.shape, bool)
        for z in taking:
            where[z] = (array[z] == 0) if states[z] is Cell.PARTIAL else True
        session.paint.accept(self.labels, where, taking, session.ledger)
        return len(taking)
