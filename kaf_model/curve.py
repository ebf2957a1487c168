"""The curve of a training, kept small enough for the header of its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

HELD_OUT = "held-out dice"


def thinned(curve: Sequence[Mapping[str, float]], limit: int = 400) -> dict[str, list[float | None]]:
    """A training's curve as columns of at most about `limit` steps, the last and all with a Dice among them.

    Each step that is kept stands for those since the one before: losses are their mean. Values have five
    significant digits.

    Args:
        curve: One record a step: "step", losses, and sometimes a Dice on held-out slices.
        limit: Steps to keep.

    Returns:
        Values by name; None where a step has no value of that name.
    """
    stride = max(1, math.ceil(len(curve) / limit))
    names = list(dict.fromkeys(name for record in curve for name in record))
    columns: dict[str, list[float | None]] = {name: [] for name in names}
    start = 0
    for number, record in enumerate(curve):
        if (number + 1) % stride and HELD_OUT not in record and number + 1 < len(curve):
            continue
        since = curve[start : number + 1]
        start = number + 1
        for name in names:
            present = [one[name] for one in since if name in one]
            value = record.get(name) if name in ("step", HELD_OUT) else _mean(present)
            columns[name].append(value if value is None or name == "step" else float(f"{value:.5g}"))
    return columns


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
