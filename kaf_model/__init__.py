"""Keypoint-augmented self-supervised segmentation of medical volumes: the engine, without any GUI.

The names below are loaded when first used, so that `import kaf_model` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kaf_model.checkpoint import Checkpoint, ClassLabel, Model, load_checkpoint, load_model
    from kaf_model.config import (
        AugmentConfig,
        CorrespondenceConfig,
        FinetuneConfig,
        KeypointConfig,
        ModelConfig,
        PretrainConfig,
        Recipe,
        SegmentConfig,
        SliceConfig,
    )
    from kaf_model.correspondences import find_correspondences
    from kaf_model.errors import UserError
    from kaf_model.evaluate import evaluate_folders, evaluate_volume
    from kaf_model.finetune import FinetuneResult, finetune
    from kaf_model.keypoints import KeypointCache, Keypoints, detect_keypoints
    from kaf_model.labels import LabelledVolume, SliceStatus
    from kaf_model.phantom import make_heart
    from kaf_model.pretrain import PretrainResult, pretrain
    from kaf_model.progress import Progress
    from kaf_model.segment import Segmentation, segment, segment_volume
    from kaf_model.slices import Slices
    from kaf_model.unet import SegmentationNetwork, build_network
    from kaf_model.volume import Volume, read_labels, read_volume, scan_volumes, write_labels, write_maps

_HOME = {
    "checkpoint": ("Checkpoint", "ClassLabel", "Model", "load_checkpoint", "load_model"),
    "config": (
        "AugmentConfig",
        "CorrespondenceConfig",
        "FinetuneConfig",
        "KeypointConfig",
        "ModelConfig",
        "PretrainConfig",
        "Recipe",
        "SegmentConfig",
        "SliceConfig",
    ),
    "correspondences": ("find_correspondences",),
    "errors": ("UserError",),
    "evaluate": ("evaluate_folders", "evaluate_volume"),
    "finetune": ("FinetuneResult", "finetune"),
    "keypoints": ("KeypointCache", "Keypoints", "detect_keypoints"),
    "labels": ("LabelledVolume", "SliceStatus"),
    "phantom": ("make_heart",),
    "pretrain": ("PretrainResult", "pretrain"),
    "progress": ("Progress",),
    "segment": ("Segmentation", "segment", "segment_volume"),
    "slices": ("Slices",),
    "unet": ("SegmentationNetwork", "build_network"),
    "volume": ("Volume", "read_labels", "read_volume", "scan_volumes", "write_labels", "write_maps"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kaf_model' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kaf_model.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
