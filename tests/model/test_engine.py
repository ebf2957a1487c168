"""Pretraining, finetuning and segmentation of tiny hearts: resuming, stopping, failing, starting, sharing out."""

import contextlib
import itertools
import math
from dataclasses import replace
from functools import partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from two_processes import run_in_two

from kaf_model import (
    averaging,
    engine,
    preparation,
)
from kaf_model import (
    finetune as finetune_module,
)
from kaf_model import (
    pretrain as pretrain_module,
)
from kaf_model import (
    segment as segment_module,
)
from kaf_model.anatomy import keep_largest_components
from kaf_model.checkpoint import CheckpointError, ClassLabel, load_checkpoint, load_model
from kaf_model.config import (
    AugmentConfig,
    FinetuneConfig,
    KeypointConfig,
    ModelConfig,
    PretrainConfig,
    PseudoLabelConfig,
    SegmentConfig,
    SliceConfig,
)
from kaf_model.engine import (
    NonFiniteLoss,
    OutOfMemory,
    choose_device,
    generator_for,
    learning_rate_factor,
    make_fabric,
)
from kaf_model.errors import UserError
from kaf_model.finetune import finetune
from kaf_model.labels import ClassMap, LabelledVolume, SliceStatus
from kaf_model.losses import IGNORED
from kaf_model.phantom import make_heart
from kaf_model.prediction import predict_slices
from kaf_model.preparation import LabelledSlice, prepare_volumes
from kaf_model.pretrain import pretrain
from kaf_model.propagation import propagate
from kaf_model.segment import segment, segment_volume
from kaf_model.slices import Slices
from kaf_model.training_files import resume_path
from kaf_model.unet import build_network
from kaf_model.volume import Volume

COMPLETE, PARTIAL, EMPTY = SliceStatus.COMPLETE, SliceStatus.PARTIAL, SliceStatus.EMPTY
SMALL = ModelConfig(
    start_channels=4,
    kaf_levels=(3, 4),
    embedding_width=8,
    heads=2,
    attention_blocks=1,
    diffusion_channels=8,
    position_reference=64.0,
)
AUGMENT = AugmentConfig(crop=(48, 64), elastic_sigma=(6.0, 9.0), elastic_alpha=(0.0, 40.0))
SLICES = SliceConfig(spacing=None)
PRETRAIN = PretrainConfig(
    steps=5, batch_size=3, augment=AUGMENT, projection_width=16, sinkhorn_iterations=10, matching_rounds=1
)
PSEUDO = PseudoLabelConfig(
    share=0.0, start=0.2, every=0.4, slices=3, least_slices=1, confidence=0.0, least_dice=0
)
FINETUNE = FinetuneConfig(steps=5, batch_size=3, augment=AUGMENT, pseudo_labels=PSEUDO)


def heart(seed, num_slices=4):
    """A heart as a volume, and its labels."""
    phantom = make_heart(seed, shape=(num_slices, 48, 64), spacing=(8.0, 2.0, 2.0))
    volume = Volume.from_array(phantom.image, phantom.spacing, name=f"heart{seed}")
    return volume, phantom.labels


def labelled(seed, statuses=None, values=(0, 1, 2, 3)):
    volume, labels = heart(seed)
    return LabelledVolume(volume, np.array(values, np.int16)[labels], statuses or {1: COMPLETE, 2: COMPLETE})


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    monkeypatch.setattr(engine, "has_bfloat16", lambda device: False)


def run(generator, steps=None):
    """Reports and result; closed after some training steps if told so."""
    reports = []
    with contextlib.closing(generator):
        while True:
            try:
                reports.append(next(generator))
            except StopIteration as done:
                return reports, done.value
            if steps is not None and sum(bool(report.losses) for report in reports) == steps:
                return reports, None


def run_pretrain(training=PRETRAIN, *, steps=None, volumes=None, config=SMALL, **options):
    volumes = volumes or [heart(seed)[0] for seed in range(2)]
    return run(pretrain(config, volumes, training, slices=SLICES, device="cpu", **options), steps)


def run_finetune(training=FINETUNE, *, steps=None, cases=None, config=SMALL, **options):
    options = {"slices": SLICES, **options} if not options.get("start") else options
    return run(finetune(config, cases or [labelled(0)], training, device="cpu", **options), steps)


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


# Small parts


def test_devices(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert choose_device("auto").type == device
    with pytest.raises(UserError, match="unknown device 'tpu'; choose one of auto, cpu, cuda, mps"):
        choose_device("tpu")
    with pytest.raises(UserError, match="no cuda device here"):
        choose_device("cuda")


def test_generators_differ_in_every_number():
    draws = {tuple(torch.randint(2**30, (3,), generator=generator_for(*numbers)).tolist())
             for numbers in [(0,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 1), (0, 1, 0), (2**40, 0)]}  # fmt: skip
    assert len(draws) == 8
    assert torch.equal(
        torch.rand(3, generator=generator_for(5, 6)), torch.rand(3, generator=generator_for(5, 6))
    )


def test_the_learning_rate_rises_falls_and_ends_at_the_floor():
    config = FinetuneConfig(warmup=0.1, learning_rate_floor=0.2)
    factors = [learning_rate_factor(config, fraction / 1000) for fraction in range(1001)]
    assert factors[0] == 0.01
    assert factors[50] == pytest.approx(0.5)
    assert max(factors) == factors[100] == 1
    assert factors[550] == pytest.approx(0.6)  # halfway down
    assert factors[-1] == pytest.approx(0.2)
    assert learning_rate_factor(config, 1.5) == pytest.approx(0.2)
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[100:]))
    assert learning_rate_factor(FinetuneConfig(warmup=0), 0) == 1


# Pretraining


def test_pretraining_reports_and_returns_an_encoder(tmp_path):
    reports, result = run_pretrain(output=tmp_path / "p.safetensors")
    trained = [report for report in reports if report.stage == "pretraining"]
    assert [report.step for report in trained] == [1, 2, 3, 4, 5]
    assert {report.total for report in trained} == {5}
    assert list(trained[0].losses) == ["total", "pcl", "global", "local"]
    assert trained[-1].eta == 0
    for report in trained:
        parts = report.losses
        assert parts["total"] == pytest.approx(
            parts["pcl"] + parts["global"] + 0.01 * parts["local"], rel=1e-5
        )
    assert [entry["step"] for entry in result.curve] == [1, 2, 3, 4, 5]
    checkpoint = load_checkpoint(tmp_path / "p.safetensors")
    assert checkpoint.kind == "pretrained"
    assert checkpoint.history[0]["complete"]
    assert checkpoint.history[0]["num_slices"] == 8
    assert equal(dict(checkpoint.weights), dict(result.checkpoint.weights))
    assert not resume_path(tmp_path / "p.safetensors").exists()


