"""Training a segmentation network on a few labelled slices."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

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
from kaf_model.datasets import LabelledBatch, LabelledSlices, Shard
from kaf_model.engine import Trainer, channels_last, generator_for, make_fabric, release_memory
from kaf_model.errors import UserError
from kaf_model.keypoints import KeypointCache
from kaf_model.labels import ClassMap, LabelledVolume, check_learnable, painted_values
from kaf_model.losses import IGNORED, cross_entropy, soft_dice
from kaf_model.preparation import LabelledSlice, prepare_labelled, statistics_of
from kaf_model.progress import Progress
from kaf_model.segment import predict_slices
from kaf_model.training_files import RunFiles
from kaf_model.unet import SegmentationNetwork, build_network


class FinetuningNetwork(nn.Module):
    """The segmentation network with its loss; maps a labelled batch to named losses."""

    def __init__(self, network: SegmentationNetwork, config: FinetuneConfig) -> None:
        super().__init__()
        self.network = network
        self.with_dice = config.loss == "dice+cross-entropy"

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
    class_names: Mapping[int, str] | None = None,
    slices: SliceConfig | None = None,
    keypoints: KeypointConfig | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    fabric: Fabric | None = None,
    cache: KeypointCache | None = None,
) -> Generator[Progress, None, FinetuneResult]:
    """Train on labelled slices.

    Can be closed at any yield: with `output`, once a step is done, a usable checkpoint and what is needed to
    resume are then written.

    Args:
        config: Architecture; None takes that of `start`. `num_classes` is set from the labels.
        cases: Volumes with labels on some of their slices.
        training: Loss, budgets and optimiser.
        start: A pretrained or finetuned checkpoint; None starts from random weights. A pretrained one
            gives its encoder, a finetuned one with the same classes everything. Its preprocessing is kept.
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
    config = config.override(num_classes=len(classes))
    fabric = fabric or make_fabric(device)
    prepared, labelled = yield from prepare_labelled(cases, classes, slices, keypoints, cache=cache)
    names = [f"{c.volume.name}:{z}:{status}" for c in cases for z, status in sorted(c.statuses.items())]
    check_learnable([item.labels for item in labelled], classes)
    learnt, held_out = _split(labelled, training)
    check_learnable([item.labels for item in learnt], classes)

    torch.manual_seed(training.seed)
    network = build_network(config)
    report = _load_start(network, origin, classes) if origin else None
    module = FinetuningNetwork(network, training)
    data = LabelledSlices(
        learnt,
        augment=training.augment,
        foreground=training.foreground,
        batch_size=training.batch_size,
        seed=training.seed,
    )
    trainer = Trainer(
        module,
        training,
        fabric=fabric,
        groups=_parameter_groups(network, report, training),
        slices_per_epoch=len(data),
    )
    average = _Average(network, training.averaging, held_out, classes)
    fingerprint = {
        "training": training.model_dump(mode="json", exclude={"checkpoint_every"}),
        "model": config.model_dump(mode="json"),
        "slices": slices.model_dump(mode="json"),
        "keypoints": keypoints.model_dump(mode="json"),
        "classes": [label.value for label in classes.classes],
        "labelled": names,
        "start": origin.history[-1].get("date") if origin and origin.history else None,
    }
    if resume:
        average.load(trainer.restore(files.resume, fingerprint))

    def model_now() -> Model:
        history = (*(origin.history if origin else ()), _record(training, trainer, names, average.best_dice))
        return Model(
            average.best(), config, slices, keypoints, classes.classes, statistics_of(prepared), history
        )

    def batches(step: int, parts: int) -> list[LabelledBatch]:
        shards = [Shard(fabric.global_rank, fabric.world_size, part, parts) for part in range(parts)]
        return [data.batch(step, fabric.device, shard) for shard in shards]

    def save_all() -> None:
        if files.output and fabric.is_global_zero:
            save_checkpoint(files.output, model_now().checkpoint())
            trainer.save(files.resume, fingerprint, average.state())

    def steps() -> Generator[Progress, None, None]:
        if report is not None:
            yield Progress("finetuning", trainer.state.step, trainer.max_steps, message=f"start: {report}")
        for progress in trainer.run(batches, stage="finetuning"):
            average.update()
            if held_out and (progress.step % training.holdout_every == 0 or trainer.finished):
                dice = average.measure(fabric.device)
                trainer.state.curve[-1]["held-out dice"] = dice
                progress = replace(progress, losses={**progress.losses, "held-out dice": dice})
            yield replace(progress, preview=lambda: _copied(model_now()))

    yield from files.keep_saved(trainer, steps(), save_all)
    model = model_now()
    if files.output and fabric.is_global_zero:
        model.save(files.output)
        files.resume.unlink(missing_ok=True)
    release_memory()
    return FinetuneResult(model, files.output, report, trainer.state.curve)


