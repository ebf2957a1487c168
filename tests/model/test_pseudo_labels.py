"""Self-training: what is labelled by the model, and what never is."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from kaf_model import pseudo_labels
from kaf_model.checkpoint import ClassLabel
from kaf_model.config import FinetuneConfig, KeypointConfig, PseudoLabelConfig, SliceConfig
from kaf_model.datasets import Shard
from kaf_model.engine import OutOfMemory
from kaf_model.errors import UserError
from kaf_model.finetune import _recent_dice, _TrainingSlices, _without
from kaf_model.labels import ClassMap, LabelledVolume, SliceStatus
from kaf_model.losses import IGNORED
from kaf_model.propagation import propagate
from kaf_model.pseudo_labels import USES, PseudoLabels, prepare_unlabelled
from kaf_model.volume import Unreadable, Volume, read_volume
from kaf_model.volume_queue import VolumeFiles

CPU = torch.device("cpu")
CLASSES = ClassMap((ClassLabel(0, "background"), ClassLabel(4, "one"), ClassLabel(7, "two")))
CONFIG = PseudoLabelConfig(slices=3, confidence=0.8, least_slices=1)
COMPLETE, PARTIAL, EMPTY = SliceStatus.COMPLETE, SliceStatus.PARTIAL, SliceStatus.EMPTY


def volume(num_slices, name="v"):
    array = np.random.default_rng(0).normal(size=(num_slices, 32, 48)).astype(np.float32)
    return Volume.from_array(array, (6, 2, 2), name=name)


def finish(work):
    reports = []
    while True:
        try:
            reports.append(next(work))
        except StopIteration as done:
            return reports, done.value


def pool_of(cases, volumes=(), config=CONFIG):
    work = prepare_unlabelled(
        cases, volumes, CLASSES, SliceConfig(spacing=None), KeypointConfig(max_keypoints=8), config
    )
    return finish(work)[1]


def sure_of(channel, probability=0.9, where=(slice(0, 8), slice(0, 8))):
    """A network's stand-in: a probability for one channel in a square, background elsewhere."""

    def predict(network, images, positions, device):
        maps = torch.zeros(len(images), len(CLASSES), *images.shape[2:])
        maps[:, 0] = 1
        maps[:, 0, *where] = 1 - probability
        maps[:, channel, *where] = probability
        return maps

    return predict


def renewed(pool, predict, monkeypatch, *, one_piece=frozenset(), together=frozenset(), config=CONFIG):
    monkeypatch.setattr(pseudo_labels, "predict_slices", predict)
    pseudo = PseudoLabels(pool, CLASSES, config, one_piece=one_piece, together=together, seed=0)
    finish(pseudo.renew(None, CPU, 0.5))
    return pseudo


def test_the_unmarked_and_the_partial_slices_of_a_case_are_free():
    labels = np.zeros((5, 32, 48), np.int16)
    labels[1, 10:20, 10:20] = labels[2, 0:4, 0:4] = 4
    case = LabelledVolume(volume(5), labels, {1: COMPLETE, 2: PARTIAL, 4: EMPTY})
    (found,) = pool_of([case])
    assert found.free == (0, 2, 3)
    assert (found.known[1] >= 0).all()
    assert set(np.unique(found.known[2])) == {IGNORED, 1}
    assert (found.known[4] == 0).all()
    assert (found.known[[0, 3]] == IGNORED).all()


def test_a_case_that_is_labelled_throughout_gives_nothing():
    case = LabelledVolume(volume(2), np.zeros((2, 32, 48), np.int16), {0: EMPTY, 1: EMPTY})
    assert pool_of([case]) == []
    pseudo = PseudoLabels([], CLASSES, CONFIG, one_piece=frozenset(), seed=0)
    assert not any(pseudo.is_due(fraction, 1.0) for fraction in (0.0, 0.5, 0.99))


