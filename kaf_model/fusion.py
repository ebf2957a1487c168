"""The keypoint-augmented fusion (KAF) layer (paper, section 3.1).

Gather features at the keypoints, let the keypoints attend to each other, scatter what they learned
back into an empty map, diffuse it with two convolutions, and concatenate it with the features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kaf_model.attention import AttentionBlock, PackedKeypoints, PositionEncoder
from kaf_model.geometry import level_cells
from kaf_model.normalization import BatchNorm


class KafLayer(nn.Module):
    """Augments a feature map with attention among its keypoints.

    Args:
        channels: Channels of the feature map and of the map that is added to it.
        width: Width E of the keypoint embeddings.
        heads: Heads of each attention block.
        attention_blocks: Number of self-attention blocks.
        diffusion_channels: Channels between the two diffusion convolutions.
        level: Pyramid level of the map: its pixels are 2 ** level input pixels wide.
        position_reference: Length in input pixels that scales positions; None takes the map's longer side.
        start: Factor on the weights that the last convolution starts from.
    """

    def __init__(
        self,
        channels: int,
        *,
        width: int,
        heads: int,
        attention_blocks: int,
        diffusion_channels: int,
        level: int,
        position_reference: float | None,
        start: float = 1.0,
    ) -> None:
        super().__init__()
        self.level = level
        self.position_reference = position_reference
        self.projection = nn.Linear(channels, width)
        self.position_encoder = PositionEncoder(width)
        self.attention = nn.ModuleList(AttentionBlock(width, heads=heads) for _ in range(attention_blocks))
        self.diffusion = nn.Sequential(
            nn.Conv2d(width, diffusion_channels, 3, padding=1),
            BatchNorm(diffusion_channels),
            nn.ReLU(),
            nn.Conv2d(diffusion_channels, channels, 3, padding=1),
        )
        for parameter in self.diffusion[-1].parameters():
            parameter.data.mul_(start)

    def forward(self, features: Tensor, keypoints: PackedKeypoints) -> tuple[Tensor, Tensor]:
        """Fuse keypoint attention into a feature map.

        Args:
            features: (B, C, H, W)
            keypoints: T keypoints of the B slices, in input pixels.

        Returns:
            The fused map (B, 2C, H, W), and U^l, the keypoint features (T, E).
        """
        height, width = features.shape[-2:]
        cells = level_cells(keypoints.positions, self.level, height, width)
        features, gathered = _gather(features, _flat_index(cells, keypoints, height, width))
        embeddings = self._embed(gathered, cells, (height, width))
        for block in self.attention:
            embeddings = block(embeddings, keypoints)
        spread = self.spread(embeddings, cells, keypoints, (height, width))
        return torch.cat([features, spread.to(features.dtype)], dim=1), embeddings

    def spread(
        self, embeddings: Tensor, cells: Tensor, keypoints: PackedKeypoints, size: tuple[int, int]
    ) -> Tensor:
        """Scatter keypoint features (T, E) into an empty map at their cells (T, 2) and diffuse it: (B, C, H, W)."""
        first, normalise, activate, second = self.diffusion
        narrow = keypoint_convolution(first, embeddings, cells, keypoints, size)
        diffused: Tensor = second(activate(normalise(narrow)))
        return diffused

    def _embed(self, gathered: Tensor, cells: Tensor, size: tuple[int, int]) -> Tensor:
        middle = torch.tensor(size, dtype=torch.float32, device=gathered.device) / 2
        reference = float(max(size))
        if self.position_reference is not None:
            reference = self.position_reference / 2**self.level
        code = self.position_encoder(cells.float(), middle, reference)
        embeddings: Tensor = self.projection(gathered) + code
        return embeddings


def _gather(features: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    """A map (B, C, H, W) as it is, and its values (T, C) at some cells of all slices."""
    if not (features.requires_grad and torch.is_grad_enabled()):
        return features, features.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, flat)
    both: tuple[Tensor, Tensor] = _Gather.apply(features, flat)  # type: ignore[no-untyped-call]
    return both


class _Gather(torch.autograd.Function):
    """The gradient of the values is added where they come from, to that of the map, instead of to an empty map."""

    @staticmethod
    def forward(context: Any, features: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        context.flat = flat
        rows = features.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, flat)
        return features.view_as(features), rows

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_map, of_rows = gradients
        together = of_map.clone(memory_format=torch.channels_last)
        by_cell = together.permute(0, 2, 3, 1).view(-1, together.shape[1])
        by_cell.index_add_(0, context.flat, of_rows.to(by_cell.dtype))
        return together, None


def _flat_index(cells: Tensor, keypoints: PackedKeypoints, height: int, width: int) -> Tensor:
    return (keypoints.image * height + cells[:, 0]) * width + cells[:, 1]


def keypoint_convolution(
    convolution: nn.Module, rows: Tensor, cells: Tensor, keypoints: PackedKeypoints, size: tuple[int, int]
) -> Tensor:
    """3x3 convolution of a map that is zero except at keypoints, by the way that has less to multiply.

    Several keypoints in one cell count with their mean.

    Args:
        convolution: An `nn.Conv2d` with a 3x3 kernel, E -> D channels, and a bias.
        rows: (T, E) keypoint features.
        cells: (T, 2) integer cells (y, x).
        keypoints: Which slice each row belongs to.
        size: Height and width of the map.

    Returns:
        (B, D, H, W), channels last in memory.
    """
    crowded = len(rows) > len(keypoints.valid) * size[0] * size[1]  # more keypoints than cells: a coarse map
    convolve = dense_convolution if crowded else sparse_convolution
    return convolve(convolution, rows, cells, keypoints, size)


def dense_convolution(
    convolution: nn.Module, rows: Tensor, cells: Tensor, keypoints: PackedKeypoints, size: tuple[int, int]
) -> Tensor:
    """`keypoint_convolution` by scattering into an empty map and convolving all of it."""
    height, width = size
    flat, sharing = _sharing(cells, keypoints, size)
    empty = rows.new_zeros(len(keypoints.valid) * height * width, rows.shape[1])
    scattered = empty.index_add(0, flat, rows / sharing[:, None].to(rows.dtype))
    spread: Tensor = convolution(scattered.view(-1, height, width, rows.shape[1]).permute(0, 3, 1, 2))
    return spread


def sparse_convolution(
    convolution: nn.Module, rows: Tensor, cells: Tensor, keypoints: PackedKeypoints, size: tuple[int, int]
) -> Tensor:
    """`keypoint_convolution` evaluated only at the 3x3 neighbourhoods of keypoints."""
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    height, width = size
    batch, channels = len(keypoints.valid), convolution.out_channels
    _, sharing = _sharing(cells, keypoints, size)
    kernel = convolution.weight.permute(1, 2, 3, 0).flatten(1)  # (E, 9 * D)
    taps = ((rows / sharing[:, None].to(rows.dtype)) @ kernel).view(-1, channels)  # (T * 9, D)
    # The keypoint at p is read by the output at p - offset, for each offset of the kernel from its middle. A
    # border of one pixel takes what falls beyond the map.
    stride = width + 2
    middle = (keypoints.image * (height + 2) + cells[:, 0] + 1) * stride + cells[:, 1] + 1
    steps = torch.arange(-1, 2, device=cells.device)
    targets = middle[:, None] - (steps[:, None] * stride + steps).flatten()  # (T, 9)
    spread = convolution.bias.to(taps.dtype).expand(batch * (height + 2) * stride, channels)
    spread = spread.index_add(0, targets.flatten(), taps)
    spread = spread.view(batch, height + 2, stride, channels)[:, 1:-1, 1:-1]
    return spread.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _sharing(cells: Tensor, keypoints: PackedKeypoints, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Each keypoint's cell among those of all slices, and how many keypoints are in it, (T,) both."""
    flat = _flat_index(cells, keypoints, *size)
    empty = flat.new_zeros(len(keypoints.valid) * size[0] * size[1])
    return flat, empty.index_add(0, flat, torch.ones_like(flat))[flat]
