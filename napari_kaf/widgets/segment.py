"""Segmenting with a trained model: open volumes, or a folder to a folder."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QAbstractItemView,
    QCheckBox,
    QComboBox,
    QFileDialog,
    QFormLayout,
    QListWidget,
    QListWidgetItem,
    QPushButton,
    QTableWidget,
    QTableWidgetItem,
    QWidget,
)

from kaf_model.config import SegmentConfig
from kaf_model.errors import UserError
from kaf_model.evaluate import ClassScore, Scores
from napari_kaf import _layers
from napari_kaf._classes import entries_of
from napari_kaf._form import check_box, choice_box
from napari_kaf._segment_task import OpenSource, SegmentOutcome, SegmentRequest, VolumeSegmented, segment_task
from napari_kaf._settings import DEVICES, description, settings
from napari_kaf._snapshot import take_snapshot
from napari_kaf.widgets._job_row import JobRow
from napari_kaf.widgets._model_box import ModelBox
from napari_kaf.widgets._panel import Panel, answering, heading
from napari_kaf.widgets._path_row import FolderRow

if TYPE_CHECKING:
    import napari

_OPEN, _FOLDER = range(2)
_COLUMNS = ("Volume", "Class", "ml", "Dice", "HD95, mm", "Reference, ml")
_BESIDE = "the labels beside each volume"
_NONE = "none"
_PIECES = {
    "learned": "one where the labels had one",
    "all": "the largest of every class",
    "none": "all of them",
}
_ORIENTATIONS = {
    "best": "turned as the model knows them",
    "average": "turned, averaged over three angles",
    "fixed": "as they lie",
}


class SegmentWidget(Panel):
    """Model, volumes, options, Segment, and a table of what was found.

    Args:
        napari_viewer: Given by napari.
    """

    def __init__(self, napari_viewer: napari.Viewer) -> None:
        super().__init__(napari_viewer)
        self._sources: dict[int, _layers.OpenVolume] = {}
        self._rows: list[ClassScore] = []
        self.column.addWidget(heading("Model"))
        self.model = ModelBox(self.life, ("segmentation",), scratch=False)
        self.column.addWidget(self.model)
        self.column.addWidget(heading("What to segment"))
        self.source = QComboBox()
        self.source.addItems(["Volumes that are open", "A folder, into a folder"])
        self.source.setToolTip("Segment layers of this viewer, or all volumes of a folder")
        self.column.addWidget(self.source)
        self.column.addWidget(self._make_open())
        self.column.addWidget(self._make_folder())
        self.column.addWidget(heading("Options"))
        self.column.addLayout(self._make_options())
        self.column.addWidget(heading("Labelled volumes to go by"))
        self.column.addLayout(self._make_atlases())
        self.row = JobRow(self.life, "Segment", self.start)
        self.row.button.setToolTip("Segment every chosen volume; Cancel keeps those that are done")
        self.column.addWidget(self.row)
        self.scores = heading("Volumes and scores")
        self.column.addWidget(self.scores)
        self.table = QTableWidget(0, len(_COLUMNS))
        self.table.setHorizontalHeaderLabels(_COLUMNS)
        self.table.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.table.setTabKeyNavigation(False)
        self.table.setMinimumHeight(140)
        rows = self.table.verticalHeader()
        assert rows is not None
        rows.setVisible(False)
        self.table.setAccessibleName("Volumes and scores of each class")
        self.column.addWidget(self.table)
        self.csv = QPushButton("Save CSV…")
        self.csv.setToolTip("Write the table as comma-separated values")
        self.csv.setEnabled(False)
        self.csv.clicked.connect(self._save_csv)
        self.column.addWidget(self.csv)
        self.column.addStretch(1)
        self._show_table()
        self.source.currentIndexChanged.connect(self._show_source)
        self._offered: set[int] = set()
        for signal in (self.session.layers_changed, self.session.volume_changed):
            self.life.listen(signal, self.refresh)
        for signal in (self.session.ledger_changed, self.session.labels_changed, self.session.volume_changed):
            self.life.listen(signal, self._show_finished)
        self.session.poll()
        self.refresh()
        self._show_source()
        self._show_finished()

    def refresh(self) -> None:
        """List the open volumes; what was ticked stays ticked."""
        ticked = self._ticked()
        opened = self.session.opened
        if opened is not None and id(opened.layer) not in self._offered:
            self._offered.add(id(opened.layer))  # the volume that is worked on is ticked once
            ticked.add(id(opened.layer))
        self.layers.clear()
        for layer in _layers.image_layers(self.session.viewer):
            item = QListWidgetItem(layer.name)
            item.setData(Qt.ItemDataRole.UserRole, id(layer))
            tick = id(layer) in ticked
            item.setCheckState(Qt.CheckState.Checked if tick else Qt.CheckState.Unchecked)
            self.layers.addItem(item)
        if not self.layers.count():
            self.layers.addItem("No volume is open")

    def start(self) -> None:
        """Segment what was chosen.

        Raises:
            UserError: If something is missing.
        """
        choice = self.model.choice
        if choice is None or choice.path is None:
            raise UserError("there is no trained model yet; finetune one, or open a checkpoint")
        config = SegmentConfig(
            uncertainty=self.uncertainty.isChecked(),
            largest_component=self.pieces.currentData(),
            orientation=self.orientation.currentData(),
            flips=self.flips.isChecked(),
        )
        atlases = self._atlases()
        if self.source.currentIndex() == _OPEN:
            request = SegmentRequest(choice.path, config, self.device.currentText(), self._open_sources())
        else:
            request = self._folder_request(choice.path, config)
        request = replace(request, atlases=atlases)
        self._rows = []
        self.table.setRowCount(0)
        self._show_table()
        self.csv.setEnabled(False)
        self.row.run(
            "Segmenting",
            lambda control: segment_task(request, control),
            on_report=self._reported,
            on_done=self._done,
        )

    def _make_options(self) -> QFormLayout:
        form = QFormLayout()
        self.pieces = choice_box(SegmentConfig, "largest_component", _PIECES)
        self.orientation = choice_box(SegmentConfig, "orientation", _ORIENTATIONS)
        self.device = QComboBox()
        self.device.addItems(DEVICES)
        self.device.setCurrentText(settings().device)
        self.device.setToolTip(description("device"))
        self.device.currentTextChanged.connect(lambda name: setattr(settings(), "device", name))
        self.uncertainty = check_box(SegmentConfig, "uncertainty", "Uncertainty map")
        self.flips = check_box(SegmentConfig, "flips", "Average over mirrored slices")
        form.addRow("Pieces", self.pieces)
        form.addRow("Slices", self.orientation)
        form.addRow("Device", self.device)
        form.addRow(self.uncertainty)
        form.addRow(self.flips)
        return form

    def _make_atlases(self) -> QFormLayout:
        form = QFormLayout()
        self.atlas_images = FolderRow(
            "Folder of volumes that are labelled throughout, two or more, with slices at most two pixels apart: if "
            "they fit each other, they are registered to each volume, and what they bring is joined with the model's "
            "opinion",
            "optional",
        )
        self.atlas_labels = FolderRow(
            "Folder of the label maps of the labelled volumes, of the same names", "optional"
        )
        form.addRow("Volumes", self.atlas_images)
        form.addRow("Labels", self.atlas_labels)
        return form

    def _atlases(self) -> tuple[Path, Path] | None:
        images, labels = self.atlas_images.path, self.atlas_labels.path
        if images is None and labels is None:
            return None
        if images is None or labels is None:
            raise UserError(
                "of the labelled volumes to go by, choose the folder of volumes and that of their labels, or neither"
            )
        return images, labels

    def _show_table(self) -> None:
        there = self.table.rowCount() > 0
        for widget in (self.scores, self.table, self.csv):
            widget.setVisible(there)

    def _make_open(self) -> QWidget:
        self.open_page = QWidget()
        form = QFormLayout(self.open_page)
        form.setContentsMargins(0, 0, 0, 0)
        self.layers = QListWidget()
        self.layers.setFixedHeight(70)
        self.layers.setToolTip("Tick the volumes to segment")
        self.layers.setAccessibleName("Open volumes")
        self.reference = QComboBox()
        self.reference.addItems([_NONE, _BESIDE])
        self.reference.setToolTip("Labels to compare with: Dice and HD95 of each class")
        form.addRow(self.layers)
        form.addRow("Reference", self.reference)
        self.finished = QCheckBox()
        self.finished.setChecked(True)
        form.addRow(self.finished)
        self.reference.currentIndexChanged.connect(self._show_finished)
        return self.open_page

    def _make_folder(self) -> QWidget:
        self.folder_page = QWidget()
        form = QFormLayout(self.folder_page)
        form.setContentsMargins(0, 0, 0, 0)
        self.input = FolderRow("Folder of volumes to segment", "folder of volumes")
        self.output = FolderRow("Folder the label files are written into", "folder for the labels")
        self.references = FolderRow(
            "Folder of reference labels of the same names, if there are any", "optional"
        )
        form.addRow("From", self.input)
        form.addRow("Into", self.output)
        form.addRow("Reference", self.references)
        return self.folder_page

    def _ticked(self) -> set[int]:
        items = (self.layers.item(row) for row in range(self.layers.count()))
        return {
            item.data(Qt.ItemDataRole.UserRole)
            for item in items
            if item is not None and item.checkState() == Qt.CheckState.Checked
        }

    def _show_source(self, *_: Any) -> None:
        self.open_page.setVisible(self.source.currentIndex() == _OPEN)
        self.folder_page.setVisible(self.source.currentIndex() == _FOLDER)

    def _show_finished(self, *_: Any) -> None:
        """Say how many slices of the volume that is worked on are finished, and whether they can be used."""
        session = self.session
        there = session.opened is not None and session.labels is not None
        count = len(session.ledger.finished) if there else 0
        comparing = self.reference.currentText() == _BESIDE
        self.finished.setText(f"Use the {_slices(count)}" if count else "Use finished slices")
        self.finished.setEnabled(bool(count) and not comparing)
        if comparing:
            tip = "Not while the result is compared with labels: it would be compared with itself"
        elif count:
            assert session.opened is not None
            tip = (
                f"Complete and empty slices of {session.opened.layer.name} stay as you drew them, and what they "
                "show is carried to its other slices and joined with what the model says"
            )
        else:
            tip = "The volume that is worked on has no slice that is marked complete or empty"
        self.finished.setToolTip(tip)

    def _open_sources(self) -> list[OpenSource]:
        ticked = self._ticked()
        chosen = [layer for layer in _layers.image_layers(self.session.viewer) if id(layer) in ticked]
        if not chosen:
            raise UserError("no volume is ticked; tick at least one, or open one first")
        current = self.session.opened
        self._sources = {
            key: current if current is not None and current.layer is layer else _layers.open_volume(layer)
            for key, layer in enumerate(chosen)
        }
        sources = []
        for key, opened in self._sources.items():
            if not opened.spacing_known:
                raise UserError(
                    f"the voxel size of {opened.layer.name} is not known, and what is found and its millilitres "
                    "depend on it; choose the volume in Finetune and say its voxel size there"
                )
            reference = None
            if self.reference.currentText() == _BESIDE:
                drawn = _layers.own_labels(self.session.viewer, opened.layer)
                if not drawn:
                    raise UserError(
                        f"{opened.layer.name} has no label layer to compare with; choose no reference"
                    )
                of_file = [layer for layer in drawn if _layers.file_of(layer)]
                reference = _layers.stack((of_file or drawn)[0]).copy()
            worked_on = current is not None and current.layer is opened.layer
            use = worked_on and self.finished.isEnabled() and self.finished.isChecked()
            finished = take_snapshot(self.session) if use else None
            sources.append(OpenSource(key, opened.volume, reference, finished))
        return sources

    def _folder_request(self, model: Path, config: SegmentConfig) -> SegmentRequest:
        if self.input.path is None or self.output.path is None:
            raise UserError("choose the folder of volumes and the folder for the labels")
        if self.input.path.resolve() == self.output.path.resolve():
            raise UserError("the labels would lie among the volumes; choose another folder for them")
        return SegmentRequest(
            model,
            config,
            self.device.currentText(),
            folder=self.input.path,
            output=self.output.path,
            references=self.references.path,
        )

    def _reported(self, report: Any) -> None:
        if not isinstance(report, VolumeSegmented):
            return
        self._rows += report.rows
        self.csv.setEnabled(bool(self._rows))
        for score in report.rows:
            row = self.table.rowCount()
            self.table.insertRow(row)
            values = (score.prediction_ml, score.dice, score.hd95_mm, score.reference_ml)
            digits = (1, 3, 1, 1)
            texts = [score.volume, score.name, *map(_number, values, digits)]
            for column, text in enumerate(texts):
                self.table.setItem(row, column, QTableWidgetItem(text))
        self.table.resizeColumnsToContents()
        self._show_table()
        if report.key is not None:
            self._show(self._sources[report.key], report)

    def _show(self, opened: _layers.OpenVolume, report: VolumeSegmented) -> None:
        viewer, session = self.session.viewer, self.session
        if opened.layer not in viewer.layers:
            return
        if report.segmentation.uncertainty is not None:
            _layers.show(
                viewer,
                opened,
                report.segmentation.uncertainty.astype(np.float32),
                "uncertainty",
                name="uncertainty",
            )
        labels, names = report.segmentation.labels, report.class_names
        if session.works_on(opened):
            session.results.show(None, labels, names)
        else:
            _layers.show(viewer, opened, labels, "result", entries_of(names), name="result")

    def _done(self, outcome: SegmentOutcome) -> None:
        count = len({row.volume for row in outcome.scores.rows})
        told = (
            f"{'Stopped' if outcome.stopped else 'Finished'}: {count} {'volume' if count == 1 else 'volumes'}"
        )
        if outcome.finished:
            told += f"; {_slices(outcome.finished)} of yours kept and carried to the others"
        if outcome.registered:
            them = "it" if count == 1 else f"{outcome.registered} of them"
            told += f"; labelled ones were registered to {them}"
        if outcome.problems:
            told += f"; {'; '.join(outcome.problems[:3])}"
            told += f" and {more} more" if (more := len(outcome.problems) - 3) > 0 else ""
        self.row.say(told)

    @answering
    def _save_csv(self, *_: Any) -> None:
        name, _filter = QFileDialog.getSaveFileName(self, "Save CSV", "segmentation.csv", "CSV (*.csv)")
        if name:
            self.save_csv(Path(name))

    def save_csv(self, path: Path) -> None:
        """Write the table.

        Raises:
            UserError: If it cannot be written, or there is none.
        """
        if not self._rows:
            raise UserError("nothing was segmented yet")
        try:
            Scores(tuple(self._rows), ()).to_csv(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from error
        self.row.say(f"Table saved as {path}")


def _slices(count: int) -> str:
    return f"{count} finished {'slice' if count == 1 else 'slices'}"


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
