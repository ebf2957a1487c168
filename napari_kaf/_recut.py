"""Cutting a volume along another of its axes, with all that is drawn on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_kaf import _layers
from napari_kaf._classes import entries_of, values_in
from napari_kaf._ledger import FINISHED, Cell, Ledger

if TYPE_CHECKING:
    from napari_kaf._session import Session


def recut(session: Session, slice_axis: int) -> None:
    """Replace the volume of a session, and the layers drawn on it, by ones cut along a stored axis."""
    assert session.opened is not None
    viewer, old, drawn_on = session.viewer, session.opened, session.labels
    volume = old.volume.along(slice_axis)
    layers = _layers.own_labels(viewer, old.layer)
    if drawn_on is not None and drawn_on not in layers:
        layers.append(drawn_on)
    known = [session.remembered(layer, old.volume.num_slices) for layer in layers]
    session.choose_volume(None)
    for layer in layers:
        viewer.layers.remove(layer)
    session.choose_volume(_layers.replace_volume(viewer, old, volume))
    for layer, (ledger, classes) in zip(layers, known, strict=True):
        array = _layers.stack(layer)
        accepted = np.array([state is Cell.ACCEPTED for state in ledger.states])[:, None, None]
        by_hand = ~accepted & (array != 0)
        for z, plane in ledger.by_hand.items():
            by_hand[z] |= plane & (array[z] != 0)
        parts = (array, np.broadcast_to(accepted, array.shape), by_hand)
        cut, of_result, drawn = (volume.to_volume(old.volume.to_stored(part)) for part in parts)
        classes = classes or entries_of(_layers.class_names(layer), values_in(array))
        new = _layers.add_labels(viewer, session.opened, classes, cut.copy())
        new.name = layer.name
        _layers.keep_file(new, layer)
        session.saved.autosave.inherit(new, layer)
        states = recut_states(ledger.states, cut, of_result)
        hands = {z: plane.copy() for z, plane in enumerate(drawn) if states[z] is Cell.ACCEPTED}
        session.take_over(new, Ledger(len(cut), states, hands), classes, chosen=layer is drawn_on)


def recut_states(
    states: Sequence[Cell], labels: NDArray[Any], accepted: NDArray[np.bool_]
) -> tuple[Cell, ...]:
    """What the slices of a volume are after it was cut along another axis.

    Where every slice was finished, every slice still is. Else only paint is known: on a slice with paint of
    accepted results nothing is said, and other painted ones are partial.

    Args:
        states: Of the slices before.
        labels: (Z, Y, X) in the new cut.
        accepted: (Z, Y, X) in the new cut, where an accepted slice was.
    """
    finished = all(state in FINISHED for state in states)
    cut = []
    for plane, of_result in zip(labels, accepted, strict=True):
        if finished:
            cut.append(Cell.COMPLETE if plane.any() else Cell.EMPTY)
        elif plane[of_result].any():
            cut.append(Cell.ACCEPTED)
        else:
            cut.append(Cell.PARTIAL if plane.any() else Cell.UNTOUCHED)
    return tuple(cut)
