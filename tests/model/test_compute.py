"""Operations and memory of cases that can be counted by hand."""

import pytest
import torch
from torch import nn

from kaf_model.compute import measure, measure_costs
from kaf_model.config import ModelConfig
from kaf_model.errors import UserError
from kaf_model.unet import build_network


def test_a_convolution_costs_what_one_can_count():
    convolution = nn.Conv2d(3, 5, 3, padding=1)
    image = torch.zeros(1, 3, 16, 24)
    flops, _ = measure(convolution, [image], training=False)
    assert flops == 2 * 5 * 3 * 9 * 16 * 24
    trained, _ = measure(convolution, [image], training=True)
    assert trained == 2 * flops  # forward, and the gradient of the kernel
    assert convolution.weight.grad is None


def test_the_peak_is_what_lives_at_the_same_time():
    image = torch.zeros(1, 3, 16, 24)
    size = 4 * 3 * 16 * 24
    for depth in (1, 2, 5):  # what a layer reads and what it writes; the input was there before
        chain = nn.Sequential(*[nn.ReLU() for _ in range(depth)])
        assert measure(chain, [image], training=False) == (0, min(depth, 2) * size)


def test_the_operations_of_attention_are_counted():
    config = {"start_channels": 4, "embedding_width": 16, "heads": 2, "kaf_levels": (4,)}
    networks = [build_network(ModelConfig(attention_blocks=blocks, **config)).eval() for blocks in (1, 2)]
    inputs = [torch.zeros(1, 1, 32, 48), torch.rand(1, 30, 2) * 31]
    one, two = (measure(network, inputs, training=False)[0] for network in networks)
    products = 2 * 2 * 30 * 30 * 16
    linear = 2 * 30 * (16 * 48 + 16 * 16 + 32 * 32 + 32 * 16)
    assert two - one == products + linear


def test_both_networks_are_measured_at_every_size():
    work = measure_costs(
        ModelConfig(start_channels=4, embedding_width=8, heads=2, kaf_levels=(3, 4)),
        edges=[64, 128],
        blocks=[4],
        num_keypoints=10,
    )
    steps = []
    try:
        while True:
            steps.append(next(work).step)
    except StopIteration as done:
        costs = done.value
    assert steps == [1, 2, 3, 4]
    assert [(cost.network, cost.edge) for cost in costs] == [
        ("KAF-UNet", 64),
        ("KAF-UNet", 128),
        ("SwinUNETR", 64),
        ("SwinUNETR", 128),
    ]
    for small, large in (costs[:2], costs[2:]):
        assert large.parameters == small.parameters
        assert 3 < large.gflops / small.gflops < 4.5
        assert large.memory_mib > small.memory_mib > small.parameters * 4 / 2**20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edges": [100], "blocks": [4]}, "divide by 32, got 100"),
        ({"edges": [32], "blocks": [4]}, "from 64 that divide by 32, got 32"),
        ({"edges": [64], "blocks": [6]}, "got 6"),
        ({"edges": [64], "blocks": [0]}, "got 0"),
    ],
)
def test_what_does_not_divide_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        next(measure_costs(ModelConfig(), **options))


def test_plain_networks_are_refused():
    with pytest.raises(UserError, match="kaf-unet"):
        next(measure_costs(ModelConfig(architecture="unet"), edges=[64], blocks=[4]))


def test_devices_that_count_no_memory_are_refused():
    with pytest.raises(UserError, match="not on mps; use --device cpu"):
        next(measure_costs(ModelConfig(), edges=[64], blocks=[4], device="mps"))
