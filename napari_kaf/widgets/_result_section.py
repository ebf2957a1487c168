"""What a finetuning gave: accept it into the labels or reject it, and write the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from napari.utils.notifications import show_info
from qtpy.QtWidgets import QFileDialog, QHBoxLayout, QVBoxLayout, QWidget

from kaf_model.errors import UserError
from napari_kaf import _layers
from napari_kaf._keys import with_key
from napari_kaf._writer import write_and_compare
from napari_kaf.widgets._panel import Life, answering, button, completed, heading, say, words


class ResultSection(QWidget):
    """Accept, reject and Export."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self.session = life.session
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(heading("Result"))
        row = QHBoxLayout()
        self.accept = button("Accept slice", with_key("accept"), self.accept_slice)
        self.accept_whole = button("Accept all", with_key("accept_all"), self.accept_all)
        self.put_away = button(
            "Reject", with_key("reject") + "\nThat of a run stays in the history", self.reject
        )
        for widget in (self.accept, self.accept_whole, self.put_away):
            row.addWidget(widget)
        column.addLayout(row)
        self.export = button(
            "Export labels…",
            "Write your labels as NIfTI on the grid of the volume's file, read them back and compare",
            self.export_labels,
        )
        self.status = words()
        column.addWidget(self.export)
        column.addWidget(self.status)
        for signal in (self.session.runs_changed, self.session.labels_changed):
            life.listen(signal, self.refresh)
        life.listen(self.session.volume_changed, self._forget)
        self._forget()
        self.refresh()

    def refresh(self) -> None:
        """Show what can be done."""
        there = self.session.results.labels is not None
        for widget in (self.accept, self.accept_whole, self.put_away):
            widget.setEnabled(there)
        self.export.setEnabled(self.session.labels is not None)

    def _forget(self) -> None:
        """Say nothing more of another volume."""
        say(self.status, "")

    @answering
    def accept_slice(self, *_: Any) -> None:
        """Take the result on this slice into the labels."""
        z = self.session.slice
        self.session.results.accept()
        say(self.status, f"Slice {z} accepted; Ctrl+Z takes it back.")

    @answering
    def accept_all(self, *_: Any) -> None:
        """Take the result into the labels wherever they are not finished."""
        result = self.session.results.labels
        count = self.session.results.accept(range(len(result) if result is not None else 0))
        kept = len(self.session.ledger) - count
        stay = f"; {kept} complete or empty ones stay as you drew them" if kept else ""
        say(self.status, f"{count} slices accepted{stay}. Ctrl+Z takes it back.")

    @answering
    def reject(self, *_: Any) -> None:
        """Put the result away."""
        run = self.session.results.shown
        self.session.results.reject()
        again = "Propagate or Segment makes it again" if run is None else f"{run.name} stays in the history"
        say(self.status, f"Result put away; {again}.")

    @answering
    def export_labels(self, *_: Any) -> None:
        """Ask for a file, write it, read it back and say what came of it."""
        opened = self.session.opened
        if opened is None:
            return
        folder = opened.path.parent if opened.path is not None else Path.home()
        name, _filter = QFileDialog.getSaveFileName(
            self,
            "Export labels",
            str(folder / f"{opened.volume.name}_labels.nii.gz"),
            "NIfTI (*.nii.gz *.nii)",
        )
        path = completed(self, name, (".nii.gz", ".nii"))
        if path is not None:
            self.export_to(path)

    def export_to(self, path: Path) -> None:
        """Write the labels, compare, and say what came of it.

        Raises:
            UserError: If they cannot be written.
        """
        session = self.session
        if session.labels is None or session.opened is None:
            raise UserError("there are no labels to export; create a label layer first")
        if session.opened.path is not None and path.resolve() == session.opened.path.resolve():
            raise UserError("that is the file of the volume itself; choose another name")
        session.save()
        differences = write_and_compare(path, _layers.stack(session.labels), session.opened.volume)
        told = "; ".join(differences) or "same grid as source"
        say(self.status, f"{path.name}: {told}")
        show_info(f"{path}: {told}")
