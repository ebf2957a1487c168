"""Segmenting volumes on the worker thread: those that are open, or a folder to a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kaf_model.config import SegmentConfig
from kaf_model.errors import UserError, VolumeError
from kaf_model.evaluate import ClassScore, Scores, evaluate_volume
from kaf_model.progress import Progress
from kaf_model.volume import (
    Volume,
    find_volumes,
    read_labels,
    read_volume,
    volume_name,
    write_labels,
    write_maps,
)
from napari_kaf._classes import called_otherwise
from napari_kaf._device import describe_device, memory_in_use, share_processor
from napari_kaf._interrupt import Interrupted, interruptible
from napari_kaf._jobs import Control, Report
from napari_kaf._propagate_task import carried_labels, labelled_volume

if TYPE_CHECKING:
    from kaf_model.checkpoint import Model
    from kaf_model.propagation import Propagation
    from kaf_model.segment import Segmentation
    from napari_kaf._snapshot import Snapshot

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class OpenSource:
    """A volume that is open in the viewer.

    Attributes:
        key: Tells the volumes of one request apart.
        volume: The volume.
        reference: (Z, Y, X) labels to compare with, or None.
        finished: What is labelled on it, to be kept and carried to the other slices, or None.
    """

    key: int
    volume: Volume
    reference: NDArray[Any] | None = None
    finished: Snapshot | None = None


@dataclass(frozen=True, eq=False)
class SegmentRequest:
    """What is segmented, with what, and where it goes.

    Attributes:
        model: Checkpoint.
        config: What to return and how.
        device: A device name of the engine.
        sources: Volumes that are open; empty when a folder is given.
        folder: Folder of volumes.
        output: Folder for the label files of a folder.
        references: Folder of reference label files, or None.
        atlases: Folders of volumes that are labelled throughout, to be registered to the others, and of their label
            maps; or None.
    """

    model: Path
    config: SegmentConfig
    device: str
    sources: Sequence[OpenSource] = ()
    folder: Path | None = None
    output: Path | None = None
    references: Path | None = None
    atlases: tuple[Path, Path] | None = None


@dataclass(frozen=True, eq=False)
class VolumeSegmented:
    """One volume of a request is done.

    Attributes:
        key: As in its source; None for a file.
        name: Name of the volume.
        segmentation: Labels and uncertainty.
        class_names: Of the model, by label value.
        rows: Volumes in ml, and Dice and HD95 against a reference if there is one.
    """

    key: int | None
    name: str
    segmentation: Segmentation
    class_names: Mapping[int, str]
    rows: Sequence[ClassScore]


@dataclass(frozen=True)
class SegmentOutcome:
    """All that was scored, and whether it was cancelled.

    Attributes:
        scores: One row per volume and class.
        problems: Files that were passed over, references and finished slices that were not used, and why.
        stopped: Whether it was cancelled.
        finished: How many finished slices were kept and carried to the others.
        registered: How many volumes labelled ones were registered to.
    """

    scores: Scores
    problems: Sequence[str] = ()
    stopped: bool = False
    finished: int = 0
    registered: int = 0


@dataclass
class _Item:
    key: int | None
    name: str
    volume: Volume
    reference: NDArray[Any] | None = None
    finished: Snapshot | None = None
    problems: list[str] = field(default_factory=list)


def segment_task(request: SegmentRequest, control: Control) -> Generator[Any, None, SegmentOutcome]:
    """Segment each volume and score it; a cancelled one is not delivered."""
    yield Report(Progress("loading the model", 0, None))
    share_processor()
    from kaf_model.checkpoint import load_model
    from kaf_model.engine import choose_device, release_memory
    from kaf_model.keypoints import KeypointCache
    from kaf_model.segment import segment
    from kaf_model.segment_files import read_atlases

    device = choose_device(request.device)
    model = load_model(request.model, device=device)
    names = {label.value: label.name for label in model.classes if label.value}
    rows: list[ClassScore] = []
    problems: list[str] = []
    used = registered = 0
    total, items = _items(request)
    cache = KeypointCache()
    atlases = None
    if request.atlases is not None:
        told: list[str] = []
        reading = read_atlases(model, request.config, *request.atlases, fill_nan=0)
        atlases = yield from _worked(reading, control, told)
        problems += told if atlases is None else told[:-1]  # the last is that they fit
    for number, item in enumerate(items, start=1):
        if isinstance(item, str):
            problems.append(item)
            yield Report(Progress("segmenting", 0, None, message=item))
            continue
        problems += item.problems
        segmentation = carried = brought = None
        if item.finished is not None:
            carried, problem = yield from _carried(item.finished, model, names, control)
            if problem:
                problems.append(f"the finished slices of {item.name} were not used: {problem}")
        if atlases is not None and carried is None:
            stage = f"registering labelled volumes to {item.name} ({number} of {total})"
            brought = yield from _worked(atlases.labels_of(item.volume), control, problems, stage)
            registered += brought is not None
        work = segment(
            model, item.volume, request.config, propagation=carried, atlas_labels=brought, cache=cache
        )
        try:
            while segmentation is None and not control.cancelled:
                with interruptible(lambda: control.cancelled):
                    progress = next(work)
                stage = f"segmenting {item.name} ({number} of {total})"
                yield Report(
                    replace(progress, stage=stage),
                    describe_device(device),
                    memory_in_use(device),
                )
        except StopIteration as finished:
            segmentation = finished.value
        except Interrupted:
            pass
        finally:
            work.close()
        if segmentation is None:
            break
        scored = _scores(item, segmentation.labels, model, names)
        if request.output is not None:
            _write(request, item, segmentation)
        rows += scored
        used += len(carried.finished) if carried is not None else 0
        yield VolumeSegmented(item.key, item.name, segmentation, names, scored)
    del model
    release_memory()
    return SegmentOutcome(Scores(tuple(rows), tuple(problems)), problems, control.cancelled, used, registered)


def _worked(
    work: Generator[Progress, None, Result], control: Control, told: list[str], stage: str = ""
) -> Generator[Report, None, Result | None]:
    """Do some work, unless it is cancelled; what it tells is kept."""
    with contextlib.closing(work):
        while not control.cancelled:
            try:
                progress = next(work)
            except StopIteration as done:
                result: Result = done.value
                return result
            if progress.message:
                told.append(progress.message)
            yield Report(replace(progress, stage=stage or progress.stage))
    return None


def _carried(
    finished: Snapshot, model: Model, names: Mapping[int, str], control: Control
) -> Generator[Any, None, tuple[Propagation | None, str]]:
    """What finished slices say of the others, or why they cannot be used."""
    unlike = _unlike(finished.class_names, names)
    if unlike:
        return None, unlike
    values = [label.value for label in model.classes]
    carried = yield from carried_labels(labelled_volume(finished), values, model.slices, control)
    return carried, "" if carried is not None or control.cancelled else "they show no structure"


def _unlike(drawn: Mapping[int, str], known: Mapping[int, str]) -> str:
    """How classes that were drawn differ from those of a model; nothing if they do not."""
    for value, name in drawn.items():
        if value not in known:
            return f"the model has no class {value} ({name})"
        if called_otherwise(value, name, known[value]):
            return f"{value} is {name} in them and {known[value]} in the model"
    return ""


def _items(request: SegmentRequest) -> tuple[int, Iterator[_Item | str]]:
    """How many volumes there are, and each of them, or why it cannot be read."""
    if request.folder is None:
        sources = request.sources
        return len(sources), (
            _Item(source.key, source.volume.name, source.volume, source.reference, source.finished)
            for source in sources
        )
    if not request.folder.is_dir():
        raise UserError(f"there is no folder {request.folder}; choose one with volumes")
    paths = find_volumes([request.folder])
    if not paths:
        raise UserError(f"{request.folder} holds no volume (NIfTI, NRRD, MetaImage or a DICOM series)")
    return len(paths), (_read(path, request) for path in paths)


def _read(path: Path, request: SegmentRequest) -> _Item | str:
    references = request.references
    if request.output is not None:
        target = request.output / f"{volume_name(path)}.nii.gz"
        if target.exists():  # somebody may have drawn it
            return f"{path.name} passed over: {target} exists; move it away or choose another folder"
    try:
        item = _Item(None, volume_name(path), read_volume(path, fill_nan=0))
    except VolumeError as error:
        return f"passed over: {error}"
    if references is not None:
        matching = [file for file in find_volumes([references]) if volume_name(file) == item.name]
        try:
            if not matching:
                raise VolumeError(f"{item.name} has no reference of its name in {references}")
            item.reference = read_labels(matching[0], item.volume)
        except VolumeError as error:
            item.problems.append(f"not compared: {error}")
    return item


def _scores(
    item: _Item, labels: NDArray[np.integer[Any]], model: Model, names: Mapping[int, str]
) -> list[ClassScore]:
    """Dice, HD95 and volumes against the reference, or volumes alone."""
    volume = item.volume
    if item.reference is not None:
        return evaluate_volume(
            labels,
            item.reference,
            spacing=volume.spacing,
            voxel_ml=volume.voxel_ml,
            classes=names,
            volume=item.name,
        )
    nan = float("nan")
    return [
        ClassScore(item.name, value, name, nan, nan, float((labels == value).sum()) * volume.voxel_ml, nan)
        for value, name in names.items()
    ]


def _write(request: SegmentRequest, item: _Item, segmentation: Segmentation) -> None:
    assert request.output is not None
    try:
        request.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {request.output}: {error.strerror}; choose another folder"
        ) from error
    write_labels(request.output / f"{item.name}.nii.gz", segmentation.labels, item.volume)
    if segmentation.uncertainty is not None:
        target = request.output / "uncertainty" / f"{item.name}.nii.gz"
        target.parent.mkdir(exist_ok=True)
        write_maps(target, segmentation.uncertainty, item.volume)
