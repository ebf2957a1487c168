"""What the views of an Explore panel share: the network, the place that was picked, and the desk. No Qt."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
from psygnal import Signal

from napari_kaf import _explore_layers
from napari_kaf._desk import CANCELLED, Desk
from napari_kaf._explore_lab import Lab, Network, open_task
from napari_kaf._layers import OpenVolume
from napari_kaf._picking import Picking
from napari_kaf._session import Session
from napari_kaf._settings import settings

NO_VOLUME = "No volume is open. Drag a file into the window, or File > Open Sample > KAF segmentation."
_OPENING = "model"
_MARK = 6.0  # mm across
_MARK_COLORS = np.array([[0.35, 0.86, 1.0, 1.0], [1.0, 0.75, 0.2, 1.0]])  # picked, pointed at
Place = tuple[float, float, float]


class Exploration:
    """A volume, a network, and what is looked at.

    Attributes:
        session: Of the viewer.
        desk: Where questions are asked.
        picking: Clicks on the canvas.
        lab: The volume and the network, or None without a volume.
        network: What is known of the network, or None until it is loaded.
        problem: Why there is no network, in words.
        place: What was picked, voxel (z, y, x), or None.
    """

    network_changed = Signal()
    place_changed = Signal()
    slice_changed = Signal()
    layer_deleted = Signal(str)

    def __init__(self, session: Session) -> None:
        self.session = session
        self.desk = Desk()
        self.picking = Picking(session, self.pick)
        self.lab: Lab | None = None
        self.network: Network | None = None
        self.problem = NO_VOLUME
        self.place: Place | None = None
        self._slice = -1
        self._removing = False

    @property
    def opened(self) -> OpenVolume | None:
        """The volume."""
        return self.session.opened

    @property
    def failed(self) -> bool:
        """Whether there is a volume, but its network was not loaded and is not being loaded."""
        return self.lab is not None and self.network is None and not self.desk.pending(_OPENING)

    def open(self, model: Path | None) -> None:
        """Look at the session's volume through a model, or through random weights; what was shown goes."""
        self.desk.close()
        self.desk.changed.emit()
        self.network = None
        opened = self.opened
        if self.lab is None or opened is None or self.lab.volume is not opened.volume:
            self.place = None
            self.remove_layers()
        if opened is None:
            self.lab, self.problem = None, NO_VOLUME
            self.picking.stop()
            self.network_changed.emit()
            return
        remembered = settings()
        self.lab = Lab(volume=opened.volume, model=model, preset=remembered.preset, device=remembered.device)
        self._slice = self.session.slice
        self.problem = "Loading the model…"
        self.network_changed.emit()
        self.ask(_OPENING, "loading the model", open_task, on_done=self._loaded, on_failed=self._refused)

    def ask(
        self,
        key: str,
        title: str,
        task: Callable[..., Generator[Any, None, Any]],
        *arguments: Any,
        on_done: Callable[[Any], None],
        on_failed: Callable[[str], None],
    ) -> None:
        """Ask the lab; an earlier question of the same key is dropped, and all are when the lab changes.

        Args:
            key: Who asks.
            title: What is done, in words.
            task: Called with the lab, the arguments, and the control.
            *arguments: Of the task.
            on_done: Called with the answer.
            on_failed: Called with the reason why there is none.
        """
        lab = self.lab
        assert lab is not None
        self.desk.ask(
            key,
            title,
            lambda control: task(lab, *arguments, control),
            on_done=on_done,
            on_failed=on_failed,
        )

    def pick(self, place: Place) -> None:
        """Look at a place, a voxel (z, y, x)."""
        self.place = place
        self.point_at(place)
        self.place_changed.emit()

    def point_at(self, place: Place) -> None:
        """Mark a place beside the one that was picked, without looking at it."""
        if self.opened is None or self.place is None:
            return
        marked = [self.place] if place == self.place else [self.place, place]
        size = _MARK / float(np.sqrt(np.prod(self.opened.volume.spacing[1:])))
        _explore_layers.show_points(
            self.session.viewer,
            self.opened,
            "places",
            np.array(marked),
            sizes=np.full(len(marked), size),
            colors=_MARK_COLORS[: len(marked)],
            symbol="cross",
        )

    def follow_slice(self, event: object = None) -> None:
        """Called when the sliders move."""
        if self.opened is not None and self.session.slice != self._slice:
            self._slice = self.session.slice
            self.slice_changed.emit()

    def remove_layers(self, parts: tuple[_explore_layers.Part, ...] = _explore_layers.PARTS) -> None:
        """Remove layers of Explore."""
        self._removing = True
        try:
            _explore_layers.remove(self.session.viewer, parts)
        finally:
            self._removing = False

    def notice_removed(self, event: Any) -> None:
        """Called when a layer was removed; says so if it is one of ours that somebody else deleted."""
        part = _explore_layers.part_of(event.value)
        if part is not None and not self._removing:
            self.layer_deleted.emit(part)

    def close(self) -> None:
        """End: no questions, no clicks, no layers."""
        self.desk.close()
        self.picking.close()
        if self.session.alive:
            self.remove_layers()

    def _loaded(self, network: Network) -> None:
        self.network, self.problem = network, ""
        self.network_changed.emit()

    def _refused(self, reason: str) -> None:
        why = "it was cancelled; choose it again to load it" if reason == CANCELLED else reason
        self.problem = f"The model was not loaded: {why}"
        self.network_changed.emit()
