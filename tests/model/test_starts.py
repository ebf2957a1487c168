"""The compared starts: they learn, stop, resume, and start a finetuning; and what their views look like."""

import contextlib

import numpy as np
import pytest
import torch
from torch.nn import functional
from two_processes import run_in_two

from kaf_model import engine
from kaf_model.benchmark.starts import STARTS
from kaf_model.benchmark.starts.pirl import Pirl, PirlNetwork, jigsaw
from kaf_model.benchmark.starts.rotation import RotationPrediction, quarter_turns
from kaf_model.benchmark.starts.views import SliceViews
from kaf_model.checkpoint import count_parameters, load_checkpoint
from kaf_model.cli_info import describe_file, info_rows
from kaf_model.config import (
    AugmentConfig,
    FinetuneConfig,
    KeypointConfig,
    ModelConfig,
    PretrainConfig,
    Recipe,
    SliceConfig,
)
from kaf_model.datasets import Shard, Views
from kaf_model.errors import UserError
from kaf_model.finetune import finetune
from kaf_model.labels import LabelledVolume, SliceStatus
from kaf_model.phantom import make_heart
from kaf_model.preparation import prepare_volumes
from kaf_model.volume import Volume

CPU = torch.device("cpu")
LEARNT = [name for name in STARTS if name != "random"]
AUGMENT = AugmentConfig(crop=(48, 64), elastic_sigma=(6.0, 9.0), elastic_alpha=(0.0, 40.0))
MODEL = ModelConfig(
    start_channels=4,
    kaf_levels=(3, 4),
    embedding_width=8,
    heads=2,
    attention_blocks=1,
    diffusion_channels=8,
    position_reference=64.0,
)
PRETRAIN = PretrainConfig(
    steps=4, batch_size=3, augment=AUGMENT, projection_width=16, sinkhorn_iterations=5, matching_rounds=1
)
RECIPE = Recipe(slices=SliceConfig(spacing=None), model=MODEL, pretrain=PRETRAIN)
LOSSES = {
    "kaf": {"pcl", "global", "local"},
    "pcl": {"pcl"},
    "simclr": set(),
    "glcl-global": set(),
    "glcl-full": {"global", "local"},
    "rotation": set(),
    "pirl": {"slice", "jigsaw"},
    "caid": {"instance", "context"},
}


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    monkeypatch.setattr(engine, "has_bfloat16", lambda device: False)


def heart(seed):
    phantom = make_heart(seed, shape=(4, 48, 64), spacing=(8.0, 2.0, 2.0))
    return Volume.from_array(phantom.image, phantom.spacing, name=f"heart{seed}"), phantom.labels


def run(work, steps=None):
    """Reports and result; closed after some training steps if told so."""
    reports = []
    with contextlib.closing(work):
        while True:
            try:
                reports.append(next(work))
            except StopIteration as done:
                return reports, done.value
            if steps is not None and sum(bool(report.losses) for report in reports) == steps:
                return reports, None


def pretrain(name, output, recipe=RECIPE, steps=None, **options):
    volumes = [heart(seed)[0] for seed in range(2)]
    return run(STARTS[name].pretrain(recipe, volumes, output, device="cpu", **options), steps)


@pytest.fixture(scope="module")
def prepared():
    _, volumes = run(
        prepare_volumes([heart(seed)[0] for seed in range(2)], SliceConfig(spacing=None), KeypointConfig())
    )
    return volumes


def same(first, second):
    """Whether two batches agree, nested tuples of tensors, numbers and nothing."""
    if first is None or second is None:
        return first is second
    if isinstance(first, tuple):
        return all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(torch.equal(torch.as_tensor(first), torch.as_tensor(second)))


# All starts


@pytest.mark.parametrize("name", LEARNT)
def test_a_start_trains_stops_resumes_and_starts_a_finetuning(name, tmp_path):
    whole_path, path = tmp_path / "whole.safetensors", tmp_path / "start.safetensors"
    reports, whole = pretrain(name, whole_path)
    curve = [report.losses for report in reports if report.losses]
    assert [set(losses) for losses in curve] == [{"total"} | LOSSES[name]] * 4
    assert all(np.isfinite(list(losses.values())).all() for losses in curve)

    pretrain(name, path, steps=2)
    assert not load_checkpoint(path).history[0]["complete"]
    _, resumed = pretrain(name, path, resume=True)
    assert resumed.curve == whole.curve
    checkpoint = load_checkpoint(path)
    assert all(torch.equal(value, whole.checkpoint.weights[key]) for key, value in checkpoint.weights.items())
    assert checkpoint.kind == "pretrained"
    assert checkpoint.history[0].get("pretext", {}).get("method") == (
        None if name in ("kaf", "pcl") else name
    )

    told = " ".join(text for _, text in info_rows(path, describe_file(path)))
    assert (f"pretraining by {name}, " in told) == (name not in ("kaf", "pcl"))

    volume, labels = heart(5)
    case = LabelledVolume(volume, labels, {1: SliceStatus.COMPLETE})
    training = FinetuneConfig(steps=1, batch_size=2, augment=AUGMENT)
    reports, result = run(finetune(None, [case], training, start=resumed.path, device="cpu"))
    (message,) = (report.message for report in reports if report.message)
    assert message.startswith("start: loaded ")
    loaded = {part for part in ("encoder", "decoder") if any(n.startswith(part) for n in result.start.loaded)}
    assert loaded == ({"encoder", "decoder"} if name == "glcl-full" else {"encoder"})
    assert set(result.start.loaded) >= {n for n in checkpoint.weights if n.startswith("encoder.")}


