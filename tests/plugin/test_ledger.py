"""The ledger and its file."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kaf_model.errors import UserError
from napari_kaf._classes import ClassEntry
from napari_kaf._ledger import Cell, Ledger
from napari_kaf._recut import recut_states
from napari_kaf._sidecar import Sidecar, Snapshot, new_owner

CLASSES = (ClassEntry(1, "left ventricle", (0.9, 0.6, 0.0, 1.0)),)


def test_painting_makes_partial_and_erasing_untouched():
    assert Ledger(3).after_paint(1, True) is Cell.PARTIAL
    assert Ledger(3, [Cell.PARTIAL] * 3).after_paint(1, False) is Cell.UNTOUCHED


def test_painting_leaves_a_complete_slice_complete_and_completes_an_accepted_one():
    ledger = Ledger(2, [Cell.COMPLETE, Cell.ACCEPTED])
    assert ledger.after_paint(0, True) is Cell.COMPLETE
    assert ledger.after_paint(1, True) is Cell.COMPLETE
    assert ledger.after_paint(1, False) is Cell.UNTOUCHED  # erased altogether: nothing was said of it


def test_many_slices_change_at_once():
    ledger, told = Ledger(600), []
    ledger.changed.connect(lambda: told.append(ledger.states))
    ledger.restate(dict.fromkeys(range(600), Cell.ACCEPTED))
    ledger.restate(dict.fromkeys(range(600), Cell.ACCEPTED))
    assert told == [(Cell.ACCEPTED,) * 600]


def test_only_what_the_user_marked_is_trained_on():
    ledger = Ledger(6, [*list(Cell)[:4], Cell.UNTOUCHED, Cell.ACCEPTED])
    ledger.set_predicted([0, 4])
    assert ledger.training() == {1: "partial", 2: "complete", 3: "empty"}
    assert ledger.cell(4) is Cell.PREDICTED
    assert ledger.states[4] is Cell.UNTOUCHED


def test_engine_and_ledger_use_the_same_words():
    from kaf_model.labels import SliceStatus

    assert {str(status) for status in SliceStatus} == {"partial", "complete", "empty"}
    assert {
        SliceStatus(value) for value in Ledger(3, ["partial", "complete", "empty"]).training().values()
    } == set(SliceStatus)


def test_stepping_finds_the_next_labelled_slice():
    ledger = Ledger(6)
    ledger.mark([1, 4], Cell.COMPLETE)
    assert ledger.labelled_after(1, 1) == 4
    assert ledger.labelled_after(4, -1) == 1
    assert ledger.labelled_after(4, 1) is None


@pytest.fixture
def voxels() -> np.ndarray:
    return np.arange(24, dtype=np.int16).reshape(2, 3, 4)


@pytest.fixture
def snapshot(voxels) -> Snapshot:
    return Snapshot((voxels % 2).astype(np.uint8), (Cell.COMPLETE, Cell.UNTOUCHED), CLASSES, (8.0, 1.5, 1.5))


def test_saved_work_comes_back_whole(tmp_path, plugin_home, voxels, snapshot):
    source = tmp_path / "scan.nii.gz"
    path = Sidecar(source, "scan", voxels).save(snapshot).path
    assert path == tmp_path / "scan.kaf-labels.npz"
    back = Sidecar(source, "scan", voxels).load()
    np.testing.assert_array_equal(back.labels, snapshot.labels)
    assert (back.states, back.classes, back.spacing) == (snapshot.states, CLASSES, (8.0, 1.5, 1.5))
    assert back.saved


def test_another_volume_of_the_same_name_is_not_offered_it(tmp_path, plugin_home, voxels, snapshot):
    Sidecar(tmp_path / "scan.nii.gz", "scan", voxels).save(snapshot)
    changed = Sidecar(tmp_path / "scan.nii.gz", "scan", voxels + 1)
    assert changed.load() is None
    assert changed.of_other_voxels() == tmp_path / "scan.kaf-labels.npz"
    assert Sidecar(tmp_path / "scan.nii.gz", "scan", voxels).of_other_voxels() is None


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, plugin_home, voxels, snapshot, monkeypatch):
    sidecar = Sidecar(tmp_path / "scan.nii.gz", "scan", voxels)
    path = sidecar.save(snapshot).path
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez_compressed", _half_a_file)
    with pytest.raises(KeyboardInterrupt):
        sidecar.save(snapshot)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_file()) == ["scan.kaf-labels.npz"]


def test_a_folder_that_cannot_be_written_is_passed_over(tmp_path, plugin_home, voxels, snapshot):
    (tmp_path / "file").write_text("no folder")
    sidecar = Sidecar(tmp_path / "file" / "scan.nii.gz", "scan", voxels)
    path = sidecar.save(snapshot).path
    assert path.parent == plugin_home / "labels"
    assert sidecar.load() is not None


def test_a_folder_that_can_no_longer_be_reached_is_passed_over(
    tmp_path, plugin_home, voxels, snapshot, monkeypatch
):
    sidecar = Sidecar(tmp_path / "share" / "scan.nii.gz", "scan", voxels)
    sidecar.save(snapshot)
    for name in ("is_file", "mkdir", "glob"):
        monkeypatch.setattr(Path, name, _lost(getattr(Path, name), tmp_path / "share"))
    path = sidecar.save(snapshot).path
    assert path.parent == plugin_home / "labels"
    np.testing.assert_array_equal(sidecar.load().labels, snapshot.labels)


def _lost(real, folder):
    def call(path, *arguments, **options):
        if folder in (path, path.parent):
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **options)

    return call


def test_declined_work_is_kept_under_another_name(tmp_path, plugin_home, voxels, snapshot):
    sidecar = Sidecar(tmp_path / "scan.nii.gz", "scan", voxels)
    path = sidecar.save(snapshot).path
    sidecar.decline(sidecar.load().saved)
    assert not path.is_file()
    assert len(list(tmp_path.glob("scan.declined-*.npz"))) == 1
    assert sidecar.load() is None


def test_volumes_of_one_name_keep_their_work_apart(tmp_path, plugin_home, voxels, snapshot):
    one, other = (Sidecar(tmp_path / "scan.nii.gz", "scan", array) for array in (voxels, voxels + 1))
    for sidecar, owner, value in ((one, "a", 1), (other, "b", 2), (one, "a", 3)):
        sidecar.save(replace(snapshot, labels=np.full_like(snapshot.labels, value), owner=owner))
    assert len(list(tmp_path.glob("*.npz"))) == 2
    assert [sidecar.load().labels.max() for sidecar in (one, other)] == [3, 2]


def test_what_somebody_else_saved_is_set_aside(tmp_path, plugin_home, voxels, snapshot):
    sidecar = Sidecar(tmp_path / "scan.nii.gz", "scan", voxels)
    one, other = (replace(snapshot, owner=new_owner()) for _ in range(2))
    assert sidecar.save(one).set_aside is None
    assert sidecar.save(one).set_aside is None
    kept = sidecar.save(other).set_aside
    assert kept == tmp_path / f"scan.{one.owner}.kaf-labels.npz"
    assert sidecar.load().owner == other.owner
    assert sidecar.save(one).set_aside == tmp_path / f"scan.{other.owner}.kaf-labels.npz"


def test_restored_work_is_replaced_and_not_what_was_saved_since(tmp_path, plugin_home, voxels, snapshot):
    sidecar = Sidecar(tmp_path / "scan.nii.gz", "scan", voxels)
    sidecar.save(replace(snapshot, owner=new_owner()))
    offer = sidecar.load()
    one, other = (replace(snapshot, owner=new_owner()) for _ in range(2))
    assert sidecar.save(one, offer.version).set_aside is None
    assert sidecar.save(other, offer.version).set_aside is not None


def test_work_that_was_set_aside_is_offered_where_there_is_nothing_else(
    tmp_path, plugin_home, voxels, snapshot
):
    sidecar = Sidecar(tmp_path / "scan.nii.gz", "scan", voxels)
    owners = [new_owner() for _ in range(3)]
    *_, last = [sidecar.save(replace(snapshot, owner=owner)) for owner in owners]
    last.path.write_bytes(Sidecar(None, "other", voxels + 1).save(snapshot).path.read_bytes())
    assert sidecar.load().owner == owners[1]
    last.path.unlink()
    assert sidecar.load().owner == owners[1]
    sidecar.decline(sidecar.load().saved)
    assert sidecar.load() is None


def test_a_file_without_owner_is_offered_and_set_aside(tmp_path, plugin_home, voxels, snapshot):
    sidecar = Sidecar(tmp_path / "scan.nii.gz", "scan", voxels)
    path = sidecar.save(snapshot).path
    with np.load(path) as content:
        labels, header = content["labels"], json.loads(str(content["header"]))
    del header["owner"]
    np.savez_compressed(path, labels=labels, header=np.array(json.dumps(header)))
    assert sidecar.load().owner == ""
    kept = sidecar.save(replace(snapshot, owner=new_owner())).set_aside
    path.unlink()
    assert kept.is_file()
    assert sidecar.load().saved == header["saved"]


def test_a_damaged_file_is_named_and_left(tmp_path, plugin_home, voxels):
    path = tmp_path / "scan.kaf-labels.npz"
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"scan\.kaf-labels\.npz .* damaged"):
        Sidecar(tmp_path / "scan.nii.gz", "scan", voxels).load()
    assert path.read_bytes() == b"damaged"


def _half_a_file(file, **_arrays) -> None:
    file.write(b"half")
    os.fsync(file.fileno())
    raise KeyboardInterrupt


def test_paths_are_made(tmp_path: Path, plugin_home, voxels, snapshot):
    path = Sidecar(None, "an array/with odd: name", voxels).save(snapshot).path
    assert path.is_relative_to(plugin_home)


def test_a_recut_ledger_says_no_more_than_was_known():
    labels = np.zeros((3, 2, 4), np.uint8)
    labels[0, 1] = labels[1, 0] = 1
    accepted = np.zeros(labels.shape, bool)
    accepted[:, 0] = True
    states = (Cell.ACCEPTED, Cell.COMPLETE)
    assert recut_states(states, labels, accepted) == (Cell.PARTIAL, Cell.ACCEPTED, Cell.UNTOUCHED)
    finished = (Cell.EMPTY, Cell.COMPLETE)
    assert recut_states(finished, labels, ~accepted & accepted) == (Cell.COMPLETE, Cell.COMPLETE, Cell.EMPTY)
