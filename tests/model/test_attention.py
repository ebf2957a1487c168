"""Attention among packed keypoints, against one slice at a time and an explicit softmax."""

from types import SimpleNamespace

import pytest
import torch

from kaf_model import attention
from kaf_model.attention import (
    AttentionBlock,
    PackedKeypoints,
    PositionEncoder,
    attend_each,
    attend_fused,
    attend_padded,
)

COUNTS0, COUNTS1 = [4, 0, 1, 6, 3], [2, 3, 0, 6, 0]


def packed(counts, longest=None, seed=0):
    longest = longest or max(counts)
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(len(counts), longest, 2, generator=generator) * 50
    valid = torch.stack([torch.randperm(longest, generator=generator) < count for count in counts])
    return PackedKeypoints.from_padded(positions, valid)


def block(seed=0):
    torch.manual_seed(seed)
    attention = AttentionBlock(12, heads=3).eval()
    for name, value in attention.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_()
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    return attention


def attend_slowly(attention, x, source):
    """One slice: (N, E) attends to (M, E), head by head, query by query."""
    weight, bias = attention.query_key_value.weight, attention.query_key_value.bias
    query = x @ weight[:12].T + bias[:12]
    key = source @ weight[12:24].T + bias[12:24]
    value = source @ weight[24:].T + bias[24:]
    message = torch.zeros_like(query)
    for head in range(3):
        own = slice(4 * head, 4 * head + 4)
        for n in range(len(x) if len(source) else 0):
            scores = key[:, own] @ query[n, own] / 4**0.5
            share = scores.exp() / scores.exp().sum()
            message[n, own] = sum(share[m] * value[m, own] for m in range(len(source)))
    merged = message @ attention.merge.weight.T + attention.merge.bias
    return x + attention.mlp(torch.cat([x, merged], dim=1))


def of_slice(rows, keypoints, index):
    return rows[keypoints.image == index]


def test_packing_and_padding_undo_each_other():
    for keypoints in (packed(COUNTS0, longest=8), packed([3, 3]), packed([2, 5])):
        rows = torch.randn(len(keypoints), 7)
        padded = keypoints.pad(rows)
        assert padded.shape == (*keypoints.valid.shape, 7)
        assert torch.equal(padded[keypoints.valid], rows)
        assert not padded[~keypoints.valid].any()
        assert torch.equal(keypoints.pack(padded), rows)


def test_an_example_to_check_by_eye():
    positions = torch.tensor([[[1.0, 2.0], [9.0, 9.0]], [[3.0, 4.0], [5.0, 6.0]]])
    keypoints = PackedKeypoints.from_padded(positions, torch.tensor([[True, False], [True, True]]))
    assert keypoints.positions.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert keypoints.image.tolist() == [0, 1, 1]
    assert not keypoints.full
    assert keypoints.counts == [1, 2]
    assert keypoints.mean(keypoints.positions).tolist() == [[1, 2], [4, 5]]


def test_no_keypoints_at_all():
    for keypoints in (PackedKeypoints.none(3, torch.device("cpu")), packed([0, 0, 0], longest=2)):
        rows = torch.randn(0, 12)
        assert keypoints.pad(rows).shape == (*keypoints.valid.shape, 12)
        assert keypoints.pack(keypoints.pad(rows)).shape == (0, 12)
        assert torch.equal(keypoints.mean(rows), torch.zeros(3, 12))
        for training in (False, True):
            assert block().train(training)(rows, keypoints).shape == (0, 12)


def test_the_mean_of_no_keypoints_is_zero():
    keypoints = packed(COUNTS0)
    rows = torch.randn(len(keypoints), 5)
    means = keypoints.mean(rows)
    for index, count in enumerate(COUNTS0):
        expected = of_slice(rows, keypoints, index).mean(0) if count else torch.zeros(5)
        assert torch.allclose(means[index], expected, atol=1e-6)


@pytest.mark.parametrize("counts", [COUNTS0, [5, 5, 5], [1], [3, 0]])
@torch.no_grad()
def test_self_attention_slice_by_slice(counts):
    attention, keypoints = block(), packed(counts)
    rows = torch.randn(len(keypoints), 12)
    attended = attention(rows, keypoints)
    for index in range(len(counts)):
        own = of_slice(rows, keypoints, index)
        expected = attend_slowly(attention, own, own)
        assert torch.allclose(of_slice(attended, keypoints, index), expected, atol=1e-5)


@pytest.mark.parametrize("counts", [(COUNTS0, COUNTS1), ([3, 3], [4, 4]), ([2, 2], [0, 0]), ([0, 0], [2, 1])])
@torch.no_grad()
def test_cross_attention_slice_by_slice(counts):
    attention = block()
    here, there = packed(counts[0]), packed(counts[1], longest=9, seed=1)
    rows, source = torch.randn(len(here), 12), torch.randn(len(there), 12)
    attended = attention(rows, here, source, there)
    assert attended.isfinite().all()
    for index in range(len(counts[0])):
        expected = attend_slowly(attention, of_slice(rows, here, index), of_slice(source, there, index))
        assert torch.allclose(of_slice(attended, here, index), expected, atol=1e-5)


