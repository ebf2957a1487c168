"""A place on disk: typed, or chosen in a dialog."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtpy.QtCore import Signal  # type: ignore[attr-defined]
from qtpy.QtWidgets import QFileDialog, QHBoxLayout, QLineEdit, QPushButton, QWidget


class FolderRow(QWidget):
    """A folder.

    Args:
        tip: What it is for.
        placeholder: Shown while it is empty.
    """

    changed = Signal()

    def __init__(self, tip: str, placeholder: str) -> None:
        super().__init__()
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        self.line = QLineEdit()
        self.line.setPlaceholderText(placeholder)
        self.line.setToolTip(tip)
        self.line.setAccessibleName(tip)
        self.browse = QPushButton("Browse…")
        self.browse.setToolTip(tip)
        row.addWidget(self.line, 1)
        row.addWidget(self.browse)
        self._told = ""
        self.line.returnPressed.connect(self._tell)
        self.line.editingFinished.connect(self._left)
        self.browse.clicked.connect(self._choose)

    @property
    def path(self) -> Path | None:
        """The folder, or None while it is empty."""
        text = self.line.text().strip()
        return Path(text).expanduser() if text else None

    def set_path(self, path: Path) -> None:
        """Choose a folder, also the one that is chosen already."""
        self.line.setText(str(path))
        self._tell()

    def _tell(self) -> None:
        self._told = self.line.text()
        self.changed.emit()

    def _left(self) -> None:
        if self.line.text() != self._told:  # leaving the line without a change chooses nothing
            self._tell()

    def _choose(self, *_: Any) -> None:
        start = str(self.path or Path.home())
        name = QFileDialog.getExistingDirectory(self, self.line.toolTip(), start)
        if name:
            self.set_path(Path(name))
