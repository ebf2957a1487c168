"""The main panel: label a few slices, finetune, and take the result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QMessageBox, QPushButton, QWidget

from napari_kaf._compass import attach_compass
from napari_kaf._keys import KEYS, key_list
from napari_kaf._ledger import Cell
from napari_kaf._marking import step_labelled
from napari_kaf.widgets._history_section import HistorySection
from napari_kaf.widgets._labels_section import LabelsSection
from napari_kaf.widgets._ledger_section import LedgerSection
from napari_kaf.widgets._panel import Panel
from napari_kaf.widgets._propagate_section import PROPAGATING, PropagateSection
from napari_kaf.widgets._result_section import ResultSection
from napari_kaf.widgets._training_section import FINETUNING, TrainingSection
from napari_kaf.widgets._volume_section import VolumeSection

if TYPE_CHECKING:
    import napari


_LAID_OUT = 100  # milliseconds until what was just shown has its place


def _without_viewer(action: Callable[[], None]) -> Callable[[object], None]:
    return lambda _viewer: action()


class FinetuneWidget(Panel):
    """From a volume to its segmentation, top to bottom in the order of work.

    Args:
        napari_viewer: Given by napari.
    """

    def __init__(self, napari_viewer: napari.Viewer) -> None:
        super().__init__(napari_viewer)
        self.volume = VolumeSection(self.life)
        self.labels = LabelsSection(self.life)
        self.ledger = LedgerSection(self.life)
        self.propagate = PropagateSection(self.life)
        self.training = TrainingSection(self.life)
        self.result = ResultSection(self.life)
        self.history = HistorySection(self.life, self.training.row)
        sections: tuple[QWidget, ...] = (
            self.volume,
            self.labels,
            self.ledger,
            self.propagate,
            self.training,
            self.result,
            self.history,
        )
        for section in sections:
            self.column.addWidget(section)
        self.keys = QPushButton("Keys")
        self.keys.setToolTip("All keys of this panel")
        self.keys.clicked.connect(self._show_keys)
        self.column.addWidget(self.keys)
        self.column.addStretch(1)
        attach_compass(self.session.viewer)
        self._bind_keys()
        self.life.listen(self.session.busy_changed, self._follow_the_work)
        self.session.poll()

    def _follow_the_work(self) -> None:
        if self.session.busy in ("", FINETUNING, PROPAGATING):
            QTimer.singleShot(_LAID_OUT, self._scroll_to_the_work)

    def _scroll_to_the_work(self) -> None:
        """Show the curve when a finetuning began, and the result when it ended."""
        running = {self.training.row: self.training.curve, self.propagate.row: self.propagate}
        shown = next((widget for row, widget in running.items() if row.running), self.result)
        self.ensureWidgetVisible(shown)

    def _bind_keys(self) -> None:
        actions: dict[str, Callable[[], None]] = {
            "complete": lambda: self.ledger.mark(Cell.COMPLETE),
            "empty": lambda: self.ledger.mark(Cell.EMPTY),
            "untouched": lambda: self.ledger.mark(Cell.UNTOUCHED),
            "partial": lambda: self.ledger.mark(Cell.PARTIAL),
            "next": lambda: step_labelled(self.session, 1),
            "previous": lambda: step_labelled(self.session, -1),
            "propagate": self.propagate.row.toggle,
            "finetune": self.training.row.toggle,
            "accept": self.result.accept_slice,
            "accept_all": self.result.accept_all,
            "reject": self.result.reject,
            "panel": self.enter,
        }
        viewer = self.session.viewer
        for name, action in actions.items():
            key, _what = KEYS[name]
            viewer.bind_key(key, _without_viewer(action), overwrite=True)
            self.life.at_end(partial(viewer.bind_key, key, None, overwrite=True))

    def _show_keys(self) -> None:
        box = QMessageBox(QMessageBox.Icon.NoIcon, "Keys", key_list(), QMessageBox.StandardButton.Close, self)
        box.setModal(False)
        box.show()