@pytest.mark.parametrize("name", LEARNT)
@pytest.mark.parametrize("architecture", ["unet", "kaf-unet", "swin-unet"])
def test_the_gradient_reaches_the_whole_encoder(name, architecture, prepared):
    channels = 12 if architecture.startswith("swin") else 4
    model = MODEL.override(architecture=architecture, start_channels=channels)
    start = STARTS[name]
    training = PRETRAIN.override(**start.overrides)
    data = start.pretext.batches(prepared, training)
    torch.manual_seed(0)
    if (name, architecture) == ("glcl-full", "swin-unet"):
        with pytest.raises(UserError, match="which a swin-unet has not; choose glcl-global"):
            start.pretext.network(model, training, len(data))
        return
    network = start.pretext.network(model, training, len(data)).eval()
    network(data.batch(0, CPU, Shard()))["total"].backward()
    dead = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not [n for n in dead if n.startswith("encoder.")]


@pytest.mark.parametrize("name", LEARNT)
def test_a_start_reads_slices_together(name, tmp_path):
    slices, training = RECIPE.slices.override(context=1), PRETRAIN.override(steps=1)
    recipe = RECIPE.override(slices=slices, pretrain=training)
    _, result = pretrain(name, tmp_path / "s.safetensors", recipe)
    assert result.checkpoint.model.input_slices == 3
    assert result.checkpoint.weights["encoder.blocks.0.0.weight"].shape[1] == 3


@pytest.mark.parametrize("name", ["simclr", "glcl-global", "glcl-full", "rotation", "pirl", "caid"])
def test_a_start_learns(name, tmp_path):
    """Its loss clearly falls on the slices of two hearts."""
    steps = 40
    calm = AUGMENT.override(spatial_probability=0.5, elastic_alpha=(0.0, 0.0), intensity_probability=0.1)
    training = PRETRAIN.override(steps=steps, batch_size=6, augment=calm, learning_rate=5e-3)
    plain = RECIPE.override(model=MODEL.override(architecture="unet"), pretrain=training)
    _, result = pretrain(name, tmp_path / "s.safetensors", plain)
    for term in {"total"} | LOSSES[name]:
        values = [entry[term] for entry in result.curve]
        assert np.mean(values[-8:]) < 0.9 * np.mean(values[:8]), (term, values)


def test_pcl_is_one_loss_whatever_the_recipe_weighs(tmp_path):
    recipe = RECIPE.override(pretrain=PRETRAIN.override(steps=1, weight_global=2.0))
    _, result = pretrain("pcl", tmp_path / "p.safetensors", recipe)
    assert set(result.curve[0]) == {"step", "total", "pcl"}
    _, result = pretrain("kaf", tmp_path / "k.safetensors", recipe)
    assert set(result.curve[0]) == {"step", "total", "pcl", "global", "local"}


def test_random_weights_are_no_start(tmp_path):
    reports, result = pretrain("random", tmp_path / "r.safetensors")
    assert (reports, result) == ([], None)
    assert not list(tmp_path.iterdir())


def test_resuming_another_method_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    pretrain("simclr", path, steps=1)
    with pytest.raises(UserError, match=r"pretext was \{'method': 'simclr'\}, now \{'method': 'rotation'\}"):
        pretrain("rotation", path, resume=True)


@pytest.mark.parametrize("name", LEARNT)
def test_a_batch_depends_on_its_step_only(name, prepared):
    data, again = (STARTS[name].pretext.batches(prepared, PRETRAIN) for _ in range(2))
    data.batch(0, CPU, Shard())
    assert same(data.batch(3, CPU, Shard()), again.batch(3, CPU, Shard()))
    assert not same(data.batch(2, CPU, Shard())[0], data.batch(3, CPU, Shard())[0])


