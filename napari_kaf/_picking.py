"""Clicks on the canvas that pick places. They count only while Explore's own layer of places is selected.

So a click never paints while it picks, and never picks while it paints: the layer that is drawn on keeps its
tool, and selecting it in the layer list ends the picking.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from psygnal import Signal

from kaf_model.errors import UserError
from napari_kaf import _explore_layers
from napari_kaf._session import Session

if TYPE_CHECKING:
    from napari.layers import Layer

_LEFT = 1
_STILL = 4.0  # pixels of the screen; a longer way drags the camera and picks nothing


class Picking:
    """Picks places with the mouse.

    Args:
        session: Of the viewer.
        picked: Called with the voxel (z, y, x).
    """

    changed = Signal(bool)

    def __init__(self, session: Session, picked: Callable[[tuple[float, float, float]], None]) -> None:
        self._session = session
        self._picked = picked
        self._before: Callable[[], Layer | None] = lambda: None
        self._on = False
        session.viewer.mouse_drag_callbacks.append(self._pressed)
        session.viewer.layers.selection.events.active.connect(self._selection_changed)

    @property
    def on(self) -> bool:
        """Whether clicks pick."""
        return self._on

    def start(self) -> None:
        """Let clicks pick.

        Raises:
            UserError: If there is no volume.
        """
        if self._session.opened is None:
            raise UserError("there is no volume to pick a place in; open one first")
        viewer = self._session.viewer
        if not _explore_layers.has_clicks(viewer):
            before = _explore_layers.take_clicks(viewer, self._session.opened)
            self._before = weakref.ref(before) if before is not None else lambda: None
        self._set(True)

    def stop(self) -> None:
        """Select what was selected before."""
        if self._on:
            _explore_layers.give_back(self._session.viewer, self._before())
        self._set(False)

    def close(self) -> None:
        """Let go of the viewer."""
        if not self._session.alive:
            return
        self.stop()
        viewer = self._session.viewer
        if self._pressed in viewer.mouse_drag_callbacks:
            viewer.mouse_drag_callbacks.remove(self._pressed)
        viewer.layers.selection.events.active.disconnect(self._selection_changed)

    def _set(self, on: bool) -> None:
        if on != self._on:
            self._on = on
            self.changed.emit(on)

    def _selection_changed(self, event: object = None) -> None:
        self._set(_explore_layers.has_clicks(self._session.viewer) and self._session.opened is not None)

    def _pressed(self, _viewer: Any, event: Any) -> Iterator[None]:
        """A press and a release at one spot pick; anything between them drags."""
        opened = self._session.opened
        if not self._on or opened is None or event.button != _LEFT or event.modifiers:
            return
        if self._session.viewer.dims.ndisplay != 2:
            self._session.told.emit("places are picked in the 2-D view; leave the 3-D view first")
            return
        start = np.array(event.pos, float)
        position = tuple(event.position)
        yield
        while event.type == "mouse_move":
            if np.abs(np.array(event.pos, float) - start).max() > _STILL:
                return
            yield
        place = _explore_layers.voxel_at(opened, position)
        if place is None:
            self._session.told.emit("that is outside the volume; click on it")
        else:
            self._picked(place)
