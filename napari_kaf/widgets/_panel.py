"""What all panels share: scrolling, answering mistakes with a notification, and ending cleanly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeGuard, TypeVar

from napari.utils.notifications import show_error
from qtpy.QtCore import QEvent, QObject, Qt, QTimer
from qtpy.QtGui import QKeyEvent
from qtpy.QtWidgets import (
    QAbstractItemView,
    QAbstractSlider,
    QAbstractSpinBox,
    QApplication,
    QComboBox,
    QDockWidget,
    QFrame,
    QLabel,
    QMainWindow,
    QMessageBox,
    QPushButton,
    QScrollArea,
    QScrollBar,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)

from kaf_model.errors import UserError
from napari_kaf._jobs import Job
from napari_kaf._pulse import keep_polling
from napari_kaf._session import Session, session_for

_FOCUS = "#3d85c6"  # seen on napari's dark and on its light ground; the theme itself shows no focus
_STYLE = f"""
QPushButton:focus {{ border: 1px solid {_FOCUS}; padding: 3px; }}
QComboBox:focus, QAbstractSpinBox:focus, QLineEdit:focus, QAbstractItemView:focus {{ border: 1px solid {_FOCUS}; }}
QCheckBox:focus {{ color: {_FOCUS}; }}
"""

P = ParamSpec("P")
S = TypeVar("S")


def answering(method: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """Let a slot answer a mistake with a notification."""

    @functools.wraps(method)
    def slot(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except UserError as error:
            show_error(str(error))

    return slot


class Life:
    """What has to end when a panel closes: its job and what it listens to."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.job: Job | None = None
        self._heard: list[tuple[Any, Callable[..., Any]]] = []
        self._last: list[Callable[[], None]] = []

    def listen(self, signal: Any, slot: Callable[..., Any]) -> None:
        """Connect a signal of the session or an event of napari, until the end."""
        signal.connect(slot)
        self._heard.append((signal, slot))

    def at_end(self, action: Callable[[], None]) -> None:
        """Do something when the panel closes."""
        self._last.append(action)

    def end(self) -> None:
        """End everything; a second call does nothing."""
        for signal, slot in self._heard:
            signal.disconnect(slot)
        self._heard = []
        for action in self._last:
            action()
        self._last = []
        if self.job is not None:
            self.job.abandon()
            self.job = None
            self.session.set_busy("")
        self.session.flush()


