"""Self- and cross-attention among the keypoints of a slice (paper, section 3.1 and Fig. 1 bottom).

Keypoint sets differ in size, so they travel packed: one row a keypoint, all slices of the batch one
after the other. Linear layers and normalisation work on packed rows and never see padding; only the
attention itself is padded, under a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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

    @cached_property
    def counts(self) -> list[int]:
        """Keypoints of each of the B slices."""
        counts: list[int] = self.valid.sum(1).tolist()
        return counts


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


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keypoints: PackedKeypoints,
    source: PackedKeypoints,
    *,
    heads: int,
) -> Tensor:
    """Scaled dot-product attention of packed rows, each slice with its own source, by the fast way.

    Args:
        query: (T, E) rows of `keypoints`.
        key: (S, E) rows of `source`.
        value: (S, E) rows of `source`.
        keypoints: Layout of the T rows, B slices.
        source: Layout of the S rows, B slices.
        heads: Parts of E that attend separately.

    Returns:
        (T, E), zero for slices whose source is empty.
    """
    if query.device.type != "cpu" or (keypoints.full and source.full):
        return attend_padded(query, key, value, keypoints, source, heads=heads)
    return attend_each(query, key, value, keypoints, source, heads=heads)


def attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keypoints: PackedKeypoints,
    source: PackedKeypoints,
    *,
    heads: int,
) -> Tensor:
    """`attend` for the whole batch at once, padded under a mask: few large operations, as GPUs like it."""
    mask = None
    if not source.full:
        empty = ~source.valid.any(1, keepdim=True)  # a softmax over nothing has no value
        mask = (source.valid | empty)[:, None, None, :]
    layouts = ((query, keypoints), (key, source), (value, source))
    padded = (layout.pad(rows) for rows, layout in layouts)
    heads_first = [_split_heads(rows, heads) for rows in padded]
    attended = _dot_product(heads_first[0], heads_first[1], heads_first[2], mask)  # (B, heads, N, E / heads)
    message = keypoints.pack(attended.transpose(1, 2).flatten(2))
    if mask is None:
        return message
    return message * source.valid.any(1)[keypoints.image, None].to(message.dtype)


def attend_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keypoints: PackedKeypoints,
    source: PackedKeypoints,
    *,
    heads: int,
) -> Tensor:
    """`attend` slice after slice, without padding: on CPUs the padded products cost more than the loop."""
    messages = []
    queries = torch.split(query, keypoints.counts)
    keys, values = torch.split(key, source.counts), torch.split(value, source.counts)
    for slice_query, slice_key, slice_value in zip(queries, keys, values, strict=True):
        if len(slice_query) and len(slice_key):
            split = [_split_heads(rows[None], heads) for rows in (slice_query, slice_key, slice_value)]
            attended = _dot_product(split[0], split[1], split[2])  # (1, heads, n, E / heads)
            messages.append(attended[0].transpose(0, 1).flatten(1))
        else:
            messages.append(torch.zeros_like(slice_query))
    return torch.cat(messages)


def _split_heads(rows: Tensor, heads: int) -> Tensor:
    """(B, N, E) -> (B, heads, N, E / heads)."""
    return rows.reshape(*rows.shape[:2], heads, rows.shape[2] // heads).transpose(1, 2)


def _dot_product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, (B, heads, N, D) and (B, heads, M, D) twice -> (B, heads, N, D).

    In bfloat16 on CPUs torch's fused kernel takes two to three times as long, forward and backward, as two
    products and a softmax; everywhere else the fused kernel wins. `mask` is (B, 1, 1, M), false at padding.
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
        self.merge: nn.Module = nn.Linear(width, width)
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
            query, key, value = self.query_key_value(embeddings).chunk(3, dim=-1)
            source_keypoints = keypoints
        else:
            weight, bias = self.query_key_value.weight, self.query_key_value.bias
            width = self.width
            query = functional.linear(embeddings, weight[:width], bias[:width])
            key, value = functional.linear(source, weight[width:], bias[width:]).chunk(2, dim=-1)
        message = self.merge(attend(query, key, value, keypoints, source_keypoints, heads=self.heads))
        update: Tensor = self.mlp(torch.cat([embeddings.to(message.dtype), message], dim=-1))
        return embeddings + update
