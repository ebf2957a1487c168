"""A task of the Medical Segmentation Decathlon: everything is in its dataset.json.

Antonelli et al., "The Medical Segmentation Decathlon", Nature Communications 13, 2022.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kaf_model.benchmark.cohort import Case, Cohort, cohort_of
from kaf_model.errors import UserError
from kaf_model.label_names import class_names
from kaf_model.volume_files import volume_name


def read_decathlon(folder: Path) -> Cohort:
    """Find the volumes that dataset.json lists; those of "test" have no labels and can be pretrained on.

    Raises:
        UserError: If the file is missing or lists volumes that do not exist.
    """
    path = folder / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cases = [_case(folder, entry) for entry in (*content["training"], *content.get("test", ()))]
    except (OSError, AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f'{path} must list {{"training": [{{"image": ..., "label": ...}}, ...]}} as the Decathlon\'s do: '
            f"{type(error).__name__} {error}"
        ) from error
    for case in cases:
        for file in (case.image, case.labels):
            if file is not None and not file.is_file():
                raise UserError(f"{path} lists {file}, which does not exist; unpack the whole task")
    return cohort_of(cases, class_names(folder), folder, 'dataset.json with volumes under "training"')


def _case(folder: Path, entry: Any) -> Case:
    image, labels = (entry, None) if isinstance(entry, str) else (entry["image"], entry["label"])
    name = volume_name(image)
    return Case(name, name, folder / image, folder / labels if labels is not None else None)