def test_gradients_of_attention_to_nothing_are_finite():
    attention = block().train()
    here, there = packed(COUNTS0), packed(COUNTS1, seed=1)
    rows = torch.randn(len(here), 12, requires_grad=True)
    source = torch.randn(len(there), 12, requires_grad=True)
    attention(rows, here, source, there).square().sum().backward()
    assert rows.grad.isfinite().all()
    assert source.grad.isfinite().all()
    assert rows.grad.abs().sum(1).min() > 0
    # Slice 1 has no keypoints that could attend to the three of its partner.
    assert not of_slice(source.grad, there, 1).any()


@torch.no_grad()
def test_position_code_is_relative_to_the_middle_and_scaled():
    torch.manual_seed(0)
    encoder = PositionEncoder(8).eval()
    middle = torch.tensor([24.0, 32.0])
    code = encoder(torch.tensor([[24.0, 32.0], [24.0 + 44.8, 32.0]]), middle, 64.0)
    assert torch.allclose(code, encoder.mlp(torch.tensor([[0.0, 0.0], [1.0, 0.0]])), atol=1e-6)


@pytest.mark.parametrize(("fast", "largest"), [(attend_each, 2**21), (attend_each, 1), (attend_fused, 1)])
@pytest.mark.parametrize(
    "counts", [([3, 0, 5, 1, 2], [2, 4, 0, 6, 1]), ([4, 4, 0, 4, 4], [3, 3, 0, 3, 3]), ([0, 0], [0, 2])]
)
def test_slices_one_by_one_attend_as_the_padded_batch_does(counts, fast, largest, monkeypatch) -> None:
    monkeypatch.setattr(attention, "_LARGEST_RUN", largest)
    keypoints, source = packed(counts[0]), packed(counts[1])
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(len(keypoints), 8, generator=generator, requires_grad=True)
    key, value = (torch.randn(len(source), 8, generator=generator, requires_grad=True) for _ in range(2))
    results = []
    for way in (fast, attend_padded):
        message = way(query, key, value, keypoints, source, heads=2)
        gradients = torch.autograd.grad(message.square().sum(), (query, key, value))
        results.append((message, *gradients))
    for each, padded in zip(*results, strict=True):
        torch.testing.assert_close(each, padded)
    nothing = (source.valid.sum(1) == 0)[keypoints.image]
    assert (results[0][0][nothing] == 0).all()


def test_slices_of_as_many_keypoints_share_their_products() -> None:
    runs = attention._runs([4, 4, 0, 4, 5], [3, 3, 2, 3, 3], heads=2)
    assert [(run.batch, run.num_queries, run.num_keys) for run in runs] == [(4, 4, 3), (2, 4, 3), (2, 5, 3)]
    assert [(run.first_query, run.first_key) for run in runs] == [(0, 0), (16, 16), (24, 22)]


def test_rows_with_their_heads_first() -> None:
    keypoints = packed([2, 0, 1])
    rows = torch.tensor([[0, 1, 10, 11], [2, 3, 12, 13], [4, 5, 14, 15]])
    parts = keypoints.heads_first(rows, 2)
    assert parts.tolist() == [[0, 1], [2, 3], [10, 11], [12, 13], [4, 5], [14, 15]]
    assert torch.equal(keypoints.rows_first(parts, 2), rows)


@pytest.mark.parametrize("counts", [[4, 4], [3, 0, 5]])
def test_attention_in_bfloat16_is_near_that_in_float32(counts: list[int]) -> None:
    keypoints = packed(counts)
    rows = [torch.randn(len(keypoints), 16, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    exact = attend_padded(*rows, keypoints, keypoints, heads=4)
    for way in (attend_each, attend_fused, attend_padded):
        rounded = way(*(x.bfloat16() for x in rows), keypoints, keypoints, heads=4)
        torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("kind", "name"), [(torch.float32, "attend_fused"), (torch.bfloat16, "attend_each")])
def test_the_way_suits_the_type(kind, name, monkeypatch) -> None:
    keypoints, taken = packed([3, 2]), []

    def spy(*rows, heads):
        taken.append(name)
        return rows[0]

    monkeypatch.setattr(attention, name, spy)
    attention.attend(*torch.zeros(3, 5, 8, dtype=kind), keypoints, keypoints, heads=2)
    assert taken == [name]


def test_fused_attention_keeps_no_scores() -> None:
    keypoints = packed([200, 150])
    rows = [torch.randn(350, 8, requires_grad=True) for _ in range(3)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend_fused(*rows, keypoints, keypoints, heads=2)
    assert max(kept) <= 350 * 8


@pytest.mark.parametrize(
    ("device", "kind", "width", "packed"),
    [
        ("cuda", torch.bfloat16, 32, True),
        ("cuda", torch.float32, 32, False),
        ("cpu", torch.bfloat16, 32, False),
        ("cuda", torch.bfloat16, 16, False),  # heads of 4, for which there is no kernel
        ("cuda", torch.bfloat16, 1152, False),  # heads of 288
    ],
)
def test_packed_rows_are_for_gpus_in_half_precision(device, kind, width, packed) -> None:
    query = SimpleNamespace(device=torch.device(device), dtype=kind, shape=(5, width))
    assert attention._can_be_packed(query, 4) == packed
