"""Self- and cross-attention among the keypoints of a slice (paper, section 3.1 and Fig. 1 bottom).

Keypoint sets differ in size, so they travel packed: one row a keypoint, all slices of the batch one
after the other. Linear layers and normalisation work on packed rows and never see padding; only the
attention itself is padded, under a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kaf_model.normalization import BatchNorm

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # type: ignore[assignment]

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackedKeypoints:
    """Which rows of a packed tensor belong to which slice.

    Attributes:
        positions: (T, 2) float (y, x) pixels of all valid keypoints, slice after slice.
        image: (T,) index of the slice of each row.
        slot: (T,) index of each row in the padded layout of its slice.
        valid: (B, N) bool, the padded layout the rows came from.
        full: Whether nothing in the padded layout is padding.
    """

    positions: Tensor
    image: Tensor
    slot: Tensor
    valid: Tensor
    full: bool

    @classmethod
    def from_padded(cls, positions: Tensor, valid: Tensor) -> PackedKeypoints:
        """Pack positions (B, N, 2) by their mask (B, N)."""
        image, slot = valid.nonzero(as_tuple=True)
        return cls(positions[image, slot].float(), image, slot, valid, len(image) == valid.numel())

    @classmethod
    def none(cls, batch: int, device: torch.device) -> PackedKeypoints:
        """No keypoints in any of `batch` slices."""
        valid = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        nowhere = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(torch.zeros(0, 2, device=device), nowhere, nowhere, valid, full=True)

    def __len__(self) -> int:
        return len(self.image)

    def pad(self, rows: Tensor) -> Tensor:
        """Packed rows (T, C) -> (B, N, C), zeros where there is no keypoint."""
        batch, longest = self.valid.shape
        if self.full:
            return rows.view(batch, longest, rows.shape[-1])
        padded = rows.new_zeros(batch * longest, rows.shape[-1]).index_copy(0, self._place, rows)
        return padded.view(batch, longest, rows.shape[-1])

    def pack(self, padded: Tensor) -> Tensor:
        """(B, N, C) -> packed rows (T, C)."""
        if self.full:
            return padded.reshape(len(self), padded.shape[-1])
        return padded.flatten(0, 1).index_select(0, self._place)

    @cached_property
    def _place(self) -> Tensor:
        """Where each row lies in the padded layout, (T,); unlike a mask it waits for no GPU."""
        return self.image * self.valid.shape[1] + self.slot

    @cached_property
    def starts(self) -> Tensor:
        """The first row of each slice, and the number of all rows: (B + 1,) int32."""
        return functional.pad(self.valid.sum(1).cumsum(0), (1, 0)).int()

    def mean(self, rows: Tensor) -> Tensor:
        """Mean over each slice's keypoints, (T, C) -> (B, C); zero for a slice without any."""
        sums = rows.new_zeros(len(self.valid), rows.shape[-1]).index_add(0, self.image, rows)
        return sums / self.valid.sum(1, keepdim=True).clamp(min=1).to(rows.dtype)

    def heads_first(self, rows: Tensor, heads: int) -> Tensor:
        """Packed rows (T, E) -> (T * heads, E / heads): slice by slice, and in a slice head by head."""
        order, place = self._head_order(heads)
        parts = rows.reshape(len(self) * heads, rows.shape[1] // heads)
        reordered: Tensor = _Reorder.apply(parts, order, place)  # type: ignore[no-untyped-call]
        return reordered

    def rows_first(self, parts: Tensor, heads: int) -> Tensor:
        """Undo `heads_first`."""
        order, place = self._head_order(heads)
        rows: Tensor = _Reorder.apply(parts, place, order)  # type: ignore[no-untyped-call]
        return rows.view(len(self), heads * parts.shape[1])

    def _head_order(self, heads: int) -> tuple[Tensor, Tensor]:
        """Which part (row * heads + head) lies at each place, and where each part lies, (T * heads,)."""
        if heads not in self._head_orders:
            counts = self.valid.sum(1)
            start = (counts.cumsum(0) - counts)[self.image]  # (T,) first row of a row's slice
            head = torch.arange(heads, device=self.image.device)
            within = torch.arange(len(self), device=self.image.device) - start
            place = ((heads * start + within)[:, None] + head * counts[self.image, None]).flatten()
            order = torch.empty_like(place).scatter_(0, place, torch.arange(len(place), device=place.device))
            self._head_orders[heads] = (order, place)
        return self._head_orders[heads]

    @cached_property
    def _head_orders(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

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
    if _can_be_packed(query, heads):
        return attend_packed(query, key, value, keypoints, source, heads=heads)
    if query.device.type != "cpu":
        return attend_padded(query, key, value, keypoints, source, heads=heads)
    if query.dtype == torch.bfloat16:
        return attend_each(query, key, value, keypoints, source, heads=heads)
    return attend_fused(query, key, value, keypoints, source, heads=heads)


def _can_be_packed(query: Tensor, heads: int) -> bool:
    """Whether there is a kernel for `attend_packed`."""
    width = query.shape[1] // heads
    known = varlen_attn is not None and width % 8 == 0 and width <= 256
    return known and query.device.type == "cuda" and query.dtype in _HALF


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keypoints: PackedKeypoints,
    source: PackedKeypoints,
    *,
    heads: int,
) -> Tensor:
    """`attend` on the packed rows as they are, by the kernel that GPUs have for sequences of different length."""
    assert varlen_attn is not None
    queries, keys, values = (rows.reshape(len(rows), heads, -1) for rows in (query, key, value))
    longest, longest_source = keypoints.valid.shape[1], source.valid.shape[1]
    if not longest or not longest_source:
        return torch.zeros_like(query)
    attended = varlen_attn(queries, keys, values, keypoints.starts, source.starts, longest, longest_source)
    assert isinstance(attended, Tensor)
    return attended.flatten(1)


def attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keypoints: PackedKeypoints,
    source: PackedKeypoints,
    *,
    heads: int,
) -> Tensor:
    """`attend` for the whole batch at once, padded under a mask: few large operations, for GPUs in float32."""
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
    """`attend` slice after slice, without padding: on CPUs the padded products cost more than the loop.

    In bfloat16 two products and a softmax are faster than torch's fused kernel; their shares are kept.
    """
    layouts = ((query, keypoints), (key, source), (value, source))
    parts = [layout.heads_first(rows, heads) for rows, layout in layouts]
    runs = _runs(keypoints.counts, source.counts, heads)
    attended: Tensor = _AttendRuns.apply(*parts, runs)  # type: ignore[no-untyped-call]
    return keypoints.rows_first(attended, heads)


