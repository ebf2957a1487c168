"""Times, floating-point operations and memory of every stage, beside our own plain path.

    python benchmarks/speed.py [--shapes a,b,c] [--device cpu] [--repeats 5] [--stages data,inference]
    python benchmarks/speed.py --shapes d --device cuda

Shapes: (a) 32 channels, width 256, 12 attention blocks a level, 128 x 128, 128 keypoints, 4 pairs; (b) the same
at 224 x 224, 256 keypoints, 2 pairs; (c) preset `small`, 128 x 128, up to 545 keypoints; (d) preset `paper-acdc`
at 352 x 352, 512 keypoints, 32 pairs, for a GPU. The plain path is `benchmarks/plain.py`: float32, channels first,
dense diffusion, masked attention, stored transport. Both are measured in the same run, call by call in turn,
because machines are noisy; times are medians, with `--processor-time` of one thread's processor time. FLOPs are
those of the multiplications that torch counts. "Share of peak" is the time that they would take at the rate this
machine reached, in the same run, in a large convolution and in a large matrix product of the type used, as a part
of the time taken. Lines "recomputing" are those before them with the setting `recompute`, beside the same plain
path.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal
from unittest import mock

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from plain import plain_path
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kaf_model import attention
from kaf_model.averaging import WeightAverage
from kaf_model.checkpoint import ClassLabel, Model
from kaf_model.compute import peak_bytes
from kaf_model.config import FinetuneConfig, KeypointConfig, ModelConfig, PretrainConfig, SliceConfig
from kaf_model.datasets import LabelledBatch, LabelledSlices, PretrainingBatch, Shard, Views
from kaf_model.engine import Trainer, choose_device, has_bfloat16, make_fabric
from kaf_model.finetune import FinetuningNetwork
from kaf_model.heap import keep_freed_memory
from kaf_model.inference import InferenceNetwork
from kaf_model.keypoints import iter_detect
from kaf_model.labels import ClassMap
from kaf_model.losses import matching_loss
from kaf_model.phantom import make_heart
from kaf_model.preparation import LabelledSlice
from kaf_model.presets import PresetName
from kaf_model.pretrain import PretrainingNetwork
from kaf_model.segment import slices_at_once
from kaf_model.unet import build_network


@dataclass(frozen=True)
class Shape:
    """What is measured: a preset, and what goes through its network."""

    preset: PresetName
    side: int
    keypoints: int
    pairs: int
    even: bool = True
    """Whether all slices have as many keypoints; else a quarter of `keypoints` to all of them."""


SHAPES = {
    "a": Shape("paper-chd", 128, 128, 4),
    "b": Shape("paper-chd", 224, 256, 2),
    "c": Shape("small", 128, 545, 12, even=False),
    "d": Shape("paper-acdc", 352, 512, 32),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; plain and memory are None where they are not measured or do not fit."""

    stage: str
    ours: float
    plain: float | None = None
    flops: tuple[int, int] = (0, 0)
    """In convolutions and in matrix products."""
    memory: tuple[int, int | None] | None = None


