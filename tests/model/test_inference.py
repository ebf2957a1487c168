"""The folded network against the one it was made from."""

from typing import get_args

import pytest
import torch
from torch import nn

from kaf_model import engine
from kaf_model.attention import AttentionBlock
from kaf_model.config import ModelConfig
from kaf_model.inference import InferenceNetwork
from kaf_model.normalization import BatchNorm
from kaf_model.unet import build_network

SIZE = (48, 64)
COUNTS = [7, 0, 1, 20]
ARCHITECTURES = get_args(ModelConfig.model_fields["architecture"].annotation)


@pytest.fixture
def float32(monkeypatch):
    monkeypatch.setattr(engine, "has_bfloat16", lambda device: False)


def trained_network(**overrides):
    """A small network in evaluation mode, with parameters and statistics as after some training."""
    settings = {
        "start_channels": 4,
        "kaf_levels": (1, 3, 4),
        "embedding_width": 16,
        "heads": 2,
        "attention_blocks": 2,
        "diffusion_channels": 8,
        "num_classes": 3,
        "position_reference": 64.0,
    }
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = build_network(ModelConfig(**{**settings, **overrides}))
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_(std=0.3, generator=generator)
            module.running_var.uniform_(0.3, 2.0, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 2.0, generator=generator)
            nn.init.normal_(module.bias, std=0.3, generator=generator)
    return network.eval()


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(COUNTS), 1, *SIZE, generator=generator)
    keypoints = torch.rand(len(COUNTS), max(COUNTS), 2, generator=generator) * (torch.tensor(SIZE) - 1.0)
    return images, keypoints, torch.arange(max(COUNTS)) < torch.tensor(COUNTS)[:, None]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_folded_network_gives_the_same_logits(float32, architecture):
    channels = 12 if architecture.startswith("swin") else 4
    network = trained_network(architecture=architecture, start_channels=channels)
    with torch.no_grad():
        expected = network(*batch())
    logits = InferenceNetwork(network)(*batch())
    assert expected.abs().max() > 0.3
    assert torch.allclose(logits, expected, atol=1e-5, rtol=0)


def test_nothing_is_left_to_normalise_or_to_merge():
    folded = InferenceNetwork(trained_network())
    assert not [module for module in folded.modules() if isinstance(module, BatchNorm)]
    blocks = [module for module in folded.modules() if isinstance(module, AttentionBlock)]
    assert len(blocks) == 6
    assert all(isinstance(block.merge, nn.Identity) for block in blocks)


def test_the_original_stays_as_it_was():
    network = trained_network().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folded = InferenceNetwork(network)
    logits = folded(*batch())
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.head.weight.data.zero_()
    assert torch.equal(folded(*batch()), logits)


def test_a_slice_alone_is_the_slice_in_a_batch(float32):
    folded = InferenceNetwork(trained_network())
    images, keypoints, valid = batch()
    together = folded(images, keypoints, valid)
    for row, count in enumerate(COUNTS):
        alone = folded(images[row : row + 1], keypoints[row : row + 1, :count])
        assert torch.allclose(alone, together[row : row + 1], atol=1e-5, rtol=0)


@pytest.mark.skipif(not engine.has_bfloat16(torch.device("cpu")), reason="no fast bfloat16 on this CPU")
def test_weights_in_half_precision_lose_no_more_than_mixed_precision():
    network = trained_network()
    folded = InferenceNetwork(network)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        exact = network(*batch())
        with engine.autocast(torch.device("cpu")):
            mixed = network(*batch()).float()
    logits = folded(*batch())
    assert logits.dtype == torch.float32
    assert (logits - exact).square().mean() < 1.5 * (mixed - exact).square().mean()


@pytest.mark.parametrize("architecture", ["swin-unetr", "swin-unet", "kaf-fcn"])
def test_other_networks_run_in_half_precision_too(architecture):
    network = trained_network(architecture=architecture, start_channels=12)
    logits = InferenceNetwork(network)(*batch())
    assert logits.shape == (len(COUNTS), 3, *SIZE)
    assert logits.isfinite().all()