JOINT = {"glcl-full": 1, "rotation": 2, "pirl": 2, "caid": 2}
"""Steps of each. SimCLR's loss is in CAiD, GLCL-global's in GLCL-full, whose step turns rounding into gradients."""


def joint_training(name, output):
    training = PRETRAIN.override(optimizer="sgd", batch_size=4, steps=JOINT[name], learning_rate=0.01)
    fabric = engine.make_fabric("cpu", precision="float32")
    volumes = [heart(seed)[0] for seed in range(2)]
    work = STARTS[name].pretrain(RECIPE.override(pretrain=training), volumes, output, fabric=fabric)
    _, result = run(work)
    return {"curve": result.curve, "weights": dict(result.checkpoint.weights)}


def joint_trainings(_rank, folder):
    return {name: joint_training(name, folder / f"{name}.safetensors") for name in JOINT}


def test_two_processes_train_as_one_with_the_joint_batch(tmp_path):
    both = run_in_two(joint_trainings, tmp_path)
    for name in JOINT:
        alone = joint_training(name, tmp_path / "alone.safetensors")
        for together in both:
            for entry, expected in zip(together[name]["curve"], alone["curve"], strict=True):
                assert entry == pytest.approx(expected, rel=1e-4, abs=1e-4), name
            for key, value in alone["weights"].items():
                ours = together[name]["weights"][key]
                assert torch.allclose(ours.float(), value.float(), atol=1e-4, rtol=1e-3), (name, key)


# Views


def test_shards_are_rows_of_the_joint_batch(prepared):
    data = SliceViews(prepared, PRETRAIN.override(batch_size=4), num_views=2)
    joint = data.batch(1, CPU, Shard())
    halves = [data.batch(1, CPU, Shard(rank=rank, world=2)) for rank in range(2)]
    for half, rows in zip(halves, ([0, 1, 4, 5], [2, 3, 6, 7]), strict=True):
        assert torch.allclose(half.views.images, joint.views.images[rows], atol=1e-5)
        assert torch.allclose(half.restored, joint.restored[rows], atol=1e-5)
        assert torch.equal(half.instance, joint.instance[rows[:2]])
        assert torch.equal(half.slice_position, joint.slice_position[rows[:2]])
        assert half.views.valid.sum(1).tolist() == joint.views.valid[rows].sum(1).tolist()


def test_without_augmentation_views_are_the_slices(prepared):
    plain = PRETRAIN.override(augment=AugmentConfig.preset("none", crop=None))
    batch = SliceViews(prepared, plain, num_views=2).batch(0, CPU, Shard())
    slices = [(volume, z) for volume in prepared for z in range(len(volume))]
    for row, item in enumerate(batch.instance.tolist() * 2):
        volume, z = slices[item]
        assert np.allclose(batch.views.images[row, 0], volume.images[z].astype(np.float32), atol=1e-3)
        assert torch.equal(batch.restored[row], batch.views.images[row])
        points = batch.views.keypoints[row][batch.views.valid[row]]
        assert np.allclose(points, volume.keypoints[z].positions, atol=1e-3)
        assert batch.slice_position[row % 3] == float(volume.positions[z])


def test_views_differ_and_are_restored_without_their_intensities(prepared):
    bright = AUGMENT.override(
        intensity_probability=1.0, noise=0.0, blur=(0.1, 0.1), low_resolution=(1.0, 1.0)
    )
    batch = SliceViews(prepared, PRETRAIN.override(augment=bright), num_views=2).batch(0, CPU, Shard())
    first, second = batch.restored.chunk(2)
    assert not torch.allclose(first, second, atol=0.1)
    for view, restored in zip(batch.views.images, batch.restored, strict=True):
        assert not torch.allclose(view, restored, atol=0.01)
        ranks = np.corrcoef(view.flatten().argsort().argsort(), restored.flatten().argsort().argsort())
        assert ranks[0, 1] > 0.99  # brightness, contrast and gamma keep the order


def marked(positions, size=(48, 80)):
    """A black slice with a white pixel at each keypoint; one more keypoint is not valid."""
    images = torch.zeros(1, 1, *size)
    for y, x in positions:
        images[0, 0, y, x] = 1
    keypoints = torch.tensor([[*positions, (0, 0)]], dtype=torch.float32)
    return Views(images, keypoints, torch.tensor([[True] * len(positions) + [False]]))


def assert_keypoints_are_white(views):
    for image, points, valid in zip(views.images, views.keypoints, views.valid, strict=True):
        found = {tuple(place) for place in image[0].nonzero().tolist()}
        assert {tuple(point) for point in points[valid].long().tolist()} == found


