"""The numbers of the report, on cases whose answer is known."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from explore_cases import SHAPE, constant, heart, pretrained, tiny_recipe

from kaf_model.correspondences import find_correspondences
from kaf_model.errors import UserError, VolumeError
from kaf_model.explore import report as module
from kaf_model.explore.equivariance import AUGMENTATION
from kaf_model.explore.explorer import Explorer
from kaf_model.explore.report import explore_report, keypoint_codes, nearest_pairs, spread
from kaf_model.explore.views import VolumeView
from kaf_model.volume import Unreadable


def finished(work):
    messages = []
    while True:
        try:
            messages.append(next(work).message)
        except StopIteration as done:
            return done.value, messages


def value_of(report, quantity, condition, model="net"):
    (found,) = [
        one
        for one in report.numbers
        if (one.model, one.quantity, one.condition) == (model, quantity, condition)
    ]
    return found.value


@pytest.fixture(scope="module")
def volume():
    return heart()


@pytest.fixture(scope="module")
def measured(volume):
    labels = np.zeros(SHAPE, np.uint8)
    labels[1, :, :30] = 2  # the left half of one slice
    work = explore_report(
        {"net": Explorer.untrained(tiny_recipe()), "trained": pretrained()},
        [volume, Unreadable(Path("broken.nii.gz"), "it is broken")],
        labels_of=lambda _: labels,
        radii=[3.0, 30.0],
        slices_per_volume=2,
        num_points=3,
    )
    return finished(work)


def test_keypoints_are_counted(measured, volume):
    report, _ = measured
    view = VolumeView(Explorer.untrained(tiny_recipe()), volume)
    counts = [len(view.keypoints(z)) for z in range(4)]
    for name, summary in (("minimum", min), ("maximum", max), ("median", np.median)):
        assert value_of(report, "keypoints a slice", name) == summary(counts)
    columns = view.keypoints(1).positions[:, 1]
    assert value_of(report, "share on foreground", "keypoints") == pytest.approx(np.mean(columns < 29.5))
    assert value_of(report, "share on foreground", "pixels") == 0.5


def test_matched_shares_are_those_of_neighbours(measured, volume):
    report, _ = measured
    view = VolumeView(Explorer.untrained(tiny_recipe()), volume)
    shares = []
    for z in range(3):
        both = view.keypoints(z), view.keypoints(z + 1)
        shares.append(2 * len(find_correspondences(*both)) / (len(both[0]) + len(both[1])))
    assert value_of(report, "matched share", "radius 30") == pytest.approx(np.mean(shares))
    assert value_of(report, "matched share", "radius 3") < np.mean(shares)


def test_every_network_is_in_the_table_and_the_file(measured, tmp_path):
    report, messages = measured
    assert "passed over broken.nii.gz: it is broken" in messages
    assert report.notices[-1] == "passed over broken.nii.gz: it is broken"
    assert report.notices[2] == "1 volumes, 1 of them with labels"
    lines = report.table().splitlines()
    assert lines[0] == "|  | net | trained |"
    assert value_of(report, "matched share", "radius 30", "trained") == value_of(
        report, "matched share", "radius 30"
    )
    by_matcher = next(line for line in lines if line.startswith("| precision, by matcher"))
    assert by_matcher.split("|")[2].strip() == "-"  # no matcher, no number
    assert 0 <= float(by_matcher.split("|")[3]) <= 1
    report.to_csv(tmp_path / "folder" / "report.csv")
    with open(tmp_path / "folder" / "report.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.numbers)
    assert float(rows[0]["value"]) == report.numbers[0].value
    assert {row["model"] for row in rows} == {"net", "trained"}


def test_without_a_move_every_keypoint_finds_itself(volume, monkeypatch):
    monkeypatch.setattr(
        module,
        "augment_slice",
        lambda view, z, seed: _augment(view, z, seed=seed, augment=_STILL),
    )
    report, _ = finished(
        explore_report(
            {"net": Explorer.untrained(tiny_recipe())}, [volume], num_points=2, slices_per_volume=1
        )
    )
    # Keypoints of one place with two orientations are right for each other.
    assert value_of(report, "precision", "by descriptor") == 1
    assert value_of(report, "recall", "by descriptor") > 0.9
    assert value_of(report, "precision", "by feature") > 0.9  # in one coarse cell, features are alike


_augment = module.augment_slice
_STILL = AUGMENTATION.override(spatial_probability=0.0)


def test_pairs_are_each_others_nearest():
    codes0 = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    codes1 = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    assert nearest_pairs(codes0, codes1).tolist() == [[0, 1], [1, 0]]
    assert nearest_pairs(codes0[:0], codes1).shape == (0, 2)


def test_codes_of_a_plain_network_are_its_features_at_the_keypoints(volume):
    view = VolumeView(Explorer.untrained(tiny_recipe("unet")), volume)
    codes = keypoint_codes(view.features(1))
    assert codes.shape == (len(view.keypoints(1)), 4 + 8 + 16 + 32)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(len(codes)))


def test_slices_are_spread_evenly():
    assert spread(10, 3) == [2, 4, 7]
    assert spread(3, 1) == [1]
    assert spread(2, 5) == [0, 1]
    assert spread(1, 3) == [0]


def test_labels_that_do_not_fit_a_volume_leave_the_rest(volume):
    def refuse(_):
        raise VolumeError("labels.nii.gz: the labels lie apart")

    work = explore_report(
        {"net": Explorer.untrained(tiny_recipe())},
        [volume],
        labels_of=refuse,
        radii=[3.0],
        slices_per_volume=1,
        num_points=2,
    )
    report, messages = finished(work)
    told = "measured without labels: labels.nii.gz: the labels lie apart"
    assert told in messages
    assert told in report.notices
    assert "1 volumes, 0 of them with labels" in report.notices


def test_nothing_to_measure_is_said():
    network = {"net": Explorer.untrained(tiny_recipe())}
    with pytest.raises(UserError, match="no slice has a keypoint"):
        finished(explore_report(network, [constant()], num_points=2, slices_per_volume=1))
    with pytest.raises(UserError, match=r"no volume can be read: passed over a.nii: broken"):
        finished(explore_report(network, [Unreadable(Path("a.nii"), "broken")]))
