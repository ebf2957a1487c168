"""Starting, watching and cancelling a finetuning."""

from __future__ import annotations

import datetime
import time
from dataclasses import replace
from typing import Any

import numpy as np
from napari.utils.notifications import show_error, show_info
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QFormLayout,
    QProgressBar,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from kaf_model.config import PRESETS
from kaf_model.errors import UserError
from kaf_model.volume import Volume
from napari_kaf import _layers
from napari_kaf._finetune_task import (
    FinetuneOutcome,
    FinetuneRequest,
    SlicePreview,
    VolumePreview,
    check_request,
    finetune_task,
)
from napari_kaf._jobs import Job, Report
from napari_kaf._keys import with_key
from napari_kaf._models import SCRATCH
from napari_kaf._runs import Run
from napari_kaf._settings import DEVICES, description, settings
from napari_kaf.widgets._curve import LiveCurve
from napari_kaf.widgets._model_box import ModelBox
from napari_kaf.widgets._panel import Life, answering, heading, words


class TrainingSection(QWidget):
    """Model to start from, settings, the Finetune button and the live curve."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self.life, self.session = life, life.session
        self._opened: _layers.OpenVolume | None = None
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(heading("Model to start from"))
        self.model = ModelBox(life, ("pretrained", "segmentation"), scratch=True)
        column.addWidget(self.model)
        column.addLayout(self._make_form())
        self.button = QPushButton("Finetune")
        self.button.clicked.connect(self.toggle)
        column.addWidget(self.button)
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setFixedHeight(8)
        self.status = words()
        self.curve = LiveCurve()
        for widget in (self.bar, self.status, self.curve):
            widget.setVisible(False)
            column.addWidget(widget)
        life.listen(self.session.busy_changed, self._show_busy)
        for signal in (self.session.volume_changed, self.session.labels_changed, self.session.ledger_changed):
            life.listen(signal, self._show_busy)
        life.listen(self.session.viewer.dims.events.current_step, self._follow_slice)
        self._show_busy()

    def _make_form(self) -> QFormLayout:
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
        self.hold_out = QCheckBox("measure Dice on held-out slices")
        self.hold_out.setChecked(kept.hold_out)
        rows = (
            ("Network", self.preset, "preset", self.preset.currentTextChanged),
            ("Minutes", self.minutes, "minutes", self.minutes.valueChanged),
            ("Device", self.device, "device", self.device.currentTextChanged),
            ("", self.hold_out, "hold_out", self.hold_out.toggled),
        )
        for label, widget, name, changed in rows:
            widget.setToolTip(description(name))
            form.addRow(label, widget)
            changed.connect(lambda value, name=name: setattr(settings(), name, value))
        self.model.changed.connect(self._show_preset)
        self._show_preset()
        return form

    def _show_preset(self) -> None:
        choice = self.model.choice
        self.preset.setEnabled(choice is None or choice is SCRATCH)

    @property
    def running(self) -> bool:
        """Whether a finetuning of this panel is running."""
        return self.life.job is not None

    @answering
    def toggle(self, *_: Any) -> None:
        """Start, or cancel what runs."""
        if self.running:
            self.cancel()
        else:
            self.start()

    def cancel(self) -> None:
        """Stop within two seconds; the best model so far is kept and applied."""
        if self.life.job is not None:
            self.life.job.cancel()
            self.button.setEnabled(False)
            self.status.setText("Stopping; the best so far is kept…")

    def start(self) -> None:
        """Train on the marked slices.

        Raises:
            UserError: If something is missing for it.
        """
        clicked = time.monotonic()
        session = self.session
        if session.busy:
            raise UserError(f"{session.busy} is running; wait for it or cancel it first")
        if session.opened is None:
            raise UserError("there is no volume to train on; open one first")
        if session.labels is None:
            raise UserError("there is no label layer; click New labels and paint a structure first")
        session.flush()  # nothing that was drawn may depend on how the training ends
        statuses = session.ledger.training()
        check_request(statuses)
        assert session.results.store is not None
        store, key = session.results.store, session.results.store.new_key()
        choice = self.model.choice or SCRATCH
        volume = session.opened.volume
        painted = set(np.unique(_layers.stack(session.labels)[sorted(statuses)]).tolist())
        request = FinetuneRequest(
            volume=replace(volume, array=volume.array.copy()),
            labels=_layers.stack(session.labels).copy(),
            statuses=statuses,
            class_names={entry.value: entry.name for entry in session.classes if entry.value in painted},
            start=choice.path,
            preset=self.preset.currentText(),
            seconds=60 * self.minutes.value(),
            hold_out=self.hold_out.isChecked(),
            device=self.device.currentText(),
            output=store.model_path(key),
            clicked=clicked,
        )
        number = len(session.runs) + 1
        self._run = Run(
            key=key,
            name=f"run {number}",
            when=_when(),
            labelled=dict(statuses),
            steps=0,
            seconds=0.0,
            stopped=False,
            held_out_dice=None,
            start=choice.name,
            device="",
        )
        self._store, self._opened, self._volume = store, session.opened, volume
        self.curve.clear()
        for widget in (self.bar, self.status, self.curve):
            widget.setVisible(True)
        self.status.setText("Starting…")
        self.bar.setRange(0, 0)
        session.set_busy("Finetuning")
        self.life.job = Job(
            "Finetuning",
            lambda control: finetune_task(request, control),
            on_report=self._reported,
            on_done=self._done,
            on_failed=self._failed,
        )
        self._follow_slice()
        self._show_busy()

    def _follow_slice(self, event: object = None) -> None:
        if self.life.job is not None:
            self.life.job.control.slice = self.session.slice

    def _reported(self, report: Any) -> None:
        if isinstance(report, Report):
            self._show_progress(report)
        elif self._opened is not None and self._opened.layer in self.session.viewer.layers:
            self._show_preview(report)

    def _show_progress(self, report: Report) -> None:
        progress = report.progress
        if progress.losses:
            self.curve.add(progress.step, progress.losses)
        if progress.message:
            show_info(progress.message)
        self.bar.setRange(0, progress.total or 0)
        self.bar.setValue(min(progress.step, progress.total or 0))
        if self.life.job is not None and self.life.job.control.cancelled and progress.stage != "segmenting":
            return
        parts = [progress.stage]
        if progress.total:
            parts.append(
                f"{'step' if progress.losses else ''} {progress.step} of about {progress.total}".strip()
            )
        if progress.eta is not None:
            parts.append(f"{_minutes(progress.eta)} left")
        if report.device:
            parts.append(f"{report.device}, {report.memory_gb:.1f} GB")
        text = "; ".join(parts)
        self.status.setText(text[:1].upper() + text[1:])

    def _show_preview(self, report: SlicePreview | VolumePreview) -> None:
        assert self._opened is not None
        viewer, opened, classes = self.session.viewer, self._opened, self.session.classes
        layers = _layers.layers_with_role(viewer, "preview", opened.layer)
        if isinstance(report, VolumePreview):
            _layers.show(viewer, opened, report.labels, "preview", classes, name="preview")
        elif layers and layers[0].data.dtype == report.labels.dtype:
            _layers.show_slice(layers[0], report.z, report.labels)
        else:
            whole = _empty_like(opened.volume, report)
            _layers.show(viewer, opened, whole, "preview", classes, name="preview")

    def _done(self, outcome: FinetuneOutcome) -> None:
        self._ended()
        if outcome.labels is None:
            self._store.delete(self._run)
            self.status.setText("Stopped before anything was learnt.")
            return
        run = replace(
            self._run,
            steps=outcome.steps,
            seconds=outcome.seconds,
            stopped=outcome.stopped,
            held_out_dice=outcome.held_out_dice,
            device=outcome.device,
        )
        try:
            self._store.add(run, outcome.labels)
        except UserError as error:
            show_error(str(error))
        session = self.session
        if session.opened is None or session.opened.volume is not self._volume:
            show_info(f"{run.name} on {self._volume.name} is finished; choose that volume to see it")
            return
        session.results.reload()
        session.results.show(run, outcome.labels)
        dice = "" if outcome.held_out_dice is None else f" Held-out Dice {outcome.held_out_dice:.3f}."
        what = "Stopped" if outcome.stopped else "Finished"
        self.status.setText(
            f"{what} after {outcome.steps} steps, {_minutes(outcome.seconds)}.{dice} "
            "The result lies in its own layer; accept what is right."
        )

    def _failed(self, message: str) -> None:
        self._ended()
        self._store.delete(self._run)
        self.status.setText(f"It did not work: {message}")
        show_error(message)

    def _ended(self) -> None:
        self.life.job = None
        _layers.remove(self.session.viewer, "preview")
        self.bar.setVisible(False)
        self.session.set_busy("")

    def _show_busy(self) -> None:
        session = self.session
        others = bool(session.busy) and not self.running
        self.button.setText("Cancel" if self.running else "Finetune")
        ready = session.opened is not None and session.labels is not None
        self.button.setEnabled(self.running or (ready and not others))
        why = "" if ready else "\nNeeds a volume, labels and marked slices."
        number = len(session.ledger.training())
        text = f"Train on the {number} slices marked so far; slices marked meanwhile join the next run"
        self.button.setToolTip(with_key("finetune", text) + why)


def _when() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _minutes(seconds: float) -> str:
    return f"{round(seconds)} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _empty_like(volume: Volume, preview: SlicePreview) -> Any:
    whole = np.zeros(volume.shape, preview.labels.dtype)
    whole[preview.z] = preview.labels
    return whole
