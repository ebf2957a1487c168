"""Self-similarity of a point under two augmentations (paper, Fig. 3) and on neighbouring slices (Fig. 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from kaf_model.explore.equivariance import EquivarianceError, EquivarianceMaps
from kaf_model.figures.style import QUERY, SEQUENTIAL, SMALL, TEXT, bare

_SIDE = 1.35  # inches of a panel


@dataclass(frozen=True, eq=False)
class AugmentedImage:
    """An augmented slice as it is drawn.

    Attributes:
        image: (H, W) intensities.
        inside: Which pixels show the slice, (H, W) bool.
    """

    image: NDArray[np.floating]
    inside: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class SimilarityRow:
    """What one network makes of the point.

    Attributes:
        name: What to call the network.
        maps: For each level the maps on the first and the second augmentation.
        errors: For each level the equivariance error over random points.
    """

    name: str
    maps: Mapping[int, tuple[EquivarianceMaps, EquivarianceMaps]]
    errors: Mapping[int, EquivarianceError]


@dataclass(frozen=True, eq=False)
class NeighbourRow:
    """What one network makes of the point on several slices.

    Attributes:
        name: What to call the network.
        maps: For each level one map a slice, (H, W) cosine similarity.
    """

    name: str
    maps: Mapping[int, Sequence[NDArray[np.floating]]]


def similarity_figure(
    slice_image: NDArray[np.floating],
    point: Sequence[float],
    views: tuple[AugmentedImage, AugmentedImage],
    rows: Sequence[SimilarityRow],
    *,
    title: str = "",
) -> Figure:
    """Draw self-similarity under two augmentations and carried over by the second, as in Fig. 3.

    The first row shows the slice and its augmentations with the point as a star. Below, a row for each network
    and three panels for each level: the maps on both augmentations, and the map of the slice itself carried
    over by the second. Under the third stands the mean equivariance error over random points, and in
    brackets the same as a part of chance.

    Args:
        slice_image: (H, W) intensities.
        point: The point on it, pixel (y, x).
        views: Both augmentations.
        rows: The networks.
        title: Heading of the figure.
    """
    levels = list(rows[0].maps)
    figure, panels = _grid(len(rows) + 1, 3 * len(levels), slice_image.shape)
    first = rows[0].maps[levels[0]]
    for start in range(0, 3 * len(levels), 3):
        for panel, view, first_maps, name in zip(
            panels[0, start : start + 2], views, first, ("$T_1(x)$", "$T_2(x)$"), strict=True
        ):
            bare(panel, np.ma.masked_where(~view.inside, view.image))
            _star(panel, first_maps.point)
            panel.set_title(name, fontsize=TEXT)
        bare(panels[0, start + 2], slice_image)
        _star(panels[0, start + 2], point)
        panels[0, start + 2].set_title("$x$", fontsize=TEXT)
    for row, line in zip(rows, panels[1:], strict=True):
        line[0].set_ylabel(row.name, fontsize=TEXT)
        for number, level in enumerate(levels):
            own = line[3 * number : 3 * number + 3]
            one, two = row.maps[level]
            insides = (views[0].inside, views[1].inside, views[1].inside)
            maps = [
                np.ma.masked_where(~inside, values)
                for inside, values in zip(insides, (one.computed, two.computed, two.carried), strict=True)
            ]
            _draw_maps(figure, own, maps, (one.point, two.point, two.point))
            error = row.errors[level]
            own[2].set_xlabel(f"error {error.error:.3f}\n({error.relative:.2f} of chance)", fontsize=SMALL)
    labels = ("S(T_1(x))", "S(T_2(x))", "T_2(S(x))")
    for number, level in enumerate(levels):
        for offset, label in enumerate(labels):
            panel = panels[1, 3 * number + offset]
            panel.set_title(f"level {level}\n${label}$" if offset == 1 else f"${label}$", fontsize=TEXT)
    if title:
        figure.suptitle(title, fontsize=TEXT + 1)
    return figure


def neighbour_similarity_figure(
    images: Sequence[NDArray[np.floating]],
    names: Sequence[str],
    point: Sequence[float],
    rows: Sequence[NeighbourRow],
    *,
    title: str = "",
) -> Figure:
    """Draw the self-similarity of a point of the first slice on that slice and on others, as in Fig. 8.

    Args:
        images: (H, W) intensities of each slice.
        names: What to call the slices.
        point: The point on the first slice, pixel (y, x).
        rows: The networks.
        title: Heading of the figure.
    """
    levels, count = list(rows[0].maps), len(images)
    figure, panels = _grid(len(rows) + 1, count * len(levels), images[0].shape)
    for number, panel in enumerate(panels[0]):
        bare(panel, images[number % count])
        panel.set_title(names[number % count], fontsize=TEXT)
        if number % count == 0:
            _star(panel, point)
    for row, line in zip(rows, panels[1:], strict=True):
        line[0].set_ylabel(row.name, fontsize=TEXT)
        for number, level in enumerate(levels):
            own = line[count * number : count * (number + 1)]
            _draw_maps(figure, own, list(row.maps[level]), [point, *[None] * (count - 1)])
    for number, level in enumerate(levels):
        for offset in range(count):
            panels[1, count * number + offset].set_title(f"level {level}", fontsize=TEXT)
    if title:
        figure.suptitle(title, fontsize=TEXT + 1)
    return figure


def _grid(rows: int, columns: int, shape: Sequence[int]) -> tuple[Figure, NDArray[np.object_]]:
    down = _SIDE * shape[0] / shape[1] + 0.33
    figure = Figure(
        figsize=((_SIDE + 0.12) * columns + 0.3, down * rows + 0.5),
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, compress=True),
        facecolor="white",
    )
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw_maps(
    figure: Figure,
    panels: Sequence[Axes],
    maps: Sequence[NDArray[np.floating]],
    points: Sequence[Sequence[float] | None],
) -> None:
    """Draw maps on one colour scale: from the 2nd percentile of all of them to 1."""
    values = np.concatenate([np.ma.compressed(one) for one in maps])
    low = min(float(np.percentile(values, 2)), 1 - 1e-3)
    for panel, one, point in zip(panels, maps, points, strict=True):
        bare(panel)
        shown = panel.imshow(one, cmap=SEQUENTIAL, vmin=low, vmax=1, interpolation="nearest")
        if point is not None:
            _star(panel, point)
    bar = figure.colorbar(shown, ax=list(panels), shrink=0.75, aspect=18, pad=0.01, ticks=[low, 1])
    bar.ax.set_yticklabels([f"{low:.2f}", "1"])
    bar.ax.tick_params(labelsize=SMALL - 1, length=2, pad=1)


def _star(panel: Axes, point: Sequence[float]) -> None:
    panel.plot(point[1], point[0], marker="*", ms=9, mfc=QUERY, mec="black", mew=0.6)