class _Average:
    """The weights a training hands over: their running average, and the best on held-out slices."""

    def __init__(
        self, network: SegmentationNetwork, decay: float, held_out: Sequence[LabelledSlice], classes: ClassMap
    ) -> None:
        self._network = network
        self._held_out = held_out
        self._classes = classes
        self.best_dice: float | None = None
        self._best: dict[str, Tensor] | None = None

        def blend(average: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
            if not average.is_floating_point():
                return current
            share = min(decay, (1 + int(count)) / (10 + int(count)))  # a short training forgets its start too
            return average.lerp(current, 1 - share)

        self._model = AveragedModel(network, avg_fn=blend, use_buffers=True)

    def update(self) -> None:
        self._model.update_parameters(self._network)

    def network(self) -> SegmentationNetwork:
        average = self._model.module
        assert isinstance(average, SegmentationNetwork)
        return average.eval()

    def best(self) -> SegmentationNetwork:
        """The best weights on held-out slices if there are any, else the average."""
        if self._best is None:
            return self.network()
        network = build_network(self._network.config).to(next(self._network.parameters()).device)
        network.load_state_dict(self._best)
        channels_last(network)
        return network.eval()

    def measure(self, device: torch.device) -> float:
        """Mean Dice of the foreground classes over the held-out slices; keeps the weights if it is the best."""
        overlap, size = np.zeros(len(self._classes)), np.zeros(len(self._classes))
        network = self.network()
        for item in self._held_out:
            probabilities = predict_slices(
                network, item.image[None].astype(np.float32), [item.keypoints], device
            )
            predicted = probabilities[0].argmax(0).cpu().numpy()
            known = item.labels != IGNORED
            for channel in range(1, len(self._classes)):
                ours, theirs = (predicted == channel) & known, item.labels == channel
                overlap[channel] += 2 * np.count_nonzero(ours & theirs)
                size[channel] += np.count_nonzero(ours) + np.count_nonzero(theirs)
        there = size > 0
        dice = float((overlap[there] / size[there]).mean()) if there.any() else 1.0
        if self.best_dice is None or dice >= self.best_dice:
            self.best_dice = dice
            self._best = {name: value.clone() for name, value in network.state_dict().items()}
        return dice

    def state(self) -> dict[str, Tensor]:
        """Tensors that `load` takes back."""
        tensors = {f"average.{name}": value for name, value in self._model.state_dict().items()}
        if self._best is not None:
            tensors |= {f"best.{name}": value for name, value in self._best.items()}
            tensors["best_dice"] = torch.tensor(self.best_dice, dtype=torch.float64)
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        device = next(self._network.parameters()).device
        parts: dict[str, dict[str, Tensor]] = {"average": {}, "best": {}}
        for name, value in tensors.items():
            part, _, key = name.partition(".")
            if key:
                parts[part][key] = value.to(device)
        self._model.load_state_dict(parts["average"])
        if parts["best"]:
            self._best = parts["best"]
            self.best_dice = float(tensors["best_dice"])


def _settings(
    config: ModelConfig | None,
    slices: SliceConfig | None,
    keypoints: KeypointConfig | None,
    origin: Checkpoint | None,
) -> tuple[ModelConfig, SliceConfig, KeypointConfig]:
    if origin is None:
        return config or ModelConfig(), slices or SliceConfig(), keypoints or KeypointConfig()
    if config is not None:
        ours, theirs = (c.model_dump(exclude={"num_classes"}) for c in (config, origin.model))
        differing = [name for name in ours if ours[name] != theirs[name]]
        if differing:
            details = ", ".join(f"{name} {theirs[name]} there, {ours[name]} here" for name in differing)
            raise CheckpointError(
                f"the start has another architecture: {details}; leave out the preset to take the start's"
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
    prefix = "encoder." if origin.kind == "pretrained" else ""
    return load_matching(network, weights, prefix=prefix)


def _parameter_groups(
    network: SegmentationNetwork, report: LoadReport | None, training: FinetuneConfig
) -> list[dict[str, Any]]:
    loaded = set(report.loaded) if report else set()
    taken = [p for name, p in network.named_parameters() if name in loaded]
    fresh = [p for name, p in network.named_parameters() if name not in loaded]
    groups = [{"params": fresh, "rate": 1.0}, {"params": taken, "rate": training.encoder_learning_rate}]
    return [group for group in groups if group["params"]]


def _split(
    labelled: Sequence[LabelledSlice], training: FinetuneConfig
) -> tuple[list[LabelledSlice], list[LabelledSlice]]:
    if not training.holdout:
        return list(labelled), []
    if len(labelled) < 2:
        raise UserError("holding out slices needs at least 2 labelled slices, got 1; set holdout to 0")
    count = min(max(1, round(training.holdout * len(labelled))), len(labelled) - 1)
    order = torch.randperm(len(labelled), generator=generator_for(training.seed, 6)).tolist()
    held = set(order[:count])
    return (
        [item for index, item in enumerate(labelled) if index not in held],
        [item for index, item in enumerate(labelled) if index in held],
    )


def _copied(model: Model) -> Model:
    network = build_network(model.config).to(model.device)
    network.load_state_dict(model.network.state_dict())
    channels_last(network)
    return replace(model, network=network.eval())


def _record(
    config: FinetuneConfig, trainer: Trainer, labelled: Sequence[str], held_out_dice: float | None
) -> dict[str, Any]:
    return {
        "stage": "finetuning",
        "date": now(),
        "steps": trainer.state.step,
        "complete": trainer.finished,
        "seconds": round(trainer.state.seconds, 1),
        "device": str(trainer.fabric.device),
        "losses": {name: round(value, 5) for name, value in trainer.state.losses.items()},
        "curve": thinned(trainer.state.curve),
        "held_out_dice": held_out_dice,
        "labelled_slices": list(labelled),
        "settings": config.model_dump(mode="json"),
    }
