"""The timer that lets a session notice strokes and save them, for as long as its viewer lives."""

from __future__ import annotations

import weakref

from qtpy.QtCore import QCoreApplication, QObject, QTimer

from napari_kaf._session import Session

INTERVAL = 200  # milliseconds


class Pulse(QObject):
    """Polls a session; goes away with it, and saves a last time when the application quits."""

    def __init__(self, session: Session) -> None:
        application = QCoreApplication.instance()
        super().__init__(application)
        self._session = weakref.ref(session)
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
    """Start the timer of a session, once."""
    if session not in _beating:
        _beating.add(session)
        Pulse(session)
