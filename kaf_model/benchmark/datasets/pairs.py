"""Folders `images/` and `labels/` whose files pair by name.

`NAME_frameYY` is a frame of patient NAME; any other name is a patient of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

from kaf_model.benchmark.cohort import Case, Cohort, cohort_of
from kaf_model.cases import pair_cases
from kaf_model.label_names import class_names
from kaf_model.volume import find_volumes, volume_name


def read_pairs(folder: Path) -> Cohort:
    """Find images, their label maps, and the names of the classes in labels.json or dataset.json.

    Images without a label map can be pretrained on.

    Raises:
        UserError: If a folder is missing or nothing pairs.
    """
    images, labels = folder / "images", folder / "labels"
    pairs, _ = pair_cases(images, labels)
    label_maps = {pair.name: pair.labels for pair in pairs}
    names = {volume_name(path): path for path in find_volumes([images])}
    cases = [Case(name, _patient(name), path, label_maps.get(name)) for name, path in names.items()]
    return cohort_of(cases, class_names(labels), folder, "images/NAME.nii.gz and labels/NAME.nii.gz")


def _patient(name: str) -> str:
    return re.sub(r"_frame\d+$", "", name)
