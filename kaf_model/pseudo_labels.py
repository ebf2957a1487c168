"""Self-training: slices that nobody labelled, labelled by the running average of the model in training.

Round after round the averaged model predicts some unlabelled slices as they are; where it is sure, its
prediction is what the model then learns from the same slices strongly augmented (weak to strong: Sohn et al.,
FixMatch, NeurIPS 2020; averaged teacher: Tarvainen and Valpola, NeurIPS 2017). Between rounds the labels
stay, so that a step costs no more than any other. What a person painted is never overruled.

Where several volumes are labelled throughout and fit each other, they are registered to unlabelled ones instead
(`atlases.py`): those labels are there before the first step, and stay.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaf_model.anatomy import keep_largest_components, keep_together
from kaf_model.atlases import Atlases
from kaf_model.config import KeypointConfig, PseudoLabelConfig, SliceConfig
from kaf_model.engine import generator_for
from kaf_model.inference import InferenceNetwork
from kaf_model.keypoints import KeypointCache, make_detector
from kaf_model.labels import ClassMap, LabelledVolume, SliceStatus
from kaf_model.losses import IGNORED
from kaf_model.prediction import predict_slices
from kaf_model.preparation import (
    LabelledSlice,
    PreparedVolume,
    SliceStore,
    prepare_slices,
)
from kaf_model.progress import Progress, reported
from kaf_model.propagation import Propagation, propagate
from kaf_model.segment import in_batches, slices_at_once
from kaf_model.slices import Slices
from kaf_model.volume import Unreadable, Volume, scan_volumes
from kaf_model.volume_queue import VolumeFiles

USES = 5
"""How often a pseudo-labelled slice is learnt from, on average, before it is labelled anew; or more often."""


@dataclass(frozen=True)
class UnlabelledVolume:
    """A volume with slices to label.

    Attributes:
        prepared: Its slices, labelled ones among them.
        known: (Z, H, W) channels that a person painted, IGNORED elsewhere; None where nobody painted.
        free: Rows of `prepared` that may be learnt from with predicted labels.
        indices: Slice of the volume of each row.
        propagation: What its finished slices say of the others; None where there are none.
    """

    prepared: PreparedVolume
    known: NDArray[np.int64] | None
    free: tuple[int, ...]
    indices: tuple[int, ...]
    propagation: Propagation | None = None


def prepare_unlabelled(
    cases: Sequence[LabelledVolume],
    volumes: Collection[Volume | Unreadable | str | Path] | VolumeFiles,
    classes: ClassMap,
    slices: SliceConfig,
    keypoints: KeypointConfig | None,
    config: PseudoLabelConfig,
    *,
    propagations: Sequence[Propagation] = (),
    cache: KeypointCache | None = None,
) -> Generator[Progress, None, list[UnlabelledVolume]]:
    """Prepare what is unlabelled: the other slices of labelled volumes, and volumes without labels.

    Of a volume with more than `config.slices` slices an even selection is taken.

    Args:
        cases: Labelled volumes; unmarked and partial slices are used.
        volumes: Volumes without labels, read one at a time; the first `config.volumes` of them are used. Those
            of the cases may be among them and are passed over: their slices are used with what is known of them.
        classes: Channels of the labels.
        slices: Preprocessing.
        keypoints: Detection; None looks for none.
        config: How many.
        propagations: What was carried before from the finished slices of some of the cases.
        cache: Keypoints found before.

    Yields:
        Progress in volumes.

    Returns:
        Volumes with at least one slice to label.
    """
    store, detector = SliceStore(), make_detector(keypoints) if keypoints else None
    pool: list[UnlabelledVolume] = []
    for number, case in enumerate(cases):
        free = [z for z in range(case.volume.num_slices) if _is_free(case, z)]
        if not free:
            continue
        wanted = sorted({*_evenly(free, config.slices), *case.statuses})
        work = prepare_slices(case.volume, slices, detector, store=store, cache=cache, indices=wanted)
        prepared = yield from reported(work, Progress("preparing", number, len(cases)))
        values = Slices(case.volume, slices).labels(case.labels, wanted)
        known = np.full(values.shape, IGNORED, np.int64)
        for row, z in enumerate(wanted):
            if z in case.statuses:
                where = f"slice {z} of {case.volume.name}"
                known[row] = classes.channels(values[row], case.statuses[z], where)
        rows = tuple(row for row, z in enumerate(wanted) if _is_free(case, z))
        carried = None
        if config.propagation:
            made = (found for found in propagations if found.fits(case, classes.values, slices))
            carried = next(made, None) or (yield from propagate(case, classes.values.tolist(), slices))
        pool.append(UnlabelledVolume(prepared, known, rows, tuple(wanted), carried))
    for number, volume in enumerate(itertools.islice(_others(volumes, cases), config.volumes), len(cases)):
        if isinstance(volume, Unreadable):
            told = f"passed over {volume.path.name}: {volume.reason}"
            yield Progress("preparing", number + 1, None, message=told)
            continue
        wanted = _evenly(range(volume.num_slices), config.slices)
        work = prepare_slices(volume, slices, detector, store=store, cache=cache, indices=wanted)
        prepared = yield from reported(work, Progress("preparing", number, None))
        pool.append(UnlabelledVolume(prepared, None, tuple(range(len(wanted))), tuple(wanted)))
    return pool


class PseudoLabels:
    """The pseudo-labelled slices of a training, renewed now and then.

    Attributes:
        slices: What to learn from at present; empty before the first round, unless there is something registered.
        round: Rounds done.
        agreement: Dice of labelled volumes that were registered to each other, if others are labelled so; else None.
        num_free: Slices that may be labelled.

    Args:
        pool: What there is to label.
        classes: Channels.
        config: When, how many, how sure.
        one_piece: Label values of which only the largest piece of a prediction is believed.
        together: Label values of which only what is in one piece with most of the others is believed; the rest is
            taken for background.
        labelled: (H, W) channels of the labelled slices, or IGNORED.
        seed: Of the choice of volumes.
    """

    def __init__(
        self,
        pool: Sequence[UnlabelledVolume],
        classes: ClassMap,
        config: PseudoLabelConfig,
        *,
        one_piece: frozenset[int],
        together: frozenset[int] = frozenset(),
        labelled: Sequence[NDArray[np.int64]] = (),
        seed: int,
    ) -> None:
        self.config = config
        complete = [channels for channels in labelled if (channels != IGNORED).all()]
        self._least_found = config.least_found * _sizes(complete, len(classes))
        self.slices: list[LabelledSlice] = []
        self.round = 0
        self._due = config.start
        enough = sum(len(volume.free) for volume in pool) >= config.least_slices
        self._pool = [volume for volume in pool if enough or volume.propagation is not None]
        self.num_free = sum(len(volume.free) for volume in self._pool)
        channels = {int(value): channel for channel, value in enumerate(classes.values)}
        self._one_piece = [channels[value] for value in sorted(one_piece)]
        self._together = [channels[value] for value in sorted(together)]
        self._seed = seed
        self._at_once: int | None = None
        self._labels: dict[int, NDArray[np.int16]] = {}
        self.agreement: float | None = None
        self._registered: dict[int, NDArray[np.int16]] = {}
        self._reached: frozenset[int] = frozenset()

    def register(self, atlases: Atlases) -> Generator[Progress, None, None]:
        """Label volumes by registration, for good; the model is then not asked about those that can be reached so.

        Can be closed at any yield, and keeps what it has done.

        Args:
            atlases: Volumes that are labelled throughout.

        Yields:
            Progress, first in registrations of the atlases to each other, then in volumes.
        """
        others = [(index, volume) for index, volume in enumerate(self._pool) if volume.known is None]
        reached = [i for i, volume in others if atlases.can_reach(volume.prepared, volume.indices)]
        if len(atlases) < 2 or not reached or not self.config.registered:
            return
        agreement = yield from atlases.agreement(self.config.least_agreement, "label others by them")
        if agreement is None:
            return
        order = torch.randperm(len(reached), generator=generator_for(self._seed, 8)).tolist()
        chosen = [reached[place] for place in order[: self.config.registered]]
        for done, index in enumerate(chosen):
            volume = self._pool[index]
            work = atlases.carry(volume.prepared, volume.indices)
            found = yield from reported(work, Progress("labelling by registration", done, len(chosen)))
            if found is not None:
                self.agreement, self._reached = agreement, frozenset(reached)
                self._registered[index] = found.channels()
                self._gather()
        yield Progress("labelling by registration", len(chosen), len(chosen))

    def is_due(self, fraction: float, dice: float) -> bool:
        """Whether the next round is due.

        Args:
            fraction: Part 0..1 of the training that is over.
            dice: Soft Dice on what was learnt from lately; a model that is not good on that labels nothing.
        """
        good = bool(self.round) or dice >= self.config.least_dice
        return len(self._pool) > len(self._reached) and good and self._due <= fraction < 1

    def renew(
        self, network: InferenceNetwork, device: torch.device, fraction: float, drawn: float = math.inf
    ) -> Generator[tuple[int, int], None, None]:
        """Predict the labels of some volumes, drawn anew in each round.

        Args:
            network: The averaged model, on `device`.
            device: Where it is.
            fraction: Part 0..1 of the training that is over.
            drawn: Pseudo-labelled slices that will be learnt from before the next round; as many are labelled
                that each is learnt from a few times, so that labelling takes little of a short training.

        Yields:
            Slices predicted, and how many there will be.

        Raises:
            OutOfMemory: If not even one slice fits the device; before, fewer are predicted at a time.
        """
        order = torch.randperm(len(self._pool), generator=generator_for(self._seed, self.round, 7)).tolist()
        order = [index for index in order if index not in self._reached]
        free = np.cumsum([len(self._pool[index].free) for index in order])
        wanted = min(self.config.slices, drawn / USES)
        chosen = order[: int(np.searchsorted(free, wanted)) + 1]
        total = sum(len(self._pool[index].prepared) for index in chosen)
        labels: dict[int, NDArray[np.int16]] = {}
        done = 0
        for index in chosen:
            prepared = self._pool[index].prepared
            parts: list[tuple[NDArray[np.int16], NDArray[np.bool_]]] = []
            at_once = self._at_once or slices_at_once(device)
            work = partial(self._predict, self._pool[index], network=network, device=device)
            for batch, part, size in in_batches(len(prepared), at_once, work):
                self._at_once = size
                parts.append(part)
                done += batch.stop - batch.start
                yield done, total
            channels, sure = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            found = self._settle(self._pool[index], channels, sure)
            if self._believed(self._pool[index], found):
                labels[index] = found
        self._take(labels)
        self.round += 1
        while self._due <= fraction:
            self._due += self.config.every

    def state(self) -> dict[str, Tensor]:
        """Tensors that `load` takes back."""
        known = {**self._labels, **self._registered}
        tensors = {f"pseudo.{index}": torch.from_numpy(labels) for index, labels in known.items()}
        tensors["pseudo.round"] = torch.tensor(self.round)
        tensors["pseudo.due"] = torch.tensor(self._due, dtype=torch.float64)
        if self.agreement is not None:
            tensors["pseudo.agreement"] = torch.tensor(self.agreement, dtype=torch.float64)
            tensors["pseudo.reached"] = torch.tensor(sorted(self._reached))
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `state` gave; other tensors are passed over."""
        own = {name[7:]: value for name, value in tensors.items() if name.startswith("pseudo.")}
        self.round, self._due = int(own.pop("round")), float(own.pop("due"))
        if "agreement" in own:
            self.agreement = float(own.pop("agreement"))
            self._reached = frozenset(own.pop("reached").tolist())
        labels = {int(index): value.short().numpy() for index, value in own.items()}
        self._registered = {index: labels.pop(index) for index in self._reached.intersection(labels)}
        self._take(labels)

    def _predict(
        self, volume: UnlabelledVolume, rows: slice, network: InferenceNetwork, device: torch.device
    ) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
        """Channels (n, H, W), and where the model is sure of them."""
        prepared = volume.prepared
        images = np.asarray(prepared.images[rows], dtype=np.float32)
        positions = [found.positions for found in prepared.keypoints[rows]]
        probabilities = predict_slices(network, images, positions, device)
        if volume.propagation is not None:
            probabilities = volume.propagation.fused(
                probabilities, volume.indices[rows], self.config.propagation
            )
        confidence, channels = probabilities.max(1)
        sure = confidence >= self.config.confidence
        return channels.to(torch.int16).cpu().numpy(), sure.cpu().numpy()

    def _settle(
        self, volume: UnlabelledVolume, labels: NDArray[np.int16], sure: NDArray[np.bool_]
    ) -> NDArray[np.int16]:
        """Put in what a person painted, and leave out what lies apart from its structure, or is unsure."""
        if volume.known is not None:
            labels = np.where(volume.known == IGNORED, labels, volume.known).astype(np.int16)
            sure = sure | (volume.known != IGNORED)
        keep_together(labels, self._together)
        keep_largest_components(labels, self._one_piece, fill=IGNORED)
        settled: NDArray[np.int16] = np.where(sure, labels, np.int16(IGNORED))
        return settled

    def _believed(self, volume: UnlabelledVolume, labels: NDArray[np.int16]) -> bool:
        """Whether enough was found of each structure; always where a person finished slices of the volume."""
        if volume.propagation is not None:
            return True
        return bool((_sizes(labels, len(self._least_found)) >= self._least_found).all())

    def _take(self, labels: dict[int, NDArray[np.int16]]) -> None:
        self._labels = labels
        self._gather()

    def _gather(self) -> None:
        self.slices = []
        for index, found in sorted({**self._labels, **self._registered}.items()):
            volume = self._pool[index]
            for row in volume.free:
                channels = found[row].astype(np.int64)
                if volume.known is not None:
                    channels = np.where(volume.known[row] == IGNORED, channels, volume.known[row])
                if (channels != IGNORED).any():
                    prepared = volume.prepared
                    self.slices.append(
                        LabelledSlice(prepared.images[row], prepared.keypoints[row].positions, channels)
                    )


