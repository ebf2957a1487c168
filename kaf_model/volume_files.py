"""Files and folders that hold volumes: known formats, names, and what a folder contains."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

PathLike = str | os.PathLike[str]

FORMATS = {
    ".nii.gz": "nifti",
    ".nii": "nifti",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".mha": "metaimage",
    ".mhd": "metaimage",
}
_DICOM_DEPTH = 4  # folders below the given one: patient, study, series and one to spare


def format_of(path: Path) -> tuple[str, str]:
    """Return the format of a file name and the ending that told it; ("", "") when it is unknown."""
    name = path.name.lower()
    ending = next((ending for ending in FORMATS if name.endswith(ending)), "")
    return FORMATS.get(ending, ""), ending


def volume_name(path: PathLike) -> str:
    """Return the name of a file without its ending: `scan.nii.gz` is "scan"."""
    path = Path(path)
    if path.name in ("", ".."):  # the folder that one is in
        path = path.resolve()
    ending = format_of(path)[1]
    return path.name[: -len(ending)] if ending else path.name


def is_dicom_file(path: Path) -> bool:
    """Return whether a file carries DICOM's mark."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_volumes(paths: Iterable[PathLike]) -> list[Path]:
    """Return the volumes named by files and folders.

    A file is taken as given, whether it can be read or not. A folder gives its files of known
    formats, sorted, then each folder in or below it that holds a DICOM series. Other subfolders and
    hidden files are left alone, and nothing is listed twice.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        found.update(dict.fromkeys(_in_folder(path) if path.is_dir() else [path]))
    return list(found)


def _in_folder(folder: Path) -> list[Path]:
    shown = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in shown if format_of(entry)[0] and entry.is_file()]
    return files + _dicom_folders(folder, _DICOM_DEPTH)


def _dicom_folders(folder: Path, depth: int) -> list[Path]:
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return []
    files = (entry for entry in entries if entry.is_file() and not format_of(entry)[0])
    found = [folder] if any(is_dicom_file(file) for file in files) else []
    for entry in entries:
        if depth > 0 and entry.is_dir() and not entry.is_symlink():
            found += _dicom_folders(entry, depth - 1)
    return found
