"""What all figures share: colours, sizes, grey values, panels without axes, and how a figure becomes a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kaf_model.errors import UserError

# Okabe and Ito's colours, which people with any colour vision can tell apart; for more classes, others between them.
CLASS_COLOURS = (
    *("#56B4E9", "#E69F00", "#F0599D", "#009E73", "#F0E442", "#D55E00", "#0072B2"),
    *("#B39DFF", "#8B5A2B", "#A6F0C6", "#7A1FA2", "#FFC9A3", "#7D8B00", "#00E5FF"),
)
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINE_STYLES = ("solid", "dashed", "dotted", "dashdot")
LEGEND_COLUMNS = 7
MATCHED, UNMATCHED_COLOUR, QUERY = "#009E73", "#D55E00", "#F0E442"
SEQUENTIAL = "viridis"
# What is drawn over grey slices must not be dark.
BRIGHT = ListedColormap(mpl.colormaps["plasma"](np.linspace(0.35, 1, 256)), name="bright")
PANEL = 2.3  # inches
TEXT, SMALL = 9, 8  # points, at the width of two columns
FORMATS = ("png", "pdf", "svg")


def colours(count: int, palette: Sequence[str] = CLASS_COLOURS) -> list[str]:
    """The first colours of a palette, from the start again when it ends."""
    return [palette[index % len(palette)] for index in range(count)]


def line_looks(count: int) -> list[dict[str, Any]]:
    """Colours of lines that are to be told apart, and, when the colours begin anew, another style."""
    styles = [LINE_STYLES[index // len(LINE_COLOURS) % len(LINE_STYLES)] for index in range(count)]
    return [
        {"color": colour, "ls": style}
        for colour, style in zip(colours(count, LINE_COLOURS), styles, strict=True)
    ]


def new_figure(rows: int, columns: int, shape: Sequence[float], *, extra: float = 0.5) -> Figure:
    """An empty white figure for a grid of panels.

    Args:
        rows: Panels down.
        columns: Panels across.
        shape: Height and width of what a panel shows; only their ratio counts.
        extra: Inches left above and below the panels.
    """
    size = (PANEL * columns, PANEL * shape[0] / shape[1] * rows + extra)
    return Figure(figsize=size, layout="compressed", facecolor="white")


def bare(panel: Axes, image: NDArray[Any] | None = None, **shown: Any) -> None:
    """Take ticks and frame from a panel, and show a grey image in it.

    Args:
        panel: The panel.
        image: (H, W) intensities, shown from their 1st to their 99.5th percentile.
        **shown: For `imshow`.
    """
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_frame_on(False)
    if image is not None:
        low, high = np.percentile(np.ma.compressed(image), (1, 99.5))
        options = {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6), "interpolation": "bilinear"}
        panel.imshow(image, **(options | shown))


def check_format(path: Path) -> None:
    """Find out before the work that a figure cannot be written.

    Raises:
        UserError: If the name does not end in a format, or its folder cannot be written.
    """
    if path.suffix.lower().lstrip(".") not in FORMATS:
        raise UserError(f"figures are named NAME.png, NAME.pdf or NAME.svg, got {path.name}")
    probe = path.with_name(f".{path.name}.probe")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}; choose another place") from error


def save_figure(figure: Figure, path: Path, *, dpi: int = 200) -> Path:
    """Write a figure as PNG, PDF or SVG, by the ending of its name; the same figure gives the same bytes.

    Raises:
        UserError: If the name does not end in a format, or it cannot be written.
    """
    check_format(path)
    undated: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None},
        "svg": {"Date": None},
    }
    kind = path.suffix.lower().lstrip(".")
    with mpl.rc_context({"svg.hashsalt": "kaf", "pdf.fonttype": 42, "svg.fonttype": "none"}):
        try:
            figure.savefig(
                path, dpi=dpi, format=kind, metadata=undated[kind], bbox_inches="tight", pad_inches=0.04
            )
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from error
    return path
