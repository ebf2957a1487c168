"""What the network sees: keypoints, matches, attention, self-similarity and look-alikes of the open volume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtpy.QtWidgets import QHBoxLayout, QProgressBar, QPushButton, QTabBar, QWidget

from napari_kaf._exploration import Exploration
from napari_kaf.widgets._attention_view import AttentionView
from napari_kaf.widgets._explore_view import View
from napari_kaf.widgets._keypoints_view import KeypointsView
from napari_kaf.widgets._look_alikes_view import LookAlikesView
from napari_kaf.widgets._matches_view import MatchesView
from napari_kaf.widgets._model_box import ModelBox
from napari_kaf.widgets._panel import Panel, heading, words
from napari_kaf.widgets._place_row import PlaceRow
from napari_kaf.widgets._similarity_view import SimilarityView
from napari_kaf.widgets._volume_section import VolumeSection

if TYPE_CHECKING:
    import napari

    from napari_kaf._layers import OpenVolume


class ExploreWidget(Panel):
    """A volume, a model, a place, and a tab for each view.

    Args:
        napari_viewer: Given by napari.
    """

    def __init__(self, napari_viewer: napari.Viewer) -> None:
        super().__init__(napari_viewer)
        self._looked_at: tuple[OpenVolume | None, Path | None, int] | None = None
        self.exploration = Exploration(self.session)
        self.life.at_end(self.exploration.close)
        self.volume = VolumeSection(self.life)
        self.column.addWidget(self.volume)
        self.column.addWidget(heading("Model"))
        self.model = ModelBox(self.life, ("pretrained", "segmentation"), scratch=True)
        self.column.addWidget(self.model)
        self.note = words()
        self.column.addWidget(self.note)
        self.column.addWidget(heading("Look at"))
        self.place = PlaceRow(self.life, self.exploration)
        self.column.addWidget(self.place)
        self.keypoints = KeypointsView(self.life, self.exploration)
        self.matches = MatchesView(self.life, self.exploration)
        self.attention = AttentionView(self.life, self.exploration)
        self.similarity = SimilarityView(self.life, self.exploration)
        self.look_alikes = LookAlikesView(self.life, self.exploration)
        self.tabs = QTabBar()
        self.tabs.setExpanding(False)
        self.tabs.setDrawBase(False)
        self.tabs.setAccessibleName("Views")
        self.column.addWidget(self._make_busy_row())
        self.column.addWidget(self.tabs)
        for view, name, tip in (
            (self.keypoints, "Keypoints", "Where the detector finds something to hold on to"),
            (self.matches, "Matches", "Which keypoints of two slices are the same anatomy"),
            (self.attention, "Attention", "What a keypoint attends to in the KAF layers"),
            (self.similarity, "Similarity", "Which places look to the network like the one you pick"),
            (self.look_alikes, "Look-alikes", "The most similar places in other slices"),
        ):
            self.tabs.setTabToolTip(self.tabs.addTab(name), tip)
            self.column.addWidget(view)
        self.remove = QPushButton("Remove layers")
        self.remove.setToolTip("Remove everything that Explore put on the canvas; your own layers stay")
        self.column.addWidget(self.remove)
        self.column.addStretch()
        self.setMinimumWidth(400)
        self._connect()
        self.session.poll()
        self._look()
        self._tab_changed()

    @property
    def views(self) -> tuple[View, ...]:
        """The tabs."""
        return self.keypoints, self.matches, self.attention, self.similarity, self.look_alikes

    def remove_layers(self) -> None:
        """Remove the layers of all views until they are wanted again."""
        for view in self.views:
            view.show_box.setChecked(False)
        self.exploration.picking.stop()
        self.exploration.remove_layers()

    def _make_busy_row(self) -> QWidget:
        self.busy_row = QWidget()
        row = QHBoxLayout(self.busy_row)
        row.setContentsMargins(0, 0, 0, 0)
        self.bar = QProgressBar()
        self.bar.setRange(0, 0)
        self.bar.setTextVisible(False)
        self.bar.setFixedSize(48, 8)
        self.doing = words()
        self.cancel = QPushButton("Cancel")
        self.cancel.setToolTip("Stop what Explore is computing")
        row.addWidget(self.bar)
        row.addWidget(self.doing, 1)
        row.addWidget(self.cancel)
        policy = self.busy_row.sizePolicy()
        policy.setRetainSizeWhenHidden(True)  # the panel does not jump
        self.busy_row.setSizePolicy(policy)
        self.busy_row.setVisible(False)
        return self.busy_row

    def _connect(self) -> None:
        session, exploration = self.session, self.exploration
        viewer = session.viewer
        self.life.listen(session.volume_changed, self._look)
        self.life.listen(exploration.network_changed, self._tell)
        self.life.listen(exploration.desk.changed, self._show_busy)
        self.life.listen(viewer.dims.events.current_step, exploration.follow_slice)
        self.life.listen(viewer.layers.events.removed, exploration.notice_removed)
        self.model.changed.connect(self._look)
        self.tabs.currentChanged.connect(self._tab_changed)
        self.cancel.clicked.connect(exploration.desk.cancel)
        self.remove.clicked.connect(self.remove_layers)

    def _look(self, *_: Any) -> None:
        """Look at the volume through the model, unless that is what is looked at."""
        path = self.model.choice.path if self.model.choice is not None else None
        written = path.stat().st_mtime_ns if path is not None and path.is_file() else 0
        wanted = (self.session.opened, path, written)
        if wanted != self._looked_at or self.exploration.failed:
            self._looked_at = wanted
            self.exploration.open(path)

    def _tell(self) -> None:
        network = self.exploration.network
        if network is None:
            self.note.setText(self.exploration.problem if self.session.opened is not None else "")
            return
        y, x = network.pixel
        read = f"It reads pixels of {y:.3g} x {x:.3g} mm, on {network.device}."
        text = network.note if network.trained else f"<b>{network.note}</b>"
        self.note.setText(f"{text} {read}")

    def _tab_changed(self, *_: Any) -> None:
        shown = self.views[self.tabs.currentIndex()]
        for view in self.views:
            if view is not shown:
                view.setVisible(False)
                view.set_seen(False)
        shown.setVisible(True)
        shown.set_seen(True)

    def _show_busy(self) -> None:
        desk = self.exploration.desk
        self.busy_row.setVisible(desk.busy)
        self.doing.setText(f"{desk.doing[:1].upper()}{desk.doing[1:]}…" if desk.busy else "")
