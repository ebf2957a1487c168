"""One button that starts and cancels, with a bar and a line of words beneath."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from napari.utils.notifications import show_error, show_info
from qtpy.QtWidgets import QProgressBar, QPushButton, QVBoxLayout, QWidget

from kaf_model.errors import UserError
from napari_kaf._jobs import Job, Report, Task
from napari_kaf.widgets._panel import Life, answering, say, words

_SHOWN_EVERY = 0.25  # seconds; to repaint anything draws the canvas again, which training has to wait for


class JobRow(QWidget):
    """Runs one task at a time.

    Args:
        life: Of the panel.
        text: On the button.
        start: Called by a click; it calls `run`, or raises a UserError.
        ready: Whether the button can start something.
    """

    def __init__(
        self, life: Life, text: str, start: Callable[[], None], ready: Callable[[], bool] = lambda: True
    ) -> None:
        super().__init__()
        self.life, self._text, self._start, self._ready = life, text, start, ready
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        self.button = QPushButton(text)
        self.button.clicked.connect(self.toggle)
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setFixedHeight(8)
        self.bar.setVisible(False)
        self.bar.setAccessibleName(f"Progress of {text}")
        self.status = words()
        for widget in (self.button, self.bar, self.status):
            column.addWidget(widget)
        life.listen(life.session.busy_changed, self.refresh)
        self._running = False
        self.say("")
        self.refresh()

    @property
    def running(self) -> bool:
        """Whether this row's task is running."""
        return self._running

    def say(self, text: str) -> None:
        """Write a line under the button."""
        say(self.status, text)

    def run(
        self,
        title: str,
        task: Task,
        *,
        on_report: Callable[[Any], None],
        on_done: Callable[[Any], None],
        on_nothing: Callable[[], None] = lambda: None,
        nothing: str = "Stopped.",
    ) -> None:
        """Start a task.

        Args:
            title: What is done.
            task: The work.
            on_report: Called with what it yields.
            on_done: Called with what it returns.
            on_nothing: Called when it failed, or was cancelled before it had anything.
            nothing: What is said when it was cancelled before it had anything.

        Raises:
            UserError: If another is running.
        """
        session = self.life.session
        if session.busy:
            raise UserError(f"{session.busy} is running; wait for it or cancel it first")

        def report(value: Any) -> None:
            if isinstance(value, Report):
                self._show(value)
            on_report(value)

        def done(result: Any) -> None:
            self._ended()
            self.say("")
            on_done(result)

        def failed(message: str) -> None:
            self._ended()
            on_nothing()
            self.say(f"It did not work: {message}")
            show_error(message)

        def given_up() -> None:
            self._ended()
            on_nothing()
            self.say(nothing)

        self._running = True
        session.set_busy(
            title
        )  # before a second click can come: napari draws, and takes clicks, while a job is made
        self._shown = (0.0, "")
        self._told: set[str] = set()
        self._fill(0, None)
        self.bar.setVisible(True)
        self.say("Starting…")
        self.life.job = Job(
            title, task, on_report=report, on_done=done, on_failed=failed, on_given_up=given_up
        )

    @answering
    def toggle(self, *_: Any) -> None:
        """Start, or cancel what runs; a second time, leave out what is left to do for the result."""
        job = self.life.job
        if not self._running:
            if self._ready():
                self._start()
            return
        if job is None:  # it is being made
            return
        job.cancel()
        self.button.setEnabled(False)
        self.say("Stopping…")

    def refresh(self) -> None:
        """Show whether the button starts or cancels, and whether it can."""
        self.button.setText("Cancel" if self._running else self._text)
        self.button.setEnabled(self._running or (not self.life.session.busy and self._ready()))

    def _show(self, report: Report) -> None:
        progress, job = report.progress, self.life.job
        if progress.message and progress.message not in self._told:
            self._told.add(progress.message)
            show_info(progress.message)
        if job is None:
            return
        if progress.losses:
            job.has_something = True
        now, (last, stage) = time.monotonic(), self._shown
        if stage == progress.stage and now < last + _SHOWN_EVERY and not job.control.cancelled:
            return
        self._shown = now, progress.stage
        self._fill(progress.step, progress.total)
        if job.control.cancelled:
            self.button.setEnabled(not job.control.in_a_hurry)
            self.say(f"Stopping; {progress.stage}…" if not progress.losses else "Stopping…")
        else:
            self.say(describe(report))

    def _fill(self, step: int, total: int | None) -> None:
        """Show how far it is; an unknown total is an empty bar, for a moving one repaints the window all the time."""
        self.bar.setRange(0, total or 1)
        self.bar.setValue(min(step, total or 0))

    def _ended(self) -> None:
        self._running = False
        self.life.job = None
        self.bar.setVisible(False)
        self.life.session.set_busy("")


STOPPED_AT_ONCE = "Stopped before anything was learnt."


def describe(report: Report) -> str:
    """Progress in words."""
    progress = report.progress
    parts = [progress.stage]
    if progress.total and progress.losses:
        parts.append(f"step {progress.step} of about {progress.total}")
    elif progress.total:
        parts.append(f"{progress.step} of {progress.total}")
    if progress.eta is not None:
        parts.append(f"{minutes(progress.eta)} left")
    if report.device:
        parts.append(f"{report.device}, {report.memory_gb:.1f} GB")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:]


def minutes(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
