"""Chaining matches of neighbouring slices into tracks."""

from __future__ import annotations

import numpy as np

from kaf_model.explore.tracks import Link, chain


def test_matches_that_share_a_keypoint_are_one_track():
    tracks = chain(
        [
            Link(0, 1, [[0, 5], [2, 3]], [0.5, 0.25]),
            Link(1, 2, [[5, 1], [4, 0]], [1.0, 2.0]),
            Link(2, 3, [[1, 7]], [3.0]),
        ]
    )
    assert tracks.num_tracks == 3
    first = tracks.tracks == 0
    np.testing.assert_array_equal(tracks.slices[first], [0, 1, 2, 3])
    np.testing.assert_array_equal(tracks.keypoints[first], [0, 5, 1, 7])
    np.testing.assert_array_equal(tracks.values[first], [0.5, 0.5, 1.0, 3.0])
    np.testing.assert_array_equal(tracks.slices[tracks.tracks == 1], [0, 1])
    np.testing.assert_array_equal(tracks.keypoints[tracks.tracks == 2], [4, 0])


def test_with_a_distance_of_two_even_and_odd_slices_are_apart():
    tracks = chain([Link(0, 2, [[0, 0]], [1]), Link(1, 3, [[0, 0]], [1]), Link(2, 4, [[0, 1]], [1])])
    np.testing.assert_array_equal(tracks.tracks, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(tracks.slices, [0, 2, 4, 1, 3])


def test_no_matches_are_no_tracks():
    tracks = chain([Link(0, 1, np.zeros((0, 2)), [])])
    assert tracks.num_tracks == 0
    assert tracks.values.shape == (0,)
