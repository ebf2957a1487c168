"""Which volume is worked on, what is known of it, and the saved work on it that can be restored."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from qtpy.QtWidgets import (
    QComboBox,
    QDoubleSpinBox,
    QHBoxLayout,
    QLabel,
    QPushButton,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

from kaf_model.geometry import spacing_of
from kaf_model.volume import Source, read_volume
from napari_kaf import _layers
from napari_kaf.widgets._panel import Life, answering, heading, say, words

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image

_DIRECTIONS = {
    "L": "left-right",
    "R": "left-right",
    "A": "front-back",
    "P": "front-back",
    "S": "head-foot",
    "I": "head-foot",
}


class VolumeSection(QWidget):
    """The volume, its voxel size, and what was saved of it."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self.session = life.session
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(heading("Volume"))
        self.box = QComboBox()
        self.box.setAccessibleName("Volume")
        self.box.setToolTip("The image layer that is labelled and segmented")
        self.about = words()
        self.notices = words()
        column.addWidget(self.box)
        column.addWidget(self.about)
        column.addWidget(self.notices)
        column.addWidget(self._make_axis_row())
        column.addWidget(self._make_frame_row())
        column.addWidget(self._make_spacing_row())
        column.addWidget(self._make_offer())
        self.box.activated.connect(self._chosen)
        for signal in (self.session.layers_changed, self.session.volume_changed):
            life.listen(signal, self.refresh)
        life.listen(self.session.offer_changed, self._show_offer)
        self.refresh()
        self._show_offer()

    def refresh(self) -> None:
        """Show the layers there are and what is known of the chosen one."""
        opened = self.session.opened
        layers = _layers.image_layers(self.session.viewer)
        self.box.clear()
        for layer in layers:
            self.box.addItem(layer.name)
        self.box.setEnabled(bool(layers))
        chosen = opened is not None and opened.layer in layers
        self.box.setCurrentIndex(layers.index(opened.layer) if opened is not None and chosen else -1)
        self._show_axes()
        self.spacing_row.setVisible(opened is not None and not opened.spacing_known)
        frames = _layers.num_frames(opened.layer) if opened is not None else 1
        self.frame_row.setVisible(frames > 1)
        if opened is None:
            say(self.about, _nothing_open(self.session.viewer))
            say(self.notices, "")
            return
        z, y, x = opened.volume.shape
        size = " x ".join(f"{value:.4g}" for value in opened.volume.spacing)
        say(
            self.about,
            f"{z} slice{'s' if z != 1 else ''} of {y} x {x} pixels; voxels {size} mm (z, y, x), {opened.origin}",
        )
        say(self.notices, "\n".join(f"• {notice}" for notice in opened.volume.notices))
        for box, value in zip(self.spacing_boxes, opened.volume.spacing, strict=True):
            box.setValue(value)
        if frames > 1:
            self.frame.setMaximum(frames - 1)
            self.frame.setValue(opened.volume.source.frame)

    def _make_spacing_row(self) -> QWidget:
        self.spacing_row = QWidget()
        column = QVBoxLayout(self.spacing_row)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(
            words("The voxel size is not known. Say it once, in mm; it is kept with the labels.")
        )
        row = QHBoxLayout()
        self.spacing_boxes = []
        for axis in "zyx":
            box = QDoubleSpinBox()
            box.setRange(0.001, 1000)
            box.setDecimals(3)
            box.setPrefix(f"{axis} ")
            box.setToolTip(f"Voxel size along {axis} in mm")
            row.addWidget(box)
            self.spacing_boxes.append(box)
        self.use_spacing = QPushButton("Use")
        self.use_spacing.setToolTip("Take this voxel size")
        self.use_spacing.clicked.connect(self._give_spacing)
        row.addWidget(self.use_spacing)
        column.addLayout(row)
        return self.spacing_row

    def _make_axis_row(self) -> QWidget:
        self.axis_row = QWidget()
        row = QHBoxLayout(self.axis_row)
        row.setContentsMargins(0, 0, 0, 0)
        self.axis = QComboBox()
        self.axis.setAccessibleName("Slices along")
        self.axis.setToolTip(
            "The axis the volume is cut into slices along, with their number and spacing; normally that of the "
            "largest spacing. "
            "Labels are cut with it and lose nothing"
        )
        self.axis.activated.connect(self._recut)
        row.addWidget(QLabel("Slices along"))
        row.addWidget(self.axis, 1)
        return self.axis_row

    def _show_axes(self) -> None:
        opened = self.session.opened
        self.axis_row.setVisible(opened is not None and opened.layer.ndim == 3)
        self.axis.clear()
        if opened is not None:
            self.axis.addItems(_axes(opened.volume.source))
            self.axis.setCurrentIndex(opened.volume.source.axes[0])

    def _make_frame_row(self) -> QWidget:
        self.frame_row = QWidget()
        row = QHBoxLayout(self.frame_row)
        row.setContentsMargins(0, 0, 0, 0)
        self.frame = QSpinBox()
        self.frame.setToolTip("Which of the file's volumes is shown, counted from 0")
        self.frame.setKeyboardTracking(False)
        show = QPushButton("Show frame")
        show.setToolTip("Open this frame in a layer of its own")
        show.clicked.connect(self._open_frame)
        row.addWidget(QLabel("Frame"))
        row.addWidget(self.frame)
        row.addWidget(show)
        row.addStretch()
        return self.frame_row

    def _make_offer(self) -> QWidget:
        self.offer = QWidget()
        column = QVBoxLayout(self.offer)
        column.setContentsMargins(0, 0, 0, 0)
        self.offer_text = words()
        column.addWidget(self.offer_text)
        row = QHBoxLayout()
        self.restore = QPushButton("Restore")
        self.restore.setToolTip("Bring the saved labels, ledger and classes back in a layer of their own")
        self.decline = QPushButton("Start afresh")
        self.decline.setToolTip("The saved work is kept under another name")
        self.restore.clicked.connect(self._restore)
        self.decline.clicked.connect(self._decline)
        row.addWidget(self.restore)
        row.addWidget(self.decline)
        column.addLayout(row)
        return self.offer

    def _show_offer(self) -> None:
        offer = self.session.saved.offer
        self.offer.setVisible(offer is not None)
        if offer is not None:
            when = datetime.datetime.fromisoformat(offer.saved).strftime("%d %b %Y, %H:%M")
            say(
                self.offer_text,
                f"<b>Labels of this volume were saved on {when}</b>: {offer.num_marked} of {len(offer.states)} "
                f"slices labelled, {len(offer.classes)} classes.",
            )

    @answering
    def _chosen(self, index: int) -> None:
        self._work_on(_layers.image_layers(self.session.viewer)[index])

    def _work_on(self, layer: Image) -> None:
        self.session.choose_volume(layer)
        _layers.bring_forward(self.session.viewer, layer)
        self.session.select_labels()

    @answering
    def _recut(self, index: int) -> None:
        assert self.session.opened is not None
        try:
            if index != self.session.opened.volume.source.axes[0]:
                self.session.recut(index)
        finally:
            self._show_axes()

    @answering
    def _give_spacing(self, *_: Any) -> None:
        self.session.give_spacing([box.value() for box in self.spacing_boxes])

    @answering
    def _open_frame(self, *_: Any) -> None:
        assert self.session.opened is not None
        source = self.session.opened.volume.source
        volume = read_volume(source.path, frame=self.frame.value(), fill_nan=0)
        count = self.frame.maximum() + 1
        name = f"{volume.name} frame {self.frame.value()}"
        self._work_on(_layers.add_volume(self.session.viewer, volume, name, count))

    @answering
    def _restore(self, *_: Any) -> None:
        self.session.saved.restore()

    @answering
    def _decline(self, *_: Any) -> None:
        self.session.saved.decline()


def _axes(source: Source) -> list[str]:
    """The stored axes in words."""
    from nibabel.orientations import aff2axcodes

    size, spacing = (*source.shape, 1)[:3], spacing_of(source.affine)
    known = source.format != "array"
    letters = aff2axcodes(source.affine) if known else (None, None, None)
    return [
        f"{_DIRECTIONS.get(letter, f'array axis {2 - axis}')}: {size[axis]} x {spacing[axis]:.3g} mm"
        for axis, letter in enumerate(letters)
    ]


def _nothing_open(viewer: ViewerModel) -> str:
    """What to do while there is no volume, and what is wrong with the images that are there."""
    from napari.layers import Image

    told = "Open a volume: drag a file into the window, or File > Open Sample > KAF segmentation."
    unusable = [layer for layer in viewer.layers if isinstance(layer, Image) and not _layers.role_of(layer)]
    for layer in unusable:
        what = "colours" if layer.rgb else f"{layer.ndim} axes"
        told += f"\n{layer.name} has {what}; a volume has 3 axes, or 2, of grey values."
    return told
