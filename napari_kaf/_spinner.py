"""The turning wheel that napari shows while something is in progress, slowed down while we train.

It turns thirty times a second, and each time the window is composed anew, canvas and all. Where no graphics card
does that, it takes more of the processor than the training itself.
"""

from __future__ import annotations

from qtpy.QtGui import QMovie
from qtpy.QtWidgets import QApplication, QLabel

_SLOW, _USUAL = 3, 100  # percent


def slow_spinners() -> list[QMovie]:
    """Slow down all wheels of the program; returns them."""
    spinners = []
    for window in QApplication.topLevelWidgets():
        movies = (label.movie() for label in window.findChildren(QLabel))
        spinners += [movie for movie in movies if movie is not None]
    for spinner in spinners:
        spinner.setSpeed(_SLOW)
    return spinners


def release_spinners(spinners: list[QMovie]) -> None:
    """Let wheels turn as they did."""
    for spinner in spinners:
        spinner.setSpeed(_USUAL)
