"""Replayed steps, with a recording that computes again instead of a GPU's graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from kaf_model import engine, replay
from kaf_model.config import FinetuneConfig, ModelConfig
from kaf_model.datasets import LabelledBatch, Views
from kaf_model.engine import Trainer, make_fabric
from kaf_model.finetune import FinetuningNetwork
from kaf_model.replay import GradientReplay
from kaf_model.unet import build_network


class Recorder:
    """Stands in for `replay.recorded`; counts what is recorded and replayed."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(
        self, gradients: Callable[[], Mapping[str, Tensor]], module: nn.Module
    ) -> tuple[SimpleNamespace, dict[str, Tensor]]:
        self.recordings += 1
        losses = {name: loss.detach() for name, loss in gradients().items()}
        written = [p.grad for p in module.parameters() if p.grad is not None]

        def again() -> None:
            self.replays += 1
            module.zero_grad(set_to_none=True)
            for name, loss in gradients().items():
                losses[name].copy_(loss.detach())
            found = [p.grad for p in module.parameters() if p.grad is not None]
            for static, gradient in zip(written, found, strict=True):
                static.copy_(gradient)

        return SimpleNamespace(replay=again), losses


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(replay, "recorded", made)
    return made


def network(architecture: str = "unet") -> FinetuningNetwork:
    torch.manual_seed(0)
    model = ModelConfig(architecture=architecture, start_channels=4, embedding_width=8, heads=2)
    return FinetuningNetwork(build_network(model), FinetuneConfig())


def batch(seed: int, side: int = 32) -> LabelledBatch:
    generator = torch.Generator().manual_seed(seed)
    views = Views(
        torch.randn(2, 1, side, side, generator=generator),
        torch.zeros(2, 0, 2),
        torch.zeros(2, 0, dtype=torch.bool),
    )
    return LabelledBatch(views, torch.randint(2, (2, side, side), generator=generator))


def trainer(module: nn.Module) -> Trainer:
    groups = [{"params": list(module.parameters()), "rate": 1.0}]
    config = FinetuneConfig(steps=4)
    return Trainer(module, config, fabric=make_fabric("cpu"), groups=groups, slices_per_epoch=10)


def train(module: nn.Module, *, replayed: bool) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    ours = trainer(module)
    if replayed:
        ours._replay = GradientReplay(module, nullcontext)
    steps = ours.run(lambda step, _parts: [batch(step, (32, 32, 48, 32)[step])], stage="finetuning")
    return [progress.losses for progress in steps], module.state_dict()


def test_a_replayed_training_is_the_same_training(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The recording that stands in for that of a GPU runs on the CPU, without its mixed precision.
    monkeypatch.setattr("kaf_model.engine.has_bfloat16", lambda _device: False)
    losses, weights = train(network(), replayed=False)
    assert recorder.recordings == 0
    replayed, their_weights = train(network(), replayed=True)
    assert (recorder.recordings, recorder.replays) == (2, 4)  # one of each shape
    assert replayed == losses
    assert all(torch.equal(their_weights[name], value) for name, value in weights.items())


def test_more_shapes_than_are_worth_it_are_computed_as_ever(recorder: Recorder) -> None:
    ours = GradientReplay(network(), nullcontext)
    sides = [16, 32, 48, 64, 80, 32]
    assert [ours(batch(0, side)) is None for side in sides] == [False, False, False, False, True, False]
    assert recorder.recordings == 4


def test_what_cannot_be_recorded_is_computed_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(gradients: Callable[[], Mapping[str, Tensor]], _module: nn.Module) -> None:
        gradients()
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = train(network(), replayed=False)
    monkeypatch.setattr(replay, "recorded", fails)
    losses, weights = train(network(), replayed=True)
    assert losses == expected[0]
    assert all(torch.equal(weights[name], value) for name, value in expected[1].items())


def test_memory_that_runs_out_splits_the_batch_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(replay, "recorded", runs_out)
    module = network()
    ours = trainer(module)
    ours._replay = GradientReplay(module, nullcontext)
    progress = next(ours.run(lambda step, parts: [batch(step)] * parts, stage="finetuning"))
    assert "each step now runs in 2 parts" in progress.message
    assert ours._replay is None


def test_only_networks_that_read_no_keypoints_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network("unet").same_operations
    assert network("unet-c2").same_operations
    assert not network("kaf-unet").same_operations
    fabric = SimpleNamespace(device=torch.device("cuda"), world_size=1, autocast=nullcontext)
    fabric.setup = lambda module, optimizer: (module, optimizer)
    for architecture, replayed in (("unet", True), ("kaf-unet", False)):
        module = network(architecture)
        groups = [{"params": list(module.parameters()), "rate": 1.0}]
        monkeypatch.setattr(engine, "channels_last", lambda module: None)
        made = Trainer(module, FinetuneConfig(), fabric=fabric, groups=groups, slices_per_epoch=1)
        assert (made._replay is not None) == replayed
