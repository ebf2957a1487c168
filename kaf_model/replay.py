"""Replaying the forward and the backward pass of a step as one CUDA graph.

A GPU does a step of a small network in a millisecond or two, and Python takes ten to ask for it, kernel by
kernel. Networks whose operations depend on nothing but the shape of the batch are recorded once a shape, and
then asked for at once: the same kernels on the same numbers. (`torch.cuda.make_graphed_callables` records in a mode
in which no other thread may use the GPU, as the viewer's do, and copies each gradient once more.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

_MOST_SHAPES = 4
_WARM_UPS = 3  # before a recording, libraries choose their kernels and make room for themselves


class GradientReplay:
    """Computes the losses and the gradients of a module, recorded once for each shape of its batches.

    Args:
        module: Maps a batch to named losses, one of them "total", by the same operations for all batches of a shape.
        precision: Makes the context that its forward pass runs in.
    """

    def __init__(self, module: nn.Module, precision: Callable[[], AbstractContextManager[object]]) -> None:
        self._module = module
        self._precision = precision
        self._recordings: dict[tuple[object, ...], _Recording] = {}

    def __call__(self, batch: Any) -> dict[str, Tensor] | None:
        """Losses of a batch, with the gradients of the total in the parameters, which had none.

        Returns:
            The losses, valid until the next call; None if there are recordings enough of other shapes.

        Raises:
            RuntimeError: If it cannot be recorded; parameters and statistics are as before.
        """
        inputs = list(_tensors(batch))
        shape = tuple((part.shape, part.stride(), part.dtype) for part in inputs)
        if shape not in self._recordings:
            if len(self._recordings) == _MOST_SHAPES:
                return None
            self._recordings[shape] = self._recorded(batch)
        return self._recordings[shape].replay(inputs)

    def _recorded(self, batch: Any) -> _Recording:
        static = [part.clone() for part in _tensors(batch)]
        rebuilt = _rebuilt(batch, iter(static))
        statistics = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        try:
            graph, losses = recorded(lambda: self._gradients(rebuilt), self._module)
            gradients = [(p, p.grad) for p in self._module.parameters() if p.grad is not None]
        finally:
            self._module.zero_grad(set_to_none=True)
            for buffer, before in statistics:
                buffer.copy_(before)
        return _Recording(graph, static, {k: loss.detach() for k, loss in losses.items()}, gradients)

    def _gradients(self, batch: Any) -> Mapping[str, Tensor]:
        with self._precision():
            mixed, kind = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
            # Weights that were cast before the recording would stay as they were then.
            with torch.autocast("cuda", kind, enabled=mixed, cache_enabled=False):
                losses: Mapping[str, Tensor] = self._module(batch)
        losses["total"].backward()  # type: ignore[no-untyped-call]
        return losses


def recorded(
    gradients: Callable[[], Mapping[str, Tensor]], module: nn.Module
) -> tuple[torch.cuda.CUDAGraph, Mapping[str, Tensor]]:
    """A graph that computes the losses and gradients of a module anew, and the losses that it writes."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UPS):
            gradients()
            module.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(
        graph, capture_error_mode="thread_local"
    ):  # other threads may use the GPU meanwhile
        losses = gradients()
    return graph, losses


class _Recording:
    """A graph with the tensors that it reads and writes."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        inputs: list[Tensor],
        losses: dict[str, Tensor],
        gradients: list[tuple[nn.Parameter, Tensor]],
    ) -> None:
        self._graph = graph
        self._inputs = inputs
        self._losses = losses
        self._gradients = gradients

    def replay(self, inputs: list[Tensor]) -> dict[str, Tensor]:
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._losses


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of nested named tuples."""
    if isinstance(batch, Tensor):
        yield batch
        return
    for part in batch:
        yield from _tensors(part)


def _rebuilt(batch: Any, tensors: Iterator[Tensor]) -> Any:
    """The same nested named tuples of other tensors."""
    if isinstance(batch, Tensor):
        return next(tensors)
    return type(batch)(*(_rebuilt(part, tensors) for part in batch))