def test_pretraining_learns():
    training = PRETRAIN.override(steps=30, augment=AUGMENT.override(spatial_probability=0.3))
    _, result = run_pretrain(training)
    for name in ("total", "local"):
        values = [entry[name] for entry in result.curve]
        assert np.mean(values[-5:]) < np.mean(values[:5]), name


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_losses_of_weight_zero_are_left_out(weights):
    names = ("weight_pcl", "weight_global", "weight_local")
    training = PRETRAIN.override(steps=1, **dict(zip(names, weights, strict=True)))
    _, result = run_pretrain(training)
    assert set(result.curve[0]) == {"step", "total", ("pcl", "global", "local")[weights.index(1)]}


@pytest.mark.parametrize(("levels", "weight_pcl"), [((2, 3), 0.0), ((3, 4), 0.0), ((2, 3), 1.0)])
def test_what_no_loss_reads_is_frozen_for_no_process_to_wait_for(levels, weight_pcl):
    training = PRETRAIN.override(weight_pcl=weight_pcl)
    network = pretrain_module.PretrainingNetwork(SMALL.override(kaf_levels=levels), training)
    data = pretrain_module.KeypointAugmented().batches(
        run(prepare_volumes([heart(0)[0]], SLICES, KeypointConfig()))[1], training
    )
    network(data.batch(0, torch.device("cpu")))["total"].backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = sum(not parameter.requires_grad for parameter in network.parameters())
    assert bool(frozen) == (not weight_pcl)


def test_a_network_without_keypoints_pretrains_its_bottleneck():
    plain = SMALL.override(architecture="unet")
    _, result = run_pretrain(PRETRAIN.override(steps=1), config=plain)
    assert set(result.curve[0]) == {"step", "total", "pcl"}
    with pytest.raises(UserError, match="nothing to learn"):
        run_pretrain(PRETRAIN.override(weight_pcl=0.0), config=plain)


def test_slices_without_keypoints_pretrain():
    flat = Volume.from_array(np.tile(np.linspace(0, 1, 64, dtype=np.float32), (3, 48, 1)), name="flat")
    _, result = run_pretrain(PRETRAIN.override(steps=2), volumes=[flat])
    assert result.curve[-1]["local"] == 0
    assert all(value.isfinite().all() for value in result.checkpoint.weights.values())


# Stopping and going on


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_pretraining_is_the_uninterrupted_one(tmp_path, optimizer):
    training = PRETRAIN.override(optimizer=optimizer, batch_size=5)  # 8 slices: the break is within an epoch
    _, whole = run_pretrain(training)
    output = tmp_path / "p.safetensors"
    run_pretrain(training, steps=2, output=output)
    assert load_checkpoint(output).history[0]["steps"] == 2
    assert not load_checkpoint(output).history[0]["complete"]
    reports, resumed = run_pretrain(training, output=output, resume=True)
    assert [report.step for report in reports if report.losses] == [3, 4, 5]
    assert resumed.curve == whole.curve
    assert equal(dict(resumed.checkpoint.weights), dict(whole.checkpoint.weights))
    assert not resume_path(output).exists()


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_resumed_finetuning_is_the_uninterrupted_one(tmp_path, optimizer):
    training = FINETUNE.override(
        optimizer=optimizer,
        holdout=0.4,
        holdout_every=2,
        pseudo_labels=PSEUDO.override(share=0.5),
        early_crop=(32, 32),
    )
    options = {"cases": [labelled(0), labelled(1)], "unlabelled": [heart(2)[0]]}
    _, whole = run_finetune(training, **options)
    output = tmp_path / "m.safetensors"
    run_finetune(training, steps=3, output=output, **options)
    _, resumed = run_finetune(training, output=output, resume=True, **options)
    assert resumed.curve == whole.curve
    assert equal(resumed.model.network.state_dict(), whole.model.network.state_dict())


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_finetuning_closed_at_any_step_leaves_a_model(tmp_path, steps):
    output = tmp_path / "m.safetensors"
    reports, _ = run_finetune(steps=steps, output=output)
    assert reports[-1].step == steps
    model = load_model(output)
    assert model.history[-1]["steps"] == steps
    assert segment_volume(model, heart(5)[0]).shape == (4, 48, 64)
    if steps < 5:
        assert resume_path(output).is_file()
        _, resumed = run_finetune(output=output, resume=True)
        assert len(resumed.curve) == 5


def test_a_pretraining_closed_at_its_last_step_is_kept(tmp_path):
    output = tmp_path / "p.safetensors"
    run_pretrain(steps=5, output=output)
    assert load_checkpoint(output).history[0]["steps"] == 5


def test_closing_while_preparing_leaves_nothing(tmp_path):
    work = pretrain(
        SMALL, [heart(0)[0]], PRETRAIN, slices=SLICES, output=tmp_path / "p.safetensors", device="cpu"
    )
    assert next(work).stage == "preparing"
    work.close()
    assert list(tmp_path.iterdir()) == []


def test_resuming_something_else_is_refused(tmp_path):
    output = tmp_path / "m.safetensors"
    with pytest.raises(UserError, match="nothing to resume"):
        run_finetune(output=output, resume=True)
    with pytest.raises(UserError, match="resuming needs the output file"):
        run_finetune(resume=True)
    run_finetune(steps=1, output=output)
    with pytest.raises(UserError, match=r"cannot resume .*training was"):
        run_finetune(FINETUNE.override(learning_rate=0.5), output=output, resume=True)
    with pytest.raises(UserError, match="labelled was"):
        run_finetune(cases=[labelled(0, {1: COMPLETE})], output=output, resume=True)
    with pytest.raises(UserError, match="keypoints was"):
        run_finetune(keypoints=KeypointConfig(max_keypoints=5), output=output, resume=True)
    run_finetune(output=output, resume=True)
    with pytest.raises(UserError, match="is complete"):
        run_finetune(output=output, resume=True)


