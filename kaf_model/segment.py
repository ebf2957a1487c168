"""Segmenting whole volumes with a trained model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaf_model.anatomy import keep_largest_components, keep_together
from kaf_model.atlases import AtlasLabels
from kaf_model.checkpoint import Model
from kaf_model.config import SegmentConfig
from kaf_model.engine import OutOfMemory, is_out_of_memory, release_memory
from kaf_model.inference import InferenceNetwork
from kaf_model.keypoints import KeypointCache, iter_detect, make_detector
from kaf_model.prediction import angles_at, best_angle, predict_slices, sampled
from kaf_model.progress import Progress, finished
from kaf_model.propagation import Propagation
from kaf_model.slices import Slices, likeliest, middle_slice
from kaf_model.temporary_arrays import zeros_on_disk
from kaf_model.volume import Volume
from kaf_model.volume_write import smallest_type

Result = TypeVar("Result")


@dataclass(frozen=True)
class Segmentation:
    """A segmented volume.

    Attributes:
        labels: (Z, Y, X) label values on the volume's grid.
        probabilities: (K, Z, Y, X) float16 in channel order, if asked for; beyond a size a memory map.
        uncertainty: (Z, Y, X) float16 entropy of the class probabilities in 0..1, if asked for.
    """

    labels: NDArray[np.integer]
    probabilities: NDArray[np.float16] | None = None
    uncertainty: NDArray[np.float16] | None = None


def segment(
    model: Model,
    volume: Volume,
    config: SegmentConfig | None = None,
    *,
    slices: Sequence[int] | None = None,
    propagation: Propagation | None = None,
    atlas_labels: AtlasLabels | None = None,
    cache: KeypointCache | None = None,
) -> Generator[Progress, None, Segmentation]:
    """Segment a volume slice by slice; memory beyond the result does not grow with the number of slices.

    Args:
        model: A trained model.
        volume: The volume.
        config: What to return and how.
        slices: Segment only these, without cleaning; the others stay background.
        propagation: What finished slices of this volume say of the others, for the model's classes. Their own
            labels come back as they are.
        atlas_labels: What labelled volumes say of this one, which were registered to it, for the model's classes.
        cache: Keypoints found before.

    Yields:
        Progress in slices, one report a batch.

    Returns:
        Labels and what else was asked for, on the volume's grid.

    Raises:
        OutOfMemory: If not even one slice fits the device; before, batches are made smaller.
    """
    config = config or SegmentConfig()
    if slices is not None or propagation is not None:
        config = config.override(orientation="fixed")  # for a look at some, or as the model has learnt them
    stack = Slices(volume, model.slices)
    wanted = list(range(volume.num_slices)) if slices is None else sorted(set(slices))
    values = np.array([label.value for label in model.classes])
    labels = np.zeros(volume.shape, smallest_type(int(values.min()), int(values.max())))
    store = _MapStore()
    probabilities = store.empty((len(values), *volume.shape)) if config.probabilities else None
    uncertainty = store.empty(volume.shape) if config.uncertainty else None
    network = _Network(model, stack, config, cache)
    known = config.orientation == "fixed" or atlas_labels is not None  # which fit as the slices lie
    angle = 0.0 if known else (yield from network.best_angle(wanted))
    done = 0
    angles = angles_at(angle, config.orientation)
    for rows, maps, message in network.maps(wanted, angles, propagation, atlas_labels):
        channels = likeliest(maps)
        labels[rows] = values.astype(labels.dtype)[channels]
        if probabilities is not None:
            probabilities[:, rows] = maps.transpose(0, 1).half().cpu().numpy()
        if uncertainty is not None:
            entropy = torch.special.entr(maps).sum(1) / np.log(len(values))
            uncertainty[rows] = entropy.clamp(0, 1).half().cpu().numpy()
        done += len(rows)
        yield Progress("segmenting", done, len(wanted), message=message)
    if slices is None and config.largest_component != "none":
        learned = None
        if config.largest_component == "learned":
            learned = [label.value for label in model.classes if label.one_piece]
            keep_together(labels, [label.value for label in model.classes if label.together])
        keep_largest_components(labels, learned)
    if propagation is not None:
        propagation.case.put_back(labels, propagation.values, wanted)
    release_memory()
    return Segmentation(labels, probabilities, uncertainty)


class _Network:
    """A trained network, and the slices of the volume that it is asked about."""

    def __init__(
        self, model: Model, stack: Slices, config: SegmentConfig, cache: KeypointCache | None
    ) -> None:
        self._network = InferenceNetwork(model.network)
        self._detector = make_detector(model.keypoints) if model.config.reads_keypoints else None
        self._device = model.device
        self._stack = stack
        self._config = config
        self._cache = cache
        self._at_once = config.batch_size or slices_at_once(model.device)

    def best_angle(self, wanted: Sequence[int]) -> Generator[Progress, None, float]:
        """Look on a few of some slices for the angle at which the network contradicts itself least."""
        images, positions = self._read([wanted[place] for place in sampled(len(wanted))])

        def predict(angle: float) -> Iterator[Tensor]:
            parts = in_batches(
                len(images),
                self._at_once,
                lambda batch: predict_slices(
                    self._network, images[batch], positions[batch], self._device, angles=[angle]
                ),
            )
            return (maps for _batch, maps, _size in parts)

        work = best_angle(predict)
        while True:
            try:
                tried, total = next(work)
            except StopIteration as done:
                angle: float = done.value
                return angle
            yield Progress("finding how it lies", tried, total)

    def maps(
        self,
        wanted: Sequence[int],
        angles: Sequence[float],
        propagation: Propagation | None,
        atlas_labels: AtlasLabels | None,
    ) -> Iterator[tuple[list[int], Tensor, str]]:
        """Slices, their probabilities (n, K, Y, X) on the source grid, and what is to be told, batch after batch."""
        told = self._at_once

        def predicted(batch: slice) -> tuple[list[int], Tensor]:
            rows = list(wanted[batch])
            images, positions = self._read(rows)
            maps = predict_slices(
                self._network, images, positions, self._device, flips=self._config.flips, angles=angles
            )
            if propagation is not None and self._config.propagation:
                maps = propagation.fused(maps, rows, self._config.propagation)
            if atlas_labels is not None and self._config.registration:
                maps = atlas_labels.fused(maps, rows, self._config.registration)
            return rows, self._stack.to_source(maps)

        for _batch, (rows, maps), size in in_batches(len(wanted), told, predicted):
            message = f"memory ran out: slices are now segmented {size} at a time" if size < told else ""
            told = size
            yield rows, maps, message

    def _read(self, rows: Sequence[int]) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """What the network reads (n, S, H, W), and the positions of the slices' keypoints if it reads any."""
        images = self._stack.inputs(rows)
        if self._detector is None:
            return images, [np.zeros((0, 2), np.float32)] * len(rows)
        return images, [
            found.positions for found in iter_detect(middle_slice(images), self._detector, cache=self._cache)
        ]


