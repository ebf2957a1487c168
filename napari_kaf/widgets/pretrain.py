"""Pretraining an encoder on a folder of unlabelled volumes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtpy.QtWidgets import (
    QComboBox,
    QFormLayout,
    QHBoxLayout,
    QLineEdit,
    QPushButton,
)

from kaf_model.config import PretrainConfig, Recipe
from kaf_model.errors import UserError
from kaf_model.presets import PRESETS
from napari_kaf._form import spin_box
from napari_kaf._jobs import Report
from napari_kaf._pair_picture import PairPicture
from napari_kaf._paths import models_folder
from napari_kaf._pretrain_task import (
    Found,
    PretrainOutcome,
    PretrainRequest,
    pretrain_task,
    scan_task,
    trial_task,
)
from napari_kaf._sample_data import sample_folder, write_samples
from napari_kaf._settings import DEVICES, description, settings
from napari_kaf.widgets._curve import LiveCurve
from napari_kaf.widgets._found_table import FoundTable, found_in_words
from napari_kaf.widgets._job_row import STOPPED_AT_ONCE, JobRow, minutes
from napari_kaf.widgets._pair_view import PairView
from napari_kaf.widgets._panel import Panel, answering, heading, say, words
from napari_kaf.widgets._path_row import FolderRow

if TYPE_CHECKING:
    import napari

_NOTHING_CHOSEN = "No volumes yet: choose a folder. Labels are not needed."


class PretrainWidget(Panel):
    """Folder and what is in it, settings, Pretrain, curves, and the checkpoint.

    Args:
        napari_viewer: Given by napari.
    """

    def __init__(self, napari_viewer: napari.Viewer) -> None:
        super().__init__(napari_viewer)
        self._found: list[Found] = []
        self._paused = False
        self.column.addWidget(heading("Folder of unlabelled volumes"))
        self.folder = FolderRow("Folder of volumes to pretrain on", "folder of volumes")
        self.folder.changed.connect(self._scan)
        self.sample = QPushButton("Use the sample hearts")
        self.sample.setToolTip("Four synthetic hearts, to try it out")
        self.sample.clicked.connect(self._use_samples)
        self.column.addWidget(self.folder)
        self.column.addWidget(self.sample)
        self.table = FoundTable()
        self.found = words(_NOTHING_CHOSEN)
        self.column.addWidget(self.table)
        self.column.addWidget(self.found)
        self.column.addWidget(heading("Training"))
        self.column.addLayout(self._make_form())
        self.trial = QPushButton("Estimate the time")
        self.trial.setToolTip("Measure three steps with these settings on this device")
        self.trial.clicked.connect(self._estimate)
        self.estimate = words()
        self.column.addWidget(self.trial)
        self.column.addWidget(self.estimate)
        self.row = JobRow(self.life, "Pretrain", self.start)
        self.row.button.setToolTip(
            "Train on all usable volumes; Cancel keeps a checkpoint that can be resumed"
        )
        self.column.addWidget(self.row)
        buttons = QHBoxLayout()
        self.pause = QPushButton("Pause")
        self.pause.setToolTip("Hold the training; its settings and place are kept")
        self.pause.clicked.connect(self._toggle_pause)
        self.resume = QPushButton("Resume")
        self.resume.setToolTip(
            "Go on with the cancelled training of this name, with the same settings and volumes"
        )
        self.resume.clicked.connect(self._resume)
        buttons.addWidget(self.pause)
        buttons.addWidget(self.resume)
        self.column.addLayout(buttons)
        self.curve = LiveCurve()
        self.pair_title = words()
        self.pair = PairView()
        self.column.addWidget(self.curve)
        self.column.addWidget(self.pair_title)
        self.column.addWidget(self.pair)
        self.column.addStretch(1)
        self.life.listen(self.session.busy_changed, self._show_state)
        self._preset_chosen()
        self._show_state()

    @property
    def output(self) -> Path:
        """The checkpoint to write."""
        name = self.name.text().strip() or "pretrained"
        return models_folder() / f"{name.removesuffix('.safetensors')}.safetensors"

    def start(self) -> None:
        """Pretrain from the beginning.

        Raises:
            UserError: If something is missing, or the name is taken.
        """
        if self.output.is_file():
            raise UserError(f"there is a model {self.output.name} already; choose another name, or Resume it")
        self._run(resume=False)

    def _make_form(self) -> QFormLayout:
        form = QFormLayout()
        self.preset = QComboBox()
        self.preset.addItems(PRESETS)
        self.preset.setCurrentText(settings().preset)
        self.preset.setToolTip("Size of the network and settings of the training")
        self.steps = spin_box(PretrainConfig, "steps")
        self.device = QComboBox()
        self.device.addItems(DEVICES)
        self.device.setCurrentText(settings().device)
        self.device.setToolTip(description("device"))
        self.name = QLineEdit("pretrained")
        self.name.setToolTip(f"Name of the checkpoint; it is written into {models_folder()}")
        self.place = words()
        form.addRow("Preset", self.preset)
        form.addRow("Steps", self.steps)
        form.addRow("Device", self.device)
        form.addRow("Name", self.name)
        form.addRow(self.place)
        self.preset.currentTextChanged.connect(self._preset_chosen)
        self.name.textChanged.connect(self._show_state)
        return form

    def _recipe(self) -> Recipe:
        return Recipe.preset(self.preset.currentText())  # type: ignore[arg-type]

    def _preset_chosen(self, *_: Any) -> None:
        recipe = self._recipe()
        self.steps.setEnabled(recipe.pretrain.steps is not None)
        if recipe.pretrain.steps is not None:
            self.steps.setValue(recipe.pretrain.steps)
        else:
            self.steps.setToolTip(f"This preset trains {recipe.pretrain.epochs:g} epochs")
        say(self.estimate, "")

    def _request(self, *, resume: bool) -> PretrainRequest:
        usable = [found.path for found in self._found if found.info is not None]
        if not usable:
            raise UserError("there is no volume to pretrain on; choose a folder that holds some")
        recipe = self._recipe()
        training = recipe.pretrain
        if training.steps is not None:
            training = training.override(steps=self.steps.value())
        return PretrainRequest(usable, recipe, training, self.device.currentText(), self.output, resume)

    def _run(self, *, resume: bool) -> None:
        request = self._request(resume=resume)
        self.row.run(
            "Pretraining",
            lambda control: pretrain_task(request, control),
            on_report=self._reported,
            on_done=self._done,
            nothing=STOPPED_AT_ONCE,
        )
        if not resume:
            self.curve.clear()
        self._show_state()

    @answering
    def _resume(self, *_: Any) -> None:
        self._run(resume=True)

    @answering
    def _scan(self) -> None:
        folder = self.folder.path
        if folder is None:
            return
        self._scanned([])
        self.row.run(
            "Looking into the folder",
            lambda control: scan_task(folder, control),
            on_report=lambda report: None,
            on_done=self._scanned,
        )

    def _scanned(self, found: list[Found]) -> None:
        self._found = found
        self.table.show_found(found)
        say(self.found, found_in_words(found) if found else _NOTHING_CHOSEN)
        say(self.estimate, "")

    @answering
    def _use_samples(self, *_: Any) -> None:
        images = write_samples(sample_folder())[1]
        self.folder.set_path(images[0].parent)

    @answering
    def _estimate(self, *_: Any) -> None:
        request = self._request(resume=False)
        self.row.run(
            "Measuring",
            lambda control: trial_task(request, control),
            on_report=lambda report: None,
            on_done=lambda seconds: self._estimated(seconds, request),
        )

    def _estimated(self, seconds: float, request: PretrainRequest) -> None:
        steps = request.training.steps
        if steps is None:
            slices = sum(found.info.shape[0] for found in self._found if found.info is not None)
            steps = round((request.training.epochs or 1) * slices / request.training.batch_size)
        say(
            self.estimate,
            f"About {minutes(seconds * steps)}: {steps} steps of {seconds:.2f} s each, measured just now.",
        )

    def _toggle_pause(self, *_: Any) -> None:
        if self.life.job is None:
            return
        self._paused = not self._paused
        self.life.job.control.pause(self._paused)
        self.pause.setText("Go on" if self._paused else "Pause")
        if self._paused:
            self.row.say("Paused after the step that runs.")

    def _reported(self, report: Any) -> None:
        if isinstance(report, PairPicture):
            say(self.pair_title, report.title)
            self.pair.show_pair(report)
        elif isinstance(report, Report) and report.progress.losses:
            losses = {name: value for name, value in report.progress.losses.items() if name != "total"}
            self.curve.add(report.progress.step, losses)
            if self._paused:
                self.row.say(f"Paused after step {report.progress.step}.")

    def _done(self, outcome: PretrainOutcome) -> None:
        self._show_state()
        self.session.runs_changed.emit()  # lists of models look again
        if outcome.path is None:
            self.row.say(STOPPED_AT_ONCE)
        elif outcome.stopped:
            self.row.say(f"Stopped after {outcome.steps} steps; {outcome.path} can be used, or resumed.")
        else:
            self.row.say(f"Finished after {outcome.steps} steps: {outcome.path}")

    def _show_state(self, *_: Any) -> None:
        training = self.row.running and self.session.busy == "Pretraining"
        self.pause.setEnabled(training)
        if not training:
            self._paused = False
            self.pause.setText("Pause")
        interrupted = self.output.with_suffix(".resume.safetensors").is_file()
        self.resume.setEnabled(interrupted and not self.session.busy)
        for widget in (self.folder, self.sample, self.trial, self.preset, self.device, self.name):
            widget.setEnabled(not self.row.running)
        self.steps.setEnabled(not self.row.running and self._recipe().pretrain.steps is not None)
        say(self.place, f"Written as {self.output}")
