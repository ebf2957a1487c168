"""The masked-image loss: what it measures, what it hides, and what finetuning takes over from it."""

import math

import numpy as np
import pytest
import torch

from kaf_model.config import AugmentConfig, FinetuneConfig, ModelConfig, PretrainConfig, SliceConfig
from kaf_model.errors import UserError
from kaf_model.finetune import finetune
from kaf_model.labels import LabelledVolume, SliceStatus
from kaf_model.losses import hide_patches, masked_image_loss
from kaf_model.phantom import make_heart
from kaf_model.pretrain import PretrainingNetwork, pretrain
from kaf_model.unet import build_network
from kaf_model.volume import Volume

AUGMENT = AugmentConfig(crop=(48, 64), spatial_probability=0.0, intensity_probability=0.0)
MODEL = ModelConfig(
    start_channels=4, kaf_levels=(4,), embedding_width=8, heads=2, attention_blocks=1, diffusion_channels=8
)
MASKED = PretrainConfig(
    steps=4,
    batch_size=2,
    augment=AUGMENT,
    projection_width=16,
    sinkhorn_iterations=10,
    matching_rounds=1,
    weight_masked=1.0,
)
ALONE = MASKED.override(weight_pcl=0.0, weight_global=0.0, weight_local=0.0)


def heart(seed):
    phantom = make_heart(seed, shape=(4, 48, 64), spacing=(8.0, 2.0, 2.0))
    return Volume.from_array(phantom.image, phantom.spacing, name=f"heart{seed}"), phantom.labels


def finish(work):
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def pretrained(training, model=MODEL, **options):
    volumes = [heart(seed)[0] for seed in range(2)]
    return finish(
        pretrain(model, volumes, training, slices=SliceConfig(spacing=None), device="cpu", **options)
    )


def test_the_loss_is_the_mean_squared_error_of_what_was_hidden():
    images = torch.zeros(2, 1, 3, 4)
    predicted = torch.zeros(2, 1, 3, 4)
    hidden = torch.zeros(2, 3, 4, dtype=torch.bool)
    hidden[0, 0, :2] = True
    predicted[0, 0, 0, 0] = 3.0  # 9 and 0 over two hidden pixels
    predicted[1] = 100.0  # seen: does not count
    assert masked_image_loss(predicted, images, hidden).item() == 4.5
    assert masked_image_loss(predicted, images, torch.zeros_like(hidden)).item() == 0


def test_no_gradient_comes_from_what_was_seen():
    predicted = torch.randn(1, 1, 16, 32, requires_grad=True)
    hidden = hide_patches(1, (16, 32), patch=8, share=0.5, generator=torch.Generator().manual_seed(1))
    masked_image_loss(predicted, torch.zeros(1, 1, 16, 32), hidden).backward()
    assert torch.equal(predicted.grad[:, 0] != 0, hidden)


def test_whole_patches_are_hidden_in_their_share():
    hidden = hide_patches(50, (40, 56), patch=16, share=0.4, generator=torch.Generator().manual_seed(0))
    assert hidden.shape == (50, 40, 56)
    patch = hidden[:, :16, 16:32].flatten(1)
    assert (patch.all(1) | ~patch.any(1)).all()
    assert math.isclose(hidden.float().mean().item(), 0.4, abs_tol=0.03)


def test_the_network_does_not_see_what_is_hidden():
    torch.manual_seed(0)
    network = PretrainingNetwork(MODEL, ALONE)
    seen = []
    network.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    from kaf_model.datasets import PretrainingBatch, Views

    images = torch.ones(2, 1, 48, 64)
    hidden = torch.zeros(2, 48, 64, dtype=torch.bool)
    hidden[:, :16] = True
    views = Views(images, torch.zeros(2, 0, 2), torch.zeros(2, 0, dtype=torch.bool))
    losses = network(PretrainingBatch(views, torch.zeros(2), torch.zeros(1, 0, dtype=torch.long), hidden))
    assert set(losses) == {"total", "masked"}
    assert (seen[0][:, :, :16] == 0).all()
    assert (seen[0][:, :, 16:] == 1).all()


def test_it_is_added_to_the_losses_of_the_paper():
    result = pretrained(MASKED)
    last = result.curve[-1]
    assert set(last) == {"step", "total", "pcl", "global", "local", "masked"}
    total = last["pcl"] + last["global"] + 0.01 * last["local"] + last["masked"]
    assert math.isclose(last["total"], total, rel_tol=1e-4)


def test_it_is_learnt():
    result = pretrained(ALONE.override(steps=60, learning_rate=0.01))
    curve = [entry["masked"] for entry in result.curve]
    assert np.mean(curve[-10:]) < 0.85 * np.mean(curve[:10])


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    whole = pretrained(ALONE)
    output = tmp_path / "p.safetensors"
    work = pretrain(
        MODEL, [heart(seed)[0] for seed in range(2)], ALONE, slices=SliceConfig(spacing=None), device="cpu",
        output=output,
    )  # fmt: skip
    while not next(work).losses:
        pass
    work.close()
    assert pretrained(ALONE, output=output, resume=True).curve == whole.curve


def test_finetuning_takes_over_the_decoder_but_not_the_head():
    result = pretrained(ALONE)
    volume, labels = heart(5)
    case = LabelledVolume(volume, labels, {1: SliceStatus.COMPLETE, 2: SliceStatus.COMPLETE})
    training = FinetuneConfig(steps=1, batch_size=2, augment=AUGMENT, pseudo_labels={"share": 0.0})
    finetuned = finish(finetune(None, [case], training, start=result.checkpoint, device="cpu"))
    network = build_network(MODEL.override(num_classes=4))
    assert set(finetuned.start.initialised) == {name for name in network.state_dict() if "head" in name}


def test_a_network_without_decoder_is_refused():
    with pytest.raises(UserError, match="a kaf-fcn has none"):
        pretrained(ALONE, MODEL.override(architecture="kaf-fcn"))
