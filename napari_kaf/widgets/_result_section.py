"""What a finetuning gave: accept, reject, export, and the history of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from napari.utils.notifications import show_info
from qtpy.QtWidgets import (
    QFileDialog,
    QGridLayout,
    QHBoxLayout,
    QInputDialog,
    QListWidget,
    QMessageBox,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from kaf_model.errors import UserError
from napari_kaf import _layers
from napari_kaf._agreement import agreement
from napari_kaf._keys import with_key
from napari_kaf._runs import Run
from napari_kaf._writer import write_and_compare
from napari_kaf.widgets._panel import Life, answering, heading, words


class ResultSection(QWidget):
    """Accept and reject, the runs so far, and Export."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self.session = life.session
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(heading("Result"))
        row = QHBoxLayout()
        self.accept = _button("Accept slice", with_key("accept"), self.accept_slice)
        self.accept_whole = _button("Accept all", with_key("accept_all"), self.accept_all)
        self.put_away = _button("Reject", with_key("reject") + "\nThe run stays in the history", self.reject)
        for button in (self.accept, self.accept_whole, self.put_away):
            row.addWidget(button)
        column.addLayout(row)
        self.history = QListWidget()
        self.history.setFixedHeight(84)
        self.history.setAccessibleName("History of runs")
        self.history.setToolTip("Every run on this volume; Enter or a double click shows its result")
        self.history.itemActivated.connect(self.show_selected)
        self.history.itemSelectionChanged.connect(self._enable)
        column.addWidget(self.history)
        grid = QGridLayout()
        grid.setSpacing(4)
        self.show_it = _button("Show", "Go back to the selected run's result", self.show_selected)
        self.compare = _button(
            "Compare", "Outline the selected run beside the shown result", self.compare_selected
        )
        self.rename = _button("Rename", "Give the selected run a name", self.rename_selected)
        self.save = _button("Save model…", "Copy the selected run's model to a file", self.save_selected)
        self.delete = _button(
            "Delete", "Delete the selected run, its model and its result", self.delete_selected
        )
        self.export = _button(
            "Export labels…",
            "Write your labels as NIfTI on the grid of the volume's file",
            self.export_labels,
        )
        places = (self.show_it, self.compare, self.rename, self.save, self.delete, self.export)
        for place, button in enumerate(places):
            grid.addWidget(button, place // 3, place % 3)
        column.addLayout(grid)
        self.status = words()
        column.addWidget(self.status)
        for signal in (self.session.runs_changed, self.session.labels_changed):
            life.listen(signal, self.refresh)
        self.refresh()

    def refresh(self) -> None:
        """List the runs, newest first, with the shown one marked."""
        row = self.history.currentRow()
        self.history.clear()
        shown = self.session.results.shown
        for run in reversed(self.session.runs):
            mark = "▶ " if shown is not None and run.key == shown.key else ""
            self.history.addItem(mark + run.summary())
        if self.session.runs:
            self.history.setCurrentRow(min(max(row, 0), len(self.session.runs) - 1))
        self._enable()

    @property
    def selected(self) -> Run | None:
        """The selected run."""
        row = self.history.currentRow()
        return self.session.runs[len(self.session.runs) - 1 - row] if row >= 0 else None

    def _enable(self) -> None:
        there = self.session.result_labels is not None
        for button in (self.accept, self.accept_whole, self.put_away):
            button.setEnabled(there)
        for button in (self.show_it, self.compare, self.rename, self.save, self.delete):
            button.setEnabled(self.selected is not None)
        self.export.setEnabled(self.session.labels is not None)

    @answering
    def accept_slice(self, *_: Any) -> None:
        """Take the result on this slice into the labels."""
        z = self.session.slice
        self.session.results.accept()
        self.status.setText(f"Slice {z} accepted; Ctrl+Z takes it back.")

    @answering
    def accept_all(self, *_: Any) -> None:
        """Take the result into the labels wherever they are not finished."""
        count = self.session.results.accept(
            range(len(self.session.result_labels if self.session.result_labels is not None else ()))
        )
        kept = len(self.session.ledger) - count
        self.status.setText(
            f"{count} slices accepted; {kept} complete or empty ones stay as you drew them. Ctrl+Z takes it back."
        )

    @answering
    def reject(self, *_: Any) -> None:
        """Put the result away."""
        self.session.results.reject()
        self.status.setText("Result put away; its run is in the history.")

    @answering
    def show_selected(self, *_: Any) -> None:
        """Show the selected run's result."""
        if self.selected is not None:
            self.session.results.show(self.selected)

    @answering
    def compare_selected(self, *_: Any) -> None:
        """Outline the selected run and say how it agrees with the shown result."""
        run, session = self.selected, self.session
        if run is None or session.opened is None or session.results.store is None:
            return
        other = session.results.store.labels(run)
        _layers.show(session.viewer, session.opened, other, "comparison", session.classes, name="comparison")
        if session.result_labels is None or session.results.shown is None:
            self.status.setText(f"{run.name} is outlined; Show another run to compare it with.")
            return
        scores = agreement(session.result_labels, other, session.classes)
        told = ", ".join(f"{name} {dice:.3f}" for name, dice in scores.items())
        self.status.setText(f"Dice of {run.name} (outlined) with {session.results.shown.name}: {told}")

    @answering
    def rename_selected(self, *_: Any) -> None:
        """Ask for a name."""
        run = self.selected
        if run is None or self.session.results.store is None:
            return
        name, given = QInputDialog.getText(self, "Rename run", "Name", text=run.name)
        if given:
            self.session.results.store.rename(run, name)
            self.session.results.reload()

    @answering
    def save_selected(self, *_: Any) -> None:
        """Ask where the model goes."""
        run = self.selected
        if run is None or self.session.results.store is None:
            return
        name, _filter = QFileDialog.getSaveFileName(
            self, "Save model", f"{run.name}.safetensors", "Checkpoints (*.safetensors)"
        )
        if name:
            path = Path(name) if name.endswith(".safetensors") else Path(f"{name}.safetensors")
            self.session.results.store.save_model(run, path)
            self.status.setText(f"Model saved as {path}")

    @answering
    def delete_selected(self, *_: Any) -> None:
        """Delete after asking."""
        run = self.selected
        if run is None or self.session.results.store is None:
            return
        answer = QMessageBox.question(self, "Delete run", f"Delete {run.name} with its model and its result?")
        if answer == QMessageBox.StandardButton.Yes:
            if self.session.results.shown is not None and self.session.results.shown.key == run.key:
                self.session.results.show(None)
            self.session.results.store.delete(run)
            self.session.results.reload()

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
        if name:
            self.export_to(Path(name if name.endswith((".nii", ".nii.gz")) else f"{name}.nii.gz"))

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
        session.flush()
        differences = write_and_compare(path, _layers.stack(session.labels), session.opened.volume)
        told = "; ".join(differences) or "same grid as source"
        self.status.setText(f"{path.name}: {told}")
        show_info(f"{path}: {told}")


def _button(text: str, tip: str, slot: Any) -> QPushButton:
    button = QPushButton(text)
    button.setToolTip(tip)
    button.clicked.connect(slot)
    return button
