"""Keypoints of two slices that go together, by the heuristic and by the trained matcher, and as tracks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QBoxLayout, QCheckBox, QFormLayout, QSpinBox, QVBoxLayout, QWidget
from superqt import QLabeledDoubleSlider, QLabeledSlider

from kaf_model.config import CorrespondenceConfig
from napari_kaf import _explore_layers
from napari_kaf._exploration import Exploration
from napari_kaf._explore_lab import Network
from napari_kaf._explore_task import PairMatches, TrackTable, matches_task, tracks_task
from napari_kaf._form import tip
from napari_kaf._pair_picture import PairPicture
from napari_kaf.widgets._explore_view import View, tell
from napari_kaf.widgets._pair_view import LINES, PairView
from napari_kaf.widgets._panel import Life, words

_MOST_LINES = 400
_BESIDE = 620  # pixels from which on both pictures lie beside each other
_TRACKS = "tracks"
_NO_MATCHER = "No learned matches: this model has no trained matcher. A checkpoint from Pretrain has one."


class MatchesView(View):
    """Two slices side by side with lines, twice."""

    key = "matches"
    parts = ("tracks", "learned tracks")

    def __init__(self, life: Life, exploration: Exploration) -> None:
        super().__init__(life, exploration)
        self._pair: PairMatches | None = None
        self._followed: tuple[Any, ...] | None = None
        self._make_form()
        self.heuristic, self.heuristic_words = PairView(_MOST_LINES), words()
        self.learned, self.learned_words = PairView(_MOST_LINES), words()
        self.pictures = QBoxLayout(QBoxLayout.Direction.TopToBottom)
        for title, view, told in (
            ("Heuristic", self.heuristic, self.heuristic_words),
            ("Learned", self.learned, self.learned_words),
        ):
            self.pictures.addLayout(_titled(title, view, told))
        self.column.addLayout(self.pictures)
        self.tracks = QCheckBox("Tracks through the stack")
        self.tracks.setToolTip(
            "Follow matches from slice to slice; best seen in napari's 3-D view. Yellow is a small descriptor "
            "distance, or a high probability"
        )
        self.column.addWidget(self.tracks)
        self.tracks_words = words()
        self.column.addWidget(self.tracks_words)
        self.finish()
        self.distance.valueChanged.connect(self.refresh)
        self.radius.valueChanged.connect(self.refresh)
        self.ratio.valueChanged.connect(self.refresh)
        self.probability.valueChanged.connect(self._probability_changed)
        self.tracks.toggled.connect(self._ask_tracks)
        life.listen(exploration.slice_changed, self.refresh)

    @property
    def config(self) -> CorrespondenceConfig:
        """The heuristic as it is set here."""
        ratio = self.ratio.value()
        return CorrespondenceConfig(radius=self.radius.value(), ratio=ratio if ratio < 1 else None)

    @property
    def neighbour(self) -> int:
        """The slice that is matched with the shown one: further along the stack, or before at its end."""
        assert self.exploration.opened is not None
        z, step = self.exploration.session.slice, self.distance.value()
        return z + step if z + step < self.exploration.opened.volume.num_slices else z - step

    def reason(self, network: Network) -> str:
        """A single slice has no neighbour."""
        assert self.exploration.opened is not None
        count = self.exploration.opened.volume.num_slices
        if count < 2:
            return "The volume has a single slice, so there is no neighbour to match it with."
        if self.neighbour < 0:
            return f"No slice lies {self.distance.value()} from this one; choose a smaller distance."
        return ""

    def adopt(self, network: Network) -> None:
        """Set how far a neighbour can be."""
        assert self.exploration.opened is not None
        self.distance.blockSignals(True)
        self.distance.setMaximum(max(self.exploration.opened.volume.num_slices - 1, 1))
        self.distance.blockSignals(False)
        self.probability.setEnabled(network.has_matcher)

    def ask(self) -> None:
        """Match both slices, and all slices if tracks are wanted."""
        z = self.exploration.session.slice
        self.exploration.ask(
            self.key,
            "matching",
            matches_task,
            z,
            self.neighbour,
            self.config,
            on_done=self._matched,
            on_failed=self.failed,
        )
        self._ask_tracks()

    def clear(self) -> None:
        """Take the pictures away."""
        self._pair = None
        for view in (self.heuristic, self.learned):
            view.setVisible(False)
        for told in (self.heuristic_words, self.learned_words):
            tell(told, "")

    def drop_layers(self) -> None:
        """Forget the tracks."""
        self._followed = None
        tell(self.tracks_words, "")
        self.exploration.desk.drop(_TRACKS)
        super().drop_layers()

    def resizeEvent(self, event: Any) -> None:
        """Both pictures beside each other where there is room."""
        beside = self.width() >= _BESIDE
        direction = QBoxLayout.Direction.LeftToRight if beside else QBoxLayout.Direction.TopToBottom
        self.pictures.setDirection(direction)
        super().resizeEvent(event)

    def _make_form(self) -> None:
        form = QFormLayout()
        self.distance = QSpinBox()
        self.distance.setRange(1, 1)
        self.distance.setToolTip("How far the neighbour is; at the end of the stack the one before is taken")
        self.radius = QLabeledSlider(Qt.Orientation.Horizontal)
        self.radius.setRange(1, 200)
        self.radius.setValue(int(CorrespondenceConfig.model_fields["radius"].default))
        self.radius.setToolTip(tip(CorrespondenceConfig, "radius"))
        self.ratio = _share_slider(0.5, 1.0)
        self.ratio.setToolTip(f"{tip(CorrespondenceConfig, 'ratio')} Here 1 is none.")
        self.probability = _share_slider(0.0, 0.2)
        self.probability.setToolTip("Learned matches that are less probable are left out")
        form.addRow("Distance, slices", self.distance)
        form.addRow("Radius, pixels", self.radius)
        form.addRow("Ratio", self.ratio)
        form.addRow("Probability", self.probability)
        self.column.addLayout(form)

    def _matched(self, pair: PairMatches) -> None:
        self._pair = pair
        tell(self.status, "")
        self._draw()

    def _draw(self) -> None:
        pair = self._pair
        if pair is None:
            return
        nearest = float(pair.distances.min(initial=np.inf))
        farthest = float(pair.distances.max(initial=0))
        self.heuristic.show_pair(_picture(pair, pair.pairs, 1 - _scaled(pair.distances)))
        told = self._counts(pair, pair.pairs)
        if len(pair.pairs):
            told += f". Descriptor distance {nearest:.3g} (yellow) to {farthest:.3g} (violet)"
        tell(self.heuristic_words, told)
        if pair.learned is None:
            self.learned.setVisible(False)
            tell(self.learned_words, _NO_MATCHER)
            return
        sure = pair.probabilities >= self.probability.value()
        self.learned.show_pair(_picture(pair, pair.learned[sure], pair.probabilities[sure]))
        both = len(set(map(tuple, pair.pairs.tolist())) & set(map(tuple, pair.learned[sure].tolist())))
        tell(
            self.learned_words,
            f"{self._counts(pair, pair.learned[sure])}; {both} of them as the heuristic. Probability 0 (violet) "
            f"to 1 (yellow), the surest {pair.probabilities.max(initial=0):.2f}",
        )

    def _counts(self, pair: PairMatches, pairs: NDArray[np.int64]) -> str:
        left = [len(points) - len(pairs) for points in pair.points]
        return f"{len(pairs)} matched; unmatched: {left[0]} on slice {pair.z0}, {left[1]} on slice {pair.z1}"

    def _ask_tracks(self, *_: Any) -> None:
        """Follow keypoints, unless that was asked already in the same words."""
        network = self.exploration.network
        if not (self.tracks.isChecked() and self.on_canvas):
            self.drop_layers()
            return
        wanted = (self.exploration.lab, self.distance.value(), self.config, self.probability.value())
        if not self.seen or network is None or self.reason(network) or wanted == self._followed:
            return
        self._followed = wanted
        tell(self.tracks_words, "Following keypoints…")
        self.exploration.ask(
            _TRACKS,
            "following keypoints",
            tracks_task,
            *wanted[1:],
            on_done=self._tracked,
            on_failed=self.failed,
        )

    def _tracked(self, found: tuple[TrackTable, TrackTable | None]) -> None:
        session = self.exploration.session
        told = []
        parts: tuple[_explore_layers.Part, ...] = ("tracks", "learned tracks")
        for part, table in zip(parts, found, strict=True):
            if table is None:
                continue
            told.append(f"{table.num_tracks} {part}")
            features = {"probability": table.values}
            if part == "tracks":
                features = {
                    "closeness": 1 - _scaled(table.values),
                    "descriptor distance": table.values,
                }
            if session.opened is not None:
                self.exploration.remove_layers((part,))
                _explore_layers.show_tracks(
                    session.viewer,
                    session.opened,
                    part,
                    table.vertices,
                    features,
                    color_by=next(iter(features)),
                    colormap=LINES,
                    step=self.distance.value(),
                )
        _explore_layers.set_visible(session.viewer, self.parts, self.seen)
        tell(self.tracks_words, ", ".join(told))

    def _probability_changed(self, *_: Any) -> None:
        self._draw()
        self._ask_tracks()


def _share_slider(lowest: float, value: float) -> QLabeledDoubleSlider:
    slider = QLabeledDoubleSlider(Qt.Orientation.Horizontal)
    slider.setRange(lowest, 1)
    slider.setDecimals(2)
    slider.setSingleStep(0.01)  # type: ignore[arg-type]
    slider.setValue(value)
    return slider


def _titled(title: str, view: PairView, told: QWidget) -> QVBoxLayout:
    column = QVBoxLayout()
    column.addWidget(words(f"<b>{title}</b>"))
    column.addWidget(view)
    column.addWidget(told)
    return column


def _picture(pair: PairMatches, pairs: NDArray[np.int64], values: NDArray[Any]) -> PairPicture:
    title = f"slices {pair.z0} (left) and {pair.z1} (right)"
    return PairPicture(pair.images, pair.points, pairs, title, values)


def _scaled(values: NDArray[Any]) -> NDArray[Any]:
    span = float(np.ptp(values)) if len(values) else 0.0
    scaled: NDArray[Any] = (values - values.min()) / span if span else np.zeros(len(values))
    return scaled
