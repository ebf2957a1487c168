"""Batch normalisation whose statistics are those of the joint batch of all processes.

Parameters and buffers have the names of torch's own layers, so weights load either way. torch's
SyncBatchNorm needs a GPU; these run on gloo too, so that training on many machines can be tested on one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kaf_model.precision import full_precision

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
        beside = _pixels_beside(input) if self.training else 1
        if self.training and (is_distributed() or beside > 1):
            return self._forward_joint(input, beside)
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

    def _forward_joint(self, input: Tensor, beside: int) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        with full_precision(input.device):
            mean, variance, count = _joint_statistics(_rows(input, beside), beside)
            if count < 2:
                return _affine(input, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
            momentum = self._share_of_batch
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1), momentum)
            normalised: Tensor = _JointBatchNorm.apply(  # type: ignore[no-untyped-call]
                input, self.weight, self.bias, mean, variance, count, self.eps, beside
            )
        return normalised


_LANES = {"AVX512": 16, "AVX2": 8}
"""Numbers in float32 that a CPU takes at a time."""

_LINE = 16
"""Numbers in float32 of a line of a CPU's cache."""


def _pixels_beside(input: Tensor) -> int:
    """How many pixels of a map are normalised side by side, as if theirs were channels of one.

    torch's kernels for CPUs take a vector of channels at a time. Narrower maps, and the last few channels of others,
    they do one by one: 8 channels take seven times as long on AVX512. Each of several threads adds up the statistics of
    its pixels, beside those of the others: where two share a line of the cache they wait for each other.
    """
    lanes = _LANES.get(torch.backends.cpu.get_cpu_capability(), 1)
    if torch.get_num_threads() > 1:
        lanes = max(lanes, _LINE)
    if input.device.type != "cpu" or input.dim() != 4 or input.shape[1] % lanes == 0:
        return 1
    beside = 2 * lanes // math.gcd(2 * lanes, input.shape[1])
    pixels = input.numel() // input.shape[1]
    foldable = pixels > 0 and pixels % beside == 0 and input.is_contiguous(memory_format=torch.channels_last)
    return beside if foldable else 1


def _rows(input: Tensor, beside: int) -> Tensor:
    """A map (B, C, H, W) in channels-last memory as rows (B H W / beside, beside C); as it is where `beside` is 1."""
    if beside == 1:
        return input
    return input.permute(0, 2, 3, 1).reshape(-1, beside * input.shape[1])


def _unfolded(rows: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_rows`."""
    if rows.shape == shape:
        return rows
    return rows.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)


@torch.no_grad()
def _joint_statistics(input: Tensor, beside: int = 1) -> tuple[Tensor, Tensor, float]:
    """Mean and variance of each channel over all processes, and how many values a channel has: one exchange.

    `input` has `beside` pixels in each row; its channels are those of one pixel after those of another.
    """
    values = input.numel() // input.shape[1]
    own = torch.zeros(3, input.shape[1], device=input.device)  # counts, means and variances
    if values:
        scratch = torch.zeros(2, input.shape[1], device=input.device)  # without it half precision stays half
        mean, variance = torch.batch_norm_update_stats(input, scratch[0], scratch[1], 0.0)
        own = torch.stack([torch.full_like(mean, values), mean, variance])
    by_pixel = own.view(3, beside, -1).transpose(0, 1)
    counts, means, variances = gather_over_ranks(by_pixel).unbind(1)  # (ranks * beside, C) each
    count = counts.sum(0).clamp(min=1)
    mean = (counts * means).sum(0) / count
    variance = (counts * (variances + (means - mean).square())).sum(0) / count
    return mean, variance, float(counts[:, 0].sum())


def _affine(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Batch normalisation by given statistics."""
    if not input.numel():  # torch's kernels divide by the number of values
        shape = [1, -1] + [1] * (input.dim() - 2)
        return input * weight.view(shape) + bias.view(shape)
    return functional.batch_norm(input, mean, variance, weight, bias, eps=eps)


class _JointBatchNorm(torch.autograd.Function):
    """Normalisation by joint statistics, with torch's kernels for fixed ones and what they leave out added.

    The gradient through the statistics is that of batch normalisation: the means of the gradients, and of
    their products with the normalised values, over all processes and over the pixels that lie beside each other.
    """

    @staticmethod
    def forward(
        context: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: float,
        eps: float,
        beside: int,
    ) -> Tensor:
        rows = _rows(input, beside)
        weight, bias, mean, variance = (value.repeat(beside) for value in (weight, bias, mean, variance))
        context.save_for_backward(rows, weight, mean, variance)
        context.count, context.eps, context.beside = count, eps, beside
        if beside == 1:
            return _affine(input, mean, variance, weight, bias, eps)
        normalised = torch.empty_like(
            input
        )  # written to through its rows: a view could not be changed in place
        outputs = (_rows(normalised, beside), mean.new_empty(0), mean.new_empty(0))
        torch.native_batch_norm(rows, weight, bias, mean, variance, False, 0.0, eps, out=outputs)
        return normalised

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, variance = context.saved_tensors
        beside, shape = context.beside, gradients[0].shape
        gradient = _rows(gradients[0], beside)
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        if rows.numel():
            gradient, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                gradient, rows, weight, mean, variance, None, None, False, context.eps, [True, True, True]
            )
        own = torch.stack([of_weight, of_bias]).view(2, beside, -1).sum(1)
        joint = own.clone()
        if is_distributed():
            torch.distributed.all_reduce(joint)
        of_products, of_gradients = (joint / context.count).repeat(1, beside)
        slope = weight * torch.rsqrt(variance + context.eps) * of_products
        offset = weight * torch.rsqrt(variance + context.eps) * of_gradients
        left_out = _affine(rows, mean, variance, slope, offset, context.eps)
        return _unfolded(gradient - left_out, shape), own[0], own[1], None, None, None, None, None
