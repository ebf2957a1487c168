"""What two labelled volumes bring to others by registration, before any training.

    python benchmarks/registration.py --data DIR [--plan hippocampus-develop] [--every 5]

DIR is the data set of the plan. For each of its draws of labelled patients the first two volumes are registered to each
other and to every fifth of the tested volumes. Prints the Dice of the two with each other, by which a training decides,
and, on the tested volumes, the mean Dice over classes and volumes of what one of the two brings and of what both bring.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaf_model.atlases import Atlases
from kaf_model.benchmark.cohort import Case, read_case
from kaf_model.benchmark.plan import load_plan
from kaf_model.benchmark.runs import read_cohort
from kaf_model.benchmark.splits import draw_patients, splits
from kaf_model.config import SliceConfig
from kaf_model.evaluate import evaluate_volume
from kaf_model.labels import ClassMap, LabelledVolume
from kaf_model.progress import finished


class Carrying:
    """Labels that come from labelled volumes, and how long that takes."""

    def __init__(self, cases: list[LabelledVolume], classes: ClassMap, config: SliceConfig) -> None:
        self.seconds, self.registrations = 0.0, 0
        self.atlases = Atlases(cases, classes, config, most=len(cases))
        self._classes = classes

    def agreement(self) -> float:
        """Dice of the labelled volumes with each other."""
        return finished(self.atlases.compare())

    def dice(self, truth: LabelledVolume) -> float:
        """Mean Dice over classes of what comes to a volume."""
        began = time.process_time()
        found = finished(self.atlases.labels_of(truth.volume))
        self.seconds += time.process_time() - began
        self.registrations += len(self.atlases)
        labels: NDArray[np.integer] = np.zeros(truth.volume.shape, np.int64)
        if found is not None:
            labels = self._classes.values[found.channels()]
        scores = evaluate_volume(
            labels,
            truth.labels,
            spacing=truth.volume.spacing,
            voxel_ml=truth.volume.voxel_ml,
            classes={label.value: label.name for label in self._classes.classes[1:]},
            volume=truth.volume.name,
        )
        return float(np.nanmean([score.dice for score in scores]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the plan's data set")
    parser.add_argument("--plan", default="hippocampus-develop")
    parser.add_argument("--every", type=int, default=5, help="every n-th tested volume")
    options = parser.parse_args()
    plan = load_plan(options.plan)
    cohort = read_cohort(plan, options.data)
    config = SliceConfig(spacing=None)

    def read(case: Case) -> LabelledVolume:
        return read_case(case, classes=cohort.classes, **plan.data.reading)

    split = splits(cohort, plan.protocol)[0]
    tested = [read(case) for case in cohort.labelled(split.test)[:: options.every]]
    print(f"{len(tested)} tested volumes of {options.plan}")
    print("| labelled | agreement | one brings | both bring | processor seconds a registration |")
    print("|---|---|---|---|---|")
    for draw in range(plan.protocol.num_draws):
        patients = draw_patients(split, draw, plan.protocol)[:2]
        cases = [read(cohort.labelled([patient])[0]) for patient in patients]
        classes = ClassMap.of_labels(cases, dict(cohort.classes))
        both = Carrying(cases, classes, config)
        alone = [Carrying([case], classes, config) for case in cases]
        one = np.mean([carrying.dice(truth) for carrying in alone for truth in tested])
        together = np.mean([both.dice(truth) for truth in tested])
        names = " and ".join(case.volume.name for case in cases)
        took = both.seconds / both.registrations
        print(f"| {names} | {both.agreement():.3f} | {one:.3f} | {together:.3f} | {took:.2f} |", flush=True)


if __name__ == "__main__":
    main()
