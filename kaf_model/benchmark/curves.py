"""Learning curves: Dice over how much is labelled."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from kaf_model.benchmark.results import Results
from kaf_model.figures.style import LINE_STYLES

# Okabe and Ito's colours without the yellow, which white paper swallows.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8C8C8C")
_MARKERS = "osD^vP*X"
_TITLES = {"patients": "M, labelled patients", "slices": "k, labelled slices of one volume"}


def learning_curves(results: Results) -> Figure:
    """Draw a panel each for patients and slices: mean Dice of every row, bars of one standard deviation.

    Args:
        results: The cells of a table.
    """
    kinds = list(dict.fromkeys(column.kind for column in results.columns))
    figure = Figure(figsize=(5.2 * len(kinds) + 2.2, 4.2), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        _draw(panel, results, kind)
    panels[0].set_ylabel("Dice")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(results.plan.name, fontsize=11)
    return figure


def _draw(panel: Axes, results: Results, kind: str) -> None:
    counts = [column.count for column in results.columns if column.kind == kind]
    for number, row in enumerate(results.rows):
        cells = [
            cell for (name, column), cell in results.cells.items() if name == row and column.kind == kind
        ]
        spread = 1 + 0.015 * (number - (len(results.rows) - 1) / 2)  # so that bars do not hide each other
        panel.errorbar(
            [cell.column.count * spread for cell in cells],
            [cell.dice.mean for cell in cells],
            yerr=[0.0 if math.isnan(cell.dice.std) else cell.dice.std for cell in cells],
            label=row,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            linestyle=LINE_STYLES[number // len(_COLOURS) % len(LINE_STYLES)],
            linewidth=1.6,
            elinewidth=0.9,
            capsize=2,
        )
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(counts))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.set_xlabel(_TITLES[kind])
    panel.grid(axis="y", color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
