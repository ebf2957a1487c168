"""Pretraining on the worker thread, and what is looked at before it starts."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kaf_model.config import CorrespondenceConfig, Recipe
from kaf_model.errors import UserError, VolumeError
from kaf_model.progress import Progress
from kaf_model.volume import VolumeInfo, find_volumes, inspect_volume
from napari_kaf._device import describe_device, memory_in_use, share_processor
from napari_kaf._interrupt import Interrupted, interruptible
from napari_kaf._jobs import Control, Report
from napari_kaf._pair_picture import PairPicture

if TYPE_CHECKING:
    from kaf_model.config import PretrainConfig

_TRIAL_STEPS = 3


@dataclass(frozen=True)
class Found:
    """A file of the folder: what its header tells, or why it cannot be used."""

    path: Path
    info: VolumeInfo | None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class PretrainRequest:
    """A pretraining as it was asked for.

    Attributes:
        paths: Volumes.
        recipe: Settings of the preset.
        training: Settings of the training.
        device: A device name of the engine.
        output: Checkpoint to write.
        resume: Whether to go on from an interrupted one.
    """

    paths: Sequence[Path]
    recipe: Recipe
    training: PretrainConfig
    device: str
    output: Path
    resume: bool = False


@dataclass(frozen=True)
class PretrainOutcome:
    """What a pretraining gave.

    Attributes:
        path: The checkpoint, or None if it was stopped before anything was learnt.
        steps: Optimiser steps in all.
        stopped: Whether it can be resumed.
    """

    path: Path | None
    steps: int
    stopped: bool


def scan_task(folder: Path, control: Control) -> Generator[Any, None, list[Found]]:
    """Read the header of every volume in a folder.

    Raises:
        UserError: If there is no folder or no volume in it.
    """
    yield Report(Progress("looking", 0, None))
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; choose one with volumes")
    paths = find_volumes([folder])
    if not paths:
        raise UserError(f"{folder} holds no volume (NIfTI, NRRD, MetaImage or a DICOM series)")
    found = []
    for number, path in enumerate(paths, start=1):
        found.append(_inspected(path))
        yield Report(Progress("looking", number, len(paths)))
        if control.cancelled:
            break
    return found


def trial_task(request: PretrainRequest, control: Control) -> Generator[Any, None, float]:
    """Train a few steps and throw them away; returns seconds a step, the first not counted."""
    yield Report(Progress("loading the engine", 0, None))
    share_processor()
    from kaf_model.pretrain import pretrain

    training = request.training.override(steps=_TRIAL_STEPS, time_budget=None, epochs=None)
    recipe = request.recipe
    work = pretrain(
        recipe.model,
        request.paths[:2],
        training,
        slices=recipe.slices,
        keypoints=recipe.keypoints,
        device=request.device,
    )
    times: list[float] = []
    last = time.monotonic()
    for progress in work:
        if progress.losses:
            times.append(time.monotonic() - last)
        last = time.monotonic()
        yield Report(progress)
        if control.cancelled:
            work.close()
            raise UserError("the measurement was cancelled")
    return float(np.mean(times[1:] or times))


def pretrain_task(request: PretrainRequest, control: Control) -> Generator[Any, None, PretrainOutcome]:
    """Show one pair, then pretrain; a cancelled training keeps its checkpoint and can be resumed."""
    yield Report(Progress("loading the engine", 0, None))
    share_processor()
    from kaf_model.engine import NonFiniteLoss, choose_device, release_memory
    from kaf_model.keypoints import KeypointCache
    from kaf_model.pretrain import pretrain

    device = choose_device(request.device)
    picture = _picture(request)
    if picture is not None:
        yield picture
    recipe = request.recipe
    work = pretrain(
        recipe.model,
        request.paths,
        request.training,
        slices=recipe.slices,
        keypoints=recipe.keypoints,
        output=request.output,
        resume=request.resume,
        device=request.device,
        cache=KeypointCache(),
    )
    steps, stopped = 0, False
    try:
        with interruptible(lambda: control.cancelled):
            for progress in work:
                steps = progress.step if progress.losses else steps
                yield Report(progress, describe_device(device), memory_in_use(device))
                control.wait_while_paused()
                if control.cancelled:
                    stopped = True
                    break
    except Interrupted:
        stopped = True
    except NonFiniteLoss as error:
        raise UserError(str(error)) from error
    finally:
        work.close()
        release_memory()
    return PretrainOutcome(request.output if request.output.is_file() else None, steps, stopped)


def _inspected(path: Path) -> Found:
    try:
        info = inspect_volume(path)
    except VolumeError as error:
        return Found(path, None, str(error))
    if info.num_frames > 1:
        return Found(path, None, f"holds {info.num_frames} frames; split it into one file a frame")
    if info.shape[0] < 2:
        return Found(path, None, "has a single slice; pretraining compares neighbouring ones")
    return Found(path, info)


def _picture(request: PretrainRequest) -> PairPicture | None:
    """The keypoints and correspondences of two slices in the middle of the first volume that can be read."""
    from kaf_model.correspondences import find_correspondences
    from kaf_model.keypoints import detect_keypoints, make_detector
    from kaf_model.slices import Slices
    from kaf_model.volume import read_volume

    for path in request.paths:
        try:
            volume = read_volume(path)
        except VolumeError:
            continue
        z = volume.num_slices // 2
        images = Slices(volume, request.recipe.slices).images([z - 1, z])
        detector = make_detector(request.recipe.keypoints)
        keypoints = [detect_keypoints(image, detector) for image in images]
        config: CorrespondenceConfig = request.training.correspondences
        found = find_correspondences(keypoints[0], keypoints[1], config)
        return PairPicture(
            (images[0], images[1]),
            (keypoints[0].positions, keypoints[1].positions),
            found.pairs,
            f"{volume.name}, slices {z - 1} and {z}: {len(keypoints[0])} and {len(keypoints[1])} keypoints, "
            f"{len(found)} correspondences",
        )
    return None
