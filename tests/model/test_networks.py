"""The networks: their exact sizes, and the laws that the KAF-UNet obeys."""

import pytest
import torch
from torch import nn

from kaf_model.config import ModelConfig
from kaf_model.unet import build_network

SIZE = (48, 64)


def count(config):
    with torch.device("meta"):
        network = build_network(config)
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("preset", "overrides", "expected"),
    [
        ("paper-chd", {}, 60_936_448),
        ("paper-acdc", {}, 96_015_808),
        ("paper-chd", {"attention_blocks": 16}, 71_467_264),
        ("paper-acdc", {"attention_blocks": 16}, 106_546_624),
        ("paper-chd", {"architecture": "unet"}, 7_763_584),
        ("paper-acdc", {"architecture": "unet"}, 17_462_016),
        ("paper-chd", {"architecture": "unet-c2"}, 27_911_328),
        ("paper-acdc", {"architecture": "unet-c2"}, 62_790_768),
    ],
)
def test_parameters_of_the_published_networks(preset, overrides, expected):
    config = ModelConfig.preset(preset, **overrides)
    assert config.num_classes == {"paper-chd": 8, "paper-acdc": 4}[preset]
    assert count(config) == expected


def test_a_network_without_attention_blocks_still_fuses():
    config = ModelConfig(start_channels=4, embedding_width=8, heads=2, attention_blocks=0)
    assert build_network(config)(torch.zeros(1, 1, *SIZE), torch.full((1, 3, 2), 9.0)).shape == (1, 2, *SIZE)


def kaf_network(**overrides):
    """A small KAF-UNet in evaluation mode, with running statistics as after some training."""
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
    torch.manual_seed(0)
    network = build_network(ModelConfig(**{**settings, **overrides}))
    for name, value in network.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.3, 1.0)
        elif value.dim() > 1:
            value.mul_(2)
    return network.eval()


@pytest.fixture(scope="module")
def network():
    return kaf_network()


