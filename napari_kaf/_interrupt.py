"""Stopping a network in the middle of a long step, between two of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any


class Interrupted(Exception):
    """The work was asked to stop; what it had before the step it was in is whole."""


@contextmanager
def interruptible(asked_to_stop: Callable[[], bool]) -> Iterator[None]:
    """Look after each layer, forwards and backwards, whether this thread's networks have to stop.

    A step of a training may take many seconds on a busy machine; a layer takes a fraction of one.

    Args:
        asked_to_stop: Asked very often.

    Raises:
        Interrupted: Out of the network that runs when it has to.
    """
    from torch import Tensor
    from torch.nn.modules.module import register_module_forward_hook

    thread = get_ident()

    def look(*_: Any) -> None:
        if asked_to_stop():
            raise Interrupted

    def after(_module: Any, _inputs: Any, output: Any) -> None:
        if get_ident() != thread:
            return  # networks of other programs in this process are left alone
        look()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(look)  # type: ignore[no-untyped-call]

    handle = register_module_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
