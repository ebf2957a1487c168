"""What label values are called, in a file beside the label maps."""

from __future__ import annotations

import json
from pathlib import Path

from kaf_model.errors import UserError

LABEL_NAMES = "labels.json"
"""File of names by value: {"0": "background", "1": "right ventricle", ...}."""
_FILES = (LABEL_NAMES, "dataset.json")


def class_names(labels: Path) -> dict[int, str]:
    """Read the names of label values from labels.json or dataset.json in a folder or the one above it.

    `labels.json` maps values to names; `dataset.json` holds such a map under "labels", in the way of the
    Medical Segmentation Decathlon ("1": "liver") or of nnU-Net ("liver": 1). Without a file there are none.

    Raises:
        UserError: If a file is there and does not name classes.
    """
    for folder in (labels, labels.resolve().parent):
        for name in _FILES:
            path = folder / name
            if path.is_file():
                return _read_names(path)
    return {}


def _read_names(path: Path) -> dict[int, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "dataset.json":
            content = content["labels"]
        names: dict[int, str] = {}
        for key, value in content.items():
            text, number = (value, key) if str(key).lstrip("-").isdigit() else (key, value)
            names[int(number)] = str(text)
        return names
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(
            f'{path} must name label values like {{"0": "background", "1": "liver"}}: '
            f"{type(error).__name__} {error}"
        ) from error
