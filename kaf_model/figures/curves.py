"""Loss and Dice curves of trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from kaf_model.curve import HELD_OUT
from kaf_model.figures.style import SMALL, TEXT, line_looks

_NAMES = {"total": "total loss", "pcl": "$L_{PCL}$", "global": "$L_{global}$", "local": "$L_{local}$"}

Columns = Mapping[str, Sequence[float | None]]


def curves_figure(runs: Mapping[str, Columns], *, title: str = "") -> Figure:
    """Draw what trainings measured against the step, a panel for each quantity and a line for each training.

    Losses are drawn as they are, pale, and as a running mean over a twentieth of the training. Dice on
    held-out slices, where there is any, comes last.

    Args:
        runs: Columns as from `curve.thinned`, by what to call the training.
        title: Heading of the figure.
    """
    found = list(dict.fromkeys(name for run in runs.values() for name in run if name != "step"))
    quantities = [name for name in found if name != HELD_OUT] + [name for name in found if name == HELD_OUT]
    columns = 2 if len(quantities) == 4 else min(len(quantities), 3)
    rows = -(-len(quantities) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.2 * rows + 0.5), layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, quantity in zip(panels, quantities, strict=False):
        for (name, run), look in zip(runs.items(), line_looks(len(runs)), strict=True):
            if quantity not in run:
                continue
            step, values = _points(run, quantity)
            if quantity == HELD_OUT:
                panel.plot(step, values, **look, marker="o", ms=3, lw=1.4, label=name)
                continue
            panel.plot(step, values, color=look["color"], lw=0.6, alpha=0.3)
            panel.plot(step, running_mean(values, max(1, len(values) // 20)), **look, lw=1.4, label=name)
        panel.set_title("Dice on held-out slices" if quantity == HELD_OUT else _NAMES.get(quantity, quantity))
        panel.title.set_fontsize(TEXT)
        panel.set_xlabel("step", fontsize=SMALL)
        panel.tick_params(labelsize=SMALL)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.02)
    for panel in panels[len(quantities) :]:
        panel.set_visible(False)
    _legend(figure, runs)
    if title:
        figure.suptitle(title, fontsize=TEXT + 1)
    return figure


def running_mean(values: NDArray[np.floating], width: int) -> NDArray[np.float64]:
    """Mean over the last `width` values at every place, over fewer at the start. Shape: (n,) -> (n,)."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    mean: NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
    return mean


def _points(run: Columns, quantity: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    pairs: list[Any] = [
        (step, value) for step, value in zip(run["step"], run[quantity], strict=True) if value is not None
    ]
    points = np.array(pairs, np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _legend(figure: Figure, runs: Mapping[str, Columns]) -> None:
    lines = [Line2D([], [], **look, lw=1.6) for look in line_looks(len(runs))]
    figure.legend(
        lines, list(runs), loc="outside lower center", ncols=min(len(runs), 3), frameon=False, fontsize=SMALL
    )