def slices_at_once(device: torch.device) -> int:
    """How many slices a network is given at once where nobody says it.

    On CPUs larger batches leave the cache; GPUs wait for Python with smaller ones.
    """
    return 64 if device.type == "cuda" else 8


def in_batches(count: int, size: int, work: Callable[[slice], Result]) -> Iterator[tuple[slice, Result, int]]:
    """Do work on slices in batches, and in smaller ones once memory runs out.

    Args:
        count: Slices.
        size: Slices a batch, at first.
        work: What is done with a batch of them.

    Yields:
        A batch, what came of it, and how large batches are by then.

    Raises:
        OutOfMemory: If not even one slice fits the device.
    """
    start = 0
    while start < count:
        batch = slice(start, min(start + size, count))
        try:
            result = work(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise OutOfMemory(
                    "a single slice does not fit the memory of the device; use the device cpu"
                ) from error
            size //= 2
            release_memory()
            continue
        yield batch, result, size
        start = batch.stop


def segment_volume(model: Model, volume: Volume, config: SegmentConfig | None = None) -> NDArray[np.integer]:
    """Segment a volume in one call.

    Returns:
        (Z, Y, X) label values on the volume's own grid.
    """
    return finished(segment(model, volume, config)).labels


class _MapStore:
    """Room for maps of a whole volume: memory while they are small, else temporary files."""

    limit = 2**30

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.float16]:
        if 2 * int(np.prod(shape)) <= self.limit:
            return np.zeros(shape, np.float16)
        return zeros_on_disk(shape, "maps")
