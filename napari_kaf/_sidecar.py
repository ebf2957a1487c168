"""Labels, ledger and class names beside the volume, so that nothing drawn is lost, even after a crash.

The file `NAME.kaf-labels.npz` holds the labels and a JSON header. It is replaced in one step. Where the
volume's folder cannot be written, the plugin's own folder is used and named.
"""

from __future__ import annotations

import datetime
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
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
    """

    labels: NDArray[np.integer[Any]]
    states: tuple[Cell, ...]
    classes: tuple[ClassEntry, ...]
    spacing: tuple[float, ...] | None = None
    slice_axis: int | None = None
    saved: str = ""

    @property
    def num_marked(self) -> int:
        """Slices that are not untouched."""
        return sum(state is not Cell.UNTOUCHED for state in self.states)


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
        self._fallback = data_folder() / "labels" / f"{self.key}{_ENDING}"
        self._places = (
            [self._fallback] if source is None else [source.parent / f"{safe}{_ENDING}", self._fallback]
        )

    @property
    def wanted_folder(self) -> Path | None:
        """Where the file should lie: the volume's folder, if it has one."""
        return self._places[0].parent if len(self._places) > 1 else None

    def load(self) -> Snapshot | None:
        """Return what was kept of this very volume, the newest if there are several; None if nothing.

        Raises:
            UserError: If a file is there but broken; it is left where it is.
        """
        snapshots = [self._load(path) for path in self._places if path.is_file()]
        return max(filter(None, snapshots), key=lambda snapshot: snapshot.saved, default=None)

    def save(self, snapshot: Snapshot) -> Path:
        """Write to the first place that can be written.

        Raises:
            UserError: If no place can be.
        """
        reasons = []
        for place in self._places:
            try:
                self._write(place, snapshot)
            except OSError as error:
                reasons.append(f"{place.parent}: {error.strerror}")
            else:
                return place
        raise UserError(
            f"the labels cannot be saved ({'; '.join(reasons)}); export them to another place now"
        )

    def set_aside(self) -> list[Path]:
        """Rename what is there, so that it is kept and not offered again; returns the new names."""
        kept = []
        for place in self._places:
            if place.is_file():
                stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
                target = place.with_name(place.name.replace(_ENDING, f".{stamp}{_ENDING}"))
                try:
                    os.replace(place, target)
                except OSError:
                    continue  # a folder that is only read keeps its file anyway
                kept.append(target)
        return kept

    def _write(self, path: Path, snapshot: Snapshot) -> None:
        header = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "saved": datetime.datetime.now().astimezone().isoformat(timespec="milliseconds"),
            "states": [str(state) for state in snapshot.states],
            "classes": [[entry.value, entry.name, list(entry.color)] for entry in snapshot.classes],
            "spacing": snapshot.spacing,
            "slice_axis": snapshot.slice_axis,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, labels=snapshot.labels, header=np.array(json.dumps(header)))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _load(self, path: Path) -> Snapshot | None:
        try:
            with np.load(path, allow_pickle=False) as content:
                header: dict[str, Any] = json.loads(str(content["header"]))
                if header["fingerprint"] != self.fingerprint:
                    return None  # another volume of this name lay here
                labels = content["labels"]
            return Snapshot(
                labels=labels,
                states=tuple(Cell(state) for state in header["states"]),
                classes=tuple(ClassEntry(v, n, _color(color)) for v, n, color in header["classes"]),
                spacing=tuple(header["spacing"]) if header["spacing"] else None,
                slice_axis=header["slice_axis"],
                saved=header["saved"],
            )
        except Exception as error:  # a broken archive raises nearly anything
            raise UserError(
                f"{path} holds saved labels but is damaged ({error}); it is left as it is"
            ) from error


def _color(values: Sequence[float]) -> tuple[float, float, float, float]:
    red, green, blue, opacity = (float(value) for value in values)
    return red, green, blue, opacity
