"""Gather, scatter and diffusion, against dense maps."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kaf_model import fusion
from kaf_model.attention import PackedKeypoints
from kaf_model.fusion import KafLayer, dense_convolution, sparse_convolution
from kaf_model.geometry import level_cells

H, W = 12, 16


def keypoints_of(counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(len(counts), max(counts), 2, generator=generator) * torch.tensor(
        [H - 1.0, W - 1.0]
    )
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return PackedKeypoints.from_padded(positions, valid)


def dense_mean(rows, cells, keypoints, size):
    """Scatter into an empty map, keypoint by keypoint; those that share a cell count with their mean."""
    batch = len(keypoints.valid)
    planes = [[[[] for _ in range(size[1])] for _ in range(size[0])] for _ in range(batch)]
    for row, (y, x), image in zip(rows, cells.tolist(), keypoints.image.tolist(), strict=True):
        planes[image][y][x].append(row)
    nothing = rows.new_zeros(rows.shape[1])
    cells_in_order = [
        torch.stack(cell).mean(0) if cell else nothing for plane in planes for line in plane for cell in line
    ]
    return torch.stack(cells_in_order).view(batch, *size, -1).permute(0, 3, 1, 2)


def test_two_keypoints_in_a_cell_count_with_their_mean():
    convolution = nn.Conv2d(1, 1, 3, padding=1)
    nn.init.zeros_(convolution.weight)
    convolution.weight.data[0, 0, 1, 1] = 1.0  # hands the cell on
    nn.init.constant_(convolution.bias, 10.0)
    keypoints = PackedKeypoints.from_padded(torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.bool))
    cells = torch.tensor([[1, 2], [1, 2], [0, 0]])
    spread = sparse_convolution(convolution, torch.tensor([[1.0], [5.0], [7.0]]), cells, keypoints, (2, 3))
    assert spread.tolist() == [[[[17, 10, 10], [10, 10, 13]]]]


@pytest.mark.parametrize("way", [sparse_convolution, dense_convolution])
@pytest.mark.parametrize("counts", [[40, 7, 0], [1, 0, 0], [0, 0, 1], [200, 200, 200]])
def test_either_convolution_is_that_of_the_scattered_map(counts, way):
    torch.manual_seed(0)
    convolution = nn.Conv2d(5, 6, 3, padding=1)
    keypoints = keypoints_of(counts)
    cells = level_cells(keypoints.positions, 1, H // 2, W // 2)
    results = []
    for convolve in (
        lambda rows: way(convolution, rows, cells, keypoints, (H // 2, W // 2)),
        lambda rows: convolution(dense_mean(rows, cells, keypoints, (H // 2, W // 2))),
    ):
        rows = torch.randn(len(keypoints), 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = convolve(rows)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        gradients = torch.autograd.grad((out * weight).sum(), [rows, *convolution.parameters()])
        results.append([out, *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("counts", "name"), [([48, 48], "sparse_convolution"), ([49, 48], "dense_convolution")]
)
def test_a_map_with_fewer_cells_than_keypoints_is_convolved_as_a_whole(counts, name, monkeypatch):
    monkeypatch.setattr(fusion, name, lambda *_: name)
    keypoints = keypoints_of(counts)
    cells = level_cells(keypoints.positions, 1, H // 2, W // 2)
    assert fusion.keypoint_convolution(None, keypoints.positions, cells, keypoints, (H // 2, W // 2)) == name


def test_without_keypoints_only_the_bias_is_left():
    convolution = nn.Conv2d(5, 6, 3, padding=1)
    keypoints = PackedKeypoints.none(2, torch.device("cpu"))
    spread = sparse_convolution(convolution, torch.zeros(0, 5), torch.zeros(0, 2).long(), keypoints, (H, W))
    assert torch.equal(spread, convolution.bias.view(1, -1, 1, 1).expand(2, 6, H, W))


@torch.no_grad()
def test_a_layer_step_by_step():
    torch.manual_seed(0)
    layer = KafLayer(
        4, width=8, heads=2, attention_blocks=2, diffusion_channels=3, level=1, position_reference=None
    ).eval()
    features = torch.randn(2, 4, H, W)  # of slices of 24 x 32
    keypoints = keypoints_of([9, 4])
    keypoints = PackedKeypoints(
        keypoints.positions * 2, keypoints.image, keypoints.slot, keypoints.valid, keypoints.full
    )
    fused, embeddings = layer(features, keypoints)

    rows = []
    for (y, x), image in zip(keypoints.positions.tolist(), keypoints.image.tolist(), strict=True):
        row, column = int((y + 0.5) // 2), int((x + 0.5) // 2)
        code = layer.position_encoder.mlp(torch.tensor([[row - H / 2, column - W / 2]]) / (0.7 * W))
        rows.append(layer.projection(features[image, :, row, column]) + code[0])
    expected = torch.stack(rows)
    for block in layer.attention:
        expected = block(expected, keypoints)
    assert torch.allclose(embeddings, expected, atol=1e-5)
    cells = level_cells(keypoints.positions, 1, H, W)
    first, normalise, activate, second = layer.diffusion
    diffused = second(activate(normalise(first(dense_mean(expected, cells, keypoints, (H, W))))))
    assert torch.equal(fused[:, :4], features)
    assert torch.allclose(fused[:, 4:], diffused, atol=1e-5)
    assert functional.relu(fused).any()


@torch.no_grad()
def test_a_layer_may_start_from_adding_little():
    layers = []
    for start in (1.0, 0.01, 0.0):
        torch.manual_seed(0)
        layers.append(
            KafLayer(
                4,
                width=8,
                heads=2,
                attention_blocks=1,
                diffusion_channels=3,
                level=0,
                position_reference=None,
                start=start,
            ).eval()
        )
    features, keypoints = torch.randn(2, 4, H, W), keypoints_of([9, 4])
    (whole, rows), (little, same_rows), (nothing, _) = (layer(features, keypoints) for layer in layers)
    assert torch.allclose(little[:, 4:], 0.01 * whole[:, 4:], atol=1e-6)
    assert torch.equal(rows, same_rows)
    assert whole[:, 4:].any()
    assert not nothing[:, 4:].any()


@torch.no_grad()
def test_the_reference_length_scales_with_the_level():
    """Input pixels are the unit of the reference, so every level sees the same code for the same place."""
    codes = []
    for level in (0, 2):
        torch.manual_seed(0)
        layer = KafLayer(
            1,
            width=8,
            heads=2,
            attention_blocks=0,
            diffusion_channels=3,
            level=level,
            position_reference=32.0,
        ).eval()
        nn.init.zeros_(layer.projection.weight)
        size = (48 // 2**level, 64 // 2**level)
        points = torch.tensor([[[8.0, 16.0], [40.0, 60.0]]])  # multiples of four: the corners of cells
        keypoints = PackedKeypoints.from_padded(points, torch.ones(1, 2, dtype=torch.bool))
        codes.append(layer(torch.zeros(1, 1, *size), keypoints)[1])
    assert torch.allclose(codes[0], codes[1], atol=1e-6)
