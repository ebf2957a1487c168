"""Weights of the paper's published implementation, under our names.

Its `.pth` files are torch pickles, so they are opened with `weights_only=True` and never executed. The
state dict may be the file's content itself or lie in it under "net", "model" or "state_dict", and every
name may start with "module.", as a parallel training leaves it.

What differs from ours, beside the names: layers on keypoints are 1-D convolutions with a kernel of one;
query, key and value are three layers; channel c of an attention belongs to head c mod 4, where our heads
are contiguous; and each KAF layer has a final projection and a bin score that nothing reads.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kaf_model.checkpoint import (
    Checkpoint,
    CheckpointError,
    ClassLabel,
    count_parameters,
    now,
    software_versions,
)
from kaf_model.config import ModelConfig, PretrainConfig, Recipe
from kaf_model.pretrain import PretrainingNetwork
from kaf_model.unet import build_network

HEADS = 4
"""Attention heads of the published networks; no shape tells them."""

_ACDC_CHANNELS = 48  # at the finest level of the published network for ACDC
_ACDC_SIDE = 352.0  # of the slices that it was trained on, pixels

_WRAPPERS = ("net", "state_dict", "model")

_UNUSED = re.compile(r"graph_local_head\.|encoder\.graph_\d\.superglue\.(final_proj\.|bin_score$)")

# Published name -> ours, without what follows the layer (weight, bias, running statistics).
_RENAMES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        r"encoder\.contr_([1-4])_([12])\.([01])",
        lambda m: f"encoder.blocks.{int(m[1]) - 1}.{_layer(m[2], m[3])}",
    ),
    (r"encoder\.center\.([02])", lambda m: f"encoder.centre.{m[1]}"),
    (r"encoder\.graph_([1-4])\.feature_mlp", lambda m: f"encoder.kaf_layers.{m[1]}.projection"),
    (
        r"encoder\.graph_([1-4])\.diffusion_cnn\.([013])",
        lambda m: f"encoder.kaf_layers.{m[1]}.diffusion.{m[2]}",
    ),
    (
        r"encoder\.graph_([1-4])\.superglue\.kenc\.encoder\.(\d+)",
        lambda m: f"encoder.kaf_layers.{m[1]}.position_encoder.mlp.{m[2]}",
    ),
    (
        r"encoder\.graph_([1-4])\.superglue\.gnn\.layers\.(\d+)\.",
        lambda m: f"encoder.kaf_layers.{m[1]}.attention.{m[2]}.",
    ),
    (r"decoder\.upscale([2-5])", lambda m: f"decoder.upsample.{5 - int(m[1])}"),
    (
        r"decoder\.expand_([1-4])_([12])\.([01])",
        lambda m: f"decoder.blocks.{4 - int(m[1])}.{_layer(m[2], m[3])}",
    ),
    (r"decoder\.head\.0", lambda m: "head"),
    (r"head\.([24])", lambda m: f"bottleneck_head.mlp.{int(m[1]) - 2}"),
    (r"graph_head\.([013])", lambda m: f"keypoint_head.mlp.{m[1]}"),
    (r"graph_feature_mlp", lambda m: "keypoint_projection.linear"),
    (r"superglue\.kenc\.encoder\.(\d+)", lambda m: f"matcher.position_encoder.mlp.{m[1]}"),
    # Even layers are self-, odd ones cross-attention.
    (
        r"superglue\.gnn\.layers\.(\d+)\.",
        lambda m: f"matcher.{('self', 'cross')[int(m[1]) % 2]}_attention.{int(m[1]) // 2}.",
    ),
    (r"superglue\.final_proj", lambda m: "matcher.projection"),
    (r"superglue\.bin_score$", lambda m: "matcher.bin_score"),
)
_ATTENTION = re.compile(r"(.*)\.attn\.(merge|proj\.[012])\.(weight|bias)")


def import_published(path: str | Path, *, num_classes: int | None = None) -> Checkpoint:
    """Read a `.pth` of the published implementation as a checkpoint of ours.

    The architecture is read off the shapes. Preprocessing is that of the paper's preset with as many
    channels (48: paper-acdc, else paper-chd, which keeps the pixels of the source). Class names are not in
    the file: values 0, 1, 2, ... are assumed.

    Args:
        path: A pretraining or segmentation checkpoint.
        num_classes: Classes including the background: what the file must have, or, for a pretraining
            checkpoint, which has none, what the configuration shall say.

    Returns:
        A "segmentation" checkpoint if the file has a decoder, else a "pretrained" one.

    Raises:
        CheckpointError: If it is no such file, naming what is missing or unknown.
    """
    path = Path(path)
    published = _read(path)
    dropped = [name for name in published if _UNUSED.match(name)]
    unused = count_parameters({name: published.pop(name) for name in dropped})
    weights = _renamed(published, path)
    _invent_counters(weights)
    kind: Literal["pretrained", "segmentation"] = (
        "segmentation" if any(name.startswith("decoder.") for name in weights) else "pretrained"
    )
    model = _architecture(weights, path, kind, num_classes)
    with torch.device("meta"):
        wanted = (
            build_network(model) if kind == "segmentation" else _pretraining_network(model, weights, path)
        )
    _check(wanted, weights, path)
    recipe = Recipe.preset(_preset_of(model))
    record = {
        "stage": "import",
        "date": now(),
        "source": path.name,
        "unused_parameters_left_out": unused,
    }
    classes = (
        ClassLabel(0, "background"),
        *(ClassLabel(v, f"class {v}") for v in range(1, model.num_classes)),
    )
    return Checkpoint(
        kind,
        {name: weights[name].contiguous().clone() for name in wanted.state_dict()},
        model,
        recipe.slices,
        recipe.keypoints,
        classes if kind == "segmentation" else (),
        {},
        (record,),
        software_versions(),
    )


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without wrappers and prefixes."""
    if not path.is_file():
        raise CheckpointError(f"no file at {path}")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} is not a plain state dict of tensors, and code in it is not run: "
            f"{_first_line(error)}; save model.state_dict() instead"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path.name} is broken or no torch file: {_first_line(error)}") from error
    while isinstance(content, Mapping) and (
        inner := [key for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
    ):
        content = content[inner[0]]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path.name} holds {type(content).__name__}, wanted a state dict of tensors")
    strange = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"{path.name} is no state dict: {_listed(strange)} are no tensors")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _renamed(published: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, value in published.items():
        ours = _our_name(name)
        if ours is None:
            unknown.append(name)
            continue
        if value.dim() == 3 and value.shape[-1] == 1:
            value = value[..., 0]  # a convolution with a kernel of one is a linear layer
        attention = _ATTENTION.fullmatch(ours)
        if attention is None:
            weights[ours] = value
        elif attention[2] == "merge":
            # What it reads is ordered by heads; its output is not.
            merged = value[:, _contiguous_heads(value.shape[1])] if attention[3] == "weight" else value
            weights[f"{attention[1]}.merge.{attention[3]}"] = merged
        else:
            rows = value[_contiguous_heads(len(value))]
            thirds.setdefault(f"{attention[1]}.query_key_value.{attention[3]}", {})[attention[2]] = rows
    if unknown:
        raise CheckpointError(
            f"{path.name} is no checkpoint of the published implementation: unknown {_listed(unknown)}"
        )
    for name, parts in thirds.items():
        if len(parts) < 3:
            raise CheckpointError(
                f"{path.name} lacks a part of {name}: it has {', '.join(sorted(parts))} of proj.0-2"
            )
        weights[name] = torch.cat([parts[f"proj.{index}"] for index in range(3)])
    return weights


def _our_name(name: str) -> str | None:
    for pattern, rename in _RENAMES:
        match = re.match(pattern, name)
        if match and (match.end() == len(name) or name[match.end()] == "." or name[match.end() - 1] == "."):
            return rename(match) + name[match.end() :]
    return None


def _layer(convolution: str, part: str) -> int:
    """Place in our block of six layers of the n-th convolution (part 0) or its normalisation (part 1)."""
    return 3 * (int(convolution) - 1) + int(part)


def _contiguous_heads(width: int) -> Tensor:
    """For each channel of ours the published channel: head h has c = h, h + 4, h + 8, ... there."""
    return torch.arange(width).view(width // HEADS, HEADS).T.flatten()


def _invent_counters(weights: dict[str, Tensor]) -> None:
    """Files of old torch versions do not count the batches that normalisation has seen."""
    for name in [name for name in weights if name.endswith(".running_mean")]:
        weights.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))


