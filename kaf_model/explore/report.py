"""Numbers on what a network and its keypoints are worth, over the slices of many volumes."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kaf_model.config import CorrespondenceConfig, KeypointConfig, SliceConfig
from kaf_model.correspondences import find_correspondences
from kaf_model.errors import UserError, VolumeError
from kaf_model.explore.equivariance import NUM_VIEWS, augment_slice, equivariance_errors
from kaf_model.explore.explorer import Explorer
from kaf_model.explore.matches import match_features
from kaf_model.explore.views import LEVELS, SliceFeatures, VolumeView
from kaf_model.keypoints import KeypointCache, make_detector
from kaf_model.progress import Progress
from kaf_model.slices import Slices
from kaf_model.volume import Unreadable, Volume

RADII = (5.0, 10.0, 20.0, 30.0, 40.0)
TOLERANCE = 3.0
"""Pixels within which a match is right."""

_OF_DETECTION = ("keypoints a slice", "share on foreground", "matched share")

LabelsOf = Callable[[Volume], NDArray[np.integer] | None]


@dataclass(frozen=True)
class Number:
    """One line of the report.

    Attributes:
        model: What the network is called.
        quantity: What was measured.
        condition: For which radius, level or method; else empty.
        value: Its value; nan where there is nothing to measure.
        num_samples: Slices, pairs of slices, or points that it summarises.
    """

    model: str
    quantity: str
    condition: str
    value: float
    num_samples: int


@dataclass(frozen=True)
class ExploreReport:
    """All numbers, and what the user should know about them.

    Attributes:
        numbers: Model after model.
        notices: What was passed over, and what each model is.
    """

    numbers: tuple[Number, ...]
    notices: tuple[str, ...]

    def table(self) -> str:
        """A Markdown table: a line for each number, a column for each model."""
        models = list(dict.fromkeys(number.model for number in self.numbers))
        rows: dict[tuple[str, str], dict[str, str]] = {}
        for number in self.numbers:
            text = "" if math.isnan(number.value) else f"{number.value:.4g}"
            rows.setdefault((number.quantity, number.condition), {})[number.model] = text
        lines = [["", *models], ["---"] * (len(models) + 1)]
        for (quantity, condition), values in rows.items():
            name = f"{quantity}, {condition}" if condition else quantity
            lines.append([name, *(values.get(model) or "-" for model in models)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def to_csv(self, path: Path) -> None:
        """Write a line for each number.

        Raises:
            UserError: If the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["model", "quantity", "condition", "value", "num_samples"])
                for one in self.numbers:
                    value = "" if math.isnan(one.value) else one.value
                    writer.writerow([one.model, one.quantity, one.condition, value, one.num_samples])
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from error


@dataclass
class _Tally:
    """Values by (quantity, condition), in the order in which they first came, and how to summarise them."""

    values: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, quantity: str, condition: str, value: float, weight: float = 1.0) -> None:
        self.values.setdefault((quantity, condition), []).append((value, weight))

    def numbers(self, model: str) -> list[Number]:
        found = []
        for (quantity, condition), pairs in self.values.items():
            values, weights = np.array(pairs, np.float64).T
            if quantity == "keypoints a slice":
                for name, summary in (("minimum", np.min), ("median", np.median), ("maximum", np.max)):
                    found.append(Number(model, quantity, name, float(summary(values)), len(values)))
                continue
            total = weights.sum()
            counted = weights > 0
            mean = float((values[counted] * weights[counted]).sum() / total) if total > 0 else math.nan
            found.append(Number(model, quantity, condition, mean, int(np.count_nonzero(weights))))
        return found


