"""The most similar places in other slices as thumbnails; a click goes there."""

from __future__ import annotations

from functools import partial

from qtpy.QtCore import QSize, Qt
from qtpy.QtGui import QIcon, QPixmap
from qtpy.QtWidgets import QComboBox, QFormLayout, QGridLayout, QSpinBox, QToolButton

from napari_kaf import _explore_layers
from napari_kaf._exploration import Exploration
from napari_kaf._explore_lab import Network
from napari_kaf._similarity_task import Thumbnail, look_alikes_task
from napari_kaf.widgets._explore_view import PICK_FIRST, View, tell
from napari_kaf.widgets._panel import Life
from napari_kaf.widgets._pictures import grey_image
from napari_kaf.widgets._similarity_view import LEVELS

_SIDE = 84  # pixels of a thumbnail
_COLUMNS = 4


class LookAlikesView(View):
    """Finds look-alikes of a place."""

    key = "look-alikes"

    def __init__(self, life: Life, exploration: Exploration) -> None:
        super().__init__(life, exploration)
        form = QFormLayout()
        self.level = QComboBox()
        self.level.addItems([str(level) for level in LEVELS])
        self.level.setCurrentIndex(2)
        self.level.setToolTip("Encoder level whose features are compared: 1 is the finest, 4 the coarsest")
        self.count = QSpinBox()
        self.count.setRange(1, 40)
        self.count.setValue(11)
        self.count.setToolTip("How many places are shown at most, all of them in other slices")
        form.addRow("Level", self.level)
        form.addRow("At most", self.count)
        self.column.addLayout(form)
        self.thumbnails = QGridLayout()
        self.thumbnails.setSpacing(4)
        self.buttons: list[QToolButton] = []
        self.column.addLayout(self.thumbnails)
        self.finish()
        self.show_box.setVisible(False)  # the cross of the place is the panel's
        self.level.currentIndexChanged.connect(self.refresh)
        self.count.valueChanged.connect(self.refresh)
        life.listen(exploration.place_changed, self.refresh)

    def reason(self, network: Network) -> str:
        """Look-alikes need a place, and other slices."""
        assert self.exploration.opened is not None
        if self.exploration.opened.volume.num_slices < 2:
            return "The volume has a single slice, so there is no other to look in."
        return "" if self.exploration.place is not None else PICK_FIRST

    def ask(self) -> None:
        """Look in all other slices."""
        self.exploration.ask(
            self.key,
            "looking for similar places",
            look_alikes_task,
            self.exploration.place,
            int(self.level.currentText()),
            self.count.value(),
            on_done=self._found,
            on_failed=self.failed,
        )

    def clear(self) -> None:
        """Take the thumbnails away."""
        for button in self.buttons:
            self.thumbnails.removeWidget(button)
            button.deleteLater()
        self.buttons = []

    def _found(self, found: list[Thumbnail]) -> None:
        self.clear()
        for number, thumbnail in enumerate(found):
            button = QToolButton()
            pixmap = QPixmap.fromImage(grey_image(thumbnail.image))
            button.setIcon(QIcon(pixmap.scaled(_SIDE, _SIDE)))
            button.setIconSize(QSize(_SIDE, _SIDE))
            button.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextUnderIcon)
            z = round(thumbnail.place[0])
            button.setText(f"z {z}, {thumbnail.similarity:.3f}" if number else f"z {z}, the place")
            button.setToolTip(f"Go to slice {z}, similarity {thumbnail.similarity:.4f}")
            button.clicked.connect(partial(self._go, thumbnail))
            self.thumbnails.addWidget(button, number // _COLUMNS, number % _COLUMNS)
            self.buttons.append(button)
        others = found[1:]
        if not others:
            tell(self.status, "Nothing similar was found.")
            return
        slices = len({round(one.place[0]) for one in others})
        tell(
            self.status,
            f"{len(others)} places on {slices} slices, similarity {others[0].similarity:.3f} to "
            f"{others[-1].similarity:.3f}. Click one to go there.",
        )

    def _go(self, thumbnail: Thumbnail, *_: object) -> None:
        session = self.exploration.session
        if session.opened is not None:
            _explore_layers.look_at(session.viewer, session.opened, thumbnail.place)
            self.exploration.point_at(thumbnail.place)
