"""Batch normalisation whose statistics are those of the joint batch of all processes.

Parameters and buffers have the names of torch's own layers, so weights load either way. torch's
SyncBatchNorm needs a GPU; these run on gloo too, so that training on many machines can be tested on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_recomputed: ContextVar[bool] = ContextVar("recomputed", default=False)


@contextmanager
def recomputation() -> Iterator[None]:
    """Leave running statistics alone inside the block: it repeats a forward pass that has changed them."""
    token = _recomputed.set(True)
    try:
        yield
    finally:
        _recomputed.reset(token)


def is_distributed() -> bool:
    """Whether this process trains together with others."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum a tensor over all processes, gradients included; the tensor itself when there is one."""
    if not is_distributed():
        return value
    summed: Tensor = _Sum.apply(value)  # type: ignore[no-untyped-call]
    return summed


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, gradients included; the tensor itself when there is one."""
    if not is_distributed():
        return value
    return sum_over_ranks(value) / torch.distributed.get_world_size()


def gather_over_ranks(value: Tensor) -> Tensor:
    """Concatenate a tensor's rows over all processes in rank order, gradients included.

    Shape: (N, ...) of the same N on each process -> (N * world size, ...).
    """
    if not is_distributed():
        return value
    gathered: Tensor = _Gather.apply(value)  # type: ignore[no-untyped-call]
    return gathered


class _Sum(torch.autograd.Function):
    """What is summed forward is used on every process, so its gradients are summed backward."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        summed = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed)
        return summed


class _Gather(torch.autograd.Function):
    """Every process reads all rows, so each row's gradients are summed over processes backward."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        context.num_rows = len(value)
        value = value.contiguous()
        parts = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, value)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed)
        start = torch.distributed.get_rank() * context.num_rows
        return summed[start : start + context.num_rows]


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation of maps (B, C, H, W) or packed keypoints (T, C), joint over processes.

    With fewer than two values a channel there is no variance to normalise by: then, as at inference,
    the running statistics are used. Zero keypoints are an ordinary input.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"expected (B, C, H, W) or (T, C), got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel.

        Shape: (B, C, H, W) or (T, C) -> the same.
        """
        self._check_input_dim(input)
        if self.training and is_distributed():
            return self._forward_joint(input)
        values = input.numel() // input.shape[1]
        return functional.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training and values > 1,
            momentum=self._share_of_batch,
            eps=self.eps,
        )

    @property
    def _share_of_batch(self) -> float:
        """Share of a batch in the running statistics."""
        return 0.0 if _recomputed.get() else self.momentum or 0.0

    def _forward_joint(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        maps = input.float()
        axes = [axis for axis in range(maps.dim()) if axis != 1]
        shape = [1, -1] + [1] * (maps.dim() - 2)
        count = sum_over_ranks(maps.new_tensor([maps.numel() / maps.shape[1]]))
        if count < 2:
            mean, variance = self.running_mean, self.running_var
        else:
            mean = sum_over_ranks(maps.sum(axes)) / count
            variance = sum_over_ranks((maps - mean.view(shape)).square().sum(axes)) / count
            with torch.no_grad():
                momentum = self._share_of_batch
                self.running_mean.lerp_(mean.detach(), momentum)
                self.running_var.lerp_(variance.detach() * count / (count - 1), momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        normalised = (maps - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)