def explore_report(
    explorers: Mapping[str, Explorer],
    volumes: Iterable[Volume | Unreadable],
    *,
    labels_of: LabelsOf | None = None,
    radii: Sequence[float] = RADII,
    slices_per_volume: int = 3,
    num_points: int = 16,
    seed: int = 0,
    cache: KeypointCache | None = None,
) -> Generator[Progress, None, ExploreReport]:
    """Measure networks on the slices of volumes.

    - *keypoints a slice*: of all slices, as the network's settings detect them.
    - *share on foreground*: of the keypoints, those whose voxel is labelled, and beside it the share of the
      image that is labelled; over the slices with labels.
    - *matched share*: keypoints of neighbouring slices with a heuristic correspondence, 2 P / (N + M), for
      each radius.
    - *precision* and *recall* against a known transform: a slice and its augmented self, with keypoints
      detected on each. A match is right if the transform carries its first keypoint to within 3 pixels of
      its second; recall is over the keypoints that have such a partner. By descriptor (the mutually nearest),
      by feature (the mutually nearest concatenated U^l, or features at the keypoints for a network without
      KAF layers), and by the trained matcher.
    - *equivariance error*, and the same as a part of chance: see `equivariance.EquivarianceError`.

    The last two are measured on some slices of each volume, evenly spread and never the first or last where
    there are enough.

    Args:
        explorers: Networks by what to call them.
        volumes: Volumes; what cannot be read is named and passed over.
        labels_of: Labels of a volume, (Z, Y, X), or None where it has none.
        radii: Manhattan radii in pixels.
        slices_per_volume: Slices of each volume on which transforms are measured.
        num_points: Random points on each of these slices.
        seed: Of transforms and points.
        cache: Keypoints found before.

    Yields:
        One report a volume.

    Raises:
        UserError: If no volume can be read or no slice has keypoints.
    """
    tallies = {name: _Tally() for name in explorers}
    detected: dict[tuple[SliceConfig, KeypointConfig], str] = {}
    notices = [f"{name}: {explorer.note}" for name, explorer in explorers.items()]
    passed_over: list[str] = []
    num_volumes = num_labelled = 0
    total = len(volumes) if isinstance(volumes, Sized) else None
    for number, volume in enumerate(volumes, start=1):
        if isinstance(volume, Unreadable):
            passed_over.append(f"passed over {volume.path.name}: {volume.reason}")
            yield Progress("measuring volumes", number, total, message=passed_over[-1])
            continue
        labels = None
        try:
            labels = labels_of(volume) if labels_of else None
        except VolumeError as problem:
            notices.append(f"measured without labels: {problem}")
            yield Progress("measuring volumes", number, total, message=notices[-1])
        num_volumes += 1
        num_labelled += labels is not None
        for name, explorer in explorers.items():
            view = VolumeView(explorer, volume, cache=cache)
            detection = explorer.slices, explorer.keypoints
            if detected.setdefault(detection, name) == name:  # what no network changes is measured once
                _count_keypoints(tallies[name], view, labels)
                _match_neighbours(tallies[name], view, radii)
            for z in spread(view.num_slices, slices_per_volume):
                _match_known(tallies[name], view, z, seed)
                for error in equivariance_errors(view, z, num_points=num_points, seed=seed):
                    level = f"level {error.level}"
                    tallies[name].add("equivariance error", level, error.error, error.num_points)
                    tallies[name].add("equivariance error / chance", level, error.relative, error.num_points)
            yield Progress("measuring volumes", number, total)
    if not num_volumes:
        raise UserError(f"no volume can be read: {passed_over[0] if passed_over else 'there was none'}")
    numbers: list[Number] = []
    for name, explorer in explorers.items():
        first = detected[explorer.slices, explorer.keypoints]
        if first != name:
            numbers += [
                replace(one, model=name)
                for one in numbers
                if one.model == first and one.quantity in _OF_DETECTION
            ]
        numbers += tallies[name].numbers(name)
    if all(one.value == 0 for one in numbers if one.condition == "maximum"):
        raise UserError(
            "no slice has a keypoint; a lower keypoints.contrast_threshold finds more, or the volumes are empty"
        )
    notices.append(f"{num_volumes} volumes, {num_labelled} of them with labels")
    return ExploreReport(tuple(numbers), (*notices, *passed_over))


def spread(num_slices: int, count: int) -> list[int]:
    """Some slices of a stack, evenly spread, without its ends where there are enough."""
    inner = np.linspace(0, num_slices - 1, min(count, num_slices) + 2)[1:-1]
    return sorted({round(float(z)) for z in inner})