def attend_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keypoints: PackedKeypoints,
    source: PackedKeypoints,
    *,
    heads: int,
) -> Tensor:
    """`attend` slice after slice by torch's fused kernel, which keeps no shares: in float32 as fast on CPUs."""
    runs = [
        (num_queries, num_keys, len(list(alike)))
        for (num_queries, num_keys), alike in groupby(zip(keypoints.counts, source.counts, strict=True))
    ]
    queries = torch.split(query, [slices * num_queries for num_queries, _, slices in runs])
    num_rows = [slices * num_keys for _, num_keys, slices in runs]
    keys, values = torch.split(key, num_rows), torch.split(value, num_rows)
    attended = []
    for run, *parts in zip(runs, queries, keys, values, strict=True):
        heads_first = [_split_heads(rows.reshape(run[2], -1, rows.shape[1]), heads) for rows in parts]
        product = _dot_product if all(run) else _explicit_product  # fused kernels want something to attend to
        attended.append(product(*heads_first).transpose(1, 2).reshape(parts[0].shape))
    return torch.cat(attended)


_LARGEST_RUN = 2**21
"""Scores that are computed at once: beyond the cache, larger products only cost page faults."""


class _Run(NamedTuple):
    """Slices after one another with the same numbers of keypoints; their heads are one batch of products.

    Attributes:
        batch: Slices times heads.
        num_queries: Rows a slice that attend.
        num_keys: Rows a slice that are attended to.
        first_query: Where the queries begin, in rows with their heads first.
        first_key: Where the keys begin.
    """

    batch: int
    num_queries: int
    num_keys: int
    first_query: int
    first_key: int

    def goes_on_with(self, other: _Run) -> bool:
        """Whether the slice after this run is like it and still fits."""
        follows = (
            self.first_query + self.batch * self.num_queries,
            self.first_key + self.batch * self.num_keys,
        )
        scores = (self.batch + other.batch) * self.num_queries * self.num_keys
        return self[1:3] == other[1:3] and follows == other[3:] and scores <= _LARGEST_RUN

    def queries(self, rows: Tensor) -> Tensor:
        """(T * heads, D) -> (batch, num_queries, D), a view."""
        rows = rows[self.first_query : self.first_query + self.batch * self.num_queries]
        return rows.view(self.batch, self.num_queries, rows.shape[1])

    def keys(self, rows: Tensor) -> Tensor:
        """(S * heads, D) -> (batch, num_keys, D), a view."""
        rows = rows[self.first_key : self.first_key + self.batch * self.num_keys]
        return rows.view(self.batch, self.num_keys, rows.shape[1])


