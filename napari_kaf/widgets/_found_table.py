"""What a folder holds: volumes with their shapes and spacings, and files that cannot be used and why."""

from __future__ import annotations

from collections.abc import Sequence

from qtpy.QtCore import Qt
from qtpy.QtWidgets import QAbstractItemView, QHeaderView, QTableWidget, QTableWidgetItem

from kaf_model.volume import volume_name
from napari_kaf._pretrain_task import Found

_COLUMNS = ("Volume", "Slices", "Pixels", "Spacing, mm")
_MOST_ROWS = 6  # more are scrolled
_PADDING = 12  # pixels


class FoundTable(QTableWidget):
    """One row a file, those that cannot be used first; nothing while nothing was found."""

    def __init__(self) -> None:
        super().__init__(0, len(_COLUMNS))
        self.setHorizontalHeaderLabels(_COLUMNS)
        self.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setTabKeyNavigation(False)
        self.setTextElideMode(Qt.TextElideMode.ElideLeft)  # names of one cohort differ at their ends
        self.setAccessibleName("Volumes in the folder")
        header, rows = self.horizontalHeader(), self.verticalHeader()
        assert header is not None
        assert rows is not None
        header.setSectionResizeMode(0, QHeaderView.ResizeMode.Stretch)
        for column, widest in enumerate(("Slices", "000 x 000", "00 x 0.00 x 0.00"), start=1):
            header.resizeSection(column, self.fontMetrics().horizontalAdvance(widest) + _PADDING)
        rows.setVisible(False)
        self._row_height, self._header_height = rows.defaultSectionSize(), header.sizeHint().height()
        self.setVisible(False)

    def show_found(self, files: Sequence[Found]) -> None:
        """List files."""
        self.clearSpans()
        self.setRowCount(len(files))
        for row, found in enumerate(sorted(files, key=lambda found: (found.info is not None, found.path))):
            texts = [volume_name(found.path), found.reason.removeprefix(f"{found.path}: ")]
            if found.info is not None:
                z, y, x = found.info.shape
                spacing = " x ".join(f"{size:.3g}" for size in found.info.spacing)
                texts[1:] = [str(z), f"{y} x {x}", spacing]
            else:
                self.setSpan(row, 1, 1, len(_COLUMNS) - 1)
            for column, text in enumerate(texts):
                item = QTableWidgetItem(text)
                item.setToolTip(found.reason or str(found.path))
                self.setItem(row, column, item)
        self.setFixedHeight(self._header_height + min(len(files), _MOST_ROWS) * self._row_height + 4)
        self.setVisible(bool(files))


def found_in_words(files: Sequence[Found]) -> str:
    """How many volumes can be used."""
    usable = [found.info for found in files if found.info is not None]
    slices = sum(info.shape[0] for info in usable)
    left_out = len(files) - len(usable)
    more = f"; {left_out} cannot be used, for the reasons given" if left_out else ""
    return f"{len(usable)} usable {'volume' if len(usable) == 1 else 'volumes'}, {slices} slices{more}."
