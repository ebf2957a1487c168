"""Taking in that layers came, went, were renamed or got other voxels, and which class the brush paints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kaf_model.errors import UserError
from napari_kaf import _layers

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image, Layer

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
        self._wrong_brush: Layer | None = None
        self._followed: Image | None = None
        session.volume_changed.connect(self._follow_volume)

    def look(self, viewer: ViewerModel) -> None:
        """Take in what changed since the last look."""
        session = self._session
        self._look_at_layers(viewer)
        brush = int(session.labels.selected_label) if session.labels is not None else 0
        if brush != self._seen_brush:
            self._seen_brush = brush
            session.classes_changed.emit()
        self._look_at_active(viewer)

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
            in_view = next((layer for layer in reversed(volumes) if layer.visible), volumes[0])
            try:
                session.choose_volume(in_view)
            except UserError as error:
                session.warned.emit(f"{in_view.name}: {error}")
        if session.opened is not None and session.labels is None:
            drawn = _layers.own_labels(viewer, session.opened.layer)
            if drawn:
                session.choose_labels(drawn[0])
        session.layers_changed.emit()

    def _look_at_active(self, viewer: ViewerModel) -> None:
        """Warn, once, who takes a brush to other labels than those that are kept and trained on."""
        session, active = self._session, viewer.layers.selection.active
        wrong = session.opened is not None and active is not session.labels and _layers.is_brushed(active)
        if wrong and active is not self._wrong_brush:
            assert active is not None
            kept = "no labels are" if session.labels is None else f"{session.labels.name} is what is"
            session.warned.emit(
                f"you are about to paint on {active.name}, but {kept} kept and trained on; choose the volume and the "
                "labels to work on in the panel"
            )
        self._wrong_brush = active if wrong else None

    def _follow_volume(self) -> None:
        """Hear of it when the voxels of the volume that is worked on are replaced."""
        opened = self._session.opened
        layer = opened.layer if opened is not None else None
        if layer is self._followed:
            return
        if self._followed is not None:
            self._followed.events.data.disconnect(self._open_again)
        if layer is not None:
            layer.events.data.connect(self._open_again)
        self._followed = layer

    def _open_again(self, event: object = None) -> None:
        """Work on the voxels that the volume has now; what is drawn on it stays if it fits."""
        session = self._session
        if session.opened is None:
            return
        layer, old = session.opened.layer, session.opened.volume
        try:
            if _layers.stack_shape(layer) == old.shape:
                session.opened = _layers.open_volume(layer)
                _layers.carry_on(session.viewer, layer, old, session.opened.volume)
                session.volume_changed.emit()
            else:
                session.choose_volume(None)
                session.choose_volume(layer)
        except UserError as error:
            session.choose_volume(None)
            session.warned.emit(f"{layer.name}: {error}")

    def _forget_removed_layers(self, viewer: ViewerModel) -> None:
        """Let go of layers that were deleted; what was drawn on them is saved first, and offered back."""
        session = self._session
        if session.labels is not None and session.labels not in viewer.layers:
            name = session.labels.name
            session.choose_labels(None)  # saves
            session.saved.look()
            drawn = session.saved.offer is not None
            session.told.emit(
                f"{name} was deleted{'; what was drawn on it can be restored' if drawn else ''}"
            )
            session.offer_changed.emit()
        if session.opened is not None and session.opened.layer not in viewer.layers:
            session.choose_volume(None)
        session.results.forget_removed_layer()
