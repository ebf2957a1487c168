"""What labels tell of a structure's shape, and cleaning by it."""

import numpy as np
from scipy import ndimage

from kaf_model.anatomy import keep_largest_components, keep_together, values_in_one_piece, values_together
from kaf_model.labels import LabelledVolume, SliceStatus
from kaf_model.volume import Volume


def case(labels, statuses):
    labels = np.asarray(labels, np.int16)
    return LabelledVolume(Volume.from_array(np.zeros(labels.shape), (5, 1, 1), name="v"), labels, statuses)


def painted():
    """Value 2 is in one piece on each of four slices, 5 is in two, 7 is on two slices and 8 on one only."""
    labels = np.zeros((4, 12, 16), np.int16)
    labels[:, 1:5, 1:6] = 2
    labels[:, 7:9, 1:3] = 5
    labels[:, 7:9, 9:12] = 5
    labels[:2, 10, 10:14] = 7
    labels[3, 10, 10:14] = 8
    return labels


def test_structures_in_one_piece_are_told_from_others_and_from_those_seldom_seen():
    complete = dict.fromkeys(range(4), SliceStatus.COMPLETE)
    assert values_in_one_piece([case(painted(), complete)]) == {2, 7}


def test_only_complete_slices_tell_of_pieces():
    statuses = {0: SliceStatus.COMPLETE, 1: SliceStatus.PARTIAL, 2: SliceStatus.PARTIAL}
    assert values_in_one_piece([case(painted(), statuses)]) == set()
    more = case(painted(), {3: SliceStatus.COMPLETE})
    assert values_in_one_piece([case(painted(), statuses), more]) == {2}


def test_a_speck_beside_a_structure_does_not_make_it_two():
    labels = painted()
    labels[:, 0, 15] = 2  # 1 of 21 pixels: 4.8 %
    assert 2 in values_in_one_piece([case(labels, dict.fromkeys(range(4), SliceStatus.COMPLETE))])


def side_by_side():
    """Values 1 and 2 lie against each other on each of three slices, 3 lies apart."""
    labels = np.zeros((3, 12, 16), np.int16)
    labels[:, 2:8, 2:5] = 1
    labels[:, 2:8, 5:9] = 2
    labels[:, 2:8, 11:14] = 3
    return labels


def test_structures_that_lie_against_each_other_are_told_from_those_that_lie_apart():
    complete = dict.fromkeys(range(3), SliceStatus.COMPLETE)
    cases = [case(side_by_side(), complete)]
    assert values_together(cases, {1, 2}) == {1, 2}
    assert values_together(cases, {1, 3}) == set()
    assert values_together(cases, {1, 2, 3}) == set()
    assert values_together(cases, {1}) == set()
    assert values_together(cases, set()) == set()


def test_slices_with_one_of_them_or_partial_ones_do_not_tell_what_lies_together():
    labels = side_by_side()
    labels[1][labels[1] == 1] = 0
    statuses = {0: SliceStatus.COMPLETE, 1: SliceStatus.COMPLETE, 2: SliceStatus.PARTIAL}
    assert values_together([case(labels, statuses)], {1, 2}) == set()
    assert values_together([case(labels, statuses | {2: SliceStatus.COMPLETE})], {1, 2}) == {1, 2}


def a_heart_and_an_organ():
    """Values 1 to 3 lie together; far away is more of 1, and there are specks of 2 and 3."""
    labels = np.zeros((4, 30, 30), np.int16)
    labels[1:3, 4:8, 2:5] = 1
    labels[1:3, 4:8, 5:8] = 2
    labels[1:3, 4:8, 8:11] = 3
    heart = labels > 0
    labels[:, 15:29, 15:29] = 1
    labels[0, 20, 2] = 2
    labels[3, 25, 25] = 3  # within the organ
    return labels, heart


def test_an_organ_that_is_taken_for_one_of_them_is_left_out():
    labels, heart = a_heart_and_an_organ()
    expected = np.where(heart, labels, 0)
    keep_together(labels, {1, 2, 3})
    assert np.array_equal(labels, expected)


