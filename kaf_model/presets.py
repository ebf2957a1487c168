"""Named settings: those that a preset changes from the defaults, by section and field.

Presets named after the paper reproduce its published settings.
"""

from __future__ import annotations

from typing import Any, Literal

PresetName = Literal["small", "base", "paper-acdc", "paper-chd"]
PRESETS: tuple[PresetName, ...] = ("small", "base", "paper-acdc", "paper-chd")

AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "strong": {},
    "paper": {
        "crop": (352, 352),
        "spatial_probability": 0.67,
        "mirror": True,
        "rotation": 180.0,
        "scale": (0.7, 1.3),
        "elastic_alpha": (100.0, 350.0),
        "elastic_sigma": (14.0, 17.0),
        "intensity_probability": 0.0,
    },
    "none": {"spatial_probability": 0.0, "intensity_probability": 0.0},
}
"""Named ranges of the augmentation."""


def preset_values(part: str, name: str, *, gpu: bool = False) -> dict[str, Any]:
    """Return what a preset says of a section; "fresh" is what it changes of "model" for a finetuning without a start.

    Args:
        part: The section.
        name: The preset.
        gpu: Whether an NVIDIA GPU trains, for which some presets say something else.

    Raises:
        ValueError: If there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    values: dict[str, Any] = _PRESETS[name].get(part, {})
    return {**values, **_ON_A_GPU.get(name, {}).get(part, {})} if gpu else values


_PUBLISHED_MODEL = {
    "kaf_levels": (1, 2, 3, 4),
    "embedding_width": 256,
    "heads": 4,
    "attention_blocks": 12,
    "position_reference": None,
}
_PUBLISHED_PRETRAIN = {
    "steps": None,
    "epochs": 50,
    "batch_size": 32,
    "optimizer": "sgd",
    "learning_rate": 0.002,
    "warmup": 0.0,
    "weight_decay": 1e-5,
    "gradient_clip": None,
    "contrastive_scale": 0.1 / 0.07,
    "normalised_head": False,
}
_PUBLISHED_FINETUNE = {
    "steps": None,
    "batch_size": 10,
    "foreground": 0.0,
    "optimizer": "adam",
    "learning_rate_floor": 0.1,
    "warmup": 0.0,
    "weight_decay": 1e-5,
    "gradient_clip": None,
    "loss": "cross-entropy",
    "averaging": 0.0,
    "pseudo_labels": {"share": 0.0},
}
_PUBLISHED_SEGMENT = {
    "largest_component": "none",
    "propagation": 0.0,
    "registration": 0.0,
    "orientation": "fixed",
}

_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "model": {"position_reference": 128.0, "decoder": "narrow"},
        "fresh": {"architecture": "unet", "start_channels": 8},
        # A slice's place along the body shows only in a wide view: small crops taught nothing.
        "pretrain": {
            "batch_size": 12,
            "learning_rate": 1e-3,
            "sinkhorn_iterations": 30,
            "augment": {"scale": (0.5, 0.9), "rotation": 20.0, "elastic_alpha": (0.0, 150.0)},
        },
        # In the same time many small steps teach far more than few large ones.
        "finetune": {"batch_size": 4, "steps": 3000, "early_crop": (64, 64)},
    },
    "base": {
        "slices": {"spacing": 1.25},
        "model": {
            "start_channels": 32,
            "kaf_levels": (2, 3, 4),
            "embedding_width": 128,
            "attention_blocks": 6,
            "decoder": "narrow",
            "position_reference": 192.0,
        },
        "pretrain": {"batch_size": 32, "steps": 10_000, "augment": {"crop": (192, 192)}},
        "finetune": {"steps": 4000, "augment": {"crop": (192, 192)}},
    },
    "paper-acdc": {
        "slices": {"spacing": 1.25, "clip_percentiles": (0.0, 100.0), "context": 0},
        # That of the padded slices it was trained on, so that whole slices of another size have the same positions.
        "model": {**_PUBLISHED_MODEL, "start_channels": 48, "num_classes": 4, "position_reference": 352.0},
        "pretrain": {
            **_PUBLISHED_PRETRAIN,
            "position_threshold": 0.35,
            "neighbour_range": 0.18,
            "augment": AUGMENTATIONS["paper"],
        },
        "finetune": {
            **_PUBLISHED_FINETUNE,
            "epochs": 200,
            "learning_rate": 5e-4,
            "augment": AUGMENTATIONS["paper"],
        },
        "segment": _PUBLISHED_SEGMENT,
    },
    "paper-chd": {
        "slices": {"spacing": None, "context": 0},
        "model": {**_PUBLISHED_MODEL, "start_channels": 32, "num_classes": 8},
        "pretrain": {
            **_PUBLISHED_PRETRAIN,
            "position_threshold": 0.1,
            "neighbour_range": 0.05,
            "augment": {**AUGMENTATIONS["paper"], "crop": (512, 512)},
        },
        "finetune": {
            **_PUBLISHED_FINETUNE,
            "epochs": 100,
            "learning_rate": 5e-5,
            "augment": {**AUGMENTATIONS["none"], "crop": None},
        },
        "segment": _PUBLISHED_SEGMENT,
    },
}

# Small networks, batches and crops are for CPUs: a GPU takes as long for larger ones, which learn more in a step.
_ON_A_GPU: dict[str, dict[str, dict[str, Any]]] = {
    "small": {"fresh": {"start_channels": 16}, "finetune": {"batch_size": 12, "early_crop": None}},
}
