"""Reading, writing and samples, without a viewer."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from kaf_model.errors import UserError
from kaf_model.volume import Volume, read_volume, write_labels
from napari_kaf import _writer
from napari_kaf._layers import KEY
from napari_kaf._reader import get_reader, read_layers
from napari_kaf._sample_data import write_samples
from napari_kaf._writer import write_and_compare, write_labels_layer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def oblique(tmp_path: Path) -> Path:
    """A volume (x, y, z) = (6, 5, 4), turned by 20 degrees, thick along its third axis."""
    turn = np.deg2rad(20)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([1.5, 2.0, 8.0])
    image = nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(6, 5, 4) * 7, affine)
    path = tmp_path / "scan.nii.gz"
    nib.save(image, path)
    return path


def test_a_volume_opens_in_millimetres_along_its_slice_axis(oblique):
    ((array, arguments, kind),) = get_reader(str(oblique))(str(oblique))
    assert kind == "image"
    assert array.shape == (4, 5, 6)
    np.testing.assert_allclose(arguments["scale"], (8.0, 2.0, 1.5), rtol=1e-6)
    assert arguments["units"] == ("mm", "mm", "mm")
    assert arguments["axis_labels"] == ("S", "P", "L")
    assert "oblique" in arguments["metadata"][KEY]["volume"].notices[0]


def test_a_label_file_opens_as_labels_with_its_names(oblique, tmp_path):
    volume = read_volume(oblique)
    labels = np.zeros(volume.shape, np.uint8)
    labels[1, 2, 3] = 2
    folder = tmp_path / "labels"
    folder.mkdir()
    write_labels(folder / "scan.nii.gz", labels, volume)
    (folder / "labels.json").write_text('{"0": "background", "2": "valve"}')
    ((array, arguments, kind),) = read_layers(str(folder / "scan.nii.gz"))
    assert kind == "labels"
    np.testing.assert_array_equal(array, labels)
    assert arguments["metadata"][KEY]["classes"] == {2: "valve"}


def test_labels_are_written_on_the_grid_of_the_file(oblique, tmp_path):
    ((array, arguments, _kind),) = read_layers(str(oblique))
    labels = np.zeros(array.shape, np.uint8)
    labels[0, 4, 1] = 3
    target = tmp_path / "out.nii.gz"
    assert write_labels_layer(str(target), labels, {**arguments, "name": "mine"}) == [str(target)]
    written, source = nib.load(target), nib.load(oblique)
    np.testing.assert_allclose(written.affine, source.affine)
    np.testing.assert_array_equal(
        np.argwhere(np.asarray(written.dataobj)), [_stored_place(oblique, (0, 4, 1))]
    )


def test_what_cannot_be_written_is_said_not_raised(oblique, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("napari.utils.notifications.show_error", said.append)
    ((array, arguments, _kind),) = read_layers(str(oblique))
    assert write_labels_layer(str(tmp_path / "out.txt"), array * 0, arguments) == []
    assert len(said) == 1
    assert ".nii" in said[0]


def test_a_changed_grid_and_changed_labels_are_told(oblique, tmp_path, monkeypatch):
    volume = read_volume(oblique)
    other = Volume.from_array(volume.array, volume.spacing)
    target, labels = tmp_path / "out.nii.gz", volume.array * 0
    assert write_and_compare(target, labels, volume) == []
    monkeypatch.setattr(_writer, "write_labels", lambda path, values, _: write_labels(path, values, other))
    assert any("mm away" in told for told in write_and_compare(target, labels, volume))
    monkeypatch.setattr(
        _writer, "write_labels", lambda path, values, like: write_labels(path, values + 1, like)
    )
    (told,) = write_and_compare(target, labels, volume)
    assert told == "the labels that were read back differ from those that were written"


def test_a_folder_opens_whole_and_an_unreadable_file_is_passed_over(oblique, tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"no gzip")
    layers = get_reader(str(tmp_path))(str(tmp_path))
    assert [arguments["name"] for _, arguments, _ in layers] == ["scan"]


def test_nothing_readable_says_why(tmp_path):
    path = tmp_path / "broken.nii.gz"
    path.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot be read"):
        read_layers(str(path))
    assert get_reader(str(tmp_path / "photo.png")) is None


def test_of_several_frames_the_first_is_shown(tmp_path):
    frames = np.random.default_rng(0).integers(0, 900, (6, 5, 4, 3)).astype(np.int16)
    path = tmp_path / "cine.nii.gz"
    nib.save(nib.Nifti1Image(frames, np.diag([-1.0, -1, 8, 1])), path)
    ((array, arguments, _kind),) = read_layers(str(path))
    np.testing.assert_array_equal(array, frames[..., 0].transpose(2, 1, 0))
    assert arguments["metadata"][KEY]["frames"] == 3


def test_the_sample_files_are_those_of_the_menu(tmp_path):
    write_samples(tmp_path)
    kept = sorted(path.relative_to(ROOT / "sample_data") for path in (ROOT / "sample_data").rglob("*.nii.gz"))
    assert len(kept) == 6
    for path in kept:
        ours, theirs = nib.load(ROOT / "sample_data" / path), nib.load(tmp_path / path)
        kept_voxels, made = (np.asarray(file.dataobj).astype(int) for file in (ours, theirs))
        rounding = 1 if "images" in path.parts else 0  # processors round exponentials differently
        assert np.abs(kept_voxels - made).max() <= rounding
        np.testing.assert_array_equal(ours.affine, theirs.affine)


def _stored_place(path: Path, place: tuple[int, int, int]) -> list[int]:
    volume = read_volume(path)
    mark = np.zeros(volume.shape, np.uint8)
    mark[place] = 1
    return np.argwhere(volume.to_stored(mark))[0].tolist()
