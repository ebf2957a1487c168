"""Labels, ledger and class names beside the volume, so that nothing drawn is lost, even after a crash.

The file `NAME.kaf-labels.npz` holds the labels and a JSON header. It is replaced in one step, by whoever
wrote it; what somebody else wrote is set aside under a name of its own first. A volume whose name is taken
by another one has its checksum added to the name. Where the volume's folder cannot be written, the
plugin's own folder is used and named.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import threading
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import UserError
from napari_kaf._classes import ClassEntry
from napari_kaf._ledger import Cell
from napari_kaf._paths import data_folder

_FORMAT = 1
_MOST_VOXELS = 2e7  # of a larger volume some voxels are enough to know it again
_ENDING = ".kaf-labels.npz"
_OWNER_LETTERS = 12
_SET_ASIDE = re.compile(rf"\.(\d{{8}}-\d{{6}}-\d{{6}}|[0-9a-f]{{{_OWNER_LETTERS}}}){re.escape(_ENDING)}$")
_replacing = threading.Lock()  # two viewers may save the same volume at the same moment


def new_owner() -> str:
    """A token for one who writes."""
    return uuid.uuid4().hex[:_OWNER_LETTERS]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What is kept of the work on a volume.

    Attributes:
        labels: (Z, Y, X) integers.
        states: What the user said of each slice.
        classes: Value, name and colour of each class.
        spacing: mm (z, y, x) if the user had to give it, else None.
        slice_axis: The stored axis of the volume that Z runs along, if it is known.
        saved: When, ISO 8601.
        owner: Token of who drew it.
        by_hand: Of accepted slices, where (Y, X) somebody had painted before.
    """

    labels: NDArray[np.integer[Any]]
    states: tuple[Cell, ...]
    classes: tuple[ClassEntry, ...]
    spacing: tuple[float, ...] | None = None
    slice_axis: int | None = None
    saved: str = ""
    owner: str = ""
    by_hand: Mapping[int, NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def version(self) -> tuple[str, str]:
        """Tells this very work from what its owner or others saved before or after."""
        return self.owner, self.saved

    @property
    def num_marked(self) -> int:
        """Slices that are not untouched."""
        return sum(state is not Cell.UNTOUCHED for state in self.states)


@dataclass(frozen=True)
class Saved:
    """What saving did.

    Attributes:
        path: The file that was written.
        set_aside: Where the work of somebody else that it held is now, or None.
    """

    path: Path
    set_aside: Path | None


class Sidecar:
    """The file of one volume.

    Args:
        source: The volume's file or folder, or None of an array in memory.
        name: Name of the volume.
        voxels: In stored order, however they are cut; tells volumes of the same name apart.
    """

    def __init__(self, source: Path | None, name: str, voxels: NDArray[Any]) -> None:
        step = 1 + int((voxels.size / _MOST_VOXELS) ** (1 / voxels.ndim))
        some = np.ascontiguousarray(voxels[(slice(None, None, step),) * voxels.ndim])
        self.fingerprint = f"{'x'.join(map(str, voxels.shape))}-{zlib.crc32(some.data):08x}"
        safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
        self.key = f"{safe}-{self.fingerprint.rpartition('-')[2]}"
        fallback = data_folder() / "labels" / f"{self.key}{_ENDING}"
        beside = [] if source is None else [source.parent / f"{name}{_ENDING}" for name in (safe, self.key)]
        self._places = [*beside, fallback]

    @property
    def wanted_folder(self) -> Path | None:
        """Where the file should lie: the volume's folder, if it has one."""
        return self._places[0].parent if len(self._places) > 1 else None

    def load(self) -> Snapshot | None:
        """Return what was kept of this very volume, the newest if there are several; None if nothing.

        What was set aside counts where there is nothing else.

        Raises:
            UserError: If a file is there but broken; it is left where it is.
        """
        found = self._in_place() or self._set_aside()
        return self._load(max(found, key=lambda path: found[path])) if found else None

    def of_other_voxels(self) -> Path | None:
        """The file in the first place if it belongs to a volume of the same name and other voxels, else None."""
        place = self._places[0]
        return place if len(self._places) > 1 and self._is_taken(place) else None

    def save(self, snapshot: Snapshot, replaces: tuple[str, str] | None = None) -> Saved:
        """Write to the first place that can be written and is not taken by another volume.

        Args:
            snapshot: The work.
            replaces: Version of the work that was restored, and that this one goes on from.

        Raises:
            UserError: If no place can be.
        """
        reasons = []
        *beside, fallback = self._places
        free = [place for place in beside if not self._is_taken(place)]
        for place in [*free[:1], fallback]:
            try:
                return Saved(place, self._write(place, snapshot, replaces))
            except OSError as error:
                reasons.append(f"{place.parent}: {error.strerror}")
        raise UserError(
            f"the labels cannot be saved ({'; '.join(reasons)}); export them to another place now"
        )

    def decline(self, until: str) -> None:
        """Rename what was saved up to a moment, so that it is kept and not offered again."""
        for path, saved in [*self._in_place().items(), *self._set_aside().items()]:
            if saved <= until:
                name = f"{path.name.removesuffix(_ENDING)}.declined-{_stamp()}{_ENDING}"
                with contextlib.suppress(OSError):  # a folder that is only read keeps its file anyway
                    os.replace(path, path.with_name(name))

    def _in_place(self) -> dict[Path, str]:
        """The files of this volume, and when they were saved."""
        headers = {path: _header(path) for path in self._places if _is_there(path)}
        return {path: header.saved for path, header in headers.items() if self._fits(header)}

    def _set_aside(self) -> dict[Path, str]:
        """The files of this volume that were set aside, and when they were saved."""
        found = {}
        for place in self._places:
            name = place.name.removesuffix(_ENDING)
            files: list[Path] = []
            with contextlib.suppress(OSError):  # a folder that cannot be reached
                files = list(place.parent.glob(f"{name}.*{_ENDING}"))
            for path in files:
                if _SET_ASIDE.fullmatch(path.name, len(name)):
                    with contextlib.suppress(UserError):  # damaged
                        header = _header(path)
                        if self._fits(header):
                            found[path] = header.saved
        return found

    def _fits(self, header: _Header) -> bool:
        return header.fingerprint == self.fingerprint

    def _is_taken(self, place: Path) -> bool:
        """Whether another volume of this name has its work there."""
        with contextlib.suppress(UserError):
            return _is_there(place) and not self._fits(_header(place))
        return False

    def _make_room(self, path: Path, owner: str, replaces: tuple[str, str] | None) -> Path | None:
        """Set aside what a file holds, unless the owner wrote or restored it; returns where it is then."""
        if not path.is_file():
            return None
        holder = ""
        with contextlib.suppress(UserError):
            header = _header(path)
            holder = header.owner
            known = holder == owner != "" or (holder, header.saved) == replaces
            if known and self._fits(header):
                return None
        target = path.with_name(f"{path.name.removesuffix(_ENDING)}.{holder or _stamp()}{_ENDING}")
        os.replace(path, target)
        return target

    def _write(self, path: Path, snapshot: Snapshot, replaces: tuple[str, str] | None) -> Path | None:
        header = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "owner": snapshot.owner,
            "saved": datetime.datetime.now().astimezone().isoformat(timespec="milliseconds"),
            "states": [str(state) for state in snapshot.states],
            "classes": [[entry.value, entry.name, list(entry.color)] for entry in snapshot.classes],
            "spacing": snapshot.spacing,
            "slice_axis": snapshot.slice_axis,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "wb") as file:
                hands = {f"by_hand_{z}": plane for z, plane in snapshot.by_hand.items() if plane.any()}
                content: dict[str, Any] = {
                    "labels": snapshot.labels,
                    "header": np.array(json.dumps(header)),
                    **hands,
                }
                np.savez_compressed(file, **content)
                file.flush()
                os.fsync(file.fileno())
            with _replacing:
                set_aside = self._make_room(path, snapshot.owner, replaces)
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return set_aside

    def _load(self, path: Path) -> Snapshot:
        with _archive(path) as content:
            header = json.loads(str(content["header"]))
            return Snapshot(
                labels=content["labels"],
                states=tuple(Cell(state) for state in header["states"]),
                classes=tuple(ClassEntry(v, n, _color(color)) for v, n, color in header["classes"]),
                spacing=tuple(header["spacing"]) if header["spacing"] else None,
                slice_axis=header["slice_axis"],
                saved=header["saved"],
                owner=header.get("owner", ""),
                by_hand={
                    int(name.removeprefix("by_hand_")): content[name]
                    for name in content.files
                    if name.startswith("by_hand_")
                },
            )


@dataclass(frozen=True)
class _Header:
    fingerprint: str
    saved: str
    owner: str


def _header(path: Path) -> _Header:
    with _archive(path) as content:
        header = json.loads(str(content["header"]))
        return _Header(header["fingerprint"], header["saved"], header.get("owner", ""))


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[Any]:
    """A file that was saved.

    Raises:
        UserError: If it is broken.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            yield content
    except Exception as error:  # a broken archive raises nearly anything
        raise UserError(f"{path} holds saved labels but is damaged ({error}); it is left as it is") from error


def _is_there(path: Path) -> bool:
    """Whether there is a file; of a folder that cannot be reached, none is."""
    try:
        return path.is_file()
    except OSError:
        return False


def _stamp() -> str:
    return datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")


def _color(values: Sequence[float]) -> tuple[float, float, float, float]:
    red, green, blue, opacity = (float(value) for value in values)
    return red, green, blue, opacity
