"""Segmenting files: volumes in, label maps on the same grid out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.atlases import Atlases
from kaf_model.cases import check_named, read_cases
from kaf_model.checkpoint import ClassLabel, Model
from kaf_model.config import SegmentConfig
from kaf_model.errors import UserError, VolumeError
from kaf_model.evaluate import MAP_ENDINGS
from kaf_model.keypoints import KeypointCache
from kaf_model.label_names import LABEL_NAMES
from kaf_model.labels import ClassMap, LabelledVolume
from kaf_model.progress import Progress
from kaf_model.propagation import propagate
from kaf_model.segment import Segmentation, segment
from kaf_model.text_files import write_atomically
from kaf_model.volume import (
    Volume,
    find_volumes,
    read_volume,
    same_grid,
    volume_name,
    write_labels,
    write_maps,
)
from kaf_model.volume_files import format_of

_ENDING = ".nii.gz"


@dataclass(frozen=True)
class Planned:
    """A volume and where its label map goes."""

    volume: Path
    labels: Path

    @property
    def maps(self) -> tuple[Path, Path]:
        """Where its probabilities and its uncertainty go: beside the labels."""
        name, (_, ending) = volume_name(self.labels), format_of(self.labels)
        probabilities, uncertainty = (self.labels.with_name(f"{name}{kind}{ending}") for kind in MAP_ENDINGS)
        return probabilities, uncertainty


@dataclass(frozen=True)
class SegmentedFiles:
    """What came of it.

    Attributes:
        written: Label maps.
        failed: A line for each volume that was passed over.
    """

    written: tuple[Path, ...]
    failed: tuple[str, ...]


def plan_outputs(source: Path, output: Path, *, overwrite: bool = False) -> list[Planned]:
    """Decide which volumes are segmented into which files.

    An output that ends in .nii or .nii.gz is the file of a single volume; else it is a folder.

    Args:
        source: A volume or a folder of volumes.
        output: File or folder.
        overwrite: Whether label maps that are there may be replaced; somebody may have drawn them.

    Raises:
        UserError: If there is no volume, one file is to hold several, or a file would be overwritten.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; check the path")
    volumes = find_volumes([source])
    if not volumes:
        raise UserError(f"there is no volume in {source}; expected NIfTI, NRRD, MetaImage or DICOM")
    if format_of(output)[0] == "nifti" and not output.is_dir():
        if len(volumes) > 1:
            raise UserError(
                f"{source} holds {len(volumes)} volumes, {output.name} can hold one; give a folder as output"
            )
        planned = [Planned(volumes[0], output)]
    elif format_of(output)[0] or output.is_file():
        raise UserError(f"{output.name}: label maps are written as .nii.gz or .nii, or into a folder")
    else:
        names = _names(source, volumes)
        planned = [Planned(volume, output / f"{name}{_ENDING}") for volume, name in names.items()]
    inputs = {volume.resolve() for volume in volumes}
    targets: dict[Path, Path] = {}
    for plan in planned:
        for path in (plan.labels, *plan.maps):
            if path.resolve() in inputs:
                raise UserError(f"{path} is an input and would be overwritten; give another output")
        if plan.labels.exists() and not overwrite:
            raise UserError(
                f"{plan.labels} exists; give another output, --overwrite to replace label maps, or "
                "--skip-existing to segment the others"
            )
        other = targets.setdefault(plan.labels, plan.volume)
        if other is not plan.volume:
            raise UserError(f"{other} and {plan.volume} would both be segmented into {plan.labels}")
    return planned


def _names(source: Path, volumes: Sequence[Path]) -> dict[Path, str]:
    """Names of volumes, with those of the folders they lie in where two have one name."""
    names = {volume: volume_name(volume) for volume in volumes}
    count = Counter(names.values())
    inner = {volume: volume.relative_to(source).parts[:-1] for volume in volumes if volume != source}
    return {
        volume: "_".join([*(inner.get(volume, ()) if count[name] > 1 else ()), name])
        for volume, name in names.items()
    }


def segment_files(
    model: Model,
    planned: Sequence[Planned],
    config: SegmentConfig | None = None,
    *,
    labelled: Mapping[str, LabelledVolume] | None = None,
    atlases: Atlases | None = None,
    cache: KeypointCache | None = None,
    **reading: Any,
) -> Generator[Progress, None, SegmentedFiles]:
    """Segment volumes one after the other; what cannot be read or written is named and passed over.

    Args:
        model: A trained model.
        planned: Volumes and outputs, as `plan_outputs` pairs them.
        config: What to write and how.
        labelled: By name, those of the volumes of which some slices are labelled: the finished ones are kept,
            and what they show is carried to the others (`propagation`).
        atlases: Volumes that are labelled throughout, to be registered to those without finished slices.
        cache: Keypoints found before.
        **reading: As for `read_volume`.

    Yields:
        Progress in volumes, or in slices of a single one; a message about each volume that is done.

    Returns:
        What was written and what was not.

    Raises:
        UserError: If the output cannot be written, or no volume could be segmented.
    """
    config = config or SegmentConfig()
    for folder in dict.fromkeys(plan.labels.parent for plan in planned):
        _check_writable(folder)
    written: list[Path] = []
    failed: list[str] = []
    for number, plan in enumerate(planned):
        try:
            case = (labelled or {}).get(volume_name(plan.volume))
            volume = case.volume if case else read_volume(plan.volume, **reading)
            work = _segment(model, volume, config, case, atlases, cache)
            result = yield from _counted(work, number, len(planned))
            differences = _write(plan, volume, result)
        except VolumeError as error:
            failed.append(str(error))
            yield Progress("segmenting", number + 1, len(planned), message=f"passed over: {error}")
            continue
        written.append(plan.labels)
        differing = f"NOT on the grid of the source: {'; '.join(differences)}"
        grid = differing if differences else "same grid as source"
        message = f"{plan.labels}: {volumes_ml(result.labels, volume, model.classes)}; {grid}"
        for notice in volume.notices:
            message += f"\n  {notice}"
        if len(planned) == 1:
            yield Progress("segmenting", volume.num_slices, volume.num_slices, message=message)
        else:
            yield Progress("segmenting", number + 1, len(planned), message=message)
    if not written:
        none = f"none of {len(failed)} volumes could be segmented: " if len(failed) > 1 else ""
        raise UserError(none + failed[0])
    return SegmentedFiles(tuple(written), tuple(failed))


