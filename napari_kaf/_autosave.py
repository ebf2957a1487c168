"""When the work on a volume is saved: soon after a change, on a thread of its own, again if it failed."""

from __future__ import annotations

import threading
import time
import weakref

from kaf_model.errors import UserError
from napari_kaf._sidecar import Sidecar, Snapshot, new_owner

SAVE_AFTER = 3.0  # seconds from the first unsaved change
_RETRY_AFTER = 30.0  # seconds from a failure


class Autosave:
    """Writes the sidecar of the volume that is worked on.

    Attributes:
        sidecar: The file of that volume, or None.
    """

    def __init__(self) -> None:
        self.sidecar: Sidecar | None = None
        self._owners: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()
        self._restored: dict[str, tuple[str, str]] = {}  # versions that owners go on from
        self._due: float | None = None
        self._thread: threading.Thread | None = None
        self._messages: list[str] = []
        self._told: set[str] = set()

    def follow(self, sidecar: Sidecar | None) -> None:
        """Save into another volume's file from now on."""
        self.sidecar, self._due = sidecar, None

    def changed(self) -> None:
        """Take in that something is unsaved."""
        if self._due is None:
            self._due = time.monotonic() + SAVE_AFTER

    def forget_changes(self) -> None:
        """There is nothing to save any more."""
        self._due = None

    @property
    def pending(self) -> bool:
        """Whether something is unsaved."""
        return self._due is not None

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return self._due is not None and time.monotonic() >= self._due

    def owner(self, layer: object) -> str:
        """Token of who draws on a layer."""
        return self._owners.setdefault(layer, new_owner())

    def inherit(self, layer: object, former: object) -> None:
        """Take in that a layer goes on from another of this session."""
        self._owners[layer] = self.owner(former)

    def restored(self, layer: object, saved: Snapshot) -> None:
        """Take in that a layer goes on from saved work, so that it may replace it."""
        self._restored[self.owner(layer)] = saved.version

    def save(self, snapshot: Snapshot) -> None:
        """Write in the background."""
        if self.sidecar is None:
            return
        self.wait()
        self._due = None
        replaces = self._restored.get(snapshot.owner)
        self._thread = threading.Thread(target=self._write, args=(self.sidecar, snapshot, replaces))
        self._thread.start()

    def wait(self) -> None:
        """Wait for what is being written."""
        if self._thread is not None:
            self._thread.join()

    def messages(self) -> list[str]:
        """What has to be told since the last call, each thing once."""
        new = [message for message in dict.fromkeys(self._messages) if message not in self._told]
        self._messages.clear()
        self._told.update(new)
        return new

    def _write(self, sidecar: Sidecar, snapshot: Snapshot, replaces: tuple[str, str] | None) -> None:
        try:
            saved = sidecar.save(snapshot, replaces)
        except UserError as error:
            self._messages.append(str(error))
            self._due = time.monotonic() + _RETRY_AFTER
            return
        wanted = sidecar.wanted_folder
        if wanted is not None and saved.path.parent != wanted:
            self._messages.append(f"{wanted} cannot be written; the labels are saved as {saved.path}")
        if saved.set_aside is not None:
            self._messages.append(f"{saved.path} held other work, which is kept as {saved.set_aside.name}")
