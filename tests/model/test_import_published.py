"""Import of the published implementation's weights: our networks compute what a literal one computes."""

import re

import pytest
import torch
from published_reference import PretrainingReference, SegmentationReference

from kaf_model.checkpoint import load_model, save_checkpoint
from kaf_model.config import PretrainConfig, Recipe
from kaf_model.errors import UserError
from kaf_model.import_published import import_published
from kaf_model.matching import log_optimal_transport
from kaf_model.pretrain import PretrainingNetwork
from kaf_model.unet import build_network


def randomised(network, seed=0):
    """Evaluation mode, running statistics and affine parameters not the initial ones, weights that carry far."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("running_mean"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
        elif name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.dim() > 1:
            value.mul_(2)
    return network.eval()


def slices(num_slices, seed=0, size=64):
    """Slices with 12 keypoints each, no two in one cell of the coarsest level, hence of any."""
    generator = torch.Generator().manual_seed(seed)
    cells = size // 8
    keypoints = []
    for _ in range(num_slices):
        chosen = torch.randperm(cells * cells, generator=generator)[:12]
        corner = torch.stack([chosen // cells, chosen % cells], dim=1) * 8
        keypoints.append(corner + torch.randint(0, 8, (12, 2), generator=generator))
    return torch.randn(num_slices, 1, size, size, generator=generator), torch.stack(keypoints)


@pytest.fixture(scope="module")
def segmentation():
    torch.manual_seed(0)
    return randomised(SegmentationReference(f=8, num_classes=4, blocks=3, width=64, diffusion=24))


@pytest.fixture(scope="module")
def pretraining():
    torch.manual_seed(1)
    network = randomised(PretrainingReference(f=4, blocks=2, width=32, diffusion=16, projection=24))
    network.superglue.final_proj.weight.data.mul_(
        0.1
    )  # scores of about one, which the transport does not magnify
    return network


@torch.no_grad()
def test_our_logits_are_those_of_the_published_network(segmentation, tmp_path):
    torch.save({"net": segmentation.state_dict(), "epoch": 3}, tmp_path / "authors.pth")
    imported = import_published(tmp_path / "authors.pth")
    images, keypoints = slices(2)
    theirs = segmentation(images, keypoints)
    model = load_model(save_checkpoint(tmp_path / "ours.safetensors", imported))
    ours = model.network(images, keypoints=keypoints.float())
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4
    without = model.network(images)
    assert (without - theirs).abs().max() > 0.1  # the keypoints matter to what was compared


def test_the_architecture_is_read_off_the_shapes(segmentation, tmp_path):
    torch.save(segmentation.state_dict(), tmp_path / "authors.pth")
    imported = import_published(tmp_path / "authors.pth", num_classes=4)
    assert imported.kind == "segmentation"
    config = imported.model
    assert (config.architecture, config.start_channels, config.num_classes) == ("kaf-unet", 8, 4)
    assert (config.embedding_width, config.attention_blocks, config.diffusion_channels) == (64, 3, 24)
    assert config.kaf_levels == (1, 2, 3, 4)
    assert config.heads == 4
    assert config.position_reference is None
    assert [label.value for label in imported.classes] == [0, 1, 2, 3]
    assert imported.slices == Recipe.preset("paper-chd").slices
    assert imported.history[0]["source"] == "authors.pth"
    assert imported.history[0]["unused_parameters_left_out"] == 4 * (64 * 64 + 64 + 1)


@torch.no_grad()
def test_pretraining_heads_and_matcher(pretraining, tmp_path):
    torch.save({"net": pretraining.state_dict()}, tmp_path / "authors.pth")
    imported = import_published(tmp_path / "authors.pth", num_classes=3)
    assert imported.kind == "pretrained"
    assert imported.classes == ()
    assert imported.model.num_classes == 3
    network = PretrainingNetwork(imported.model, PretrainConfig(projection_width=24, normalised_head=False))
    network.load_state_dict(imported.weights)
    network.eval()

    images, keypoints = slices(4, seed=1)
    c, g, scores = pretraining(images, keypoints)
    encoded = network.encoder(images, keypoints.float())
    assert torch.allclose(network.bottleneck_head(encoded.bottleneck), c, atol=1e-4)
    projected = network.keypoint_projection(torch.cat(encoded.keypoint_features, dim=1))
    assert torch.allclose(network.keypoint_head(projected, encoded.keypoints), g, atol=1e-4)
    assert 0.1 < scores.std() < 3
    matches = network.matcher(projected, encoded.keypoints, (64, 64))
    everything = torch.ones(2, 12, dtype=torch.bool)
    expected = log_optimal_transport(
        scores, pretraining.superglue.bin_score, everything, everything, iterations=100
    )
    assert torch.allclose(matches.log_assignment, expected, atol=1e-3)


@torch.no_grad()
def test_an_encoder_alone_is_a_pretrained_checkpoint(pretraining, tmp_path):
    state = {k: v for k, v in pretraining.state_dict().items() if k.startswith("encoder.")}
    torch.save(state, tmp_path / "authors.pth")
    imported = import_published(tmp_path / "authors.pth")
    assert imported.kind == "pretrained"
    network = build_network(imported.model)
    fitting = network.load_state_dict(imported.weights, strict=False)
    assert not fitting.unexpected_keys
    assert all(name.startswith(("decoder.", "head.")) for name in fitting.missing_keys)


def test_48_channels_are_acdc(tmp_path):
    torch.save(
        SegmentationReference(f=48, num_classes=4, width=8, blocks=1, diffusion=2).state_dict(),
        tmp_path / "a.pth",
    )
    imported = import_published(tmp_path / "a.pth")
    assert imported.slices == Recipe.preset("paper-acdc").slices
    assert imported.slices.spacing == 1.25


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"net": state},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 7},
        lambda state: {"net": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")},
    ],
)
def test_wrappers_prefixes_and_old_files(segmentation, tmp_path, wrap):
    torch.save(wrap(segmentation.state_dict()), tmp_path / "authors.pth")
    imported = import_published(tmp_path / "authors.pth")
    build_network(imported.model).load_state_dict(imported.weights)


def test_what_is_missing_or_unknown_is_named(segmentation, tmp_path):
    path = tmp_path / "authors.pth"

    def refused(state, message, **options):
        torch.save(state, path)
        with pytest.raises(UserError, match=message) as error:
            import_published(path, **options)
        assert "\n" not in str(error.value)

    good = segmentation.state_dict()
    missing = {n: v for n, v in good.items() if n != "encoder.graph_2.feature_mlp.bias"}
    refused(missing, re.escape("incomplete: encoder.kaf_layers.2.projection.bias"))
    refused({n: v for n, v in good.items() if ".proj.1." not in n}, "lacks a part")
    refused({**good, "encoder.surprise.weight": torch.zeros(1)}, "unknown encoder.surprise.weight")
    refused({**good, "decoder.head.01": torch.zeros(1)}, "unknown decoder.head.01")
    refused({**good, "encoder.center.0.weight": torch.zeros(2, 2, 3, 3)}, "does not fit together")
    refused({"weight": torch.zeros(3)}, "unknown weight")
    refused({"head.2.weight": torch.zeros(3, 3)}, "no encoder.blocks.0.0.weight")
    refused(good, "has 4 classes, 5 were asked for", num_classes=5)
    refused(torch.zeros(3), "holds Tensor")
    refused({}, "holds dict")
    refused({"net": good, "state_dict": 3} | {"net": [1]}, "no tensors")


def test_code_in_a_file_is_not_run(segmentation, tmp_path):
    torch.save(segmentation, tmp_path / "whole.pth")  # a pickled module, not its tensors
    with pytest.raises(UserError, match=r"state_dict\(\)"):
        import_published(tmp_path / "whole.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a torch file")
    with pytest.raises(UserError, match=r"broken\.pth"):
        import_published(tmp_path / "broken.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.pth is broken"):
        import_published(tmp_path / "empty.pth")
    with pytest.raises(UserError, match="no file at"):
        import_published(tmp_path / "nothing.pth")