@dataclass(frozen=True)
class _Shapes:
    """Reads sizes off weights; what is not there is an error that names it."""

    weights: Mapping[str, Tensor]
    path: Path

    def size(self, name: str, axis: int) -> int:
        if name not in self.weights or self.weights[name].dim() <= axis:
            raise CheckpointError(
                f"{self.path.name} is no checkpoint of the published implementation: no {name}"
            )
        return int(self.weights[name].shape[axis])

    def numbers(self, pattern: str) -> list[int]:
        """The distinct numbers in names, ascending."""
        return sorted({int(match[1]) for name in self.weights if (match := re.match(pattern, name))})


def _architecture(
    weights: Mapping[str, Tensor], path: Path, kind: str, num_classes: int | None
) -> ModelConfig:
    shapes = _Shapes(weights, path)
    start = shapes.size("encoder.blocks.0.0.weight", 0)
    found = shapes.size("head.weight", 0) if kind == "segmentation" else None
    if None not in (found, num_classes) and found != num_classes:
        raise CheckpointError(f"{path.name} has {found} classes, {num_classes} were asked for")
    levels = shapes.numbers(r"encoder\.kaf_layers\.(\d)\.")
    doubled = shapes.size("encoder.blocks.1.0.weight", 1) == 2 * start
    values: dict[str, Any] = {
        "architecture": "kaf-unet" if levels else "unet-c2" if doubled else "unet",
        "start_channels": start,
        "num_classes": found or num_classes or (4 if start == _ACDC_CHANNELS else 8),
        "heads": HEADS,
        "position_reference": _ACDC_SIDE if start == _ACDC_CHANNELS else None,
    }
    if levels:
        layer = f"encoder.kaf_layers.{levels[0]}"
        values |= {
            "kaf_levels": tuple(levels),
            "embedding_width": shapes.size(f"{layer}.projection.weight", 0),
            "attention_blocks": len(shapes.numbers(re.escape(layer) + r"\.attention\.(\d+)\.")),
            "diffusion_channels": shapes.size(f"{layer}.diffusion.0.weight", 0),
        }
    return ModelConfig(**values)


