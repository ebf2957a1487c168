"""Carrying the labels of finished slices to the others at a click."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from napari.utils.notifications import show_info
from numpy.typing import NDArray
from qtpy.QtWidgets import QVBoxLayout, QWidget

from napari_kaf import _layers
from napari_kaf._keys import with_key
from napari_kaf._propagate_task import propagate_task
from napari_kaf._snapshot import take_snapshot
from napari_kaf.widgets._job_row import JobRow
from napari_kaf.widgets._panel import Life

if TYPE_CHECKING:
    from napari_kaf._session import Session

PROPAGATING = "Propagating"
CARRIED = (
    "The result shows what your finished slices tell of the others. Accept what is right, correct what is not; "
    "Finetune makes it better."
)


def ends_hint(session: Session) -> str:
    """What to do about structures whose ends nobody showed; nothing if there is nothing to do."""
    from kaf_model.labels import open_ends

    if session.labels is None:
        return ""
    ends = open_ends(_layers.stack(session.labels), session.ledger.finished)
    if not ends:
        return ""
    return (
        f"Where structures end {' and '.join(ends)} is a guess: if they do, mark the first slice without any "
        f"{with_key('empty', 'as empty')} and click again. It costs no paint and often helps most."
    )


class PropagateSection(QWidget):
    """The Propagate button."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self.session = life.session
        self._opened: _layers.OpenVolume | None = None
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        self.row = JobRow(life, "Propagate", self.start, self._ready)
        self.row.button.setToolTip(
            with_key(
                "propagate",
                "Carry the labels of complete and empty slices to all others along the image, in seconds and without "
                "training; the result comes in a layer of its own",
            )
        )
        column.addWidget(self.row)
        for signal in (self.session.volume_changed, self.session.labels_changed):
            life.listen(signal, self.row.refresh)
        life.listen(self.session.volume_changed, self._leave_volume)

    def start(self) -> None:
        """Carry labels in the background.

        Raises:
            UserError: If something is missing for it.
        """
        snapshot, opened = take_snapshot(self.session), self.session.opened
        self._opened = opened

        def done(labels: NDArray[np.integer[Any]] | None) -> None:
            if labels is None:
                self.row.say("Stopped.")
            elif not self.session.works_on(opened):
                show_info(
                    f"labels were carried through {snapshot.volume.name}; choose that volume and click again"
                )
            else:
                self.session.results.show(None, labels)
                self.row.say(f"{CARRIED}\n{ends_hint(self.session)}".rstrip())

        self.row.run(
            PROPAGATING,
            lambda control: propagate_task(snapshot, control),
            on_report=lambda report: None,
            on_done=done,
        )

    def _leave_volume(self) -> None:
        """Say nothing more of another volume."""
        if not self.row.running and not self.session.works_on(self._opened):
            self.row.say("")

    def _ready(self) -> bool:
        return self.session.opened is not None and self.session.labels is not None
