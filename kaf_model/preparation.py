"""Volumes as the trainings read them: slices that are resampled, normalised and searched for keypoints once."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaf_model.config import KeypointConfig, SliceConfig
from kaf_model.errors import UserError
from kaf_model.keypoints import Detector, KeypointCache, Keypoints, iter_detect, make_detector
from kaf_model.labels import ClassMap, LabelledVolume
from kaf_model.progress import Progress, reported
from kaf_model.slices import Slices, middle_slice
from kaf_model.temporary_arrays import zeros_on_disk
from kaf_model.volume import Unreadable, Volume, scan_volumes

IN_MEMORY_LIMIT = 2 * 2**30
"""Bytes of prepared slices kept in memory; what comes after lies in a temporary file."""


@dataclass(frozen=True)
class PreparedVolume:
    """A volume as the trainings read it.

    Attributes:
        name: The volume's name.
        images: (Z, S, H, W) normalised slices as the network reads them, float16 to halve their memory.
        keypoints: Keypoints of each slice.
        positions: (Z,) slice positions, 0..1 along the body.
        spacing: (z, y, x) mm of the source.
        intensity: The values the volume was clipped at and scaled by.
    """

    name: str
    images: NDArray[np.float16]
    keypoints: Sequence[Keypoints]
    positions: NDArray[np.float32]
    spacing: tuple[float, float, float]
    intensity: dict[str, float]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class LabelledSlice:
    """A slice to learn from.

    Attributes:
        image: (S, H, W) normalised, as the network reads it.
        keypoints: (N, 2) positions.
        labels: (H, W) class indices, or IGNORED where nothing is known.
    """

    image: NDArray[np.float16]
    keypoints: NDArray[np.float32]
    labels: NDArray[np.int64]


class SliceStore:
    """Where prepared slices lie: in memory up to a limit, then in temporary files that go with their array."""

    def __init__(self, limit: int = IN_MEMORY_LIMIT) -> None:
        self.room = limit

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.float16]:
        """An array to be filled with slices."""
        size = 2 * int(np.prod(shape))
        if size <= self.room:
            self.room -= size
            return np.empty(shape, np.float16)
        return zeros_on_disk(shape, "slices")


def prepare_volumes(
    volumes: Iterable[Volume | Unreadable | str | Path],
    slices: SliceConfig,
    keypoints: KeypointConfig | None,
    *,
    cache: KeypointCache | None = None,
    store: SliceStore | None = None,
) -> Generator[Progress, None, list[PreparedVolume]]:
    """Prepare volumes one after the other; what cannot be used is named and passed over.

    Args:
        volumes: Volumes, or paths that are read here. They are taken one at a time, so that an iterable that
            reads them when asked keeps only one in memory.
        slices: Preprocessing.
        keypoints: Detection; None looks for none.
        cache: Keypoints found before; None detects all.
        store: Where slices are kept.

    Yields:
        One report a batch of slices, and one for each volume that is passed over.

    Returns:
        The prepared volumes.

    Raises:
        UserError: If none can be used.
    """
    store = store or SliceStore()
    detector = make_detector(keypoints) if keypoints else None
    total = len(volumes) if isinstance(volumes, Sized) else None
    prepared: list[PreparedVolume] = []
    passed_over: list[str] = []
    for number, source in enumerate(volumes):
        for volume in [source] if isinstance(source, (Volume, Unreadable)) else scan_volumes([source]):
            if isinstance(volume, Unreadable):
                passed_over.append(f"{volume.path.name}: {volume.reason}")
                yield Progress("preparing", number + 1, total, message=f"passed over {passed_over[-1]}")
                continue
            slices_done = prepare_slices(volume, slices, detector, store=store, cache=cache)
            prepared.append((yield from reported(slices_done, Progress("preparing", number, total))))
        yield Progress("preparing", number + 1, total)
    if not prepared:
        reasons = "; ".join(passed_over[:3]) or "there was none"
        raise UserError(f"no volume can be used: {reasons}")
    return prepared


def prepare_labelled(
    cases: Sequence[LabelledVolume],
    classes: ClassMap,
    config: SliceConfig,
    keypoints: KeypointConfig | None,
    *,
    cache: KeypointCache | None = None,
) -> Generator[Progress, None, tuple[list[PreparedVolume], list[LabelledSlice]]]:
    """Prepare the labelled slices of labelled volumes, and only those; without `keypoints` none are looked for.

    Yields:
        One report a batch of slices.

    Returns:
        The volumes, each with its labelled slices only, and all labelled slices in order.
    """
    store, detector = SliceStore(), make_detector(keypoints) if keypoints else None
    volumes: list[PreparedVolume] = []
    labelled: list[LabelledSlice] = []
    for number, case in enumerate(cases):
        indices = sorted(case.statuses)
        if not indices:
            continue
        slices_done = prepare_slices(case.volume, config, detector, store=store, cache=cache, indices=indices)
        volume = yield from reported(slices_done, Progress("preparing", number, len(cases)))
        values = Slices(case.volume, config).labels(case.labels, indices)
        for row, z in enumerate(indices):
            where = f"slice {z} of {case.volume.name}"
            channels = classes.channels(values[row], case.statuses[z], where)
            labelled.append(LabelledSlice(volume.images[row], volume.keypoints[row].positions, channels))
        volumes.append(volume)
        yield Progress("preparing", number + 1, len(cases))
    return volumes, labelled


def prepare_slices(
    volume: Volume,
    config: SliceConfig,
    detector: Detector | None,
    *,
    store: SliceStore,
    cache: KeypointCache | None = None,
    indices: Sequence[int] | None = None,
) -> Generator[int, None, PreparedVolume]:
    """Resample, normalise and, with a detector, search for keypoints the slices of one volume, all or some.

    Yields:
        Slices done, now and then.
    """
    stack = Slices(volume, config)
    wanted = range(stack.num_slices) if indices is None else indices
    images = store.empty((len(wanted), config.input_slices, *stack.shape))
    keypoints: list[Keypoints] = []
    for start in range(0, len(wanted), 32):
        chunk = stack.inputs(wanted[start : start + 32])
        images[start : start + len(chunk)] = chunk
        if detector is None:
            keypoints.extend([Keypoints.empty(0)] * len(chunk))
        else:
            keypoints.extend(iter_detect(middle_slice(chunk), detector, cache=cache))
        yield start + len(chunk)
    intensity = dataclasses.asdict(stack.intensities)
    return PreparedVolume(
        volume.name, images, keypoints, stack.positions[list(wanted)], volume.spacing, intensity
    )


def statistics_of(volumes: Sequence[PreparedVolume]) -> dict[str, object]:
    """Spacing and intensities of a set of volumes, for the header of a checkpoint."""
    spacing = np.median([volume.spacing for volume in volumes], axis=0)
    keys = volumes[0].intensity
    return {
        "num_volumes": len(volumes),
        "num_slices": sum(len(volume) for volume in volumes),
        "median_spacing_mm": [round(float(value), 4) for value in spacing],
        "median_intensity": {key: float(np.median([v.intensity[key] for v in volumes])) for key in keys},
    }