def _pretraining_network(model: ModelConfig, weights: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The encoder with those heads that the file has."""
    shapes = _Shapes(weights, path)
    has = {
        part: any(name.startswith(f"{part}.") for name in weights)
        for part in ("bottleneck_head", "keypoint_head", "matcher")
    }
    width = 512
    for part, last in (("bottleneck_head", 2), ("keypoint_head", 3)):
        if has[part]:
            width = shapes.size(f"{part}.mlp.{last}.weight", 0)
    config = PretrainConfig(
        normalised_head=False,
        weight_pcl=float(has["bottleneck_head"]) or float(not any(has.values())),
        weight_global=float(has["keypoint_head"]),
        weight_local=float(has["matcher"]),
        projection_width=width,
        matching_rounds=len(shapes.numbers(r"matcher\.cross_attention\.(\d+)\.")),
    )
    network = PretrainingNetwork(model, config)
    if not any(has.values()):  # an encoder alone
        del network.bottleneck_head
    return network


def _check(wanted: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    ours = wanted.state_dict()
    missing = sorted(set(ours) - set(weights))
    if missing:
        raise CheckpointError(f"{path.name} is incomplete: {_listed(missing)} missing (named as here)")
    left = sorted(set(weights) - set(ours))
    if left:
        raise CheckpointError(
            f"{path.name} has more than its architecture needs: {_listed(left)} (named as here)"
        )
    wrong = sorted(name for name in ours if ours[name].shape != weights[name].shape)
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{path.name} does not fit together: {name} is {tuple(weights[name].shape)}, "
            f"wanted {tuple(ours[name].shape)}"
        )


def _preset_of(model: ModelConfig) -> Literal["paper-acdc", "paper-chd"]:
    return "paper-acdc" if model.start_channels == _ACDC_CHANNELS else "paper-chd"


def _listed(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
