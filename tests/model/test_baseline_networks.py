"""FCN, KAF-FCN, Swin UNETR and Swin-Unet: their form and size, the laws they share with the UNets, and their use."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from kaf_model import engine
from kaf_model.benchmark.networks import NETWORKS
from kaf_model.checkpoint import load_model
from kaf_model.config import AugmentConfig, FinetuneConfig, ModelConfig, SliceConfig
from kaf_model.fcn import FcnHead
from kaf_model.finetune import finetune
from kaf_model.inference import InferenceNetwork
from kaf_model.labels import LabelledVolume, SliceStatus
from kaf_model.phantom import make_heart
from kaf_model.segment import segment_volume
from kaf_model.unet import Encoder, build_encoder, build_network
from kaf_model.volume import Volume

SIZE = (48, 64)
NEW = ["fcn", "kaf-fcn", "swin-unetr", "swin-unet"]
SWIN = NEW[2:]


def config(architecture, **overrides):
    settings = {
        "start_channels": 12,
        "kaf_levels": (1, 3, 4),
        "embedding_width": 16,
        "heads": 2,
        "attention_blocks": 1,
        "diffusion_channels": 8,
        "num_classes": 3,
        "position_reference": 64.0,
    }
    return ModelConfig(architecture=architecture, **{**settings, **overrides})


def network(architecture, **overrides):
    """A small network in evaluation mode, with running statistics as after some training."""
    torch.manual_seed(0)
    built = build_network(config(architecture, **overrides))
    for name, value in built.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.3, 1.0)
    return built.eval()


def batch(counts, size=SIZE):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(len(counts), 1, *size, generator=generator)
    keypoints = torch.rand(len(counts), max(counts), 2, generator=generator) * (torch.tensor(size) - 1.0)
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return images, keypoints, valid


def close(first, second):
    return torch.allclose(first, second, atol=1e-5, rtol=0)


def count(architecture, **overrides):
    built = build_network(ModelConfig(architecture=architecture, **overrides))  # MONAI cannot build on "meta"
    return sum(parameter.numel() for parameter in built.parameters())


# Form and size


@pytest.mark.parametrize("architecture", ["kaf-unet", "unet", "unet-c2", *NEW])
def test_every_network_reads_as_many_slices_as_it_is_told(architecture, monkeypatch):
    monkeypatch.setattr(engine, "has_bfloat16", lambda device: False)
    built, (images, keypoints, valid) = network(architecture, input_slices=3), batch((5, 3))
    together = torch.cat([images, 2 * images, -images], 1)
    logits = built(together, keypoints, valid)
    assert logits.shape == (2, 3, *SIZE)
    for place in range(3):
        changed = together.clone()
        changed[:, place] += 1
        assert not close(built(changed, keypoints, valid), logits)
    assert close(InferenceNetwork(built)(together, keypoints, valid), logits)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\)"):
        built(images, keypoints, valid)


def test_the_published_sizes():
    # Swin-Unet has 27.17 M with 3 input channels and 9 classes.
    assert count("swin-unet", start_channels=96, num_classes=9) + 2 * 96 * 16 == pytest.approx(
        27.17e6, abs=5e3
    )
    unet, fcn = (ModelConfig.preset("paper-chd", architecture=name) for name in ("unet", "fcn"))
    with torch.device("meta"):
        encoder = sum(parameter.numel() for parameter in build_encoder(unet).parameters())
    # The FCN is the UNet's encoder with 1x1 scores of 512, 256 and 128 channels and two 4x4 upsamplings.
    classes = fcn.num_classes
    scores = (512 + 256 + 128) * classes + 3 * classes
    assert count("fcn", start_channels=32, num_classes=classes) == encoder + scores + 2 * 16 * classes**2


def test_the_kaf_fcn_is_the_fcn_with_the_layers_of_the_kaf_unet():
    kaf_unet, kaf_fcn = network("kaf-unet"), network("kaf-fcn")
    kaf_fcn.encoder.load_state_dict(kaf_unet.encoder.state_dict())
    images, keypoints, valid = batch([7, 3])
    for ours, theirs in zip(
        kaf_fcn.encoder(images, keypoints, valid).maps,
        kaf_unet.encoder(images, keypoints, valid).maps,
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_the_fcn_adds_upsampled_scores():
    encoder = Encoder(config("fcn")).eval()
    head = FcnHead(encoder, 3)
    encoded = encoder(batch([1])[0])
    scored = [score(features) for score, features in zip(
        head.scores, (encoded.bottleneck, encoded.maps[3], encoded.maps[2]), strict=True)]  # fmt: skip
    total = scored[0]
    for finer in scored[1:]:  # a new upsampling is bilinear, but for the border, where it sees zeros
        total = functional.interpolate(total, scale_factor=2, mode="bilinear", align_corners=False) + finer
    expected = functional.interpolate(total, scale_factor=4, mode="bilinear", align_corners=False)
    logits = head(encoded)
    assert logits.shape == (1, 3, *SIZE)
    middle = (..., slice(22, 26), slice(22, 42))
    assert close(logits[middle], expected[middle])
    assert not close(logits, expected)


@torch.no_grad()
def test_swin_unetr_is_that_of_monai(monkeypatch):
    from monai.networks.nets import SwinUNETR, swin_unetr

    def rearrange(tensor, pattern):
        before, after = (side.split() for side in pattern.split("->"))
        return tensor.permute([before.index(axis) for axis in after])

    monkeypatch.setattr(swin_unetr, "rearrange", rearrange)  # einops, which is not needed otherwise
    ours = network("swin-unetr")
    theirs = SwinUNETR(in_channels=1, out_channels=3, feature_size=12, spatial_dims=2).eval()
    theirs.swinViT.load_state_dict(ours.encoder.transformer.state_dict())
    missing, unexpected = theirs.load_state_dict(ours.decoder.blocks.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(("swinViT.", "out.")) for name in missing)
    theirs.out.conv.conv.weight.copy_(ours.head.weight)
    theirs.out.conv.conv.bias.zero_()
    images = batch([1, 1], (128, 160))[0]  # every map is at least a window
    assert close(ours(images), theirs(images))


@torch.no_grad()
@pytest.mark.parametrize("architecture", SWIN)
def test_small_slices_are_attended_in_whole_windows(architecture):
    """A slice in the corner of a larger, empty map is attended as it is alone."""
    from kaf_model.swin import attend_in_windows

    stage = network(architecture).encoder.transformer.layers2[0]
    small = torch.randn(1, 24, 4, 6)
    window = torch.zeros(1, 24, 7, 7)
    window[..., :4, :6] = small
    assert close(attend_in_windows(stage, small), attend_in_windows(stage, window)[..., :2, :3])


# Laws


@torch.no_grad()
@pytest.mark.parametrize("architecture", NEW)
def test_a_slice_alone_is_the_slice_in_a_batch(architecture):
    model = network(architecture)
    images, keypoints, valid = batch([7, 0, 12])
    together = model(images, keypoints, valid)
    assert together.shape == (3, 3, *SIZE)
    for row, number in enumerate([7, 0, 12]):
        one = slice(row, row + 1)
        assert close(model(images[one], keypoints[one, :number]), together[one])


@torch.no_grad()
@pytest.mark.parametrize("architecture", NEW)
def test_the_order_of_keypoints_does_not_matter(architecture):
    model = network(architecture)
    images, keypoints, valid = batch([9, 5])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    logits = model(images, keypoints, valid)
    assert close(model(images, keypoints[:, order], valid[:, order]), logits)
    matters = (logits - model(images)).abs().max() > 1e-3
    assert bool(matters) == (architecture == "kaf-fcn")


@torch.no_grad()
@pytest.mark.parametrize("architecture", NEW)
@pytest.mark.parametrize("size", [(16, 16), (48, 64), (80, 112), (240, 32)])
def test_slices_of_any_size(architecture, size):
    logits = network(architecture)(batch([1], size)[0])
    assert logits.shape == (1, 3, *size)
    assert logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("architecture", NEW)
def test_the_folded_network_gives_the_same_logits(architecture, monkeypatch):
    model = network(architecture)
    inputs = batch([7, 0, 12])
    logits = model(*inputs)
    monkeypatch.setattr(engine, "has_bfloat16", lambda device: False)
    assert close(InferenceNetwork(model)(*inputs), logits)
    monkeypatch.setattr(engine, "has_bfloat16", lambda device: True)
    halved = InferenceNetwork(model)(*inputs)
    assert (halved - logits).abs().max() < 0.1 * logits.abs().max()


@pytest.mark.parametrize("architecture", NEW)
def test_gradients_reach_every_parameter(architecture):
    model = network(architecture)
    logits = model(*batch([9, 0, 4], (64, 96)))
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


@pytest.mark.parametrize("architecture", SWIN)
def test_widths_that_heads_do_not_divide_are_refused(architecture):
    with pytest.raises(ValueError, match=r"start_channels .* must divide by 12, got 16; published: 48"):
        ModelConfig(architecture=architecture, start_channels=16)


def test_a_kaf_fcn_needs_a_level():
    with pytest.raises(ValueError, match="architecture 'fcn' for none"):
        ModelConfig(architecture="kaf-fcn", kaf_levels=())


def test_monai_is_imported_for_swin_networks_only():
    program = (
        "import sys; import kaf_model.benchmark.networks, kaf_model.benchmark.starts; "
        "from kaf_model.unet import build_network; from kaf_model.config import ModelConfig; "
        "names = ('unet', 'unet-c2', 'kaf-unet', 'fcn', 'kaf-fcn'); "
        "[build_network(ModelConfig(architecture=name)) for name in names]; "
        "sys.exit('monai' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


# The registry, and training, saving and applying what is in it


def test_configurations():
    small, published = ModelConfig.preset("small", num_classes=4), ModelConfig.preset("paper-acdc")
    for name, entry in NETWORKS.items():
        for recipe in (small, published):
            built = entry.configure(recipe)
            assert built.architecture == name
            assert built.num_classes == recipe.num_classes == 4
            assert built.kaf_levels == recipe.kaf_levels
    assert NETWORKS["swin-unetr"].configure(published).start_channels == 48
    assert NETWORKS["swin-unet"].configure(published).start_channels == 96
    assert NETWORKS["fcn"].configure(small).start_channels == 16


@pytest.mark.parametrize("architecture", NEW)
def test_training_saving_and_segmenting(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "has_bfloat16", lambda device: False)
    phantom = make_heart(0, shape=(4, 48, 64), spacing=(8.0, 2.0, 2.0))
    volume = Volume.from_array(phantom.image, phantom.spacing, name="heart")
    statuses = {1: SliceStatus.COMPLETE, 2: SliceStatus.COMPLETE}
    case = LabelledVolume(volume, phantom.labels, statuses)
    augment = AugmentConfig(crop=(48, 64), elastic_sigma=(6.0, 9.0), elastic_alpha=(0.0, 40.0))
    training = FinetuneConfig(steps=3, batch_size=2, augment=augment, averaging=0.0)
    path = tmp_path / "model.safetensors"

    def train(**options):
        work = finetune(
            config(architecture), [case], training, slices=SliceConfig(spacing=None), device="cpu", **options
        )
        return contextlib.closing(work)

    with train() as work:
        whole = finish(work)
    with train(output=path) as work:
        while next(work).losses.get("total") is None:
            pass
    with train(output=path, resume=True) as work:
        resumed = finish(work)
    assert resumed.curve == whole.curve
    assert all(np.isfinite(entry["total"]) for entry in whole.curve)
    loaded = load_model(path)
    assert loaded.config.architecture == architecture
    labels = segment_volume(loaded, volume)
    assert labels.shape == volume.shape
    assert np.array_equal(labels, segment_volume(whole.model, volume))


def finish(work):
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value
