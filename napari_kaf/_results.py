"""What finetunings on a volume gave: their history, the result that is shown, and taking it into the labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import UserError
from napari_kaf import _layers
from napari_kaf._classes import ClassEntry, called_otherwise, entries_of, joined_classes, values_in
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
        classes: What the values of the shown result are.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.store: RunStore | None = None
        self.runs: list[Run] = []
        self.shown: Run | None = None
        self.labels: NDArray[Any] | None = None
        self.classes: list[ClassEntry] = []

    def follow(self, store: RunStore | None) -> None:
        """Keep the runs of another volume from now on; a result that its layers show is the shown one."""
        self.store, self.shown, self.labels, self.classes = store, None, None, []
        self.runs = store.runs() if store is not None else []
        opened = self._session.opened
        if opened is None:
            return
        for layer in _layers.layers_with_role(self._session.viewer, "result", opened.layer):
            self.labels = _layers.stack(layer).copy()
            self.classes = entries_of(_layers.class_names(layer))
            self.shown = next((run for run in self.runs if run.key == _layers.made_by(layer)), None)

    def reload(self) -> None:
        """Read the history again after it changed."""
        self.runs = self.store.runs() if self.store is not None else []
        if self.shown is not None:
            self.shown = next((run for run in self.runs if run.key == self.shown.key), None)
        self._session.runs_changed.emit()

    def show(
        self,
        run: Run | None,
        labels: NDArray[Any] | None = None,
        class_names: Mapping[int, str] | None = None,
    ) -> None:
        """Show the result of a run, or labels of no run, in a layer of their own; or nothing.

        Args:
            run: The run, if it is the result of one.
            labels: (Z, Y, X); None takes those that were kept of the run.
            class_names: By value; None takes those of the run's model. What is painted keeps its own names.
        """
        session = self._session
        assert session.opened is not None
        assert self.store is not None
        if run is not None and labels is None:
            labels = self.store.labels(run)
        if run is not None and class_names is None:
            class_names = self.store.class_names(run)
        self.shown, self.labels, self.classes = run, labels, []
        if labels is None:
            _layers.remove(session.viewer, "result", session.opened.layer)
        else:
            drawn = {entry.value: entry for entry in session.classes}
            found = entries_of(class_names or {}, values_in(labels))
            self.classes = [replace(entry, color=drawn.get(entry.value, entry).color) for entry in found]
            _layers.show(
                session.viewer,
                session.opened,
                labels.copy(),
                "result",
                [drawn.get(entry.value, entry) for entry in self.classes],
                name="result",
                made_by=run.key if run is not None else "",
            )
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
            self.shown, self.labels, self.classes = None, None, []
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

        What was painted by hand stays, also when a later result is accepted over this one, and so do complete and
        empty slices. The shown slice, if it is untouched, takes all of it: somebody looks at it. Ctrl+Z takes it back
        in one step.

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
            session.new_labels(self.classes)
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
        where: dict[int, NDArray[np.bool_]] = {}
        by_hand = session.ledger.by_hand
        for z in taking:
            if states[z] is not Cell.ACCEPTED:
                looked_at = slices is None and states[z] is Cell.UNTOUCHED
                by_hand[z] = np.zeros_like(array[z], bool) if looked_at else array[z] != 0
            where[z] = ~by_hand[z] if z in by_hand else np.ones_like(array[z], bool)
        if taking:
            self._warn_of_other_names(array)
        classes = joined_classes(session.classes, self.classes, array)
        session.select_labels()  # where Ctrl+Z takes it back
        session.paint.accept(self.labels, where, session.ledger)
        if classes != session.classes:
            session.set_classes(classes)
        return len(taking)

    def _warn_of_other_names(self, drawn: NDArray[Any]) -> None:
        """Say so if a value is called otherwise in the result than where it is painted already."""
        assert self.labels is not None
        painted = values_in(drawn)
        found = {entry.value: entry.name for entry in self.classes}
        for entry in self._session.classes:
            other = found.get(entry.value, entry.name)
            if entry.value in painted and called_otherwise(entry.value, entry.name, other):
                self._session.warned.emit(
                    f"{entry.value} is {entry.name} in your labels and {other} in the result you accepted; if they are "
                    "not the same, Ctrl+Z takes it back"
                )
