"""One button that starts and cancels, with a bar and a line of words beneath."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from napari.utils.notifications import show_error, show_info
from qtpy.QtWidgets import QProgressBar, QPushButton, QVBoxLayout, QWidget

from kaf_model.errors import UserError
from napari_kaf._jobs import Job, Report, Task
from napari_kaf.widgets._panel import Life, answering, words


class JobRow(QWidget):
    """Runs one task at a time.

    Args:
        life: Of the panel.
        text: On the button.
        start: Called by a click; it calls `run`, or raises a UserError.
    """

    def __init__(self, life: Life, text: str, start: Callable[[], None]) -> None:
        super().__init__()
        self.life, self._text, self._start = life, text, start
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        self.button = QPushButton(text)
        self.button.clicked.connect(self._clicked)
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setFixedHeight(8)
        self.bar.setVisible(False)
        self.status = words()
        for widget in (self.button, self.bar, self.status):
            column.addWidget(widget)
        life.listen(life.session.busy_changed, self._show_busy)
        self._running = False

    @property
    def running(self) -> bool:
        """Whether this row's task is running."""
        return self._running

    def run(
        self, title: str, task: Task, *, on_report: Callable[[Any], None], on_done: Callable[[Any], None]
    ) -> None:
        """Start a task.

        Raises:
            UserError: If another is running.
        """
        session = self.life.session
        if session.busy:
            raise UserError(f"{session.busy} is running; wait for it or cancel it first")
        self._running = True
        self.bar.setRange(0, 0)
        self.bar.setVisible(True)
        self.status.setText("Starting…")
        session.set_busy(title)

        def report(value: Any) -> None:
            if isinstance(value, Report):
                self._show(value)
            on_report(value)

        def done(result: Any) -> None:
            self._ended()
            self.status.setText("")
            on_done(result)

        def failed(message: str) -> None:
            self._ended()
            self.status.setText(f"It did not work: {message}")
            show_error(message)

        self.life.job = Job(title, task, on_report=report, on_done=done, on_failed=failed)
        self._show_busy()

    def _show(self, report: Report) -> None:
        progress = report.progress
        if progress.message:
            show_info(progress.message)
        self.bar.setRange(0, progress.total or 0)
        self.bar.setValue(min(progress.step, progress.total or 0))
        if self.life.job is not None and self.life.job.control.cancelled:
            return
        parts = [progress.stage[:1].upper() + progress.stage[1:]]
        if progress.total:
            parts.append(f"{progress.step} of {progress.total}")
        if progress.eta is not None:
            seconds = progress.eta
            parts.append(f"{round(seconds)} s left" if seconds < 90 else f"{seconds / 60:.1f} min left")
        if report.device:
            parts.append(f"{report.device}, {report.memory_gb:.1f} GB")
        self.status.setText("; ".join(parts))

    @answering
    def _clicked(self, *_: Any) -> None:
        if self._running and self.life.job is not None:
            self.life.job.cancel()
            self.button.setEnabled(False)
            self.status.setText("Stopping…")
        else:
            self._start()

    def _ended(self) -> None:
        self._running = False
        self.life.job = None
        self.bar.setVisible(False)
        self.life.session.set_busy("")

    def _show_busy(self) -> None:
        self.button.setText("Cancel" if self._running else self._text)
        self.button.setEnabled(self._running or not self.life.session.busy)
