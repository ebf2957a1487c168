"""Checkpoints are data, never code: safetensors weights, everything else as JSON in the header."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kaf_model.config import KeypointConfig, ModelConfig, SliceConfig
from kaf_model.errors import UserError
from kaf_model.unet import SegmentationNetwork, build_network

FORMAT = 1
_WITHOUT_EFFECT = ("divisor",)  # settings of slices that older checkpoints name and that never did anything
_HEADER = "napari-kaf"
_PACKAGES = ("napari-kaf", "torch", "numpy", "opencv-python-headless", "nibabel", "monai")


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or is not what was asked for."""


@dataclass(frozen=True)
class ClassLabel:
    """A class of a model; the first is the background, 0.

    Attributes:
        value: In label maps.
        name: In words.
        one_piece: Whether the structure was in one piece wherever it was labelled.
        together: Whether it was in one piece with the other structures of which this is so.
    """

    value: int
    name: str
    one_piece: bool = False
    together: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """What is in a checkpoint file.

    Attributes:
        kind: "pretrained" (encoder and pretraining heads) or "segmentation" (the whole network).
        weights: Tensors by name; names of "segmentation" are those of `SegmentationNetwork`, a
            "pretrained" one has `encoder.*` and the heads.
        model: Architecture.
        slices: Preprocessing the weights expect.
        keypoints: Keypoint detection the weights expect.
        classes: Classes in channel order, background first; empty when pretrained.
        statistics: Spacing and intensities of the training volumes.
        history: One record a training, oldest first.
        versions: Software that wrote the file.
    """

    kind: Literal["pretrained", "segmentation"]
    weights: Mapping[str, Tensor]
    model: ModelConfig
    slices: SliceConfig
    keypoints: KeypointConfig
    classes: tuple[ClassLabel, ...] = ()
    statistics: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, ready for JSON."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "parameters": count_parameters(self.weights),
            "model": self.model.model_dump(mode="json"),
            "slices": self.slices.model_dump(mode="json"),
            "keypoints": self.keypoints.model_dump(mode="json"),
            "classes": [asdict(label) for label in self.classes],
            "statistics": dict(self.statistics),
            "history": [dict(record) for record in self.history],
            "versions": dict(self.versions),
        }


@dataclass(frozen=True)
class Model:
    """A network ready for use, with all it needs to read a volume and name what it finds."""

    network: SegmentationNetwork
    config: ModelConfig
    slices: SliceConfig
    keypoints: KeypointConfig
    classes: tuple[ClassLabel, ...]
    statistics: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def checkpoint(self) -> Checkpoint:
        """The model as a checkpoint, weights on the CPU."""
        return Checkpoint(
            "segmentation",
            cpu_weights(self.network),
            self.config,
            self.slices,
            self.keypoints,
            self.classes,
            self.statistics,
            self.history,
        )

    def save(self, path: str | Path) -> Path:
        """Write the model as a checkpoint file."""
        return save_checkpoint(path, self.checkpoint())


def cpu_weights(module: nn.Module) -> dict[str, Tensor]:
    """Copy of a module's state on the CPU, contiguous, as safetensors wants it."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}


def count_parameters(weights: Mapping[str, Tensor]) -> int:
    """Trained numbers among weights: all but running statistics and other memories of what was seen."""
    buffers = ("running_mean", "running_var", "num_batches_tracked", "memory_bank", "relative_position_index")
    return sum(value.numel() for name, value in weights.items() if not name.endswith(buffers))


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def now() -> str:
    """The present moment, ISO 8601, in seconds."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint; a file of that name is replaced only once the new one is complete.

    Raises:
        CheckpointError: If it cannot be written.
    """
    header = {**checkpoint.describe(), "versions": dict(checkpoint.versions) or software_versions()}
    return save_tensors(path, checkpoint.weights, header)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write tensors and a JSON header as safetensors, atomically."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(dict(tensors), temporary, metadata={_HEADER: json.dumps(header)})
        temporary.chmod(0o666 & ~_umask())  # safetensors lets only the owner read
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}; choose another place with room on it"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _umask() -> int:
    """The process's mask of file permissions; the system tells it only in exchange for another."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def load_header(path: str | Path) -> dict[str, Any]:
    """Read the JSON header of a file written by `save_tensors`, not its tensors.

    Raises:
        CheckpointError: If the file is missing, broken, or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    if path.suffix in {".pth", ".pt", ".ckpt"}:
        raise CheckpointError(
            f"{path.name} is a pickled checkpoint; convert it with: kaf import {path} -o FILE"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is broken or no safetensors file: {error}") from error
    if _HEADER not in metadata:
        raise CheckpointError(f"{path} was not written by napari-kaf: it has no {_HEADER!r} header")
    header: dict[str, Any] = json.loads(metadata[_HEADER])
    return header


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file written by `save_tensors`, onto the CPU."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
        return tensors
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is broken: {error}") from error


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: If the file is missing, broken, of a newer format, or not a checkpoint.
    """
    header = load_header(path)
    if header.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{path} has format {header['format']}, this napari-kaf reads up to {FORMAT}: update napari-kaf"
        )
    try:
        slices = {name: value for name, value in header["slices"].items() if name not in _WITHOUT_EFFECT}
        return Checkpoint(
            header["kind"],
            load_tensors(path),
            ModelConfig.model_validate(header["model"]),
            SliceConfig.model_validate(slices),
            KeypointConfig.model_validate(header["keypoints"]),
            tuple(ClassLabel(**label) for label in header["classes"]),
            header["statistics"],
            tuple(header["history"]),
            header["versions"],
        )
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{path} is no checkpoint of a model: {error}") from error


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> Model:
    """Read a segmentation model, ready for inference.

    Raises:
        CheckpointError: If the file cannot be read or holds only pretrained weights.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.kind != "segmentation":
        raise CheckpointError(
            f"{path} holds a {checkpoint.kind} encoder that cannot segment yet: finetune it on labelled slices first"
        )
    network = build_network(checkpoint.model)
    _load_exactly(network, checkpoint.weights, path)
    return Model(
        network.to(device).eval(),
        checkpoint.model,
        checkpoint.slices,
        checkpoint.keypoints,
        checkpoint.classes,
        checkpoint.statistics,
        checkpoint.history,
    )


def _load_exactly(network: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    try:
        network.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {path} do not fit its own configuration: {error}") from error


@dataclass(frozen=True)
class LoadReport:
    """What a start took over and what it left at its random initialisation."""

    loaded: Sequence[str]
    initialised: Sequence[str]

    def __str__(self) -> str:
        if not self.initialised:
            return f"loaded all {len(self.loaded)} tensors"
        parts = sorted({name.split(".")[0] for name in self.initialised})
        fresh = f"{len(self.initialised)} keep their random start ({', '.join(parts)})"
        return f"loaded {len(self.loaded)} tensors; {fresh}"


def load_matching(
    module: nn.Module, weights: Mapping[str, Tensor], *, prefix: str | tuple[str, ...] = ""
) -> LoadReport:
    """Copy the weights that fit a module by name and shape; leave the others.

    Args:
        module: What to load into.
        weights: Tensors by name.
        prefix: Only names that start so, or with one of these, are taken over.

    Returns:
        What was loaded and what was left at initialisation.
    """
    own = module.state_dict()
    fitting = {
        name: weights[name]
        for name in own
        if name.startswith(prefix) and name in weights and weights[name].shape == own[name].shape
    }
    module.load_state_dict(fitting, strict=False)
    return LoadReport(sorted(fitting), sorted(set(own) - set(fitting)))