def test_outputs_that_cannot_be_written_are_refused_before_the_work(tmp_path):
    with pytest.raises(UserError, match=r"named NAME\.safetensors, got model\.pth"):
        run_finetune(output=tmp_path / "model.pth")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        run_finetune(output=tmp_path / "file" / "m.safetensors")
    for name in ("m.safetensors", "n.resume.safetensors"):
        (tmp_path / name).mkdir()
    for name, taken in (("", tmp_path.name), ("m.safetensors",) * 2, ("n.safetensors", "n.resume")):
        with pytest.raises(UserError, match=rf"cannot write .*{taken}.*: it is a folder; name a file"):
            run_finetune(output=tmp_path / name)


def test_a_time_budget_ends(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(engine.time, "monotonic", lambda: float(next(clock)))
    reports, result = run_finetune(FINETUNE.override(steps=None, time_budget=10.0))
    steps = [report for report in reports if report.losses]
    assert result.model.history[-1]["seconds"] == pytest.approx(10, abs=2)
    assert 3 <= len(steps) <= 10
    assert steps[0].total == pytest.approx(len(steps), abs=1)
    assert steps[-1].eta == 0


@pytest.mark.parametrize(
    ("budget", "expected"), [({"steps": None, "time_budget": 60.0}, {1, 2}), ({"steps": 12}, {2})]
)
def test_with_a_time_budget_numbers_of_threads_are_tried(monkeypatch, budget, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen, forward = set(), finetune_module.FinetuningNetwork.forward

    def spying(self, batch):
        seen.add(torch.get_num_threads())
        return forward(self, batch)

    monkeypatch.setattr(finetune_module.FinetuningNetwork, "forward", spying)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_finetune(FINETUNE.override(**budget), steps=12)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == expected


def test_epochs_become_steps():
    reports, _ = run_finetune(
        FINETUNE.override(steps=None, epochs=3, batch_size=2), cases=[labelled(0), labelled(1)]
    )
    assert sum(bool(report.losses) for report in reports) == 6  # 4 slices, 2 a step, 3 times


# Failing


@pytest.mark.parametrize(
    ("term", "function"), [("local", "matching_loss"), ("pcl", "positional_contrastive_loss")]
)
def test_a_loss_that_is_not_finite_is_named(tmp_path, monkeypatch, term, function):
    original = getattr(pretrain_module, function)
    calls = []

    def spoilt(*args, **options):
        calls.append(1)
        return original(*args, **options) * (math.nan if len(calls) > 4 else 1.0)

    monkeypatch.setattr(pretrain_module, function, spoilt)
    output = tmp_path / "p.safetensors"
    with pytest.raises(NonFiniteLoss, match=f"the {term} loss is nan at step"):
        run_pretrain(PRETRAIN.override(steps=9), output=output)
    checkpoint = load_checkpoint(output)
    monkeypatch.undo()
    steps = checkpoint.history[0]["steps"]
    monkeypatch.setattr(engine, "has_bfloat16", lambda device: False)
    run_pretrain(PRETRAIN.override(steps=9), steps=steps, output=tmp_path / "q.safetensors")
    assert equal(dict(checkpoint.weights), dict(load_checkpoint(tmp_path / "q.safetensors").weights))


@pytest.mark.parametrize("clip", [5.0, None])
def test_a_gradient_that_is_not_finite_stops_too(tmp_path, monkeypatch, clip):
    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * math.nan

    original = finetune_module.cross_entropy
    calls = []

    def spoilt(*args):
        calls.append(1)
        loss = original(*args)
        return Spoilt.apply(loss) if len(calls) == 3 else loss

    monkeypatch.setattr(finetune_module, "cross_entropy", spoilt)
    output = tmp_path / "m.safetensors"
    with pytest.raises(NonFiniteLoss, match="gradient"):
        run_finetune(FINETUNE.override(gradient_clip=clip), output=output)
    weights = load_checkpoint(output).weights
    assert all(value.isfinite().all() for value in weights.values())


def limited(monkeypatch, most):
    """A forward pass that has memory for so many slices."""
    original = finetune_module.FinetuningNetwork.forward
    sizes = []

    def forward(self, batch):
        if len(batch.labels) > most:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(batch.labels))
        return original(self, batch)

    monkeypatch.setattr(finetune_module.FinetuningNetwork, "forward", forward)
    return sizes


def test_a_batch_that_does_not_fit_is_split(monkeypatch):
    sizes = limited(monkeypatch, most=2)
    reports, result = run_finetune(FINETUNE.override(batch_size=6, steps=2))
    assert sizes == [1, 2, 1, 2] * 2  # six slices in four parts
    (message,) = [report.message for report in reports if report.message]
    assert message == "memory ran out: each step now runs in 4 parts"
    assert len(result.curve) == 2


def test_a_slice_that_does_not_fit_is_an_error(monkeypatch):
    limited(monkeypatch, most=0)
    with pytest.raises(OutOfMemory, match="a single slice does not fit"):
        run_finetune(FINETUNE.override(batch_size=3))


def test_pairs_are_contrasted_with_others_also_where_memory_is_short(monkeypatch):
    """Of one pair alone the contrastive losses are 0, whatever the network."""
    original, sizes = pretrain_module.PretrainingNetwork.forward, []

    def forward(self, batch, most=8):
        if len(batch.views.images) > 2 * most:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(batch.views.images) // 2)
        return original(self, batch)

    monkeypatch.setattr(pretrain_module.PretrainingNetwork, "forward", partialmethod(forward, most=4))
    _, result = run_pretrain(PRETRAIN.override(batch_size=8, steps=1))
    assert sizes == [4, 4]
    assert result.checkpoint.history[-1]["parts"] == 2
    monkeypatch.setattr(pretrain_module.PretrainingNetwork, "forward", partialmethod(forward, most=3))
    with pytest.raises(OutOfMemory, match=r"4 pairs at a time do not fit.* use recompute=true"):
        run_pretrain(PRETRAIN.override(batch_size=8, steps=1))


def test_one_of_several_processes_does_not_go_on_in_parts(monkeypatch):
    """The others would pair the gradients of its parts with those of their whole batch."""
    fabric = make_fabric("cpu")
    monkeypatch.setattr(type(fabric), "world_size", 2)
    sizes = limited(monkeypatch, most=1)
    with pytest.raises(OutOfMemory, match=r"one of 2 processes.* use a smaller batch_size"):
        run_finetune(FINETUNE.override(batch_size=4), fabric=fabric)
    assert sizes == []


@pytest.mark.parametrize(
    "change",
    [
        {"contrastive_scale": 0.5},
        {"momentum": 0.0},
        {"weight_decay": 0.5},
        {"temperature": 1.0},
        {"position_threshold": 0.9},
        {"matched_weight": 3.0},
        {"unmatched_weight": 3.0},
        {"neighbour_range": 0.99},
        {"sinkhorn_iterations": 1},
        {"gradient_clip": 1e-3},
        {"weight_local": 0.5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_setting_of_a_pretraining_changes_it(change, plainly_pretrained):
    _, result = run_pretrain(PLAIN.override(**change))
    assert result.curve != plainly_pretrained.curve


def test_the_tolerance_of_a_pretraining_is_that_of_its_transport():
    # in a training this small a stop after five iterations changes losses by no more than rounding
    network = pretrain_module.PretrainingNetwork(SMALL, PRETRAIN.override(sinkhorn_tolerance=10.0))
    assert network.matcher.tolerance == 10.0


PLAIN = PRETRAIN.override(optimizer="sgd", learning_rate=0.05, steps=3)


@pytest.fixture(scope="module")
def plainly_pretrained():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "has_bfloat16", lambda device: False)
        return run_pretrain(PLAIN)[1]


@pytest.mark.parametrize(
    ("model", "training"),
    [
        ({"kaf_start": 0.1}, {}),
        ({"position_reference": 30.0}, {}),
        ({"decoder": "narrow"}, {}),
        ({}, {"foreground": 0.0}),
        ({}, {"averaging": 0.0}),
        ({}, {"loss": "cross-entropy"}),
    ],
    ids=str,
)
def test_each_setting_of_a_finetuning_changes_it(model, training, plainly_finetuned):
    options = {"loss": "dice+cross-entropy", **training}
    _, result = run_finetune(SMALL_CROPS.override(**options), config=SMALL.override(**model))
    weights = [one.model.network.head.weight for one in (result, plainly_finetuned)]
    assert not torch.equal(*weights)


SMALL_CROPS = FINETUNE.override(
    steps=3, foreground=1.0, augment=AUGMENT.override(crop=(16, 16)), loss="dice+cross-entropy"
)


@pytest.fixture(scope="module")
def plainly_finetuned():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "has_bfloat16", lambda device: False)
        return run_finetune(SMALL_CROPS)[1]


def test_a_training_is_saved_as_it_goes(tmp_path):
    """What is left of one that is killed."""
    output = tmp_path / "m.safetensors"
    work = finetune(
        SMALL,
        [labelled(0)],
        FINETUNE.override(checkpoint_every=1e-9),
        slices=SLICES,
        device="cpu",
        output=output,
    )
    losses = (progress for progress in work if progress.losses)
    for _ in range(3):
        next(losses)
    assert load_checkpoint(output).history[-1]["steps"] == 2
    assert resume_path(output).is_file()
    work.close()


# Labels


def test_finetuning_learns_its_slices():
    config = SMALL.override(start_channels=6, kaf_levels=(1, 4))
    unmoved = AugmentConfig.preset("none", crop=(48, 64))
    training = FinetuneConfig(steps=60, batch_size=2, learning_rate=1e-2, augment=unmoved, averaging=0.9)
    case = labelled(0, {1: COMPLETE, 2: COMPLETE})
    _, result = run_finetune(training, cases=[case], config=config)
    losses = [entry["total"] for entry in result.curve]
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])
    predicted = segment_volume(result.model, case.volume)
    for value in (1, 2, 3):
        ours, truth = predicted[1:3] == value, case.labels[1:3] == value
        assert 2 * (ours & truth).sum() / (ours.sum() + truth.sum()) > 0.9


