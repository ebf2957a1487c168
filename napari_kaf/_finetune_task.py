"""What runs on the worker thread: the engine's generators, watched for cancelling, with previews between steps.

The engine, and with it torch, is imported inside the functions, so that opening a widget does not wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import UserError
from kaf_model.progress import Progress
from kaf_model.volume import Volume
from napari_kaf._device import describe_device, memory_in_use, share_processor
from napari_kaf._jobs import Control, Report

if TYPE_CHECKING:
    from kaf_model.checkpoint import Model

FIRST_VOLUME_PREVIEW = 20.0  # seconds from the click, at the latest, to look at the whole volume
_PREVIEW_SHARE = 0.2  # at most this part of the time goes into previews
_VOLUME_PREVIEW_EVERY = 30.0


@dataclass(frozen=True, eq=False)
class SlicePreview:
    """What the model in training says of one slice."""

    z: int
    labels: NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class VolumePreview:
    """What the model in training says of the whole volume."""

    labels: NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class FinetuneRequest:
    """A finetuning as it was asked for: copies, so that painting goes on meanwhile.

    Attributes:
        volume: The volume.
        labels: (Z, Y, X) of it.
        statuses: Meaning of each labelled slice.
        class_names: Names by label value.
        start: Checkpoint to start from, or None.
        preset: Size of a network that starts from random weights.
        seconds: Budget.
        hold_out: Whether to measure Dice on held-out slices.
        device: A device name of the engine.
        output: Checkpoint to write.
        clicked: `time.monotonic()` of the click.
    """

    volume: Volume
    labels: NDArray[np.integer[Any]]
    statuses: Mapping[int, str]
    class_names: Mapping[int, str]
    start: Path | None
    preset: str
    seconds: float
    hold_out: bool
    device: str
    output: Path
    clicked: float


@dataclass(frozen=True, eq=False)
class FinetuneOutcome:
    """What a finetuning gave.

    Attributes:
        labels: The segmented volume, or None if it was stopped before anything was learnt.
        steps: Optimiser steps.
        seconds: How long it trained.
        stopped: Whether it was cancelled.
        held_out_dice: The best Dice on held-out slices, if asked for.
        device: Where it ran.
    """

    labels: NDArray[np.integer[Any]] | None
    steps: int
    seconds: float
    stopped: bool
    held_out_dice: float | None
    device: str


def finetune_task(request: FinetuneRequest, control: Control) -> Generator[Any, None, FinetuneOutcome]:
    """Finetune, show previews meanwhile, and segment the volume with the result."""
    yield Report(Progress("loading the engine", 0, None))
    share_processor()
    from kaf_model.config import FinetuneConfig, ModelConfig
    from kaf_model.engine import NonFiniteLoss, choose_device, release_memory
    from kaf_model.finetune import finetune
    from kaf_model.keypoints import KeypointCache
    from kaf_model.labels import LabelledVolume, SliceStatus

    device = choose_device(request.device)
    cache = KeypointCache()
    statuses = {z: SliceStatus(status) for z, status in request.statuses.items()}
    work = finetune(
        None if request.start else ModelConfig.preset(request.preset),  # type: ignore[arg-type]
        [LabelledVolume(request.volume, request.labels, statuses)],
        FinetuneConfig.preset(
            request.preset,  # type: ignore[arg-type]
            steps=None,
            epochs=None,
            time_budget=request.seconds,
            holdout=0.25 if request.hold_out else 0.0,
        ),
        start=request.start,
        class_names=request.class_names,
        output=request.output,
        device=request.device,
        cache=cache,
    )
    previews = _Previews(request.volume, request.clicked, control, cache)
    last: Progress | None = None
    best: float | None = None
    model: Model | None = None
    began = time.monotonic()
    try:
        while True:
            progress = next(work)
            if progress.preview is not None:
                began = began if last is not None else time.monotonic()
                last = progress
            if "held-out dice" in progress.losses:
                best = max(best or 0.0, progress.losses["held-out dice"])
            yield Report(progress, describe_device(device), memory_in_use(device))
            if control.cancelled:
                model = progress.preview() if progress.preview is not None else None
                break
            yield from previews.due(progress)
    except StopIteration as finished:
        model = finished.value.model
    except NonFiniteLoss as error:
        raise UserError(str(error)) from error
    finally:
        work.close()
        _resume_file(request.output).unlink(missing_ok=True)
    seconds = time.monotonic() - began
    labels = None
    if model is not None:
        for report in _segmented(model, request.volume, cache):
            if isinstance(report, Progress):
                yield Report(report, describe_device(device), memory_in_use(device))
            else:
                labels = report
    steps = last.step if last is not None else 0
    del model, last, work
    release_memory()
    return FinetuneOutcome(labels, steps, seconds, control.cancelled, best, describe_device(device))


class _Previews:
    """Decides when a preview is worth its time, and makes it."""

    def __init__(self, volume: Volume, clicked: float, control: Control, cache: Any) -> None:
        self._volume, self._control, self._cache = volume, control, cache
        self._next_slice = 0.0
        self._next_volume = clicked + FIRST_VOLUME_PREVIEW
        self._shown_slice = -1

    def due(self, progress: Progress) -> Iterator[SlicePreview | VolumePreview]:
        """Yield the previews that are due after a step; a change of the shown slice makes one due."""
        now = time.monotonic()
        z = self._control.slice
        whole = now >= self._next_volume
        if progress.preview is None or not (whole or now >= self._next_slice):
            return
        model = progress.preview()
        if whole:
            labels = [
                part
                for part in _segmented(model, self._volume, self._cache)
                if not isinstance(part, Progress)
            ]
            yield VolumePreview(labels[0])
            spent = time.monotonic() - now
            self._next_volume = now + max(_VOLUME_PREVIEW_EVERY, spent / _PREVIEW_SHARE)
        else:
            only = [
                part
                for part in _segmented(model, self._volume, self._cache, slices=[z])
                if not isinstance(part, Progress)
            ]
            yield SlicePreview(z, only[0][z])
            spent = time.monotonic() - now
        self._next_slice = now + max(1.0, (time.monotonic() - now) / _PREVIEW_SHARE)


def _segmented(
    model: Model, volume: Volume, cache: Any, slices: Sequence[int] | None = None
) -> Iterator[Progress | NDArray[np.integer[Any]]]:
    """Yield the progress of segmenting, and last the labels."""
    from kaf_model.segment import segment

    segmentation = yield from segment(model, volume, slices=slices, cache=cache)
    yield segmentation.labels


def _resume_file(output: Path) -> Path:
    from kaf_model.training_files import resume_path

    return resume_path(output)


def check_request(statuses: Mapping[int, str]) -> None:
    """Say at once what would fail later: nothing to learn from.

    Raises:
        UserError: If no slice is marked.
    """
    if not statuses:
        raise UserError(
            "no slice is marked yet: paint a structure on a slice, then mark the slice complete; "
            "three slices spread over the volume are a good beginning"
        )
