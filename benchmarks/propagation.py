"""What k finished slices tell of the rest of their volume, before any training.

    python benchmarks/propagation.py --data DIR [--patients odd] [--slices 1,3,5] [--volumes patient011_frame01,...]

DIR has `images/` and `labels/` of ACDC. The k slices are the evenly spaced ones of `kaf benchmark`. Prints Dice,
mean over classes and volumes, on the slices that nobody labelled and on the whole volume, beside the plainest
thing one could do, a copy of the nearest finished slice, and beside shapes that are carried without a look at the
intensities of the slice they arrive at. In the last line the first slices without any structure, where there are
such, are marked empty besides, which costs no painting; they still count as other slices.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaf_model.benchmark.plan import SlicesPlan
from kaf_model.benchmark.splits import slices_to_label
from kaf_model.benchmark.statistics import Spread
from kaf_model.config import SliceConfig
from kaf_model.evaluate import evaluate_volume
from kaf_model.labels import LabelledVolume, SliceStatus
from kaf_model.progress import finished as result_of  # `finished` are slices here
from kaf_model.propagation import Propagation, propagate
from kaf_model.volume import Volume, read_labels, read_volume

CLASSES = {1: "right ventricle", 2: "myocardium", 3: "left ventricle"}


def finished(volume: Volume, truth: NDArray[np.integer], count: int) -> LabelledVolume:
    """The volume as a person leaves it who finished `count` slices."""
    chosen = slices_to_label(truth, count, SlicesPlan())
    kinds = {z: SliceStatus.COMPLETE if truth[z].any() else SliceStatus.EMPTY for z in chosen}
    return LabelledVolume(volume, truth, kinds).without_unlabelled()


def with_ends(case: LabelledVolume, truth: NDArray[np.integer]) -> LabelledVolume:
    """The same when the first slices beyond all structures, where there are such, are marked empty."""
    shown = np.flatnonzero(truth.any((1, 2)))
    beyond = {z for z in (int(shown[0]) - 1, int(shown[-1]) + 1) if 0 <= z < len(truth)}
    statuses = dict(case.statuses) | dict.fromkeys(beyond, SliceStatus.EMPTY)
    return LabelledVolume(case.volume, truth, statuses).without_unlabelled()


def by_shapes(case: LabelledVolume) -> NDArray[np.integer]:
    carried = _carried(case)
    return case.labels if carried is None else replace(carried, appearance=None).labels()


def propagated(case: LabelledVolume) -> NDArray[np.integer]:
    carried = _carried(case)
    return case.labels if carried is None else carried.labels()


def _carried(case: LabelledVolume) -> Propagation | None:
    return result_of(propagate(case, [0, *CLASSES], SliceConfig()))


def copied(case: LabelledVolume) -> NDArray[np.integer]:
    labelled = np.array(sorted(case.statuses))
    nearest = labelled[np.abs(np.arange(len(case.labels))[:, None] - labelled).argmin(1)]
    return np.asarray(case.labels[nearest])


def dice(ours: NDArray[np.integer], truth: NDArray[np.integer], volume: Volume) -> float:
    scores = evaluate_volume(
        ours, truth, spacing=volume.spacing, voxel_ml=volume.voxel_ml, classes=CLASSES, volume=volume.name
    )
    return float(np.nanmean([score.dice for score in scores]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and labels/")
    parser.add_argument("--patients", choices=("odd", "even"), default="odd")
    parser.add_argument("--slices", default="1,3,5", help="how many slices are finished")
    parser.add_argument("--volumes", help="only these, by name")
    options = parser.parse_args()
    paths = sorted((options.data / "images").glob("patient*.nii.gz"))
    paths = [path for path in paths if int(path.name[7:10]) % 2 == (options.patients == "odd")]
    if options.volumes is not None:
        wanted = {f"{name}.nii.gz" for name in options.volumes.split(",")}
        paths = [path for path in paths if path.name in wanted]
        if len(paths) < len(wanted):
            parser.error(f"not there: {', '.join(sorted(wanted - {path.name for path in paths}))}")
    if not paths:
        parser.error(f"no patient*.nii.gz under {options.data / 'images'}")
    print(f"{len(paths)} volumes of patients with {options.patients} numbers")
    print("| finished slices | method | other slices | whole volume | seconds a volume |")
    print("|---|---|---|---|---|")
    for count in (int(text) for text in options.slices.split(",")):
        for name, method, ends in (
            ("copy of the nearest", copied, False),
            ("propagated, shapes alone", by_shapes, False),
            ("propagated", propagated, False),
            ("propagated, ends marked empty", propagated, True),
        ):
            found, seconds = [], 0.0
            for path in paths:
                volume = read_volume(path)
                truth = np.asarray(read_labels(options.data / "labels" / path.name, volume))
                case = finished(volume, truth, count)
                rest = [z for z in range(len(truth)) if z not in case.statuses]
                began = time.perf_counter()
                labels = method(with_ends(case, truth) if ends else case)
                seconds += time.perf_counter() - began
                found.append((dice(labels[rest], truth[rest], volume), dice(labels, truth, volume)))
            rest_dice, whole_dice = (Spread.of(values) for values in zip(*found, strict=True))
            print(
                f"| {count} | {name} | {rest_dice.mean:.3f} ({rest_dice.std:.3f}) "
                f"| {whole_dice.mean:.3f} ({whole_dice.std:.3f}) "
                f"| {seconds / len(paths):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
