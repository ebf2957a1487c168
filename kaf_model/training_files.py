"""The files of a training: its checkpoint, and beside it what an interrupted training needs to go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kaf_model.engine import Trainer
from kaf_model.errors import UserError
from kaf_model.progress import Progress


class RunFiles:
    """Where a training writes.

    Args:
        output: The checkpoint, `NAME.safetensors`; None writes nothing.
    """

    def __init__(self, output: str | Path | None) -> None:
        self.output = Path(output) if output is not None else None
        self.resume = resume_path(self.output) if self.output else Path()

    def check(self, resume: bool) -> None:
        """Find out before the work, not after it, that the output cannot be written or resumed.

        Raises:
            UserError: Saying what is in the way.
        """
        if self.output is None:
            if resume:
                raise UserError("resuming needs the output file of the interrupted training")
            return
        for path in (self.output, self.resume):
            if path.is_dir():
                raise UserError(f"cannot write {path}: it is a folder; name a file, NAME.safetensors")
        if self.output.suffix != ".safetensors":
            raise UserError(f"checkpoints are named NAME.safetensors, got {self.output.name}")
        if resume and not self.resume.is_file():
            state = "is complete" if self.output.is_file() else "does not exist"
            raise UserError(f"nothing to resume: {self.output} {state}; train without --resume")
        probe = self.output.with_name(f".{self.output.name}.probe")
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)  # several processes may try at once
        except OSError as error:
            raise UserError(
                f"cannot write to {self.output.parent}: {error.strerror}; choose another place"
            ) from error

    def keep_saved(
        self, trainer: Trainer, steps: Iterator[Progress], save: Callable[[], None]
    ) -> Iterator[Progress]:
        """Pass progress on, saving every so often, and whenever it ends before the training is over.

        It ends early when the consumer closes it, when it fails, or when a key interrupts it;
        what is saved is then the state after the last complete step.
        """
        last = time.monotonic()
        exhausted = False
        try:
            for progress in steps:
                yield progress
                if time.monotonic() - last > trainer.config.checkpoint_every:
                    save()
                    last = time.monotonic()
            exhausted = True
        finally:
            if not exhausted and trainer.state.step:
                save()


def resume_path(output: Path) -> Path:
    """The file beside a checkpoint that holds the state of an interrupted training."""
    return output.with_suffix(".resume.safetensors")
