"""What the views of Explore have in common: they ask when they are seen, and own their layers."""

from __future__ import annotations

from typing import Any

from qtpy.QtWidgets import QCheckBox, QLabel, QVBoxLayout, QWidget

from napari_kaf import _explore_layers
from napari_kaf._desk import CANCELLED
from napari_kaf._exploration import Exploration
from napari_kaf._explore_lab import Network
from napari_kaf.widgets._panel import Life, words

PICK_FIRST = "Press Pick a place, then click on the canvas."


def tell(label: QLabel, text: str) -> None:
    """Set the words of a line; an empty one takes no room."""
    label.setText(text)
    label.setVisible(bool(text))


class View(QWidget):
    """One tab. What changes while another tab is seen is asked for when this one is seen again.

    Args:
        life: Of the panel.
        exploration: What is explored.
    """

    key = ""
    parts: tuple[_explore_layers.Part, ...] = ()

    def __init__(self, life: Life, exploration: Exploration) -> None:
        super().__init__()
        self.exploration = exploration
        self.seen = False
        self._due = True
        self._excuse = False  # what the line says is why there is no answer
        self.column = QVBoxLayout(self)
        self.column.setContentsMargins(6, 8, 6, 6)
        self.column.setSpacing(6)
        self.status = words()
        self.show_box = QCheckBox("Show on the canvas")
        self.show_box.setToolTip("Untick to remove the layers of this view")
        self.show_box.setChecked(True)
        self.show_box.toggled.connect(self._show_toggled)
        life.listen(exploration.network_changed, self._network_changed)
        life.listen(exploration.layer_deleted, self._layer_deleted)

    @property
    def on_canvas(self) -> bool:
        """Whether the layers of this view are wanted."""
        return self.show_box.isChecked()

    def finish(self) -> None:
        """Put the line of words and the box of the layers beneath the rest."""
        self.column.addWidget(self.status)
        self.column.addWidget(self.show_box)
        self.column.addStretch()

    def set_seen(self, seen: bool) -> None:
        """Called when the tab comes to the front or goes behind; its layers come and go with it."""
        self.seen = seen
        if seen and self._due:
            self.refresh()
        elif not seen and self.exploration.desk.pending(self.key):
            self._due = True
            self.exploration.desk.drop(self.key)
        _explore_layers.set_visible(self.exploration.session.viewer, self.parts, seen)

    def refresh(self, *_: Any) -> None:
        """Ask anew, now or when the view is seen next."""
        self._due = not self.seen
        if not self.seen:
            return
        network = self.exploration.network
        if network is None:
            self._excused(self.exploration.problem)
            return
        reason = self.reason(network)
        if reason:
            self._excused(reason)
            return
        if self._excuse:
            self._excuse = False
            tell(self.status, "")
        self.ask()

    def reason(self, network: Network) -> str:
        """Why nothing can be shown, in words; empty when something can."""
        return ""

    def ask(self) -> None:
        """Ask the lab."""
        raise NotImplementedError

    def clear(self) -> None:
        """Take away what the panel shows of an earlier answer."""

    def drop_layers(self) -> None:
        """Remove the layers of this view; the next answer makes them again."""
        self.exploration.remove_layers(self.parts)

    def adopt(self, network: Network) -> None:
        """Offer the choices that a network gives."""

    def failed(self, reason: str) -> None:
        """Say why there is no answer; what was shown of an earlier one goes."""
        if reason == CANCELLED:
            self._due = True
            self._excused("Cancelled. Change something, or come back to this tab, to ask again.")
        else:
            self._excused(f"It did not work: {reason}")

    def _excused(self, why: str) -> None:
        self._excuse = True
        self.exploration.desk.drop(self.key)
        self.drop_layers()
        self.clear()
        tell(self.status, why)

    def _show_toggled(self, wanted: bool) -> None:
        if wanted:
            self.refresh()
        else:
            self.drop_layers()

    def _network_changed(self) -> None:
        if self.exploration.network is not None:
            self.adopt(self.exploration.network)
        else:
            self.drop_layers()  # also of a view that is not seen
        self.refresh()

    def _layer_deleted(self, part: str) -> None:
        if part in self.parts and self.on_canvas:
            self.show_box.setChecked(False)
            tell(self.status, "You deleted the layer; tick Show on the canvas to bring it back.")
