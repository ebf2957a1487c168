"""A task on another thread: progress in napari's activity dock, cancelling, pausing, errors as notifications.

A task is a generator that is given a `Control` and looks at it after each report of the engine. It ends by
itself when it is told to, so that the engine can write what it has. Nothing here knows torch.
"""

from __future__ import annotations

import datetime
import threading
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import QTimer
from superqt.utils import GeneratorWorker

from kaf_model.errors import UserError
from napari_kaf._paths import data_folder
from napari_kaf._spinner import release_spinners, slow_spinners

if TYPE_CHECKING:
    from kaf_model.progress import Progress


PATIENCE = 1500  # milliseconds that a cancelled task with nothing to keep is waited for


class Control:
    """What the GUI thread tells a task. Safe to use from both threads.

    Attributes:
        slice: The slice that is shown, for previews.
        in_a_hurry: Whether it was asked again to end: what is left to do for the result is left out.
    """

    def __init__(self) -> None:
        self.slice = 0
        self.in_a_hurry = False
        self._cancelled = threading.Event()
        self._running = threading.Event()
        self._running.set()

    def cancel(self, *, in_a_hurry: bool = False) -> None:
        """Ask the task to end; a second time, or in a hurry, without what is left to do for the result."""
        self.in_a_hurry = in_a_hurry or self.cancelled
        self._cancelled.set()
        self._running.set()

    @property
    def cancelled(self) -> bool:
        """Whether the task was asked to end."""
        return self._cancelled.is_set()

    @property
    def paused(self) -> bool:
        """Whether the task was asked to wait."""
        return not self._running.is_set()

    def pause(self, paused: bool) -> None:
        """Ask the task to wait, or to go on."""
        if paused and not self.cancelled:
            self._running.clear()
        else:
            self._running.set()

    def wait_while_paused(self) -> None:
        """Called by the task."""
        self._running.wait()


@dataclass(frozen=True)
class Report:
    """Progress of the engine, and what it runs on.

    Attributes:
        progress: Where the task is.
        device: Name of the device, or nothing while it is not known.
        memory_gb: Memory in use on it.
    """

    progress: Progress
    device: str = ""
    memory_gb: float = 0.0


@dataclass(frozen=True)
class Failure:
    """How a task failed, in words for the user."""

    message: str


Task = Callable[[Control], Generator[Any, None, Any]]


class _Worker(GeneratorWorker):  # type: ignore[type-arg]
    """A worker whose `quit` lets the task end by itself."""

    def __init__(self, task: Task, control: Control) -> None:
        super().__init__(_guarded, task, control)
        self.control = control

    def quit(self) -> None:
        self.control.cancel()


class Job:
    """A running task.

    Args:
        title: What is done, for the activity dock; None shows nothing there.
        task: The work.
        on_report: Called on the GUI thread with all that the task yields.
        on_done: Called with what it returns, unless it failed.
        on_failed: Called with the message if it failed.
        on_given_up: Called when it was cancelled before it had anything to keep, and does not end soon.

    Attributes:
        has_something: Whether the task holds something worth waiting for when it is cancelled.
    """

    def __init__(
        self,
        title: str | None,
        task: Task,
        *,
        on_report: Callable[[Any], None],
        on_done: Callable[[Any], None],
        on_failed: Callable[[str], None],
        on_given_up: Callable[[], None],
    ) -> None:
        from napari.utils import progress

        self.control = Control()
        self.has_something = False
        self._on_report, self._on_done, self._on_failed = on_report, on_done, on_failed
        self._on_given_up = on_given_up
        self._bar = progress(total=0, desc=title) if title is not None else None
        self._spinners = slow_spinners() if title is not None else []
        self._listening = True
        self._worker = _Worker(task, self.control)
        self._worker.yielded.connect(self._reported)
        self._worker.returned.connect(self._returned)
        self._worker.errored.connect(
            lambda error: self._returned(Failure(f"{type(error).__name__}: {error}"))
        )
        self._worker.start()

    def cancel(self) -> None:
        """Ask the task to end; what it returns is still delivered, unless it has nothing and is slow to end."""
        self.control.cancel()
        QTimer.singleShot(PATIENCE, self._give_up)

    def abandon(self) -> None:
        """End the task without hearing from it again: its widget or window closes."""
        self._listening = False
        self.control.cancel(in_a_hurry=True)
        self._close_bar()

    def _give_up(self) -> None:
        if self._listening and not self.has_something:
            self.abandon()  # it may be importing; nothing can interrupt that
            self._on_given_up()

    def _reported(self, report: Any) -> None:
        if not self._listening:
            return
        self._on_report(report)
        if isinstance(report, Report) and self._bar is not None:
            self._draw_bar(self._bar, report)  # last: napari lets later reports in while it draws

    def _draw_bar(self, bar: Any, report: Report) -> None:
        progress = report.progress
        if self._listening and progress.total and bar.total != progress.total:
            bar.reset(progress.total)
        if self._listening:
            bar.set_description(f"{bar.desc.partition(':')[0]}: {progress.stage}")
        if self._listening:
            bar.update(progress.step - bar.n)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        release_spinners(self._spinners)
        self._spinners = []

    def _returned(self, result: Any) -> None:
        if not self._listening:
            return
        self._listening = False
        self._close_bar()
        if isinstance(result, Failure):
            self._on_failed(result.message)
        else:
            self._on_done(result)


def _guarded(task: Task, control: Control) -> Generator[Any, None, Any]:
    """Run a task; whatever it raises becomes a Failure."""
    try:
        return (yield from task(control))
    except UserError as error:
        return Failure(str(error))
    except MemoryError:
        return Failure("memory ran out; close other programs, or use a smaller preset or volume")
    except Exception as error:  # the window must survive whatever a library raises
        return Failure(
            f"something went wrong that should not: {type(error).__name__}: {error}. "
            f"Details are in {_write_details()}"
        )


def _write_details() -> Path:
    """Keep the traceback of an unforeseen error for a report, and return where."""
    path = data_folder() / "errors.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{datetime.datetime.now().isoformat()}\n{traceback.format_exc()}\n")
    return path