def test_quarter_turns_take_the_keypoints_along():
    views = marked([(3, 20), (40, 63), (10, 40), (30, 2)])  # the last lies beside the middle square
    turned, turns = quarter_turns(views)
    assert turns.tolist() == [0, 1, 2, 3]
    assert turned.images.shape == (4, 1, 48, 48)
    assert torch.equal(turned.images[0], views.images[0, :, :, 16:64])
    assert torch.equal(turned.images[1], turned.images[0].rot90(1, (1, 2)))
    assert turned.images[1, 0, 47 - 4, 3] == 1  # anticlockwise: the top left comes to the bottom left
    assert turned.valid.sum(1).tolist() == [3] * 4
    assert_keypoints_are_white(turned)


def test_augmentation_does_not_answer_for_the_rotation(prepared):
    free = PRETRAIN.override(augment=AugmentConfig.preset("paper", crop=(48, 64)), batch_size=6)
    data = RotationPrediction().batches(prepared, free)
    assert (data.augment.rotation, data.augment.mirror) == (30.0, False)
    assert data.batch(0, CPU, Shard()).views.images.shape == (3, 1, 48, 64)
    assert free.augment.mirror


def test_jigsaws_are_made_of_patches_with_their_keypoints():
    size = (60, 110)  # cells of 20 x 36, patches of 16 x 32
    views = marked([(0, 0), (19, 35), (20, 36), (59, 107), (30, 90), (45, 60)], size)
    order = torch.tensor([[4, 0, 8, 2, 1, 3, 5, 7, 6]])
    for jitter in (torch.zeros(1, 9, 2), torch.full((1, 9, 2), 0.999), torch.rand(1, 9, 2)):
        patches = jigsaw(views, order=order, jitter=jitter)
        assert patches.images.shape == (9, 1, 16, 32)
        assert_keypoints_are_white(patches)
        for place, cell in enumerate(order[0].tolist()):
            shift = (jitter[0, place] * 5).long()
            top, left = 20 * (cell // 3) + int(shift[0]), 36 * (cell % 3) + int(shift[1])
            assert torch.equal(patches.images[place], views.images[0, :, top : top + 16, left : left + 32])


def test_slices_that_are_too_small_for_a_jigsaw_are_named():
    with pytest.raises(
        UserError, match=r"at least 48 x 48 pixels, got \(32, 64\); raise pretrain.augment.crop"
    ):
        jigsaw(marked([(1, 1)], (32, 64)), order=torch.arange(9)[None], jitter=torch.zeros(1, 9, 2))


# The memory of PIRL


def test_the_memory_moves_towards_what_was_seen(prepared):
    pretext = Pirl(momentum=0.75, projection_width=8, num_negatives=5)
    data = pretext.batches(prepared, PRETRAIN)
    network = pretext.network(MODEL.override(architecture="unet"), PRETRAIN, len(data))
    assert isinstance(network, PirlNetwork)
    batch = data.batch(0, CPU, Shard())
    assert len(batch.negatives) == 5
    before = network.memory_bank.clone()
    network.eval()(batch)
    assert torch.equal(network.memory_bank, before)  # only training remembers
    seen = torch.randn(3, 8)
    network._remember(seen, torch.tensor([6, 2, 6]))  # slice 6 was in the batch twice
    unit = functional.normalize(seen, dim=1)
    expected = before.clone()
    expected[2] = functional.normalize(0.75 * before[2] + 0.25 * unit[1], dim=0)
    expected[6] = functional.normalize(0.75 * before[6] + 0.25 * (unit[0] + unit[2]) / 2, dim=0)
    assert torch.allclose(network.memory_bank, expected, atol=1e-6)
    trained = sum(parameter.numel() for parameter in network.parameters())
    assert count_parameters(network.state_dict()) == trained


def test_a_slice_is_not_its_own_negative(prepared):
    pretext = Pirl(projection_width=8)
    data = pretext.batches(prepared, PRETRAIN)
    network = pretext.network(MODEL.override(architecture="unet"), PRETRAIN, len(data)).eval()
    batch = data.batch(0, CPU, Shard())
    assert sorted(batch.negatives.tolist()) == list(range(8))
    loss = network(batch)["slice"]
    others = [n for n in range(8) if n not in batch.slices.instance.tolist()]
    network.memory_bank[others] = -network.memory_bank[others]
    assert network(batch)["slice"] != loss
    alone = batch._replace(negatives=batch.slices.instance[:1], slices=batch.slices._replace(
        instance=batch.slices.instance[:1].repeat(3)))  # fmt: skip
    assert network(alone)["slice"] == 0  # the only negative is the slice itself
