"""The history of runs as files: what an interrupted training leaves is found, what is damaged is passed over."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kaf_model.checkpoint import Checkpoint, ClassLabel, save_checkpoint
from kaf_model.config import KeypointConfig, ModelConfig, SliceConfig
from kaf_model.errors import UserError
from napari_kaf._runs import RunStore

RECORD = {
    "stage": "finetuning",
    "date": "2026-01-02T03:04:05+00:00",
    "steps": 17,
    "seconds": 40.5,
    "held_out_dice": None,
    "device": "cpu",
    "labelled_slices": ["scan: a:2:complete", "scan: a:5:empty"],
}


@pytest.fixture
def store(plugin_home) -> RunStore:
    return RunStore("scan")


def train(store: RunStore) -> str:
    """What a training writes while it runs."""
    key = store.begin()
    checkpoint = Checkpoint(
        "segmentation",
        {"weight": torch.zeros(2)},
        ModelConfig(),
        SliceConfig(),
        KeypointConfig(),
        (ClassLabel(0, "background"), ClassLabel(1, "heart")),
        history=(RECORD,),
    )
    save_checkpoint(store.model_path(key), checkpoint)
    return key


def test_a_training_that_was_killed_is_listed_by_what_its_checkpoint_tells(store):
    key = train(store)
    assert store.runs() == []  # it may still run
    store.ended(key)  # as if another program looked
    (run,) = store.runs()
    assert (run.key, run.name, run.steps, run.stopped) == (key, "interrupted run", 17, True)
    assert run.labelled == {2: "complete", 5: "empty"}
    assert not store.has_result(run)
    with pytest.raises(UserError, match="before its result was made; Show makes it"):
        store.labels(run)


def test_an_interrupted_run_can_be_renamed_given_a_result_and_deleted(store):
    store.ended(train(store))
    run = store.rename(store.runs()[0], "mine")
    labels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    store.add(run, labels)
    assert store.runs() == [run]
    assert run == replace(run, name="mine")
    np.testing.assert_array_equal(store.labels(run), labels)
    store.delete(run)
    assert store.runs() == []
    assert list(store.folder.iterdir()) == []


def test_what_is_no_checkpoint_is_passed_over(store):
    key = train(store)
    store.ended(key)
    store.model_path(key).write_bytes(b"half")
    assert store.runs() == []