def check_known(cases: Iterable[LabelledVolume], model: Model) -> None:
    """Check that a model knows every label that is painted on a labelled slice.

    Raises:
        UserError: Naming the first that it does not know.
    """
    names = {label.value: label.name for label in model.classes}
    check_named(cases, names, advice="take a model that knows it, or correct the labels")


def read_atlases(
    model: Model, config: SegmentConfig, images: Path, labels: Path, **reading: Any
) -> Generator[Progress, None, Atlases | None]:
    """Read the labelled volumes that are to be registered to those that a model segments.

    Args:
        model: The model.
        config: How many are used, and how well they have to fit each other.
        images: Folder of volumes that are labelled throughout.
        labels: Folder of their label maps.
        **reading: As for `read_volume`.

    Yields:
        Progress in volumes and registrations, with a message about how well they fit.

    Returns:
        None if they do not fit each other.

    Raises:
        UserError: If there are not two that can be registered, or the model does not know a label.
    """
    cases = yield from read_cases(images, labels, tell_unpaired=False, **reading)
    check_known(cases, model)
    atlases = Atlases(cases, ClassMap(model.classes), model.slices, most=config.atlases, device=model.device)
    if len(atlases) < 2:
        raise UserError(
            "two or more volumes are needed that are labelled throughout, with slices at most two pixels apart; of "
            f"the {len(cases)} in {images} {len(atlases)} can be registered to others"
        )
    agreement = yield from atlases.agreement(config.least_agreement, "segment others by them")
    return None if agreement is None else atlases


def write_class_names(folder: Path, classes: Sequence[ClassLabel], *, overwrite: bool) -> str:
    """Write the names of the label values beside label maps.

    Args:
        folder: Where the label maps are.
        classes: The classes.
        overwrite: Whether other names that are there may be replaced.

    Returns:
        What is to be told if other names are there and stay, else nothing.

    Raises:
        UserError: If the file cannot be written.
    """
    path = folder / LABEL_NAMES
    text = json.dumps({str(label.value): label.name for label in classes}, indent=2) + "\n"
    try:
        if path.is_file() and not overwrite and path.read_bytes() != text.encode():
            return f"{path} is not what the model calls its classes and stays; --overwrite replaces it"
        write_atomically(path, lambda file: file.write(text))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from error
    return ""


def volumes_ml(labels: NDArray[np.integer], volume: Volume, classes: Sequence[ClassLabel]) -> str:
    """Say in words how large each class is."""
    sizes = [np.count_nonzero(labels == label.value) * volume.voxel_ml for label in classes[1:]]
    named = zip(classes[1:], sizes, strict=True)
    return ", ".join(f"{label.name} {_ml(size)} ml" for label, size in named)


def _ml(size: float) -> str:
    return f"{size:.1f}" if size >= 1 or not size else f"{size:.3g}"


def _write(plan: Planned, volume: Volume, result: Segmentation) -> list[str]:
    write_labels(plan.labels, result.labels, like=volume)
    differences = same_grid(plan.labels, like=volume)
    for path, maps in zip(plan.maps, (result.probabilities, result.uncertainty), strict=True):
        if maps is not None:
            write_maps(path, maps, like=volume)
            differences += same_grid(path, like=volume)
    return differences


def _segment(
    model: Model,
    volume: Volume,
    config: SegmentConfig,
    case: LabelledVolume | None,
    atlases: Atlases | None,
    cache: KeypointCache | None,
) -> Generator[Progress, None, Segmentation]:
    if case is None:
        brought = None
        if atlases is not None and config.registration:
            brought = yield from atlases.labels_of(volume)
        return (yield from segment(model, volume, config, atlas_labels=brought, cache=cache))
    values = [label.value for label in model.classes]
    carried = yield from propagate(case, values, model.slices)
    result = yield from segment(model, volume, config, propagation=carried, cache=cache)
    if carried is None:
        case.put_back(result.labels, values)
        told = f"the finished slices of {volume.name} show no structure: they stay, and nothing is carried from them"
        yield Progress("segmenting", 0, volume.num_slices, message=told)
    return result


def _counted(
    work: Generator[Progress, None, Segmentation], number: int, total: int
) -> Generator[Progress, None, Segmentation]:
    """Report slices of a single volume, or that volume `number` of `total` is under way."""
    while True:
        try:
            progress = next(work)
        except StopIteration as done:
            result: Segmentation = done.value
            return result
        if total > 1:
            yield Progress("segmenting", number, total, message=progress.message)
        elif progress.step != progress.total:  # the last report comes once the file is written
            yield progress


def _check_writable(folder: Path) -> None:
    probe = folder / ".kaf-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another place") from error
