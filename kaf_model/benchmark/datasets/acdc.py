"""ACDC as it is distributed: a folder a patient with Info.cfg, the two frames and their label maps.

Bernard et al., "Deep learning techniques for automatic MRI cardiac multi-structures segmentation and
diagnosis: is the problem solved?", IEEE TMI 37(11), 2018. The same volumes laid out as `images/` and
`labels/` are read by `read_pairs`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from kaf_model.benchmark.cohort import Case, Cohort, cohort_of
from kaf_model.errors import UserError
from kaf_model.volume_files import FORMATS

CLASSES = {1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
_LAYOUT = "patientXXX/ with Info.cfg, patientXXX_frameYY.nii.gz and patientXXX_frameYY_gt.nii.gz"


def read_acdc(folder: Path) -> Cohort:
    """Find the end-diastolic and end-systolic volumes of the training patients.

    Args:
        folder: Holds the patients' folders, or `training` or `database/training` that does.

    Raises:
        UserError: If there are none, or a frame that Info.cfg names is missing.
    """
    places = [folder / "database" / "training", folder / "training", folder]
    place = next(place for place in places if place.is_dir() or place == folder)
    folders = sorted(place.glob("patient[0-9]*"))
    cases = [case for patient in folders if patient.is_dir() for case in _frames(patient)]
    return cohort_of(cases, CLASSES, place, _LAYOUT)


def _frames(folder: Path) -> Iterator[Case]:
    for frame in _named_frames(folder / "Info.cfg"):
        name = f"{folder.name}_frame{frame:02d}"
        image, labels = _file(folder, name), _file(folder, f"{name}_gt")
        if image is None:
            raise UserError(f"{folder / 'Info.cfg'} names frame {frame}, but there is no {name}.nii.gz")
        yield Case(name, folder.name, image, labels)


def _named_frames(info: Path) -> list[int]:
    """The frames of end diastole and end systole, from lines such as `ED: 1`."""
    try:
        text = info.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{info} cannot be read ({error}); expected {_LAYOUT}") from error
    frames = re.findall(r"^(?:ED|ES)\s*:\s*(\d+)\s*$", text, re.MULTILINE)
    if not frames:
        raise UserError(f"{info} names no frame; expected lines such as 'ED: 1' and 'ES: 12'")
    return sorted({int(frame) for frame in frames})


def _file(folder: Path, name: str) -> Path | None:
    paths = (folder / f"{name}{ending}" for ending in FORMATS)
    return next((path for path in paths if path.is_file()), None)
