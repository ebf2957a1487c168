"""Self- and cross-attention among the keypoints of a slice (paper, section 3.1 and Fig. 1 bottom).

Keypoint sets differ in size, so they travel packed: one row a keypoint, all slices of the batch one
after the other. Linear layers and normalisation work on packed rows and never see padding; only the
attention itself is padded, under a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kaf_model.normalization import BatchNorm


@dataclass(frozen=True)
class PackedKeypoints:
    """Which rows of a packed tensor belong to which slice.

    Attributes:
        positions: (T, 2) float (y, x) pixels of all valid keypoints, slice after slice.
        image: (T,) index of the slice of each row.
        valid: (B, N) bool, the padded layout the rows came from.
        full: Whether nothing in the padded layout is padding.
    """

    positions: Tensor
    image: Tensor
    valid: Tensor
    full: bool

    @classmethod
    def from_padded(cls, positions: Tensor, valid: Tensor) -> PackedKeypoints:
        """Pack positions (B, N, 2) by their mask (B, N)."""
        image, slot = valid.nonzero(as_tuple=True)
        return cls(positions[image, slot].float(), image, valid, len(image) == valid.numel())

    @classmethod
    def none(cls, batch: int, device: torch.device) -> PackedKeypoints:
        """No keypoints in any of `batch` slices."""
        valid = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        return cls.from_padded(torch.zeros(batch, 0, 2, device=device), valid)

    def __len__(self) -> int:
        return len(self.image)

    def pad(self, rows: Tensor) -> Tensor:
        """Packed rows (T, C) -> (B, N, C), zeros where there is no keypoint."""
        batch, longest = self.valid.shape
        if self.full:
            return rows.view(batch, longest, rows.shape[-1])
        padded = rows.new_zeros(batch, longest, rows.shape[-1])
        return padded.masked_scatter(self.valid[..., None], rows)

    def pack(self, padded: Tensor) -> Tensor:
        """(B, N, C) -> packed rows (T, C)."""
        if self.full:
            return padded.reshape(len(self), padded.shape[-1])
        return padded[self.valid]

    def mean(self, rows: Tensor) -> Tensor:
        """Mean over each slice's keypoints, (T, C) -> (B, C); zero for a slice without any."""
        sums = rows.new_zeros(len(self.valid), rows.shape[-1]).index_add(0, self.image, rows)
        return sums / self.valid.sum(1, keepdim=True).clamp(min=1).to(rows.dtype)

    def counts(self) -> Tensor:
        """Keypoints of each slice, (B,)."""
        return self.valid.sum(1)


def multilayer_perceptron(widths: list[int]) -> nn.Sequential:
    """Linear layers with batch normalisation and ReLU between them, on packed rows."""
    layers: list[nn.Module] = []
    for index in range(1, len(widths)):
        layers.append(nn.Linear(widths[index - 1], widths[index]))
        if index < len(widths) - 1:
            layers += [BatchNorm(widths[index]), nn.ReLU()]
    return nn.Sequential(*layers)


class PositionEncoder(nn.Module):
    """Code of a keypoint's position, added to its embedding so that attention knows where things are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = multilayer_perceptron([2, 32, 64, 128, width, width])

    def forward(self, positions: Tensor, centre: Tensor, reference: float) -> Tensor:
        """Encode positions relative to the centre of the map.

        Args:
            positions: (T, 2) float, (y, x).
            centre: (2,) float, middle of the map in the same unit.
            reference: The length that becomes 1 / 0.7 after scaling.

        Returns:
            (T, width)
        """
        code: Tensor = self.mlp((positions - centre) / (0.7 * reference))
        return code


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, by whichever way is fast.

    In bfloat16 on CPUs torch's fused kernel takes three times as long, forward and backward, as two
    products and a softmax; everywhere else the fused kernel wins.

    Args:
        query: (B, heads, N, D)
        key: (B, heads, M, D)
        value: (B, heads, M, D)
        mask: (B, 1, 1, M) bool, true where there is something to attend to; None is everywhere.

    Returns:
        (B, heads, N, D)
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    attended: Tensor = scores.softmax(-1) @ value
    return attended


class AttentionBlock(nn.Module):
    """Multi-head attention, then an MLP on the keypoint and its message, added to the keypoint."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.width = width
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.mlp = multilayer_perceptron([2 * width, 2 * width, width])
        for third in self.query_key_value.weight.data.chunk(3):  # as three layers would start
            nn.init.kaiming_uniform_(third, a=5**0.5)

    def forward(
        self,
        embeddings: Tensor,
        keypoints: PackedKeypoints,
        source: Tensor | None = None,
        source_keypoints: PackedKeypoints | None = None,
    ) -> Tensor:
        """Attend among the keypoints of a slice, or from one slice's to another's.

        Args:
            embeddings: (T, E) packed.
            keypoints: Layout of `embeddings`, B slices.
            source: (S, E) packed rows to attend to; None attends to `embeddings`.
            source_keypoints: Layout of `source`, B slices.

        Returns:
            (T, E)
        """
        if source is None or source_keypoints is None:
            query, key, value = keypoints.pad(self.query_key_value(embeddings)).chunk(3, dim=-1)
            source_keypoints = keypoints
        else:
            weight, bias = self.query_key_value.weight, self.query_key_value.bias
            width = self.width
            query = keypoints.pad(functional.linear(embeddings, weight[:width], bias[:width]))
            key, value = source_keypoints.pad(functional.linear(source, weight[width:], bias[width:])).chunk(
                2, dim=-1
            )
        message = self.merge(keypoints.pack(self._attend(query, key, value, source_keypoints)))
        update: Tensor = self.mlp(torch.cat([embeddings.to(message.dtype), message], dim=-1))
        return embeddings + update

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, source: PackedKeypoints) -> Tensor:
        mask = None
        if not source.full:
            empty = ~source.valid.any(1, keepdim=True)  # a softmax over nothing has no value
            mask = (source.valid | empty)[:, None, None, :]
        shape = (len(source.valid), -1, self.heads, self.width // self.heads)
        query, key, value = (x.reshape(shape).transpose(1, 2) for x in (query, key, value))
        attended = dot_product_attention(query, key, value, mask)  # (B, heads, N, E / heads)
        message = attended.transpose(1, 2).flatten(2)  # (B, N, E)
        return message * source.valid.any(1)[:, None, None].to(message.dtype) if mask is not None else message
