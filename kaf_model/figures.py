"""Figures of results. Each function returns a matplotlib Figure, drawn without a window or global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

# Okabe and Ito's colours, which people with any colour vision can tell apart.
CLASS_COLOURS = ("#56B4E9", "#E69F00", "#F0599D", "#009E73", "#F0E442", "#D55E00", "#0072B2")
_PANEL = 2.3  # inches


def segmentation_contours(
    images: NDArray[Any],
    reference: NDArray[np.integer],
    predictions: Mapping[str, NDArray[np.integer]],
    *,
    classes: Mapping[int, str],
    spacing: Sequence[float] = (1.0, 1.0),
    slice_names: Sequence[str] = (),
    title: str = "",
    margin: float = 12.0,
) -> Figure:
    """Draw slices with the outlines of what was predicted and of what is true.

    A row for each prediction, a column for each slice, cut to where anything is labelled.

    Args:
        images: (n, H, W) intensities.
        reference: (n, H, W) true label values.
        predictions: (n, H, W) predicted label values, by what to call them.
        classes: Names of the label values to outline.
        spacing: Pixel size in mm (y, x).
        slice_names: Heading of each column.
        title: Heading of the figure.
        margin: Millimetres left around what is labelled.
    """
    shapes = {name: labels.shape for name, labels in {"reference": reference, **predictions}.items()}
    if any(shape != images.shape for shape in shapes.values()) or images.ndim != 3 or not predictions:
        raise ValueError(f"images (n, H, W) {images.shape} and labels must have one shape, got {shapes}")
    rows, columns = _window(images.shape[1:], [reference, *predictions.values()], spacing, margin)
    down, across = (
        (span.stop - span.start) * step for span, step in zip((rows, columns), spacing, strict=True)
    )
    grey = (*np.percentile(images[:, rows, columns], (1, 99.5)),)
    size = (_PANEL * len(images), _PANEL * down / across * len(predictions) + 0.9)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(len(predictions), len(images), squeeze=False)
    extent = (0, across, down, 0)
    for row, (name, labels) in enumerate(predictions.items()):
        for column, panel in enumerate(axes[row]):
            panel.imshow(
                images[column, rows, columns],
                cmap="gray",
                vmin=grey[0],
                vmax=max(grey[1], grey[0] + 1e-6),
                extent=extent,
                interpolation="bilinear",
            )
            for value, colour in zip(classes, _colours(len(classes)), strict=True):
                _outline(panel, labels[column, rows, columns] == value, spacing, colour, 1.8, "solid")
            for value in classes:
                _outline(panel, reference[column, rows, columns] == value, spacing, "white", 0.9, "dashed")
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_frame_on(False)
            if row == 0 and column < len(slice_names):
                panel.set_title(slice_names[column], fontsize=9)
        axes[row, 0].set_ylabel(name, fontsize=10)
    lines = [Line2D([], [], color=colour, lw=1.8) for colour in _colours(len(classes))]
    truth = Line2D([], [], color="0.4", lw=1.2, ls="dashed")
    figure.legend(
        [*lines, truth],
        [*classes.values(), "truth (dashed white)"],
        loc="outside lower center",
        ncols=len(classes) + 1,
        frameon=False,
        fontsize=9,
    )
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _colours(count: int) -> list[str]:
    return [CLASS_COLOURS[index % len(CLASS_COLOURS)] for index in range(count)]


def _window(
    shape: Sequence[int], labels: Sequence[NDArray[np.integer]], spacing: Sequence[float], margin: float
) -> tuple[slice, slice]:
    """Return the rows and columns that hold everything labelled in any slice, and a margin."""
    painted = np.zeros(tuple(shape), bool)
    for one in labels:
        painted |= (one != 0).any(axis=0)
    spans = []
    for axis in (0, 1):
        where = np.flatnonzero(painted.any(axis=1 - axis))
        if not len(where):
            spans.append(slice(0, shape[axis]))
            continue
        room = round(margin / spacing[axis])
        spans.append(slice(max(0, int(where[0]) - room), min(shape[axis], int(where[-1]) + 1 + room)))
    return spans[0], spans[1]


def _outline(
    panel: Axes, mask: NDArray[np.bool_], spacing: Sequence[float], colour: str, width: float, style: str
) -> None:
    if not mask.any():
        return
    framed = np.pad(mask, 1).astype(float)  # an outline closes along the border of the picture too
    y = (np.arange(framed.shape[0]) - 0.5) * spacing[0]
    x = (np.arange(framed.shape[1]) - 0.5) * spacing[1]
    panel.contour(x, y, framed, levels=[0.5], colors=[colour], linewidths=width, linestyles=style)
