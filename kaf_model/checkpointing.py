"""Activation checkpointing: blocks whose inner activations are computed again in the backward pass, not kept.

It takes a third more time and leaves what comes out the same, running statistics included.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from kaf_model.attention import AttentionBlock
from kaf_model.fusion import KafLayer
from kaf_model.normalization import BatchNorm, recomputation
from kaf_model.unet import Decoder


def checkpoint_activations(network: nn.Module) -> int:
    """Make the attention blocks and the normalised convolution blocks of a network recompute, in place.

    Those of a decoder also recompute what they read: the upsampled map beside the encoder's; those of a KAF layer
    the map that its keypoints are scattered into. Parameters keep their names.

    Returns:
        How many blocks it was.
    """
    decoders = [module for module in network.modules() if isinstance(module, Decoder)]
    fusions = [module for module in network.modules() if isinstance(module, KafLayer)]
    inner = {block for decoder in decoders for block in decoder.blocks} | {one.diffusion for one in fusions}
    blocks = [module for module in network.modules() if _is_block(module) and module not in inner]
    for block in blocks:
        block.forward = _Recomputing(block.forward)
    for decoder in decoders:
        decoder.join = _Recomputing(decoder.join)  # type: ignore[method-assign, assignment]
    for fusion in fusions:
        fusion.spread = _Recomputing(fusion.spread)  # type: ignore[method-assign, assignment]
    return len(blocks) + len(inner)


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, AttentionBlock):
        return True
    layers = list(module) if isinstance(module, nn.Sequential) else []
    return all(any(isinstance(layer, kind) for layer in layers) for kind in (nn.Conv2d, BatchNorm))


class _Recomputing:
    """A forward method that keeps its inputs only."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, *inputs: Any) -> Any:
        return checkpoint(
            self.forward, *inputs, use_reentrant=False, context_fn=_contexts, preserve_rng_state=False
        )


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds the first forward pass, and the one that repeats it."""
    return nullcontext(), recomputation()
