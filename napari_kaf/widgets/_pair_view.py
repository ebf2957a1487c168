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
        self.setFixedHeight(190)
        self.setVisible(False)
        self.setAccessibleName("Keypoints and correspondences of two neighbouring slices")

    def sizeHint(self) -> QSize:
        """Wide."""
        return QSize(320, 190)

    def show_pair(self, picture: PairPicture) -> None:
        """Show a pair."""
        self._picture = picture
        self._images = [grey_image(image) for image in picture.images]
        self.setToolTip(picture.title)
        self.setVisible(True)
        self.update()

    def paintEvent(self, event: Any) -> None:
        """Draw both slices, the keypoints and some of the lines."""
        if self._picture is None:
            return
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        frames = []
        for place, image in enumerate(self._images):
            half = self.width() / 2
            scale = min((half - 4) / image.width(), self.height() / image.height())
            left = place * half + (half - scale * image.width()) / 2
            frames.append((left, scale))
            painter.drawImage(QRectF(left, 0, scale * image.width(), scale * image.height()), image)
        places = [
            [QPointF(left + scale * (x + 0.5), scale * (y + 0.5)) for y, x in points]
            for (left, scale), points in zip(frames, self._picture.points, strict=True)
        ]
        painter.setPen(QPen(QColor(230, 160, 0), 3))
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
