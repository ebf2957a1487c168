"""The training loop on losses whose gradients are known: parts of a batch, clipping, time, recomputing."""

import time

import pytest
import torch
from torch import nn

from kaf_model.config import FinetuneConfig
from kaf_model.engine import Trainer, make_fabric
from kaf_model.errors import UserError


class Proportional(nn.Module):
    """A loss whose gradient is the mean of what it is given."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(2))

    def forward(self, batch):
        return {"total": (self.factor * batch).mean(0).sum()}


class Slow(Proportional):
    """The same, a tenth of a second later."""

    def forward(self, batch):
        time.sleep(0.1)
        return super().forward(batch)


def trainer_of(module, **settings):
    plain = {
        "optimizer": "sgd",
        "gradient_clip": None,
        "weight_decay": 0.0,
        "warmup": 0.0,
        "learning_rate": 0.1,
    }
    return Trainer(
        module,
        FinetuneConfig(**{"steps": 1, **plain, **settings}),
        fabric=make_fabric("cpu", precision="float32"),
        groups=[{"params": list(module.parameters()), "rate": 1.0}],
        slices_per_epoch=4,
    )


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_give_its_gradient(parts):
    rows = torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0], [13.0, 17.0]])
    factors = []
    for number in (1, parts):
        module = Proportional()
        trainer = trainer_of(module, batch_size=4)
        trainer.micro_batches = number
        list(trainer.run(lambda step, count: list(rows.chunk(count)), stage="proportional"))
        factors.append(module.factor.detach())
    assert not torch.equal(factors[0], torch.ones(2))
    assert torch.allclose(factors[0], factors[1])


def test_gradients_are_clipped():
    moved = []
    for clip in (None, 0.5):
        module = Proportional()
        trainer = trainer_of(module, batch_size=1, gradient_clip=clip)
        list(trainer.run(lambda *_: [torch.tensor([[3.0, 4.0]])], stage="proportional"))
        moved.append(1 - module.factor.detach())
    assert torch.allclose(moved[0] / moved[0].norm(), torch.tensor([0.6, 0.8]))
    assert torch.allclose(moved[1], moved[0] / 10, rtol=1e-3)  # from a norm of 5 to one of 0.5


def test_a_network_that_has_nothing_to_recompute_says_so():
    with pytest.raises(UserError, match="recompute"):
        trainer_of(Proportional(), recompute=True)


@pytest.mark.parametrize(("making", "low", "high"), [(0.0, 0.0, 0.5), (0.4, 0.5, 1.0)])
def test_the_time_a_network_waits_for_its_batch_is_known(making, low, high):
    trainer = trainer_of(Slow(), steps=3, batch_size=1)

    def batch_at(step, parts):
        time.sleep(making)
        return [torch.zeros(1, 2)]

    assert trainer.waiting_share == 0
    assert len(list(trainer.run(batch_at, stage="waiting"))) == 3
    assert low <= trainer.waiting_share <= high
