"""Times of a training step and of inference, for the shapes at which the published code was measured.

    python benchmarks/speed.py [--device cpu] [--repeats 5]

Prints one table: our path, and beside it our own path with its shortcuts off (float32, channels first),
measured in the same run because machines are noisy; and the figures measured for the published
implementation on two such cores. Medians of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from kaf_model.config import ModelConfig, PretrainConfig
from kaf_model.datasets import PretrainingBatch, Views
from kaf_model.engine import Trainer, autocast, channels_last, choose_device, make_fabric
from kaf_model.pretrain import PretrainingNetwork
from kaf_model.unet import build_network

PAIRS, SIDE, KEYPOINTS = 4, 128, 128
PUBLISHED = {"training step, s a pair": 1.6, "inference, s a slice": 0.18, "plain UNet, s a slice": 0.021}


def views(slices: int, device: torch.device) -> Views:
    """Random slices with random keypoints, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(slices, 1, SIDE, SIDE, generator=generator).to(device)
    keypoints = (torch.rand(slices, KEYPOINTS, 2, generator=generator) * (SIDE - 1)).to(device)
    valid = torch.ones(slices, KEYPOINTS, dtype=torch.bool, device=device)
    return Views(images.contiguous(memory_format=torch.channels_last), keypoints, valid)


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, after two to warm up."""

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    times = [once() for _ in range(repeats + 2)][2:]
    return statistics.median(times)


def training_step(device: torch.device, precision: str, repeats: int) -> float:
    """Seconds a pair of a pretraining step: both views, all three losses, backward, optimiser."""
    config = PretrainConfig.preset("paper-chd", batch_size=PAIRS, epochs=None, steps=1000)
    network = PretrainingNetwork(ModelConfig.preset("paper-chd"), config)
    fabric = make_fabric(device.type, precision=precision)
    trainer = Trainer(
        network,
        config,
        fabric=fabric,
        groups=[{"params": list(network.parameters()), "rate": 1.0}],
        slices_per_epoch=1000,
    )
    if precision == "float32":
        network.to(memory_format=torch.contiguous_format)
    matches = torch.arange(KEYPOINTS, device=device).repeat(PAIRS, 1)
    matches[:, KEYPOINTS // 2 :] = -1
    position = torch.linspace(0, 1, PAIRS, device=device).repeat(2)
    batch = PretrainingBatch(views(2 * PAIRS, device), position, matches)
    steps = trainer.run(lambda _step, _parts: [batch], stage="timing")
    return median_seconds(lambda: next(steps), device, repeats) / PAIRS


def inference(device: torch.device, architecture: str, *, fast: bool, repeats: int) -> float:
    """Seconds a slice of a batch of eight."""
    network = build_network(ModelConfig.preset("paper-chd", architecture=architecture)).to(device).eval()
    if fast:
        channels_last(network)
    batch = views(8, device)
    images = batch.images if fast else batch.images.contiguous()

    def forward() -> None:
        with torch.inference_mode(), autocast(device) if fast else torch.no_grad():
            network(images, batch.keypoints, batch.valid)

    return median_seconds(forward, device, repeats) / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = choose_device(options.device)
    kaf, plain = "kaf-unet", "unet"
    rows = {
        "training step, s a pair": [
            training_step(device, precision, options.repeats) for precision in ("auto", "float32")
        ],
        "inference, s a slice": [
            inference(device, kaf, fast=f, repeats=options.repeats) for f in (True, False)
        ],
        "plain UNet, s a slice": [
            inference(device, plain, fast=f, repeats=options.repeats) for f in (True, False)
        ],
    }
    print(
        f"{SIDE} x {SIDE}, {KEYPOINTS} keypoints, 32 channels, width 256, 12 attention blocks, {PAIRS} pairs"
    )
    print(f"device {device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | ours | ours, float32 channels first | published |")
    print("|---|---|---|---|")
    for name, (ours, slow) in rows.items():
        print(f"| {name} | {ours:.3f} | {slow:.3f} | {PUBLISHED[name]:.3f} |")


if __name__ == "__main__":
    main()
