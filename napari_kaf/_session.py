"""What the widgets of one viewer share: volume, labels, classes, ledger, runs, and the job that is running.

No Qt: the widgets listen to the signals and call the methods; `poll` is called several times a second by
a timer of theirs, and turns what happened in the layers into states of the ledger and into saved files.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from psygnal import Signal

from kaf_model.errors import UserError
from napari_kaf import _layers
from napari_kaf._classes import FIRST_NAME, ClassEntry, default_color, entries_of, values_in
from napari_kaf._layer_watch import LayerWatch
from napari_kaf._ledger import Ledger
from napari_kaf._paint import PaintHistory, PaintWatch
from napari_kaf._recut import recut
from napari_kaf._results import Results
from napari_kaf._runs import RunStore
from napari_kaf._saved_work import SavedWork

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image, Labels


class Session:
    """State of the work in one viewer.

    Attributes:
        opened: The volume that is worked on.
        labels: The layer that is drawn on.
        classes: What is painted.
        ledger: What was said of each slice.
        paint: Watches the labels layer.
        results: Finetunings on this volume, and the result that is shown.
        saved: Its file beside the volume, and what can be restored from it.
        busy: What is running, in words, or nothing.
        unsaved: Why what is drawn cannot be saved at present, or nothing.
    """

    layers_changed = Signal()
    volume_changed = Signal()
    labels_changed = Signal()
    classes_changed = Signal()
    ledger_changed = Signal()
    runs_changed = Signal()
    offer_changed = Signal()
    busy_changed = Signal()
    unsaved_changed = Signal()
    told = Signal(str)
    warned = Signal(str)

    def __init__(self, viewer: ViewerModel) -> None:
        self._viewer = weakref.ref(viewer)
        self.opened: _layers.OpenVolume | None = None
        self.labels: Labels | None = None
        self.classes: list[ClassEntry] = []
        self.ledger = Ledger(0)
        self.paint: PaintWatch | None = None
        self.results = Results(self)
        self.saved = SavedWork(self)
        self.busy = ""
        self.unsaved = ""
        self._ledgers: weakref.WeakKeyDictionary[Labels, tuple[Ledger, list[ClassEntry]]]
        self._ledgers = weakref.WeakKeyDictionary()
        self._histories: weakref.WeakKeyDictionary[Labels, PaintHistory] = weakref.WeakKeyDictionary()
        self._watch = LayerWatch(self)

    @property
    def viewer(self) -> ViewerModel:
        """The viewer."""
        viewer = self._viewer()
        if viewer is None:
            raise RuntimeError("the viewer is closed")
        return viewer

    @property
    def alive(self) -> bool:
        """Whether the viewer is still there."""
        return self._viewer() is not None

    # --- volume and labels -------------------------------------------------------------------------------

    def choose_volume(self, layer: Image | None) -> None:
        """Work on another image layer, or on none.

        Raises:
            UserError: If it cannot be a volume; then none is chosen.
        """
        if self.opened is not None and layer is self.opened.layer:
            return
        self.save()
        self._leave_labels()
        self.opened = None
        self.saved.follow(None)
        self.results.follow(None)
        try:
            if layer is not None:
                self._open(layer)
        finally:
            self.volume_changed.emit()
            self.offer_changed.emit()
            self.runs_changed.emit()
            if self.opened is not None:
                present = _layers.own_labels(self.viewer, self.opened.layer)
                known = [layer for layer in present if _layers.claimed(layer) and layer in self._ledgers]
                self.choose_labels(next(iter(known or present), None))
                if known:  # what was saved is what is shown
                    self.saved.offer = None
                    self.offer_changed.emit()
            else:
                self.choose_labels(None)

    def works_on(self, opened: _layers.OpenVolume | None) -> bool:
        """Whether a volume that was opened before is the one that is worked on."""
        return self.opened is not None and opened is not None and self.opened.layer is opened.layer

    def give_spacing(self, spacing: Sequence[float]) -> None:
        """Take the voxel size, mm (z, y, x), of a volume of which it was not known."""
        assert self.opened is not None
        layer, old = self.opened.layer, self.opened.volume
        self.opened = _layers.open_volume(layer, spacing)
        _layers.carry_on(self.viewer, layer, old, self.opened.volume)
        self.saved.remember_spacing(spacing)
        self._changed()
        self.volume_changed.emit()

    def recut(self, slice_axis: int) -> None:
        """Cut the volume into slices along another stored axis; what is drawn on it is cut with it.

        Raises:
            UserError: While a task is running.
        """
        if self.busy:
            raise UserError(f"{self.busy} is running; wait for it or cancel it first")
        self.flush()
        recut(self, slice_axis)
        self.select_labels()
        self._changed()
        self.offer_changed.emit()
        self.told.emit("cut along another axis; strokes of before can no longer be undone")

    def remembered(self, layer: Labels, num_slices: int) -> tuple[Ledger, list[ClassEntry]]:
        """Ledger and classes of a label layer that was drawn on, or new ones."""
        return self._ledgers.get(layer) or (Ledger(num_slices), [])

    def take_over(self, layer: Labels, ledger: Ledger, classes: list[ClassEntry], *, chosen: bool) -> None:
        """Remember ledger and classes of a layer; a chosen one is drawn on and replaces the saved work."""
        self._ledgers[layer] = (ledger, classes)
        if chosen:
            self.choose_labels(layer)
            self.saved.offer = None
            self._changed()

    def choose_labels(self, layer: Labels | None) -> None:
        """Draw on another layer, or on none; its paint stays untrained on until it is marked.

        Once it is drawn on, or slices of it are marked, it is no other volume's.
        """
        if layer is not None and layer is self.labels:
            return
        self.save()
        self._leave_labels()
        self.labels = layer
        self.classes = []
        if layer is None:
            self._set_ledger(Ledger(0))
        else:
            if self.opened is not None:
                _layers.adopt(layer, self.opened)
            array = _layers.stack(layer)
            ledger, classes = self.remembered(layer, len(array))
            self._set_ledger(ledger)
            self.classes = classes or entries_of(_layers.class_names(layer), values_in(array))
            self._remember_ledger()
            _layers.set_classes(layer, self.classes)
            history = self._histories.setdefault(layer, PaintHistory())
            self.paint = PaintWatch(layer, history, self.ledger)
            self.show_predicted()
        self.labels_changed.emit()
        self.classes_changed.emit()
        self.ledger_changed.emit()

    def select_labels(self) -> None:
        """Let napari's tools paint on the layer that is drawn on."""
        if self.labels is not None:
            self.labels.visible = True
            self.viewer.layers.selection.active = self.labels

    def new_labels(self, classes: Sequence[ClassEntry] = ()) -> None:
        """Make a layer to draw on, with the classes of before, else the given ones, else one to begin with."""
        if self.opened is None:
            raise UserError("there is no volume to label; open one first")
        classes = self.classes or list(classes) or [ClassEntry(1, FIRST_NAME, default_color(1))]
        self.choose_labels(_layers.add_labels(self.viewer, self.opened, classes))

    # --- classes -----------------------------------------------------------------------------------------

    def set_classes(self, classes: Sequence[ClassEntry]) -> None:
        """Replace the list of classes: names, colours, added ones."""
        self.classes = sorted(classes, key=lambda entry: entry.value)
        if self.labels is not None:
            self._remember_ledger()
            _layers.set_classes(self.labels, self.classes)
        self._changed()
        self.classes_changed.emit()

    def pick_class(self, value: int) -> None:
        """Paint with a class from now on."""
        if self.labels is not None:
            self.labels.selected_label = value

    # --- ledger ------------------------------------------------------------------------------------------

    @property
    def slice(self) -> int:
        """The slice that is shown."""
        return _layers.current_slice(self.viewer, self.opened.layer) if self.opened else 0

    def go_to(self, z: int) -> None:
        """Show a slice."""
        if self.opened is not None:
            _layers.go_to(self.viewer, self.opened.layer, z)

    # --- saving ------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Take in what happened in the layers, and save what is due."""
        viewer = self._viewer()
        if viewer is not None:
            self._watch.look(viewer)
        if viewer is not None and self.paint is not None and self.paint.touched:
            self._compare_labels()
        if self.saved.autosave.due:
            self.saved.save()
        self.saved.autosave.go_on()
        for message in self.saved.autosave.messages():
            self.warned.emit(message)
        if self.unsaved != self.saved.autosave.problem:
            self.unsaved = self.saved.autosave.problem
            self.unsaved_changed.emit()

    def save(self) -> None:
        """Save now whatever is not saved, in the background."""
        if self.labels is not None and self._viewer() is not None:
            self._compare_labels()
        if self.saved.autosave.pending:
            self.saved.save()

    def flush(self) -> None:
        """Save now whatever is not saved, and wait for it."""
        self.save()
        self.saved.autosave.wait()

    def close(self) -> None:
        """Save, and let go of the layers."""
        self.flush()
        self._leave_labels()
        self.opened = None

    def set_busy(self, what: str) -> None:
        """Say what is running; nothing when it ended."""
        self.busy = what
        self.busy_changed.emit()

    # --- inside ------------------------------------------------------------------------------------------

    def _open(self, layer: Image) -> None:
        self.opened = _layers.open_volume(layer)
        self.saved.follow(self.opened)
        given = self.saved.spacing
        if given and not self.opened.spacing_known:
            self.saved.remember_spacing(given)
            self.opened = _layers.open_volume(layer, given)
        self.results.follow(RunStore(f"{self.saved.volume_key}-{self.opened.volume.source.axes[0]}"))

    def _remember_ledger(self) -> None:
        assert self.labels is not None
        self._ledgers[self.labels] = (self.ledger, list(self.classes))

    def _set_ledger(self, ledger: Ledger) -> None:
        self.ledger.changed.disconnect(missing_ok=True)
        self.ledger = ledger
        ledger.changed.connect(self._ledger_changed)

    def _ledger_changed(self) -> None:
        self._changed()
        self.ledger_changed.emit()

    def show_predicted(self) -> None:
        """Tell the ledger where the shown result has something, without this counting as a change to save."""
        found = self.results.predicted() if len(self.ledger) else []
        self.ledger.changed.disconnect(self._ledger_changed)
        self.ledger.set_predicted(found)
        self.ledger.changed.connect(self._ledger_changed)
        self.ledger_changed.emit()

    def _leave_labels(self) -> None:
        if self.paint is not None:
            self.paint.stop()
        self.paint, self.labels = None, None
        self.saved.autosave.forget_changes()

    def _changed(self) -> None:
        if self.labels is not None:
            self.saved.autosave.changed()
            if self.opened is not None:
                _layers.claim(self.labels, self.opened.layer)

    def _compare_labels(self) -> None:
        """Find the slices whose paint changed, and what that makes of them."""
        assert self.labels is not None
        assert self.paint is not None
        array = _layers.stack(self.labels)
        if self.opened is not None and array.shape != self.opened.volume.shape:
            layer = self.labels
            self._leave_labels()
            self.warned.emit(
                f"{layer.name} no longer has the shape of the volume; choose another label layer"
            )
            self.choose_labels(None)
            return
        shown = self.slice if _layers.shows_slices(self.viewer, self.labels) else None
        changed = self.paint.note_changes(self.ledger, shown)
        if changed:
            self._changed()
            known = {entry.value for entry in self.classes}
            new = values_in(array[changed]) - known
            if new:
                self.set_classes([*self.classes, *entries_of({}, new)])


_sessions: weakref.WeakKeyDictionary[Any, Session] = weakref.WeakKeyDictionary()


def session_for(viewer: Any) -> Session:
    """Return the session of a viewer; the first call makes it. A plugin's proxy of a viewer is looked through."""
    viewer = getattr(viewer, "__wrapped__", viewer)
    if viewer not in _sessions:
        _sessions[viewer] = Session(viewer)
    return _sessions[viewer]
