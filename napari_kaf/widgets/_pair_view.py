"""Two slices side by side with their keypoints, and lines between those taken for the same anatomy."""

from __future__ import annotations

from typing import Any

import numpy as np
from qtpy.QtCore import QPointF, QRectF, QSize
from qtpy.QtGui import QColor, QImage, QPainter, QPen
from qtpy.QtWidgets import QSizePolicy, QWidget

from napari_kaf._pretrain_task import PairPicture

_MOST_LINES = 60  # more would hide the slices
_CLIP = 2.5  # standard deviations shown from black to white


class PairView(QWidget):
    """Draws what pretraining learns from, on one pair."""

    def __init__(self) -> None:
        super().__init__()
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
        self._images = []
        for image in picture.images:
            grey = np.clip((image + _CLIP) / (2 * _CLIP) * 255, 0, 255).astype(np.uint8)
            height, width = grey.shape
            data = np.ascontiguousarray(grey).tobytes()
            self._images.append(QImage(data, width, height, width, QImage.Format.Format_Grayscale8).copy())
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
        pairs = self._picture.pairs
        step = max(1, len(pairs) // _MOST_LINES)
        painter.setPen(QPen(QColor(86, 180, 233, 170), 1))
        for first, second in pairs[::step]:
            painter.drawLine(places[0][first], places[1][second])
