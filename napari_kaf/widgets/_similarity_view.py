"""Self-similarity of a place at all levels, on its slice and on neighbouring ones, and how steady it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtWidgets import QCheckBox, QComboBox, QFormLayout, QHBoxLayout, QPushButton, QSpinBox

from napari_kaf import _explore_layers
from napari_kaf._exploration import Exploration
from napari_kaf._explore_lab import Network
from napari_kaf._similarity_task import (
    AugmentedView,
    SimilarityAnswer,
    equivariance_task,
    error_task,
    similarity_task,
)
from napari_kaf.widgets._explore_view import PICK_FIRST, View, tell
from napari_kaf.widgets._panel import Life, words
from napari_kaf.widgets._pictures import Picture, PictureGrid, grey_image, heat_image

if TYPE_CHECKING:
    from kaf_model.explore.equivariance import EquivarianceError

LEVELS = (1, 2, 3, 4)
Limits = tuple[float, float]
_EQUIVARIANCE, _ERROR = "equivariance", "equivariance error"


class SimilarityView(View):
    """Heat maps of the cosine similarity of one place with all others."""

    key = "similarity"
    parts = ("similarity",)

    def __init__(self, life: Life, exploration: Exploration) -> None:
        super().__init__(life, exploration)
        self._answer: SimilarityAnswer | None = None
        self._draw_number = 0
        self._asked = 0.0
        form = QFormLayout()
        self.level = QComboBox()
        self.level.addItems([f"{level}" for level in LEVELS])
        self.level.setCurrentIndex(2)
        self.level.setToolTip("Encoder level whose map lies on the canvas: 1 is the finest, 4 the coarsest")
        self.neighbours = QSpinBox()
        self.neighbours.setRange(0, 5)
        self.neighbours.setValue(1)
        self.neighbours.setPrefix("± ")
        self.neighbours.setToolTip("How many slices on either side are compared as well")
        form.addRow("Level on the canvas", self.level)
        form.addRow("Slices", self.neighbours)
        self.column.addLayout(form)
        self.stretch = QCheckBox("Stretch colours to the range of each level")
        self.stretch.setToolTip("Else black is 0 and the brightest colour is 1, at every level")
        self.stretch.setChecked(True)
        self.column.addWidget(self.stretch)
        self.grid = PictureGrid("Similarity at four levels on neighbouring slices")
        self.column.addWidget(self.grid)
        self._make_augmented()
        self.finish()
        self.level.currentIndexChanged.connect(self.refresh)
        self.neighbours.valueChanged.connect(self.refresh)
        self.stretch.toggled.connect(self._draw)
        self.grid.chosen.connect(self._picture_chosen)
        self.augment.toggled.connect(self._augment_toggled)
        self.again.clicked.connect(self._draw_again)
        life.listen(exploration.place_changed, self.refresh)

    def reason(self, network: Network) -> str:
        """Similarity needs a place."""
        return "" if self.exploration.place is not None else PICK_FIRST

    def ask(self) -> None:
        """Compare the place."""
        self._asked = time.perf_counter()
        self.exploration.ask(
            self.key,
            "comparing places",
            similarity_task,
            self.exploration.place,
            int(self.level.currentText()),
            self.neighbours.value(),
            on_done=self._compared,
            on_failed=self.failed,
        )
        self._ask_augmented()

    def clear(self) -> None:
        """Take the pictures away."""
        self._answer = None
        self.grid.show_pictures((), 1)
        self._clear_augmented()

    def _make_augmented(self) -> None:
        row = QHBoxLayout()
        self.augment = QCheckBox("Two random augmentations")
        self.augment.setToolTip(
            "Turn, scale and bend the slice at random, twice: the map computed there, and the map of the slice "
            "carried over by the same transform"
        )
        self.again = QPushButton("Draw again")
        self.again.setToolTip("Two other random augmentations")
        self.again.setEnabled(False)
        row.addWidget(self.augment)
        row.addStretch()
        row.addWidget(self.again)
        self.column.addLayout(row)
        self.augmented = PictureGrid("Similarity on two augmented slices, computed and carried over")
        self.column.addWidget(self.augmented)
        self.error_words = words()
        self.whole_words = words()
        self.column.addWidget(self.error_words)
        self.column.addWidget(self.whole_words)

    def _compared(self, answer: SimilarityAnswer) -> None:
        self._answer = answer
        self._draw()
        cells = {level: answer.maps[round(answer.place[0]), level].shape for level in LEVELS}
        tell(
            self.status,
            f"Shown {1000 * (time.perf_counter() - self._asked):.0f} ms after you asked: features "
            f"{1000 * answer.waited:.0f} ms, once for each slice; comparing {1000 * answer.seconds:.0f} ms, with "
            f"{len(answer.slices)} slices of {_size(cells[1])} to {_size(cells[4])} cells.",
        )

    def _limits(self, answer: SimilarityAnswer) -> dict[int, Limits]:
        """Values of the darkest and the brightest colour of each level."""
        if not self.stretch.isChecked():
            return dict.fromkeys(LEVELS, (0.0, 1.0))
        return {level: _extremes([answer.maps[z, level] for z in answer.slices]) for level in LEVELS}

    def _draw(self, *_: Any) -> None:
        answer, session = self._answer, self.exploration.session
        if answer is None or session.opened is None:
            return
        limits = self._limits(answer)
        rows = [[_picture(answer, z, level, limits[level]) for level in LEVELS] for z in answer.slices]
        height, width = answer.images[answer.slices[0]].shape
        self.grid.show_pictures(rows, height / width)
        if self.on_canvas:
            _explore_layers.show_heat(
                session.viewer,
                session.opened,
                "similarity",
                answer.heat,
                first=answer.slices[0],
                limits=limits[answer.level],
            )

    def _picture_chosen(self, row: int, column: int) -> None:
        assert self._answer is not None
        self.exploration.session.go_to(self._answer.slices[row])
        self.level.setCurrentIndex(column)

    def _augment_toggled(self, wanted: bool) -> None:
        self.again.setEnabled(wanted)
        if wanted:
            self.refresh()
        else:
            self._clear_augmented()

    def _draw_again(self, *_: Any) -> None:
        self._draw_number += 1
        self.refresh()

    def _ask_augmented(self) -> None:
        place = self.exploration.place
        if not self.augment.isChecked() or place is None:
            return
        level = int(self.level.currentText())
        tell(self.error_words, "Augmenting…")
        tell(self.whole_words, "")
        self.exploration.ask(
            _EQUIVARIANCE,
            "augmenting",
            equivariance_task,
            place,
            level,
            self._draw_number,
            on_done=self._augmented,
            on_failed=self.failed,
        )
        self.exploration.ask(
            _ERROR,
            "measuring equivariance",
            error_task,
            round(place[0]),
            level,
            self._draw_number,
            on_done=self._measured,
            on_failed=self.failed,
        )

    def _clear_augmented(self) -> None:
        for key in (_EQUIVARIANCE, _ERROR):
            self.exploration.desk.drop(key)
        self.augmented.show_pictures((), 1)
        tell(self.error_words, "")
        tell(self.whole_words, "")

    def _augmented(self, views: list[AugmentedView | None]) -> None:
        there = [view for view in views if view is not None]
        if not there:
            self.augmented.show_pictures((), 1)
            tell(self.error_words, "Both augmentations moved the place off the slice; draw again.")
            return
        height, width = there[0].image.shape
        rows = [_pictures(view) for view in there]
        self.augmented.show_pictures(rows, height / width)
        gone = "" if len(there) == len(views) else " The other augmentation moved the place off the slice."
        errors = " and ".join(f"{view.error:.3f}" for view in there)
        tell(
            self.error_words,
            f"Equivariance error of this place: {errors}, the mean difference of both maps; 0 is perfect.{gone}",
        )

    def _measured(self, error: EquivarianceError) -> None:
        if not error.num_points:
            tell(self.whole_words, "No random place stayed on the slice; draw again.")
            return
        tell(
            self.whole_words,
            f"Of the whole slice at level {error.level}: <b>{error.error:.3f}</b> over {error.num_points} random "
            f"places; the map of another place differs by {error.chance:.3f}, so this is "
            f"{error.relative:.0%} of chance.",
        )

    def set_seen(self, seen: bool) -> None:
        """Augmentations that were under way are asked for again when this tab is seen again."""
        desk = self.exploration.desk
        if not seen and self.augment.isChecked() and any(map(desk.pending, (_EQUIVARIANCE, _ERROR))):
            self._due = True
            desk.drop(_EQUIVARIANCE)
            desk.drop(_ERROR)
        super().set_seen(seen)


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _extremes(maps: Sequence[NDArray[np.float32]]) -> Limits:
    low = min(float(one.min()) for one in maps)
    return low, max(*(float(one.max()) for one in maps), low + 1e-6)


def _picture(answer: SimilarityAnswer, z: int, level: int, limits: Limits) -> Picture:
    own = z == round(answer.place[0])
    height, width = answer.images[z].shape
    cells, side = answer.maps[z, level], 2 ** (level - 1)
    captions = [f"level {level}"] if z == answer.slices[0] else []
    captions += [f"z {z}"] if level == LEVELS[0] else []
    return Picture(
        grey_image(answer.images[z]),
        heat_image(cells, limits),
        ", ".join(captions),
        f"slice {z}, level {level}: similarity {limits[0]:.2f} (dark) to {limits[1]:.2f} (bright)\n"
        "Click to go there with this level on the canvas",
        ((answer.pixel[0] + 0.5) / height, (answer.pixel[1] + 0.5) / width) if own else None,
        chosen=own and level == answer.level,
        reach=(cells.shape[0] * side / height, cells.shape[1] * side / width),
    )


def _pictures(view: AugmentedView) -> list[Picture]:
    limits = _extremes([view.computed, view.carried])
    height, width = view.image.shape
    mark = (view.point[0] + 0.5) / height, (view.point[1] + 0.5) / width
    told = f"similarity {limits[0]:.2f} (dark) to {limits[1]:.2f} (bright)"
    grey = grey_image(view.image)
    return [
        Picture(grey, None, "augmented", "The slice, moved by a random transform", mark),
        Picture(grey, heat_image(view.computed, limits), "computed", f"Computed on it: {told}", mark),
        Picture(grey, heat_image(view.carried, limits), "carried over", f"Carried over: {told}", mark),
    ]