def _sizes(
    slices: Sequence[NDArray[np.integer]] | NDArray[np.integer], num_channels: int
) -> NDArray[np.float64]:
    """Mean pixels a slice of each channel, that of the background as 0; zeros without slices."""
    counts = [np.bincount(channels[channels > 0], minlength=num_channels) for channels in slices]
    return np.mean(counts, axis=0) if counts else np.zeros(num_channels)


def _others(
    volumes: Iterable[Volume | Unreadable | str | Path], cases: Sequence[LabelledVolume]
) -> Iterator[Volume | Unreadable]:
    """The volumes, without those of the cases."""
    own = {_identity(case.volume) for case in cases}
    for item in volumes:
        for volume in [item] if isinstance(item, (Volume, Unreadable)) else scan_volumes([item]):
            if isinstance(volume, Unreadable) or _identity(volume) not in own:
                yield volume


def _identity(volume: Volume) -> tuple[object, int]:
    """Tells volumes apart: by file and frame, and those that are in memory alone by their array."""
    source = volume.source
    return (id(volume.array) if source.format == "array" else source.path.resolve()), source.frame


def _is_free(case: LabelledVolume, z: int) -> bool:
    """Whether a slice has pixels of which nothing is known."""
    return case.statuses.get(z, SliceStatus.PARTIAL) is SliceStatus.PARTIAL


def _evenly(items: Sequence[int], most: int) -> list[int]:
    if len(items) <= most:
        return list(items)
    return [items[place] for place in np.linspace(0, len(items) - 1, most).round().astype(int)]
