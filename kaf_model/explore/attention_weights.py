"""What keypoints attend to: the softmax weights of the attention blocks of a KAF layer (paper, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from kaf_model.attention import AttentionBlock
from kaf_model.explore.explorer import Explorer
from kaf_model.explore.views import SliceFeatures


def attention_weights(
    explorer: Explorer, features: SliceFeatures, level: int, block: int, head: int | None = None
) -> Tensor:
    """The weights with which each keypoint of a slice attended to the others in the forward pass.

    They are computed anew from what the block read, with the block's own queries and keys.

    Args:
        explorer: The network.
        features: What it made of the slice.
        level: A level with a KAF layer, 1 the finest.
        block: The attention block, from 0.
        head: The head, from 0; None is the mean of all.

    Returns:
        (N, N): row i holds what keypoint i attends to, and sums to 1.

    Raises:
        ValueError: If there is no such level, block or head.
    """
    layer = explorer.kaf_layer(level)
    if not 0 <= block < len(layer.attention):
        raise ValueError(f"level {level} has attention blocks 0 to {len(layer.attention) - 1}, got {block}")
    chosen = layer.attention[block]
    assert isinstance(chosen, AttentionBlock)
    if head is not None and not 0 <= head < chosen.heads:
        raise ValueError(f"attention blocks have heads 0 to {chosen.heads - 1}, got {head}")
    with torch.no_grad():
        weights = chosen.weights(features.attention_inputs[level][block])  # (heads, N, N)
    return weights.mean(0) if head is None else weights[head]
