"""The whole way in a real window, by mouse and keys only: label three slices, finetune, accept, export."""

from __future__ import annotations

import numpy as np
import pytest
from qtpy.QtCore import QEvent, QPointF, Qt, QTimer
from qtpy.QtGui import QMouseEvent
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication, QFileDialog, QLineEdit

pytestmark = [
    pytest.mark.real_window,
    # Raised by napari and its libraries while a window is shown, not by us.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
LEFT_HEART = (2, 3)  # myocardium and left ventricle of the sample, painted as one structure
MINUTES = "4"
ENOUGH_STEPS = (
    150  # a fast machine does not have to spend its minutes: a person stops when the preview looks right
)


class Hands:
    """Mouse and keyboard on napari's canvas."""

    def __init__(self, viewer) -> None:
        self.viewer = viewer
        self.canvas = viewer.window._qt_viewer.canvas.native

    def point(self, y: float, x: float) -> QPointF:
        """Where a pixel of the shown slice is on the canvas."""
        camera, layer = self.viewer.camera, self.viewer.layers[0]
        _z, world_y, world_x = layer.data_to_world((self.viewer.dims.current_step[0], y, x))
        middle_y, middle_x = camera.center[-2:]
        size = self.canvas.size()
        return QPointF(
            size.width() / 2 + (world_x - middle_x) * camera.zoom,
            size.height() / 2 + (world_y - middle_y) * camera.zoom,
        )

    def stroke(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press at one pixel, move to the other, let go."""
        first, last = self.point(*start), self.point(*end)
        self._mouse(QEvent.Type.MouseMove, first, held=False)
        self._mouse(QEvent.Type.MouseButtonPress, first, held=True)
        for part in (0.5, 1.0):
            QTest.qWait(20)  # the canvas passes over moves that come faster than it draws
            self._mouse(QEvent.Type.MouseMove, first + (last - first) * part, held=True)
        QTest.qWait(20)
        self._mouse(QEvent.Type.MouseButtonRelease, last, held=False)

    def _mouse(self, kind: QEvent.Type, at: QPointF, *, held: bool) -> None:
        left, none = Qt.MouseButton.LeftButton, Qt.MouseButton.NoButton
        event = QMouseEvent(
            kind,
            at,
            QPointF(self.canvas.mapToGlobal(at)),
            none if kind is QEvent.Type.MouseMove else left,
            left if held else none,
            Qt.KeyboardModifier.NoModifier,
        )
        QApplication.sendEvent(self.canvas, event)

    def paint(self, mask: np.ndarray) -> None:
        """Fill a mask (Y, X) with a one-pixel brush, row by row."""
        for y in np.flatnonzero(mask.any(axis=1)):
            padded = np.concatenate([[0], mask[y].astype(int), [0]])
            starts, ends = np.flatnonzero(np.diff(padded) == 1), np.flatnonzero(np.diff(padded) == -1) - 1
            for start, end in zip(starts, ends, strict=True):
                self.stroke((y, start), (y, end))

    def key(self, letter: str, modifier: Qt.KeyboardModifier = Qt.KeyboardModifier.NoModifier) -> None:
        """Press a key while the canvas has the focus."""
        self.canvas.setFocus()
        QTest.keyClick(self.canvas, letter, modifier)


def click(widget) -> None:
    """Click a button as a person does: scroll to it, then press it where it is."""
    area = widget.parentWidget()
    while area is not None and not hasattr(area, "ensureWidgetVisible"):
        area = area.parentWidget()
    area.ensureWidgetVisible(widget)
    QApplication.processEvents()
    assert widget.isEnabled(), f"{widget.text()} cannot be clicked"
    QTest.mouseClick(widget, Qt.MouseButton.LeftButton)


def test_label_finetune_accept_export(make_napari_viewer, qtbot, plugin_home, nothing_left, tmp_path):
    viewer = make_napari_viewer(show=True)
    viewer.window._qt_window.resize(1300, 900)
    viewer.open_sample("napari-kaf", "heart")
    _dock, panel = viewer.window.add_plugin_dock_widget("napari-kaf", "Finetune")
    image = viewer.layers[0]
    qtbot.waitUntil(lambda: panel.session.opened is not None, timeout=30_000)
    truth = np.isin(_truth(), LEFT_HEART)
    hands = Hands(viewer)

    click(panel.labels.new)
    assert panel.session.labels is viewer.layers.selection.active
    for _ in range(20):
        hands.key("[")  # the finest brush
    assert panel.session.labels.brush_size == 1
    shift = Qt.KeyboardModifier.ShiftModifier
    for z in (2, 4, 7):
        strip = panel.ledger.strip
        QTest.mouseClick(strip, Qt.MouseButton.LeftButton, pos=strip.cell_rect(z).center().toPoint())
        assert viewer.dims.current_step[0] == z
        qtbot.wait(50)
        hands.paint(truth[z])
        qtbot.waitUntil(lambda z=z: panel.session.ledger.states[z] == "partial", timeout=30_000)
        hands.key("C", shift)
        assert panel.session.ledger.states[z] == "complete"
    drawn = panel.session.labels.data.copy()
    assert _dice(drawn[[2, 4, 7]] == 1, truth[[2, 4, 7]]) > 0.97  # the hand was steady

    minutes = panel.training.form.minutes.lineEdit()
    panel.ensureWidgetVisible(panel.training.form.minutes)
    minutes.selectAll()
    QTest.keyClicks(minutes, MINUTES)
    QTest.keyClick(minutes, Qt.Key.Key_Return)
    click(panel.training.row.button)
    assert panel.training.row.button.text() == "Cancel"
    training = panel.training
    qtbot.waitUntil(
        lambda: len(training.curve.points("total")) >= ENOUGH_STEPS or not training.row.running,
        timeout=900_000,
    )
    if training.row.running:
        assert [layer for layer in viewer.layers if layer.name.endswith("preview")]
        click(training.row.button)
    qtbot.waitUntil(lambda: panel.session.results.labels is not None, timeout=120_000)
    assert np.array_equal(panel.session.labels.data, drawn)  # the result came in a layer of its own

    click(panel.result.accept_whole)
    assert panel.session.ledger.states[5] == "accepted"
    target = tmp_path / "exported.nii.gz"
    QTimer.singleShot(1000, lambda: _answer_dialog(str(target)))
    click(panel.result.export)
    assert "same grid as source" in panel.result.status.text()

    from kaf_model.volume import read_labels

    exported = read_labels(target, panel.session.opened.volume)
    assert exported.shape == image.data.shape
    dice = _dice(exported == 1, truth)
    print(f"Dice of the exported file: {dice:.3f} after {panel.session.results.shown.steps} steps")
    assert dice > 0.8


def _truth() -> np.ndarray:
    from kaf_model.phantom import make_heart
    from napari_kaf._sample_data import HEART_SEED

    return make_heart(HEART_SEED).labels


def _dice(ours: np.ndarray, theirs: np.ndarray) -> float:
    return 2 * np.count_nonzero(ours & theirs) / (np.count_nonzero(ours) + np.count_nonzero(theirs))


def _answer_dialog(name: str, tries: int = 20) -> None:
    """Name a file in the dialog; again, if it was not there yet, did not take it, or asks something else."""
    dialog = QApplication.activeModalWidget()
    if isinstance(dialog, QFileDialog):
        line = dialog.findChild(QLineEdit)
        line.completer().popup().hide()
        line.selectAll()
        QTest.keyClicks(line, name)
        line.completer().popup().hide()  # it would take the key, and may complete the name to another
        QTest.keyClick(line, Qt.Key.Key_Return)
        if not dialog.isVisible():
            return
    elif dialog is not None:
        dialog.close()
    if tries:
        QTimer.singleShot(1000, lambda: _answer_dialog(name, tries - 1))
