"""Keypoints of the shown slice or of the whole volume: size by scale, colour by response."""

from __future__ import annotations

import numpy as np
from pydantic import ValidationError
from qtpy.QtWidgets import QCheckBox, QComboBox, QFormLayout, QPushButton

from kaf_model.config import KeypointConfig
from napari_kaf import _explore_layers
from napari_kaf._exploration import Exploration
from napari_kaf._explore_lab import Network
from napari_kaf._explore_task import KeypointTable, keypoints_task
from napari_kaf._form import choice_box, number_box, spin_box
from napari_kaf.widgets._explore_view import View, tell
from napari_kaf.widgets._panel import Life
from napari_kaf.widgets._pictures import colors_of

_THIS, _WHOLE = range(2)
_DETECTORS = {"sift": "SIFT", "superpoint": "SuperPoint"}
_COLORMAP = "viridis"
_OUTLINE = 0.7  # mm


class KeypointsView(View):
    """Finds keypoints and shows them."""

    key = "keypoints"
    parts = ("keypoints", "orientations")

    def __init__(self, life: Life, exploration: Exploration) -> None:
        super().__init__(life, exploration)
        self._table: KeypointTable | None = None
        form = QFormLayout()
        self.extent = QComboBox()
        self.extent.addItems(["the shown slice", "the whole volume"])
        self.extent.setToolTip("The shown slice is followed as you move the slider")
        self.detector = choice_box(KeypointConfig, "detector", _DETECTORS)
        self.cap = spin_box(KeypointConfig, "max_keypoints", highest=100_000)
        self.contrast = number_box(KeypointConfig, "contrast_threshold", lowest=0, highest=0.5, decimals=3)
        self.edge = number_box(KeypointConfig, "edge_threshold", lowest=0.1, highest=1000, decimals=1)
        form.addRow("Of", self.extent)
        form.addRow("Detector", self.detector)
        form.addRow("At most", self.cap)
        form.addRow("Contrast threshold", self.contrast)
        form.addRow("Edge threshold", self.edge)
        self.column.addLayout(form)
        self.reset = QPushButton("As the model was trained")
        self.reset.setToolTip("Detector, cap and thresholds that the model expects")
        self.reset.clicked.connect(self._reset)
        self.column.addWidget(self.reset)
        self.orientations = QCheckBox("Orientations")
        self.orientations.setToolTip("A line from each keypoint along its orientation, as long as its radius")
        self.column.addWidget(self.orientations)
        self.finish()
        self.extent.currentIndexChanged.connect(self.refresh)
        self.detector.currentIndexChanged.connect(self._detector_changed)
        for box in (self.cap, self.contrast, self.edge):
            box.setKeyboardTracking(False)
            box.valueChanged.connect(self.refresh)
        self.orientations.toggled.connect(self._draw)
        life.listen(exploration.slice_changed, self._slice_changed)

    @property
    def config(self) -> KeypointConfig:
        """Detection as it is set here; the rest is that of the network."""
        assert self.exploration.network is not None
        return self.exploration.network.keypoints.override(
            detector=self.detector.currentData(),
            max_keypoints=self.cap.value(),
            contrast_threshold=self.contrast.value(),
            edge_threshold=self.edge.value(),
        )

    def adopt(self, network: Network) -> None:
        """Start from the detection that the network was trained with."""
        boxes = (self.detector, self.cap, self.contrast, self.edge)
        for box in boxes:
            box.blockSignals(True)
        config = network.keypoints
        self.detector.setCurrentIndex(self.detector.findData(config.detector))
        self.cap.setValue(config.max_keypoints)
        self.contrast.setValue(config.contrast_threshold)
        self.edge.setValue(config.edge_threshold)
        for box in boxes:
            box.blockSignals(False)
        self._enable_thresholds()

    def ask(self) -> None:
        """Find the keypoints."""
        session = self.exploration.session
        assert session.opened is not None
        whole = self.extent.currentIndex() == _WHOLE
        slices = range(session.opened.volume.num_slices) if whole else [session.slice]
        try:
            config = self.config
        except ValidationError as error:
            self.failed(str(error.errors()[0]["msg"]))
            return
        self.exploration.ask(
            self.key,
            "finding keypoints",
            keypoints_task,
            list(slices),
            config,
            on_done=self._found,
            on_failed=self.failed,
        )

    def clear(self) -> None:
        """Forget the keypoints."""
        self._table = None

    def _found(self, table: KeypointTable) -> None:
        self._table = table
        self._draw()
        counts = list(table.counts.values())
        if len(counts) == 1:
            (z,) = table.counts
            told = f"{counts[0]} keypoints on slice {z}"
        else:
            told = (
                f"{sum(counts)} keypoints on {len(counts)} slices; a slice has {min(counts)} to {max(counts)}, "
                f"median {np.median(counts):g}"
            )
        if not sum(counts) and self.contrast.isEnabled():
            told += ". Lower the contrast threshold to find more."
        elif max(counts) >= self.cap.value():
            told += ". The cap was reached: only the strongest are shown."
        tell(self.status, told)

    def _draw(self, *_: object) -> None:
        table, session = self._table, self.exploration.session
        if table is None or session.opened is None or not self.on_canvas:
            return
        colors = colors_of(np.log1p(table.responses * 1000), colormap=_COLORMAP)
        _explore_layers.show_points(
            session.viewer,
            session.opened,
            "keypoints",
            table.voxels,
            sizes=table.sizes,
            colors=colors,
            symbol="disc",
            outline=_OUTLINE / float(np.sqrt(np.prod(session.opened.volume.spacing[1:]))),
            features={
                "slice": table.voxels[:, 0].astype(int),
                "response": table.responses,
                "scale": table.sizes,
                "angle": table.angles,
                "descriptor": _explore_layers.descriptor_column(table.descriptors),
            },
        )
        if self.orientations.isChecked():
            _explore_layers.show_arrows(
                session.viewer,
                session.opened,
                "orientations",
                table.voxels,
                table.directions,
                colors=colors,
                width=_OUTLINE / float(np.sqrt(np.prod(session.opened.volume.spacing[1:]))),
                style="line",
            )
        else:
            self.exploration.remove_layers(("orientations",))

    def _slice_changed(self) -> None:
        if self.extent.currentIndex() == _THIS:
            self.refresh()

    def _detector_changed(self, *_: object) -> None:
        self._enable_thresholds()
        self.refresh()

    def _enable_thresholds(self) -> None:
        sift = self.detector.currentData() == "sift"
        self.contrast.setEnabled(sift)
        self.edge.setEnabled(sift)

    def _reset(self, *_: object) -> None:
        if self.exploration.network is not None:
            self.adopt(self.exploration.network)
            self.refresh()