def test_what_a_person_painted_is_never_overruled(monkeypatch):
    labels = np.zeros((3, 32, 48), np.int16)
    labels[1, 2:5, 2:5] = 7
    case = LabelledVolume(volume(3), labels, {1: PARTIAL})
    pseudo = renewed(pool_of([case]), sure_of(1), monkeypatch)
    assert len(pseudo.slices) == 3
    painted = pseudo.slices[1].labels
    assert (painted[2:5, 2:5] == 2).all()
    assert painted[0, 0] == 1


def test_pixels_the_model_is_not_sure_of_are_left_out(monkeypatch):
    case = LabelledVolume(volume(3), np.zeros((3, 32, 48), np.int16), {1: EMPTY})
    unsure = renewed(pool_of([case]), sure_of(1, 0.7), monkeypatch)
    assert (unsure.slices[0].labels[:8, :8] == IGNORED).all()
    assert (unsure.slices[0].labels[8:] == 0).all()
    sure = renewed(pool_of([case]), sure_of(1, 0.85), monkeypatch)
    assert (sure.slices[0].labels[:8, :8] == 1).all()


def test_pieces_apart_from_a_structure_in_one_piece_are_left_out(monkeypatch):
    def predict(network, images, positions, device):
        maps = sure_of(1)(network, images, positions, device)
        maps[:, :, 30, 40:44] = 0
        maps[:, 1, 30, 40:44] = 1
        return maps

    case = LabelledVolume(volume(3), np.zeros((3, 32, 48), np.int16), {1: EMPTY})
    whole = renewed(pool_of([case]), predict, monkeypatch, one_piece=frozenset({4}))
    assert (whole.slices[0].labels[:8, :8] == 1).all()
    assert (whole.slices[0].labels[30, 40:44] == IGNORED).all()
    either = renewed(pool_of([case]), predict, monkeypatch, one_piece=frozenset({7}))
    assert (either.slices[0].labels[30, 40:44] == 1).all()


def test_what_the_model_is_unsure_of_does_not_cut_a_structure_in_two(monkeypatch):
    def predict(network, images, positions, device):
        maps = sure_of(1)(network, images, positions, device)
        maps[:, 0, :8, 8:10], maps[:, 1, :8, 8:10] = 0.4, 0.6
        maps[:, 0, :8, 10:12], maps[:, 1, :8, 10:12] = 0.1, 0.9
        return maps

    case = LabelledVolume(volume(3), np.zeros((3, 32, 48), np.int16), {1: EMPTY})
    found = renewed(pool_of([case]), predict, monkeypatch, one_piece=frozenset({4})).slices[0].labels
    assert (found[:8, :8] == 1).all()
    assert (found[:8, 8:10] == IGNORED).all()
    assert (found[:8, 10:12] == 1).all()


def test_what_lies_apart_from_structures_that_lie_together_is_background(monkeypatch):
    def predict(network, images, positions, device):
        maps = sure_of(1)(network, images, positions, device)
        for channel, where in ((2, np.s_[:8, 8:12]), (1, np.s_[12:32, 20:48])):  # beside it; a larger organ
            maps[(slice(None), slice(None), *where)] = 0
            maps[(slice(None), channel, *where)] = 1
        return maps

    case = LabelledVolume(volume(3), np.zeros((3, 32, 48), np.int16), {1: EMPTY})
    both = frozenset({4, 7})
    found = renewed(pool_of([case]), predict, monkeypatch, one_piece=both, together=both).slices[0].labels
    assert (found[:8, :8] == 1).all()
    assert (found[:8, 8:12] == 2).all()
    assert (found[12:, 20:] == 0).all()
    apart = renewed(pool_of([case]), predict, monkeypatch, one_piece=both).slices[0].labels
    assert (apart[:8, :8] == IGNORED).all()
    assert (apart[12:, 20:] == 1).all()