def test_class_values_and_names_come_back():
    case = labelled(0, values=(0, 7, 300, 12))
    _, result = run_finetune(cases=[case], class_names={300: "muscle", 12: "left", 7: "right"})
    assert [(c.value, c.name) for c in result.model.classes] == [
        (0, "background"),
        (7, "right"),
        (12, "left"),
        (300, "muscle"),
    ]
    assert result.model.config.num_classes == 4
    predicted = segment_volume(result.model, case.volume)
    assert np.issubdtype(predicted.dtype, np.integer)
    assert set(np.unique(predicted)) <= {0, 7, 12, 300}


def test_unpainted_pixels_of_partial_slices_have_no_influence():
    """Only the painted pixels, and therefore only what status says, enters the loss and its gradient."""
    volume, labels = heart(0)
    seen = []

    class Spy(finetune_module.FinetuningNetwork):
        def forward(self, batch):
            logits = torch.randn(len(batch.labels), 4, *batch.labels.shape[1:], requires_grad=True)
            loss = finetune_module.cross_entropy(logits, batch.labels)
            loss = loss + finetune_module.soft_dice(logits, batch.labels)
            seen.append((torch.autograd.grad(loss, logits)[0], batch.labels))
            return super().forward(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_module, "FinetuningNetwork", Spy)
        case = LabelledVolume(volume, labels, {1: PARTIAL, 2: PARTIAL})
        run_finetune(FINETUNE.override(steps=2, augment=AUGMENT), cases=[case])
    for gradient, targets in seen:
        assert set(targets.unique().tolist()) <= {-1, 1, 2, 3}
        assert not gradient.movedim(1, -1)[targets == -1].any()
        assert gradient.movedim(1, -1)[targets > 0].any()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_labels_on_unmarked_slices_have_no_influence(share):
    """Unmarked slices may be pseudo-labelled, from their image alone."""
    volume, labels = heart(0)
    other = labels.copy()
    other[[0, 3]] = 0
    training = FINETUNE.override(pseudo_labels=PSEUDO.override(share=share))
    first, second = (
        run_finetune(training, cases=[LabelledVolume(volume, these, {1: COMPLETE, 2: PARTIAL})])[1]
        for these in (labels, other)
    )
    assert first.curve == second.curve


def test_empty_slices_teach_background():
    volume, labels = heart(0)
    labels = labels.copy()
    labels[0] = 0
    case = LabelledVolume(volume, labels, {0: EMPTY, 2: PARTIAL})
    _, result = run_finetune(cases=[case])
    assert result.model.history[-1]["labelled_slices"] == ["heart0:0:empty", "heart0:2:partial"]