def processor_time() -> float:
    """Seconds of the processor that this process and those it waited for have used."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Clock:
    """Measures calls on a device.

    Args:
        device: Where they compute.
        repeats: Calls whose median is taken, after one to warm up.
        now: What tells the seconds.
    """

    def __init__(
        self, device: torch.device, repeats: int, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.device = device
        self.repeats = repeats
        self.now = now
        kind = torch.bfloat16 if has_bfloat16(device) else torch.float32
        batch, width = (64, 4096) if device.type == "cuda" else (8, 1024)
        maps = torch.randn(batch, 256, 64, 64, device=device, dtype=kind).contiguous(
            memory_format=torch.channels_last
        )
        kernel = torch.randn(256, 256, 3, 3, device=device, dtype=kind)
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        rows, weight = (
            torch.randn(4 * width, width, device=device, dtype=kind),
            torch.randn(width, width, device=device, dtype=kind),
        )
        with torch.inference_mode():
            convolution = self.fastest(lambda: functional.conv2d(maps, kernel, padding=1))
            product = self.fastest(lambda: rows @ weight)
        self.peaks = (2 * 9 * 256 * 256 * batch * 64 * 64 / convolution, 8 * width**3 / product)
        """Operations a second in a convolution and in a matrix product."""

    def once(self, work: Callable[[], object]) -> float:
        """Seconds of a call."""
        started = self.now()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.now() - started

    def fastest(self, work: Callable[[], object]) -> float:
        """Least seconds of a few calls."""
        return min(self.once(work) for _ in range(2 + self.repeats))

    def both(self, ours: Callable[[], object], plain: Callable[[], object]) -> tuple[float, float]:
        """Median seconds of our path and of the plain one, call by call in turn."""
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(self.repeats + 1):
            for work, path, kept in ((ours, nullcontext, times[0]), (plain, plain_path, times[1])):
                with path():
                    seconds = self.once(work)
                if turn:
                    kept.append(seconds)
        return statistics.median(times[0]), statistics.median(times[1])

    def row(
        self,
        stage: str,
        ours: Callable[[], object],
        plain: Callable[[], object],
        per: int = 1,
        counted: Callable[[], object] | None = None,
    ) -> Row:
        """Measure a stage of the network by both paths; everything is divided by `per` but the memory.

        `counted` does the same as `ours` where torch sees the operations.
        """
        try:
            fast, slow = (seconds / per for seconds in self.both(ours, plain))
            with plain_path():
                plain_memory = peak_bytes(plain, self.device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            fast, slow, plain_memory = self.fastest(ours) / per, None, None
        # Attention is counted as its products: torch counts neither its fused kernel on CPUs nor that of packed rows.
        by_products = nullcontext()
        if self.device.type == "cuda":
            by_products = mock.patch.object(attention, "attend", attention.attend_padded)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), by_products:
            (counted or ours)()
        by_kind = [0, 0]
        for name, count in counter.get_flop_counts().get("Global", {}).items():
            by_kind["convolution" not in str(name)] += count // per
        memory = (peak_bytes(ours, self.device), plain_memory)
        return Row(stage, fast, slow, (by_kind[0], by_kind[1]), memory)

    def share(self, row: Row) -> float:
        """Share of this machine's peak that a stage reaches."""
        return sum(count / peak for count, peak in zip(row.flops, self.peaks, strict=True)) / row.ours


