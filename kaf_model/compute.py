"""What networks cost: floating-point operations and peak memory, by torch's own counters (paper, Fig. 5)."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from kaf_model.config import ModelConfig
from kaf_model.engine import generator_for
from kaf_model.errors import UserError
from kaf_model.progress import Progress
from kaf_model.unet import build_network

DEVICES = ("cpu", "cuda")  # whose peak memory is counted
KAF_UNET, SWIN_UNETR = "KAF-UNet", "SwinUNETR"
_SWIN_STAGES = 4
_SWIN_CHANNELS = 48  # as published
_SWIN_DIVISOR = 32


@dataclass(frozen=True)
class Cost:
    """What one slice costs a network.

    Attributes:
        network: "KAF-UNet" or "SwinUNETR".
        blocks: Attention blocks in the whole network.
        edge: Height and width of the slice in pixels.
        gflops: Floating-point operations, 10^9; a multiplication with an addition counts as two.
        memory_mib: Weights, and the most that was allocated at a time beyond them, in MiB.
        parameters: Trained numbers.
    """

    network: str
    blocks: int
    edge: int
    gflops: float
    memory_mib: float
    parameters: int


def measure_costs(
    config: ModelConfig,
    *,
    edges: Sequence[int],
    blocks: Sequence[int],
    num_keypoints: int = 400,
    training: bool = False,
    device: torch.device | str = "cpu",
) -> Generator[Progress, None, list[Cost]]:
    """Measure the KAF-UNet and a 2-D SwinUNETR of MONAI's parts on one square slice of several sizes.

    Attention blocks are spread evenly: over the levels with a KAF layer, and over the four stages of the
    SwinUNETR, whose feature size is the published 48.

    Args:
        config: The KAF-UNet, but for its number of attention blocks.
        edges: Heights and widths in pixels, from 64 on, divisible by 32.
        blocks: Numbers of attention blocks in the whole network.
        num_keypoints: Keypoints of the slice.
        training: Measure a forward and a backward pass instead of a forward pass.
        device: Where to measure.

    Yields:
        One report a measurement.

    Returns:
        The costs: for each number of blocks the KAF-UNet at all edges, then the SwinUNETR.

    Raises:
        UserError: If an edge or a number of blocks does not divide, or the device counts no memory.
    """
    _check(config, edges, blocks)
    device = torch.device(device)
    if device.type not in DEVICES:
        raise UserError(
            f"peak memory is counted on {' and '.join(DEVICES)}, not on {device.type}; use --device cpu"
        )
    costs: list[Cost] = []
    total = 2 * len(blocks) * len(edges)
    for count in blocks:
        for name, build in ((KAF_UNET, _kaf_unet), (SWIN_UNETR, _swin_unetr)):
            network = build(config, count).to(device).train(training)
            for edge in edges:
                inputs = _inputs(name, (config.input_slices, edge, edge), num_keypoints, device)
                flops, peak = measure(network, inputs, training=training)
                parameters = sum(one.numel() for one in network.parameters())
                weights = sum(one.numel() * one.element_size() for one in network.parameters())
                costs.append(Cost(name, count, edge, flops / 1e9, (weights + peak) / 2**20, parameters))
                yield Progress("measuring", len(costs), total)
    return costs


def measure(network: nn.Module, inputs: Sequence[Tensor], *, training: bool) -> tuple[int, int]:
    """Count the operations of one pass, and the bytes it allocates at most at a time.

    The operations of attention are counted as its two matrix products, for torch does not count its fused
    kernel on CPUs. On a GPU bytes are those of torch.cuda's counters, on a CPU those of torch's profiler.

    Returns:
        Operations and bytes; gradients of the weights count, the weights and inputs do not.
    """

    def once() -> None:
        with torch.set_grad_enabled(training):
            output: Tensor = network(*inputs)
            if training:
                torch.autograd.backward(output.float().square().mean())

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        once()
    network.zero_grad(set_to_none=True)
    peak = peak_bytes(once, inputs[0].device)
    network.zero_grad(set_to_none=True)
    return int(counter.get_total_flops()), peak


def peak_bytes(once: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that a call holds at a time, beyond those that are there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        once()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces itself
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        once()
    assert profiler.profiler is not None
    recorded: Any = profiler.profiler.kineto_results
    events = [event for event in recorded.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def _kaf_unet(config: ModelConfig, blocks: int) -> nn.Module:
    return build_network(config.override(attention_blocks=blocks // len(config.kaf_levels)))


def _swin_unetr(config: ModelConfig, blocks: int) -> nn.Module:
    from kaf_model.swin import DEPTHS, SwinEncoder

    published = config.override(architecture="swin-unetr", start_channels=_SWIN_CHANNELS)
    network = build_network(published)
    network.encoder = SwinEncoder(published, depths=[blocks // len(DEPTHS)] * len(DEPTHS))
    return network


def _inputs(name: str, shape: tuple[int, int, int], num_keypoints: int, device: torch.device) -> list[Tensor]:
    edge = shape[-1]
    generator = generator_for(edge, num_keypoints)
    image = torch.randn(1, *shape, generator=generator).to(device)
    if name == SWIN_UNETR:
        return [image]
    return [image, (torch.rand(1, num_keypoints, 2, generator=generator) * (edge - 1)).to(device)]


def _check(config: ModelConfig, edges: Sequence[int], blocks: Sequence[int]) -> None:
    if config.architecture != "kaf-unet":
        raise UserError(f"costs are those of a kaf-unet, got {config.architecture}; choose another preset")
    wrong = [edge for edge in edges if edge < 2 * _SWIN_DIVISOR or edge % _SWIN_DIVISOR]
    if wrong:
        raise UserError(
            f"the SwinUNETR wants edges from {2 * _SWIN_DIVISOR} that divide by {_SWIN_DIVISOR}, got {wrong[0]}"
        )
    levels = len(config.kaf_levels)
    uneven = [count for count in blocks if count < 1 or count % levels or count % _SWIN_STAGES]
    if uneven:
        raise UserError(
            f"attention blocks are spread over {levels} KAF layers and {_SWIN_STAGES} Swin stages, so their number "
            f"must divide by both; got {uneven[0]}"
        )
