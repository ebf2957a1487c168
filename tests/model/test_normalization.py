"""Batch normalisation and the losses: over one process as torch's own, over two as over their joint batch."""

import pytest
import torch
from torch import nn
from two_processes import run_in_two

from kaf_model import normalization
from kaf_model.losses import IGNORED, cross_entropy, matching_loss, positional_contrastive_loss, soft_dice
from kaf_model.matching import Matches
from kaf_model.normalization import BatchNorm, gather_over_ranks, is_distributed, sum_over_ranks

CHANNELS = 5


def like(theirs):
    """Ours with the weights of one of torch's layers, which are made random."""
    for name, value in theirs.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if "var" in name or "weight" in name else value.normal_()
    ours = BatchNorm(theirs.num_features)
    ours.load_state_dict(theirs.state_dict())
    return ours


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm2d, (3, CHANNELS, 6, 8)), (nn.BatchNorm1d, (7, CHANNELS))]
)
def test_it_is_torchs_own(kind, shape, training):
    torch.manual_seed(0)
    theirs = kind(CHANNELS).train(training)
    ours = like(theirs).train(training)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    results = []
    for module in (ours, theirs):
        for step in range(3):
            torch.manual_seed(step)
            x = (torch.randn(shape) * 3 + 1).requires_grad_()
            out = module(x)
        gradients = torch.autograd.grad((out * torch.randn(shape)).sum(), [x, module.weight, module.bias])
        results.append([out, *gradients, module.running_mean, module.running_var])
    for mine, expected in zip(*results, strict=True):
        assert torch.allclose(mine, expected, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("capability", "threads", "channels", "beside"),
    [
        ("AVX512", 1, 8, 4),
        ("AVX512", 1, 24, 4),
        ("AVX2", 1, 12, 4),
        ("AVX2", 1, 8, 1),
        ("AVX2", 2, 8, 4),  # two threads would share a line
        ("AVX2", 2, 16, 1),
        ("DEFAULT", 2, 8, 4),
    ],
)
def test_pixels_side_by_side_are_torchs_own(monkeypatch, capability, threads, channels, beside, kind):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(channels)
    ours = like(theirs)
    maps = (torch.randn(3, channels, 6, 8) * 3 + 1).to(kind)
    wanted = torch.randn(3, channels, 6, 8)
    results = []
    for module, layout in ((ours, torch.channels_last), (theirs, torch.contiguous_format)):
        x = maps.clone(memory_format=layout).requires_grad_()
        assert normalization._pixels_beside(x) == (beside if module is ours else 1)
        out = nn.functional.leaky_relu(module(x), 0.1, inplace=True)
        gradients = torch.autograd.grad((out * wanted).sum(), [x, module.weight, module.bias])
        assert module is not ours or out.is_contiguous(memory_format=layout)
        results.append([out, *gradients, module.running_mean, module.running_var])
    for mine, expected in zip(*results, strict=True):
        assert torch.allclose(mine, expected, atol=1e-4 if kind is torch.float32 else 0.05, rtol=1e-2)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1, 3, 5, 5), torch.channels_last),  # 25 pixels are no multiple
        ((1, 3, 4, 4), torch.contiguous_format),
        ((1, 32, 4, 4), torch.channels_last),  # whole vectors
        ((0, 8, 4, 4), torch.channels_last),
    ],
)
def test_what_cannot_lie_side_by_side_or_need_not(monkeypatch, shape, layout):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert normalization._pixels_beside(torch.zeros(shape).contiguous(memory_format=layout)) == 1
    assert normalization._pixels_beside(torch.zeros(9, 8)) == 1


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_values_use_the_running_statistics(rows):
    torch.manual_seed(0)
    ours = like(nn.BatchNorm1d(CHANNELS))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    x = torch.randn(rows, CHANNELS, requires_grad=True)
    out = ours.train()(x)
    out.sum().backward()
    assert torch.equal(out, ours.eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert x.grad.isfinite().all()


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"got shape \(2, 5, 7\)"):
        BatchNorm(CHANNELS)(torch.zeros(2, 5, 7))


def test_one_process_is_not_distributed():
    value = torch.ones(3)
    assert not is_distributed()
    assert sum_over_ranks(value) is value
    assert gather_over_ranks(value) is value


@pytest.mark.parametrize("shape", [(4, CHANNELS, 6, 8), (9, CHANNELS)])
def test_statistics_of_half_precision_are_in_full(shape):
    maps = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 1).bfloat16()
    mean, variance, count = normalization._joint_statistics(maps)
    axes = [axis for axis in range(len(shape)) if axis != 1]
    expected_variance, expected_mean = torch.var_mean(maps.float(), axes, correction=0)
    assert torch.allclose(mean, expected_mean, atol=1e-5)
    assert torch.allclose(variance, expected_variance, atol=1e-5)
    assert count == maps.numel() / CHANNELS