def test_each_round_labels_as_many_slices_as_asked_and_may_choose_other_volumes(monkeypatch):
    pool = pool_of([], [volume(2, f"v{number}") for number in range(4)])
    pseudo = renewed(pool, sure_of(1), monkeypatch)
    assert len(pseudo.slices) == 4  # whole volumes until there are 3 slices
    drawn = set()
    for _ in range(6):
        finish(pseudo.renew(None, CPU, 0.5))
        drawn.add(tuple(sorted(pseudo.state())))
    assert len(drawn) > 1
    assert pseudo.round == 7


@pytest.mark.parametrize(
    ("side", "channels", "believed"),
    [(8, {1: 8}, True), (5, {1: 10}, True), (4, {1: 10}, False), (8, {1: 8, 2: 4}, False), (8, {}, True)],
    ids=["as much", "a quarter", "less", "another structure missing", "nothing labelled completely"],
)
def test_a_volume_in_which_too_little_is_found_teaches_nothing(monkeypatch, side, channels, believed):
    labelled = [np.zeros((32, 48), np.int64), np.full((32, 48), IGNORED)]  # the second does not count
    for channel, size in channels.items():
        labelled[0][10 * channel : 10 * channel + size, :size] = channel
    labelled[1][:30, :30] = 1
    monkeypatch.setattr(pseudo_labels, "predict_slices", sure_of(1, where=(slice(0, side), slice(0, side))))
    pool = pool_of([], [volume(2)])
    pseudo = PseudoLabels(pool, CLASSES, CONFIG, one_piece=frozenset(), labelled=labelled, seed=0)
    finish(pseudo.renew(None, CPU, 0.5))
    assert bool(pseudo.slices) == believed
    assert pseudo.round == 1
    assert not pseudo.is_due(0.5, 1.0)


def test_finished_slices_of_a_volume_are_believed_whatever_is_found(monkeypatch):
    labels = np.zeros((4, 32, 48), np.int16)
    labels[1, 4:12, 4:12] = 4
    (own,) = pool_of([LabelledVolume(volume(4), labels, {1: COMPLETE})])
    assert own.propagation is not None
    monkeypatch.setattr(pseudo_labels, "predict_slices", sure_of(2))
    everything = [np.ones((32, 48), np.int64)]
    pseudo = PseudoLabels([own], CLASSES, CONFIG, one_piece=frozenset(), labelled=everything, seed=0)
    finish(pseudo.renew(None, CPU, 0.5))
    assert pseudo.slices


def test_rounds_are_due_at_their_fractions(monkeypatch):
    pseudo = PseudoLabels(
        pool_of([], [volume(2)]),
        CLASSES,
        CONFIG.override(start=0.2, every=0.3),
        one_piece=frozenset(),
        seed=0,
    )
    due = [pseudo.is_due(fraction, 1.0) for fraction in (0.1, 0.2, 0.4, 1.0)]
    assert due == [False, True, True, False]
    monkeypatch.setattr(pseudo_labels, "predict_slices", sure_of(1))
    finish(pseudo.renew(None, CPU, 0.21))
    assert [pseudo.is_due(fraction, 1.0) for fraction in (0.4, 0.5)] == [False, True]
    finish(pseudo.renew(None, CPU, 0.9))  # two rounds were missed
    assert not pseudo.is_due(0.99, 1.0)


def test_a_model_that_is_not_good_at_what_it_learns_labels_nothing(monkeypatch):
    pseudo = PseudoLabels(
        pool_of([], [volume(2)]), CLASSES, CONFIG.override(least_dice=0.6), one_piece=frozenset(), seed=0
    )
    assert [pseudo.is_due(0.5, dice) for dice in (0.0, 0.59, 0.6)] == [False, False, True]
    monkeypatch.setattr(pseudo_labels, "predict_slices", sure_of(1))
    finish(pseudo.renew(None, CPU, 0.5))
    assert pseudo.is_due(0.9, 0.0)  # on pseudo-labelled slices it may be worse than before


