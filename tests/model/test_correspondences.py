"""Correspondences follow the paper's two criteria, whichever image comes first."""

import numpy as np
import pytest

from kaf_model.config import CorrespondenceConfig
from kaf_model.correspondences import UNMATCHED, Correspondences, find_correspondences, restrict
from kaf_model.keypoints import Keypoints, detect_keypoints


def make(positions, descriptors):
    positions = np.asarray(positions, float).reshape(-1, 2)
    return Keypoints.from_columns(
        np.hstack([positions, np.zeros((len(positions), 3))]), np.asarray(descriptors)
    )


def draw(generator, count, dimension=6, whole=True, side=60):
    descriptors = (
        generator.integers(0, 4, (count, dimension)) if whole else generator.normal(size=(count, dimension))
    )
    return make(generator.random((count, 2)) * side, descriptors)


def literal(keypoints0, keypoints1, radius, ratio=None):
    """The criteria as they are written, one keypoint at a time."""

    def best(own, other, index):
        candidates = []
        for candidate in range(len(other)):
            offset = np.abs(own.positions[index] - other.positions[candidate])
            manhattan = offset[0] + offset[1]
            if manhattan < radius:
                difference = own.descriptors[index].astype(float) - other.descriptors[candidate]
                middle = own.positions[index].astype(float) + other.positions[candidate]
                pair = sorted((index, candidate))[::-1]
                candidates.append(((round(difference @ difference, 9), manhattan, *middle, *pair), candidate))
        candidates.sort()
        if not candidates:
            return None
        if ratio is not None and len(candidates) > 1:
            closest, second = np.sqrt(candidates[0][0][0]), np.sqrt(candidates[1][0][0])
            if not closest < ratio * second:
                return None
        return candidates[0][1]

    pairs = []
    for index in range(len(keypoints0)):
        found = best(keypoints0, keypoints1, index)
        if found is not None and best(keypoints1, keypoints0, found) == index:
            pairs.append((index, found))
    return np.array(pairs, int).reshape(-1, 2)


def test_small_case_by_eye():
    keypoints0 = make([[10, 10], [10, 40], [50, 50]], [[1, 0], [0, 1], [5, 5]])
    keypoints1 = make([[12, 41], [11, 12], [50, 81], [14, 14]], [[0, 1], [2, 0], [5, 5], [1, 0]])
    found = find_correspondences(keypoints0, keypoints1, CorrespondenceConfig(radius=30))
    # 0 -> 3: the closest descriptor, though 1 is nearer; 1 -> 0; the twin of 2 is 31 pixels away.
    np.testing.assert_array_equal(found.pairs, [[0, 3], [1, 0]])
    np.testing.assert_array_equal(found.distances, [0, 0])
    np.testing.assert_array_equal(found.matches0, [3, 0, UNMATCHED])
    np.testing.assert_array_equal(found.matches1, [1, UNMATCHED, UNMATCHED, 0])
    np.testing.assert_array_equal(found.unmatched0, [2])
    np.testing.assert_array_equal(found.unmatched1, [1, 2])
    assert found.pairs.dtype == np.int64
    assert len(found) == 2


def test_distance_must_be_below_the_radius():
    keypoints0, keypoints1 = make([[0, 0]], [[1.0]]), make([[10, 20]], [[1.0]])
    assert len(find_correspondences(keypoints0, keypoints1, CorrespondenceConfig(radius=30))) == 0
    assert len(find_correspondences(keypoints0, keypoints1, CorrespondenceConfig(radius=30.01))) == 1


def test_both_must_choose_each_other():
    keypoints0 = make([[0, 0], [0, 2]], [[1.0], [1.2]])
    keypoints1 = make([[0, 1]], [[1.3]])
    np.testing.assert_array_equal(find_correspondences(keypoints0, keypoints1).pairs, [[1, 0]])


def test_ratio_refuses_the_undecided():
    keypoints0 = make([[0, 0]], [[0.0]])
    keypoints1 = make([[0, 1], [0, 2]], [[3.0], [4.0]])
    for ratio, expected in [(None, 1), (0.8, 1), (0.7, 0)]:
        config = CorrespondenceConfig(ratio=ratio)
        assert len(find_correspondences(keypoints0, keypoints1, config)) == expected
        assert len(find_correspondences(keypoints1, keypoints0, config)) == expected
    alone = find_correspondences(keypoints0, keypoints1.select([1]), CorrespondenceConfig(ratio=0.1))
    assert len(alone) == 1


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("ratio", [None, 0.8])
def test_equals_the_literal_loops(whole, ratio):
    generator = np.random.default_rng(0)
    for _ in range(10):
        keypoints0 = draw(generator, generator.integers(1, 25), whole=whole)
        keypoints1 = draw(generator, generator.integers(1, 25), whole=whole)
        found = find_correspondences(keypoints0, keypoints1, CorrespondenceConfig(radius=25, ratio=ratio))
        np.testing.assert_array_equal(found.pairs, literal(keypoints0, keypoints1, 25, ratio))
        if len(found):
            first, second = found.pairs.T
            difference = keypoints0.descriptors[first] - keypoints1.descriptors[second]
            np.testing.assert_allclose(found.distances, np.linalg.norm(difference, axis=1), atol=1e-4)


@pytest.mark.parametrize("ratio", [None, 0.9])
@pytest.mark.parametrize("whole", [True, False])
def test_swapping_the_images_transposes(ratio, whole):
    generator = np.random.default_rng(1)
    config = CorrespondenceConfig(ratio=ratio)
    for _ in range(20):
        keypoints0, keypoints1 = draw(generator, 40, 3, whole, 30), draw(generator, 33, 3, whole, 30)
        forth = find_correspondences(keypoints0, keypoints1, config)
        back = find_correspondences(keypoints1, keypoints0, config)
        assert len(forth) > 0
        np.testing.assert_array_equal(forth.matches0, back.matches1)
        np.testing.assert_array_equal(forth.matches1, back.matches0)
        np.testing.assert_array_equal(forth.unmatched0, back.unmatched1)