def _runs(counts: Sequence[int], source_counts: Sequence[int], heads: int) -> list[_Run]:
    """The runs of a batch; slices that have nothing to attend to are in none."""
    runs: list[_Run] = []
    first_query = first_key = 0
    for queries, keys in zip(counts, source_counts, strict=True):
        if queries and keys:
            one = _Run(heads, queries, keys, first_query, first_key)
            if runs and runs[-1].goes_on_with(one):
                runs[-1] = runs[-1]._replace(batch=runs[-1].batch + heads)
            else:
                runs.append(one)
        first_query += heads * queries
        first_key += heads * keys
    return runs


class _AttendRuns(torch.autograd.Function):
    """Scaled dot-product attention of rows with their heads first, run after run, as one node of the graph.

    Shape: (T * heads, D), (S * heads, D) twice -> (T * heads, D).
    """

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, runs: list[_Run]) -> Tensor:
        scaled = query * query.shape[1] ** -0.5
        attended = torch.zeros_like(query)
        shares = []
        for run in runs:
            scores = torch.bmm(run.queries(scaled), run.keys(key).transpose(1, 2))
            shares.append(scores.softmax(-1))
            torch.bmm(shares[-1], run.keys(value), out=run.queries(attended))
        context.runs = runs
        context.save_for_backward(scaled, key, value, *shares)
        return attended

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        scaled, key, value, *shares = context.saved_tensors
        gradient = gradients[0].contiguous()
        grad_query, grad_key, grad_value = (torch.zeros_like(rows) for rows in (scaled, key, value))
        for run, share in zip(context.runs, shares, strict=True):
            wanted = run.queries(gradient)
            torch.bmm(share.transpose(1, 2), wanted, out=run.keys(grad_value))
            grad_share = torch.bmm(wanted, run.keys(value).transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_share, share, -1, share.dtype)
            torch.bmm(grad_scores, run.keys(key), out=run.queries(grad_query))
            torch.bmm(grad_scores.transpose(1, 2), run.queries(scaled), out=run.keys(grad_key))
        return grad_query.mul_(scaled.shape[1] ** -0.5), grad_key, grad_value, None


class _Reorder(torch.autograd.Function):
    """Rows in another order; the gradient is gathered back instead of scattered."""

    @staticmethod
    def forward(context: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        context.inverse, context.order = inverse, order
        return rows.index_select(0, order)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, context.inverse), None, None


def _split_heads(rows: Tensor, heads: int) -> Tensor:
    """(B, N, E) -> (B, heads, N, E / heads)."""
    return rows.reshape(*rows.shape[:2], heads, rows.shape[2] // heads).transpose(1, 2)


def _dot_product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, (B, heads, N, D) and (B, heads, M, D) twice -> (B, heads, N, D).

    In bfloat16 on CPUs torch's fused kernel takes two to three times as long, forward and backward, as two
    products and a softmax; everywhere else the fused kernels win, but cuDNN's, which is built anew for every number
    of keypoints, a tenth of a second each. `mask` is (B, 1, 1, M), false at padding.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return _explicit_product(query, key, value, mask)
    kernels = sdpa_kernel(_KERNELS) if query.device.type == "cuda" else nullcontext()
    with kernels:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _explicit_product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """`_dot_product` by two products and a softmax; zeros where there are no keys."""
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

    def weights(self, embeddings: Tensor) -> Tensor:
        """The softmax weights with which the keypoints of one slice attend to each other in `forward`.

        Shape: (N, E) -> (heads, N, N); a row holds what one keypoint attends to, and sums to 1.
        """
        query, key, _ = self.query_key_value(embeddings).chunk(3, dim=-1)
        queries, keys = (_split_heads(rows[None], self.heads)[0] for rows in (query, key))
        scores: Tensor = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
        return scores.softmax(-1)
