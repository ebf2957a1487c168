"""Layers with backward passes of their own: torch's, whatever is faster about them."""

import pytest
import torch
from torch import nn

from kaf_model import layers
from kaf_model.layers import Convolution, Halve, Upsample


def test_upsampling_is_the_transposed_convolution():
    torch.manual_seed(0)
    upsample = Upsample(5, 3)
    plain = nn.ConvTranspose2d(5, 3, 2, stride=2)
    plain.load_state_dict(upsample.state_dict())
    results = []
    for layer in (upsample, plain):
        features = torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = layer(features)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        gradients = torch.autograd.grad((out * weight).sum(), [features, *layer.parameters()])
        results.append((out, *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_halving_is_max_pooling():
    torch.manual_seed(0)
    features = torch.randn(2, 3, 12, 16).round(decimals=0).requires_grad_()  # with ties
    weight = torch.randn(2, 3, 6, 8)
    results = []
    for pool in (Halve(), nn.MaxPool2d(2)):
        halved = pool(features)
        results.append([halved, *torch.autograd.grad((halved * weight).sum(), features)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_upsampling_obeys_autocast():
    upsample = Upsample(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = upsample(torch.randn(1, 5, 4, 6))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert upsample.weight.grad.dtype == torch.float32


def convolved(layer, features, wanted):
    """Output and gradients of a layer in mixed precision."""
    features = features.clone(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(features)
    gradients = torch.autograd.grad((out.float() * wanted).sum(), [features, *layer.parameters()])
    return [out, *gradients]


@pytest.mark.parametrize(("batch", "height", "width"), [(3, 4, 6), (1, 1, 2), (2, 2, 1)])
def test_the_gradient_of_kernels_by_a_product_is_torchs(batch, height, width):
    torch.manual_seed(0)
    ours, theirs = Convolution(40, 24), nn.Conv2d(40, 24, 3, padding=1)
    ours.load_state_dict(theirs.state_dict())
    features, wanted = torch.randn(batch, 40, height, width), torch.randn(batch, 24, height, width)
    found, expected = (convolved(layer, features, wanted) for layer in (ours, theirs))
    assert "ByProduct" in type(found[0].grad_fn).__name__
    for mine, reference in zip(found, expected, strict=True):
        assert mine.dtype == reference.dtype
        error = (mine.float() - reference.float()).norm() / reference.float().norm()
        assert error < 0.01  # of bfloat16


def test_the_neighbourhoods_are_those_that_a_convolution_unfolds():
    features = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    unfolded = nn.functional.unfold(features, 3, padding=1).view(2, 3, 9, 20)  # (B, C, 9, H W)
    assert torch.equal(layers._neighbourhoods(features), unfolded.permute(0, 3, 2, 1).reshape(40, 27))


def test_large_maps_frozen_kernels_and_full_precision_are_left_to_torch():
    layer, small, large = Convolution(16, 16), torch.randn(1, 16, 4, 4), torch.randn(1, 16, 16, 16)
    assert "ByProduct" not in type(layer(small).grad_fn).__name__
    with torch.autocast("cpu", torch.bfloat16):
        assert "ByProduct" in type(layer(small).grad_fn).__name__
        assert "ByProduct" not in type(layer(large).grad_fn).__name__
        with torch.inference_mode():
            assert layer(small).dtype == torch.bfloat16
        layer.requires_grad_(False)
        assert layer(small).grad_fn is None
