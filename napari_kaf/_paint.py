"""Noticing what is painted: which slices of a labels layer changed, and what that makes of the ledger."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_kaf import _layers
from napari_kaf._ledger import Cell, Ledger

if TYPE_CHECKING:
    from napari.layers import Labels


class PaintWatch:
    """Watches one labels layer: brush, fill, undo and scripts alike.

    Args:
        layer: The layer that is drawn on.

    Attributes:
        touched: Whether something may have changed since the last look.
    """

    def __init__(self, layer: Labels) -> None:
        self._layer = layer
        self.touched = False
        self._checksums = _checksums(_layers.stack(layer))
        self._states: tuple[Cell, ...] = ()
        # By slice and checksum what it was: since it was last marked, and before it took a result.
        self._before: dict[int, dict[int, Cell]] = {}
        self._accepted: dict[int, dict[int, Cell]] = {}
        self._unwatch = _layers.watch_labels(layer, self._touch)

    def stop(self) -> None:
        """Watch no longer."""
        self._unwatch()

    def note_changes(self, ledger: Ledger) -> list[int]:
        """Tell the ledger which slices changed since the last look, and return them.

        A slice whose paint is back to what it was, by undo or by hand, is again what it was then, unless somebody
        said something else of it since.
        """
        self.touched = False
        array = _layers.stack(self._layer)
        now, was = _checksums(array), ledger.states
        changed = [z for z, (old, new) in enumerate(zip(self._checksums, now, strict=True)) if old != new]
        for z, (told, state) in enumerate(zip(self._states, was, strict=False)):
            if told is not state:
                self._before.pop(z, None)
        states = {}
        for z in changed:
            before = self._before.setdefault(z, {})
            before[self._checksums[z]] = was[z]
            known = before.get(now[z]) or self._accepted.get(z, {}).get(now[z])
            states[z] = known or ledger.after_paint(z, bool(array[z].any()))
        self._checksums = now
        ledger.restate(states)
        self._states = ledger.states
        return changed

    def accept(self, values: NDArray[Any], where: Mapping[int, NDArray[np.bool_]], ledger: Ledger) -> None:
        """Write a result (Z, Y, X) into some slices in one step that can be undone, and mark them."""
        before, states = list(self._checksums), ledger.states
        _layers.write_into(self._layer, values, where)
        self._checksums = _checksums(_layers.stack(self._layer))
        for z in where:
            self._accepted.setdefault(z, {})[before[z]] = states[z]
        ledger.restate(dict.fromkeys(where, Cell.ACCEPTED))
        self._states = ledger.states

    def _touch(self, event: object = None) -> None:
        self.touched = True


def _checksums(array: NDArray[Any]) -> list[int]:
    return [zlib.crc32(np.ascontiguousarray(plane).data) for plane in array]