def test_as_many_slices_are_labelled_as_are_learnt_from(monkeypatch):
    pool = pool_of([], [volume(2, f"v{number}") for number in range(4)])
    monkeypatch.setattr(pseudo_labels, "predict_slices", sure_of(1))
    labelled = []
    for drawn in (1, 3 * USES, 100):
        pseudo = PseudoLabels(pool, CLASSES, CONFIG.override(slices=6), one_piece=frozenset(), seed=0)
        finish(pseudo.renew(None, CPU, 0.5, drawn))
        labelled.append(len(pseudo.slices))
    assert labelled == [2, 4, 6]  # whole volumes


def test_soft_dice_is_that_of_the_last_steps():
    assert _recent_dice([]) == 0
    assert _recent_dice([{"step": 1, "total": 2.0}]) == 1  # no Dice to go by
    curve = [{"dice": 1.0}] * 50 + [{"dice": 0.25}] * 50
    assert _recent_dice(curve) == 0.75


@pytest.mark.parametrize(("least", "due"), [(4, True), (5, False)])
def test_a_few_slices_are_not_pseudo_labelled(least, due):
    pool = pool_of([], [volume(2, "a"), volume(2, "b")])
    config = CONFIG.override(least_slices=least)
    pseudo = PseudoLabels(pool, CLASSES, config, one_piece=frozenset(), seed=0)
    assert pseudo.is_due(0.5, 1.0) is due


def test_the_state_brings_the_labels_back(monkeypatch):
    pool = pool_of([], [volume(2, "a"), volume(3, "b")])
    first = renewed(pool, sure_of(1), monkeypatch)
    second = PseudoLabels(pool, CLASSES, CONFIG, one_piece=frozenset(), seed=0)
    second.load({**first.state(), "average.weight": torch.zeros(1)})
    assert second.round == 1
    assert [second.is_due(at, 1.0) for at in (0.5, 0.6)] == [first.is_due(at, 1.0) for at in (0.5, 0.6)]
    assert all(np.array_equal(a.labels, b.labels) for a, b in zip(first.slices, second.slices, strict=True))


def test_channels_beyond_128_and_states_saved_in_bytes(monkeypatch):
    classes = ClassMap(tuple(ClassLabel(value, f"class {value}") for value in range(131)))

    def predict(network, images, positions, device):
        maps = torch.zeros(len(images), len(classes), *images.shape[2:])
        maps[:, 130] = 1
        return maps

    monkeypatch.setattr(pseudo_labels, "predict_slices", predict)
    first, second = (
        PseudoLabels(pool_of([], [volume(2)]), classes, CONFIG, one_piece=frozenset({130}), seed=0)
        for _ in range(2)
    )
    finish(first.renew(None, CPU, 0.5))
    second.load(first.state())
    for item in (*first.slices, *second.slices):
        assert (item.labels == 130).all()
    in_bytes = first.state() | {"pseudo.0": torch.full((2, 32, 48), 3, dtype=torch.int8)}
    second.load(in_bytes)
    assert (second.slices[1].labels == 3).all()
    assert second.state()["pseudo.0"].dtype is torch.int16


def test_of_a_long_volume_an_even_selection_is_taken():
    (found,) = pool_of([], [volume(40)])
    assert len(found.prepared) == 3
    assert (found.free, found.indices) == ((0, 1, 2), (0, 20, 39))
    labels = np.zeros((40, 32, 48), np.int16)
    (case,) = pool_of([LabelledVolume(volume(40), labels, {5: EMPTY})])
    assert len(case.prepared) == 4
    assert len(case.free) == 3


def test_volumes_that_cannot_be_read_are_named_and_passed_over(tmp_path):
    broken = Unreadable(tmp_path / "broken.nii", "no NIfTI")
    reports, pool = finish(
        prepare_unlabelled(
            [], [broken, volume(2)], CLASSES, SliceConfig(spacing=None), KeypointConfig(), CONFIG
        )
    )
    assert len(pool) == 1
    assert any("passed over broken.nii: no NIfTI" in report.message for report in reports)


