"""Letters on the canvas that say which way is left, right, front, back, up and down."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from napari.components import ViewerModel

_OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "S": "I", "I": "S"}
_attached: WeakSet[ViewerModel] = WeakSet()


def compass_text(labels: tuple[str, ...]) -> str:
    """Draw the letters of two axes, named by the direction they run towards: down, then to the right.

    Returns:
        Three lines, or nothing if the axes have no anatomical names.
    """
    down, right = labels
    if down not in _OPPOSITE or right not in _OPPOSITE:
        return ""
    return f"     {_OPPOSITE[down]}\n{_OPPOSITE[right]}   +   {right}\n     {down}"


def attach_compass(viewer: ViewerModel) -> None:
    """Show the letters of the displayed axes in a corner of the canvas, from now on."""
    if viewer in _attached:
        return
    _attached.add(viewer)
    overlay = viewer.canvas.overlays.text

    def update() -> None:
        dims = viewer.dims
        text = ""
        if dims.ndisplay == 2 and len(viewer.layers):
            displayed = dims.displayed[-2:]
            text = compass_text(tuple(str(dims.axis_labels[axis]) for axis in displayed))
        overlay.text = text
        overlay.visible = bool(text)

    overlay.position = "top_left"
    overlay.font_size = 12
    for event in (viewer.dims.events.order, viewer.dims.events.ndisplay, viewer.dims.events.axis_labels):
        event.connect(lambda _event: update())
    for event in (viewer.layers.events.inserted, viewer.layers.events.removed):
        event.connect(lambda _event: update())
    update()
