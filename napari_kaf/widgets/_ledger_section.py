"""The slice ledger with its buttons and what the current slice means, in words."""

from __future__ import annotations

from typing import Any

from qtpy.QtWidgets import QGridLayout, QPushButton, QVBoxLayout, QWidget

from napari_kaf._keys import with_key
from napari_kaf._ledger import MEANING, Cell
from napari_kaf._marking import mark, mark_painted_complete, step_labelled
from napari_kaf.widgets._panel import Life, answering, heading, say, words
from napari_kaf.widgets._strip import LedgerStrip, legend


class LedgerSection(QWidget):
    """Which slices are labelled, and how."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self.session = life.session
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(heading("Slices"))
        self.strip = LedgerStrip()
        self.current = words()
        self.summary = words()
        column.addWidget(self.strip)
        column.addWidget(self.summary)
        column.addWidget(self.current)
        grid = QGridLayout()
        grid.setSpacing(4)
        states = (Cell.COMPLETE, Cell.EMPTY, Cell.PARTIAL, Cell.UNTOUCHED)
        self.buttons = {}
        for place, state in enumerate(states):
            button = QPushButton(str(state).capitalize())
            button.setToolTip(with_key(str(state)) + f"\n{MEANING[state]}")
            button.clicked.connect(lambda _checked=False, state=state: self.mark(state))
            grid.addWidget(button, 0, place)
            self.buttons[state] = button
        self.previous = QPushButton("◀ labelled")
        self.previous.setToolTip(with_key("previous"))
        self.previous.clicked.connect(lambda: step_labelled(self.session, -1))
        self.next = QPushButton("labelled ▶")
        self.next.setToolTip(with_key("next"))
        self.next.clicked.connect(lambda: step_labelled(self.session, 1))
        self.all_painted = QPushButton("All painted complete")
        self.all_painted.setToolTip(
            "Mark every painted slice complete: for labels that came finished from a file"
        )
        self.all_painted.clicked.connect(self._mark_painted)
        grid.addWidget(self.previous, 1, 0)
        grid.addWidget(self.next, 1, 1)
        grid.addWidget(self.all_painted, 1, 2, 1, 2)
        column.addLayout(grid)
        self.strip.chosen.connect(self.session.go_to)
        for signal in (self.session.ledger_changed, self.session.volume_changed, self.session.labels_changed):
            life.listen(signal, self.refresh)
        life.listen(self.session.viewer.dims.events.current_step, self.refresh)
        self.refresh()

    def refresh(self, event: object = None) -> None:
        """Show the ledger and the current slice."""
        ledger = self.session.ledger
        z = self.session.slice
        self.strip.set_ledger(ledger, z)
        usable = len(ledger) > 0
        for button in (*self.buttons.values(), self.previous, self.next, self.all_painted):
            button.setEnabled(usable)
        if not usable:
            say(self.current, "Every slice you label is marked here. New labels begins.")
            say(self.summary, "")
            return
        cell = ledger.cell(min(z, len(ledger) - 1))
        say(self.current, f"Slice {z}: <b>{cell}</b>; {MEANING[cell]}.")
        say(self.summary, legend(ledger))

    @answering
    def mark(self, state: Cell) -> None:
        """Mark the current slice."""
        mark(self.session, state)

    @answering
    def _mark_painted(self, *_: Any) -> None:
        mark_painted_complete(self.session)
