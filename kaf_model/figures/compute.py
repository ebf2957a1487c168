"""What networks cost against the size of the slice (paper, Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, StrMethodFormatter

from kaf_model.compute import Cost
from kaf_model.figures.style import LINE_COLOURS, SMALL, TEXT, colours

_MARKS = ("o", "s", "^", "D")
_STYLES = ("-", "--", ":", "-.")


def compute_figure(costs: Sequence[Cost], *, title: str = "") -> Figure:
    """Draw operations and peak memory against the edge of the slice, on logarithmic axes.

    A colour for each network, a line style for each number of attention blocks.

    Args:
        costs: As measured.
        title: Heading of the figure.
    """
    figure = Figure(figsize=(6.6, 3.1), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2)
    networks = list(dict.fromkeys(cost.network for cost in costs))
    counts = sorted({cost.blocks for cost in costs})
    handles = []
    for network, colour in zip(networks, colours(len(networks), LINE_COLOURS), strict=True):
        for number, blocks in enumerate(counts):
            own = sorted(
                (cost for cost in costs if (cost.network, cost.blocks) == (network, blocks)),
                key=lambda cost: cost.edge,
            )
            look: dict[str, Any] = {
                "color": colour,
                "ls": _STYLES[number % len(_STYLES)],
                "marker": _MARKS[number % len(_MARKS)],
                "ms": 4,
                "lw": 1.4,
            }
            edges = [cost.edge for cost in own]
            panels[0].plot(edges, [cost.gflops for cost in own], **look)
            panels[1].plot(edges, [cost.memory_mib for cost in own], **look)
            handles.append(Line2D([], [], label=f"{network}, {blocks} attention blocks", **look))
    edges = sorted({cost.edge for cost in costs})
    for panel, quantity in zip(panels, ("GFLOP a slice", "peak memory (MiB)"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(edges, [str(edge) for edge in edges])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.minorticks_off()
        panel.set_xlabel("edge of the slice (pixels)", fontsize=TEXT)
        panel.set_ylabel(quantity, fontsize=TEXT)
        panel.tick_params(labelsize=SMALL)
        panel.grid(True, which="major", color="0.9", lw=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=SMALL)
    if title:
        figure.suptitle(title, fontsize=TEXT + 1)
    return figure