def batch(counts, seed=0, size=SIZE):
    """Slices with the given numbers of keypoints, sub-pixel; unused slots hold garbage."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(counts), 1, *size, generator=generator)
    limit = torch.tensor(size) - 1.0
    keypoints = torch.rand(len(counts), max(counts), 2, generator=generator) * limit
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    garbage = torch.tensor([[1e6, -1e6], [torch.nan, 3.0], [-5.0, torch.inf]])
    places = garbage[torch.arange(keypoints.numel() // 2).view_as(valid) % 3]
    return images, torch.where(valid[..., None], keypoints, places), valid


def close(first, second):
    return torch.allclose(first, second, atol=1e-5, rtol=0)


@torch.no_grad()
def test_keypoints_matter(network):
    images, keypoints, valid = batch([9])
    assert (network(images, keypoints, valid) - network(images)).abs().max() > 0.05


@torch.no_grad()
def test_the_order_of_keypoints_does_not_matter(network):
    images, keypoints, valid = batch([9, 5])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    assert close(network(images, keypoints[:, order], valid[:, order]), network(images, keypoints, valid))


@torch.no_grad()
def test_padding_does_not_matter(network):
    images, keypoints, valid = batch([6, 6])
    more = torch.cat([keypoints, torch.full((2, 4, 2), torch.nan)], dim=1)
    padded = torch.cat([valid, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    assert close(network(images, more, padded), network(images, keypoints, valid))
    assert close(network(images, keypoints), network(images, keypoints, valid))


@torch.no_grad()
@pytest.mark.parametrize("counts", [[7, 0, 1, 20], [0, 0, 3], [5, 5]])
def test_a_slice_alone_is_the_slice_in_a_batch(network, counts):
    images, keypoints, valid = batch(counts)
    together = network(images, keypoints, valid)
    for row, count in enumerate(counts):
        one = slice(row, row + 1)
        assert close(network(images[one], keypoints[one, :count]), together[one])
        assert close(network(images[one], keypoints[one], valid[one]), together[one])


@torch.no_grad()
def test_no_keypoints_are_an_empty_map(network):
    images, keypoints, valid = batch([4, 3])
    nothing = network(images)
    assert nothing.isfinite().all()
    assert close(network(images, keypoints, torch.zeros_like(valid)), nothing)
    assert close(network(images, torch.zeros(2, 0, 2)), nothing)
    encoder = network.encoder
    assert encoder(images).keypoint_features[0].shape == (0, 16)
    # What the first KAF layer adds is what its convolutions make of zeros.
    added = encoder(images).maps[0][:, 4:]
    assert close(added, encoder.kaf_layers["1"].diffusion(torch.zeros(2, 16, *SIZE)))


@torch.no_grad()
def test_y_and_x_are_not_confused(network):
    images, _, _ = batch([1])
    low, right = torch.tensor([[[44.0, 3.0]]]), torch.tensor([[[3.0, 60.0]]])
    nothing = network.encoder(images).maps[0]
    for point in (low, right):
        changed = (network.encoder(images, point).maps[0] - nothing)[0].abs().sum(0) > 1e-6
        where = changed.nonzero()
        assert (where - point[0, 0].long()).abs().max() == 2  # two 3x3 convolutions reach two pixels
        assert where.double().mean(0).tolist() == point[0, 0].tolist()


@torch.no_grad()
def test_transposing_transposes():
    """With symmetric kernels and position code, a transposed slice gives transposed logits."""
    network = kaf_network()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.copy_((module.weight + module.weight.transpose(2, 3)) / 2)
    for layer in network.encoder.kaf_layers.values():
        first = layer.position_encoder.mlp[0].weight
        first.copy_(first.mean(1, keepdim=True).expand_as(first))
    images, keypoints, valid = batch([12])
    logits = network(images, keypoints, valid)
    turned = network(images.transpose(2, 3), keypoints.flip(-1), valid)
    assert close(turned.transpose(2, 3), logits)
    assert not close(network(images.transpose(2, 3), keypoints, valid).transpose(2, 3), logits)


@torch.no_grad()
def test_keypoints_at_the_border_and_beyond(network):
    images, _, _ = batch([1])
    corners = torch.tensor([[[0.0, 0.0], [47.0, 63.0], [-0.5, 63.49], [47.49, -0.5]]])
    logits = network(images, corners)
    assert logits.isfinite().all()
    assert close(network(images, torch.tensor([[[0.0, 0.0], [47, 63], [0, 63], [47, 0]]])), logits)


@torch.no_grad()
def test_sub_pixel_positions_fall_into_their_pixel(network):
    """Pixel centres are at integers: -0.4 .. 0.4 about a centre is one pixel, at every level."""
    images, _, _ = batch([1])
    at = network(images, torch.tensor([[[15.0, 31.0], [16.0, 32.0]]]))
    assert close(network(images, torch.tensor([[[15.4, 30.6], [15.6, 32.4]]])), at)
    assert not close(network(images, torch.tensor([[[15.6, 31.0], [16.0, 32.0]]])), at)


@torch.no_grad()
def test_the_position_code_does_not_depend_on_the_crop_with_a_reference():
    """With a fixed reference the code is measured from the middle in a fixed unit."""
    small, large = torch.tensor([[24.0, 32.0]]), torch.tensor([[56.0, 80.0]])
    encoder = kaf_network().encoder.kaf_layers["1"].position_encoder
    inside = encoder(small + 3, small[0], 64.0)
    assert close(encoder(large + 3, large[0], 64.0), inside)


@pytest.mark.parametrize("architecture", ["kaf-unet", "unet", "unet-c2"])
def test_gradients_reach_every_parameter(architecture):
    # In evaluation mode normalisation does not cancel the biases before it.
    network = kaf_network(architecture=architecture)
    images, keypoints, valid = batch([9, 0, 4])
    logits = network(images, keypoints, valid)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weight).sum().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


@pytest.mark.parametrize("counts", [[0, 0], [1, 0], [2, 0], [3, 5]])
def test_training_with_hardly_any_keypoints(counts):
    network = kaf_network().train()
    images, keypoints, valid = batch([max(count, 1) for count in counts])
    valid = torch.arange(valid.shape[1]) < torch.tensor(counts)[:, None]
    logits = network(images, keypoints, valid)
    logits.square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert all(value.isfinite().all() for value in network.state_dict().values())


@torch.no_grad()
def test_plain_networks_do_not_read_keypoints():
    for architecture in ("unet", "unet-c2"):
        network = kaf_network(architecture=architecture)
        images, keypoints, valid = batch([3, 2])
        assert torch.equal(network(images, keypoints, valid), network(images))


def test_wrong_shapes_are_named(network):
    images, keypoints, valid = batch([3, 2])
    wrong = [
        ((images[:, :, :40],), r"divisible by 16, got \(2, 1, 40, 64\)"),
        ((images[:, 0],), "got"),
        ((images, keypoints[:1]), r"\(2, N, 2\) as \(y, x\), got \(1, 3, 2\)"),
        ((images, keypoints, valid[:, :2]), r"got torch.bool \(2, 2\)"),
        ((images, keypoints, valid.long()), "got torch.int64"),
    ]
    for inputs, message in wrong:
        with pytest.raises(ValueError, match=message):
            network(*inputs)


def test_a_narrow_decoder_reads_the_same_encoder():
    wide, narrow = (
        build_network(ModelConfig.preset("small", num_classes=4, decoder=kind)).eval()
        for kind in ("wide", "narrow")
    )
    assert wide.encoder.widths == narrow.encoder.widths == [16, 32, 128, 256]
    assert narrow.encoder.decoder_widths == [16, 32, 64, 128]
    assert sum(p.numel() for p in narrow.parameters()) < 0.5 * sum(p.numel() for p in wide.parameters())
    images, keypoints = torch.randn(1, 1, 48, 64), torch.rand(1, 7, 2) * 40
    assert narrow(images, keypoints).shape == wide(images, keypoints).shape == (1, 4, 48, 64)
