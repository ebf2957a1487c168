"""Saying what slices are: the verbs of the ledger, checked against the paint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from kaf_model.errors import UserError
from napari_kaf import _layers
from napari_kaf._ledger import Cell

if TYPE_CHECKING:
    from napari.layers import Labels

    from napari_kaf._session import Session


def mark(session: Session, state: Cell, slices: Iterable[int] | None = None) -> None:
    """Say what the shown slice, or the given ones, are.

    Raises:
        UserError: If that contradicts the paint, or slices are not shown one by one.
    """
    labels = _labels_to_mark(session)
    session.poll()
    array = _layers.stack(labels)
    for z in [shown_slice(session)] if slices is None else list(slices):
        has_paint, to_mark = bool(array[z].any()), state
        if state is Cell.EMPTY and has_paint:
            raise UserError(
                f"slice {z} is painted on, so it is not empty; erase the paint, or mark it complete"
            )
        if state is Cell.COMPLETE and not has_paint:
            to_mark = Cell.EMPTY
            session.told.emit(f"nothing is painted on slice {z}: it counts as verified empty")
        session.ledger.mark([z], to_mark)


def shown_slice(session: Session) -> int:
    """The slice that is shown, for what is said of it.

    Raises:
        UserError: If the viewer shows all of them in 3D, or across.
    """
    opened = session.opened
    if opened is not None and not _layers.shows_slices(session.viewer, opened.layer):
        raise UserError(
            f"the slices of {opened.layer.name} are not shown one by one; go back to 2D, and roll the axes "
            "(Ctrl+E) until the slider below the canvas steps through them"
        )
    return session.slice


def mark_painted_complete(session: Session) -> None:
    """Mark every painted slice complete, for labels that came finished.

    Raises:
        UserError: If there is no label layer.
    """
    painted = np.flatnonzero(_layers.stack(_labels_to_mark(session)).any(axis=(1, 2)))
    session.ledger.mark(painted.tolist(), Cell.COMPLETE)


def step_labelled(session: Session, step: int) -> None:
    """Show the next labelled slice in a direction."""
    z = session.ledger.labelled_after(session.slice, step) if len(session.ledger) else None
    if z is None:
        session.told.emit("no labelled slice further in this direction")
    else:
        session.go_to(z)


def _labels_to_mark(session: Session) -> Labels:
    if session.labels is None:
        raise UserError("there is no label layer to mark slices of; create one first")
    return session.labels
