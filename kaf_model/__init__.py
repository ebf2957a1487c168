"""Keypoint-augmented self-supervised segmentation of medical volumes: the engine, without any GUI.

The names below are loaded when first used, so that `import kaf_model` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kaf_model.checkpoint import Checkpoint as Checkpoint
    from kaf_model.checkpoint import ClassLabel as ClassLabel
    from kaf_model.checkpoint import Model as Model
    from kaf_model.checkpoint import load_checkpoint as load_checkpoint
    from kaf_model.checkpoint import load_model as load_model
    from kaf_model.config import AugmentConfig as AugmentConfig
    from kaf_model.config import CorrespondenceConfig as CorrespondenceConfig
    from kaf_model.config import FinetuneConfig as FinetuneConfig
    from kaf_model.config import KeypointConfig as KeypointConfig
    from kaf_model.config import ModelConfig as ModelConfig
    from kaf_model.config import PretrainConfig as PretrainConfig
    from kaf_model.config import Recipe as Recipe
    from kaf_model.config import SegmentConfig as SegmentConfig
    from kaf_model.config import SliceConfig as SliceConfig
    from kaf_model.correspondences import find_correspondences as find_correspondences
    from kaf_model.errors import UserError as UserError
    from kaf_model.evaluate import evaluate_folders as evaluate_folders
    from kaf_model.evaluate import evaluate_volume as evaluate_volume
    from kaf_model.explore.attention_weights import attention_weights as attention_weights
    from kaf_model.explore.equivariance import AugmentedSlice as AugmentedSlice
    from kaf_model.explore.equivariance import EquivarianceError as EquivarianceError
    from kaf_model.explore.equivariance import EquivarianceMaps as EquivarianceMaps
    from kaf_model.explore.equivariance import augment_slice as augment_slice
    from kaf_model.explore.equivariance import equivariance_errors as equivariance_errors
    from kaf_model.explore.equivariance import equivariance_maps as equivariance_maps
    from kaf_model.explore.explorer import Explorer as Explorer
    from kaf_model.explore.matches import LearnedMatches as LearnedMatches
    from kaf_model.explore.matches import learned_matches as learned_matches
    from kaf_model.explore.similarity import LookAlike as LookAlike
    from kaf_model.explore.similarity import SimilarityMap as SimilarityMap
    from kaf_model.explore.similarity import look_alikes as look_alikes
    from kaf_model.explore.similarity import similarity_maps as similarity_maps
    from kaf_model.explore.views import SliceFeatures as SliceFeatures
    from kaf_model.explore.views import VolumeView as VolumeView
    from kaf_model.finetune import FinetuneResult as FinetuneResult
    from kaf_model.finetune import finetune as finetune
    from kaf_model.keypoints import KeypointCache as KeypointCache
    from kaf_model.keypoints import Keypoints as Keypoints
    from kaf_model.keypoints import detect_keypoints as detect_keypoints
    from kaf_model.labels import LabelledVolume as LabelledVolume
    from kaf_model.labels import SliceStatus as SliceStatus
    from kaf_model.phantom import make_heart as make_heart
    from kaf_model.pretrain import PretrainResult as PretrainResult
    from kaf_model.pretrain import pretrain as pretrain
    from kaf_model.progress import Progress as Progress
    from kaf_model.propagation import Propagation as Propagation
    from kaf_model.propagation import propagate as propagate
    from kaf_model.segment import Segmentation as Segmentation
    from kaf_model.segment import segment as segment
    from kaf_model.segment import segment_volume as segment_volume
    from kaf_model.slices import Slices as Slices
    from kaf_model.unet import SegmentationNetwork as SegmentationNetwork
    from kaf_model.unet import build_network as build_network
    from kaf_model.volume import Volume as Volume
    from kaf_model.volume import read_labels as read_labels
    from kaf_model.volume import read_volume as read_volume
    from kaf_model.volume import scan_volumes as scan_volumes
    from kaf_model.volume import write_labels as write_labels
    from kaf_model.volume import write_maps as write_maps

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
    "explore.attention_weights": ("attention_weights",),
    "explore.equivariance": (
        "AugmentedSlice",
        "EquivarianceError",
        "EquivarianceMaps",
        "augment_slice",
        "equivariance_errors",
        "equivariance_maps",
    ),
    "explore.explorer": ("Explorer",),
    "explore.matches": ("LearnedMatches", "learned_matches"),
    "explore.similarity": ("LookAlike", "SimilarityMap", "look_alikes", "similarity_maps"),
    "explore.views": ("SliceFeatures", "VolumeView"),
    "finetune": ("FinetuneResult", "finetune"),
    "keypoints": ("KeypointCache", "Keypoints", "detect_keypoints"),
    "labels": ("LabelledVolume", "SliceStatus"),
    "phantom": ("make_heart",),
    "pretrain": ("PretrainResult", "pretrain"),
    "progress": ("Progress",),
    "propagation": ("Propagation", "propagate"),
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
