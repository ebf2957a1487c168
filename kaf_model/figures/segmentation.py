"""Segmentations beside the truth: as outlines, and filled with their Dice (paper, Fig. 2 and 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from kaf_model.figures.style import LEGEND_COLUMNS, PANEL, SMALL, TEXT, bare, colours


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
    _check_shapes(images, reference, predictions)
    rows, columns = _window(images.shape[1:], [reference, *predictions.values()], spacing, margin)
    down, across = (
        (span.stop - span.start) * step for span, step in zip((rows, columns), spacing, strict=True)
    )
    grey = (*np.percentile(images[:, rows, columns], (1, 99.5)),)
    size = (PANEL * len(images), PANEL * down / across * len(predictions) + 0.9)
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
            for value, colour in zip(classes, colours(len(classes)), strict=True):
                _outline(panel, labels[column, rows, columns] == value, spacing, colour, 1.8, "solid")
            for value in classes:
                _outline(panel, reference[column, rows, columns] == value, spacing, "white", 0.9, "dashed")
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_frame_on(False)
            if row == 0 and column < len(slice_names):
                panel.set_title(slice_names[column], fontsize=9)
        axes[row, 0].set_ylabel(name, fontsize=10)
    lines = [Line2D([], [], color=colour, lw=1.8) for colour in colours(len(classes))]
    truth = Line2D([], [], color="0.4", lw=1.2, ls="dashed")
    figure.legend(
        [*lines, truth],
        [*classes.values(), "truth (dashed white)"],
        loc="outside lower center",
        ncols=min(len(classes) + 1, LEGEND_COLUMNS),
        frameon=False,
        fontsize=9,
    )
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def segmentation_comparison(
    images: NDArray[Any],
    reference: NDArray[np.integer],
    predictions: Mapping[str, NDArray[np.integer]],
    *,
    classes: Mapping[int, str],
    spacing: Sequence[float] = (1.0, 1.0),
    slice_names: Sequence[str] = (),
    title: str = "",
    margin: float = 15.0,
) -> Figure:
    """Draw what several models segment beside the truth, with the Dice of the slice under each, as in Fig. 2.

    A row for each slice; a column for the slice, one for each model, and the truth last, cut to where anything
    is labelled. Dice is the mean over the classes that are in the truth or the prediction of that slice, times
    100.

    Args:
        images: (n, H, W) intensities.
        reference: (n, H, W) true label values.
        predictions: (n, H, W) predicted label values, by what to call the model.
        classes: Names of the label values to draw.
        spacing: Pixel size in mm (y, x).
        slice_names: Name of each row.
        title: Heading of the figure.
        margin: Millimetres left around what is labelled.
    """
    _check_shapes(images, reference, predictions)
    rows, columns = _window(images.shape[1:], [reference, *predictions.values()], spacing, margin)
    down, across = (
        (span.stop - span.start) * step for span, step in zip((rows, columns), spacing, strict=True)
    )
    extent = (0, across, down, 0)
    side = 1.5
    figure = Figure(
        figsize=(side * (len(predictions) + 2), (side * down / across + 0.2) * len(images) + 0.7),
        layout="compressed",
        facecolor="white",
    )
    panels = figure.subplots(len(images), len(predictions) + 2, squeeze=False)
    for number, line in enumerate(panels):
        image = images[number, rows, columns]
        for panel, labels in zip(line, [None, *predictions.values(), reference], strict=True):
            bare(panel, image, extent=extent)
            if labels is not None:
                fill_labels(panel, labels[number, rows, columns], classes, extent)
        for panel, labels in zip(line[1:], predictions.values(), strict=False):
            dice = slice_dice(labels[number], reference[number], classes)
            panel.set_xlabel("nothing to find" if np.isnan(dice) else f"{100 * dice:.1f}", fontsize=SMALL)
        if number < len(slice_names):
            line[0].set_ylabel(slice_names[number], fontsize=TEXT)
    for panel, name in zip(panels[0], ["image", *predictions, "truth"], strict=True):
        panel.set_title(name, fontsize=TEXT)
    patches = [Patch(facecolor=colour) for colour in colours(len(classes))]
    figure.legend(
        patches,
        list(classes.values()),
        loc="outside lower center",
        ncols=min(len(classes), LEGEND_COLUMNS),
        frameon=False,
        fontsize=TEXT,
    )
    if title:
        figure.suptitle(title, fontsize=TEXT + 1)
    return figure


def slice_dice(
    labels: NDArray[np.integer], reference: NDArray[np.integer], classes: Mapping[int, str]
) -> float:
    """Mean Dice over the classes in either of two label maps of a slice; nan where neither has any."""
    scores = []
    for value in classes:
        own, true = labels == value, reference == value
        if own.any() or true.any():
            scores.append(2 * np.count_nonzero(own & true) / (np.count_nonzero(own) + np.count_nonzero(true)))
    return float(np.mean(scores)) if scores else float("nan")


def fill_labels(
    panel: Axes,
    labels: NDArray[np.integer],
    classes: Mapping[int, str],
    extent: tuple[float, float, float, float],
) -> None:
    """Lay the classes over a slice in their colours, half transparent."""
    layer = np.zeros((*labels.shape, 4))
    for value, colour in zip(classes, colours(len(classes)), strict=True):
        layer[labels == value] = to_rgba(colour, 0.6)
    panel.imshow(layer, extent=extent, interpolation="nearest")


def _check_shapes(
    images: NDArray[Any], reference: NDArray[Any], predictions: Mapping[str, NDArray[Any]]
) -> None:
    shapes = {name: labels.shape for name, labels in {"reference": reference, **predictions}.items()}
    if any(shape != images.shape for shape in shapes.values()) or images.ndim != 3 or not predictions:
        raise ValueError(f"images (n, H, W) {images.shape} and labels must have one shape, got {shapes}")


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
