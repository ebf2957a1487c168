"""A table that is as high as its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qtpy.QtWidgets import QAbstractItemView, QTableWidget


class ShortTable(QTableWidget):
    """A table as high as its rows, up to so many; in the fonts of the theme, whenever that is put on.

    Args:
        columns: Titles.
        most_rows: More are scrolled.
    """

    def __init__(self, columns: Sequence[str], most_rows: int) -> None:
        super().__init__(0, len(columns))
        self._most_rows = most_rows
        self.setHorizontalHeaderLabels(columns)
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.setTabKeyNavigation(False)
        rows = self.verticalHeader()
        assert rows is not None
        rows.setVisible(False)
        rows.sectionCountChanged.connect(self.fit_height)
        rows.geometriesChanged.connect(self.fit_height)
        self.fit_height()

    def fit_height(self, *_: Any) -> None:
        """Take the room that the rows need."""
        rows, header = self.verticalHeader(), self.horizontalHeader()
        assert rows is not None
        assert header is not None
        count = min(max(self.rowCount(), 1), self._most_rows)
        height = rows.sectionSize(0) if self.rowCount() else rows.defaultSectionSize()
        self.setFixedHeight(header.sizeHint().height() + count * height + 2 * self.frameWidth() + 2)
