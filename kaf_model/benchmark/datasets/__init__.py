"""Readers of data sets by the layout of their folders; each finds volumes and says whose they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from kaf_model.benchmark.cohort import Cohort
from kaf_model.benchmark.datasets.acdc import read_acdc
from kaf_model.benchmark.datasets.decathlon import read_decathlon
from kaf_model.benchmark.datasets.imagechd import read_imagechd
from kaf_model.benchmark.datasets.pairs import read_pairs
from kaf_model.benchmark.datasets.phantom import read_phantoms
from kaf_model.benchmark.datasets.synapse import read_synapse

LAYOUTS: Mapping[str, Callable[[Path], Cohort]] = {
    "acdc": read_acdc,
    "pairs": read_pairs,
    "imagechd": read_imagechd,
    "synapse": read_synapse,
    "decathlon": read_decathlon,
    "phantom": read_phantoms,
}
"""Reader by the name that a plan gives it."""
