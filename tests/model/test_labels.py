"""What labels mean: statuses, classes, and what can be learnt from them."""

import numpy as np
import pytest

from kaf_model.checkpoint import ClassLabel
from kaf_model.errors import UserError
from kaf_model.labels import ClassMap, LabelledVolume, SliceStatus, check_learnable, open_ends
from kaf_model.losses import IGNORED
from kaf_model.volume import Volume

VOLUME = Volume.from_array(np.zeros((4, 3, 5), np.float32), name="heart.nii.gz")
COMPLETE, PARTIAL, EMPTY = SliceStatus.COMPLETE, SliceStatus.PARTIAL, SliceStatus.EMPTY


def painted(**slices):
    """Labels with one value in the corner of some slices: painted(z1=7)."""
    labels = np.zeros((4, 3, 5), np.uint8)
    for name, value in slices.items():
        labels[int(name[1:]), 0, :2] = value
    return labels


def test_statuses_are_words():
    assert [str(status) for status in SliceStatus] == ["complete", "partial", "empty"]
    assert SliceStatus("partial") is PARTIAL


def test_ends_are_open_where_the_outermost_finished_slice_shows_something():
    assert open_ends(painted(z1=1, z2=1), [1, 2]) == ["before slice 1", "after slice 2"]
    assert open_ends(painted(z1=1, z2=1), [2, 0, 1]) == ["after slice 2"]
    assert open_ends(painted(z1=1), [0, 1, 2]) == []
    assert open_ends(painted(z0=1, z3=1), [0, 3]) == []
    assert open_ends(painted(), []) == []


def test_mistakes_in_labels_are_named():
    with pytest.raises(
        UserError, match=r"labels of heart must be \(4, 3, 5\) like the volume, got \(4, 5, 3\)"
    ):
        LabelledVolume(VOLUME, np.zeros((4, 5, 3), np.uint8), {})
    with pytest.raises(UserError, match="must be integers, got float32"):
        LabelledVolume(VOLUME, np.zeros((4, 3, 5), np.float32), {})
    for z in (4, -1):
        with pytest.raises(UserError, match=f"heart has slices 0..3, slice {z} was named"):
            LabelledVolume(VOLUME, painted(), {z: COMPLETE})
    with pytest.raises(UserError, match="slice 2 of heart is marked empty but 2 pixels are painted"):
        LabelledVolume(VOLUME, painted(z2=1), {2: EMPTY})


def test_classes_are_those_of_the_marked_slices():
    cases = [
        LabelledVolume(VOLUME, painted(z0=200, z1=7, z2=9), {0: COMPLETE, 1: PARTIAL}),
        LabelledVolume(VOLUME, painted(z3=3), {3: COMPLETE, 0: EMPTY}),
    ]
    classes = ClassMap.of_labels(cases)
    assert classes.values.tolist() == [0, 3, 7, 200]
    assert [label.name for label in classes.classes] == ["background", "class 3", "class 7", "class 200"]
    names = {200: "skin", 3: "bone", 7: "aorta", 0: "air", 12: "vein"}
    named = ClassMap.of_labels(cases, names)
    assert {label.value: label.name for label in named.classes} == names  # the vein too, that nobody painted
    assert named.values.tolist() == [0, 3, 7, 12, 200]
    assert len(named) == 5


def test_channels_of_a_slice():
    classes = ClassMap((ClassLabel(0, "background"), ClassLabel(200, "aorta"), ClassLabel(7, "vein")))
    labels = np.array([[0, 200, 7], [7, 0, 0]], np.uint8)
    assert classes.channels(labels, COMPLETE, "here").tolist() == [[0, 1, 2], [2, 0, 0]]
    assert classes.channels(labels, PARTIAL, "here").tolist() == [[IGNORED, 1, 2], [2, IGNORED, IGNORED]]
    assert classes.channels(labels * 0, EMPTY, "here").tolist() == [[0] * 3] * 2


def test_a_label_beyond_the_classes_is_named():
    classes = ClassMap((ClassLabel(0, "background"), ClassLabel(1, "aorta")))
    message = (
        r"slice 3 of heart has label 4, which is no class; the classes are 0 \(background\), 1 \(aorta\)"
    )
    with pytest.raises(UserError, match=message):
        classes.channels(np.array([[0, 1, 4]]), COMPLETE, "slice 3 of heart")


def test_classes_must_begin_with_the_background_and_differ():
    for values in ([], [1, 2], [0, 1, 1]):
        with pytest.raises(UserError, match="classes must start with the background"):
            ClassMap(tuple(ClassLabel(value, "x") for value in values))
    with pytest.raises(UserError, match="no class is painted"):
        ClassMap.of_labels([LabelledVolume(VOLUME, painted(z1=3), {0: COMPLETE})])


def test_what_cannot_teach_a_distinction_is_refused():
    classes = ClassMap((ClassLabel(0, "background"), ClassLabel(3, "aorta")))
    unknown = np.full((3, 5), IGNORED)
    only_aorta = unknown.copy()
    only_aorta[0, 0] = 1
    for labels, message in [
        ([unknown], "nothing is painted"),
        ([np.zeros((3, 5), int), unknown], "show only background"),
        ([only_aorta], "only 'aorta' is labelled and no background"),
    ]:
        with pytest.raises(UserError, match=message):
            check_learnable(labels, classes)
    check_learnable([only_aorta, np.zeros((3, 5), int)], classes)


def test_no_slice_is_marked():
    with pytest.raises(UserError, match="no slice is marked as labelled"):
        ClassMap.of_labels([LabelledVolume(VOLUME, painted(z1=1), {})])


def test_named_classes_are_all_there_are():
    case = LabelledVolume(VOLUME, painted(z1=7), {1: COMPLETE})
    classes = ClassMap.of_labels([case], {0: "background", 1: "heart", 2: "lung"})
    assert [label.name for label in classes.classes] == ["background", "heart", "lung"]
    with pytest.raises(
        UserError, match=r"slice 1 has label 7, which is no class; .* 1 \(heart\), 2 \(lung\)"
    ):
        classes.channels(case.labels[1], COMPLETE, "slice 1")
