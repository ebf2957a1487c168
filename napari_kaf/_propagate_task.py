"""What runs on the worker thread when labels are carried from finished slices to the others."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import UserError
from kaf_model.progress import Progress
from napari_kaf._jobs import Control, Report
from napari_kaf._snapshot import Snapshot

if TYPE_CHECKING:
    from kaf_model.config import SliceConfig
    from kaf_model.labels import LabelledVolume
    from kaf_model.propagation import Propagation


def propagate_task(
    snapshot: Snapshot, control: Control
) -> Generator[Report, None, NDArray[np.integer[Any]] | None]:
    """Carry the labels of finished slices to the others; no labels if it was cancelled."""
    yield Report(Progress("loading the engine", 0, None))
    from kaf_model.config import SliceConfig
    from kaf_model.labels import ClassMap, SliceStatus

    case = labelled_volume(snapshot)
    if set(case.statuses.values()) == {SliceStatus.PARTIAL}:
        raise UserError("no slice is marked complete yet; of partial slices no whole shape can be carried on")
    values = ClassMap.of_labels([case], snapshot.class_names).values.tolist()
    carried = yield from carried_labels(case, values, SliceConfig(), control)
    if carried is None and not control.cancelled:
        raise UserError("no complete slice shows a structure; paint one and mark its slice complete")
    return carried.labels() if carried is not None and not control.cancelled else None


def labelled_volume(snapshot: Snapshot) -> LabelledVolume:
    """A snapshot in the engine's words."""
    from kaf_model.labels import LabelledVolume, SliceStatus

    statuses = {z: SliceStatus(status) for z, status in snapshot.statuses.items()}
    return LabelledVolume(snapshot.volume, snapshot.labels, statuses)


def carried_labels(
    case: LabelledVolume, values: Sequence[int], slices: SliceConfig, control: Control
) -> Generator[Report, None, Propagation | None]:
    """What the finished slices say of the others; None if they show nothing, or it was cancelled.

    Args:
        case: The labelled volume.
        values: Label values that are carried, the background first.
        slices: Preprocessing of the network that it will be joined with.
        control: Asked whether it was cancelled.
    """
    from kaf_model.propagation import propagate

    work = propagate(case, values, slices)
    while not control.cancelled:
        try:
            yield Report(next(work))
        except StopIteration as done:
            found: Propagation | None = done.value
            return found
    return None
