"""What a keypoint attends to in the KAF layers: arrows, or a heat map over the keypoints."""

from __future__ import annotations

from typing import Any

import numpy as np
from qtpy.QtWidgets import QComboBox, QFormLayout, QSpinBox

from napari_kaf import _explore_layers
from napari_kaf._exploration import Exploration
from napari_kaf._explore_lab import Network
from napari_kaf._explore_task import AttentionRow, attention_task
from napari_kaf.widgets._explore_view import PICK_FIRST, View, tell
from napari_kaf.widgets._panel import Life
from napari_kaf.widgets._pictures import HEAT, colors_of

_ARROWS, _HEAT, _BOTH = range(3)
_POINT = 5.0  # mm across
_CHOSEN = np.array([0.35, 0.86, 1.0, 1.0])


class AttentionView(View):
    """Looks up one row of an attention matrix."""

    key = "attention"
    parts = ("attention", "attention arrows")

    def __init__(self, life: Life, exploration: Exploration) -> None:
        super().__init__(life, exploration)
        self._row: AttentionRow | None = None
        self._blocks: dict[int, int] = {}
        form = QFormLayout()
        self.level = QComboBox()
        self.level.setToolTip("Encoder levels that have a KAF layer, 1 the finest")
        self.block = QComboBox()
        self.block.setToolTip("Attention block of the level's KAF layer, the first one reads the features")
        self.head = QComboBox()
        self.head.setToolTip("One head, or the mean of all")
        self.style_box = QComboBox()
        self.style_box.addItems(["arrows", "a heat map", "both"])
        self.style_box.setCurrentIndex(_BOTH)
        self.style_box.setToolTip("Arrows to the strongest, or every keypoint coloured by its share")
        self.strongest = QSpinBox()
        self.strongest.setRange(1, 1000)
        self.strongest.setValue(12)
        self.strongest.setToolTip("How many arrows are drawn")
        form.addRow("Level", self.level)
        form.addRow("Block", self.block)
        form.addRow("Head", self.head)
        form.addRow("Show as", self.style_box)
        form.addRow("Arrows", self.strongest)
        self.column.addLayout(form)
        self.finish()
        self.level.activated.connect(self._level_chosen)
        for box in (self.block, self.head):
            box.activated.connect(self.refresh)
        self.style_box.currentIndexChanged.connect(self._draw)
        self.strongest.valueChanged.connect(self._draw)
        life.listen(exploration.place_changed, self.refresh)

    def reason(self, network: Network) -> str:
        """Attention needs KAF layers with blocks, and a place."""
        if not network.blocks:
            return "This network has no KAF layers, so no keypoint attends to another; choose a KAF-UNet."
        if not self._blocks:
            return "The KAF layers of this network have no attention blocks, so there is nothing to show."
        if self.exploration.place is None:
            return f"{PICK_FIRST} The nearest keypoint is taken."
        return ""

    def adopt(self, network: Network) -> None:
        """Offer the levels, blocks and heads there are; what was chosen stays where it still is."""
        self._blocks = {level: blocks for level, blocks in network.blocks.items() if blocks}
        _offer(self.level, [str(level) for level in self._blocks])
        _offer(self.head, ["mean of all", *(str(head + 1) for head in range(network.heads))])
        self._offer_blocks()
        for box in (self.level, self.block, self.head):
            box.setEnabled(bool(self._blocks))

    def ask(self) -> None:
        """Look the row up."""
        head = self.head.currentIndex() - 1
        self.exploration.ask(
            self.key,
            "looking up attention",
            attention_task,
            self.exploration.place,
            int(self.level.currentText()),
            self.block.currentIndex(),
            head if head >= 0 else None,
            on_done=self._found,
            on_failed=self.failed,
        )

    def clear(self) -> None:
        """Forget the row."""
        self._row = None

    def _found(self, row: AttentionRow) -> None:
        self._row = row
        self._draw()
        order = np.argsort(-row.weights)
        half = int(np.searchsorted(np.cumsum(row.weights[order]), 0.5)) + 1
        tell(
            self.status,
            f"Keypoint {row.chosen + 1} of {len(row.weights)} on slice {row.z}, {row.distance:.1f} mm from the "
            f"place. Half of its attention goes to {half} keypoints; the most to one is "
            f"{row.weights.max():.1%}, to itself {row.weights[row.chosen]:.1%}; even attention would be "
            f"{1 / len(row.weights):.1%}.",
        )

    def _draw(self, *_: Any) -> None:
        row, session = self._row, self.exploration.session
        if row is None or session.opened is None or not self.on_canvas:
            return
        style = self.style_box.currentIndex()
        limits = (0.0, float(row.weights.max()))
        colors = colors_of(row.weights, limits, HEAT)
        size = _POINT / float(np.sqrt(np.prod(session.opened.volume.spacing[1:])))
        if style in (_HEAT, _BOTH):
            sizes = size * (0.6 + 0.8 * row.weights / limits[1])
            colors[row.chosen] = _CHOSEN
            _explore_layers.show_points(
                session.viewer,
                session.opened,
                "attention",
                row.voxels,
                sizes=sizes,
                colors=colors,
                symbol="disc",
                features={"weight": row.weights},
            )
        else:
            self.exploration.remove_layers(("attention",))
        if style in (_ARROWS, _BOTH):
            to = np.argsort(-row.weights)
            to = to[to != row.chosen][: self.strongest.value()]
            start = np.repeat(row.voxels[row.chosen][None], len(to), axis=0)
            _explore_layers.show_arrows(
                session.viewer,
                session.opened,
                "attention arrows",
                start,
                row.voxels[to] - start,
                colors=colors_of(row.weights[to], limits, HEAT),
                width=size / 5,
                style="arrow",
            )
        else:
            self.exploration.remove_layers(("attention arrows",))

    def _level_chosen(self, *_: Any) -> None:
        self._offer_blocks()
        self.refresh()

    def _offer_blocks(self) -> None:
        level = self.level.currentText()
        _offer(self.block, [str(block + 1) for block in range(self._blocks[int(level)] if level else 0)])


def _offer(box: QComboBox, texts: list[str]) -> None:
    """Fill a box without a signal; the text that was chosen stays chosen."""
    before = box.currentText()
    box.blockSignals(True)
    box.clear()
    box.addItems(texts)
    box.setCurrentIndex(max(box.findText(before), 0 if texts else -1))
    box.blockSignals(False)
