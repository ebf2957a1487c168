"""A network to look into: untrained, pretrained or finetuned."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from kaf_model.attention import AttentionBlock, PackedKeypoints
from kaf_model.checkpoint import Checkpoint, CheckpointError, Model, load_checkpoint
from kaf_model.config import KeypointConfig, ModelConfig, PretrainConfig, Recipe, SliceConfig
from kaf_model.datasets import pad_keypoints
from kaf_model.errors import UserError
from kaf_model.fusion import KafLayer
from kaf_model.heads import KeypointProjection
from kaf_model.matching import Matcher, Matches
from kaf_model.slices import pad_to_multiple
from kaf_model.unet import Encoder, build_encoder

Kind = Literal["untrained", "pretrained", "finetuned"]
AnyModule = TypeVar("AnyModule", bound=nn.Module)


class MatchingHead(nn.Module):
    """The part of the pretraining network that matches keypoints: projection and optimal transport."""

    def __init__(self, model: ModelConfig, *, rounds: int, iterations: int) -> None:
        super().__init__()
        width = model.embedding_width
        self.keypoint_projection = KeypointProjection(len(model.kaf_levels) * width, width=width)
        self.matcher = Matcher(
            width,
            heads=model.heads,
            rounds=rounds,
            iterations=iterations,
            position_reference=model.position_reference,
        )

    def forward(
        self, keypoint_features: Sequence[Tensor], keypoints: PackedKeypoints, size: tuple[int, int]
    ) -> Matches:
        """Match the first P of 2 P slices with the others, from U^l of each level, (T, E) packed."""
        projected = self.keypoint_projection(torch.cat(list(keypoint_features), dim=1))
        matches: Matches = self.matcher(projected, keypoints, size)
        return matches


@dataclass(frozen=True, eq=False)
class Encoded:
    """What the encoder computes on the way through one slice.

    Attributes:
        maps: Output of each encoder block, with its KAF map where it has one, fine to coarse,
            (C_l, h_l, w_l); of a padded slice.
        keypoint_features: U^l of each level with a KAF layer, (N, E).
        attention_inputs: What each attention block of each level with a KAF layer reads, (N, E).
    """

    maps: tuple[Tensor, ...]
    keypoint_features: Mapping[int, Tensor]
    attention_inputs: Mapping[int, tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Explorer:
    """An encoder with all that is needed to show it slices, and its matcher if it has one.

    It computes in float32, so that what is shown does not depend on the machine.

    Attributes:
        kind: "untrained", "pretrained" or "finetuned".
        note: A sentence for the user about what the network has learned.
        encoder: In evaluation mode.
        matching: The trained matcher, in evaluation mode; None where there is none.
        config: Architecture.
        slices: Preprocessing the network expects.
        keypoints: Keypoint detection the network expects.
    """

    kind: Kind
    note: str
    encoder: Encoder
    matching: MatchingHead | None
    config: ModelConfig
    slices: SliceConfig
    keypoints: KeypointConfig
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def untrained(
        cls, recipe: Recipe | None = None, *, seed: int = 0, device: str | torch.device = "cpu"
    ) -> Explorer:
        """Build the network of a recipe with the random weights of a seed, and no matcher."""
        recipe = recipe or Recipe.preset("small")
        config = recipe.model.override(input_slices=recipe.slices.input_slices)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = _encoder(config)
        note = (
            f"Untrained: random weights (seed {seed}). What you see comes from the architecture and the image "
            "alone."
        )
        return cls(
            kind="untrained",
            note=note,
            encoder=_frozen(encoder, device),
            matching=None,
            config=config,
            slices=recipe.slices,
            keypoints=recipe.keypoints,
        )

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, *, device: str | torch.device = "cpu") -> Explorer:
        """Build the encoder of a checkpoint of either kind, and the matcher of one that has it.

        Raises:
            UserError: If the encoder has other levels than a UNet's.
            CheckpointError: If the weights do not fit the configuration of the checkpoint.
            UserError: If its network is a Swin transformer.
        """
        encoder = _encoder(checkpoint.model)
        _load(encoder, checkpoint.weights, "encoder.")
        matching = _matching_head(checkpoint)
        return cls(
            kind="pretrained" if checkpoint.kind == "pretrained" else "finetuned",
            note=_note(checkpoint, has_matcher=matching is not None),
            encoder=_frozen(encoder, device),
            matching=None if matching is None else _frozen(matching, device),
            config=checkpoint.model,
            slices=checkpoint.slices,
            keypoints=checkpoint.keypoints,
        )

    @classmethod
    def from_model(cls, model: Model) -> Explorer:
        """Look into a copy of a loaded segmentation model, on its device."""
        return cls.from_checkpoint(model.checkpoint(), device=model.device)

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Explorer:
        """Read a checkpoint of either kind.

        Raises:
            UserError: If the encoder has other levels than a UNet's.
            CheckpointError: If the file cannot be read or its weights do not fit.
        """
        return cls.from_checkpoint(load_checkpoint(path), device=device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.encoder.parameters()).device

    @property
    def kaf_levels(self) -> tuple[int, ...]:
        """Levels with a KAF layer, 1 the finest; none for a plain UNet."""
        return tuple(sorted(int(level) for level in self.encoder.kaf_layers))

    def kaf_layer(self, level: int) -> KafLayer:
        """The KAF layer of a level.

        Raises:
            ValueError: If the level has none.
        """
        if level not in self.kaf_levels:
            there = ", ".join(map(str, self.kaf_levels)) or "none"
            raise ValueError(f"level {level} has no KAF layer; the levels of this network with one: {there}")
        layer = self.encoder.kaf_layers[str(level)]
        assert isinstance(layer, KafLayer)
        return layer

    def encode(self, image: Tensor, positions: Tensor) -> Encoded:
        """Run the encoder over one slice; may be called from several threads.

        Args:
            image: (S, H, W) as the network reads it, any size.
            positions: (N, 2) keypoints (y, x).
        """
        padded = pad_to_multiple(image[None].float().to(self.device), 16)
        points, valid = pad_keypoints([positions.cpu().numpy()])
        inputs: dict[int, list[Tensor]] = {level: [] for level in self.kaf_levels}
        with self._lock, torch.no_grad():
            hooks = [
                block.register_forward_pre_hook(_recorder(inputs[level]))
                for level in self.kaf_levels
                for block in self.kaf_layer(level).attention
            ]
            try:
                encoded = self.encoder(padded, points.to(self.device), valid.to(self.device))
            finally:
                for hook in hooks:
                    hook.remove()
        return Encoded(
            maps=tuple(one[0] for one in encoded.maps),
            keypoint_features=dict(zip(self.kaf_levels, encoded.keypoint_features, strict=True)),
            attention_inputs={level: tuple(recorded) for level, recorded in inputs.items()},
        )


def _frozen(module: AnyModule, device: str | torch.device) -> AnyModule:
    return module.to(device).eval().requires_grad_(False)


def _encoder(config: ModelConfig) -> Encoder:
    encoder = build_encoder(config)
    if not isinstance(encoder, Encoder):
        raise UserError(
            f"a {config.architecture} has no four levels, each half as fine as the one before, to look into; choose "
            "a model with the encoder of a UNet"
        )
    return encoder


def _recorder(inputs: list[Tensor]) -> Any:
    def record(_block: AttentionBlock, given: tuple[Tensor, ...]) -> None:
        inputs.append(given[0])

    return record


def _load(module: nn.Module, weights: Mapping[str, Tensor], prefix: str) -> None:
    own = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit their own configuration: {error}") from error


def _matching_head(checkpoint: Checkpoint) -> MatchingHead | None:
    weights = {
        name: value
        for name, value in checkpoint.weights.items()
        if name.startswith(("matcher.", "keypoint_projection."))
    }
    if not any(name.startswith("matcher.") for name in weights):
        return None
    rounds = {match[1] for name in weights if (match := re.match(r"matcher\.cross_attention\.(\d+)\.", name))}
    settings = checkpoint.history[-1].get("settings", {}) if checkpoint.history else {}
    iterations = settings.get("sinkhorn_iterations", PretrainConfig().sinkhorn_iterations)
    head = MatchingHead(checkpoint.model, rounds=len(rounds), iterations=iterations)
    _load(head, weights, "")
    return head


def _note(checkpoint: Checkpoint, *, has_matcher: bool) -> str:
    record = checkpoint.history[-1] if checkpoint.history else {}
    steps = f"{record['steps']} steps" if "steps" in record else "a number of steps that is not recorded"
    matcher = "it has a matcher" if has_matcher else "it has no matcher"
    if checkpoint.kind == "pretrained":
        names = {"pcl": "L_PCL", "global": "L_global", "local": "L_local"}
        losses = ", ".join(names.get(name, name) for name in record.get("losses", {}) if name != "total")
        return f"Pretrained without labels for {steps}{f' with {losses}' if losses else ''}; {matcher}."
    slices = len(record.get("labelled_slices", ()))
    on = f" on {slices} labelled slices" if slices else ""
    return f"Finetuned for {steps}{on}; {matcher}: finetuning keeps the encoder only."
