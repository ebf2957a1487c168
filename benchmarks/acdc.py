"""Few labels on ACDC: pretrained against random start against the plain UNet, on patients never seen.

    python benchmarks/acdc.py --data DIR [--train 12,76] [--seconds 220] [--pretrain-seconds 330]

Patients with an even number only, as far as labels go: eight are tested (16 volumes), two of the others
are finetuned on. Pretraining and pseudo-labels see the images of all 32 patients that are not tested, never
a label. Nothing was chosen on the eight. The trainings have equal time, not equal steps. Prints per-volume
Dice, the last step of each training, no slice left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from kaf_model.benchmark.statistics import Spread
from kaf_model.checkpoint import Checkpoint
from kaf_model.config import FinetuneConfig, ModelConfig, PretrainConfig
from kaf_model.evaluate import evaluate_volume
from kaf_model.finetune import finetune
from kaf_model.keypoints import KeypointCache
from kaf_model.labels import LabelledVolume, SliceStatus
from kaf_model.pretrain import pretrain
from kaf_model.progress import Progress
from kaf_model.segment import segment_volume
from kaf_model.volume import read_labels, read_volume

TEST = (6, 16, 26, 36, 46, 56, 66, 86)
CLASSES = {1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
Result = TypeVar("Result")


@dataclass(frozen=True)
class Score:
    """Dice of each class, (volumes, classes), and what its training took."""

    dice: np.ndarray
    seconds: float
    steps: int

    def row(self, name: str) -> str:
        """One line of the table."""
        volumes = Spread.of(np.nanmean(self.dice, axis=1))
        classes = " | ".join(f"{value:.3f}" for value in np.nanmean(self.dice, axis=0))
        mean = f"{volumes.mean:.3f} ({volumes.std:.3f})"
        return f"| {name} | {mean} | {classes} | {self.steps} in {self.seconds:.0f} s |"


def patient(path: Path) -> int:
    return int(path.name[len("patient") :].split("_")[0])


def finish(work: Generator[Progress, None, Result], name: str) -> Result:
    """Run long work to its end, with a line now and then."""
    last = time.monotonic()
    while True:
        try:
            progress = next(work)
        except StopIteration as done:
            result: Result = done.value
            return result
        if progress.message or time.monotonic() - last > 30:
            losses = ", ".join(f"{key} {value:.3f}" for key, value in progress.losses.items())
            print(f"  {name}: {progress.step}/{progress.total} {losses} {progress.message}", flush=True)
            last = time.monotonic()


def labelled(images: Sequence[Path], labels: Path) -> list[LabelledVolume]:
    cases = []
    for path in images:
        volume = read_volume(path)
        every_slice = dict.fromkeys(range(volume.num_slices), SliceStatus.COMPLETE)
        cases.append(LabelledVolume(volume, read_labels(labels / path.name, volume), every_slice))
    return cases


def score(
    cases: Sequence[LabelledVolume],
    test: Sequence[LabelledVolume],
    unlabelled: Sequence[Path],
    training: FinetuneConfig,
    model: ModelConfig | None,
    start: Checkpoint | None,
    name: str,
) -> Score:
    """Train on `cases`, and on `unlabelled` by pseudo-labels, and measure Dice on `test`."""
    work = finetune(
        model,
        cases,
        training,
        start=start,
        unlabelled=unlabelled,
        class_names=CLASSES,
        cache=KeypointCache(),
    )
    result = finish(work, name)
    dice = []
    for case in test:
        predicted = segment_volume(result.model, case.volume)
        scores = evaluate_volume(
            predicted,
            case.labels,
            spacing=case.volume.spacing,
            voxel_ml=case.volume.voxel_ml,
            classes=CLASSES,
        )
        dice.append([class_score.dice for class_score in scores])
    record = result.model.history[-1]
    return Score(np.array(dice), record["seconds"], record["steps"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and labels/")
    parser.add_argument("--train", default="12,76", help="two even patient numbers that are not tested")
    parser.add_argument("--seconds", type=float, default=220, help="of each finetuning")
    parser.add_argument("--pretrain-seconds", type=float, default=330)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train = [int(number) for number in options.train.split(",")]
    if set(train) & set(TEST) or any(number % 2 for number in train):
        parser.error(f"--train must be even numbers outside {TEST}, got {train}")
    started = time.monotonic()
    images = sorted((options.data / "images").glob("patient*.nii.gz"))
    if not images:
        parser.error(f"no patient*.nii.gz under {options.data / 'images'}")
    labels = options.data / "labels"
    unseen = [path for path in images if patient(path) not in TEST]
    cases = labelled([path for path in images if patient(path) in train], labels)
    test = labelled([path for path in images if patient(path) in TEST], labels)

    model = ModelConfig.preset("small")
    pretraining = PretrainConfig.preset(
        "small", steps=None, time_budget=options.pretrain_seconds, seed=options.seed
    )
    pretrained = finish(pretrain(model, unseen, pretraining, cache=KeypointCache()), "pretraining")
    training = FinetuneConfig.preset("small", steps=None, time_budget=options.seconds, seed=options.seed)
    labelled_only = training.override(pseudo_labels={"share": 0.0})
    unet = ModelConfig.preset("small", architecture="unet")
    others = [path for path in unseen if patient(path) not in train]
    rows: dict[str, tuple[FinetuneConfig, ModelConfig | None, Checkpoint | None]] = {
        "KAF-UNet, pretrained": (training, None, pretrained.checkpoint),
        "KAF-UNet, random start": (training, model, None),
        "plain UNet": (training, unet, None),
        "plain UNet, labelled slices only": (labelled_only, unet, None),
    }
    scores = {
        name: score(cases, test, others, settings, architecture, start, name)
        for name, (settings, architecture, start) in rows.items()
    }
    record = pretrained.checkpoint.history[-1]
    print(
        f"\n{len(test)} volumes of patients {TEST}; finetuned on patients {train} ({len(cases)} volumes), "
        f"seed {options.seed}; pretrained on {len(unseen)} volumes, "
        f"{record['steps']} steps in {record['seconds']:.0f} s\n"
    )
    print("| | Dice, mean (std) over volumes | " + " | ".join(CLASSES.values()) + " | steps of finetuning |")
    print("|---|---|---|---|---|---|")
    for name, result in scores.items():
        print(result.row(name))
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
