"""Questions to worker threads of which only the newest counts: what was asked before is dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from psygnal import Signal

from kaf_model.progress import Progress
from napari_kaf._jobs import Job, Report, Task

CANCELLED = "cancelled"


@dataclass(eq=False)
class _Question:
    title: str
    on_failed: Callable[[str], None]
    job: Job | None = None
    progress: Progress | None = None


class Desk:
    """Runs one task for each key; a newer one of the same key takes its place.

    `changed` is emitted whenever what is running, or how far it is, changes.
    """

    changed = Signal()

    def __init__(self) -> None:
        self._questions: dict[str, _Question] = {}

    @property
    def busy(self) -> bool:
        """Whether anything is running."""
        return bool(self._questions)

    @property
    def doing(self) -> str:
        """What is running, in words."""
        told = []
        for question in self._questions.values():
            progress = question.progress
            counted = f", {progress.step} of {progress.total}" if progress and progress.total else ""
            told.append(f"{question.title}{counted}")
        return "; ".join(told)

    def pending(self, key: str) -> bool:
        """Whether an answer to a key is awaited."""
        return key in self._questions

    def ask(
        self,
        key: str,
        title: str,
        task: Task,
        *,
        on_done: Callable[[Any], None],
        on_failed: Callable[[str], None],
    ) -> None:
        """Start a task; what an earlier one of this key would have answered is dropped.

        Args:
            key: Who asks.
            title: What is done, in words.
            task: The work.
            on_done: Called on the GUI thread with what it returns.
            on_failed: Called on the GUI thread with the reason if it fails or is cancelled.
        """
        self._let_go(key)
        question = _Question(title, on_failed)
        self._questions[key] = question

        def report(value: Any) -> None:
            if isinstance(value, Report):
                question.progress = value.progress
                self.changed.emit()

        def done(result: Any) -> None:
            self._ended(key, question)
            on_done(result)

        def failed(message: str) -> None:
            self._ended(key, question)
            on_failed(message)

        question.job = Job(
            None,
            task,
            on_report=report,
            on_done=done,
            on_failed=failed,
            on_given_up=lambda: failed(CANCELLED),
        )
        self.changed.emit()

    def drop(self, key: str) -> None:
        """Forget what was asked under a key; its answer will not come."""
        if self._let_go(key):
            self.changed.emit()

    def cancel(self) -> None:
        """End everything, and say so to whoever asked."""
        questions = list(self._questions.values())
        self.close()
        self.changed.emit()
        for question in questions:
            question.on_failed(CANCELLED)

    def close(self) -> None:
        """End everything without a word."""
        for key in list(self._questions):
            self._let_go(key)

    def _let_go(self, key: str) -> bool:
        question = self._questions.pop(key, None)
        if question is not None and question.job is not None:
            question.job.abandon()
        return question is not None

    def _ended(self, key: str, question: _Question) -> None:
        if self._questions.get(key) is question:
            del self._questions[key]
        self.changed.emit()
