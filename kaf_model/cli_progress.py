"""Long work on a terminal or in a log: progress is shown, and Ctrl-C closes the work in good order."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from kaf_model.cli_options import duration_text
from kaf_model.progress import Progress

Result = TypeVar("Result")

LOG_INTERVAL = 10.0
"""Seconds between the lines of a log."""
_ONE_PRESS = 0.3
"""Signals closer than this many seconds are one: a wrapper may pass on what the terminal sent as well."""


class Interrupted(Exception):
    """The user stopped the work; it was closed in good order.

    Attributes:
        trained: Whether it had come to training steps, so that there is something to go on with.
        path: The checkpoint that was being trained, if any.
        advice: How to go on, where the command itself knows; else empty.
    """

    def __init__(self, trained: bool) -> None:
        super().__init__("interrupted")
        self.trained = trained
        self.path: Path | None = None
        self.advice = ""


class Output:
    """Where a command prints: standard output, and under `torchrun` only that of the first process."""

    def __init__(self) -> None:
        self.is_first = int(os.environ.get("RANK", "0")) == 0
        self.console = Console(quiet=not self.is_first, highlight=False)

    def line(self, text: str = "") -> None:
        """Print one line as it is, however long."""
        self.console.print(text, markup=False, soft_wrap=True)

    def run(self, work: Generator[Progress, None, Result]) -> Result:
        """Run work to its end, showing its progress.

        Raises:
            Interrupted: If the user stopped it.
        """
        trained = False
        with Interruption() as interruption, _display(self) as display:
            while True:
                try:
                    progress = next(work)
                except StopIteration as done:
                    result: Result = done.value
                    return result
                trained = trained or bool(progress.losses)
                display.show(progress)
                at_end = progress.step == progress.total  # what is all but done is brought to its end
                if interruption.requested() and not at_end:
                    work.close()
                    raise Interrupted(trained)


def losses_text(losses: Mapping[str, float]) -> str:
    """Return named losses with enough digits to compare two runs."""
    return "  ".join(f"{name} {value:.6f}" for name, value in losses.items())


class Interruption:
    """Turns SIGINT and SIGTERM into a question that is asked between steps; a second signal aborts at once."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            os.write(2, b"\nstopping after this step; once more aborts at once\n")
        elif now - self._first > _ONE_PRESS:
            os.write(1, b"\x1b[?25h\n" if sys.stdout.isatty() else b"")  # the bar had hidden the cursor
            os._exit(130)

    def requested(self) -> bool:
        """Whether to stop; processes that train together get the same answer at the same step."""
        asked = self._first is not None
        if "torch" not in sys.modules:
            return asked
        import torch

        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return asked
        votes = torch.tensor([float(asked)])
        if torch.distributed.get_backend() == "nccl":
            votes = votes.cuda()
        torch.distributed.all_reduce(votes)
        return bool(votes.item() > 0)


class _Display(Protocol):
    def show(self, progress: Progress) -> None: ...


@contextmanager
def _display(output: Output) -> Iterator[_Display]:
    if output.console.is_terminal and output.is_first:
        with _Bar(output) as bar:
            yield bar
    else:
        log = _Log(output)
        try:
            yield log
        finally:
            log.flush()


class _Remaining:
    """Seconds left of the present stage: as the work says, else as far as one can tell from its pace."""

    def __init__(self) -> None:
        self._stage = ""
        self._started = 0.0
        self._first = 0

    def of(self, progress: Progress) -> float | None:
        if progress.stage != self._stage:
            self._stage, self._started, self._first = progress.stage, time.monotonic(), progress.step
        if progress.eta is not None:
            return progress.eta
        done = progress.step - self._first
        if not done or progress.total is None:
            return None
        return (time.monotonic() - self._started) * (progress.total - progress.step) / done


class _Bar:
    """A progress bar on a terminal; stages that are done stay above it."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[left]}", style="cyan"),
            TextColumn("{task.fields[losses]}", style="dim"),
            console=output.console,
            refresh_per_second=4,
        )
        self._tasks: dict[str, TaskID] = {}
        self._remaining = _Remaining()

    def __enter__(self) -> _Bar:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, progress: Progress) -> None:
        if progress.message:
            self._bars.console.print(progress.message, markup=False, soft_wrap=True)
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bars.add_task(
                progress.stage, total=progress.total, count="", left="", losses=""
            )
        eta = self._remaining.of(progress)
        self._bars.update(
            self._tasks[progress.stage],
            completed=progress.step,
            total=progress.total,
            count=_count(progress),
            left=f"{duration_text(eta)} left" if eta else "",
            losses="  ".join(f"{name} {value:.4g}" for name, value in progress.losses.items()),
        )


class _Log:
    """Plain lines: the first and the last report of a stage, and one now and then between."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._stage = ""
        self._last = 0.0
        self._held: Progress | None = None
        self._remaining = _Remaining()

    def show(self, progress: Progress) -> None:
        if progress.message:
            self._output.line(progress.message)
        eta = self._remaining.of(progress)
        if progress.stage != self._stage:
            self.flush()
        elif time.monotonic() - self._last < LOG_INTERVAL:
            self._held = progress
            return
        self._stage, self._last, self._held = progress.stage, time.monotonic(), None
        self._write(progress, eta)

    def flush(self) -> None:
        """Write the report that was held back, the last of its stage."""
        if self._held is not None:
            self._write(self._held, None)
            self._held = None

    def _write(self, progress: Progress, eta: float | None) -> None:
        parts = [f"{progress.stage} {_count(progress)}", losses_text(progress.losses)]
        parts.append(f"{duration_text(eta)} left" if eta else "")
        self._output.line("  ".join(part for part in parts if part))


def _count(progress: Progress) -> str:
    return f"{progress.step}/{'?' if progress.total is None else progress.total}"