def test_the_volume_of_a_case_is_not_labelled_by_the_model_as_if_nobody_had(tmp_path):
    labels = np.zeros((4, 32, 48), np.int16)
    own, other = volume(4), volume(4)
    case = LabelledVolume(own, labels, {1: EMPTY})
    assert [found.known is None for found in pool_of([case], [own, other])] == [False, True]
    for name in ("a", "b"):
        image = nib.Nifti1Image(own.array.transpose(2, 1, 0), np.diag([2.0, 2.0, 6.0, 1.0]))
        nib.save(image, tmp_path / f"{name}.nii.gz")
    case = LabelledVolume(read_volume(tmp_path / "a.nii.gz"), labels, {1: EMPTY})
    pool = pool_of([case], VolumeFiles([tmp_path]), CONFIG.override(volumes=1))
    assert [(found.prepared.name, found.known is None) for found in pool] == [("a", False), ("b", True)]
    assert len(pool_of([case], [tmp_path / "a.nii.gz"])) == 1  # nothing else is no mistake


def test_where_memory_runs_out_fewer_slices_are_predicted_at_a_time(monkeypatch):
    pool, sizes = pool_of([], [volume(8)], CONFIG.override(slices=8)), []

    def predict(network, images, positions, device, most=2):
        if len(images) > most:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(images))
        return sure_of(1)(network, images, positions, device)

    pseudo = renewed(pool, predict, monkeypatch)
    assert sizes == [2, 2, 2, 2]
    assert len(pseudo.slices) == 8
    monkeypatch.setattr(pseudo_labels, "predict_slices", partial(predict, most=0))
    with pytest.raises(OutOfMemory, match="a single slice does not fit"):
        finish(pseudo.renew(None, CPU, 0.9))


def test_only_slices_that_may_be_labelled_are_counted():
    pool = pool_of([], [volume(3)])
    for least, count in ((3, 3), (4, 0)):
        config = CONFIG.override(least_slices=least)
        assert PseudoLabels(pool, CLASSES, config, one_piece=frozenset(), seed=0).num_free == count


def test_no_more_volumes_are_read_than_asked():
    pool = pool_of([], [volume(2, f"v{n}") for n in range(5)], CONFIG.override(volumes=2))
    assert [found.prepared.name for found in pool] == ["v0", "v1"]


def test_held_out_slices_count_as_not_labelled():
    labels = np.zeros((4, 32, 48), np.int16)
    first = LabelledVolume(volume(4), labels, {0: EMPTY, 2: EMPTY})
    second = LabelledVolume(volume(4), labels, {1: EMPTY, 3: EMPTY})
    kept = _without([first, second], {1, 2})
    assert [dict(case.statuses) for case in kept] == [{0: EMPTY}, {3: EMPTY}]


def constant_slices(value):
    image = np.zeros((1, 32, 48), np.float16)
    return [SimpleNamespace(image=image, keypoints=np.zeros((0, 2)), labels=np.full((32, 48), value))]


def drawing_of(pseudo, share, **settings):
    training = FinetuneConfig(
        batch_size=4,
        foreground=0.0,
        pseudo_labels={"share": share},
        augment={"crop": (32, 48), "spatial_probability": 0.0, "intensity_probability": 0.0},
        **settings,
    )
    return _TrainingSlices(constant_slices(1), pseudo, training)


@pytest.mark.parametrize(("share", "from_each"), [(0.5, (2, 2)), (0.25, (3, 1)), (0.05, (3, 1))])
def test_a_share_of_each_batch_is_pseudo_labelled(share, from_each):
    pseudo = SimpleNamespace(slices=[], round=0)
    drawing = drawing_of(pseudo, share)
    assert (drawing.batch(0, 0.0, CPU, Shard()).labels == 1).all()
    pseudo.slices, pseudo.round = constant_slices(2), 1
    labels = drawing.batch(1, 0.1, CPU, Shard()).labels
    assert labels.shape == (4, 32, 48)
    assert tuple(int((labels[:, 0, 0] == value).sum()) for value in (1, 2)) == from_each
    pseudo.slices, pseudo.round = constant_slices(3), 2
    assert set(drawing.batch(2, 0.1, CPU, Shard()).labels.unique().tolist()) == {1, 3}


