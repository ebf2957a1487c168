"""Small synthetic hearts, drawn when they are first asked for: to try a plan without any data."""

from __future__ import annotations

from pathlib import Path

from kaf_model.benchmark.cohort import Cohort
from kaf_model.benchmark.datasets.pairs import read_pairs
from kaf_model.phantom import write_cohort

NUM_SUBJECTS = 10
SHAPE = (7, 48, 64)
SPACING = (10.0, 3.0, 3.0)


def read_phantoms(folder: Path) -> Cohort:
    """Find the hearts of a folder; an absent or incomplete one is filled with ten."""
    if not (folder / "labels" / f"heart_{NUM_SUBJECTS - 1:03d}.nii.gz").is_file():
        write_cohort(folder, num_subjects=NUM_SUBJECTS, shape=SHAPE, spacing=SPACING)
    return read_pairs(folder)
