"""Volumes in files, read one at a time when their turn comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kaf_model.errors import UserError
from kaf_model.volume import Unreadable, Volume, find_volumes, scan_volumes


class VolumeFiles:
    """The volumes of files and folders: how many is known, and only one is in memory at a time.

    Args:
        paths: As for `find_volumes`.
        **reading: As for `read_volume`.

    Raises:
        UserError: If a path does not exist or there is no volume.
    """

    def __init__(self, paths: Sequence[Path], **reading: Any) -> None:
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise UserError(f"{missing[0]}: no such file or folder; check the path")
        self.paths = find_volumes(paths)
        self._reading = reading
        if not self.paths:
            where = ", ".join(map(str, paths))
            raise UserError(f"there is no volume in {where}; expected NIfTI, NRRD, MetaImage or DICOM")

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Volume | Unreadable]:
        return scan_volumes(self.paths, **self._reading)
