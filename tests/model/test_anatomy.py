"""What labels tell of a structure's shape, and cleaning by it."""

import numpy as np

from kaf_model.anatomy import keep_largest_components, values_in_one_piece
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
