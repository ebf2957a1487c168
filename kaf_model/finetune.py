"""Training a segmentation network on a few labelled slices."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from kaf_model.anatomy import values_in_one_piece, values_together
from kaf_model.atlases import Atlases
from kaf_model.averaging import WeightAverage
from kaf_model.checkpoint import (
    Checkpoint,
    CheckpointError,
    LoadReport,
    Model,
    load_checkpoint,
    load_matching,
    now,
    save_checkpoint,
)
from kaf_model.config import FinetuneConfig, KeypointConfig, ModelConfig, SliceConfig
from kaf_model.curve import thinned
from kaf_model.datasets import LabelledBatch, LabelledSlices, Shard, concatenate
from kaf_model.engine import (
    Trainer,
    channels_last,
    generator_for,
    is_out_of_memory,
    make_fabric,
    release_memory,
)
from kaf_model.errors import UserError
from kaf_model.inference import InferenceNetwork
from kaf_model.keypoints import KeypointCache
from kaf_model.labels import ClassMap, LabelledVolume, check_learnable, painted_values
from kaf_model.losses import IGNORED, cross_entropy, soft_dice
from kaf_model.preparation import LabelledSlice, prepare_labelled, statistics_of
from kaf_model.progress import Progress
from kaf_model.propagation import Propagation
from kaf_model.pseudo_labels import PseudoLabels, UnlabelledVolume, prepare_unlabelled
from kaf_model.slices import with_context
from kaf_model.training_files import RunFiles
from kaf_model.unet import SegmentationNetwork, build_network
from kaf_model.volume import Unreadable, Volume
from kaf_model.volume_queue import VolumeFiles

_RECENT = 50  # steps

_REGISTRATION_SHARE = 0.3  # of a time budget; then the volumes that are labelled have to do


class FinetuningNetwork(nn.Module):
    """The segmentation network with its loss; maps a labelled batch to named losses."""

    def __init__(self, network: SegmentationNetwork, config: FinetuneConfig) -> None:
        super().__init__()
        self.network = network
        self.with_dice = config.loss == "dice+cross-entropy"
        self.same_operations = network.encoder.same_operations

    def forward(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """{"total", "cross-entropy"} and, if it is part of the loss, {"dice"}."""
        views = batch.views
        logits = self.network(views.images, views.keypoints, views.valid)
        losses = {"cross-entropy": cross_entropy(logits, batch.labels)}
        if self.with_dice:
            losses["dice"] = soft_dice(logits, batch.labels)
        return {"total": torch.stack(list(losses.values())).sum(), **losses}


@dataclass(frozen=True)
class FinetuneResult:
    """What a finetuning returns.

    Attributes:
        model: Ready to segment.
        path: Where it was written, if anywhere.
        start: What was taken over from the start, or None.
        curve: Losses of each step, and the Dice on held-out slices where it was measured.
    """

    model: Model
    path: Path | None
    start: LoadReport | None
    curve: list[dict[str, float]]


def finetune(
    config: ModelConfig | None,
    cases: Sequence[LabelledVolume],
    training: FinetuneConfig | None = None,
    *,
    start: str | Path | Checkpoint | None = None,
    unlabelled: Collection[Volume | Unreadable | str | Path] | VolumeFiles = (),
    propagations: Sequence[Propagation] = (),
    class_names: Mapping[int, str] | None = None,
    slices: SliceConfig | None = None,
    keypoints: KeypointConfig | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    fabric: Fabric | None = None,
    cache: KeypointCache | None = None,
) -> Generator[Progress, None, FinetuneResult]:
    """Train on labelled slices, and on others with the labels that the model itself is sure of.

    Can be closed at any yield: with `output`, once a step is done, a usable checkpoint and what is needed to
    resume are then written.

    Args:
        config: Architecture; None takes that of `start`. `num_classes` is set from the labels.
        cases: Volumes with labels on some of their slices.
        training: Loss, budgets and optimiser.
        start: A pretrained or finetuned checkpoint; None starts from random weights. A pretrained one
            gives its encoder and what it has of a decoder, a finetuned one with the same classes everything.
            Its preprocessing is kept.
        unlabelled: Volumes without labels, for `training.pseudo_labels`; those that cannot be read are named
            and passed over, those of `cases` are left out. The unlabelled slices of `cases` are used as well.
        propagations: What was carried before from the finished slices of some of the cases; the others are done
            here if `training.pseudo_labels` needs them.
        class_names: Names by label value, of all classes there are. None takes those of a finetuned start if
            it knows every painted value, else the painted values.
        slices: Preprocessing; only without a start.
        keypoints: Detection; only without a start.
        output: Checkpoint file to write.
        resume: Go on from an interrupted training with the same `output`.
        device: "auto", "cpu", "cuda" or "mps".
        fabric: Use this set-up instead of one made for `device`.
        cache: Keypoints found before.

    Yields:
        Progress with losses; "held-out dice" is there when `training.holdout` is set.

    Returns:
        The trained model: the running average of the weights, or, with held-out slices, the weights that
        were best on them.

    Raises:
        UserError: If the labels cannot be learnt from, or start and settings do not fit.
        NonFiniteLoss: If a loss becomes NaN; the last good weights are written first.
    """
    training = training or FinetuneConfig()
    files = RunFiles(output)
    files.check(resume)
    origin = load_checkpoint(start) if isinstance(start, (str, Path)) else start
    config, slices, keypoints = _settings(config, slices, keypoints, origin)
    classes = ClassMap.of_labels(cases, class_names or _names_of(origin, cases))
    if origin is None:
        num_labelled = sum(len(case.statuses) for case in cases)
        slices = with_context(slices, [case.volume for case in cases], num_labelled)
    config = config.override(num_classes=len(classes), input_slices=slices.input_slices)
    fabric = fabric or make_fabric(device)
    looked_for = keypoints if config.reads_keypoints else None
    prepared, labelled = yield from prepare_labelled(cases, classes, slices, looked_for, cache=cache)
    names = [f"{c.volume.name}:{z}:{status}" for c in cases for z, status in sorted(c.statuses.items())]
    check_learnable([item.labels for item in labelled], classes)
    held = _held_out(labelled, classes, training)
    learnt = [item for index, item in enumerate(labelled) if index not in held]
    held_out = [labelled[index] for index in sorted(held)]
    check_learnable([item.labels for item in learnt], classes)
    pool: list[UnlabelledVolume] = []
    if _num_pseudo(training):
        pool = yield from prepare_unlabelled(
            _without(cases, held),
            unlabelled,
            classes,
            slices,
            looked_for,
            training.pseudo_labels,
            propagations=propagations,
            cache=cache,
        )
    one_piece = values_in_one_piece(cases)
    together = values_together(cases, one_piece)
    pseudo = PseudoLabels(
        pool,
        classes,
        training.pseudo_labels,
        one_piece=one_piece,
        together=together,
        labelled=[item.labels for item in learnt],
        seed=training.seed,
    )

    torch.manual_seed(training.seed)
    network = build_network(config)
    report = _load_start(network, origin, classes) if origin else None
    module = FinetuningNetwork(network, training)
    if config.reads_keypoints:
        training = training.override(early_crop=None)
    data = _TrainingSlices(learnt, pseudo, training)
    data.check_shares(fabric.world_size)
    trainer = Trainer(
        module,
        training,
        fabric=fabric,
        groups=_parameter_groups(network, report, training),
        slices_per_epoch=len(learnt),
    )
    average = WeightAverage(network, training.averaging, held_out, classes)
    fingerprint = {
        "training": training.model_dump(mode="json", exclude={"checkpoint_every"}),
        "model": config.model_dump(mode="json"),
        "slices": slices.model_dump(mode="json"),
        "keypoints": keypoints.model_dump(mode="json"),
        "classes": [label.value for label in classes.classes],
        "labelled": names,
        "unlabelled": [volume.prepared.name for volume in pool],
        "start": origin.history[-1].get("date") if origin and origin.history else None,
    }
    if resume:
        saved = trainer.restore(files.resume, fingerprint)
        average.load(saved)
        pseudo.load(saved)

    def model_now() -> Model:
        record = _record(training, trainer, names, average.best_dice, pseudo)
        labels = tuple(
            replace(label, one_piece=label.value in one_piece, together=label.value in together)
            for label in classes.classes
        )
        history = (*(origin.history if origin else ()), record)
        return Model(average.best(), config, slices, keypoints, labels, statistics_of(prepared), history)

    def batches(step: int, parts: int) -> list[LabelledBatch]:
        shards = [Shard(fabric.global_rank, fabric.world_size, part, parts) for part in range(parts)]
        return [data.batch(step, trainer.fraction, fabric.device, shard) for shard in shards]

    def save_all() -> None:
        if files.output and fabric.is_global_zero:
            save_checkpoint(files.output, model_now().checkpoint())
            trainer.save(files.resume, fingerprint, {**average.state(), **pseudo.state()})

    def pseudo_labelled() -> Generator[Progress, None, None]:
        if pseudo.is_due(trainer.fraction, _recent_dice(trainer.state.curve)):
            began = time.monotonic()
            drawn = data.num_pseudo * training.pseudo_labels.every * trainer.expected_steps
            model = InferenceNetwork(average.network())
            for done, total in pseudo.renew(model, fabric.device, trainer.fraction, drawn):
                trainer.spend(time.monotonic() - began)
                yield Progress("labelling other slices", done, total)
                began = time.monotonic()

    def registered() -> Generator[Progress, None, None]:
        most, began = training.pseudo_labels.atlases, time.monotonic()
        try:
            atlases = Atlases(_without(cases, held), classes, slices, most=most, device=fabric.device)
            for progress in pseudo.register(atlases):
                trainer.spend(time.monotonic() - began)
                yield progress
                if trainer.fraction >= _REGISTRATION_SHARE:
                    break
                began = time.monotonic()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            told = "memory ran out while labelled volumes were registered to others; training goes on without more"
            yield Progress("labelling by registration", 0, None, message=told)
        release_memory()

    def steps() -> Generator[Progress, None, None]:
        if report is not None:
            yield Progress("finetuning", trainer.state.step, trainer.max_steps, message=f"start: {report}")
        if not trainer.state.step and pool:
            yield from registered()
        yield from pseudo_labelled()  # a training that was closed meanwhile goes on with that
        for progress in trainer.run(batches, stage="finetuning"):
            began = time.monotonic()
            average.update()
            trainer.spend(time.monotonic() - began)
            if held_out and (progress.step % training.holdout_every == 0 or trainer.finished):
                began = time.monotonic()
                dice = average.measure(fabric.device)
                trainer.spend(time.monotonic() - began)
                trainer.state.curve[-1]["held-out dice"] = dice
                progress = replace(progress, losses={**progress.losses, "held-out dice": dice})
            yield replace(progress, preview=lambda: _copied(model_now()))
            yield from pseudo_labelled()

    yield from files.keep_saved(trainer, steps(), save_all)
    model = model_now()
    if files.output and fabric.is_global_zero:
        model.save(files.output)
        files.resume.unlink(missing_ok=True)
    release_memory()
    return FinetuneResult(model, files.output, report, trainer.state.curve)


class _TrainingSlices:
    """Draws the slices of each step: labelled ones, and a share of pseudo-labelled ones once there are some."""

    def __init__(
        self, labelled: Sequence[LabelledSlice], pseudo: PseudoLabels, training: FinetuneConfig
    ) -> None:
        self._training = training
        self._labelled = labelled
        self._pseudo = pseudo
        self.num_pseudo = _num_pseudo(training)
        self._drawings: list[LabelledSlices] = []
        self._drawn_for: tuple[int, bool] | None = None

    def check_shares(self, num_processes: int) -> None:
        """Refuse batches of which some processes would have no slice of their own.

        Raises:
            UserError: If there are such.
        """
        size, pseudo = self._training.batch_size, self.num_pseudo if self._pseudo.num_free else 0
        shares = [size - pseudo, pseudo] if pseudo else [size]
        if num_processes > 1 and min(shares) < num_processes:
            parts = f", of which {pseudo} pseudo-labelled," if pseudo else ""
            raise UserError(
                f"batches of {size} slices{parts} cannot be shared by {num_processes} processes; use a larger "
                "batch_size or fewer processes"
            )

    def batch(self, step: int, fraction: float, device: torch.device, shard: Shard) -> LabelledBatch:
        """The augmented slices of a step, at a fraction 0..1 of the training."""
        now = self._pseudo.round if self._pseudo.slices else 0, fraction < self._training.early_part
        if now != self._drawn_for:
            self._drawings, self._drawn_for = self._drawn(early=now[1]), now
        return concatenate([drawing.batch(step, device, shard) for drawing in self._drawings])

    def _drawn(self, *, early: bool) -> list[LabelledSlices]:
        training, pseudo = self._training, self._pseudo
        augment, small = training.augment, training.early_crop
        if early and small is not None:
            crop = small if augment.crop is None else tuple(map(min, small, augment.crop))
            augment = augment.override(crop=crop)
        parts = [(self._labelled, training.batch_size, 0)]
        if pseudo.slices and self.num_pseudo:
            parts = [
                (self._labelled, training.batch_size - self.num_pseudo, 0),
                (pseudo.slices, self.num_pseudo, 1000 + pseudo.round),
            ]
        return [
            LabelledSlices(
                slices,
                augment=augment,
                foreground=training.foreground,
                batch_size=size,
                seed=training.seed + purpose,
            )
            for slices, size, purpose in parts
        ]


def _settings(
    config: ModelConfig | None,
    slices: SliceConfig | None,
    keypoints: KeypointConfig | None,
    origin: Checkpoint | None,
) -> tuple[ModelConfig, SliceConfig, KeypointConfig]:
    if origin is None:
        return config or ModelConfig(), slices or SliceConfig(), keypoints or KeypointConfig()
    if config is not None:
        ours, theirs = (
            c.model_dump(exclude={"num_classes", "input_slices", "kaf_start"}) for c in (config, origin.model)
        )
        differing = [name for name in ours if ours[name] != theirs[name]]
        if differing:
            details = ", ".join(f"{name} {theirs[name]} there, {ours[name]} here" for name in differing)
            raise CheckpointError(
                f"the start has another architecture: {details}; leave out --network and the settings of the model to "
                "take the start's"
            )
    return origin.model, origin.slices, origin.keypoints


def _names_of(origin: Checkpoint | None, cases: Sequence[LabelledVolume]) -> dict[int, str] | None:
    """The classes of the start, if nothing else is painted."""
    names = {label.value: label.name for label in origin.classes} if origin else {}
    return names if painted_values(cases) <= set(names) else None


def _load_start(network: SegmentationNetwork, origin: Checkpoint, classes: ClassMap) -> LoadReport:
    same_classes = [label.value for label in origin.classes] == [label.value for label in classes.classes]
    weights = origin.weights
    if origin.kind == "segmentation" and not same_classes:
        weights = {name: value for name, value in weights.items() if not name.startswith("head.")}
    prefix = ("encoder.", "decoder.") if origin.kind == "pretrained" else ""  # its heads stay behind
    return load_matching(network, weights, prefix=prefix)


def _parameter_groups(
    network: SegmentationNetwork, report: LoadReport | None, training: FinetuneConfig
) -> list[dict[str, Any]]:
    loaded = set(report.loaded) if report else set()
    taken = [p for name, p in network.named_parameters() if name in loaded]
    fresh = [p for name, p in network.named_parameters() if name not in loaded]
    groups = [{"params": fresh, "rate": 1.0}, {"params": taken, "rate": training.encoder_learning_rate}]
    return [group for group in groups if group["params"]]


def _held_out(labelled: Sequence[LabelledSlice], classes: ClassMap, training: FinetuneConfig) -> set[int]:
    """Which of the labelled slices are held out: such that show structures which other slices show as well."""
    if not training.holdout:
        return set()
    count = len(labelled)
    if count < 2:
        raise UserError(f"holding out slices needs at least 2 labelled slices, got {count}; set holdout to 0")
    wanted = max(1, round(training.holdout * count))
    shown = [set(np.unique(item.labels).tolist()) - {0, IGNORED} for item in labelled]
    left = Counter(channel for channels in shown for channel in channels)
    held: set[int] = set()
    for index in torch.randperm(count, generator=generator_for(training.seed, 6)).tolist():
        if len(held) < wanted and shown[index] and all(left[channel] > 1 for channel in shown[index]):
            held.add(index)
            left.subtract(shown[index])
    if not held:
        only = next(classes.classes[channel].name for channel, slices in left.items() if slices == 1)
        raise UserError(
            f"no slice can be held out: {only!r}, for one, would be left on no other; label more slices, or set "
            "holdout to 0"
        )
    return held


def _num_pseudo(training: FinetuneConfig) -> int:
    """How many slices of a batch are pseudo-labelled once there are some; at least one is not."""
    share, size = training.pseudo_labels.share, training.batch_size
    return min(max(round(share * size), 1), size - 1) if share else 0


def _recent_dice(curve: Sequence[Mapping[str, float]]) -> float:
    """Soft Dice of the last steps; 1 if it is not part of the loss."""
    recent = [1 - step.get("dice", 0.0) for step in curve[-_RECENT:]]
    return sum(recent) / len(recent) if recent else 0.0


def _without(cases: Sequence[LabelledVolume], held: set[int]) -> list[LabelledVolume]:
    """The cases as if nobody had labelled the held-out slices, counted through all cases in order."""
    number = iter(range(sum(len(case.statuses) for case in cases)))
    return [
        replace(
            case, statuses={z: case.statuses[z] for z in sorted(case.statuses) if next(number) not in held}
        )
        for case in cases
    ]


def _copied(model: Model) -> Model:
    network = build_network(model.config).to(model.device)
    network.load_state_dict(model.network.state_dict())
    channels_last(network)
    return replace(model, network=network.eval())


def _record(
    config: FinetuneConfig,
    trainer: Trainer,
    labelled: Sequence[str],
    held_out_dice: float | None,
    pseudo: PseudoLabels,
) -> dict[str, Any]:
    return {
        "stage": "finetuning",
        "date": now(),
        "steps": trainer.state.step,
        "complete": trainer.finished,
        "seconds": round(trainer.state.seconds, 1),
        "waiting_share": round(trainer.waiting_share, 3),
        "device": str(trainer.fabric.device),
        "losses": {name: round(value, 5) for name, value in trainer.state.losses.items()},
        "curve": thinned(trainer.state.curve),
        "held_out_dice": held_out_dice,
        "labelled_slices": list(labelled),
        "unlabelled_slices": pseudo.num_free,
        "registration_dice": pseudo.agreement,
        "settings": config.model_dump(mode="json"),
    }
