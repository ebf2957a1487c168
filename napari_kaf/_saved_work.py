"""Saving the labels of the volume that is worked on, and bringing back what was saved of it before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kaf_model.errors import UserError
from napari_kaf import _layers
from napari_kaf._autosave import Autosave
from napari_kaf._ledger import Ledger
from napari_kaf._sidecar import Sidecar, Snapshot

if TYPE_CHECKING:
    from napari_kaf._session import Session


class SavedWork:
    """The saved file of a session's volume, written soon after each change.

    Args:
        session: Told by its `offer_changed` and `warned` what happens here.

    Attributes:
        offer: Saved work on the volume that can be restored.
        autosave: When the file is written.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.offer: Snapshot | None = None
        self.autosave = Autosave()
        self._spacings: dict[str, tuple[float, ...]] = {}

    @property
    def volume_key(self) -> str:
        """Tells the volume that is worked on from others."""
        assert self.autosave.sidecar is not None
        return self.autosave.sidecar.key

    def follow(self, opened: _layers.OpenVolume | None) -> None:
        """Save the work on another volume from now on, and look for what was saved of it."""
        self.offer = None
        if opened is None:
            self.autosave.follow(None)
            return
        volume = _layers.volume_of(opened.layer) or opened.volume  # also when its voxels were replaced
        name = f"{volume.name}-frame{volume.source.frame}" if volume.source.frame else volume.name
        self.autosave.follow(Sidecar(opened.path, name, volume.to_stored(volume.array)))
        self.look()

    def look(self) -> None:
        """Offer what is saved of the volume."""
        try:
            self.offer = self.autosave.load()
        except UserError as error:
            self._session.warned.emit(str(error))
            return
        sidecar = self.autosave.sidecar
        others = sidecar.of_other_voxels() if sidecar is not None and self.offer is None else None
        if others is not None:
            self._session.warned.emit(
                f"{others.name} beside this volume holds labels of other voxels, perhaps of this file before it was "
                "changed; they are left there"
            )

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """The voxel size, mm (z, y, x), that the user gave of this volume, now or when it was saved."""
        return self._spacings.get(self.volume_key) or (self.offer.spacing if self.offer else None)

    def remember_spacing(self, spacing: Sequence[float]) -> None:
        """Keep the voxel size that the user gave."""
        self._spacings[self.volume_key] = tuple(spacing)

    def restore(self) -> None:
        """Bring saved labels, ledger and class names back, in a layer of their own."""
        session, offer = self._session, self.offer
        assert offer is not None
        assert session.opened is not None
        if offer.slice_axis is not None and offer.slice_axis != session.opened.volume.source.axes[0]:
            session.recut(offer.slice_axis)
        layer = _layers.add_labels(session.viewer, session.opened, offer.classes, offer.labels.copy())
        self.autosave.restored(layer, offer)
        ledger = Ledger(len(offer.states), offer.states, offer.by_hand)
        session.take_over(layer, ledger, list(offer.classes), chosen=True)
        session.offer_changed.emit()

    def decline(self) -> None:
        """Start afresh; the saved work is renamed, not deleted."""
        assert self.autosave.sidecar is not None
        assert self.offer is not None
        self.autosave.sidecar.decline(self.offer.saved)
        self.offer = None
        self._session.offer_changed.emit()

    def save(self) -> None:
        """Write what is drawn, its ledger and its classes, in the background."""
        session = self._session
        if session.labels is None or session.opened is None:
            return
        snapshot = Snapshot(
            _layers.stack(session.labels).copy(),
            session.ledger.states,
            tuple(session.classes),
            self._spacings.get(self.volume_key),
            session.opened.volume.source.axes[0],
            owner=self.autosave.owner(session.labels),
            by_hand=dict(session.ledger.by_hand),
        )
        self.autosave.save(snapshot)
