"""Live curves of named values against the step, redrawn at most a few times a second."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any

import pyqtgraph
from qtpy.QtCore import Qt, QTimer
from qtpy.QtWidgets import QVBoxLayout, QWidget

from napari_kaf.widgets._panel import say, words

_REDRAW = 400  # milliseconds; each time the whole window is composed anew, canvas and all
_PENS = ("#e69f00", "#56b4e9", "#00b37a", "#d55e00", "#cc79a7", "#f0e442")
_MOST_POINTS = 2000  # older ones are thinned out


class LiveCurve(QWidget):
    """A plot that grows while a training runs.

    Args:
        quantity: Name of the vertical axis.
    """

    def __init__(self, quantity: str = "loss") -> None:
        super().__init__()
        self._points: dict[str, tuple[list[float], list[float]]] = {}
        self._lines: dict[str, Any] = {}
        self.plot = pyqtgraph.PlotWidget(background=None)
        self.plot.setMenuEnabled(False)
        self.plot.setMouseEnabled(x=False, y=False)
        self.plot.hideButtons()
        self.plot.setFocusPolicy(Qt.FocusPolicy.NoFocus)  # nothing can be done in it
        self.plot.setLabel("bottom", "step")
        self.plot.setLabel("left", quantity)
        self.plot.getAxis("left").enableAutoSIPrefix(False)
        self._legend = words()
        self.plot.setFixedHeight(150)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(0)
        column.addWidget(self._legend)
        column.addWidget(self.plot)
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.timeout.connect(self._draw)
        self.setAccessibleName(f"Live curve of the {quantity}")
        self.setHidden(True)

    def clear(self) -> None:
        """Forget all points, and take no room until there are new ones."""
        self._timer.stop()
        self.setVisible(False)
        self._points, self._lines = {}, {}
        self.plot.clear()
        self._legend.clear()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each named curve."""
        if values:
            self.setVisible(True)
        for name, value in values.items():
            steps, heights = self._points.setdefault(name, ([], []))
            steps.append(step)
            heights.append(value)
            if len(steps) > _MOST_POINTS:
                half = len(steps) // 2
                steps[:half], heights[:half] = steps[:half:2], heights[:half:2]
        if not self._timer.isActive():
            self._timer.start(_REDRAW)

    def points(self, name: str) -> list[tuple[float, float]]:
        """The points of a curve."""
        return list(zip(*self._points.get(name, ([], [])), strict=True))

    def _draw(self) -> None:
        color = self.palette().color(self.foregroundRole())
        for side in ("bottom", "left"):
            axis = self.plot.getAxis(side)
            axis.setPen(color)
            axis.setTextPen(color)
        for name, (steps, heights) in self._points.items():
            if name not in self._lines:
                pen = pyqtgraph.mkPen(_PENS[len(self._lines) % len(_PENS)], width=2)
                self._lines[name] = self.plot.plot(name=name, pen=pen)
            self._lines[name].setData(steps, heights)
        say(self._legend, " &nbsp; ".join(self._keys()))

    def _keys(self) -> Iterator[str]:
        """Each curve's colour, name and last value."""
        for (name, (_steps, heights)), pen in zip(self._points.items(), cycle(_PENS), strict=False):
            yield f"<span style='color:{pen}'>━</span>&nbsp;{name.replace(' ', '&nbsp;')}&nbsp;{heights[-1]:.3g}"
