"""Choosing a model: those that are known, or a file; with what it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtpy.QtCore import Signal  # type: ignore[attr-defined]
from qtpy.QtWidgets import QComboBox, QFileDialog, QHBoxLayout, QPushButton, QVBoxLayout, QWidget

from napari_kaf._models import SCRATCH, ModelChoice, choices, read_choice
from napari_kaf._paths import models_folder
from napari_kaf.widgets._panel import Life, answering, say, words


class ModelBox(QWidget):
    """A list of models.

    Args:
        life: Of the panel.
        kinds: "pretrained", "segmentation" or both.
        scratch: Whether random weights can be chosen.
    """

    changed = Signal()

    def __init__(self, life: Life, kinds: Sequence[str], *, scratch: bool) -> None:
        super().__init__()
        self.session = life.session
        self._kinds = tuple(kinds)
        self._fixed = [SCRATCH] if scratch else []
        self._opened: list[ModelChoice] = []
        self._choices: list[ModelChoice] = []
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        row = QHBoxLayout()
        self.box = QComboBox()
        self.box.setAccessibleName("Model")
        self.box.setToolTip("Pretrained models, earlier runs on this volume, and files you opened")
        self.open = QPushButton("Open…")
        self.open.setToolTip("Choose a checkpoint file (.safetensors)")
        row.addWidget(self.box, 1)
        row.addWidget(self.open)
        column.addLayout(row)
        self.about = words()
        column.addWidget(self.about)
        self.box.activated.connect(lambda _index: self._tell())
        self.open.clicked.connect(self._open_file)
        life.listen(self.session.runs_changed, self.refresh)
        self.refresh()

    @property
    def choice(self) -> ModelChoice | None:
        """The chosen model, or None if there is none to choose."""
        index = self.box.currentIndex()
        return self._choices[index] if 0 <= index < len(self._choices) else None

    def refresh(self) -> None:
        """List the models there are now; what was chosen stays chosen while it exists."""
        before = self.choice
        found = choices(self.session.results.runs, self.session.results.store, self._kinds)
        opened = [choice for choice in self._opened if choice.path is not None and choice.path.is_file()]
        self._choices = [*self._fixed, *opened, *found]
        self.box.clear()
        self.box.addItems([choice.name for choice in self._choices])
        paths = [choice.path for choice in self._choices]
        self.box.setCurrentIndex(
            paths.index(before.path) if before is not None and before.path in paths else 0
        )
        self._tell()

    def add_file(self, path: Path) -> None:
        """Choose a checkpoint file.

        Raises:
            UserError: If it is no checkpoint that can be used here.
        """
        choice = read_choice(path)
        self._opened = [choice, *(other for other in self._opened if other.path != path)]
        self.refresh()
        self.box.setCurrentIndex([other.path for other in self._choices].index(path))
        self._tell()

    def _tell(self) -> None:
        choice = self.choice
        say(self.about, choice.about if choice is not None else "No model yet: finetune one, or open a file.")
        self.changed.emit()

    @answering
    def _open_file(self, *_: Any) -> None:
        name, _filter = QFileDialog.getOpenFileName(
            self, "Open a model", str(models_folder()), "Checkpoints (*.safetensors)"
        )
        if name:
            self.add_file(Path(name))