def test_swapping_transposes_where_everything_ties():
    keypoints0, keypoints1 = make(np.zeros((5, 2)), np.ones((5, 4))), make(np.zeros((3, 2)), np.ones((3, 4)))
    forth, back = find_correspondences(keypoints0, keypoints1), find_correspondences(keypoints1, keypoints0)
    assert len(forth) > 0
    np.testing.assert_array_equal(forth.matches0, back.matches1)


def test_permuting_keypoints_permutes():
    generator = np.random.default_rng(2)
    for whole in (True, False):
        keypoints0, keypoints1 = draw(generator, 40, 3, whole, 40), draw(generator, 50, 3, whole, 40)
        order0, order1 = generator.permutation(40), generator.permutation(50)
        found = find_correspondences(keypoints0, keypoints1)
        moved = find_correspondences(keypoints0.select(order0), keypoints1.select(order1))
        original = np.column_stack([order0[moved.pairs[:, 0]], order1[moved.pairs[:, 1]]])
        np.testing.assert_array_equal(original[np.argsort(original[:, 0])], found.pairs)


def test_every_keypoint_is_matched_once_or_unmatched():
    generator = np.random.default_rng(3)
    found = find_correspondences(draw(generator, 70), draw(generator, 45))
    for column, unmatched, count in ((0, found.unmatched0, 70), (1, found.unmatched1, 45)):
        together = np.concatenate([found.pairs[:, column], unmatched])
        np.testing.assert_array_equal(np.sort(together), np.arange(count))


@pytest.mark.parametrize(("count0", "count1"), [(0, 0), (0, 4), (4, 0)])
@pytest.mark.parametrize("ratio", [None, 0.8])
def test_no_keypoints_is_ordinary(count0, count1, ratio):
    generator = np.random.default_rng(4)
    keypoints0, keypoints1 = draw(generator, count0), draw(generator, count1)
    found = find_correspondences(keypoints0, keypoints1, CorrespondenceConfig(ratio=ratio))
    assert found.pairs.shape == (0, 2)
    assert len(found.unmatched0) == count0
    assert len(found.unmatched1) == count1
    rest = restrict(found, np.zeros(count0, bool), np.zeros(count1, bool))
    assert (len(rest), rest.num_keypoints0, rest.num_keypoints1) == (0, 0, 0)


def test_a_shifted_image_corresponds_by_its_shift():
    generator = np.random.default_rng(5)
    spectrum = np.fft.fft2(generator.normal(size=(200, 240)))
    frequency = np.hypot(np.fft.fftfreq(200)[:, None], np.fft.fftfreq(240)[None])
    image = np.fft.ifft2(spectrum * np.exp(-((frequency / 0.12) ** 2))).real  # smooth, of many sizes
    shift = np.array([6, -9])
    first = detect_keypoints(image[40:160, 40:200])
    second = detect_keypoints(image[34:154, 49:209])
    found = find_correspondences(first, second)
    moved = second.positions[found.pairs[:, 1]] - first.positions[found.pairs[:, 0]]
    assert len(found) > 0.5 * min(len(first), len(second))
    assert np.mean(np.abs(moved - shift).max(axis=1) < 0.3) > 0.9


def test_descriptors_of_two_detectors_are_refused():
    with pytest.raises(ValueError, match="one dimension, got 6 and 3"):
        find_correspondences(Keypoints.empty(6), Keypoints.empty(3))


def test_restrict_by_eye():
    before = Correspondences(
        pairs=np.array([[0, 3], [1, 0], [3, 1]]),
        distances=np.array([1, 2, 3], np.float32),
        num_keypoints0=4,
        num_keypoints1=4,
    )
    after = restrict(before, np.array([True, False, True, True]), np.array([True, False, True, True]))
    # Keypoint 1 of image 0 and keypoint 1 of image 1 left; their partners are unmatched now.
    np.testing.assert_array_equal(after.pairs, [[0, 2]])
    np.testing.assert_array_equal(after.distances, [1])
    np.testing.assert_array_equal(after.unmatched0, [1, 2])
    np.testing.assert_array_equal(after.unmatched1, [0, 1])


def test_restrict_keeps_the_same_keypoints_together():
    generator = np.random.default_rng(6)
    keypoints0, keypoints1 = draw(generator, 50), draw(generator, 60)
    kept0, kept1 = generator.random(50) < 0.7, generator.random(60) < 0.7
    before = find_correspondences(keypoints0, keypoints1)
    after = restrict(before, kept0, kept1)
    old = np.column_stack(
        [np.flatnonzero(kept0)[after.pairs[:, 0]], np.flatnonzero(kept1)[after.pairs[:, 1]]]
    )
    expected = [pair for pair in before.pairs.tolist() if kept0[pair[0]] and kept1[pair[1]]]
    assert old.tolist() == expected
    assert (after.num_keypoints0, after.num_keypoints1) == (kept0.sum(), kept1.sum())


@pytest.mark.parametrize("mask", [np.ones(3, bool), np.ones(2, int)])
def test_restrict_refuses_what_is_no_mask(mask):
    none = find_correspondences(Keypoints.empty(2), Keypoints.empty(2))
    two = Correspondences(none.pairs, none.distances, 2, 2)
    with pytest.raises(ValueError, match=r"kept0 must be bool of shape \(2,\)"):
        restrict(two, mask, np.ones(2, bool))