# Two processes. Each case is a function of the joint batch's rows that one process has; the test runs it
# on all rows in this process, and on each half in two others.

ROWS = {"both": (slice(0, 4), slice(4, 10)), "one has none": (slice(0, 0), slice(0, 10))}


def normalised(rows, shape, count, layout=torch.contiguous_format):
    """Output, gradient and statistics of a layer on some rows of the joint batch."""
    torch.manual_seed(0)
    joint, weight = torch.randn(count, *shape) * 2 + 1, torch.randn(count, *shape)
    module = like(nn.BatchNorm2d(CHANNELS)).train()
    x = joint[rows].clone(memory_format=layout).requires_grad_()
    out = module(x)
    (out * weight[rows]).sum().backward()
    return {
        "rows": {"out": out.detach(), "gradient": x.grad},
        "sums": {"weight": module.weight.grad, "bias": module.bias.grad},
        "same": {"mean": module.running_mean.clone(), "variance": module.running_var.clone()},
    }


def joint_losses(rows):
    """Every loss that looks beyond its own process, and its gradient."""
    torch.manual_seed(0)
    embeddings, position = torch.randn(10, 6), torch.rand(10)
    logits, labels = torch.randn(10, 3, 4, 6), torch.randint(-1, 3, (10, 4, 6))
    labels[:5] = IGNORED  # the halves know different numbers of pixels
    log_assignment = torch.randn(10, 4, 5) - 4
    valid0, valid1 = torch.rand(10, 3) < 0.5, torch.rand(10, 4) < 0.4
    valid1[1:4] = False  # ... and have different numbers of pairs that can be matched
    matches0 = torch.where(valid0 & valid1[:, :3], torch.arange(3), -1)

    def contrast(x):
        return positional_contrastive_loss(
            gather_over_ranks(x), gather_over_ranks(position[rows]), temperature=0.1, position_threshold=0.3
        )

    def match(x):
        return matching_loss(Matches(x, valid0[rows], valid1[rows]), matches0[rows], matched_weight=0.45)

    cases = {
        "contrastive": (embeddings, contrast),
        "matching": (log_assignment, match),
        "cross-entropy": (logits, lambda x: cross_entropy(x, labels[rows])),
        "dice": (logits, lambda x: soft_dice(x, labels[rows])),
    }
    result = {"rows": {}, "same": {}}
    for name, (joint, loss_of) in cases.items():
        x = joint[rows].clone().requires_grad_()
        loss = loss_of(x)
        loss.backward()
        processes = torch.distributed.get_world_size() if is_distributed() else 1
        result["same"][name] = loss.detach()
        result["rows"][name] = x.grad / processes  # DDP takes the mean over processes
    return result


CASES = {
    "maps": (normalised, ROWS["both"], {"shape": (CHANNELS, 3, 4), "count": 10}),
    "side by side": (
        normalised,
        ROWS["both"],
        {"shape": (CHANNELS, 4, 8), "count": 10, "layout": torch.channels_last},
    ),
    "keypoints": (normalised, ROWS["both"], {"shape": (CHANNELS,), "count": 10}),
    "keypoints of one": (normalised, ROWS["one has none"], {"shape": (CHANNELS,), "count": 10}),
    "one keypoint": (normalised, (slice(0, 0), slice(0, 1)), {"shape": (CHANNELS,), "count": 1}),
    "no keypoint": (normalised, (slice(0, 0), slice(0, 0)), {"shape": (CHANNELS,), "count": 0}),
    "losses": (joint_losses, (slice(0, 5), slice(5, 10)), {}),
}


def both_parts(rank, _folder):
    torch.distributed.init_process_group("gloo")
    return {name: case(rows[rank], **options) for name, (case, rows, options) in CASES.items()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return run_in_two(both_parts, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_the_joint_batch(two_processes, name):
    case, _, options = CASES[name]
    alone = case(slice(None), **options)
    first, second = (results[name] for results in two_processes)
    for kind, expected in alone.items():
        for key, value in expected.items():
            a, b = first[kind][key], second[kind][key]
            found = {"rows": lambda a, b: torch.cat([a, b]), "sums": torch.add, "same": lambda a, b: a}[kind](
                a, b
            )
            assert torch.allclose(found, value, atol=1e-5), (kind, key)
            assert kind != "same" or torch.equal(a, b), key
