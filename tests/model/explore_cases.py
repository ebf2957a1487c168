"""Small networks and volumes to look into."""

import numpy as np
import torch

from kaf_model.checkpoint import Checkpoint
from kaf_model.config import KeypointConfig, PretrainConfig, Recipe, SliceConfig
from kaf_model.explore.explorer import Explorer
from kaf_model.phantom import make_heart
from kaf_model.pretrain import PretrainingNetwork
from kaf_model.volume import Volume

SHAPE = (4, 41, 60)


def tiny_recipe(architecture="kaf-unet", spacing=None):
    recipe = Recipe.preset("small")
    model = recipe.model.override(
        architecture=architecture,
        start_channels=4,
        embedding_width=8,
        heads=2,
        attention_blocks=2,
        kaf_levels=(2, 4),
    )
    return recipe.override(
        model=model,
        slices=SliceConfig(spacing=spacing),
        keypoints=KeypointConfig(contrast_threshold=0.01),
        pretrain=recipe.pretrain.override(projection_width=8, sinkhorn_iterations=20, matching_rounds=1),
    )


def heart(shape=SHAPE, spacing=(8.0, 3.0, 3.0), seed=3):
    phantom = make_heart(seed, shape=shape, spacing=spacing)
    return Volume.from_array(phantom.image, phantom.spacing, name="heart")


def constant(value=7.0):
    return Volume.from_array(np.full(SHAPE, value, np.float32), name="constant")


def pretrained_checkpoint(**training):
    """A pretraining checkpoint with weights that are random, normalisation included."""
    recipe = tiny_recipe()
    config = PretrainConfig.model_validate({**recipe.pretrain.model_dump(), **training})
    torch.manual_seed(5)
    network = PretrainingNetwork(recipe.model, config)
    for name, value in network.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    names = [name for name in ("pcl", "global", "local") if getattr(config, f"weight_{name}")]
    record = {
        "stage": "pretraining",
        "date": "2026-01-01T00:00:00+00:00",
        "steps": 7,
        "seconds": 1.0,
        "losses": dict.fromkeys(["total", *names], 1.0),
        "settings": config.model_dump(mode="json"),
    }
    return Checkpoint(
        "pretrained", network.state_dict(), recipe.model, recipe.slices, recipe.keypoints, history=(record,)
    )


def pretrained(**training):
    return Explorer.from_checkpoint(pretrained_checkpoint(**training))
