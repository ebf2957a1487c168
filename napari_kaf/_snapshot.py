"""What is labelled on the volume at a moment, copied for work in the background while painting goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import UserError
from kaf_model.volume import Volume
from napari_kaf import _layers

if TYPE_CHECKING:
    from napari_kaf._session import Session


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A volume with its labels.

    Attributes:
        volume: The volume.
        labels: (Z, Y, X) labels.
        statuses: What they mean, by slice.
        class_names: Names of the values painted on these slices.
    """

    volume: Volume
    labels: NDArray[np.integer[Any]]
    statuses: Mapping[int, str]
    class_names: Mapping[int, str]


def take_snapshot(session: Session) -> Snapshot:
    """Copy what is labelled.

    Raises:
        UserError: If there is no volume, no label layer or no marked slice.
    """
    if session.opened is None:
        raise UserError("there is no volume to work on; open one first")
    if session.labels is None:
        raise UserError("there is no label layer; click New labels and paint a structure first")
    session.save()  # nothing that was drawn may depend on how the work ends
    statuses, volume = session.ledger.training(), session.opened.volume
    if not statuses:
        raise UserError(
            "no slice is marked yet: paint a structure on a slice, then mark the slice complete; "
            "three slices spread over the volume are a good beginning"
        )
    labels = _layers.stack(session.labels).copy()
    painted = set(np.unique(labels[sorted(statuses)]).tolist())
    names = {entry.value: entry.name for entry in session.classes if entry.value in painted}
    return Snapshot(replace(volume, array=volume.array.copy()), labels, statuses, names)
