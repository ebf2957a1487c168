"""Noticing what is painted: which slices of a labels layer changed, and what that makes of the ledger."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_kaf import _layers
from napari_kaf._ledger import Cell, Ledger

if TYPE_CHECKING:
    from napari.layers import Labels


@dataclass
class PaintHistory:
    """What the slices of a layer were, by slice and the checksum that its paint had then.

    Attributes:
        before: Since the slice was last marked, with what counted as painted by hand then (`Ledger.by_hand`).
        accepted: Before it took a result.
    """

    before: dict[int, dict[int, tuple[Cell, NDArray[np.bool_] | None]]] = field(default_factory=dict)
    accepted: dict[int, dict[int, Cell]] = field(default_factory=dict)


class PaintWatch:
    """Watches one labels layer: brush, fill, undo and scripts alike.

    Args:
        layer: The layer that is drawn on.
        history: What its slices were when it was watched before.
        ledger: What was said of them.

    Attributes:
        touched: Whether something may have changed since the last look.
    """

    def __init__(self, layer: Labels, history: PaintHistory, ledger: Ledger) -> None:
        self._layer = layer
        self._before, self._accepted = history.before, history.accepted
        self.touched = False
        self._checksums = _checksums(_layers.stack(layer))
        self._states = ledger.states
        self._unwatch = _layers.watch_labels(layer, self._touch)

    def stop(self) -> None:
        """Watch no longer."""
        self._unwatch()

    def note_changes(self, ledger: Ledger, shown: int | None) -> list[int]:
        """Tell the ledger which slices changed since the last look, and return them.

        A slice whose paint is back to what it was, by undo or by hand, is again what it was then, unless somebody
        said something else of it since. Where a stroke through the volume corrects several accepted slices at once,
        nobody has looked at those that are not shown: they stay accepted, and as they are now.

        Args:
            ledger: Of the layer.
            shown: The slice that is shown, if they are shown one by one.
        """
        self.touched = False
        array = _layers.stack(self._layer)
        now, was = _checksums(array), ledger.states
        changed = [z for z, (old, new) in enumerate(zip(self._checksums, now, strict=True)) if old != new]
        for z, (told, state) in enumerate(zip(self._states, was, strict=False)):
            if told is not state:
                self._before.pop(z, None)
        states, corrected = {}, []
        for z in changed:
            before = self._before.setdefault(z, {})
            before[self._checksums[z]] = was[z], ledger.by_hand.get(z)
            if now[z] in before:
                states[z], by_hand = before[now[z]]
                _put(ledger.by_hand, z, by_hand)
            elif now[z] in self._accepted.get(z, {}):
                states[z] = self._accepted[z][now[z]]
            else:
                states[z] = ledger.after_paint(z, bool(array[z].any()))
                if was[z] is Cell.ACCEPTED:
                    corrected.append(z)
        for z in corrected if len(corrected) > 1 else []:
            if z != shown:
                states[z] = Cell.ACCEPTED
                ledger.by_hand[z] = np.ones(array[z].shape, bool)
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


def _put(hands: dict[int, NDArray[np.bool_]], z: int, plane: NDArray[np.bool_] | None) -> None:
    hands.pop(z, None)
    if plane is not None:
        hands[z] = plane


def _checksums(array: NDArray[Any]) -> list[int]:
    return [zlib.crc32(np.ascontiguousarray(plane).data) for plane in array]