def _count_keypoints(tally: _Tally, view: VolumeView, labels: NDArray[np.integer] | None) -> None:
    resampled = None
    if labels is not None:
        resampled = Slices(view.volume, view.explorer.slices).labels(labels, range(view.num_slices)) != 0
    for z in range(view.num_slices):
        keypoints = view.keypoints(z)
        tally.add("keypoints a slice", "", len(keypoints))
        if resampled is not None and resampled[z].any():
            cells = np.rint(keypoints.positions).astype(int).clip(0, np.array(view.shape) - 1)
            share = float(resampled[z][cells[:, 0], cells[:, 1]].mean()) if len(cells) else math.nan
            tally.add("share on foreground", "keypoints", share, len(keypoints))
            tally.add("share on foreground", "pixels", float(resampled[z].mean()))


def _match_neighbours(tally: _Tally, view: VolumeView, radii: Sequence[float]) -> None:
    for z in range(view.num_slices - 1):
        keypoints0, keypoints1 = view.keypoints(z), view.keypoints(z + 1)
        both = len(keypoints0) + len(keypoints1)
        for radius in radii:
            found = find_correspondences(keypoints0, keypoints1, CorrespondenceConfig(radius=radius))
            share = 2 * len(found) / both if both else math.nan
            tally.add("matched share", f"radius {radius:g}", share, float(both > 0))


def _match_known(tally: _Tally, view: VolumeView, z: int, seed: int) -> None:
    """Match a slice with its augmented self by every means there is, against the known transform."""
    explorer = view.explorer
    detector = make_detector(explorer.keypoints)
    for number in range(NUM_VIEWS):
        augmented = augment_slice(view, z, seed=seed * NUM_VIEWS + number)
        keypoints0 = view.keypoints(z)
        keypoints1 = detector.detect(augmented.image)
        inside = augmented.inside[tuple(np.rint(keypoints1.positions).astype(int).T)]
        keypoints1 = keypoints1.select(inside)  # not those along the edge of what is shown
        if not (len(keypoints0) and len(keypoints1)):
            continue
        carried, there = augmented.carry_points(keypoints0.positions)
        right = np.linalg.norm(carried[:, None] - keypoints1.positions, axis=-1) <= TOLERANCE
        right &= there[:, None]
        features0 = view.features(z)
        features1 = SliceFeatures.compute(explorer, augmented.inputs, keypoints1.positions)
        found = {
            "by descriptor": nearest_pairs(_unit(keypoints0.descriptors), _unit(keypoints1.descriptors)),
            "by feature": nearest_pairs(keypoint_codes(features0), keypoint_codes(features1)),
        }
        if explorer.matching is not None:
            found["by matcher"] = match_features(explorer, features0, features1).pairs
        possible = int(right.any(axis=1).sum())
        for method, pairs in found.items():
            hits = right[pairs[:, 0], pairs[:, 1]].sum()
            tally.add("precision", method, hits / max(len(pairs), 1), len(pairs))
            tally.add("recall", method, hits / max(possible, 1), possible)


def keypoint_codes(features: SliceFeatures) -> torch.Tensor:
    """Unit vectors of keypoints: U^l of all levels concatenated, else the features of all levels there.

    Shape: (N, C).
    """
    parts = list(features.keypoint_features.values()) or [
        features.at(features.keypoints, level) for level in LEVELS
    ]
    return torch.nn.functional.normalize(torch.cat(parts, dim=1), dim=1)


def nearest_pairs(codes0: torch.Tensor, codes1: torch.Tensor) -> NDArray[np.int64]:
    """Pairs that are each other's most similar. Shape: (N, C), (M, C) -> (P, 2)."""
    if not (len(codes0) and len(codes1)):
        return np.zeros((0, 2), np.int64)
    similarity = codes0 @ codes1.T
    partner = similarity.argmax(1)
    own = torch.arange(len(codes0), device=partner.device)
    mutual = similarity.argmax(0)[partner] == own
    pairs: NDArray[np.int64] = torch.stack([own[mutual], partner[mutual]], dim=1).cpu().numpy()
    return pairs


def _unit(descriptors: NDArray[np.floating]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(descriptors), dim=1)
