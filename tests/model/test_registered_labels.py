"""Labels that come by registration: which volumes get some, what the model is still asked, and interruptions."""

import itertools
import sys

import numpy as np
import pytest
import torch
from atlas_cases import CLASSES, CONFIG, subject, whole

from kaf_model import pseudo_labels
from kaf_model.atlases import Atlases
from kaf_model.config import AugmentConfig, FinetuneConfig, ModelConfig, PseudoLabelConfig
from kaf_model.finetune import finetune
from kaf_model.pseudo_labels import PseudoLabels, prepare_unlabelled

finetune_module = sys.modules[finetune.__module__]
CPU = torch.device("cpu")
SETTINGS = PseudoLabelConfig(slices=18, confidence=0.8, least_slices=1)
FITTING = [whole(*subject()), whole(*subject((1, -2, 1), name="w"))]
STRANGE = [whole(*subject()), whole(*subject((4, 5, 5), seed=1, name="w"))]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Registered in a few steps: these images lie near to each other."""
    monkeypatch.setattr("kaf_model.registration._AFFINE_STEPS", 25)
    monkeypatch.setattr("kaf_model.registration._LEVELS", ((2, 4, 5), (1, 2, 2)))


def finish(work):
    reports = []
    while True:
        try:
            reports.append(next(work))
        except StopIteration as end:
            return reports, end.value


def unlabelled(*moves, **options):
    return [subject(move, name=f"u{number}", **options)[0] for number, move in enumerate(moves)]


def labels_of(cases, volumes, config=SETTINGS):
    """The pseudo-labels of volumes, and the atlases."""
    work = prepare_unlabelled(cases, volumes, CLASSES, CONFIG, None, config)
    pseudo = PseudoLabels(finish(work)[1], CLASSES, config, one_piece=frozenset(), seed=0)
    return pseudo, Atlases(cases, CLASSES, CONFIG, most=3)


def registered(cases, volumes, config=SETTINGS):
    """The pseudo-labels of volumes after registration, and its reports."""
    pseudo, atlases = labels_of(cases, volumes, config)
    return pseudo, finish(pseudo.register(atlases))[0]


def predicted(asked, channel=0):
    """A network's stand-in, which is sure of one channel everywhere and counts the slices that it is asked about."""

    def predict(network, images, positions, device):
        asked.append(len(images))
        maps = torch.zeros(len(images), 3, *images.shape[-2:])
        maps[:, channel] = 1
        return maps

    return predict


def test_volumes_are_labelled_before_the_first_step():
    pseudo, reports = registered(FITTING, unlabelled((1, 1, 0)))
    assert reports[0].stage == "comparing labelled volumes"
    assert (reports[-1].stage, reports[-1].step, reports[-1].total) == ("labelling by registration", 1, 1)
    (told,) = [report.message for report in reports if report.message]
    assert f"agree to a Dice of {pseudo.agreement:.2f}: enough to label others by them" in told
    found = np.stack([item.labels for item in pseudo.slices])
    truth = np.searchsorted([0, 4, 7], subject((1, 1, 0))[1])
    assert found.shape == truth.shape
    assert (found == truth)[truth > 0].mean() > 0.95
    assert (found == truth).mean() > 0.98


def test_the_model_is_not_asked_about_what_can_be_registered():
    config = SETTINGS.override(registered=1)
    pseudo, _ = registered(FITTING, unlabelled((1, 1, 0), (0, 1, 1)), config)
    assert len(pseudo.slices) == 18  # as many volumes as was asked for
    assert not pseudo.is_due(0.5, 1.0)


def test_the_model_is_asked_about_what_is_out_of_reach(monkeypatch):
    asked = []
    monkeypatch.setattr(pseudo_labels, "predict_slices", predicted(asked))
    volumes = [*unlabelled((1, 1, 0)), *unlabelled((1, 1, 0), spacing=(3, 1, 1))]
    pseudo, _ = registered(FITTING, volumes, SETTINGS.override(slices=100, least_found=0))
    before = [item.labels for item in pseudo.slices]
    assert len(before) == 18
    assert not pseudo.is_due(0.5, 0.0)
    assert pseudo.is_due(0.5, 1.0)
    for fraction in (0.5, 0.7):
        finish(pseudo.renew(None, CPU, fraction))
        assert len(pseudo.slices) == 36
        assert all(np.array_equal(a, b.labels) for a, b in zip(before, pseudo.slices[:18], strict=True))
    assert sum(asked) == 2 * 18


def test_volumes_that_do_not_fit_each_other_are_not_used(monkeypatch):
    asked = []
    monkeypatch.setattr(pseudo_labels, "predict_slices", predicted(asked, channel=1))
    pseudo, reports = registered(STRANGE, unlabelled((1, 1, 0)))
    assert "too little to label others by them" in reports[-1].message
    assert pseudo.agreement is None
    assert not pseudo.slices
    assert pseudo.is_due(0.25, 1.0)
    finish(pseudo.renew(None, CPU, 0.25))
    assert all((item.labels == 1).all() for item in pseudo.slices)


