"""Which keypoints of two slices are taken for the same anatomy (paper, Fig. 4, and Fig. 6 and 7, b and d)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kaf_model.figures.style import BRIGHT, MATCHED, SMALL, TEXT, UNMATCHED_COLOUR, bare, new_figure
from kaf_model.geometry import to_xy

_GAP = 0.04  # of a slice's width, white between two slices


@dataclass(frozen=True, eq=False)
class PairPanel:
    """Two slices side by side with lines between their keypoints.

    Attributes:
        name: Heading.
        image0: (H, W) intensities of slice 0.
        image1: Of slice 1, of the same shape.
        points0: Keypoints of slice 0, (N, 2) pixels (y, x).
        points1: Keypoints of slice 1, (M, 2).
        pairs: Index into both, (P, 2).
        values: What colours the lines, (P,).
        quantity: What the values are, such as "descriptor distance".
    """

    name: str
    image0: NDArray[np.floating]
    image1: NDArray[np.floating]
    points0: NDArray[np.floating]
    points1: NDArray[np.floating]
    pairs: NDArray[np.integer]
    values: NDArray[np.floating]
    quantity: str

    @property
    def caption(self) -> str:
        """How many keypoints of each slice have a partner."""
        return f"{len(self.pairs)} matched, unmatched {len(self.points0) - len(self.pairs)} left and " + (
            f"{len(self.points1) - len(self.pairs)} right"
        )


def correspondence_figure(panels: Sequence[PairPanel], *, columns: int = 1, title: str = "") -> Figure:
    """Draw pairs of slices with their correspondences.

    Matched keypoints are green, unmatched ones orange; lines are coloured by descriptor distance, or by
    probability for learned matches.

    Args:
        panels: The pairs, from left to right and top to bottom.
        columns: Pairs in a row.
        title: Heading of the figure.
    """
    height, width = panels[0].image0.shape
    rows = -(-len(panels) // columns)
    figure = new_figure(rows, columns, (height, width), extra=0.0)
    scale = 3.6 if columns == 1 else 2.9
    across = scale * columns * 1.1 + 0.6
    figure.set_size_inches(across, rows * (scale * height / width / (2 + _GAP) * 1.1 + 0.55) + 0.35)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for quantity in dict.fromkeys(panel.quantity for panel in panels):
        own = [(panel, axis) for panel, axis in zip(panels, axes, strict=False) if panel.quantity == quantity]
        values = np.concatenate([panel.values for panel, _ in own])
        norm = Normalize(0.0, float(values.max(initial=0.0)) or 1.0)
        lines = [draw_pair(axis, panel, norm) for panel, axis in own]
        bar = figure.colorbar(lines[0], ax=[axis for _, axis in own], shrink=0.8, aspect=25, pad=0.01)
        bar.set_label(quantity, fontsize=SMALL)
        bar.ax.tick_params(labelsize=SMALL)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=TEXT + 1)
    return figure


def radius_figure(panels: Sequence[PairPanel], *, title: str = "") -> Figure:
    """Draw the correspondences of one pair of slices for a row of radii (paper, Fig. 4)."""
    return correspondence_figure(panels, columns=min(len(panels), 3), title=title)


def draw_pair(axis: Axes, panel: PairPanel, norm: Normalize) -> LineCollection:
    """Draw one pair of slices into a panel; returns the lines."""
    height, width = panel.image0.shape
    shift = np.array([width * (1 + _GAP), 0.0])
    stretched = [_stretched(image) for image in (panel.image0, panel.image1)]
    for image, left in zip(stretched, (0.0, shift[0]), strict=True):
        extent = (left - 0.5, left + width - 0.5, height - 0.5, -0.5)
        bare(axis)
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="bilinear")
    axis.set_xlim(-0.5, shift[0] + width - 0.5)
    axis.set_ylim(height - 0.5, -0.5)
    ends0, ends1 = to_xy(panel.points0), to_xy(panel.points1) + shift
    lines = LineCollection(
        list(np.stack([ends0[panel.pairs[:, 0]], ends1[panel.pairs[:, 1]]], axis=1)),
        cmap=_colour_map(panel.quantity),
        norm=norm,
        linewidths=0.6,
        alpha=0.85,
    )
    lines.set_array(panel.values)
    axis.add_collection(lines)
    for ends, column in ((ends0, 0), (ends1, 1)):
        matched = np.zeros(len(ends), bool)
        matched[panel.pairs[:, column]] = True
        axis.scatter(ends[~matched, 0], ends[~matched, 1], s=4, c=UNMATCHED_COLOUR, linewidths=0, zorder=3)
        axis.scatter(ends[matched, 0], ends[matched, 1], s=4, c=MATCHED, linewidths=0, zorder=4)
    axis.set_title(panel.name, fontsize=TEXT)
    axis.set_xlabel(panel.caption, fontsize=SMALL)
    return lines


def _stretched(image: NDArray[Any]) -> NDArray[np.float64]:
    low, high = np.percentile(image, (1, 99.5))
    stretched: NDArray[np.float64] = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return stretched


def _colour_map(quantity: str) -> Colormap:
    """Bright is good: a small distance, a high probability."""
    return BRIGHT.reversed() if "distance" in quantity else BRIGHT