def test_labels_that_cannot_be_learnt_from_are_refused():
    volume, labels = heart(0)
    blank = np.zeros_like(labels)
    one = (labels == 3).astype(np.uint8)
    for case, message in [
        (LabelledVolume(volume, blank, {0: EMPTY}), "no class is painted"),
        (LabelledVolume(volume, one, {2: PARTIAL}), "only 'class 1' is labelled and no background"),
    ]:
        with pytest.raises(UserError, match=message):
            run_finetune(cases=[case])
    with pytest.raises(UserError, match="needs at least 2 labelled slices"):
        run_finetune(FINETUNE.override(holdout=0.5), cases=[labelled(0, {1: COMPLETE})])


# Starting from something


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return run_pretrain(PRETRAIN.override(steps=1), output=tmp_path_factory.mktemp("p") / "p.safetensors")[
        1
    ].path


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    return run_finetune(FINETUNE.override(steps=1), output=tmp_path_factory.mktemp("f") / "m.safetensors")[
        1
    ].path


def started(monkeypatch, start, **options):
    """The weights that a finetuning begins with, its message and its result."""
    before = {}
    original = engine.Trainer.run

    def spy(self, *args, **named):
        before.update({k: v.clone() for k, v in self.raw_module.network.state_dict().items()})
        return original(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "run", spy)
        reports, result = run_finetune(
            FINETUNE.override(steps=1, seed=9), start=start, config=None, **options
        )
    return before, [report.message for report in reports if report.message], result


def test_a_pretrained_start_gives_its_encoder(monkeypatch, pretrained):
    weights = load_checkpoint(pretrained).weights
    before, (message,), result = started(monkeypatch, pretrained)
    taken = {name for name, value in before.items() if name in weights and torch.equal(value, weights[name])}
    assert {name for name in before if name.startswith("encoder.")} <= taken
    assert {name for name in result.start.loaded} == {name for name in before if name.startswith("encoder.")}
    assert message.startswith("start: loaded ")
    assert "keep their random start (decoder, head)" in message
    assert [record["stage"] for record in result.model.history] == ["pretraining", "finetuning"]
    assert result.model.slices == SLICES


def test_a_finetuned_start_gives_everything_or_all_but_the_head(monkeypatch, finetuned):
    weights = load_checkpoint(finetuned).weights
    before, (message,), _ = started(monkeypatch, finetuned)
    assert equal(before, dict(weights))
    assert "loaded all" in message
    before, (message,), result = started(monkeypatch, finetuned, cases=[labelled(0, values=(0, 4, 5, 6))])
    assert not torch.equal(before["head.weight"], weights["head.weight"])
    assert all(torch.equal(before[name], weights[name]) for name in weights if name != "head.weight")
    assert "keep their random start (head)" in message
    assert [label.value for label in result.model.classes] == [0, 4, 5, 6]


def test_a_start_of_another_architecture_is_refused(pretrained):
    with pytest.raises(CheckpointError, match="start_channels 4 there, 8 here"):
        run_finetune(start=pretrained, config=SMALL.override(start_channels=8))
    _, result = run_finetune(FINETUNE.override(steps=1), start=pretrained, config=SMALL)
    assert result.model.config.start_channels == 4


def test_a_frozen_encoder_keeps_its_weights(pretrained):
    weights = load_checkpoint(pretrained).weights
    training = FINETUNE.override(steps=2, encoder_learning_rate=0.0, averaging=0.0)
    _, result = run_finetune(training, start=pretrained)
    for name, value in result.model.network.named_parameters():
        if name in weights:
            assert torch.equal(value, weights[name]) == name.startswith("encoder."), name


# Slices that are read with their neighbours


def near(seed, statuses=None):
    """A labelled heart whose slices lie as near to each other as its pixels."""
    volume, labels = heart(seed, num_slices=8)
    return LabelledVolume(
        Volume.from_array(volume.array, (2.0, 2.0, 2.0), name=volume.name),
        labels.astype(np.int16),
        statuses or dict.fromkeys(range(8), COMPLETE),
    )


def changed(volume, z):
    """The same volume but for one slice, which is mirrored; its intensities are normalised as before."""
    array = volume.array.copy()
    array[z] = array[z, ::-1, ::-1]
    return Volume.from_array(array, volume.spacing, name=volume.name)


@pytest.mark.parametrize("architecture", ["unet", "kaf-unet"])
def test_near_slices_are_read_together_from_training_to_segmentation(tmp_path, architecture):
    case = near(0)
    training = FINETUNE.override(pseudo_labels={**PSEUDO.model_dump(), "share": 0.5})
    config = SMALL.override(architecture=architecture)
    output = tmp_path / "near.safetensors"
    few = near(0, dict.fromkeys(range(7), COMPLETE))
    assert run_finetune(training, cases=[few], config=config)[1].model.slices == SLICES.override(context=0)
    run_finetune(training, cases=[case], config=config, unlabelled=[near(1).volume], output=output)
    model = load_model(output)
    assert model.slices == SLICES.override(context=2, context_step=2.0)
    assert model.config.input_slices == 5
    asked = SegmentConfig(probabilities=True, orientation="fixed", largest_component="none")

    def maps(volume):
        return run(segment(model, volume, asked))[1].probabilities.astype(float)

    whole = maps(case.volume)
    differs = [z for z in range(8) if np.abs(maps(changed(case.volume, 3))[:, z] - whole[:, z]).max() > 1e-3]
    assert differs == [1, 2, 3, 4, 5]
    thick = Volume.from_array(case.volume.array, (8.0, 2.0, 2.0), name="thick")  # its slices are read alone
    assert np.abs(maps(changed(thick, 3))[:, 2] - maps(thick)[:, 2]).max() < 1e-6
    _, alone = run(segment(model, case.volume, asked, slices=[3]))
    assert np.allclose(alone.probabilities[:, 3], whole[:, 3], atol=2e-3)


def test_a_pretraining_reads_what_it_is_told_and_its_finetuning_the_same(tmp_path):
    volumes, slices = [near(seed).volume for seed in range(2)], SLICES.override(context=1)
    training = PRETRAIN.override(steps=1)
    _, result = run(
        pretrain(SMALL, volumes, training, slices=slices, device="cpu", output=tmp_path / "p.safetensors")
    )
    assert result.checkpoint.model.input_slices == 3
    _, tuned = run_finetune(FINETUNE.override(steps=1), start=result.path, config=None, cases=[near(0)])
    assert (tuned.model.slices, tuned.model.config.input_slices) == (slices, 3)
    _, told = run_finetune(FINETUNE.override(steps=1), start=result.path, config=SMALL, cases=[near(0)])
    assert told.model.config.input_slices == 3
    _, plain = run(pretrain(SMALL, volumes, training, slices=SLICES, device="cpu"))
    assert plain.checkpoint.model.input_slices == 1


