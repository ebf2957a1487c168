"""What a session needs once, however many panels are open, for as long as its viewer lives.

A timer lets it notice strokes and save them, and what it says is shown.
"""

from __future__ import annotations

import weakref

from napari.utils.notifications import show_info, show_warning
from qtpy.QtCore import QCoreApplication, QObject, QTimer

from napari_kaf._session import Session

INTERVAL = 200  # milliseconds


class Pulse(QObject):
    """Polls a session and shows its messages; goes away with it, and saves a last time when the application quits."""

    def __init__(self, session: Session) -> None:
        application = QCoreApplication.instance()
        super().__init__(application)
        self._session = weakref.ref(session)
        session.told.connect(show_info)
        session.warned.connect(show_warning)
        self._timer = QTimer(self)
        self._timer.timeout.connect(self._beat)
        self._timer.start(INTERVAL)
        if application is not None:
            application.aboutToQuit.connect(self._last)

    def _beat(self) -> None:
        session = self._session()
        if session is None:
            self._timer.stop()
            self.deleteLater()
        else:
            session.poll()

    def _last(self) -> None:
        self._timer.stop()
        session = self._session()
        if session is not None:
            session.flush()


_beating: weakref.WeakSet[Session] = weakref.WeakSet()


def keep_polling(session: Session) -> None:
    """Start the timer of a session, and show what it says, once."""
    if session not in _beating:
        _beating.add(session)
        Pulse(session)
