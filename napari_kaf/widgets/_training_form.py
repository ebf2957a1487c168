"""What a finetuning starts from, and its settings; they are remembered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QFormLayout,
    QHBoxLayout,
    QVBoxLayout,
    QWidget,
)

from kaf_model.presets import PRESETS
from napari_kaf._models import SCRATCH, ModelChoice
from napari_kaf._settings import DEVICES, NETWORKS, description, settings
from napari_kaf.widgets._model_box import ModelBox
from napari_kaf.widgets._panel import Life, heading


class TrainingForm(QWidget):
    """Model to start from, network and its size, minutes, device, held-out slices."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(heading("Model to start from"))
        self.model = ModelBox(life, ("pretrained", "segmentation"), scratch=True)
        column.addWidget(self.model)
        form = QFormLayout()
        kept = settings()
        self.network = QComboBox()
        for name, title in NETWORKS.items():
            self.network.addItem(title, name)
        self.network.setCurrentIndex(self.network.findData(kept.network))
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
        fields: tuple[tuple[str, QWidget, str, Any, Callable[[], Any]], ...] = (
            (
                "Network",
                self.network,
                "network",
                self.network.currentIndexChanged,
                self.network.currentData,
            ),
            ("Size", self.preset, "preset", self.preset.currentTextChanged, self.preset.currentText),
            ("Minutes", self.minutes, "minutes", self.minutes.valueChanged, self.minutes.value),
            ("Device", self.device, "device", self.device.currentTextChanged, self.device.currentText),
            (
                self.hold_out.text(),
                self.hold_out,
                "hold_out",
                self.hold_out.toggled,
                self.hold_out.isChecked,
            ),
        )
        for title, widget, name, changed, value in fields:
            widget.setToolTip(description(name))
            widget.setAccessibleName(title)
            changed.connect(lambda *_, name=name, value=value: setattr(settings(), name, value()))
        network_and_size = QHBoxLayout()
        network_and_size.addWidget(self.network, 1)
        network_and_size.addWidget(self.preset, 1)
        form.addRow("Network", network_and_size)
        form.addRow("Minutes", self.minutes)
        form.addRow("Device", self.device)
        form.addRow(self.hold_out)
        column.addLayout(form)
        self.model.changed.connect(self._show_fresh)
        self._show_fresh()

    @property
    def choice(self) -> ModelChoice:
        """The model to start from."""
        return self.model.choice or SCRATCH

    @property
    def architecture(self) -> str:
        """The network that starts from random weights, as the engine names it."""
        return str(self.network.currentData())

    def _show_fresh(self) -> None:
        fresh = self.choice is SCRATCH
        for name, box in (("network", self.network), ("preset", self.preset)):
            box.setEnabled(fresh)
            box.setToolTip(description(name) if fresh else "The network is that of the model")
