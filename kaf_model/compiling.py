"""Compiling the blocks of a network by `torch.compile`, each kind once for all blocks of it.

What lies between the matrix products, convolutions and attentions of a block becomes a few kernels: on a GPU
half of the time of a step goes into moving maps through memory for normalisation and activation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo
from torch import nn

from kaf_model.attention import AttentionBlock
from kaf_model.fusion import KafLayer
from kaf_model.normalization import BatchNorm

_VARIANTS = 64
"""Shapes and widths of a block that are compiled at most; torch gives up after eight."""


def compile_blocks(network: nn.Module, **options: Any) -> int:
    """Compile convolution blocks, attention blocks and diffusions of a network in place, when they first run.

    Args:
        network: Any network of these; parameters keep their names.
        options: Of `torch.compile`.

    Returns:
        How many there are.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    count = 0
    for module in network.modules():
        if isinstance(module, AttentionBlock):
            module.update = torch.compile(module.update, dynamic=True, **options)  # type: ignore[method-assign]
        elif isinstance(module, KafLayer):
            module.diffuse = torch.compile(module.diffuse, **options)  # type: ignore[method-assign]
        elif isinstance(module, nn.Sequential) and _is_convolution_block(module):
            module.forward = torch.compile(module.forward, **options)  # type: ignore[method-assign]
        else:
            continue
        count += 1
    return count


def _is_convolution_block(block: nn.Sequential) -> bool:
    kinds = [type(layer) for layer in block]
    return kinds[:2] == [nn.Conv2d, BatchNorm] and nn.LeakyReLU in kinds
