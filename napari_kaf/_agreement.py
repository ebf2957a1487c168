"""How well two label maps agree, for a comparison on screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_kaf._classes import ClassEntry


def agreement(
    labels0: NDArray[Any], labels1: NDArray[Any], classes: Sequence[ClassEntry]
) -> dict[str, float]:
    """Dice of each class that is in either map, by its name."""
    scores: dict[str, float] = {}
    for entry in classes:
        in0, in1 = labels0 == entry.value, labels1 == entry.value
        size = np.count_nonzero(in0) + np.count_nonzero(in1)
        if size:
            scores[entry.name] = float(2 * np.count_nonzero(in0 & in1) / size)
    return scores
