"""The value that long work yields: where it is, what it measures, when it will end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from kaf_model.checkpoint import Model

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """One report of a long task.

    Attributes:
        stage: What is being done, in words a person reads: "reading", "detecting keypoints", "training".
        step: Units done in this stage.
        total: Units of this stage, or None when it cannot be known.
        losses: Named values to plot against `step`, e.g. {"total": 1.2, "local": 3.4}.
        eta: Seconds to the end of the stage, or None when it cannot be known.
        message: Something to tell the user once, e.g. a volume that was passed over; else empty.
        preview: Makes a copy of the model as it is now, for a look while training goes on; to be called
            before the next report is asked for. None where there is no model.
    """

    stage: str
    step: int
    total: int | None
    losses: Mapping[str, float] = field(default_factory=dict)
    eta: float | None = None
    message: str = ""
    preview: Callable[[], Model] | None = None


def reported(work: Generator[object, None, Result], report: Progress) -> Generator[Progress, None, Result]:
    """Do work that pauses now and then, with one and the same report at each pause.

    Args:
        work: What is done; what it yields is passed over.
        report: What is yielded instead.

    Returns:
        What the work returns.
    """
    while True:
        try:
            next(work)
        except StopIteration as done:
            result: Result = done.value
            return result
        yield report


def retold(
    work: Generator[Progress, None, Result], change: Callable[[Progress], Progress]
) -> Generator[Progress, None, Result]:
    """Do work with its reports changed, and close it when this is closed.

    Args:
        work: What is done.
        change: Makes the report that is yielded instead of one.

    Returns:
        What the work returns.
    """
    with closing(work):
        while True:
            try:
                progress = next(work)
            except StopIteration as done:
                result: Result = done.value
                return result
            yield change(progress)


def finished(work: Generator[object, None, Result]) -> Result:
    """Do work to its end, without its reports, and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            result: Result = done.value
            return result
