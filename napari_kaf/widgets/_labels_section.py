"""The layer that is drawn on and its classes: names, colours, adding and removing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qtpy.QtCore import Qt
from qtpy.QtGui import QColor, QIcon, QPixmap
from qtpy.QtWidgets import (
    QColorDialog,
    QComboBox,
    QHBoxLayout,
    QHeaderView,
    QPushButton,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_kaf import _layers
from napari_kaf._classes import ClassEntry, add_class, remove_class
from napari_kaf.widgets._panel import Life, answering, heading, say, words
from napari_kaf.widgets._short_table import ShortTable

_COLOR, _NAME, _VALUE = range(3)
_MOST_ROWS = 6  # more are scrolled


class LabelsSection(QWidget):
    """Label layer and class list; the selected class is what the brush paints."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self.session = life.session
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(heading("Labels"))
        row = QHBoxLayout()
        self.box = QComboBox()
        self.box.setAccessibleName("Label layer")
        self.box.setToolTip("The labels layer that you draw on; the result never goes over it by itself")
        self.new = QPushButton("New labels")
        self.new.setToolTip("Make a labels layer on the grid of the volume and take the brush")
        row.addWidget(self.box, 1)
        row.addWidget(self.new)
        column.addLayout(row)
        self.hint = words()
        column.addWidget(self.hint)
        self.unsaved = words()
        column.addWidget(self.unsaved)
        self.table = self._make_table()
        column.addWidget(self.table)
        row = QHBoxLayout()
        self.add = QPushButton("Add class")
        self.add.setToolTip("Add a structure and take its brush; a double click or F2 renames it")
        self.drop = QPushButton("Remove class")
        self.drop.setToolTip("Remove the selected class; one that is painted has to be erased first")
        row.addWidget(self.add)
        row.addWidget(self.drop)
        column.addLayout(row)
        self.box.activated.connect(self._chosen)
        self.new.clicked.connect(self._new)
        self.add.clicked.connect(self._add)
        self.drop.clicked.connect(self._drop)
        self.table.itemChanged.connect(self._edited)
        self.table.itemActivated.connect(self._activated)
        self.table.itemSelectionChanged.connect(self._picked)
        for signal in (self.session.layers_changed, self.session.volume_changed, self.session.labels_changed):
            life.listen(signal, self.refresh)
        life.listen(self.session.classes_changed, self._show_classes)
        life.listen(self.session.unsaved_changed, self._show_unsaved)
        self.refresh()
        self._show_classes()
        self._show_unsaved()

    def refresh(self) -> None:
        """Show the label layers on the grid of the volume."""
        opened, labels = self.session.opened, self.session.labels
        layers = _layers.labels_layers(self.session.viewer, opened.layer) if opened is not None else []
        self.box.clear()
        self.box.addItems([layer.name for layer in layers])
        self.box.setCurrentIndex(layers.index(labels) if labels is not None and labels in layers else -1)
        self.box.setEnabled(bool(layers))
        self.new.setEnabled(opened is not None)
        say(self.hint, self._unusable() if opened is not None else "")
        for widget in (self.table, self.add, self.drop):
            widget.setEnabled(labels is not None)

    def _show_unsaved(self) -> None:
        problem = self.session.unsaved
        say(self.unsaved, f"⚠ {problem[:1].upper()}{problem[1:]}" if problem else "")

    def _unusable(self) -> str:
        """What to say of label layers that lie on another grid."""
        from napari.layers import Labels

        assert self.session.opened is not None
        usable = _layers.labels_layers(self.session.viewer, self.session.opened.layer)
        others = [
            f"{layer.name} {tuple(layer.data.shape)}"
            for layer in self.session.viewer.layers
            if isinstance(layer, Labels)
            and _layers.role_of(layer) in (None, "labels")
            and layer not in usable
            and _layers.belongs_to(self.session.viewer, layer, self.session.opened.layer)
        ]
        if not others:
            return ""
        return f"Not on the grid of this volume {self.session.opened.volume.shape}: {', '.join(others)}"

    def _make_table(self) -> QTableWidget:
        table = ShortTable(["", "class", "value"], _MOST_ROWS)
        header = table.horizontalHeader()
        assert header is not None
        header.setSectionResizeMode(_NAME, QHeaderView.ResizeMode.Stretch)
        header.resizeSection(_COLOR, 28)
        header.resizeSection(_VALUE, 56)
        table.setAccessibleName("Classes")
        table.setToolTip(
            "Select a class to paint it; double-click its name (or F2) to rename it, its colour (or Enter) to change it"
        )
        return table

    def _show_classes(self) -> None:
        """Show the classes; cells that are right already are left alone, one of them may be being edited."""
        classes = self.session.classes
        shown = [_values(self.table, row) for row in range(self.table.rowCount())]
        self.table.blockSignals(True)
        self.table.setRowCount(len(classes))
        for row, entry in enumerate(classes):
            color = QColor.fromRgbF(*entry.color)
            if row >= len(shown) or shown[row] != (color.name(), entry.name, str(entry.value)):
                self._fill_row(row, color, entry)
        self._show_brush()
        self.table.blockSignals(False)

    def _fill_row(self, row: int, color: QColor, entry: ClassEntry) -> None:
        swatch = QPixmap(16, 16)
        swatch.fill(color)
        items = (QTableWidgetItem(QIcon(swatch), ""), QTableWidgetItem(entry.name), QTableWidgetItem())
        items[_COLOR].setData(Qt.ItemDataRole.UserRole, color.name())
        items[_VALUE].setText(str(entry.value))
        for column in (_COLOR, _VALUE):
            items[column].setFlags(Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsSelectable)
        for column, item in enumerate(items):
            self.table.setItem(row, column, item)

    def _show_brush(self) -> None:
        """Select the class that the brush paints, unless it is selected already."""
        labels = self.session.labels
        values = [entry.value for entry in self.session.classes]
        if labels is None or labels.selected_label not in values:
            self.table.clearSelection()
        elif self.table.currentRow() != (row := values.index(labels.selected_label)):
            self.table.setCurrentCell(row, _NAME)
        elif not self.table.selectedItems():
            self.table.selectRow(row)

    @answering
    def _chosen(self, index: int) -> None:
        assert self.session.opened is not None
        self.session.choose_labels(
            _layers.labels_layers(self.session.viewer, self.session.opened.layer)[index]
        )
        self.session.select_labels()

    @answering
    def _new(self, *_: Any) -> None:
        self.session.new_labels()

    @answering
    def _add(self, *_: Any) -> None:
        add_class(self.session)
        self._show_classes()

    @answering
    def _drop(self, *_: Any) -> None:
        row = self.table.currentRow()
        if 0 <= row < len(self.session.classes):
            remove_class(self.session, self.session.classes[row].value)

    def _edited(self, item: QTableWidgetItem) -> None:
        if item.column() == _NAME:
            classes = list(self.session.classes)
            entry = classes[item.row()]
            classes[item.row()] = replace(entry, name=item.text().strip() or entry.name)
            self.session.set_classes(classes)

    def _activated(self, item: QTableWidgetItem) -> None:
        if item.column() != _COLOR:
            return
        classes = list(self.session.classes)
        entry = classes[item.row()]
        chosen = QColorDialog.getColor(QColor.fromRgbF(*entry.color), self, f"Colour of {entry.name}")
        if chosen.isValid():
            color = (chosen.redF(), chosen.greenF(), chosen.blueF(), 1.0)
            classes[item.row()] = replace(entry, color=color)
            self.session.set_classes(classes)

    def _picked(self) -> None:
        row = self.table.currentRow()
        if 0 <= row < len(self.session.classes):
            self.session.pick_class(self.session.classes[row].value)


def _values(table: QTableWidget, row: int) -> tuple[str, ...]:
    """Colour, name and value that a row shows."""
    color, name, value = (table.item(row, column) for column in (_COLOR, _NAME, _VALUE))
    assert color is not None
    assert name is not None
    assert value is not None
    return str(color.data(Qt.ItemDataRole.UserRole)), name.text(), value.text()
