"""What runs on the worker thread: the engine's generators, watched for cancelling, with previews between steps.

The engine, and with it torch, is imported inside the functions, so that opening a widget does not wait for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.config import ModelConfig, Recipe
from kaf_model.errors import UserError
from kaf_model.progress import Progress
from kaf_model.volume import Volume
from napari_kaf._device import describe_device, memory_in_use, share_processor
from napari_kaf._interrupt import Interrupted, interruptible
from napari_kaf._jobs import Control, Report
from napari_kaf._propagate_task import carried_labels, labelled_volume
from napari_kaf._runs import Run, RunStore
from napari_kaf._snapshot import Snapshot

if TYPE_CHECKING:
    from kaf_model.checkpoint import Model
    from kaf_model.config import FinetuneConfig
    from kaf_model.propagation import Propagation

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
class FinetuneRequest(Snapshot):
    """A finetuning on what is labelled, as it was asked for.

    Attributes:
        start: Checkpoint to start from, or None.
        architecture: Network that starts from random weights.
        preset: Its size.
        seconds: Budget.
        hold_out: Whether to measure Dice on held-out slices.
        device: A device name of the engine.
        store: Where the run is kept.
        run: What is known of it when it begins.
        clicked: `time.monotonic()` of the click.
    """

    start: Path | None
    architecture: str
    preset: str
    seconds: float
    hold_out: bool
    device: str
    store: RunStore
    run: Run
    clicked: float

    @property
    def output(self) -> Path:
        """Checkpoint to write."""
        return self.store.model_path(self.run.key)


@dataclass(frozen=True, eq=False)
class FinetuneOutcome:
    """What a finetuning gave.

    Attributes:
        run: What is known of it now; without steps nothing was learnt and nothing is kept.
        labels: The segmented volume; if it was ended before that, what the finished slices say, or None.
        problem: Why it could not be kept, or nothing.
    """

    run: Run
    labels: NDArray[np.integer[Any]] | None
    problem: str = ""


def finetune_task(request: FinetuneRequest, control: Control) -> Generator[Any, None, FinetuneOutcome]:
    """Finetune, show previews meanwhile, and segment the volume with the result.

    The run is kept here, not where the outcome is delivered, so that it is in the history also when its panel
    or its window was closed meanwhile.
    """
    try:
        return (yield from _finetuned(request, control))
    finally:
        request.store.ended(request.run.key)


def _finetuned(request: FinetuneRequest, control: Control) -> Generator[Any, None, FinetuneOutcome]:
    yield Report(Progress("loading the engine", 0, None))
    share_processor()
    from kaf_model.checkpoint import load_model
    from kaf_model.engine import NonFiniteLoss, choose_device, release_memory
    from kaf_model.finetune import finetune
    from kaf_model.keypoints import KeypointCache
    from kaf_model.labels import ClassMap

    device, cache = choose_device(request.device), KeypointCache()
    case, origin = labelled_volume(request), _origin(request)
    slices = origin["slices"] if origin["config"] else origin["start"].slices
    values = ClassMap.of_labels([case], request.class_names).values.tolist()
    carried = yield from carried_labels(case, values, slices, control)
    work = finetune(
        cases=[case],
        propagations=[carried] if carried else [],
        training=_training(request),
        class_names=request.class_names,
        output=request.output,
        device=request.device,
        cache=cache,
        **origin,
    )
    previews = _Previews(request.volume, request.clicked, control, cache, carried)
    if previews.carried is not None:
        yield VolumePreview(previews.carried)
    steps, best, began, looking = 0, None, time.monotonic(), 0.0
    try:
        with interruptible(lambda: control.cancelled):
            for progress in work:
                if progress.preview is not None:
                    began = began if steps else time.monotonic()
                    steps = progress.step
                if "held-out dice" in progress.losses:
                    best = max(best or 0.0, progress.losses["held-out dice"])
                yield Report(progress, describe_device(device), memory_in_use(device))
                if control.cancelled:
                    break
                paused = time.monotonic()
                yield from previews.due(progress)
                looking += time.monotonic() - paused if steps else 0.0
    except Interrupted:
        pass
    except NonFiniteLoss as error:
        raise UserError(str(error)) from error
    finally:
        work.close()  # writes the model
        _resume_file(request.output).unlink(missing_ok=True)
        run = replace(
            request.run,
            steps=steps,
            seconds=time.monotonic() - began - looking,
            stopped=control.cancelled,
            held_out_dice=best,
            device=describe_device(device),
        )
        problem = _keep(request.store, run)
    labels = None
    if steps:
        model = load_model(request.output, device=device)
        labels = yield from _result(model, control, previews)
        del model
        problem = _keep(request.store, run, labels)
    release_memory()
    return FinetuneOutcome(run, previews.carried if labels is None else labels, problem)


def _keep(store: RunStore, run: Run, labels: NDArray[np.integer[Any]] | None = None) -> str:
    """Keep a run that learnt something and no other; returns why it could not be kept."""
    if not run.steps:
        store.delete(run)
        return ""
    try:
        store.add(run, labels)
    except UserError as error:
        return str(error)
    return ""


def _training(request: FinetuneRequest) -> FinetuneConfig:
    """Settings of the preset, with the user's budget."""
    from kaf_model.config import FinetuneConfig

    return FinetuneConfig.preset(
        request.preset,  # type: ignore[arg-type]
        gpu=_has_gpu(request),
        steps=None,
        epochs=None,
        time_budget=request.seconds,
        holdout=0.25 if request.hold_out else 0.0,
    )


