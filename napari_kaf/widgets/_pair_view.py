"""Two slices side by side with their keypoints, and lines between those taken for the same anatomy."""

from __future__ import annotations

from typing import Any

from qtpy.QtCore import QPointF, QRectF, QSize
from qtpy.QtGui import QColor, QImage, QPainter, QPen
from qtpy.QtWidgets import QSizePolicy, QWidget

from napari_kaf._pair_picture import PairPicture
from napari_kaf.widgets._pictures import colors_of, grey_image

LINES = "viridis"
_MOST_LINES = 60  # more would hide the slices
_GAP = 12  # pixels between the slices
_LOWEST, _HIGHEST = 120, 280  # pixels


class PairView(QWidget):
    """Draws the keypoints of one pair of slices and what goes together.

    Args:
        most_lines: Of more pairs only some are drawn, evenly chosen.
    """

    def __init__(self, most_lines: int = _MOST_LINES) -> None:
        super().__init__()
        self._most_lines = most_lines
        self._picture: PairPicture | None = None
        self._images: list[QImage] = []
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setFixedHeight(_LOWEST)
        self.setVisible(False)
        self.setAccessibleName("Keypoints and correspondences of two neighbouring slices")

    def sizeHint(self) -> QSize:
        """Wide."""
        return QSize(320, self._height())

    def resizeEvent(self, event: Any) -> None:
        """As high as the slices are at this width."""
        self.setFixedHeight(self._height())
        super().resizeEvent(event)

    def show_pair(self, picture: PairPicture) -> None:
        """Show a pair."""
        self._picture = picture
        self._images = [grey_image(image) for image in picture.images]
        self.setToolTip(picture.title)
        self.setVisible(True)
        self.setFixedHeight(self._height())
        self.update()

    def paintEvent(self, event: Any) -> None:
        """Draw both slices, the keypoints and some of the lines."""
        if self._picture is None:
            return
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        half = (self.width() - _GAP) / 2
        scales = [min(half / image.width(), self.height() / image.height()) for image in self._images]
        left = (self.width() - _GAP - sum(map(_width, self._images, scales))) / 2
        frames = []
        for image, scale in zip(self._images, scales, strict=True):
            frames.append((left, scale))
            painter.drawImage(QRectF(left, 0, scale * image.width(), scale * image.height()), image)
            left += _width(image, scale) + _GAP
        places = [
            [QPointF(left + scale * (x + 0.5), scale * (y + 0.5)) for y, x in points]
            for (left, scale), points in zip(frames, self._picture.points, strict=True)
        ]
        painter.setPen(QPen(QColor(230, 160, 0), 2))
        for side in places:
            for point in side:
                painter.drawPoint(point)
        painter.setPen(QPen(QColor(86, 180, 233, 170), 1))
        pairs, values = self._picture.pairs, self._picture.values
        colors = None if values is None else (255 * colors_of(values, (0, 1), LINES)).astype(int)
        for row in range(0, len(pairs), max(1, -(-len(pairs) // self._most_lines))):
            if colors is not None:
                painter.setPen(QPen(QColor(*colors[row].tolist()), 1))
            first, second = pairs[row]
            painter.drawLine(places[0][first], places[1][second])

    def _height(self) -> int:
        half = (self.width() - _GAP) / 2
        wanted = max((half * image.height() / image.width() for image in self._images), default=0)
        return int(min(max(wanted, _LOWEST), _HIGHEST))


def _width(image: QImage, scale: float) -> float:
    return scale * image.width()
