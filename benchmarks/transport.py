"""What an early stop of the transport, and the dual softmax instead of it, do to the losses.

    python benchmarks/transport.py [--steps 30]

For each way, one `small` network is pretrained from the same weights on the same batches of a synthetic cohort.
Printed are the losses after the training (means over its last ten steps; L_local by the way that was trained),
L_local of the trained network on unseen batches by 100 full iterations, which is the same measure for all, how
well the gradient of L_local at the start agrees with that of 100 iterations (cosine), and the time of a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile

import torch
from torch import Tensor
from torch.nn import functional

from kaf_model.config import KeypointConfig, ModelConfig, PretrainConfig, SliceConfig
from kaf_model.datasets import PretrainingBatch, PretrainingPairs
from kaf_model.engine import Trainer, make_fabric
from kaf_model.heap import keep_freed_memory
from kaf_model.keypoints import KeypointCache
from kaf_model.phantom import make_heart
from kaf_model.preparation import PreparedVolume, prepare_volumes
from kaf_model.pretrain import KeypointAugmented, PretrainingNetwork
from kaf_model.progress import finished
from kaf_model.volume import Volume

WAYS = {
    "100 iterations": {"sinkhorn_iterations": 100},
    "30 iterations": {"sinkhorn_iterations": 30},
    "100, stop at a change of 0.01": {"sinkhorn_iterations": 100, "sinkhorn_tolerance": 0.01},
    "dual softmax": {"sinkhorn_iterations": 0},
}
UNSEEN = range(10**5, 10**5 + 4)
"""Steps whose batches no training draws."""


def cohort() -> list[PreparedVolume]:
    """Four prepared synthetic hearts."""
    volumes = []
    for seed in range(4):
        heart = make_heart(seed, shape=(10, 160, 176))
        volumes.append(Volume.from_array(heart.image, heart.spacing, name=f"heart{seed}"))
    with tempfile.TemporaryDirectory() as folder:
        work = prepare_volumes(volumes, SliceConfig(), KeypointConfig(), cache=KeypointCache(folder))
        return finished(work)


def gradient_of_local(network: PretrainingNetwork, batch: PretrainingBatch) -> Tensor:
    """Gradient of L_local with respect to all weights."""
    loss = network(batch)["local"]
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def iterated(network: PretrainingNetwork, iterations: int, tolerance: float = 0.0) -> None:
    """Match by that many iterations from now on."""
    network.matcher.iterations, network.matcher.tolerance = iterations, tolerance


def train(way: dict[str, float], data: PretrainingPairs, steps: int) -> list[str]:
    """Train by one way; returns the cells of its line."""
    config = PretrainConfig.preset("small", **{"steps": steps, "seed": 0, **way})
    torch.manual_seed(0)
    network = PretrainingNetwork(ModelConfig.preset("small"), config)
    fabric = make_fabric("cpu")
    groups = [{"params": list(network.parameters()), "rate": 1.0}]
    trainer = Trainer(network, config, fabric=fabric, groups=groups, slices_per_epoch=40)
    first = data.batch(0, fabric.device)
    own = gradient_of_local(network, first)
    iterated(network, 100)
    exact = gradient_of_local(network, first)
    iterated(network, config.sinkhorn_iterations, config.sinkhorn_tolerance)
    cosine = float(functional.cosine_similarity(own, exact, dim=0))
    for _progress in trainer.run(lambda step, _parts: [data.batch(step, fabric.device)], stage="training"):
        pass
    tail = trainer.state.curve[-10:]
    means = {name: statistics.mean(entry[name] for entry in tail) for name in ("pcl", "global", "local")}
    iterated(network, 100)
    with torch.no_grad():
        unseen = [float(network(data.batch(step, fabric.device))["local"]) for step in UNSEEN]
    cells = [f"{means[name]:.3f}" for name in ("pcl", "global", "local")]
    seconds = trainer.state.seconds / steps
    return [*cells, f"{statistics.mean(unseen):.3f}", f"{cosine:.4f}", f"{seconds:.2f} s"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    keep_freed_memory()
    config = PretrainConfig.preset("small")
    data = KeypointAugmented().batches(cohort(), config)
    print("| matching by | L_PCL | L_global | L_local, own | L_local, 100 iterations | cosine | a step |")
    print("|---|---|---|---|---|---|---|")
    for name, way in WAYS.items():
        print(f"| {' | '.join([name, *train(way, data, options.steps)])} |", flush=True)


if __name__ == "__main__":
    main()