@pytest.mark.parametrize(
    ("cases", "volumes", "config"),
    [
        (FITTING[:1], unlabelled((1, 1, 0)), SETTINGS),
        (FITTING, unlabelled((1, 1, 0), spacing=(3, 1, 1)), SETTINGS),
        (FITTING, [], SETTINGS),
        (FITTING, unlabelled((1, 1, 0)), SETTINGS.override(registered=0)),
    ],
    ids=["one atlas", "slices far apart", "nothing to label", "not wanted"],
)
def test_otherwise_nothing_changes(cases, volumes, config):
    pseudo, reports = registered(cases, volumes, config)
    assert not reports
    assert pseudo.agreement is None
    assert not pseudo.slices
    assert pseudo.is_due(0.25, 1.0) is bool(volumes)


def test_when_it_is_closed_what_is_done_stays():
    pseudo, atlases = labels_of(FITTING, unlabelled((1, 1, 0), (0, 1, 1)))
    for report in pseudo.register(atlases):
        if (report.stage, report.step) == ("labelling by registration", 1):
            break
    assert len(pseudo.slices) == 18


def test_a_volume_without_the_structures_teaches_nothing(monkeypatch):
    monkeypatch.setattr(Atlases, "carry", lambda *given: iter(()))
    pseudo, _ = registered(FITTING, unlabelled((1, 1, 0)))
    assert not pseudo.slices


def test_the_state_brings_back_what_was_registered():
    volumes = unlabelled((1, 1, 0), (0, 1, 1))
    first, _ = registered(FITTING, volumes)
    second, _ = labels_of(FITTING, volumes)
    second.load(first.state())
    assert second.agreement == first.agreement
    assert len(second.slices) == 36
    assert all(np.array_equal(a.labels, b.labels) for a, b in zip(first.slices, second.slices, strict=True))
    assert not second.is_due(0.5, 1.0)
    third, fourth = (registered(STRANGE, volumes)[0], labels_of(STRANGE, volumes)[0])
    fourth.load(third.state())
    assert fourth.is_due(0.5, 1.0)


TRAINING = FinetuneConfig(
    steps=5,
    batch_size=4,
    pseudo_labels=SETTINGS,
    augment=AugmentConfig(crop=(16, 16)),
    early_crop=None,
)
NARROW = ModelConfig(architecture="unet", start_channels=4)


def finetuned(steps=None, training=TRAINING, **options):
    options = {"unlabelled": unlabelled((1, 1, 0), (0, 1, 1)), "slices": CONFIG, "device": "cpu", **options}
    work = finetune(NARROW, FITTING, training, **options)
    if steps is None:
        return finish(work)
    reports = []
    for report in work:
        reports.append(report)
        if report.losses and report.step == steps:
            break
    work.close()
    return reports, None


def test_a_finetuning_learns_from_registered_volumes_from_the_first_step():
    reports, result = finetuned()
    stages = [report.stage for report in reports]
    assert stages.index("labelling by registration") < stages.index("finetuning")
    assert result.model.history[-1]["registration_dice"] > 0.9
    _, without = finetuned(training=TRAINING.override(pseudo_labels=SETTINGS.override(registered=0)))
    assert without.model.history[-1]["registration_dice"] is None
    assert without.curve[0] != result.curve[0]


def test_a_resumed_finetuning_with_registered_volumes_is_the_uninterrupted_one(tmp_path):
    _, whole_run = finetuned()
    output = tmp_path / "m.safetensors"
    finetuned(steps=2, output=output)
    _, resumed = finetuned(output=output, resume=True)
    assert resumed.curve == whole_run.curve


@pytest.mark.parametrize("done", [0, 1])
def test_when_memory_runs_out_the_training_goes_on(monkeypatch, done):
    plain, asked = Atlases.carry, []

    def carry(*given):
        asked.append(given)
        if len(asked) > done:
            raise torch.OutOfMemoryError("no room")
        return plain(*given)

    monkeypatch.setattr(Atlases, "carry", carry)
    reports, result = finetuned(training=TRAINING.override(pseudo_labels=SETTINGS.override(least_dice=0)))
    (told,) = [report.message for report in reports if "memory ran out" in report.message]
    assert "goes on without more" in told
    assert len(result.curve) == 5
    assert (result.model.history[-1]["registration_dice"] is not None) is bool(done)
    assert ("labelling other slices" in [report.stage for report in reports]) is not bool(done)


def test_volumes_with_held_out_slices_are_no_atlases():
    reports, result = finetuned(training=TRAINING.override(holdout=0.4, holdout_every=5))
    assert "comparing labelled volumes" not in [report.stage for report in reports]
    assert result.model.history[-1]["registration_dice"] is None


def test_registration_takes_a_part_of_a_time_budget(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(finetune_module.time, "monotonic", lambda: float(next(clock)))
    volumes = unlabelled(*[(1, 1, 0)] * 6)
    training = TRAINING.override(steps=None, time_budget=200.0)
    reports, result = finetuned(training=training, unlabelled=volumes)
    done = [report.step for report in reports if report.stage == "labelling by registration"]
    assert 0 < max(done) < 6
    assert result.curve
