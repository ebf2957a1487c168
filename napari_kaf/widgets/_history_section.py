"""The history of runs on a volume: compare, go back to, rename, save and delete them."""

from __future__ import annotations

from typing import Any

from napari.utils.notifications import show_error
from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QAbstractItemView,
    QFileDialog,
    QGridLayout,
    QHeaderView,
    QInputDialog,
    QMessageBox,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from kaf_model.config import SegmentConfig
from kaf_model.errors import UserError
from napari_kaf import _layers
from napari_kaf._agreement import agreement
from napari_kaf._classes import entries_of, values_in
from napari_kaf._paths import models_folder
from napari_kaf._runs import Run, RunStore
from napari_kaf._segment_task import OpenSource, SegmentOutcome, SegmentRequest, VolumeSegmented, segment_task
from napari_kaf._settings import settings
from napari_kaf.widgets._job_row import JobRow
from napari_kaf.widgets._panel import Life, answering, button, completed, heading, say, words
from napari_kaf.widgets._short_table import ShortTable

_COLUMNS = ("Run", "When", "Slices", "Steps", "Dice")
_MOST_ROWS = 5  # more are scrolled


class HistorySection(QWidget):
    """Every finetuning of the volume; nothing while there is none.

    Args:
        life: Of the panel.
        row: Shows the segmenting of a volume by a run that ended before it came to that.
    """

    def __init__(self, life: Life, row: JobRow) -> None:
        super().__init__()
        self.session, self._row = life.session, row
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(heading("Runs on this volume"))
        self.table = self._make_table()
        column.addWidget(self.table)
        grid = QGridLayout()
        grid.setSpacing(4)
        self.show_it = button("Show", "Go back to the selected run's result", self.show_selected)
        self.compare = button(
            "Compare",
            "Outline the selected run over the shown result, with their Dice",
            self.compare_selected,
        )
        self.rename = button("Rename…", "Give the selected run a name", self.rename_selected)
        self.save = button(
            "Save model…",
            "Copy the selected run's model to a file; in the folder of models it can be chosen for any volume",
            self.save_selected,
        )
        self.delete = button(
            "Delete…", "Delete the selected run, its model and its result", self.delete_selected
        )
        for place, widget in enumerate((self.show_it, self.compare, self.rename, self.save, self.delete)):
            grid.addWidget(widget, place // 3, place % 3)
        column.addLayout(grid)
        self.status = words()
        column.addWidget(self.status)
        life.listen(self.session.runs_changed, self.refresh)
        life.listen(self.session.volume_changed, lambda: say(self.status, ""))
        self.session.results.reload()  # a training whose panel was closed has ended since

    @property
    def selected(self) -> Run | None:
        """The selected run."""
        row, runs = self.table.currentRow(), self.session.results.runs
        return runs[len(runs) - 1 - row] if 0 <= row < len(runs) else None

    def refresh(self) -> None:
        """List the runs, newest first, with the shown one in bold."""
        before = self.table.currentRow()
        runs, shown = self.session.results.runs, self.session.results.shown
        self.setVisible(bool(runs))
        self.table.setRowCount(len(runs))
        for row, run in enumerate(reversed(runs)):
            for column, text in enumerate(run.cells()):
                item = QTableWidgetItem(text)
                item.setToolTip(run.summary())
                font = item.font()
                font.setBold(shown is not None and run.key == shown.key)
                item.setFont(font)
                if column > 1:
                    item.setTextAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
                self.table.setItem(row, column, item)
        if runs:
            self.table.selectRow(min(max(before, 0), len(runs) - 1))
        self._enable()

    @answering
    def show_selected(self, *_: Any) -> None:
        """Show the selected run's result; make it first if it was not made."""
        run, store = self.selected, self.session.results.store
        if run is None or store is None:
            return
        if store.has_result(run):
            self.session.results.show(run)
            say(self.status, "")
        else:
            self._make_result(run, store)

    def _make_result(self, run: Run, store: RunStore) -> None:
        opened = self.session.opened
        assert opened is not None
        request = SegmentRequest(
            store.model_path(run.key), SegmentConfig(), settings().device, [OpenSource(0, opened.volume)]
        )

        def made(report: Any) -> None:
            if isinstance(report, VolumeSegmented):
                try:
                    store.add(run, report.segmentation.labels)
                except UserError as error:
                    show_error(str(error))
                if self.session.works_on(opened):
                    self.session.results.reload()
                    self.session.results.show(run, report.segmentation.labels)

        def done(outcome: SegmentOutcome) -> None:
            if outcome.stopped:
                self._row.say(f"Stopped; Show makes the result of {run.name} anew.")
            elif self.session.works_on(opened):
                self._row.say(f"The result of {run.name} lies in its own layer.")
            else:
                self._row.say(f"The result of {run.name} is made; choose its volume and Show it.")

        self._row.run(
            "Segmenting",
            lambda control: segment_task(request, control),
            on_report=made,
            on_done=done,
        )

    @answering
    def compare_selected(self, *_: Any) -> None:
        """Outline the selected run and say how it agrees with the shown result."""
        run, session, results = self.selected, self.session, self.session.results
        if run is None or session.opened is None or results.store is None:
            return
        other = results.store.labels(run)
        classes = session.classes or entries_of(results.store.class_names(run), values_in(other))
        _layers.show(session.viewer, session.opened, other, "comparison", classes, name="comparison")
        if results.labels is None or results.shown is None:
            say(self.status, f"{run.name} is outlined; Show another run to compare it with.")
            return
        scores = agreement(results.labels, other, classes)
        told = ", ".join(f"{name} {dice:.3f}" for name, dice in scores.items())
        say(self.status, f"Dice of {run.name} (outlined) with {results.shown.name}: {told}")

    @answering
    def rename_selected(self, *_: Any) -> None:
        """Ask for a name."""
        run, store = self.selected, self.session.results.store
        if run is None or store is None:
            return
        name, given = QInputDialog.getText(self, "Rename run", "Name", text=run.name)
        if given:
            store.rename(run, name)
            self.session.results.reload()

    @answering
    def save_selected(self, *_: Any) -> None:
        """Ask where the model goes."""
        run, store = self.selected, self.session.results.store
        if run is None or store is None:
            return
        models_folder().mkdir(parents=True, exist_ok=True)
        name, _filter = QFileDialog.getSaveFileName(
            self,
            "Save model",
            str(models_folder() / f"{run.name}.safetensors"),
            "Checkpoints (*.safetensors)",
        )
        path = completed(self, name, (".safetensors",))
        if path is not None:
            store.save_model(run, path)
            self.session.runs_changed.emit()  # lists of models look again
            say(self.status, f"Model saved as {path}")

    @answering
    def delete_selected(self, *_: Any) -> None:
        """Delete after asking."""
        run = self.selected
        if run is None:
            return
        answer = QMessageBox.question(self, "Delete run", f"Delete {run.name} with its model and its result?")
        if answer == QMessageBox.StandardButton.Yes:
            self.session.results.delete(run)

    def _enable(self) -> None:
        for widget in (self.show_it, self.compare, self.rename, self.save, self.delete):
            widget.setEnabled(self.selected is not None)

    def _make_table(self) -> QTableWidget:
        table = ShortTable(_COLUMNS, _MOST_ROWS)
        table.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        table.setAccessibleName("Runs on this volume")
        table.setToolTip("Every run on this volume; Enter or a double click shows its result")
        header = table.horizontalHeader()
        assert header is not None
        header.setSectionResizeMode(QHeaderView.ResizeMode.ResizeToContents)
        header.setSectionResizeMode(0, QHeaderView.ResizeMode.Stretch)
        table.cellActivated.connect(self.show_selected)
        table.itemSelectionChanged.connect(self._enable)
        return table