def test_a_finetuning_with_context_is_resumed(tmp_path):
    training = FINETUNE.override(steps=4)
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    run_finetune(training, cases=[near(0)], output=whole)
    run_finetune(training, cases=[near(0)], output=parts, steps=2)
    run_finetune(training, cases=[near(0)], output=parts, resume=True)
    assert equal(dict(load_checkpoint(whole).weights), dict(load_checkpoint(parts).weights))


# What is handed over


def test_the_weights_that_were_best_on_held_out_slices_are_kept(monkeypatch):
    labels = np.zeros((48, 64), np.int64)
    labels[:10, :10] = 1
    labels[20:, :] = IGNORED
    item = LabelledSlice(np.zeros((1, 48, 64), np.float16), np.zeros((0, 2), np.float32), labels)
    classes = ClassMap((ClassLabel(0, "background"), ClassLabel(1, "one"), ClassLabel(2, "not there")))
    network = build_network(SMALL.override(num_classes=3))
    average = averaging.WeightAverage(network, 0.0, [item], classes)
    columns = 0

    def predict(*args):
        maps = torch.zeros(1, 3, 48, 64)
        maps[0, 0] = 0.5
        maps[0, 1, :10, :columns] = 1
        maps[0, 1, 20:] = 1  # where nothing is known, nothing is wrong
        return maps

    monkeypatch.setattr(averaging, "predict_slices", predict)
    for step, columns in enumerate([2, 8, 4, 8, 1]):
        network.head.weight.data.fill_(step)
        average.update()
        found = 10 * columns
        assert average.measure(torch.device("cpu")) == pytest.approx(2 * found / (100 + found))
    assert average.best_dice == pytest.approx(160 / 180)
    assert (average.best().head.weight == 3).all()  # of equals the later one
    assert (average.network().head.weight == 4).all()


def slices_that_show(*channels):
    labels = []
    for shown in channels:
        plane = np.zeros((4, 4), np.int64)
        plane[0, : len(shown)] = shown
        labels.append(LabelledSlice(np.zeros((1, 4, 4), np.float16), np.zeros((0, 2), np.float32), plane))
    return labels


@pytest.mark.parametrize("seed", range(8))
def test_of_each_structure_a_slice_is_left_to_learn_from(seed):
    classes = ClassMap((ClassLabel(0, "background"), ClassLabel(1, "one"), ClassLabel(2, "two")))
    training = FINETUNE.override(holdout=0.5, seed=seed)
    held = finetune_module._held_out(slices_that_show((1, 2), (1,), (1,), (), ()), classes, training)
    assert held in ({1}, {2}, {1, 2})
    with pytest.raises(UserError, match=r"no slice can be held out: 'one'.* set holdout to 0"):
        finetune_module._held_out(slices_that_show((1,), (), ()), classes, training)
    assert finetune_module._held_out(slices_that_show((1,), ()), classes, FINETUNE) == set()


def test_held_out_dice_is_reported():
    training = FINETUNE.override(holdout=0.5, holdout_every=2)
    reports, result = run_finetune(training, cases=[labelled(0), labelled(1)])
    measured = {
        report.step: report.losses["held-out dice"] for report in reports if "held-out dice" in report.losses
    }
    assert set(measured) == {2, 4, 5}
    assert all(0 <= dice <= 1 for dice in measured.values())
    assert result.model.history[-1]["held_out_dice"] == max(measured.values())
    assert [entry["step"] for entry in result.curve if "held-out dice" in entry] == [2, 4, 5]


def test_measuring_held_out_slices_is_part_of_the_time_budget(monkeypatch):
    now = 0.0

    def measure(*_):
        nonlocal now
        now += 4
        return 0.5

    monkeypatch.setattr(engine.time, "monotonic", lambda: now)
    monkeypatch.setattr(averaging.WeightAverage, "measure", measure)
    training = FINETUNE.override(holdout=0.5, holdout_every=1, steps=8, time_budget=10.0)
    _, result = run_finetune(training)
    assert len(result.curve) == 3
    assert result.model.history[-1]["seconds"] == 12


def test_the_average_of_the_weights_is_handed_over():
    """Decay 0 hands over the last weights; the average starts at the first and forgets it."""
    _, last = run_finetune(FINETUNE.override(averaging=0.0))
    _, averaged = run_finetune(FINETUNE)
    assert last.curve == averaged.curve
    first, second = (result.model.network.head.weight for result in (last, averaged))
    assert 0 < (first - second).abs().max() < 0.1


def test_the_average_forgets_its_start_and_counts_steps_as_they_are():
    """Against the same sum, weight by weight: shares of 1/10 growing to the decay; counters are copied."""
    network = build_network(SMALL.override(architecture="unet"))
    average = averaging.WeightAverage(network, 0.3, [], ClassMap((ClassLabel(0, "background"),)))
    batch_norm, expected = network.encoder.blocks[0][1], 0.0
    for step in range(6):
        network.head.weight.data.fill_(step**2)
        batch_norm.running_mean.fill_(-step)
        batch_norm.num_batches_tracked.fill_(step)
        average.update()
        share = min(0.3, (1 + step) / (10 + step))
        expected = share * expected + (1 - share) * step**2 if step else 0.0
        kept = average.network()
        assert torch.allclose(kept.head.weight, torch.tensor(expected))
        assert kept.encoder.blocks[0][1].num_batches_tracked == step
    assert -5 < kept.encoder.blocks[0][1].running_mean[0] < -4


def test_a_network_that_reads_no_keypoints_has_none_looked_for(monkeypatch):
    searched = []
    detect = preparation.iter_detect
    monkeypatch.setattr(
        preparation, "iter_detect", lambda *args, **more: searched.append(1) or detect(*args, **more)
    )
    training = FINETUNE.override(pseudo_labels=PSEUDO.override(share=0.5))
    plain = SMALL.override(architecture="unet")
    _, result = run_finetune(training, config=plain, unlabelled=[heart(1)[0]])
    assert not searched
    assert result.model.keypoints == KeypointConfig()
    assert segment_volume(result.model, heart(3)[0]).shape == (4, 48, 64)
    run_pretrain(config=plain)
    assert not searched
    monkeypatch.setattr(segment_module, "make_detector", lambda *_: pytest.fail("a detector was made"))
    assert segment_volume(result.model, heart(3)[0]).shape == (4, 48, 64)
    run_finetune(training, unlabelled=[heart(1)[0]])
    assert searched