def views(shape: Shape, slices: int, device: torch.device) -> Views:
    """Random slices with random keypoints, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(slices, 1, shape.side, shape.side, generator=generator)
    keypoints = torch.rand(slices, shape.keypoints, 2, generator=generator) * (shape.side - 1)
    least = shape.keypoints if shape.even else shape.keypoints // 4
    counts = torch.randint(least, shape.keypoints + 1, (slices, 1), generator=generator)
    valid = torch.arange(shape.keypoints) < counts
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    return Views(images, keypoints.to(device), valid.to(device))


def pair_batch(shape: Shape, device: torch.device) -> PretrainingBatch:
    """A pretraining batch in which a quarter of the keypoints are matched."""
    both = views(shape, 2 * shape.pairs, device)
    matches = torch.arange(shape.keypoints, device=device).repeat(shape.pairs, 1)
    matches[:, shape.keypoints // 4 :] = -1
    return PretrainingBatch(both, torch.linspace(0, 1, shape.pairs, device=device).repeat(2), matches)


def trainers(
    make: Callable[[], nn.Module], config: PretrainConfig | FinetuneConfig, device: str
) -> list[Trainer]:
    """A trainer of our path, one of the plain path, and one that recomputes, of networks that start alike."""
    all_three = []
    for precision, recompute in (("auto", False), ("float32", False), ("auto", True)):
        torch.manual_seed(0)
        module = make()
        groups = [{"params": list(module.parameters()), "rate": 1.0}]
        fabric = make_fabric(device, precision=precision)
        settings = config.override(recompute=recompute)
        all_three.append(Trainer(module, settings, fabric=fabric, groups=groups, slices_per_epoch=1000))
    all_three[1].raw_module.to(memory_format=torch.contiguous_format)
    return all_three


def pretraining_rows(clock: Clock, shape: Shape) -> Iterator[Row]:
    """A pretraining step and its parts, a pair."""
    model = ModelConfig.preset(shape.preset)
    config = PretrainConfig.preset(shape.preset, batch_size=shape.pairs, epochs=None, steps=10**6)
    network = partial(PretrainingNetwork, model, config)
    ours, plain, recomputing = trainers(network, config, clock.device.type)
    batch, pairs = pair_batch(shape, clock.device), shape.pairs
    yield clock.row("forward, a pair", lambda: ours.module(batch), lambda: plain.module(batch), pairs)
    yield clock.row(
        "forward and backward, a pair",
        lambda: ours._gradients([batch]),
        lambda: plain._gradients([batch]),
        pairs,
    )
    yield clock.row("matching loss, a pair", matching(ours, batch), matching(plain, batch), pairs)
    yield clock.row("optimiser, a step", lambda: optimise(ours), lambda: optimise(plain))
    yield from step_rows(clock, "pretraining step, a pair", [ours, plain, recomputing], batch, pairs)


def networks(preset: PresetName) -> dict[str, ModelConfig]:
    """The networks of a preset by their names: those of its width, and what a finetuning starts afresh."""
    kaf, plain, fresh = (
        ModelConfig.preset(preset),
        ModelConfig.preset(preset, architecture="unet"),
        ModelConfig.fresh(preset),
    )
    narrower = {f"UNet of {fresh.start_channels} channels": fresh} if fresh != kaf else {}
    return {"KAF-UNet": kaf, "plain UNet": plain, **narrower}


def finetuning_rows(clock: Clock, shape: Shape) -> Iterator[Row]:
    """A finetuning step of ten slices."""
    tuning = FinetuneConfig.preset(shape.preset, epochs=None, steps=10**6)
    for name, kind in networks(shape.preset).items():
        make = partial(lambda kind: FinetuningNetwork(build_network(kind), tuning), kind)
        three = trainers(make, tuning, clock.device.type)
        labels = torch.randint(kind.num_classes, (10, shape.side, shape.side), device=clock.device)
        labelled = LabelledBatch(views(shape, 10, clock.device), labels)
        yield from step_rows(clock, f"finetuning step, {name}, ten slices", three, labelled)


def step_rows(
    clock: Clock, stage: str, three: list[Trainer], batch: PretrainingBatch | LabelledBatch, per: int = 1
) -> Iterator[Row]:
    """Whole steps on one batch, keeping activations and recomputing them."""
    own, plain, recomputing = (
        partial(next, trainer.run(lambda _step, _parts: [batch], stage="timing")) for trainer in three
    )

    def unreplayed() -> None:
        replay, three[0]._replay = three[0]._replay, None
        own()
        three[0]._replay = replay

    kept = clock.row(stage, own, plain, per, counted=unreplayed)
    yield kept
    times = [clock.once(recomputing) for _ in range(1 + clock.repeats)]
    memory = (peak_bytes(recomputing, clock.device), kept.memory and kept.memory[1])
    seconds = statistics.median(times[1:]) / per
    yield replace(kept, stage=f"{stage}, recomputing", ours=seconds, memory=memory)


def optimise(trainer: Trainer) -> None:
    """Clip the gradients that are there, and step."""
    trainer._clip_gradients()
    trainer.optimizer.step()


def matching(trainer: Trainer, batch: PretrainingBatch) -> Callable[[], object]:
    """The matcher and its loss with gradients, on the features of an encoder without gradients."""
    network, size = trainer.raw_module, batch.views.images.shape[-2:]
    assert isinstance(network, PretrainingNetwork)
    with torch.no_grad():
        encoded = network.encoder(*batch.views)
        features = network.keypoint_projection(torch.cat(encoded.keypoint_features, dim=1))

    def work() -> None:
        with trainer.fabric.autocast():
            matches = network.matcher(features.detach().requires_grad_(), encoded.keypoints, size)
            matching_loss(matches, batch.matches0).backward()

    return work


def inference_rows(clock: Clock, shape: Shape) -> Iterator[Row]:
    """Inference, a slice of a batch as large as it is unless told otherwise."""
    size = slices_at_once(clock.device)
    for name, kind in networks(shape.preset).items():
        network = build_network(kind).to(clock.device).eval()
        folded, batch = InferenceNetwork(network), views(shape, size, clock.device)
        first = Views(batch.images.contiguous(), *batch[1:])

        def plain(network: nn.Module = network, first: Views = first) -> None:
            with torch.inference_mode():
                network(*first)

        yield clock.row(f"inference, {name}, a slice", partial(folded, *batch), plain, size)


def labelled_heart(shape: Shape) -> tuple[NDArray[np.float32], list[LabelledSlice]]:
    """Ten slices of a synthetic heart, somewhat larger than the crops, and the same with keypoints and labels."""
    heart = make_heart(0, shape=(10, shape.side + 32, shape.side + 48))
    slices = heart.image.astype(np.float32)
    labelled = [
        LabelledSlice(image.astype(np.float16)[None], points.positions, labels.astype(np.int64))
        for image, points, labels in zip(slices, iter_detect(slices), heart.labels, strict=True)
    ]
    return slices, labelled


def training_rows(clock: Clock, shape: Shape) -> Iterator[Row]:
    """A step of a finetuning from slices to averaged weights, with the batches that the preset has on the device.

    The plain path augments one step at a time and replays nothing.
    """
    _, slices = labelled_heart(shape)
    crop = {"crop": (shape.side, shape.side)}
    on_a_gpu = clock.device.type == "cuda"
    tuning = FinetuneConfig.preset(
        shape.preset, gpu=on_a_gpu, epochs=None, steps=10**6, early_crop=None, augment=crop
    )
    for name, kind in networks(shape.preset).items():
        seen = slices if kind.reads_keypoints else [replace(item, keypoints=NO_KEYPOINTS) for item in slices]
        ways: tuple[Literal["auto", "float32"], ...] = ("auto", "float32")
        ours, plain = (
            partial(several, finetuning_steps(clock.device, tuning, kind, seen, precision))
            for precision in ways
        )
        fast, slow = (seconds / SEVERAL for seconds in clock.both(ours, plain))
        yield Row(f"from slices to weights, {name}, a step of {tuning.batch_size}", fast, slow)


NO_KEYPOINTS = np.zeros((0, 2), np.float32)
SEVERAL = 8
"""Steps that are timed at once: a GPU augments as many together."""


def several(steps: Iterator[object]) -> None:
    """Do several steps."""
    for _ in range(SEVERAL):
        next(steps)


def finetuning_steps(
    device: torch.device,
    tuning: FinetuneConfig,
    kind: ModelConfig,
    slices: list[LabelledSlice],
    precision: Literal["auto", "float32"],
) -> Iterator[object]:
    """Train for ever, in mixed precision with all that is fast, or in float32 without."""
    torch.manual_seed(0)
    network = build_network(kind.override(num_classes=4))
    module = FinetuningNetwork(network, tuning)
    groups = [{"params": list(module.parameters()), "rate": 1.0}]
    fabric = make_fabric(device.type, precision=precision)
    trainer = Trainer(module, tuning, fabric=fabric, groups=groups, slices_per_epoch=len(slices))
    classes = ClassMap(tuple(ClassLabel(value, str(value)) for value in range(4)))
    average = WeightAverage(network, tuning.averaging, [], classes)
    augment, size, foreground = tuning.augment, tuning.batch_size, tuning.foreground
    data = LabelledSlices(slices, augment=augment, foreground=foreground, batch_size=size, seed=0)
    if precision == "float32":
        module.to(memory_format=torch.contiguous_format)
        trainer._replay = None
        data._steps_together = lambda _device: 1  # type: ignore[method-assign]
    for progress in trainer.run(lambda step, _parts: [data.batch(step, device)], stage="timing"):
        average.update()
        yield progress


def data_rows(clock: Clock, shape: Shape) -> list[Row]:
    """Detection, in parallel and one by one, and the augmentation of ten labelled slices."""
    slices, labelled = labelled_heart(shape)
    parallel, serial = clock.both(
        lambda: list(iter_detect(slices)), lambda: list(iter_detect(slices, workers=1))
    )
    config = FinetuneConfig.preset("small", augment={"crop": (shape.side, shape.side)})
    data = LabelledSlices(labelled, augment=config.augment, foreground=0.33, batch_size=10, seed=0)
    step = iter(range(10**6))
    together, one_by_one = clock.both(
        lambda: data.batch(next(step), clock.device),
        lambda: [data.batch(0, clock.device, Shard(part, 10)) for part in range(10)],
    )
    return [
        Row("detection (SIFT), a slice, beside one by one", parallel / 10, serial / 10),
        Row("augmentation, a slice, beside one by one", together / 10, one_by_one / 10),
    ]


def file_rows(clock: Clock) -> list[Row]:
    """Start-up, and a 216 x 256 x 10 volume from file to file with networks of `small`, in processes of their own.

    The networks are untrained, so that no angle will do and all of them are tried.
    """

    def seconds(*command: str) -> float:
        silent = subprocess.DEVNULL
        return clock.once(
            lambda: subprocess.run([sys.executable, *command], check=True, stdout=silent, stderr=silent)
        )

    with tempfile.TemporaryDirectory() as folder:
        source, model, out = (
            Path(folder) / name for name in ("heart.nii.gz", "model.safetensors", "out.nii.gz")
        )
        options = ["--model", str(model), "-o", str(out), "--overwrite", "--device", clock.device.type]
        heart = make_heart(0, shape=(10, 256, 216))
        nib.save(nib.Nifti1Image(heart.image.T.astype(np.int16), np.diag([1.5, 1.5, 8.0, 1.0])), source)
        importing = min(
            seconds("-c", "import kaf_model.cli, kaf_model.segment_files, kaf_model.checkpoint")
            for _ in range(3)
        )
        classes = tuple(ClassLabel(value, f"class {value}") for value in range(4))
        whole = {}
        for name, kind in networks("small").items():
            config = kind.override(num_classes=4)
            Model(build_network(config).eval(), config, SliceConfig(), KeypointConfig(), classes).save(model)
            for orientation, told in (("fixed", "as it lies"), ("best", "all angles tried")):
                command = ("-m", "kaf_model", "segment", str(source), *options, "--orientation", orientation)
                whole[f"{name}, {told}"] = min(seconds(*command) for _ in range(3))
    return [
        Row("`import kaf_model`, python included", min(seconds("-c", "import kaf_model") for _ in range(2))),
        Row("start-up: everything that `kaf segment` imports", importing),
        *(
            Row(f"216 x 256 x 10 from file to file, {name}, after start-up", max(took - importing, 0.0))
            for name, took in whole.items()
        ),
    ]


STAGES: dict[str, Callable[[Clock, Shape], Iterable[Row]] | None] = {
    "data": data_rows,
    "pretraining": pretraining_rows,
    "finetuning": finetuning_rows,
    "training": training_rows,
    "inference": inference_rows,
    "files": None,
}


def print_rows(rows: Iterable[Row], clock: Clock) -> None:
    """Print a table in Markdown."""
    print("| stage | ours | plain path | ratio | GFLOP | share of peak | peak memory, ours / plain |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        plain = f"{_time(row.plain)} | {row.plain / row.ours:.1f}" if row.plain is not None else " | "
        counted = f"{sum(row.flops) / 1e9:.1f} | {clock.share(row):.0%}" if any(row.flops) else " | "
        memory = " / ".join("-" if part is None else f"{part / 2**20:.0f}" for part in row.memory or ())
        memory += " MiB" if memory else ""
        print(f"| {row.stage} | {_time(row.ours)} | {plain} | {counted} | {memory} |", flush=True)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="a,b,c", help="which of a, b, c, d; an empty word for none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--stages",
        default=",".join(STAGES),
        help="default: data,pretraining,finetuning,training,inference,files",
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="one thread, and its processor time instead of the clock's: for a CPU that others use as well",
    )
    options = parser.parse_args()
    device = choose_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    if options.processor_time:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    clock = Clock(device, options.repeats, processor_time if options.processor_time else time.perf_counter)
    convolution, product = (peak / 1e9 for peak in clock.peaks)
    kind = "bfloat16" if has_bfloat16(device) else "float32"
    print(f"device {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {kind}")
    print(f"measured peak: {convolution:.0f} GFLOP/s in convolutions, {product:.0f} in matrix products")
    chosen = [STAGES[stage] for stage in options.stages.split(",")]
    for name in filter(None, options.shapes.split(",")):
        shape = SHAPES[name]
        print(f"\n({name}) {shape}\n")
        print_rows(chain.from_iterable(rows(clock, shape) for rows in chosen if rows), clock)
    if "files" in options.stages.split(","):
        print("\nprocesses of their own\n")
        print_rows(file_rows(clock), clock)


if __name__ == "__main__":
    main()
