"""Arrays as pictures: grey slices, heat maps, and a grid of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QPointF, QRectF, QSize, Qt, Signal  # type: ignore[attr-defined]
from qtpy.QtGui import QColor, QImage, QMouseEvent, QPainter, QPen
from qtpy.QtWidgets import QSizePolicy, QToolTip, QWidget

CLIP = 2.5  # standard deviations shown from black to white
HEAT = "inferno"
_CAPTION = 16  # pixels
_GAP = 4
_HIGHEST = 190  # pixels of a cell


def grey_image(image: NDArray[Any]) -> QImage:
    """A normalised slice (H, W) in grey."""
    grey = np.clip((image + CLIP) / (2 * CLIP) * 255, 0, 255).astype(np.uint8)
    height, width = grey.shape
    data = np.ascontiguousarray(grey).tobytes()
    return QImage(data, width, height, width, QImage.Format.Format_Grayscale8).copy()


def heat_image(values: NDArray[Any], limits: tuple[float, float]) -> QImage:
    """Values (h, w) as colours between two limits."""
    colors = (255 * colors_of(values.ravel(), limits)[:, :3]).astype(np.uint8)
    height, width = values.shape
    return QImage(colors.tobytes(), width, height, 3 * width, QImage.Format.Format_RGB888).copy()


def colors_of(
    values: NDArray[Any], limits: tuple[float, float] | None = None, colormap: str = HEAT
) -> NDArray[np.float32]:
    """RGBA of values (N,) between two limits, by default their own extremes. Shape: (N,) -> (N, 4)."""
    values = np.asarray(values, np.float64)
    low, high = limits or (float(values.min(initial=np.inf)), float(values.max(initial=-np.inf)))
    scaled = (values - low) / (high - low) if high > low else np.ones(values.shape)
    colors: NDArray[np.float32] = _table(colormap)[(np.clip(scaled, 0, 1) * 255).astype(int)]
    return colors


@cache
def _table(colormap: str) -> NDArray[np.float32]:
    from napari.utils.colormaps import ensure_colormap

    return np.asarray(ensure_colormap(colormap).map(np.linspace(0, 1, 256)), np.float32)


@dataclass(frozen=True, eq=False)
class Picture:
    """A cell of a grid.

    Attributes:
        image: What is beneath, or None.
        heat: What is laid over it, or None.
        caption: Words above.
        tip: Words under the pointer.
        mark: A place (y, x) as parts of height and width, or None.
        chosen: Whether it has a frame.
        reach: How far the heat goes, as parts of height and width: the cells of a level may go beyond the slice.
    """

    image: QImage | None = None
    heat: QImage | None = None
    caption: str = ""
    tip: str = ""
    mark: tuple[float, float] | None = None
    chosen: bool = False
    reach: tuple[float, float] = (1.0, 1.0)


class PictureGrid(QWidget):
    """Rows of pictures of one shape; emits row and column of the one that is clicked."""

    chosen = Signal(int, int)

    def __init__(self, name: str) -> None:
        super().__init__()
        self._rows: Sequence[Sequence[Picture]] = ()
        self._aspect = 1.0
        self.setAccessibleName(name)
        self.setMouseTracking(True)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setVisible(False)

    @property
    def pictures(self) -> Sequence[Sequence[Picture]]:
        """What is shown."""
        return self._rows

    def show_pictures(self, rows: Sequence[Sequence[Picture]], aspect: float) -> None:
        """Show pictures, each drawn with height / width of `aspect`; no rows hide the grid."""
        self._rows, self._aspect = rows, aspect
        self.setVisible(bool(rows))
        self._fit()
        self.update()

    def sizeHint(self) -> QSize:
        """As high as the pictures want at this width."""
        return QSize(320, self._height(max(self.width(), 320)))

    def resizeEvent(self, event: Any) -> None:
        """Keep the shape of the pictures."""
        self._fit()
        super().resizeEvent(event)

    def cell(self, row: int, column: int) -> QRectF:
        """Where a picture is, its caption left out."""
        width, height = self._cell_size(self.width())
        num_columns = max(len(self._rows[0]), 1)
        left = (self.width() - num_columns * (width + _GAP)) / 2 + column * (width + _GAP)
        return QRectF(left, _CAPTION + row * (height + _CAPTION + _GAP), width, height)

    def paintEvent(self, event: Any) -> None:
        """Draw them."""
        painter = QPainter(self)
        painter.setRenderHints(QPainter.RenderHint.SmoothPixmapTransform | QPainter.RenderHint.Antialiasing)
        text = self.palette().color(self.foregroundRole())
        for number, row in enumerate(self._rows):
            for column, picture in enumerate(row):
                self._draw(painter, picture, self.cell(number, column), text)

    def mousePressEvent(self, event: QMouseEvent | None) -> None:
        """Tell which was clicked."""
        at = self._under(event)
        if at is not None:
            self.chosen.emit(*at)

    def mouseMoveEvent(self, event: QMouseEvent | None) -> None:
        """Say what the picture under the pointer is."""
        at = self._under(event)
        if at is not None and event is not None:
            QToolTip.showText(event.globalPosition().toPoint(), self._rows[at[0]][at[1]].tip, self)

    def _draw(self, painter: QPainter, picture: Picture, cell: QRectF, text: QColor) -> None:
        painter.setPen(text)
        above = cell.translated(0, -_CAPTION)
        above.setHeight(_CAPTION)
        painter.drawText(above, Qt.AlignmentFlag.AlignCenter, picture.caption)
        if picture.image is not None:
            painter.drawImage(cell, picture.image)
        if picture.heat is not None:
            down, across = picture.reach
            painter.save()
            painter.setClipRect(cell)
            painter.setOpacity(0.6 if picture.image is not None else 1.0)
            covered = QRectF(cell.left(), cell.top(), across * cell.width(), down * cell.height())
            painter.drawImage(covered, picture.heat)
            painter.restore()
        if picture.image is None and picture.heat is None:
            painter.drawRect(cell)
        if picture.mark is not None:
            y, x = picture.mark
            self._cross(painter, QPointF(cell.left() + x * cell.width(), cell.top() + y * cell.height()))
        if picture.chosen:
            painter.setPen(QPen(text, 2))
            painter.drawRect(cell)

    def _cross(self, painter: QPainter, at: QPointF) -> None:
        for color, width in ((QColor(0, 0, 0), 3), (QColor(90, 220, 255), 1.4)):
            painter.setPen(QPen(color, width))
            painter.drawLine(at + QPointF(-4, 0), at + QPointF(4, 0))
            painter.drawLine(at + QPointF(0, -4), at + QPointF(0, 4))

    def _under(self, event: QMouseEvent | None) -> tuple[int, int] | None:
        if event is None:
            return None
        for row, pictures in enumerate(self._rows):
            for column in range(len(pictures)):
                if self.cell(row, column).contains(event.position()):
                    return row, column
        return None

    def _cell_size(self, available: int) -> tuple[float, float]:
        columns = max((len(row) for row in self._rows), default=1)
        width = max((available - columns * _GAP) / columns, 1)
        height = width * self._aspect
        if height > _HIGHEST:
            width, height = width * _HIGHEST / height, _HIGHEST
        return width, height

    def _height(self, available: int) -> int:
        return int(len(self._rows) * (self._cell_size(available)[1] + _CAPTION + _GAP))

    def _fit(self) -> None:
        self.setFixedHeight(max(self._height(self.width()), 1))