def test_other_classes_stay_and_the_rest_becomes_what_was_asked():
    labels, heart = a_heart_and_an_organ()
    labels[0, 0, 0] = 9
    before = labels.copy()
    keep_together(labels, {1, 2, 3}, fill=-1)
    assert labels[0, 0, 0] == 9
    assert (labels[heart] == before[heart]).all()
    assert (labels[~heart & (before > 0) & (before < 9)] == -1).all()
    assert (labels[before == 0] == 0).all()


def test_a_structure_that_would_vanish_is_left_as_it_is():
    labels = np.zeros((1, 12, 16), np.int16)
    labels[0, 2:6, 2:5] = 1
    labels[0, 2:6, 5:8] = 2
    labels[0, 2:6, 9:12] = 3  # a pixel away from the others
    labels[0, 10, 14] = 1
    expected = labels.copy()
    expected[0, 10, 14] = 0
    keep_together(labels, {1, 2, 3})
    assert np.array_equal(labels, expected)


def test_what_is_in_one_piece_or_not_there_stays():
    labels = side_by_side()
    for values in ({1, 2}, {7}, set()):
        before = labels.copy()
        keep_together(labels, values)
        assert np.array_equal(labels, before)


def test_the_largest_component_of_each_class_is_kept():
    labels = np.zeros((3, 4, 8), np.uint8)
    labels[0, 0, :3] = 5
    labels[1, 1, 3] = 5  # touches by a corner: one component
    labels[2, 3, 7] = 5
    labels[0, 3, 0] = 9
    keep_largest_components(labels)
    expected = np.zeros_like(labels)
    expected[0, 0, :3] = expected[1, 1, 3] = 5
    expected[0, 3, 0] = 9
    assert np.array_equal(labels, expected)


def test_only_named_classes_are_cleaned_and_the_rest_becomes_what_was_asked():
    labels = np.zeros((1, 4, 8), np.int8)
    labels[0, 0, :3] = labels[0, 3, 7] = 1
    labels[0, 1, :3] = labels[0, 3, 5] = 2
    keep_largest_components(labels, [1], fill=-1)
    assert labels[0, 3, 7] == -1
    assert labels[0, 3, 5] == 2
    keep_largest_components(labels, [])
    assert labels[0, 3, 5] == 2


def test_cleaning_looks_at_the_box_of_what_is_there_and_finds_what_the_whole_volume_shows():
    generator = np.random.default_rng(0)
    for density in (0.0, 0.002, 0.05, 0.3):
        labels = np.zeros((9, 24, 20), np.int16)
        inner = generator.random((6, 15, 11)) < density
        labels[2:8, 4:19, 7:18][inner] = generator.integers(1, 4, inner.sum())
        expected = labels.copy()
        for value in (1, 2, 3):
            pieces, count = ndimage.label(expected == value, np.ones((3, 3, 3)))
            if count > 1:
                sizes = [np.count_nonzero(pieces == number) for number in range(1, count + 1)]
                expected[(pieces > 0) & (pieces != 1 + int(np.argmax(sizes)))] = 0
        keep_largest_components(labels)
        assert np.array_equal(labels, expected)


def test_what_is_together_does_not_depend_on_the_room_around_it():
    generator = np.random.default_rng(1)
    for density in (0.02, 0.05, 0.1):
        close = generator.integers(1, 4, (6, 15, 11)).astype(np.int16) * (
            generator.random((6, 15, 11)) < density
        )
        roomy = np.pad(close, ((2, 1), (4, 5), (7, 2)))
        before = roomy.copy()
        keep_together(roomy, set())
        assert np.array_equal(roomy, before)
        for labels in (close, roomy):
            keep_together(labels, {1, 2, 3})
        assert np.array_equal(roomy[2:-1, 4:-5, 7:-2], close)
        assert np.count_nonzero(roomy) == np.count_nonzero(close) < np.count_nonzero(before)
