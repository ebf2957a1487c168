"""Blocks that recompute their activations give what the others give, with less memory."""

from collections import Counter

import torch
from torch import nn

from kaf_model.checkpointing import checkpoint_activations
from kaf_model.compute import peak_bytes
from kaf_model.config import ModelConfig
from kaf_model.unet import build_network

CONFIG = ModelConfig(
    start_channels=4, kaf_levels=(1, 3), embedding_width=8, heads=2, attention_blocks=2, diffusion_channels=8
)
SIZE = (48, 64)


def batch(slices=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(slices, 1, *SIZE, generator=generator)
    keypoints = torch.rand(slices, 9, 2, generator=generator) * 47
    return images, keypoints, torch.rand(slices, 9, generator=generator) < 0.7


def trained(recompute):
    torch.manual_seed(0)
    network = build_network(CONFIG)
    if recompute:
        assert checkpoint_activations(network) == 8 + 2 + 4  # convolutions, diffusions, attention
    logits = network(*batch())
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return logits, gradients, network.state_dict()


def test_outputs_gradients_and_statistics_are_the_same():
    (logits, gradients, state), (expected, expected_gradients, expected_state) = trained(True), trained(False)
    torch.testing.assert_close(logits, expected)
    for ours, theirs in ((gradients, expected_gradients), (state, expected_state)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-4, msg=name)


def test_every_convolution_and_every_attention_is_computed_again():
    network = build_network(CONFIG)
    checkpoint_activations(network)
    layers = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (3, 3)
        and not any(
            part in name for part in ("diffusion.0", "centre")
        )  # as a product, and without normalisation
    }
    calls = Counter()
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda *_, called=name: calls.update([called]))
    network(*batch()).sum().backward()
    assert any("diffusion.3" in name for name in layers)
    assert calls == dict.fromkeys(layers, 2)


def test_less_memory_is_held():
    peaks = []
    for recompute in (False, True):
        network = build_network(CONFIG)
        if recompute:
            checkpoint_activations(network)
        inputs = batch(8)
        peaks.append(
            peak_bytes(lambda net=network, given=inputs: net(*given).sum().backward(), torch.device("cpu"))
        )
    assert peaks[1] < 0.85 * peaks[0]
