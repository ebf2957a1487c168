"""Noticing what is painted: which slices of a labels layer changed, and what that makes of the ledger."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
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
        self._accepted: dict[int, tuple[int, Cell, int]] = {}  # checksum and state before, checksum after
        self._unwatch = _layers.watch_labels(layer, self._touch)

    def stop(self) -> None:
        """Watch no longer."""
        self._unwatch()

    def note_changes(self, ledger: Ledger) -> list[int]:
        """Tell the ledger which slices changed since the last look, and return them.

        A slice that is back to what it was before a result was accepted gets its former state back.
        """
        self.touched = False
        array = _layers.stack(self._layer)
        now = _checksums(array)
        changed = [z for z, (old, new) in enumerate(zip(self._checksums, now, strict=True)) if old != new]
        self._checksums = now
        for z in changed:
            before, state, after = self._accepted.get(z, (None, Cell.UNTOUCHED, None))
            if now[z] == before:  # undone
                ledger.mark([z], state)
            elif now[z] == after:  # redone
                ledger.mark([z], Cell.ACCEPTED)
            else:
                ledger.note_paint(z, bool(array[z].any()))
        return changed

    def accept(
        self, values: NDArray[Any], where: NDArray[np.bool_], slices: Sequence[int], ledger: Ledger
    ) -> None:
        """Write a result (Z, Y, X) into the layer in one step that can be undone, and mark its slices."""
        before = list(self._checksums)
        _layers.write_into(self._layer, values, where)
        self._checksums = _checksums(_layers.stack(self._layer))
        for z in slices:
            self._accepted[z] = (before[z], ledger.states[z], self._checksums[z])
        ledger.mark(slices, Cell.ACCEPTED)

    def _touch(self, event: object = None) -> None:
        self.touched = True


def _checksums(array: NDArray[Any]) -> list[int]:
    return [zlib.crc32(np.ascontiguousarray(plane).data) for plane in array]
