"""Our own network by the plain path: the same maths with every shortcut off.

Float32, channels first; the diffusion convolves a dense map; attention is padded under masks; the transposed
convolution has torch's own gradients; each Sinkhorn iteration is stored for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from kaf_model import attention, fusion, layers, matching, normalization
from kaf_model.attention import PackedKeypoints, attend_padded


@contextmanager
def plain_path() -> Iterator[None]:
    """Make every network that runs inside the block take the plain path."""
    with (
        mock.patch.object(attention, "attend", attend_padded),
        mock.patch.object(fusion, "keypoint_convolution", dense_convolution),
        mock.patch.object(normalization, "_pixels_beside", return_value=1),
        mock.patch.object(layers, "_by_product", return_value=False),
        mock.patch.object(layers.Upsample, "forward", nn.ConvTranspose2d.forward),
        mock.patch.object(matching, "log_optimal_transport", padded_transport),
        mock.patch.object(matching, "_LogSinkhorn", StoredSinkhorn),
    ):
        yield


def dense_convolution(
    convolution: nn.Module, rows: Tensor, cells: Tensor, keypoints: PackedKeypoints, size: tuple[int, int]
) -> Tensor:
    """`keypoint_convolution` of a dense map with its channels first."""

    def channels_first(scattered: Tensor) -> Tensor:
        spread: Tensor = convolution(scattered.contiguous())
        return spread

    return fusion.dense_convolution(channels_first, rows, cells, keypoints, size)


def padded_transport(
    scores: Tensor, bin_score: Tensor, valid0: Tensor, valid1: Tensor, *, iterations: int, tolerance: float
) -> Tensor:
    """`log_optimal_transport` for all pairs at once under masks."""
    return matching._transport_padded(
        scores.float(), bin_score.float(), valid0, valid1, iterations, tolerance
    )


class StoredSinkhorn:
    """The potentials of the transport, every iteration kept for the backward pass."""

    @staticmethod
    def apply(
        costs: Tensor, log_rows: Tensor, log_columns: Tensor, iterations: int, *_: Any
    ) -> tuple[Tensor, Tensor]:
        """As `matching._LogSinkhorn.apply`."""
        rows, columns = torch.zeros_like(log_rows), torch.zeros_like(log_columns)
        for _step in range(iterations):
            rows = log_rows - torch.logsumexp(costs + columns[:, None, :], dim=2)
            columns = log_columns - torch.logsumexp(costs + rows[:, :, None], dim=1)
        return rows, columns
