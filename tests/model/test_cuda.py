"""What a GPU computes, beside what the CPU computes; skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kaf_model import attention
from kaf_model.attention import PackedKeypoints, attend_packed, attend_padded
from kaf_model.checkpoint import load_model
from kaf_model.config import (
    FinetuneConfig,
    KeypointConfig,
    ModelConfig,
    PretrainConfig,
    PseudoLabelConfig,
    SliceConfig,
)
from kaf_model.datasets import LabelledBatch, PretrainingPairs, Views
from kaf_model.engine import channels_last, has_bfloat16
from kaf_model.finetune import FinetuningNetwork, finetune
from kaf_model.inference import InferenceNetwork
from kaf_model.labels import LabelledVolume, SliceStatus
from kaf_model.matching import log_optimal_transport
from kaf_model.phantom import make_heart
from kaf_model.preparation import prepare_volumes
from kaf_model.presets import PresetName
from kaf_model.pretrain import PretrainingNetwork, pretrain
from kaf_model.progress import Progress
from kaf_model.replay import GradientReplay
from kaf_model.segment import segment_volume
from kaf_model.unet import build_network
from kaf_model.volume import Volume

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SMALL = ModelConfig(
    start_channels=8, kaf_levels=(1, 2, 3, 4), embedding_width=16, heads=2, attention_blocks=2
)
SLICES = SliceConfig(spacing=None)


@pytest.fixture(autouse=True)
def _products_in_float32() -> Iterator[None]:
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = kept


def heart(seed: int) -> tuple[Volume, Any]:
    phantom = make_heart(seed, shape=(6, 64, 80), spacing=(8.0, 2.0, 2.0))
    return Volume.from_array(phantom.image, phantom.spacing, name=f"heart{seed}"), phantom.labels


def finish(work: Generator[Progress, None, Any]) -> tuple[list[Progress], Any]:
    reports = []
    while True:
        try:
            reports.append(next(work))
        except StopIteration as done:
            return reports, done.value


def inputs(slices: int, keypoints: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slices with keypoints of which some are padding; the last has none."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(slices, 1, side, side, generator=generator)
    positions = torch.rand(slices, keypoints, 2, generator=generator) * (side - 1)
    counts = torch.linspace(keypoints, 0, slices).long()
    return images, positions, torch.arange(keypoints) < counts[:, None]


@pytest.mark.parametrize("training", [True, False])
def test_the_network_gives_the_same_logits(training: bool) -> None:
    torch.manual_seed(0)
    network = build_network(SMALL).train(training)
    batch = inputs(4, 60, 64)
    with torch.no_grad():
        here = network(*batch)
        there = network.cuda()(*(part.cuda() for part in batch))
    torch.testing.assert_close(there.cpu(), here, atol=2e-3, rtol=2e-3)


def test_folded_inference_in_half_precision_agrees() -> None:
    torch.manual_seed(0)
    network = build_network(SMALL).eval()
    batch = inputs(4, 60, 64)
    with torch.no_grad():
        here = network(*batch).softmax(1)
    there = InferenceNetwork(network.cuda())(*(part.cuda() for part in batch)).float().softmax(1).cpu()
    assert (there - here).abs().mean() < 0.01


def test_losses_and_gradients_of_the_pretraining_agree() -> None:
    config = PretrainConfig(batch_size=3, augment={"crop": (64, 64)}, sinkhorn_iterations=20)
    _, prepared = finish(prepare_volumes([heart(0)[0], heart(1)[0]], SLICES, KeypointConfig()))
    data = PretrainingPairs(
        prepared,
        augment=config.augment,
        neighbour_range=config.neighbour_range,
        correspondences=config.correspondences,
        batch_size=3,
        seed=0,
    )
    torch.manual_seed(0)
    network = PretrainingNetwork(SMALL, config)
    batch = data.batch(0, torch.device("cpu"))
    here = network(batch)
    here["total"].backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    network.cuda()
    moved = batch._replace(
        views=type(batch.views)(*(part.cuda() for part in batch.views)),
        slice_position=batch.slice_position.cuda(),
        matches0=batch.matches0.cuda(),
    )
    there = network(moved)
    there["total"].backward()
    for name, loss in here.items():
        torch.testing.assert_close(there[name].cpu(), loss.detach(), atol=1e-3, rtol=1e-3)
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, parameter in network.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            miss = (parameter.grad.cpu() - gradients[name]).norm()
            # Those of biases before a normalisation are nothing but rounding.
            assert miss <= 0.05 * gradients[name].norm() + 1e-3 * largest, name


def test_transport_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, bin_score = torch.randn(3, 50, 70, generator=generator), torch.tensor(1.0)
    valid0, valid1 = torch.arange(50) < torch.tensor([[50], [20], [0]]), torch.arange(70).expand(3, -1) < 60
    here = log_optimal_transport(scores, bin_score, valid0, valid1, iterations=50)
    parts = [part.cuda() for part in (scores, bin_score, valid0, valid1)]
    there = log_optimal_transport(*parts, iterations=50).cpu()
    both = valid0[:, :, None] & valid1[:, None, :]
    torch.testing.assert_close(there[:, :-1, :-1][both], here[:, :-1, :-1][both], atol=1e-3, rtol=1e-3)


def test_packed_attention_is_padded_attention() -> None:
    assert attention.varlen_attn is not None
    generator = torch.Generator("cuda").manual_seed(0)
    positions = torch.rand(5, 70, 2, device="cuda", generator=generator)
    counts, others = torch.tensor([70, 3, 0, 41, 8]), torch.tensor([12, 0, 70, 41, 1])
    layouts = [
        PackedKeypoints.from_padded(positions, torch.arange(70, device="cuda") < some[:, None].cuda())
        for some in (counts, others)
    ]
    for here, there in (layouts, layouts[::-1], layouts[:1] * 2):
        rows = [
            torch.randn(len(layout), 32, device="cuda", generator=generator).bfloat16().requires_grad_()
            for layout in (here, there, there)
        ]
        wanted = torch.randn(len(here), 32, device="cuda", generator=generator).bfloat16()
        found = []
        for way in (attend_padded, attend_packed):
            attended = way(*rows, here, there, heads=4)
            found.append([attended, *torch.autograd.grad(attended, rows, wanted)])
        for padded, packed in zip(*found, strict=True):
            torch.testing.assert_close(packed, padded, atol=0.03, rtol=0.03)


Found = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def test_replayed_gradients_are_those_of_the_network() -> None:
    torch.manual_seed(0)
    model = ModelConfig(architecture="unet", start_channels=8)
    network = FinetuningNetwork(build_network(model), FinetuneConfig()).cuda()
    channels_last(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    replay = GradientReplay(network, lambda: torch.autocast("cuda", torch.bfloat16))

    def computed(batch: LabelledBatch) -> dict[str, Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            losses: dict[str, Tensor] = network(batch)
        losses["total"].backward()
        return losses

    def found(work: Callable[[LabelledBatch], dict[str, Tensor] | None], batch: LabelledBatch) -> Found:
        network.zero_grad(set_to_none=True)
        network.load_state_dict(before)
        losses = work(batch)
        assert losses is not None
        gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
        return {name: loss.detach().clone() for name, loss in losses.items()}, gradients, statistics

    for seed, side in ((0, 64), (1, 64), (2, 96), (3, 64)):
        generator = torch.Generator().manual_seed(seed)
        views = Views(
            torch.randn(3, 1, side, side, generator=generator).cuda(),
            torch.zeros(3, 0, 2, device="cuda"),
            torch.zeros(3, 0, dtype=torch.bool, device="cuda"),
        )
        batch = LabelledBatch(views, torch.randint(2, (3, side, side), generator=generator).cuda())
        for ours, plain in zip(found(replay, batch), found(computed, batch), strict=True):
            assert ours.keys() == plain.keys()
            for name in ours:
                torch.testing.assert_close(ours[name], plain[name], atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("preset", ["small", "base"])
def test_from_pretraining_to_a_segmented_volume(preset: PresetName, tmp_path: Path) -> None:
    volumes = [heart(seed) for seed in range(3)]
    crop = {"augment": {"crop": (64, 64)}}
    model = ModelConfig.preset(preset)
    start = tmp_path / "pretrained.safetensors"
    reports, _ = finish(
        pretrain(
            model,
            [volume for volume, _ in volumes],
            PretrainConfig.preset(preset, steps=6, batch_size=4, **crop),
            slices=SLICES,
            output=start,
            device="cuda",
        )
    )
    assert all(np.isfinite(list(report.losses.values())).all() for report in reports)
    output = tmp_path / "heart.safetensors"
    training = FinetuneConfig.preset(
        preset,
        steps=80,
        batch_size=4,
        early_crop=None,
        pseudo_labels=PseudoLabelConfig(least_slices=1, least_dice=0, start=0.5),
        **crop,
    )
    volume, labels = volumes[0]
    case = LabelledVolume(volume, labels.astype(np.int16), {z: SliceStatus.COMPLETE for z in range(6)})
    reports, result = finish(
        finetune(
            None, [case], training, start=start, unlabelled=[volumes[1][0]], output=output, device="cuda"
        )
    )
    losses = [report.losses["total"] for report in reports if report.losses]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert result.model.history[-1]["device"].startswith("cuda")
    assert any(report.stage == "labelling other slices" for report in reports)
    there = segment_volume(load_model(output, device="cuda"), volume)
    here = segment_volume(load_model(output, device="cpu"), volume)
    assert (there == here).mean() > 0.98


def test_a_stopped_training_goes_on(tmp_path: Path) -> None:
    volumes = [heart(seed)[0] for seed in range(2)]
    # A GPU adds in any order, and large steps of three pairs make half of a loss of what is rounded otherwise.
    training = PretrainConfig(
        steps=6, batch_size=3, augment={"crop": (64, 64)}, sinkhorn_iterations=10, learning_rate=1e-4
    )

    def train(path: Path, *, resume: bool = False) -> Generator[Progress, None, Any]:
        return pretrain(SMALL, volumes, training, slices=SLICES, output=path, device="cuda", resume=resume)

    whole, _ = finish(train(tmp_path / "whole.safetensors"))
    stopped = train(tmp_path / "stopped.safetensors")
    for progress in stopped:
        if progress.losses and progress.step == 3:
            stopped.close()
    rest, _ = finish(train(tmp_path / "stopped.safetensors", resume=True))
    expected = [progress.losses["total"] for progress in whole if progress.losses]
    found = [progress.losses["total"] for progress in rest if progress.losses]
    assert len(found) == 3
    assert found == pytest.approx(expected[3:], rel=0.15)  # steps differ from each other by more


def test_what_does_not_fit_the_memory_is_done_in_parts() -> None:
    volumes = [heart(seed)[0] for seed in range(2)]
    model = ModelConfig(start_channels=32, architecture="unet")
    training = PretrainConfig(steps=2, batch_size=64, augment={"crop": (256, 256)})
    torch.cuda.empty_cache()
    limit = (torch.cuda.memory_allocated() + 2 * 2**30) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        reports, result = finish(pretrain(model, volumes, training, slices=SLICES, device="cuda"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("memory ran out" in report.message for report in reports)
    assert result.checkpoint.history[-1]["parts"] > 1
    assert result.checkpoint.history[-1]["steps"] == 2


def test_new_gpus_compute_in_half_precision() -> None:
    new = torch.cuda.get_device_capability() >= (8, 0)
    assert has_bfloat16(torch.device("cuda")) == new
