"""Segmenting folder to folder keeps its hands off label maps that are already there."""

from types import SimpleNamespace

from kaf_model.phantom import write_cohort
from napari_kaf._segment_task import _Item, _read


def test_a_label_map_that_is_there_is_passed_over(tmp_path):
    (image, *_) = write_cohort(tmp_path, num_subjects=1, labelled=False, shape=(3, 48, 64))
    request = SimpleNamespace(output=tmp_path / "out", references=None)
    assert isinstance(_read(image, request), _Item)
    request.output.mkdir()
    (request.output / image.name).write_bytes(b"drawn")
    assert "passed over" in _read(image, request)
    assert (request.output / image.name).read_bytes() == b"drawn"
