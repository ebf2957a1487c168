"""When the work on a volume is saved: soon after a change, on a thread of its own, again if it failed."""

from __future__ import annotations

import datetime
import threading
import time
import weakref
from dataclasses import dataclass, replace

from kaf_model.errors import UserError
from napari_kaf._sidecar import Sidecar, Snapshot, new_owner

SAVE_AFTER = 3.0  # seconds from the first unsaved change
_RETRY_AFTER = 30.0  # seconds from a failure
_FAILED = "the labels cannot be saved"


@dataclass(frozen=True, eq=False)
class _Work:
    """What is to be written."""

    sidecar: Sidecar
    snapshot: Snapshot
    replaces: tuple[str, str] | None

    @property
    def key(self) -> tuple[str, str]:
        return self.sidecar.key, self.snapshot.owner


class Autosave:
    """Writes the sidecar of the volume that is worked on.

    Attributes:
        sidecar: The file of that volume, or None.
        problem: Why what was to be written last was not, or nothing.
    """

    def __init__(self) -> None:
        self.sidecar: Sidecar | None = None
        self.problem = ""
        self._owners: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()
        self._restored: dict[str, tuple[str, str]] = {}  # versions that owners go on from
        self._due: float | None = None
        self._unwritten: dict[tuple[str, str], _Work] = {}
        self._lock = threading.Lock()  # of what is unwritten
        self._thread: threading.Thread | None = None
        self._not_before = 0.0
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
        """Whether it is time to save; never while something is being written."""
        return self._due is not None and time.monotonic() >= self._due and self._may_write

    def owner(self, layer: object) -> str:
        """Token of who draws on a layer."""
        return self._owners.setdefault(layer, new_owner())

    def inherit(self, layer: object, former: object) -> None:
        """Take in that a layer goes on from another that was drawn on before."""
        self._owners[layer] = self.owner(former)

    def restored(self, layer: object, saved: Snapshot) -> None:
        """Take in that a layer goes on from saved work, so that it may replace it."""
        self._restored[self.owner(layer)] = saved.version

    def save(self, snapshot: Snapshot) -> None:
        """Write in the background, after what is being written."""
        if self.sidecar is None:
            return
        self._due = None
        work = _Work(self.sidecar, snapshot, self._restored.get(snapshot.owner))
        with self._lock:
            self._unwritten.pop(work.key, None)
            self._unwritten[work.key] = work
        if not self._writing:
            self._start()

    def go_on(self) -> None:
        """Write what came while something else was written, or could not be written before."""
        if self._unwritten and self._may_write:
            self._start()

    def wait(self) -> None:
        """Write what is left, and wait for it."""
        self._join()
        if self._unwritten:
            self._start()
            self._join()

    def load(self) -> Snapshot | None:
        """What is saved of the volume; what is being written of it is waited for.

        Raises:
            UserError: If a file is there but broken.
        """
        if self.sidecar is None:
            return None
        if self._unwritten_of(self.sidecar):
            self.wait()
        left = self._unwritten_of(self.sidecar)
        if left:  # it cannot be written, and is not lost as long as the window is open
            moment = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
            return replace(left[-1].snapshot, saved=moment)
        return self.sidecar.load()

    def _unwritten_of(self, sidecar: Sidecar) -> list[_Work]:
        with self._lock:
            return [work for (key, _owner), work in self._unwritten.items() if key == sidecar.key]

    def messages(self) -> list[str]:
        """What has to be told since the last call, each thing once."""
        if not self.problem:  # should it come again, it is told again
            self._told = {message for message in self._told if not message.startswith(_FAILED)}
        new = []
        while self._messages:  # the thread may add some
            message = self._messages.pop(0)
            if message not in self._told:
                self._told.add(message)
                new.append(message)
        return new

    @property
    def _writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def _may_write(self) -> bool:
        return not self._writing and time.monotonic() >= self._not_before

    def _start(self) -> None:
        self._not_before = time.monotonic() + _RETRY_AFTER
        with self._lock:
            works = list(self._unwritten.values())
        self._thread = threading.Thread(target=self._write, args=(works,))
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _write(self, works: list[_Work]) -> None:
        self.problem = next(filter(None, [self._write_one(work) for work in works]), "")
        if not self.problem:
            self._not_before = 0.0

    def _write_one(self, work: _Work) -> str:
        """Write something; returns why it could not be written, or nothing."""
        try:
            saved = work.sidecar.save(work.snapshot, work.replaces)
        except Exception as error:  # whatever is in the way, it is tried again
            problem = str(error) if isinstance(error, UserError) else f"{_FAILED}: {error!r}"
            self._messages.append(problem)
            return problem
        with self._lock:
            if self._unwritten.get(work.key) is work:
                del self._unwritten[work.key]
        wanted = work.sidecar.wanted_folder
        if wanted is not None and saved.path.parent != wanted:
            self._messages.append(f"{wanted} cannot be written; the labels are saved as {saved.path}")
        if saved.set_aside is not None:
            self._messages.append(f"{saved.path} held other work, which is kept as {saved.set_aside.name}")
        return ""
