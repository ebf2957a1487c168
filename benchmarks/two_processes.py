"""Throughput of two processes under torchrun against one process with one thread.

    torchrun --nproc-per-node 2 benchmarks/two_processes.py [--steps 6]
    python benchmarks/two_processes.py [--steps 6]

Each line trains the same `small` network on the same joint batches, pretraining on a synthetic cohort, and
prints pairs a second, the processor time of a step, which others' work on the machine hardly changes, and the
losses of the first step, which are to be the same. Every process has one thread, so that two may use two cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

os.environ["OMP_NUM_THREADS"] = "1"
if hasattr(os, "sched_setaffinity"):  # one core each
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", "0")) % len(cores)]})

import torch

from kaf_model.config import ModelConfig, PretrainConfig
from kaf_model.engine import make_fabric
from kaf_model.heap import keep_freed_memory
from kaf_model.keypoints import KeypointCache
from kaf_model.phantom import make_heart
from kaf_model.pretrain import pretrain
from kaf_model.volume import Volume


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    fabric = make_fabric("cpu")
    volumes = []
    for seed in range(4):
        heart = make_heart(seed, shape=(10, 160, 176))
        volumes.append(Volume.from_array(heart.image, heart.spacing, name=f"heart{seed}"))
    training = PretrainConfig.preset("small", steps=options.steps)
    with tempfile.TemporaryDirectory() as folder:
        work = pretrain(
            ModelConfig.preset("small"), volumes, training, fabric=fabric, cache=KeypointCache(folder)
        )
        ends: list[float] = []
        processor: list[float] = []
        first: dict[str, float] = {}
        for progress in work:
            if progress.losses:
                ends.append(time.monotonic())
                processor.append(time.process_time())
                first = first or {name: round(value, 4) for name, value in progress.losses.items()}
    steps = len(ends) - 2  # the first steps warm up
    busy = fabric.all_reduce(torch.tensor((processor[-1] - processor[1]) / steps), reduce_op="max")
    if fabric.is_global_zero:
        rate = steps * training.batch_size / (ends[-1] - ends[1])
        print(
            f"{fabric.world_size} processes of one thread: {rate:.2f} pairs a second, {float(busy):.2f} s of processor "
            f"time a step in the slower process; first losses {first}"
        )


if __name__ == "__main__":
    main()
