"""How many steps a finetuning makes with one thread, with all, and with as many as it finds to be quickest.

    python benchmarks/threads.py [--seconds 40] [--busy 0 1]

Finetunes the network of `small` on two synthetic hearts for as long as that, beside as many other processes that keep
a processor busy. Prints steps and ms a step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

# As kaf has it; before torch is imported.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}

import torch

from kaf_model.config import FinetuneConfig, ModelConfig
from kaf_model.finetune import finetune
from kaf_model.heap import keep_freed_memory
from kaf_model.labels import LabelledVolume, SliceStatus
from kaf_model.phantom import make_heart
from kaf_model.progress import finished
from kaf_model.volume import Volume

_BUSY = "while True: pass"


def steps(cases: list[LabelledVolume], seconds: float) -> int:
    """Steps of a finetuning."""
    training = FinetuneConfig.preset("small", steps=None, time_budget=seconds)
    work = finetune(ModelConfig.fresh("small"), cases, training, device="cpu")
    return len(finished(work).curve)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    keep_freed_memory()
    os.environ.pop("OMP_NUM_THREADS", None)
    everything = os.cpu_count() or 1
    cases = []
    for seed in range(2):
        heart = make_heart(seed, shape=(10, 160, 176))
        volume = Volume.from_array(heart.image, heart.spacing, name=f"heart{seed}")
        complete = dict.fromkeys(range(volume.num_slices), SliceStatus.COMPLETE)
        cases.append(LabelledVolume(volume, heart.labels, complete))
    torch.set_num_threads(everything)
    steps(cases, 2)  # warms up
    print("| busy processes | threads | steps | ms a step |")
    print("|---|---|---|---|")
    for busy in options.busy:
        others = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(busy)]
        try:
            for name, threads in (("one", 1), ("all", everything), ("chosen", everything)):
                torch.set_num_threads(threads)
                if name == "chosen":
                    os.environ.pop("OMP_NUM_THREADS", None)
                else:
                    os.environ["OMP_NUM_THREADS"] = str(threads)  # a number that is set stays
                made = steps(cases, options.seconds)
                print(f"| {busy} | {name} | {made} | {1000 * options.seconds / made:.1f} |", flush=True)
        finally:
            for other in others:
                other.kill()
                other.wait()


if __name__ == "__main__":
    main()
