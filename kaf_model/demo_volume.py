"""The other slices of the demo's labelled volume, segmented before and after training."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaf_model.checkpoint import Model
from kaf_model.config import SegmentConfig
from kaf_model.errors import UserError
from kaf_model.evaluate import evaluate_volume
from kaf_model.keypoints import KeypointCache
from kaf_model.labels import LabelledVolume
from kaf_model.phantom import HEART_CLASSES
from kaf_model.progress import Progress
from kaf_model.propagation import propagate
from kaf_model.segment import segment
from kaf_model.volume import write_labels


@dataclass(frozen=True)
class RestOfVolume:
    """Mean Dice on the slices that were not finished.

    Attributes:
        num_slices: How many there are.
        propagated: Finished slices carried to them, without any training.
        network: The network alone.
        joined: The network joined with what was carried.
        labels: Label map of the whole volume, joined.
    """

    num_slices: int
    propagated: float
    network: float
    joined: float
    labels: Path

    def report(self) -> str:
        """The three scores in a sentence."""
        return (
            f"Dice on the {self.num_slices} other slices of the labelled subject: {self.propagated:.3f} with the "
            f"finished slices carried to them before any training, {self.network:.3f} by the network alone, "
            f"{self.joined:.3f} joined."
        )


def segment_rest(
    model: Model, case: LabelledVolume, output: Path, *, cache: KeypointCache
) -> Generator[Progress, None, RestOfVolume]:
    """Segment the other slices of a volume of which all is known.

    Args:
        model: Trained on the finished slices.
        case: The volume; labels of slices that are not finished are only compared with.
        output: Label map to write.
        cache: Keypoints found before.

    Yields:
        Progress.

    Raises:
        UserError: If nothing is finished.
    """
    known, volume = case.without_unlabelled(), case.volume
    carried = yield from propagate(known, [label.value for label in model.classes], model.slices)
    if carried is None:
        raise UserError("no finished slice shows a structure")
    settings = SegmentConfig()
    alone = (yield from segment(model, volume, settings, cache=cache)).labels
    joined = (yield from segment(model, volume, settings, propagation=carried, cache=cache)).labels
    write_labels(output, joined, like=volume)
    rest = [z for z in range(volume.num_slices) if z not in case.statuses]

    def dice(labels: NDArray[np.integer]) -> float:
        scores = evaluate_volume(
            labels[rest], case.labels[rest], spacing=volume.spacing, classes=HEART_CLASSES, volume=volume.name
        )
        return float(np.nanmean([score.dice for score in scores]))

    return RestOfVolume(len(rest), dice(carried.labels()), dice(alone), dice(joined), output)
