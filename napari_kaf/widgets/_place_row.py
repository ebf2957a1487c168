"""The place that is looked at: picked on the canvas, or given as numbers."""

from __future__ import annotations

from typing import Any

from qtpy.QtWidgets import QHBoxLayout, QLabel, QPushButton, QSpinBox, QVBoxLayout, QWidget

from napari_kaf._exploration import Exploration
from napari_kaf.widgets._panel import Life, answering, words

_PICKING = "Clicks pick places; select your label layer, or press again, to go back to drawing."


class PlaceRow(QWidget):
    """A button that lets clicks pick, and the place."""

    def __init__(self, life: Life, exploration: Exploration) -> None:
        super().__init__()
        self.exploration = exploration
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        row = QHBoxLayout()
        self.pick = QPushButton("Pick a place")
        self.pick.setCheckable(True)
        self.pick.setToolTip(
            "Let clicks on the canvas pick a place. Your label layer and its tool stay as they are: nothing is "
            "painted meanwhile"
        )
        row.addWidget(self.pick, 1)
        self.y_box, self.x_box = QSpinBox(), QSpinBox()
        for name, box in (("y", self.y_box), ("x", self.x_box)):
            box.setKeyboardTracking(False)
            box.setToolTip(f"{name} of the place on the shown slice, in voxels")
            box.valueChanged.connect(self._typed)
            row.addWidget(QLabel(name))
            row.addWidget(box)
        column.addLayout(row)
        self.told = words()
        column.addWidget(self.told)
        self.pick.clicked.connect(self._clicked)
        life.listen(exploration.picking.changed, self._show)
        life.listen(exploration.place_changed, self._show)
        life.listen(exploration.slice_changed, self._show)
        life.listen(exploration.network_changed, self._show)
        self._show()

    def _show(self, *_: Any) -> None:
        exploration = self.exploration
        opened, place = exploration.opened, exploration.place
        self.setEnabled(opened is not None)
        self.pick.setChecked(exploration.picking.on)
        for axis, box in enumerate((self.y_box, self.x_box), start=1):
            box.blockSignals(True)
            box.setMaximum(opened.volume.shape[axis] - 1 if opened is not None else 0)
            box.setValue(round(place[axis]) if place is not None else box.maximum() // 2)
            box.blockSignals(False)
        told = []
        if place is not None:
            z, shown = round(place[0]), exploration.session.slice
            elsewhere = "" if z == shown else f"; the slice you see is {shown}"
            told.append(f"Place: slice {z}, y {place[1]:.0f}, x {place[2]:.0f}{elsewhere}.")
        if exploration.picking.on:
            told.append(_PICKING)
        self.told.setText(" ".join(told))
        self.told.setVisible(bool(told))

    def _typed(self, *_: Any) -> None:
        z = float(self.exploration.session.slice)
        self.exploration.pick((z, float(self.y_box.value()), float(self.x_box.value())))

    @answering
    def _clicked(self, wanted: bool) -> None:
        if wanted:
            self.exploration.picking.start()
        else:
            self.exploration.picking.stop()
