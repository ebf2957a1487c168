"""The ledger as a strip: one cell a slice, a click goes there."""

from __future__ import annotations

from typing import Any

from qtpy.QtCore import QRectF, QSize, Qt, Signal  # type: ignore[attr-defined]
from qtpy.QtGui import QColor, QKeyEvent, QMouseEvent, QPainter, QPen
from qtpy.QtWidgets import QSizePolicy, QToolTip, QWidget

from napari_kaf._ledger import MEANING, Cell, Ledger

COLORS = {
    Cell.UNTOUCHED: QColor(128, 128, 128, 70),
    Cell.PARTIAL: QColor(240, 200, 60),
    Cell.COMPLETE: QColor(60, 175, 100),
    Cell.EMPTY: QColor(90, 150, 220),
    Cell.PREDICTED: QColor(170, 110, 200),
    Cell.ACCEPTED: QColor(40, 190, 190),
}
_LETTERS = {Cell.PARTIAL: "P", Cell.COMPLETE: "C", Cell.EMPTY: "E", Cell.PREDICTED: "?", Cell.ACCEPTED: "A"}
_LETTER_WIDTH = 11  # pixels a cell needs to bear its letter


def legend(ledger: Ledger) -> str:
    """How many slices are in which state, each with its colour, as HTML."""
    parts = []
    for cell in Cell:
        if count := sum(ledger.cell(z) is cell for z in range(len(ledger))):
            color = COLORS[cell]
            solid = "#808080" if color.alpha() < 255 else color.name()
            parts.append(f"<span style='color:{solid}'>■</span> {count} {cell}")
    return "&nbsp;&nbsp; ".join(parts)


class LedgerStrip(QWidget):
    """Shows a ledger; emits the slice that was clicked, or reached with the arrow keys."""

    chosen = Signal(int)

    def __init__(self) -> None:
        super().__init__()
        self._ledger = Ledger(0)
        self._current = 0
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setMouseTracking(True)
        self.setAccessibleName("Slice ledger")

    def sizeHint(self) -> QSize:
        """Wide, and as high as a button."""
        return QSize(300, 30)

    def set_ledger(self, ledger: Ledger, current: int) -> None:
        """Show a ledger with the current slice marked."""
        self._ledger, self._current = ledger, current
        self.update()

    def slice_at(self, x: float) -> int:
        """The slice under a horizontal position in pixels."""
        count = max(len(self._ledger), 1)
        return min(max(int(x * count / max(self.width(), 1)), 0), count - 1)

    def cell_rect(self, z: int) -> QRectF:
        """Where a slice's cell is."""
        count = max(len(self._ledger), 1)
        left, right = self.width() * z / count, self.width() * (z + 1) / count
        gap = 1 if right - left > 4 else 0
        return QRectF(left, 3, right - left - gap, self.height() - 6)

    def paintEvent(self, event: Any) -> None:
        """Draw the cells."""
        painter = QPainter(self)
        text = self.palette().color(self.foregroundRole())
        if not len(self._ledger):
            painter.setPen(text)
            painter.drawText(self.rect(), Qt.AlignmentFlag.AlignCenter, "no label layer yet")
            return
        for z in range(len(self._ledger)):
            cell, rect = self._ledger.cell(z), self.cell_rect(z)
            painter.fillRect(rect, COLORS[cell])
            if cell in _LETTERS and rect.width() >= _LETTER_WIDTH:
                painter.setPen(QColor(0, 0, 0))
                painter.drawText(rect, Qt.AlignmentFlag.AlignCenter, _LETTERS[cell])
        painter.setPen(QPen(text, 2))
        current = self.cell_rect(self._current)
        current.setWidth(max(current.width(), 3))
        painter.drawRect(current.adjusted(0, -1.5, 0, 1.5))
        if self.hasFocus():
            painter.setPen(QPen(self.palette().highlight().color(), 1, Qt.PenStyle.DotLine))
            painter.drawRect(self.rect().adjusted(0, 0, -1, -1))

    def mousePressEvent(self, event: QMouseEvent | None) -> None:
        """Go to the slice under the pointer."""
        if event is not None and len(self._ledger):
            self.chosen.emit(self.slice_at(event.position().x()))

    def mouseMoveEvent(self, event: QMouseEvent | None) -> None:
        """Say what the cell under the pointer is; with the button down, go there."""
        if event is None or not len(self._ledger):
            return
        z = self.slice_at(event.position().x())
        if event.buttons() & Qt.MouseButton.LeftButton:
            self.chosen.emit(z)
        cell = self._ledger.cell(z)
        QToolTip.showText(event.globalPosition().toPoint(), f"slice {z}: {cell}\n{MEANING[cell]}", self)

    def keyPressEvent(self, event: QKeyEvent | None) -> None:
        """Left and right arrows step through the slices."""
        if event is None:
            return
        step = {Qt.Key.Key_Left: -1, Qt.Key.Key_Right: 1}.get(Qt.Key(event.key()), 0)
        if step and 0 <= self._current + step < len(self._ledger):
            self.chosen.emit(self._current + step)
        elif not step:
            super().keyPressEvent(event)
