"""The layer that is drawn on and its classes: names, colours, adding and removing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qtpy.QtCore import Qt
from qtpy.QtGui import QColor, QIcon, QPixmap
from qtpy.QtWidgets import (
    QAbstractItemView,
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
from napari_kaf.widgets._panel import Life, answering, heading, words

_COLOR, _NAME, _VALUE = range(3)


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
        self.table = self._make_table()
        column.addWidget(self.table)
        row = QHBoxLayout()
        self.add = QPushButton("Add class")
        self.add.setToolTip("Add a structure and take its brush; rename it by a double click")
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
        self.table.itemDoubleClicked.connect(self._double_clicked)
        self.table.itemSelectionChanged.connect(self._picked)
        for signal in (self.session.layers_changed, self.session.volume_changed, self.session.labels_changed):
            life.listen(signal, self.refresh)
        life.listen(self.session.classes_changed, self._show_classes)
        self.refresh()
        self._show_classes()

    def refresh(self) -> None:
        """Show the label layers on the grid of the volume."""
        opened, labels = self.session.opened, self.session.labels
        layers = _layers.labels_layers(self.session.viewer, opened.layer) if opened is not None else []
        self.box.clear()
        self.box.addItems([layer.name for layer in layers])
        self.box.setCurrentIndex(layers.index(labels) if labels is not None and labels in layers else -1)
        self.box.setEnabled(bool(layers))
        self.new.setEnabled(opened is not None)
        self.hint.setText(self._unusable() if opened is not None else "")
        self.hint.setVisible(bool(self.hint.text()))
        for widget in (self.table, self.add, self.drop):
            widget.setEnabled(labels is not None)

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
        ]
        if not others:
            return ""
        return f"Not on the grid of this volume {self.session.opened.volume.shape}: {', '.join(others)}"

    def _make_table(self) -> QTableWidget:
        table = QTableWidget(0, 3)
        table.setHorizontalHeaderLabels(["", "class", "value"])
        header = table.horizontalHeader()
        rows = table.verticalHeader()
        assert header is not None
        assert rows is not None
        header.setSectionResizeMode(_NAME, QHeaderView.ResizeMode.Stretch)
        header.resizeSection(_COLOR, 28)
        header.resizeSection(_VALUE, 50)
        rows.setVisible(False)
        table.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        table.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        table.setTabKeyNavigation(False)
        table.setFixedHeight(112)
        table.setAccessibleName("Classes")
        table.setToolTip(
            "Select a class to paint it; double-click its name to rename it, its colour to change it"
        )
        return table

    def _show_classes(self) -> None:
        self.table.blockSignals(True)
        self.table.setRowCount(len(self.session.classes))
        selected = self.session.labels.selected_label if self.session.labels is not None else 0
        for row, entry in enumerate(self.session.classes):
            swatch = QPixmap(16, 16)
            swatch.fill(QColor.fromRgbF(*entry.color))
            color = QTableWidgetItem(QIcon(swatch), "")
            color.setFlags(Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsSelectable)
            value = QTableWidgetItem(str(entry.value))
            value.setFlags(Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsSelectable)
            self.table.setItem(row, _COLOR, color)
            self.table.setItem(row, _NAME, QTableWidgetItem(entry.name))
            self.table.setItem(row, _VALUE, value)
            if entry.value == selected:
                self.table.selectRow(row)
        self.table.blockSignals(False)

    @answering
    def _chosen(self, index: int) -> None:
        assert self.session.opened is not None
        self.session.choose_labels(
            _layers.labels_layers(self.session.viewer, self.session.opened.layer)[index]
        )

    @answering
    def _new(self, *_: Any) -> None:
        self.session.new_labels()

    @answering
    def _add(self, *_: Any) -> None:
        self.session.add_class()
        self._show_classes()

    @answering
    def _drop(self, *_: Any) -> None:
        row = self.table.currentRow()
        if 0 <= row < len(self.session.classes):
            self.session.remove_class(self.session.classes[row].value)

    def _edited(self, item: QTableWidgetItem) -> None:
        if item.column() == _NAME:
            classes = list(self.session.classes)
            entry = classes[item.row()]
            classes[item.row()] = replace(entry, name=item.text().strip() or entry.name)
            self.session.set_classes(classes)

    def _double_clicked(self, item: QTableWidgetItem) -> None:
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
