"""The starts that a row of a plan can name, and how each is pretrained."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from kaf_model.benchmark.plan import Tree
from kaf_model.config import Recipe
from kaf_model.errors import UserError
from kaf_model.keypoints import KeypointCache
from kaf_model.pretrain import PretrainResult, pretrain
from kaf_model.progress import Progress
from kaf_model.volume_queue import VolumeFiles

RANDOM = "random"
_KAF_STARTS: dict[str, Tree] = {
    "kaf": {},
    "pcl": {"pretrain": {"weight_pcl": 1.0, "weight_global": 0.0, "weight_local": 0.0}},
}
"""Starts that are the paper's pretext with some of its weights (Eq. 3)."""


def start_names() -> list[str]:
    """What a row can give as its start."""
    return [RANDOM, *_KAF_STARTS]


def check_start(name: str) -> None:
    """Check that there is a start of a name.

    Raises:
        UserError: If there is none.
    """
    if name not in start_names():
        raise UserError(f"unknown start {name!r}; choose one of {', '.join(start_names())}")


def start_settings(name: str) -> Tree:
    """The settings that a start brings along."""
    return _KAF_STARTS.get(name, {})


def pretrain_start(
    name: str,
    recipe: Recipe,
    paths: list[Path],
    *,
    reading: dict[str, Any],
    output: Path,
    resume: bool,
    fabric: Fabric,
    cache: KeypointCache,
) -> Generator[Progress, None, PretrainResult]:
    """Pretrain an encoder.

    Args:
        name: Which start.
        recipe: Settings.
        paths: Volumes.
        reading: As for `read_volume`.
        output: Checkpoint file to write.
        resume: Go on with an interrupted pretraining of that output.
        fabric: Where it runs.
        cache: Keypoints found before.
    """
    return (
        yield from pretrain(
            recipe.model,
            VolumeFiles(paths, **reading),
            recipe.pretrain,
            slices=recipe.slices,
            keypoints=recipe.keypoints,
            output=output,
            resume=resume,
            fabric=fabric,
            cache=cache,
        )
    )
