"""Labels that come by registration: from which volumes, to which, how they are weighed, and how they are checked."""

from dataclasses import replace

import numpy as np
import pytest
from atlas_cases import CLASSES, CONFIG, done, subject, whole

from kaf_model.atlases import Atlases
from kaf_model.labels import LabelledVolume, SliceStatus
from kaf_model.preparation import SliceStore, prepare_slices
from kaf_model.slices import Slices

COMPLETE, PARTIAL, EMPTY = SliceStatus.COMPLETE, SliceStatus.PARTIAL, SliceStatus.EMPTY


def atlases_of(*cases, most=3):
    return Atlases(cases, CLASSES, CONFIG, most=most)


def prepared(volume, indices=None, config=CONFIG):
    wanted = list(range(volume.num_slices)) if indices is None else indices
    return done(prepare_slices(volume, config, None, store=SliceStore(), indices=wanted)), wanted


def dice(found, truth):
    return [
        2 * ((found == c) & (truth == c)).sum() / ((found == c).sum() + (truth == c).sum()) for c in (1, 2)
    ]


def test_labels_arrive_where_the_image_shows_the_same():
    one, two = subject(), subject((1, -2, 1), name="w")
    atlases = atlases_of(whole(*one), whole(*two))
    volume, truth = subject((-1, 2, 2), name="u")
    found = done(atlases.carry(*prepared(volume))).channels()
    channels = np.searchsorted([0, 4, 7], truth)
    assert min(dice(np.searchsorted([0, 4, 7], one[1]), channels)) < 0.75
    assert min(dice(found, channels)) > 0.93


def test_an_atlas_that_fits_weighs_more_than_others_together():
    fitting = subject()
    strange = [subject((0, 4, 0), seed=seed) for seed in (1, 2)]
    volume, truth = subject((1, 0, 1))
    atlases = atlases_of(*(whole(*pair) for pair in (*strange, fitting)))
    found = done(atlases.carry(*prepared(volume))).channels()
    assert min(dice(found, np.searchsorted([0, 4, 7], truth))) > 0.8


def test_a_part_of_the_slices_is_enough():
    """Every second slice of the volume."""
    atlases = atlases_of(whole(*subject()), whole(*subject((1, -1, 1))))
    volume, truth = subject((0, 1, -1))
    found = done(atlases.carry(*prepared(volume, list(range(0, 18, 2))))).channels()
    assert min(dice(found, np.searchsorted([0, 4, 7], truth[::2]))) > 0.9


def test_volumes_that_show_the_same_agree_and_others_do_not():
    same = atlases_of(whole(*subject()), whole(*subject((1, -2, 1))))
    assert done(same.compare()) > 0.9
    different = atlases_of(whole(*subject((0, -5, 0))), whole(*subject((4, 6, 5), seed=1)))
    assert done(different.compare()) < 0.6
    alone = atlases_of(whole(*subject()))
    assert done(alone.compare()) == 0


def test_a_structure_that_one_of_two_lacks_counts_as_nothing():
    with_both, other = subject(), subject((1, 0, 0))
    front_only = np.where(other[1] == 4, 4, 0).astype(np.int16)
    assert done(atlases_of(whole(*with_both), whole(other[0], front_only)).compare()) < 0.6


def test_only_volumes_labelled_throughout_are_atlases():
    volume, labels = subject()
    shown = [z for z in range(18) if labels[z].any()]
    statuses = {z: COMPLETE for z in shown}
    ends = {shown[0] - 1: EMPTY, shown[-1] + 1: EMPTY}
    painted = LabelledVolume(volume, labels, statuses)
    assert len(atlases_of(painted)) == 0  # it may go on beyond
    assert len(atlases_of(replace(painted, statuses={**statuses, **ends}))) == 1
    gap = {z: status for z, status in {**statuses, **ends}.items() if z != 9}
    assert len(atlases_of(replace(painted, statuses=gap))) == 0
    assert len(atlases_of(replace(painted, statuses={**statuses, **ends, 9: PARTIAL}))) == 0
    assert (
        len(atlases_of(LabelledVolume(volume, np.zeros_like(labels), dict.fromkeys(range(18), EMPTY)))) == 0
    )
    assert len(atlases_of(LabelledVolume(volume, labels, {}))) == 0


def test_what_is_painted_beyond_the_finished_slices_is_not_carried():
    volume, labels = subject()
    shown = [z for z in range(18) if labels[z].any()]
    statuses = {**{z: COMPLETE for z in shown}, shown[0] - 1: EMPTY, shown[-1] + 1: EMPTY}
    scribbled = labels.copy()
    scribbled[0] = scribbled[17] = 4
    clean, other = LabelledVolume(volume, labels, statuses), whole(*subject((1, 0, 1)))
    one = done(atlases_of(clean, other).carry(*prepared(subject((0, 1, 0))[0]))).channels()
    two = done(
        atlases_of(replace(clean, labels=scribbled), other).carry(*prepared(subject((0, 1, 0))[0]))
    ).channels()
    assert np.array_equal(one, two)


def test_slices_that_lie_far_apart_are_left_alone():
    assert len(atlases_of(whole(*subject(spacing=(2, 1, 1))))) == 1
    assert len(atlases_of(whole(*subject(spacing=(3, 1, 1))))) == 0
    atlases = atlases_of(whole(*subject()), whole(*subject((1, 0, 0))))
    assert atlases.can_reach(*prepared(subject(spacing=(2, 1, 1))[0]))
    assert not atlases.can_reach(*prepared(subject(spacing=(3, 1, 1))[0]))
    assert not atlases.can_reach(*prepared(subject()[0], [0, 3, 6, 9]))
    assert not atlases.can_reach(*prepared(subject()[0], [4]))


def test_not_more_atlases_than_asked_for_evenly_chosen():
    cases = [whole(*subject((0, 0, n % 3), name=f"v{n}")) for n in range(5)]
    atlases = atlases_of(*cases, most=3)
    assert len(atlases) == 3
    chosen = [atlas.picture.values.numpy() for atlas in atlases._atlases]
    for values, index in zip(chosen, (0, 2, 4), strict=True):
        assert np.array_equal(values, Slices(cases[index].volume, CONFIG).images(range(18)))


@pytest.mark.parametrize("context", [0, 2])
def test_slices_that_are_read_together_are_registered_by_their_middle_one(context):
    config = CONFIG.override(context=context, context_step=1.0 if context else None)
    atlases = Atlases([whole(*subject()), whole(*subject((1, 0, 0)))], CLASSES, config, most=3)
    volume, truth = subject((0, 2, 1))
    found = done(atlases.carry(*prepared(volume, config=config))).channels()
    assert min(dice(found, np.searchsorted([0, 4, 7], truth))) > 0.93
