"""Keypoints of slices before and after augmentation (paper, Fig. 6 and 7, columns a and c)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection, LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kaf_model.figures.style import BRIGHT, SMALL, TEXT, bare, new_figure
from kaf_model.geometry import to_xy
from kaf_model.keypoints import Keypoints


@dataclass(frozen=True, eq=False)
class KeypointRow:
    """One slice, and the same slice augmented.

    Attributes:
        name: What to call the slice.
        image: (H, W) intensities.
        keypoints: Found on it.
        augmented: (H', W') intensities.
        kept: Which keypoints are still on the augmented slice, (n,) indices.
        carried: Where those went, (n, 2) pixels (y, x).
    """

    name: str
    image: NDArray[np.floating]
    keypoints: Keypoints
    augmented: NDArray[np.floating]
    kept: NDArray[np.integer]
    carried: NDArray[np.floating]


def keypoint_figure(rows: Sequence[KeypointRow], *, orientation: bool = False, title: str = "") -> Figure:
    """Draw slices, their keypoints, and the keypoints that augmentation carried along.

    A row for each slice. Circles are as wide as the neighbourhood that a descriptor sees; colour is the
    detector's response.

    Args:
        rows: The slices.
        orientation: Also draw the orientation of each keypoint, as a line from its centre.
        title: Heading of the figure.
    """
    figure = new_figure(len(rows), 3, rows[0].image.shape, extra=0.9)
    panels = figure.subplots(len(rows), 3, squeeze=False)
    responses = np.concatenate([row.keypoints.responses for row in rows])
    limits = np.percentile(responses, (2, 98)) if len(responses) else (0.0, 1.0)
    norm = Normalize(limits[0], max(limits[1], limits[0] + 1e-9))
    shown: Any = None
    for row, (plain, found, moved) in zip(rows, panels, strict=True):
        bare(plain, row.image)
        plain.set_ylabel(row.name, fontsize=TEXT)
        bare(found, row.image)
        shown = draw_keypoints(found, row.keypoints, norm, orientation=orientation)
        found.set_xlabel(f"{len(row.keypoints)} keypoints", fontsize=SMALL)
        bare(moved, row.augmented)
        points = to_xy(row.carried)
        values = row.keypoints.responses[row.kept]
        moved.scatter(points[:, 0], points[:, 1], s=7, c=values, cmap=BRIGHT, norm=norm, linewidths=0)
        moved.set_xlabel(f"{len(row.kept)} still there", fontsize=SMALL)
    headings = ("slice", "keypoints", "augmented")
    for panel, heading in zip(panels[0], headings, strict=True):
        panel.set_title(heading, fontsize=TEXT)
    bar = figure.colorbar(shown, ax=panels, shrink=0.6, aspect=30, pad=0.02)
    bar.set_label("response", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    if title:
        figure.suptitle(title, fontsize=TEXT + 1)
    return figure


def draw_keypoints(
    panel: Axes, keypoints: Keypoints, norm: Normalize, *, orientation: bool
) -> EllipseCollection:
    """Draw keypoints as circles of their scale, coloured by response."""
    centres = to_xy(keypoints.positions)
    circles = EllipseCollection(
        keypoints.scales,
        keypoints.scales,
        np.zeros(len(keypoints)),
        units="xy",
        offsets=centres,
        offset_transform=panel.transData,
        facecolors="none",
        cmap=BRIGHT,
        norm=norm,
        linewidths=0.8,
    )
    circles.set_array(keypoints.responses)
    circles.set_facecolor("none")
    panel.add_collection(circles)
    if orientation:
        angles = np.deg2rad(keypoints.angles)
        radii = keypoints.scales[:, None] / 2
        ends = centres + radii * np.column_stack([np.cos(angles), np.sin(angles)])
        lines = LineCollection(
            list(np.stack([centres, ends], axis=1)), cmap=BRIGHT, norm=norm, linewidths=0.8
        )
        lines.set_array(keypoints.responses)
        panel.add_collection(lines)
    return circles