def test_previews_are_copies_of_the_model_as_it_is():
    work = finetune(SMALL, [labelled(0)], FINETUNE, slices=SLICES, device="cpu")
    with contextlib.closing(work):
        report = next(report for report in work if report.losses)
        model = report.preview()
        before = {name: value.clone() for name, value in model.network.state_dict().items()}
        next(work)
        assert equal(model.network.state_dict(), before)
    assert segment_volume(model, heart(3)[0]).shape == (4, 48, 64)


# Segmentation


@pytest.fixture(scope="module")
def model():
    _, result = run_finetune(FINETUNE.override(steps=30, learning_rate=5e-3))
    return result.model


def test_batches_do_not_change_labels(model):
    volume = heart(7, num_slices=5)[0]
    results = [segment_volume(model, volume, SegmentConfig(batch_size=size)) for size in (1, 2, 5, 8)]
    assert len(np.unique(results[0])) > 1
    assert all(np.array_equal(result, results[0]) for result in results)


def test_probabilities_and_uncertainty(model):
    volume = Volume.from_array(heart(7)[0].array[:, :45, :61], (8.0, 2.0, 2.5), name="odd")
    resampled = replace(model, slices=SliceConfig(spacing=1.8))
    config = SegmentConfig(probabilities=True, uncertainty=True, largest_component="none")
    _, result = run(segment(resampled, volume, config))
    assert result.labels.shape == volume.shape == (4, 45, 61)
    assert result.probabilities.shape == (4, *volume.shape)
    probabilities = result.probabilities.astype(np.float32)
    assert np.abs(probabilities.sum(0) - 1).max() < 2e-3
    second, first = np.sort(probabilities, axis=0)[-2:]
    clear = first - second > 1e-3
    assert np.array_equal(probabilities.argmax(0)[clear], result.labels[clear])
    uncertainty = result.uncertainty.astype(np.float32)
    assert (uncertainty >= 0).all()
    assert (uncertainty <= 1).all()
    entropy = -(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(0) / np.log(4)
    assert np.abs(entropy - uncertainty).max() < 5e-3


def test_flips_are_the_mean_of_four_predictions(model):
    images = np.random.default_rng(0).normal(size=(2, 1, 48, 64)).astype(np.float32)
    points = [np.array([[3, 60], [40.25, 10.5]], np.float32), np.zeros((0, 2), np.float32)]
    expected = 0
    for flip_y in (False, True):
        for flip_x in (False, True):
            flipped, moved = images, [p.copy() for p in points]
            if flip_y:
                flipped, _ = flipped[:, :, ::-1], [p.__setitem__((..., 0), 47 - p[..., 0]) for p in moved]
            if flip_x:
                flipped, _ = flipped[..., ::-1], [p.__setitem__((..., 1), 63 - p[..., 1]) for p in moved]
            maps = predict_slices(model.network, np.ascontiguousarray(flipped), moved, model.device).numpy()
            maps = maps[:, :, ::-1] if flip_y else maps
            expected = expected + (maps[..., ::-1] if flip_x else maps) / 4
    ours = predict_slices(model.network, images, points, model.device, flips=True)
    assert np.abs(ours.numpy() - expected).max() < 1e-5
    asked = SegmentConfig(probabilities=True)
    one, four = (
        run(segment(model, heart(7)[0], asked.override(flips=flips)))[1].probabilities
        for flips in (False, True)
    )
    assert np.abs(one.astype(float) - four.astype(float)).max() > 1e-3


def test_only_the_asked_for_slices(model):
    volume = heart(7)[0]
    reports, some = run(segment(model, volume, slices=[2, 1, 2]))
    whole = segment_volume(model, volume, SegmentConfig(largest_component="none", orientation="fixed"))
    assert np.array_equal(some.labels[1:3], whole[1:3])
    assert not some.labels[[0, 3]].any()
    assert [(report.step, report.total) for report in reports] == [(2, 2)]


def test_segmentation_makes_smaller_batches_when_memory_runs_out(model, monkeypatch):
    volume = heart(7, num_slices=5)[0]
    fixed = SegmentConfig(orientation="fixed")
    expected = segment_volume(model, volume, fixed)
    original = segment_module.predict_slices
    sizes = []

    def limited_to(most):
        def predict(network, images, *args, **options):
            if len(images) > most:
                raise torch.OutOfMemoryError("out of memory")
            sizes.append(len(images))
            return original(network, images, *args, **options)

        return predict

    monkeypatch.setattr(segment_module, "predict_slices", limited_to(2))
    reports, segmentation = run(segment(model, volume, fixed))
    assert np.array_equal(segmentation.labels, expected)
    assert sizes == [2, 2, 1]
    (message,) = [report.message for report in reports if report.message]
    assert message == "memory ran out: slices are now segmented 2 at a time"
    monkeypatch.setattr(segment_module, "predict_slices", limited_to(0))
    with pytest.raises(OutOfMemory, match="a single slice does not fit"):
        segment_volume(model, volume)  # already where an angle is looked for


def test_finished_slices_are_kept_and_their_shapes_reach_the_others(model):
    """Weights near their start know nothing; two finished slices say what the slice between them shows."""
    volume, truth = heart(7, num_slices=5)
    labels = np.zeros_like(truth)
    labels[[1, 3]] = truth[[1, 3]]
    case = LabelledVolume(volume, labels, {1: SliceStatus.COMPLETE, 3: SliceStatus.COMPLETE})
    _, carried = run(propagate(case, [label.value for label in model.classes], model.slices))
    assert carried is not None
    _, alone = run(segment(model, volume, SegmentConfig(probabilities=True, orientation="fixed")))
    _, joined = run(segment(model, volume, SegmentConfig(probabilities=True), propagation=carried))
    assert np.array_equal(joined.labels[[1, 3]], truth[[1, 3]])
    right = [(found.labels[2] == truth[2])[truth[2] > 0].mean() for found in (alone, joined)]
    assert right[1] > max(0.6, right[0])
    assert np.allclose(joined.probabilities.astype(float).sum(0), 1, atol=5e-3)
    _, unheard = run(segment(model, volume, SegmentConfig(propagation=0), propagation=carried))
    assert np.array_equal(unheard.labels[2], alone.labels[2])
    assert np.array_equal(unheard.labels[1], truth[1])
    _, some = run(segment(model, volume, slices=[2], propagation=carried))
    assert not some.labels[[1, 3]].any()


def test_cleaning_is_an_option(model):
    volume = heart(7)[0]
    bare = replace(
        model, classes=tuple(replace(label, one_piece=False, together=False) for label in model.classes)
    )
    none, learned, cleaned = (
        segment_volume(bare, volume, SegmentConfig(largest_component=which))
        for which in ("none", "learned", "all")
    )
    assert np.array_equal(none, learned)
    assert not np.array_equal(none, cleaned)
    keep_largest_components(none)
    assert np.array_equal(none, cleaned)


def test_what_lies_apart_from_structures_that_lay_together_is_left_out(model, monkeypatch):
    volume = heart(7)[0]

    def predict(network, images, *_, **__):
        maps = torch.zeros(len(images), 4, *images.shape[2:])
        maps[:, 0] = 0.5
        for channel, where in ((1, np.s_[2:8, 2:8]), (2, np.s_[2:8, 8:12]), (1, np.s_[20:40, 20:60])):
            maps[(slice(None), channel, *where)] = 1
        return maps

    monkeypatch.setattr(segment_module, "predict_slices", predict)
    values = [label.value for label in model.classes]
    for together in (False, True):
        flags = {"one_piece": True, "together": together}
        classes = (model.classes[0], *(replace(label, **flags) for label in model.classes[1:]))
        labels = segment_volume(replace(model, classes=classes), volume)
        assert (labels[:, 2:8, 8:12] == values[2]).all()
        assert (labels[:, 2:8, 2:8] == (values[1] if together else 0)).all()
        assert (labels[:, 20:40, 20:60] == (0 if together else values[1])).all()
    everything = segment_volume(
        replace(model, classes=classes), volume, SegmentConfig(largest_component="none")
    )
    assert (everything[:, 20:40, 20:60] == values[1]).all()


@pytest.mark.parametrize(
    ("orientation", "angles"), [("fixed", [0.0]), ("best", [240.0]), ("average", [240.0, 210.0, 270.0])]
)
def test_slices_are_segmented_at_the_angle_at_which_the_model_contradicts_itself_least(
    model, monkeypatch, orientation, angles
):
    volume, truth = heart(7, num_slices=12)
    asked = []

    def predict(network, images, keypoints, device, *, angles, flips=False):
        asked.append((len(images), list(angles)))
        maps = torch.full((len(images), 4, *images.shape[2:]), 0.1)
        for channel in (1, 2, 3):
            column = round(angles[0] / 10)
            columns = slice(None) if abs(angles[0] - 240) <= 30 else slice(column, column + 3)
            maps[:, channel, 8 * channel : 8 * channel + 8, columns] = 0.9
        return maps / maps.sum(1, keepdim=True)

    monkeypatch.setattr(segment_module, "predict_slices", predict)
    config = SegmentConfig(orientation=orientation, batch_size=4)
    searched = orientation != "fixed"
    places = [0, 1, 11, 2, 10, 3, 9, 4, 8, 5, 7, 6] if searched else []
    tried = [(3, [30.0 * place]) for place in places]
    reports, whole = run(segment(model, volume, config))
    stages = [(report.stage, report.step, report.total) for report in reports]
    looked = [("finding how it lies", turn + 1, 12) for turn in range(len(places))]
    assert stages == [*looked, *[("segmenting", done, 12) for done in (4, 8, 12)]]
    assert asked == [*tried, *[(4, angles)] * 3]
    assert (whole.labels[:, 8:32] > 0).all() == searched
    asked.clear()
    run(segment(model, volume, config, slices=[3]))
    assert asked == [(1, [0.0])]
    asked.clear()
    case = LabelledVolume(volume, np.where(np.arange(12)[:, None, None] == 5, truth, 0), {5: COMPLETE})
    _, carried = run(propagate(case, [label.value for label in model.classes], model.slices))
    run(segment(model, volume, config, propagation=carried))
    assert asked == [(4, [0.0])] * 3


def test_slices_are_normalised_as_in_training(model):
    """Segmentation reads a volume exactly as training does: a linear change of intensities changes nothing."""
    volume = heart(7)[0]
    changed = Volume.from_array(volume.array.astype(np.float32) * 3 + 100, volume.spacing, name="changed")
    assert np.allclose(Slices(volume, SLICES).images([1]), Slices(changed, SLICES).images([1]), atol=1e-3)
    assert (segment_volume(model, volume) == segment_volume(model, changed)).mean() > 0.99


# Several processes


def test_processes_must_share_a_batch_evenly():
    fabric = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    with pytest.raises(UserError, match="batch_size 3 must divide by the 2 processes"):
        run_pretrain(fabric=fabric)


JOINT = {"optimizer": "sgd", "batch_size": 4, "steps": 2, "learning_rate": 0.01}


def both_trainings(**options):
    fabric = make_fabric("cpu", precision="float32")
    _, first = run_pretrain(PRETRAIN.override(**JOINT), fabric=fabric, **options)
    _, second = run_finetune(FINETUNE.override(**JOINT), fabric=fabric)
    return {
        "curves": [first.curve, second.curve],
        "weights": [dict(first.checkpoint.weights), second.model.network.state_dict()],
    }


def both_trainings_and_a_timed_one(rank, folder):
    engine.has_bfloat16 = lambda device: False
    results = both_trainings(output=folder / "p.safetensors")
    # The clock of one runs three times as fast: all the same both end at one step.
    clock = engine.time.monotonic
    engine.time.monotonic = lambda: clock() * (1 + 2 * rank)
    _, timed = run_finetune(FINETUNE.override(steps=None, time_budget=0.2, batch_size=4))
    return {**results, "timed steps": len(timed.curve)}


def test_two_processes_train_as_one_with_the_joint_batch(tmp_path):
    first, second = run_in_two(both_trainings_and_a_timed_one, tmp_path)
    alone = both_trainings()
    for mine, *theirs in zip(alone["curves"], first["curves"], second["curves"], strict=True):
        for curve in theirs:
            for expected, entry in zip(mine, curve, strict=True):
                assert entry == pytest.approx(expected, abs=1e-4)
    for expected, *theirs in zip(alone["weights"], first["weights"], second["weights"], strict=True):
        for name, value in expected.items():
            for weights in theirs:
                assert torch.allclose(weights[name].float(), value.float(), atol=1e-5, rtol=1e-4), name
    assert load_checkpoint(tmp_path / "p.safetensors").kind == "pretrained"
    assert first["timed steps"] == second["timed steps"]  # they end together
