"""Labelled cases from folders: images and label maps that pair by file name, and what their slices mean."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kaf_model.errors import UserError, VolumeError
from kaf_model.labels import LabelledVolume, SliceStatus
from kaf_model.progress import Progress
from kaf_model.volume import find_volumes, read_labels, read_volume, volume_name

SliceMarks = Mapping[SliceStatus, Sequence[tuple[str, Sequence[int]]]]
"""Slices that somebody named, by what their labels mean: (case, indices)."""


@dataclass(frozen=True)
class CaseFiles:
    """A case that has an image and a label map."""

    name: str
    image: Path
    labels: Path


def pair_cases(images: Path, labels: Path) -> tuple[list[CaseFiles], list[str]]:
    """Pair the volumes of two folders by file name.

    Returns:
        The pairs, and a notice about those without a partner.

    Raises:
        UserError: If a folder does not exist or nothing pairs.
    """
    if images.resolve() == labels.resolve():
        raise UserError(
            f"images and labels are the same folder, {images}; give that of the label maps as labels"
        )
    found = {path: _by_name(role, path) for role, path in (("images", images), ("labels", labels))}
    common = sorted(found[images].keys() & found[labels].keys())
    if not common:
        raise UserError(
            f"no image in {images} ({_listed(found[images])}) has the name of a label map in {labels} "
            f"({_listed(found[labels])}): they pair by file name"
        )
    notices = []
    for path, other, what in ((images, labels, "label map"), (labels, images, "image")):
        alone = sorted(found[path].keys() - found[other].keys())
        if alone:
            notices.append(f"passed over {len(alone)} in {path} without {what}: {_listed(alone)}")
    return [CaseFiles(name, found[images][name], found[labels][name]) for name in common], notices


def read_cases(
    images: Path,
    labels: Path,
    *,
    names: Sequence[str] | None = None,
    marks: SliceMarks | None = None,
    tell_unpaired: bool = True,
    **reading: Any,
) -> Generator[Progress, None, list[LabelledVolume]]:
    """Read labelled cases.

    Args:
        images: Folder of images.
        labels: Folder of label maps.
        names: Cases to use, with or without file ending; None uses all. A chosen case that cannot be read
            is an error; among all it is named and passed over.
        marks: The slices that count as labelled; None or empty counts all slices of the cases as complete.
        tell_unpaired: Whether to say which images have no label map, and the other way round.
        **reading: As for `read_volume`.

    Yields:
        Progress in cases, and a message for what is passed over.

    Returns:
        The cases that have labelled slices.

    Raises:
        UserError: If a name is unknown, a slice is named twice, or no case is left.
    """
    pairs, notices = pair_cases(images, labels)
    statuses = _statuses(marks or {}, pairs)
    for notice in notices if tell_unpaired else []:
        yield Progress("reading", 0, len(pairs), message=notice)
    chosen = _choose(names, pairs)
    if statuses:
        outside = sorted(statuses.keys() - {case.name for case in chosen})
        if outside:
            raise UserError(f"slices of {outside[0]} are named, but --cases leaves it out")
        unused = [case.name for case in chosen if case.name not in statuses]
        if names is not None and unused:
            message = f"not used, since slices are named and none of theirs: {_listed(unused)}"
            yield Progress("reading", 0, len(chosen), message=message)
        chosen = [case for case in chosen if case.name in statuses]
    cases: list[LabelledVolume] = []
    reasons: list[str] = []
    for number, case in enumerate(chosen, start=1):
        message = ""
        try:
            volume = read_volume(case.image, **reading)
            painted = read_labels(case.labels, like=volume)
            complete = dict.fromkeys(range(volume.num_slices), SliceStatus.COMPLETE)
            cases.append(LabelledVolume(volume, painted, statuses.get(case.name, complete)))
        except VolumeError as error:
            if names is not None or statuses:
                raise
            reasons.append(str(error))
            message = f"passed over {case.name}: {error}"
        yield Progress("reading", number, len(chosen), message=message)
    if not cases:
        raise UserError(f"no labelled case can be used: {reasons[0]}")
    return cases


def check_named(
    cases: Iterable[LabelledVolume],
    names: Mapping[int, str],
    advice: str = "name it as well or correct the labels",
) -> None:
    """Check that every label painted on a labelled slice is among the named classes.

    Args:
        cases: Labelled volumes.
        names: By value.
        advice: What to do about one that is not.

    Raises:
        UserError: Naming the first that is not.
    """
    for case in cases:
        for z in sorted(case.statuses):
            unknown = sorted(set(np.unique(case.labels[z]).tolist()) - {0, *names})
            if unknown:
                known = ", ".join(f"{value}={name}" for value, name in sorted(names.items()))
                raise UserError(
                    f"slice {z} of {case.volume.name} has label {unknown[0]}, which is not among the classes "
                    f"{known}; {advice}"
                )


def _by_name(role: str, folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{role}: there is no folder {folder}")
    found: dict[str, Path] = {}
    for path in find_volumes([folder]):
        name = volume_name(path)
        if name in found:
            raise UserError(f"{found[name]} and {path} have the same name; which of them counts?")
        found[name] = path
    if not found:
        raise UserError(f"{role}: there is no volume in {folder}")
    return found


def _choose(names: Sequence[str] | None, pairs: Sequence[CaseFiles]) -> list[CaseFiles]:
    by_name = {case.name: case for case in pairs}
    if names is None:
        return list(pairs)
    return [by_name[known] for known in dict.fromkeys(_known(name, by_name) for name in names)]


def _known(name: str, known: Iterable[str]) -> str:
    plain = volume_name(name.strip())
    if plain not in known:
        raise UserError(f"there is no case {plain!r}; there are: {_listed(known, most=20)}")
    return plain


def _statuses(marks: SliceMarks, pairs: Sequence[CaseFiles]) -> dict[str, dict[int, SliceStatus]]:
    known = [case.name for case in pairs]
    statuses: dict[str, dict[int, SliceStatus]] = {}
    for status, named in marks.items():
        for name, indices in named:
            own = statuses.setdefault(_known(name, known), {})
            for index in indices:
                if own.setdefault(index, status) is not status:
                    raise UserError(f"slice {index} of {name} is named both {own[index]} and {status}")
    return statuses


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
