"""Synapse, also called BTCV: abdominal CT, `img/img0001.nii.gz` and `label/label0001.nii.gz`.

Landman et al., "MICCAI multi-atlas labeling beyond the cranial vault: workshop and challenge", 2015.
"""

from __future__ import annotations

from pathlib import Path

from kaf_model.benchmark.cohort import Case, Cohort, cohort_of
from kaf_model.volume import find_volumes, volume_name

CLASSES = {
    1: "spleen",
    2: "right kidney",
    3: "left kidney",
    4: "gallbladder",
    5: "oesophagus",
    6: "liver",
    7: "stomach",
    8: "aorta",
    9: "inferior vena cava",
    10: "portal and splenic vein",
    11: "pancreas",
    12: "right adrenal gland",
    13: "left adrenal gland",
}


def read_synapse(folder: Path) -> Cohort:
    """Find the images of `Training` and `Testing`, and the label maps of the same number.

    Args:
        folder: `RawData`, the folder above it, or one that holds `img` and `label` itself.

    Raises:
        UserError: If there are none.
    """
    root = folder / "RawData" if (folder / "RawData").is_dir() else folder
    cases = []
    for place in (root, root / "Training", root / "Testing"):
        label_maps = {_number(path, "label"): path for path in _volumes(place / "label")}
        for path in _volumes(place / "img"):
            number = _number(path, "img")
            cases.append(Case(f"img{number}", f"img{number}", path, label_maps.get(number)))
    return cohort_of(cases, CLASSES, root, "Training/img/img0001.nii.gz, Training/label/label0001.nii.gz")


def _volumes(folder: Path) -> list[Path]:
    return find_volumes([folder]) if folder.is_dir() else []


def _number(path: Path, prefix: str) -> str:
    return volume_name(path).removeprefix(prefix)
