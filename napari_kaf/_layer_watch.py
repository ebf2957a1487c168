"""Taking in that layers came, went or were renamed, and which class the brush paints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kaf_model.errors import UserError
from napari_kaf import _layers

if TYPE_CHECKING:
    from napari.components import ViewerModel

    from napari_kaf._session import Session


class LayerWatch:
    """Compares the layers of a session's viewer with those of the last look.

    Args:
        session: Gets the first volume that is opened, and lets go of what was deleted.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._seen: list[tuple[int, str, tuple[int, ...]]] = []
        self._seen_brush = 0

    def look(self, viewer: ViewerModel) -> None:
        """Take in what changed since the last look."""
        session = self._session
        self._look_at_layers(viewer)
        brush = int(session.labels.selected_label) if session.labels is not None else 0
        if brush != self._seen_brush:
            self._seen_brush = brush
            session.classes_changed.emit()

    def _look_at_layers(self, viewer: ViewerModel) -> None:
        session = self._session
        seen = [
            (id(layer), layer.name, tuple(getattr(_layers.finest(layer), "shape", ())))  # shapes are a list
            for layer in viewer.layers
            if _layers.role_of(layer) != "explore"
        ]
        if seen == self._seen:
            return
        self._seen = seen
        self._forget_removed_layers(viewer)
        volumes = _layers.image_layers(viewer)
        if session.opened is None and volumes:
            try:
                session.choose_volume(volumes[0])
            except UserError as error:
                session.warned.emit(f"{volumes[0].name}: {error}")
        if session.opened is not None and session.labels is None:
            drawn = _layers.labels_layers(viewer, session.opened.layer)
            if drawn:
                session.choose_labels(drawn[0])
        session.layers_changed.emit()

    def _forget_removed_layers(self, viewer: ViewerModel) -> None:
        """Let go of layers that were deleted; what was drawn on them is saved first, and offered back."""
        session = self._session
        if session.labels is not None and session.labels not in viewer.layers:
            name = session.labels.name
            session.choose_labels(None)  # saves
            session.saved.look()
            session.told.emit(f"{name} was deleted; what was drawn on it can be restored")
            session.offer_changed.emit()
        if session.opened is not None and session.opened.layer not in viewer.layers:
            session.choose_volume(None)
        session.results.forget_removed_layer()
