"""Starting, watching and cancelling a finetuning."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from napari.utils.notifications import show_error, show_info
from qtpy.QtWidgets import QVBoxLayout, QWidget

from kaf_model.volume import Volume
from napari_kaf import _layers
from napari_kaf._classes import ClassEntry
from napari_kaf._finetune_task import (
    FinetuneOutcome,
    FinetuneRequest,
    SlicePreview,
    VolumePreview,
    finetune_task,
)
from napari_kaf._jobs import Report
from napari_kaf._keys import with_key
from napari_kaf._runs import Run, next_name
from napari_kaf._snapshot import Snapshot, take_snapshot
from napari_kaf.widgets._curve import LiveCurve
from napari_kaf.widgets._job_row import STOPPED_AT_ONCE, JobRow, minutes
from napari_kaf.widgets._panel import Life
from napari_kaf.widgets._propagate_section import CARRIED, ends_hint
from napari_kaf.widgets._training_form import TrainingForm

FINETUNING = "Finetuning"


class TrainingSection(QWidget):
    """Model to start from, settings, the Finetune button and the live curve."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self.life, self.session = life, life.session
        self._opened: _layers.OpenVolume | None = None
        self._classes: Sequence[ClassEntry] = ()
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        self.form = TrainingForm(life)
        self.row = JobRow(life, "Finetune", self.start, self._ready)
        self.curve = LiveCurve()
        for widget in (self.form, self.row, self.curve):
            column.addWidget(widget)
        for signal in (self.session.volume_changed, self.session.labels_changed, self.session.ledger_changed):
            life.listen(signal, self._show_ready)
        life.listen(self.session.volume_changed, self._leave_volume)
        life.listen(self.session.viewer.dims.events.current_step, self._follow_slice)
        life.at_end(self._leave_no_preview)
        self._show_ready()

    def start(self) -> None:
        """Train on the marked slices.

        Raises:
            UserError: If something is missing for it.
        """
        snapshot = take_snapshot(self.session)
        self._opened, self._classes = self.session.opened, list(self.session.classes)
        request = self._request(snapshot)
        self.row.run(
            FINETUNING,
            lambda control: finetune_task(request, control),
            on_report=self._reported,
            on_done=self._done,
            on_nothing=self._nothing,
            nothing=STOPPED_AT_ONCE,
        )
        self.curve.clear()
        self._follow_slice()

    def _request(self, snapshot: Snapshot) -> FinetuneRequest:
        form, results = self.form, self.session.results
        store = results.store
        assert store is not None
        return FinetuneRequest(
            **vars(snapshot),
            start=form.choice.path,
            architecture=form.architecture,
            preset=form.preset.currentText(),
            seconds=60 * form.minutes.value(),
            hold_out=form.hold_out.isChecked(),
            device=form.device.currentText(),
            store=store,
            run=_begun(store.begin(), snapshot.statuses, form.choice.name, next_name(results.runs)),
            clicked=time.monotonic(),
        )

    def _leave_volume(self) -> None:
        """Say and show nothing more of another volume's training."""
        if not self.row.running and not self.session.works_on(self._opened):
            self.row.say("")
            self.curve.clear()

    def _ready(self) -> bool:
        return self.session.opened is not None and self.session.labels is not None

    def _show_ready(self) -> None:
        self.row.refresh()
        number = len(self.session.ledger.training())
        text = f"Train on the {number} slices marked so far; slices marked meanwhile join the next run"
        why = "" if self._ready() else "\nNeeds a volume, labels and marked slices."
        self.row.button.setToolTip(with_key("finetune", text) + why)

    def _follow_slice(self, event: object = None) -> None:
        if self.life.job is not None and self.session.works_on(self._opened):
            self.life.job.control.slice = self.session.slice

    def _reported(self, report: Any) -> None:
        if isinstance(report, Report):
            self.curve.add(report.progress.step, report.progress.losses)
        elif self._opened is not None and self._opened.layer in self.session.viewer.layers:
            self._show_preview(report)

    def _show_preview(self, report: SlicePreview | VolumePreview) -> None:
        assert self._opened is not None
        viewer, opened = self.session.viewer, self._opened
        classes = self.session.classes if self.session.works_on(opened) else self._classes
        layers = _layers.layers_with_role(viewer, "preview", opened.layer)
        if isinstance(report, VolumePreview):
            _layers.show(viewer, opened, report.labels, "preview", classes, name="preview")
        elif layers and layers[0].data.dtype == report.labels.dtype:
            _layers.show_slice(layers[0], report.z, report.labels)
        else:
            whole = _empty_like(opened.volume, report)
            _layers.show(viewer, opened, whole, "preview", classes, name="preview")

    def _done(self, outcome: FinetuneOutcome) -> None:
        _layers.remove(self.session.viewer, "preview")
        run, session, volume = outcome.run, self.session, self._volume()
        if not run.steps and outcome.labels is None:
            self.row.say(STOPPED_AT_ONCE)
            return
        if outcome.problem:
            show_error(outcome.problem)
        if not session.works_on(self._opened):
            show_info(
                f"{run.name} on {volume.name} is finished; choose that volume and Show the run to see it"
            )
            return
        session.results.reload()
        if outcome.labels is not None:
            session.results.show(run if run.steps else None, outcome.labels)
        told = _in_words(outcome) if run.steps else f"Stopped before the first step. {CARRIED}"
        hint = ends_hint(session) if outcome.labels is not None else ""
        self.row.say(f"{told}\n{hint}".rstrip())

    def _leave_no_preview(self) -> None:
        if self.row.running and self.session.alive:
            _layers.remove(self.session.viewer, "preview")

    def _nothing(self) -> None:
        _layers.remove(self.session.viewer, "preview")
        self.session.results.reload()  # what was learnt before it failed is kept

    def _volume(self) -> Volume:
        assert self._opened is not None
        return self._opened.volume


def _in_words(outcome: FinetuneOutcome) -> str:
    run = outcome.run
    dice = "" if run.held_out_dice is None else f" Held-out Dice {run.held_out_dice:.3f}."
    what = "Stopped" if run.stopped else "Finished"
    then = "The result lies in its own layer; accept what is right."
    if outcome.labels is None:
        then = "The volume was not segmented yet; Show, in the list of runs, does that."
    return f"{what} after {run.steps} steps, {minutes(run.seconds)} of training.{dice} {then}"


def _begun(key: str, statuses: Mapping[int, str], start: str, name: str) -> Run:
    """What is known of a run when it begins."""
    return Run(
        key=key,
        name=name,
        when=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        labelled=dict(statuses),
        steps=0,
        seconds=0.0,
        stopped=False,
        held_out_dice=None,
        start=start,
        device="",
    )


def _empty_like(volume: Volume, preview: SlicePreview) -> Any:
    whole = np.zeros(volume.shape, preview.labels.dtype)
    whole[preview.z] = preview.labels
    return whole