def test_every_process_has_slices_of_its_own():
    drawing = drawing_of(SimpleNamespace(num_free=9), 0.5)
    drawing.check_shares(1)
    drawing.check_shares(2)
    with pytest.raises(UserError, match="of which 2 pseudo-labelled, cannot be shared by 3 processes"):
        drawing.check_shares(3)
    drawing = drawing_of(SimpleNamespace(num_free=0), 0.5)
    drawing.check_shares(4)
    with pytest.raises(UserError, match="batches of 4 slices cannot be shared by 5"):
        drawing.check_shares(5)


def test_a_training_begins_with_small_crops():
    """Of labelled and of pseudo-labelled slices alike, until its part of the training is over."""
    pseudo = SimpleNamespace(slices=[], round=0)
    drawing = drawing_of(pseudo, 0.5, early_crop=(16, 32), early_part=0.6)
    shapes = {}
    for step, fraction in enumerate((0.0, 0.3, 0.59, 0.6, 1.0)):
        if fraction == 0.3:
            pseudo.slices, pseudo.round = constant_slices(2), 1
        batch = drawing.batch(step, fraction, CPU, Shard())
        assert batch.views.images.shape[2:] == batch.labels.shape[1:]
        shapes[fraction] = tuple(batch.labels.shape[1:])
    larger = drawing_of(pseudo, 0.5, early_crop=(64, 32))
    assert larger.batch(0, 0.0, CPU, Shard()).labels.shape == (4, 32, 32)
    assert shapes == {0.0: (16, 32), 0.3: (16, 32), 0.59: (16, 32), 0.6: (32, 48), 1.0: (32, 48)}


def test_shapes_of_finished_slices_decide_where_the_model_is_unsure(monkeypatch):
    """Two finished slices show the same square, and the model has no idea: the slice between shows it as well."""
    labels = np.zeros((3, 32, 48), np.int16)
    labels[[0, 2], 8:24, 10:30] = 4
    flat = Volume.from_array(np.ones((3, 32, 48), np.float32), (6, 2, 2), name="v")
    case = LabelledVolume(flat, labels, {0: COMPLETE, 2: COMPLETE})
    config = CONFIG.override(least_slices=50)  # a single free slice would not do without them
    pool = pool_of([case], config=config)
    pseudo = renewed(pool, sure_of(1, 0.5, (slice(None), slice(None))), monkeypatch, config=config)
    assert pseudo.is_due(0.9, 1.0)
    (found,) = pseudo.slices
    assert (found.labels[10:22, 12:28] == 1).all()
    assert (found.labels[:6] == 0).all()
    alone = pool_of([case], config=config.override(propagation=0))
    assert not PseudoLabels(alone, CLASSES, config, one_piece=frozenset(), seed=0).is_due(0.5, 1.0)


def test_what_was_carried_before_is_used_again():
    labels = np.zeros((3, 32, 48), np.int16)
    labels[0, 8:24, 10:30] = 4
    case = LabelledVolume(volume(3), labels, {0: COMPLETE})
    _, carried = finish(propagate(case, (0, 4, 7), SliceConfig(spacing=None)))

    def used(**changes):
        made = [replace(carried, **changes)]
        same = replace(case)  # as a training without held-out slices copies it
        work = prepare_unlabelled(
            [same], [], CLASSES, SliceConfig(spacing=None), KeypointConfig(), CONFIG, propagations=made
        )
        (found,) = finish(work)[1]
        return found.propagation is made[0]

    assert used()
    assert used(slices=SliceConfig(spacing=None, context=2, context_step=1.0))
    assert not used(values=(0, 7, 4))
    assert not used(slices=SliceConfig())
    assert not used(case=replace(case, statuses={0: COMPLETE, 1: EMPTY}))
