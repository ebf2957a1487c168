"""Where and how training runs: device, precision, seeds, and the loop that both trainings share.

The loop is written on Lightning Fabric, so the same code runs on a CPU, on one GPU, and under
`torchrun` on many. All randomness of a step comes from (seed, step): a resumed training draws what an
uninterrupted one would have drawn, and each of several processes draws its share of the joint batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from kaf_model.checkpoint import load_header, load_tensors, save_tensors
from kaf_model.checkpointing import checkpoint_activations
from kaf_model.config import TrainingConfig
from kaf_model.errors import UserError
from kaf_model.progress import Progress
from kaf_model.replay import GradientReplay
from kaf_model.threads import ThreadChoice, may_choose_threads

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
DEVICES: tuple[DeviceName, ...] = ("auto", "cpu", "cuda", "mps")
_TIME_TO_FORGET = 0.5  # seconds


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite; names the term and the step."""


class OutOfMemory(UserError):
    """Not even one slice at a time fits the device, or one of several processes ran out."""


def choose_device(name: str = "auto") -> torch.device:
    """Return the device a name stands for; "auto" takes a GPU if there is one.

    Raises:
        UserError: If the device does not exist here.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, there in available.items() if there))
    if name not in available:
        raise UserError(f"unknown device {name!r}; choose one of {', '.join(DEVICES)}")
    if not available[name]:
        there = ", ".join(device for device, is_there in available.items() if is_there)
        raise UserError(f"no {name} device here; this machine has: {there}")
    return torch.device(name)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def make_fabric(device: str = "auto", *, precision: Literal["auto", "float32"] = "auto") -> Fabric:
    """Set up Lightning Fabric: one device, or the share of this process under `torchrun`.

    Args:
        device: A name of `DEVICES`.
        precision: "auto" takes mixed bfloat16 where the device is fast at it; "float32" never does.
    """
    chosen = choose_device(device)
    mixed = precision == "auto" and has_bfloat16(chosen)
    processes = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if processes > 1 else 1
    with _quiet("lightning_fabric"):
        fabric = Fabric(
            accelerator=chosen.type,
            devices=local,
            num_nodes=processes // local,
            strategy="ddp" if processes > 1 else "auto",
            precision="bf16-mixed" if mixed else "32-true",
        )
        fabric.launch()
    return fabric


def leave_processes() -> None:
    """Part from the processes that a training was shared with, if there are any; to be called at its end.

    When torch's group is deleted it waits for its threads, and where its wrapper of the network (DDP) holds it
    last, it does so without letting go of Python's lock. A thread that still needs the lock, to forget its last
    work, then waits for ever: so wrappers that nobody uses go first, and threads get time.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        time.sleep(_TIME_TO_FORGET)
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Let a library's logger say only warnings, for as long as the block runs."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def autocast(device: torch.device) -> torch.autocast:
    """Mixed precision for inference on a device; does nothing where bfloat16 is not fast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device))


def generator_for(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on all of the numbers, e.g. (seed, step, purpose)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
        mixed ^= mixed >> 29
    return torch.Generator().manual_seed(mixed)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    words = ("can't allocate memory", "backend out of memory")  # torch's, on the CPU and on Apple's GPU
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def make_optimizer(config: TrainingConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build the optimiser; each group's "rate" is its learning rate as a part of the configured one."""
    scaled = [
        {"params": group["params"], "lr": config.learning_rate * group["rate"], "rate": group["rate"]}
        for group in groups
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(scaled, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(scaled, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def learning_rate_factor(config: TrainingConfig, fraction: float) -> float:
    """Linear warm-up, then a cosine from 1 to the floor, at a fraction 0..1 of the training."""
    if fraction < config.warmup:
        return max(fraction / config.warmup, 0.01)
    along = min((fraction - config.warmup) / (1 - config.warmup), 1.0)
    floor = config.learning_rate_floor
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * along))


@dataclasses.dataclass
class TrainingState:
    """How far a training has come."""

    step: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    """Seconds of these in which the network waited for its batch."""
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    curve: list[dict[str, float]] = dataclasses.field(default_factory=list)


class Trainer:
    """Steps an optimiser over a module that maps a batch to named losses, one of them "total".

    With a time budget, which makes results depend on the machine anyway, a CPU finds out with how many threads steps
    are quickest (`threads`).

    Args:
        module: Maps a batch to {"total": scalar, ...}. If its attribute `same_operations` is true, what it computes
            depends on nothing but the shape of a batch, and GPUs replay it.
        config: Budgets, optimiser, schedule.
        fabric: Where it runs.
        groups: Parameter groups with a "rate" each.
        slices_per_epoch: Training slices, to turn epochs into steps.
        least_part: Items of a batch that have to be seen together: where memory runs out, it is cut into parts of no
            fewer.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainingConfig,
        *,
        fabric: Fabric,
        groups: list[dict[str, Any]],
        slices_per_epoch: int,
        least_part: int = 1,
    ) -> None:
        self.config = config
        self.least_part = least_part
        self.fabric = fabric
        self.state = TrainingState()
        self.micro_batches = 1
        self.raw_module = module
        module.train()
        channels_last(module)
        if config.recompute and not checkpoint_activations(module):
            raise UserError(
                "recompute=true does nothing in this network, which has no block that it is made for"
            )
        self.module, self.optimizer = fabric.setup(module, make_optimizer(config, groups))
        alone = fabric.device.type == "cuda" and fabric.world_size == 1 and not config.recompute
        self._replay = None
        if alone and getattr(module, "same_operations", False):
            self._replay = GradientReplay(module, fabric.autocast)
        self._threads = None
        if config.time_budget and fabric.world_size == 1 and may_choose_threads(fabric.device):
            self._threads = ThreadChoice(torch.get_num_threads())
        budgets = [config.steps]
        if config.epochs is not None:
            budgets.append(math.ceil(config.epochs * slices_per_epoch / config.batch_size))
        self.max_steps = min((budget for budget in budgets if budget is not None), default=None)

    @property
    def fraction(self) -> float:
        """Part 0..1 of the budget that is spent: of the steps or of the seconds, whichever is further."""
        by_steps = self.state.step / self.max_steps if self.max_steps else 0.0
        by_time = self.state.seconds / self.config.time_budget if self.config.time_budget else 0.0
        return min(max(by_steps, by_time), 1.0)

    @property
    def expected_steps(self) -> float:
        """About how many steps the whole training will have; infinite before the first."""
        return self.state.step / self.fraction if self.fraction else math.inf

    @property
    def waiting_share(self) -> float:
        """Part 0..1 of the time that went into making batches while the network waited."""
        return self.state.waiting / self.state.seconds if self.state.seconds else 0.0

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.fraction >= 1.0

    def run(self, batch_at: Callable[[int, int], list[Any]], *, stage: str) -> Iterator[Progress]:
        """Train until the budget is spent; yields after each step.

        Args:
            batch_at: Makes the batch of a step, as a list of that many micro-batches.
            stage: Name of this training in the progress reports.

        Raises:
            NonFiniteLoss: If a loss is NaN or infinite; the weights are those before that step.
            OutOfMemory: If one slice at a time does not fit, or the share of one of several processes.
        """
        with self._threads.used() if self._threads else contextlib.nullcontext():
            yield from self._run(batch_at, stage)

    def _run(self, batch_at: Callable[[int, int], list[Any]], stage: str) -> Iterator[Progress]:
        statistics = [buffer for buffer in self.raw_module.buffers() if buffer.is_floating_point()]
        before = [buffer.clone() for buffer in statistics]
        while not self.finished:
            started = time.monotonic()
            if statistics:
                torch._foreach_copy_(before, statistics)
            try:
                with self._threads.step() if self._threads else contextlib.nullcontext():
                    message = self._step(batch_at)
            except BaseException:
                if statistics:
                    torch._foreach_copy_(statistics, before)  # the forward pass has spoilt them
                raise
            self.state.step += 1
            self.spend(time.monotonic() - started)
            self.state.curve.append({"step": self.state.step, **self.state.losses})
            yield self.progress(stage, message)

    def spend(self, seconds: float) -> None:
        """Count work between steps towards the time budget."""
        self.state.seconds += self._shared(seconds)

    def progress(self, stage: str, message: str = "") -> Progress:
        """Where the training is."""
        eta = self.state.seconds * (1 / self.fraction - 1) if self.fraction else None
        total = self.max_steps
        if self.config.time_budget and self.fraction:
            total = max(self.state.step, round(self.expected_steps))
        return Progress(stage, self.state.step, total, dict(self.state.losses), eta, message)

    def _shared(self, seconds: float) -> float:
        """The first process's clock, so that all learn at one rate and end at one step."""
        return seconds if self.fabric.world_size == 1 else float(self.fabric.broadcast(seconds))

    def _step(self, batch_at: Callable[[int, int], list[Any]]) -> str:
        factor = learning_rate_factor(self.config, self.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * group["rate"] * factor
        message = ""
        while True:
            try:
                started = time.monotonic()
                batches = batch_at(self.state.step, self.micro_batches)
                self.state.waiting += time.monotonic() - started
                losses = self._gradients(batches)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                message = self._split_batch(error)
        self._clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.losses = losses
        return message

    def _gradients(self, batches: list[Any]) -> dict[str, float]:
        seen: list[dict[str, Tensor]] = []
        losses: Mapping[str, Tensor] | None
        for index, batch in enumerate(batches):
            losses = self._replayed(batch) if len(batches) == 1 else None
            if losses is None:
                last = index == len(batches) - 1
                with self.fabric.no_backward_sync(self.module, enabled=not last):
                    losses = self.module(batch)
                    self.fabric.backward(losses["total"] / len(batches))
            seen.append({name: loss.detach() for name, loss in losses.items()})
        names = sorted(seen[0], key="total".__eq__)  # its terms first: they are to be named
        # They are read once all is under way: reading waits for the device.
        values = torch.stack([torch.stack([losses[name].float() for name in names]) for losses in seen]).mean(
            0
        )
        means = dict(zip(names, values.tolist(), strict=True))
        for name, value in means.items():
            if not math.isfinite(value):
                self.optimizer.zero_grad(set_to_none=True)
                raise NonFiniteLoss(
                    f"the {name} loss is {value} at step {self.state.step + 1}; training stopped with "
                    "the weights before it. Try a lower learning rate, or precision float32"
                )
        return {"total": means.pop("total"), **means}

    def _replayed(self, batch: Any) -> Mapping[str, Tensor] | None:
        """The losses of a batch and their gradients by a recording, if there is one or can be."""
        if self._replay is None:
            return None
        try:
            return self._replay(batch)
        except RuntimeError as error:
            if is_out_of_memory(error):
                self._replay = None
                raise
            self._replay = None  # what cannot be recorded is computed as ever
            return None

    def _clip_gradients(self) -> None:
        parameters = list(self.raw_module.parameters())
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        length, most = float(norm), self.config.gradient_clip
        if not math.isfinite(length):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLoss(
                f"the gradient is not finite at step {self.state.step + 1}, though the losses are; training stopped "
                "with the weights before it. Try a lower learning rate, or precision float32"
            )
        if most is not None and length > most:  # otherwise all would be multiplied by one
            clip_grads_with_norm_(parameters, most, norm)

    def _split_batch(self, error: RuntimeError) -> str:
        self.optimizer.zero_grad(set_to_none=True)
        if self.fabric.world_size > 1:  # the others, which did not run out, would wait for its gradients
            raise OutOfMemory(
                f"memory ran out on one of {self.fabric.world_size} processes, which cannot go on in smaller "
                "parts; use a smaller batch_size, a smaller preset, or smaller crops"
            ) from error
        most = max(self.config.batch_size // self.least_part, 1)
        if self.micro_batches >= most and self.least_part > 1:
            raise OutOfMemory(
                f"{self.config.batch_size // self.micro_batches} pairs at a time do not fit the memory of the device, "
                f"and of fewer than {self.least_part} the contrastive losses learn too little; use recompute=true, a "
                "smaller preset, smaller crops, or the device cpu"
            ) from error
        if self.micro_batches >= most:
            raise OutOfMemory(
                "a single slice does not fit the memory of the device; use the device cpu, a smaller preset, "
                "or smaller crops"
            ) from error
        self.micro_batches = min(2 * self.micro_batches, most)
        release_memory()
        return f"memory ran out: each step now runs in {self.micro_batches} parts"

    def save(
        self, path: Path, fingerprint: Mapping[str, Any], extra: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write what `restore` needs to go on to the same result."""
        if not self.fabric.is_global_zero:
            return
        names = [name for name, _ in self.raw_module.named_parameters()]
        by_parameter = {id(parameter): name for name, parameter in self.raw_module.named_parameters()}
        tensors = {f"module.{name}": value for name, value in self.raw_module.state_dict().items()}
        for parameter, values in self.optimizer.optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{by_parameter[id(parameter)]}.{key}"] = value
        tensors |= {f"extra.{name}": value for name, value in (extra or {}).items()}
        header = {
            "resume": dataclasses.asdict(self.state),
            "fingerprint": dict(fingerprint),
            "micro_batches": self.micro_batches,
            "parameters": len(names),
        }
        save_tensors(path, {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, header)

    def restore(self, path: Path, fingerprint: Mapping[str, Any]) -> dict[str, Tensor]:
        """Go back to what `save` wrote; returns its extra tensors.

        Raises:
            UserError: If it was written with other settings or data.
        """
        header = load_header(path)
        if "resume" not in header:
            raise UserError(f"{path} holds no interrupted training")
        was = header["fingerprint"]
        changed = sorted(key for key in {*was, *fingerprint} if was.get(key) != fingerprint.get(key))
        if changed:
            details = "; ".join(
                f"{key} was {was.get(key)!r}, now {fingerprint.get(key)!r}" for key in changed[:3]
            )
            raise UserError(
                f"cannot resume {path}: {details}. Use the same settings, or train anew into another output"
            )
        tensors = load_tensors(path)
        self.raw_module.load_state_dict(_with_prefix(tensors, "module."))
        moments = _with_prefix(tensors, "optimizer.")
        for name, parameter in self.raw_module.named_parameters():
            own = {
                key[len(name) + 1 :]: value
                for key, value in moments.items()
                if key.rpartition(".")[0] == name
            }
            if own:
                self.optimizer.optimizer.state[parameter] = {
                    key: _laid_out_like(value, parameter) for key, value in own.items()
                }
        self.state = TrainingState(**header["resume"])
        self.micro_batches = header["micro_batches"]
        return _with_prefix(tensors, "extra.")


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _laid_out_like(moment: Tensor, parameter: Tensor) -> Tensor:
    """A moment with the memory layout of its parameter, which fused optimisers take for granted."""
    if moment.shape != parameter.shape:
        return moment.to(parameter.device)
    return torch.empty_like(parameter, dtype=moment.dtype, requires_grad=False).copy_(moment)


def channels_last(module: nn.Module) -> None:
    """Lay out convolution weights channels last, which CPUs and GPUs convolve fastest in mixed precision."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def release_memory() -> None:
    """Give cached GPU memory back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
