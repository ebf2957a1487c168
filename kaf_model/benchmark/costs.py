"""What a network costs: parameters, and operations of one slice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NUM_KEYPOINTS = 128


@dataclass(frozen=True)
class Costs:
    """What a network costs.

    Attributes:
        parameters: Trained numbers.
        gigaflops: Of one slice, multiplications and additions counted each.
        shape: Height and width of that slice.
        keypoints: Its keypoints.
    """

    parameters: int
    gigaflops: float
    shape: tuple[int, int]
    keypoints: int


def costs_of(network: nn.Module, shape: tuple[int, int], *, input_slices: int = 1) -> Costs:
    """Count parameters and operations.

    Args:
        network: Maps images (1, S, H, W), keypoints (1, N, 2) and their validity to logits; left as it was.
        shape: H and W, divisible by 16.
        input_slices: S.
    """
    first = next(network.parameters())
    training = network.training
    network.eval()
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(1, NUM_KEYPOINTS, 2, generator=generator) * (torch.tensor(shape) - 1)
    image = torch.zeros(1, input_slices, *shape)
    # Written out as products: torch does not count its fused attention on CPUs.
    with (
        torch.inference_mode(),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        network(image.to(first.device), points.to(first.device))
    network.train(training)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Costs(parameters, counter.get_total_flops() / 1e9, shape, NUM_KEYPOINTS)
