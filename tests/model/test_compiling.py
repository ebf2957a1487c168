"""Compiled blocks give what they give as they are. Here they are only traced: kernels are for a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor

from kaf_model.compiling import compile_blocks
from kaf_model.config import ModelConfig, PretrainConfig
from kaf_model.datasets import PretrainingBatch, Views
from kaf_model.engine import Trainer, make_fabric
from kaf_model.errors import UserError
from kaf_model.pretrain import PretrainingNetwork

MODEL = ModelConfig(start_channels=4, kaf_levels=(3, 4), embedding_width=8, heads=2, attention_blocks=2)
TRAINING = PretrainConfig(batch_size=2, sinkhorn_iterations=5, projection_width=8)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def batch(counts: list[int]) -> PretrainingBatch:
    generator = torch.Generator().manual_seed(sum(counts))
    images = torch.randn(4, 1, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    keypoints = torch.rand(4, 30, 2, generator=generator) * 31
    valid = torch.arange(30) < torch.tensor(counts)[:, None]
    matches = torch.full((2, 30), -1)
    matches[:, :5] = torch.arange(5)
    return PretrainingBatch(Views(images, keypoints, valid), torch.tensor([0.1, 0.8, 0.1, 0.8]), matches)


def losses_and_gradients(network: PretrainingNetwork, counts: list[int]) -> dict[str, Tensor]:
    network.zero_grad(set_to_none=True)
    losses = network(batch(counts))
    losses["total"].backward()
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return found | {name: loss.detach() for name, loss in losses.items()}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch looks at it itself
def test_compiled_blocks_give_the_same() -> None:
    networks = []
    for compiled in (False, True):
        torch.manual_seed(0)
        networks.append(PretrainingNetwork(MODEL, TRAINING))
        if compiled:
            # Four convolution blocks, two KAF layers with two attention blocks each, four of the matcher.
            assert compile_blocks(networks[-1], backend="aot_eager", fullgraph=True) == 4 + 2 + 2 * 2 + 4
    for counts in ([30, 20, 25, 30], [10, 7, 30, 12]):  # sets of other sizes
        expected, found = (losses_and_gradients(network, counts) for network in networks)
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)
    plain, compiled_ones = (dict(network.named_buffers()) for network in networks)
    for name in plain:
        torch.testing.assert_close(compiled_ones[name], plain[name])
    assert networks[0].state_dict().keys() == networks[1].state_dict().keys()


def test_it_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="compile=true needs an NVIDIA GPU"):
        Trainer(
            PretrainingNetwork(MODEL, TRAINING),
            TRAINING.override(compile=True),
            fabric=make_fabric("cpu"),
            groups=[],
            slices_per_epoch=4,
        )
