"""Memory that runs out while the window is open: smaller batches, then words, and everything stays usable."""

from __future__ import annotations

import pytest
import torch

from kaf_model import finetune as finetune_module
from kaf_model import segment as segment_module


@pytest.fixture
def room(monkeypatch) -> dict[str, int]:
    """How many slices fit the memory, in training and in segmenting; may be changed."""
    fits = {"training": 1000, "segmenting": 1000}
    forward, predict = finetune_module.FinetuningNetwork.forward, segment_module.predict_slices

    def limited_forward(self, batch):
        if len(batch.labels) > fits["training"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    def limited_predict(network, images, *arguments, **options):
        if len(images) > fits["segmenting"]:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)")
        return predict(network, images, *arguments, **options)

    monkeypatch.setattr(finetune_module.FinetuningNetwork, "forward", limited_forward)
    monkeypatch.setattr(segment_module, "predict_slices", limited_predict)
    return fits


def finish(panel, qtbot) -> None:
    qtbot.waitUntil(lambda: not panel.session.busy, timeout=300_000)


def test_smaller_batches_are_tried_and_said_once(labelled, qtbot, notifications, room):
    room.update(training=2, segmenting=3)
    _viewer, panel = labelled
    panel.training.row.button.click()
    finish(panel, qtbot)
    said = [text for text in notifications if text.startswith("memory ran out")]
    assert sorted(said) == [
        "memory ran out: each step now runs in 2 parts",
        "memory ran out: slices are now segmented 2 at a time",
    ]
    assert panel.session.results.labels is not None


def test_when_not_one_slice_fits_it_says_what_to_do_and_another_try_works(
    labelled, qtbot, notifications, room
):
    room.update(training=0)
    _viewer, panel = labelled
    panel.training.row.button.click()
    finish(panel, qtbot)
    assert "a single slice does not fit the memory of the device; use the device cpu" in notifications[-1]
    assert notifications[-1] in panel.training.row.status.text()
    assert not panel.session.results.runs
    room.update(training=1000)
    panel.training.row.button.click()
    finish(panel, qtbot)
    assert panel.session.results.labels is not None


def test_a_training_that_leaves_no_room_for_previews_goes_on_and_is_kept(
    labelled, qtbot, notifications, room
):
    room.update(segmenting=0)
    _viewer, panel = labelled
    panel.training.row.button.click()
    finish(panel, qtbot)
    assert "memory ran out: no more previews; the training goes on" in notifications
    assert "a single slice does not fit" in notifications[-1]
    (run,) = panel.session.results.runs
    assert run.steps == len(panel.training.curve.points("total"))
    room.update(segmenting=1000)
    panel.history.show_it.click()
    finish(panel, qtbot)
    assert panel.session.results.labels is not None
