"""Layers that are torch's own but for a backward pass that takes less time, or less memory, on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

_MOST_PIXELS = 1024


class Convolution(nn.Conv2d):
    """Convolves a map with kernels of 3 x 3; the gradient of the kernels of small maps is fast in bfloat16 on CPUs."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H, W)."""
        if not (self.weight.requires_grad and torch.is_grad_enabled() and _by_product(input)):
            return super().forward(input)
        assert self.bias is not None
        parts = (part.to(torch.bfloat16) for part in (input, self.weight, self.bias))
        convolved: Tensor = _ConvolutionByProduct.apply(*parts)  # type: ignore[no-untyped-call]
        return convolved


def _by_product(features: Tensor) -> bool:
    """Whether the gradient of the kernels is better one matrix product, as measured (`benchmarks/NOTES.md`)."""
    if features.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    if torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    pixels = features.shape[0] * features.shape[2] * features.shape[3]
    return pixels <= min(_MOST_PIXELS, 4 * features.shape[1])


class _ConvolutionByProduct(torch.autograd.Function):
    """The gradient of 3 x 3 kernels as one matrix product with the neighbourhoods of all pixels.

    oneDNN takes two to seven times as long for it where a map has few pixels for its channels.
    """

    @staticmethod
    def forward(context: Any, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        context.save_for_backward(features, weight)
        return torch.conv2d(features, weight, bias, padding=1)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, weight = context.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        of_features, _, _ = torch.ops.aten.convolution_backward(
            gradient, features, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
        )
        rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # (B H W, D)
        of_weight = rows.T @ _neighbourhoods(features)
        of_weight = of_weight.view(len(weight), 3, 3, features.shape[1]).permute(0, 3, 1, 2)
        return of_features, of_weight, rows.sum(0)


def _neighbourhoods(features: Tensor) -> Tensor:
    """The 3 x 3 pixels about each pixel, zeros beyond the map: (B, C, H, W) -> (B H W, 9 C)."""
    batch, channels, height, width = features.shape
    padded = functional.pad(features.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    row = (width + 2) * channels
    # Three pixels of a row lie side by side, so that they are copied at once.
    windows = padded.as_strided(
        (batch, height, width, 3, 3 * channels), ((height + 2) * row, row, channels, row, 1)
    )
    return windows.reshape(-1, 9 * channels)


class Upsample(nn.ConvTranspose2d):
    """Doubles height and width by a transposed convolution of 2 x 2, whose backward pass is fast on CPUs."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels, 2, stride=2)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, D, 2 H, 2 W)."""
        if input.device.type != "cpu":
            return super().forward(input, output_size)
        assert self.bias is not None
        parts: tuple[Tensor, ...] = (input, self.weight, self.bias)
        if torch.is_autocast_enabled("cpu"):
            parts = tuple(part.to(torch.get_autocast_dtype("cpu")) for part in parts)
        upsampled: Tensor = _UpsampleOnCpu.apply(*parts)  # type: ignore[no-untyped-call]
        return upsampled


class _UpsampleOnCpu(torch.autograd.Function):
    """The gradients of a transposed convolution as those of the convolution that it transposes.

    oneDNN takes two to three times as long for its own backward pass of transposed convolutions.
    """

    @staticmethod
    def forward(context: Any, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        context.save_for_backward(features, weight)
        return torch.conv_transpose2d(features, weight, bias, stride=2)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, weight = context.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        grad_weight: Tensor = conv2d_weight(gradient, weight.shape, features, stride=2)  # type: ignore[no-untyped-call]
        return torch.conv2d(gradient, weight, stride=2), grad_weight, gradient.sum((0, 2, 3))


class Halve(nn.Module):
    """Maximum of 2 x 2 pixels; where it was is found again in the backward pass, from a map that is kept anyway."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) of even H and W -> (B, C, H / 2, W / 2)."""
        halved: Tensor = _HalveAndFindAgain.apply(features)  # type: ignore[no-untyped-call]
        return halved


class _HalveAndFindAgain(torch.autograd.Function):
    """Max pooling that keeps its input instead of an index of 8 bytes a pixel."""

    @staticmethod
    def forward(context: Any, features: Tensor) -> Tensor:
        context.save_for_backward(features)
        return functional.max_pool2d(features, 2)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        (features,) = context.saved_tensors
        _, where = functional.max_pool2d_with_indices(features, [2, 2])
        found: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            gradients[0], features, [2, 2], [2, 2], [0, 0], [1, 1], False, where
        )
        return found