class Panel(QScrollArea):
    """A panel that scrolls, with its sections from top to bottom.

    Args:
        napari_viewer: The viewer, or a plugin's proxy of it.
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__()
        self.session = session_for(napari_viewer)
        keep_polling(self.session)
        self.life = Life(self.session)
        self.destroyed.connect(self.life.end)
        self._docked = False
        self._placed = False
        self._came_from: QWidget | None = None
        self.setWidgetResizable(True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        content = QWidget()
        self.column = QVBoxLayout(content)
        self.column.setContentsMargins(6, 4, 6, 6)
        self.column.setSpacing(6)
        self.setWidget(content)
        self.setMinimumWidth(336)
        content.setStyleSheet(_STYLE)

    def enter(self) -> None:
        """Give the focus to what had it last in the panel, else to its first widget.

        napari's slice number takes the focus back from whoever tabs away from it, so that Tab alone never
        gets from the canvas to a panel.
        """
        content, dock = self.widget(), self.dock
        assert content is not None
        if dock is not None:
            dock.raise_()
        if content.isAncestorOf(QApplication.focusWidget()):
            return
        self._came_from = QApplication.focusWidget()
        last = content.focusWidget()
        if last is not None and last.isEnabled():
            last.setFocus(Qt.FocusReason.TabFocusReason)
        else:
            content.setFocus(Qt.FocusReason.TabFocusReason)
            content.focusNextChild()

    @property
    def dock(self) -> QDockWidget | None:
        """What holds the panel in napari's window."""
        holder = self.parentWidget()
        while holder is not None and not isinstance(holder, QDockWidget):
            holder = holder.parentWidget()
        return holder

    def _share_a_side(self) -> None:
        """Lie in front of the panels that are docked at the same side, as tabs: one below the other has no room."""
        dock, window = self.dock, self.window()
        if not isinstance(window, QMainWindow) or dock is None:
            return
        for panel in window.findChildren(Panel):
            other = panel.dock
            if panel is self or other is None or other.isFloating():
                continue
            if window.dockWidgetArea(other) == window.dockWidgetArea(dock):
                window.tabifyDockWidget(other, dock)
                dock.raise_()
                return

    def keyPressEvent(self, event: QKeyEvent | None) -> None:
        """Escape goes back to where the focus was before it came into the panel."""
        if event is not None and event.key() == Qt.Key.Key_Escape and self._came_from is not None:
            self._came_from.setFocus(Qt.FocusReason.BacktabFocusReason)
            self._came_from = None
        else:
            super().keyPressEvent(event)

    def showEvent(self, event: Any) -> None:
        """From the first showing on, the wheel changes no value it passes over, and long names no width.

        Our keys work wherever the focus is, but for where text is written.
        """
        for view in self.findChildren(QAbstractItemView):
            view.installEventFilter(self)
        for box in filter(_is_box, self.findChildren(QWidget)):
            box.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
            box.installEventFilter(self)
            if isinstance(box, QComboBox):
                box.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
                box.setMinimumWidth(90)
        if not self._placed:
            self._placed = True
            QTimer.singleShot(0, self._share_a_side)  # once napari has docked it
        super().showEvent(event)

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:
        """Keep the wheel from boxes, and letters with Shift from boxes and lists, which would search by them."""
        if isinstance(event, QKeyEvent) and event.type() == QEvent.Type.KeyPress:
            if (
                event.modifiers() & Qt.KeyboardModifier.ShiftModifier
                and Qt.Key.Key_A <= event.key() <= Qt.Key.Key_Z
            ):
                event.ignore()  # goes up to the window, which knows our keys
                return True
        elif event is not None and event.type() == QEvent.Type.Wheel and _is_box(watched):
            event.ignore()
            return not watched.hasFocus()
        return bool(super().eventFilter(watched, event))

    def event(self, event: QEvent | None) -> bool:
        """End when the dock that holds the panel lets it go."""
        if event is not None and event.type() == QEvent.Type.ParentChange:
            if self.parent() is not None:
                self._docked = True
            elif self._docked:
                self.life.end()
                self.deleteLater()
        return bool(super().event(event))

    def closeEvent(self, event: Any) -> None:
        """End when the panel itself is closed."""
        self.life.end()
        super().closeEvent(event)


def _is_box(widget: QObject | None) -> TypeGuard[QWidget]:
    """Whether the wheel would change a value of it; Qt asks a scroll area about its own scroll bars too."""
    kinds = (QAbstractSpinBox, QComboBox, QAbstractSlider)
    return isinstance(widget, kinds) and not isinstance(widget, QScrollBar)


def button(text: str, tip: str, slot: Callable[..., None]) -> QPushButton:
    """A button with a tooltip."""
    made = QPushButton(text)
    made.setToolTip(tip)
    made.clicked.connect(slot)
    return made


def completed(parent: QWidget, name: str, endings: Sequence[str]) -> Path | None:
    """The file that somebody named in a dialog, with the first ending if it has none of them; None if nobody did.

    The dialog asks before a file is replaced, but not about one whose ending was left out; that is asked here.
    """
    if not name:
        return None
    if name.endswith(tuple(endings)):
        return Path(name)
    path = Path(f"{name}{endings[0]}")
    if path.exists():
        answer = QMessageBox.question(parent, "Replace file", f"{path.name} is there already. Replace it?")
        if answer != QMessageBox.StandardButton.Yes:
            return None
    return path


def heading(text: str) -> QLabel:
    """A section's title."""
    label = QLabel(f"<b>{text}</b>")
    label.setContentsMargins(0, 6, 0, 0)
    return label


def words(text: str = "") -> QLabel:
    """Text that wraps, takes no more width than there is, and no room while there is none; see `say`."""
    label = QLabel(text)
    label.setWordWrap(True)
    label.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
    label.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
    label.setHidden(not text)
    return label


def say(label: QLabel, text: str) -> None:
    """Show words, or take no room without any; for labels that have their place already."""
    label.setText(text)
    label.setVisible(bool(text))
