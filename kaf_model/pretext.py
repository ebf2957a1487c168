"""Training an encoder on unlabelled volumes by any pretext: the loop, the files and the resuming that all share.

A pretext says which batch belongs to a step and which losses a network gives on it. The paper's own is in
`pretrain`; those it is compared with are in `benchmark.starts`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import nn

from kaf_model.checkpoint import Checkpoint, cpu_weights, now, save_checkpoint, software_versions
from kaf_model.config import KeypointConfig, ModelConfig, PretrainConfig, SliceConfig
from kaf_model.curve import thinned
from kaf_model.datasets import Shard
from kaf_model.engine import Trainer, make_fabric, release_memory
from kaf_model.errors import UserError
from kaf_model.keypoints import KeypointCache
from kaf_model.preparation import PreparedVolume, prepare_volumes, statistics_of
from kaf_model.progress import Progress
from kaf_model.training_files import RunFiles
from kaf_model.volume import Unreadable, Volume

LEAST_PAIRS = 4
"""Pairs whose views are contrasted with each other, at the least, when a batch does not fit the memory: of one pair
alone the losses are 0."""


class Batches(Protocol):
    """The batch of each step, a pure function of the data, the settings, the seed and the step."""

    def __len__(self) -> int:
        """Slices there are."""
        ...

    def batch(self, step: int, device: torch.device, shard: Shard) -> Any:
        """This process's share of the joint batch of a step."""
        ...


class Pretext(Protocol):
    """A task that teaches an encoder without labels."""

    def settings(self) -> Mapping[str, Any]:
        """What else than `PretrainConfig` decides the result, for the record of the training; ready for JSON."""
        ...

    def batches(self, volumes: Sequence[PreparedVolume], training: PretrainConfig) -> Batches:
        """What the network sees."""
        ...

    def network(self, model: ModelConfig, training: PretrainConfig, num_slices: int) -> nn.Module:
        """The encoder, named `encoder`, with its heads; maps a batch to named losses, one of them "total"."""
        ...


@dataclass(frozen=True)
class PretrainResult:
    """What a pretraining returns.

    Attributes:
        checkpoint: The encoder and its heads.
        path: Where it was written, if anywhere.
        curve: Losses of each step.
    """

    checkpoint: Checkpoint
    path: Path | None
    curve: list[dict[str, float]]


def train_pretext(
    pretext: Pretext,
    config: ModelConfig,
    volumes: Iterable[Volume | Unreadable | str | Path],
    training: PretrainConfig,
    *,
    slices: SliceConfig | None = None,
    keypoints: KeypointConfig | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    fabric: Fabric | None = None,
    cache: KeypointCache | None = None,
) -> Generator[Progress, None, PretrainResult]:
    """Pretrain an encoder by a pretext; see `pretrain.pretrain` for the arguments, stopping and errors.

    Yields:
        Progress with the losses of each step.

    Returns:
        The trained encoder.
    """
    slices, keypoints = slices or SliceConfig(), keypoints or KeypointConfig()
    config = config.override(input_slices=slices.input_slices)
    files = RunFiles(output)
    files.check(resume)
    fabric = fabric or make_fabric(device)
    if training.batch_size % fabric.world_size:
        raise UserError(
            f"batch_size {training.batch_size} must divide by the {fabric.world_size} processes that share it"
        )
    looked_for = keypoints if config.reads_keypoints else None
    prepared = yield from prepare_volumes(volumes, slices, looked_for, cache=cache)
    data = pretext.batches(prepared, training)
    torch.manual_seed(training.seed)
    network = pretext.network(config, training, len(data))
    trainer = Trainer(
        network,
        training,
        fabric=fabric,
        groups=[{"params": list(network.parameters()), "rate": 1.0}],
        slices_per_epoch=len(data),
        least_part=min(LEAST_PAIRS, training.batch_size),
    )
    named = {"pretext": dict(pretext.settings())} if pretext.settings() else {}
    fingerprint = {
        "training": training.model_dump(mode="json", exclude={"checkpoint_every"}),
        "model": config.model_dump(mode="json"),
        "slices": slices.model_dump(mode="json"),
        "keypoints": keypoints.model_dump(mode="json"),
        "volumes": [volume.name for volume in prepared],
        **named,
    }
    if resume:
        trainer.restore(files.resume, fingerprint)

    def batches(step: int, parts: int) -> list[Any]:
        shards = [Shard(fabric.global_rank, fabric.world_size, part, parts) for part in range(parts)]
        return [data.batch(step, fabric.device, shard) for shard in shards]

    def checkpoint() -> Checkpoint:
        record = {**_record(training, trainer, statistics_of(prepared)), **named}
        return Checkpoint(
            "pretrained",
            cpu_weights(network),
            config,
            slices,
            keypoints,
            (),
            statistics_of(prepared),
            (record,),
            software_versions(),
        )

    def save_all() -> None:
        if files.output and fabric.is_global_zero:
            save_checkpoint(files.output, checkpoint())
            trainer.save(files.resume, fingerprint)

    yield from files.keep_saved(trainer, trainer.run(batches, stage="pretraining"), save_all)
    if files.output and fabric.is_global_zero:
        save_checkpoint(files.output, checkpoint())
        files.resume.unlink(missing_ok=True)
    release_memory()
    return PretrainResult(checkpoint(), files.output, trainer.state.curve)


def _record(config: PretrainConfig, trainer: Trainer, statistics: Mapping[str, object]) -> dict[str, Any]:
    return {
        "stage": "pretraining",
        "date": now(),
        "steps": trainer.state.step,
        "complete": trainer.finished,
        "seconds": round(trainer.state.seconds, 1),
        "waiting_share": round(trainer.waiting_share, 3),
        "parts": trainer.micro_batches,
        "device": str(trainer.fabric.device),
        "losses": {name: round(value, 5) for name, value in trainer.state.losses.items()},
        "curve": thinned(trainer.state.curve),
        "num_volumes": statistics["num_volumes"],
        "num_slices": statistics["num_slices"],
        "settings": config.model_dump(mode="json"),
    }
