"""What a finetuning starts from, and its settings; they are remembered."""

from __future__ import annotations

from typing import Any

from qtpy.QtWidgets import QCheckBox, QComboBox, QDoubleSpinBox, QFormLayout, QVBoxLayout, QWidget

from kaf_model.config import PRESETS
from napari_kaf._models import SCRATCH, ModelChoice
from napari_kaf._settings import DEVICES, description, settings
from napari_kaf.widgets._model_box import ModelBox
from napari_kaf.widgets._panel import Life, heading


class TrainingForm(QWidget):
    """Model to start from, network, minutes, device, held-out slices."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(heading("Model to start from"))
        self.model = ModelBox(life, ("pretrained", "segmentation"), scratch=True)
        column.addWidget(self.model)
        form = QFormLayout()
        kept = settings()
        self.preset = QComboBox()
        self.preset.addItems(PRESETS)
        self.preset.setCurrentText(kept.preset)
        self.minutes = QDoubleSpinBox()
        self.minutes.setRange(0.1, 1440)
        self.minutes.setDecimals(1)
        self.minutes.setValue(kept.minutes)
        self.device = QComboBox()
        self.device.addItems(DEVICES)
        self.device.setCurrentText(kept.device)
        self.hold_out = QCheckBox("Measure Dice on held-out slices")
        self.hold_out.setChecked(kept.hold_out)
        rows: tuple[tuple[str, QWidget, str, Any], ...] = (
            ("Network", self.preset, "preset", self.preset.currentTextChanged),
            ("Minutes", self.minutes, "minutes", self.minutes.valueChanged),
            ("Device", self.device, "device", self.device.currentTextChanged),
            ("", self.hold_out, "hold_out", self.hold_out.toggled),
        )
        for label, widget, name, changed in rows:
            widget.setToolTip(description(name))
            widget.setAccessibleName(label or self.hold_out.text())
            form.addRow(label, widget) if label else form.addRow(widget)
            changed.connect(lambda value, name=name: setattr(settings(), name, value))
        column.addLayout(form)
        self.model.changed.connect(self._show_preset)
        self._show_preset()

    @property
    def choice(self) -> ModelChoice:
        """The model to start from."""
        return self.model.choice or SCRATCH

    def _show_preset(self) -> None:
        fresh = self.choice is SCRATCH
        self.preset.setEnabled(fresh)
        self.preset.setToolTip(description("preset") if fresh else "The network is that of the model")