def _has_gpu(request: FinetuneRequest) -> bool:
    """Whether an NVIDIA GPU will train."""
    from kaf_model.engine import choose_device

    return choose_device(request.device).type == "cuda"


def _origin(request: FinetuneRequest) -> dict[str, Any]:
    """What the network starts from: a checkpoint, or random weights and the preset's preprocessing."""
    from kaf_model.checkpoint import load_checkpoint

    if request.start is not None:
        return {"config": None, "start": load_checkpoint(request.start)}
    recipe = Recipe.preset(request.preset)  # type: ignore[arg-type]
    model = ModelConfig.fresh(
        request.preset,  # type: ignore[arg-type]
        gpu=_has_gpu(request),
        architecture=request.architecture,
    )
    return {"config": model, "slices": recipe.slices, "keypoints": recipe.keypoints}


def _result(
    model: Model, control: Control, previews: _Previews
) -> Generator[Report, None, NDArray[np.integer[Any]] | None]:
    """Segment the volume with the trained model; in a hurry, what was last seen of it has to do."""
    progress = Progress("segmenting the volume", 0, previews.volume.num_slices)
    report = Report(progress, describe_device(model.device), memory_in_use(model.device))
    yield report
    try:
        with interruptible(lambda: control.in_a_hurry):
            for part in previews.segmented(model):
                if not isinstance(part, Progress):
                    return part
                yield replace(report, progress=replace(part, stage=report.progress.stage))
    except Interrupted:
        pass
    return previews.last_volume


class _Previews:
    """Decides when a preview is worth its time, and makes it.

    The first one is there before any training: what was carried from the finished slices to the others.

    Attributes:
        volume: The volume.
        carried: Labels by the finished slices alone.
        last_volume: Labels of the last preview of the whole volume by a model.
    """

    def __init__(
        self, volume: Volume, clicked: float, control: Control, cache: Any, carried: Propagation | None
    ) -> None:
        self.volume = volume
        self.carried = carried.labels() if carried else None
        self.last_volume: NDArray[np.integer[Any]] | None = None
        self._control, self._cache, self._propagation = control, cache, carried
        self._next_slice = 0.0
        self._next_volume = clicked + FIRST_VOLUME_PREVIEW

    def due(self, progress: Progress) -> Iterator[Report | SlicePreview | VolumePreview]:
        """Yield the previews that are due after a step; a training that leaves no memory for them goes on."""
        from kaf_model.engine import OutOfMemory, is_out_of_memory, release_memory

        now = time.monotonic()
        if progress.preview is None or now < min(self._next_slice, self._next_volume):
            return
        try:
            yield from self._look(progress.preview, now)
        except (RuntimeError, OutOfMemory) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            self._next_slice = self._next_volume = math.inf
            release_memory()
            told = "memory ran out: no more previews; the training goes on"
            yield Report(replace(progress, losses={}, preview=None, message=told))

    def _look(
        self, copy_model: Callable[[], Model], now: float
    ) -> Iterator[Report | SlicePreview | VolumePreview]:
        model = copy_model()
        if now >= self._next_volume:
            for part in self.segmented(model):
                if isinstance(part, Progress):
                    yield Report(replace(part, stage="looking at the whole volume"))
                else:
                    self.last_volume = part
                    yield VolumePreview(part)
            spent = time.monotonic() - now
            self._next_volume = now + max(_VOLUME_PREVIEW_EVERY, spent / _PREVIEW_SHARE)
        else:
            z = self._control.slice
            *_, labels = self.segmented(model, slices=[z])
            assert not isinstance(labels, Progress)
            yield SlicePreview(z, labels[z])
        self._next_slice = now + max(1.0, (time.monotonic() - now) / _PREVIEW_SHARE)

    def segmented(
        self, model: Model, slices: Sequence[int] | None = None
    ) -> Iterator[Progress | NDArray[np.integer[Any]]]:
        """Yield the progress of segmenting, and last the labels."""
        from kaf_model.segment import segment

        work = segment(model, self.volume, slices=slices, propagation=self._propagation, cache=self._cache)
        yield (yield from work).labels


def _resume_file(output: Path) -> Path:
    from kaf_model.training_files import resume_path

    return resume_path(output)
