"""Projection heads of the pretraining: one vector a slice, one vector a keypoint (paper, section 3.2)."""

from __future__ import annotations

from torch import Tensor, nn

from kaf_model.attention import PackedKeypoints
from kaf_model.normalization import BatchNorm
from kaf_model.precision import full_precision


class BottleneckHead(nn.Module):
    """c_i: the embedding of a slice from the pooled bottleneck.

    Args:
        channels: Of the bottleneck.
        projection_width: Of the embedding.
        normalise: Batch normalisation of the hidden layer, as the keypoint head has it; published: none. Without
            it the pooled maps of all slices begin so alike that a short training never tells them apart.
    """

    def __init__(self, channels: int, *, projection_width: int, normalise: bool = False) -> None:
        super().__init__()
        hidden = channels // 2
        between = [BatchNorm(hidden), nn.ReLU()] if normalise else [nn.ReLU()]
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), *between, nn.Linear(hidden, projection_width))

    def forward(self, bottleneck: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, projection_width)."""
        with full_precision(bottleneck.device):
            embedding: Tensor = self.mlp(bottleneck.float().mean((2, 3)))
        return embedding


class KeypointProjection(nn.Module):
    """One vector a keypoint from the concatenated keypoint features of all levels."""

    def __init__(self, channels: int, *, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, width)

    def forward(self, keypoint_features: Tensor) -> Tensor:
        """Concat(U^1, ..., U^L) (T, L * E) -> (T, E)."""
        projected: Tensor = self.linear(keypoint_features)
        return projected


class KeypointHead(nn.Module):
    """g_i: the embedding of a slice from the mean of its projected keypoints."""

    def __init__(self, width: int, *, projection_width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, width), BatchNorm(width), nn.ReLU(), nn.Linear(width, projection_width)
        )

    def forward(self, projected: Tensor, keypoints: PackedKeypoints) -> Tensor:
        """Packed keypoints (T, E) of B slices -> (B, projection_width)."""
        with full_precision(projected.device):
            embedding: Tensor = self.mlp(keypoints.mean(projected.float()))
        return embedding
