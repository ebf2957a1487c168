"""What the figures show, on cases small enough to count by eye."""

import numpy as np
import pytest
import torch
from explore_cases import constant, heart, pretrained, tiny_recipe
from matplotlib.colors import to_hex

from kaf_model.compute import Cost
from kaf_model.config import CorrespondenceConfig
from kaf_model.correspondences import find_correspondences
from kaf_model.errors import UserError
from kaf_model.explore.equivariance import equivariance_errors
from kaf_model.explore.explorer import Explorer
from kaf_model.explore.views import VolumeView
from kaf_model.figures import compute_figure, curves_figure, save_figure, segmentation_comparison
from kaf_model.figures.curves import running_mean
from kaf_model.figures.from_views import (
    draw_correspondences_of,
    draw_keypoints_of,
    draw_neighbours_of,
    draw_radii_of,
    draw_similarity_of,
)
from kaf_model.figures.segmentation import slice_dice
from kaf_model.figures.style import colours


@pytest.fixture(scope="module")
def view():
    return VolumeView(Explorer.untrained(tiny_recipe()), heart())


def titles(figure):
    return [panel.get_title() for panel in figure.axes if panel.get_title()]


def captions(figure):
    return [panel.get_xlabel() for panel in figure.axes if panel.get_xlabel()]


def test_keypoints_are_circles_of_their_scale(view):
    figure = draw_keypoints_of(view, [1, 2], orientation=True)
    plain, found, moved = figure.axes[:3]
    assert titles(figure) == ["slice", "keypoints", "augmented"]
    assert plain.get_ylabel() == "slice 1"
    circles, lines = found.collections
    keypoints = view.keypoints(1)
    np.testing.assert_allclose(circles.get_offsets(), keypoints.positions[:, ::-1])
    np.testing.assert_allclose(circles.get_array(), keypoints.responses)
    first = lines.get_segments()[0]
    assert np.linalg.norm(first[1] - first[0]) == pytest.approx(keypoints.scales[0] / 2, rel=1e-4)
    angle = np.degrees(np.arctan2(*(first[1] - first[0])[::-1])) % 360
    assert angle == pytest.approx(keypoints.angles[0] % 360, abs=0.1)
    assert found.get_xlabel() == f"{len(keypoints)} keypoints"
    assert moved.get_xlabel() == f"{len(moved.collections[0].get_offsets())} still there"


def test_lines_join_what_corresponds(view):
    keypoints0, keypoints1 = view.keypoints(1), view.keypoints(2)
    figure = draw_radii_of(view, 1, 2, [3.0, 12.0])
    assert titles(figure) == ["radius 3 pixels", "radius 12 pixels"]
    for panel, radius in zip(figure.axes, (3.0, 12.0), strict=False):
        found = find_correspondences(keypoints0, keypoints1, CorrespondenceConfig(radius=radius))
        assert len(found) > 0
        lines = panel.collections[0]
        ends = np.array(lines.get_segments())
        np.testing.assert_allclose(ends[:, 0, ::-1], keypoints0.positions[found.pairs[:, 0]], atol=1e-4)
        np.testing.assert_allclose(
            ends[:, 1, ::-1] - (0, 60 * 1.04), keypoints1.positions[found.pairs[:, 1]], atol=1e-4
        )
        np.testing.assert_allclose(lines.get_array(), found.distances)
        left, right = len(keypoints0) - len(found), len(keypoints1) - len(found)
        assert panel.get_xlabel() == f"{len(found)} matched, unmatched {left} left and {right} right"


def test_a_matcher_adds_what_it_has_learned(view):
    rule = CorrespondenceConfig()
    assert titles(draw_correspondences_of(view, 1, 2, rule)) == ["slices 1 and 2", "augmented"]
    trained = VolumeView(pretrained(), heart())
    figure = draw_correspondences_of(trained, 1, 2, rule, probability=0.0)
    assert titles(figure) == ["slices 1 and 2", "slices 1 and 2, learned", "augmented", "augmented, learned"]
    assert [axis.get_ylabel() for axis in figure.axes[-2:]] == ["descriptor distance", "probability"]


def test_similarity_has_a_row_for_each_model_and_says_the_error(view):
    views = {"random": view, "other": VolumeView(Explorer.untrained(tiny_recipe(), seed=1), view.volume)}
    figure = draw_similarity_of(views, 1, point=(20, 30), levels=[3], num_points=4, seed=2)
    panels = figure.axes[:9]
    assert [panel.get_ylabel() for panel in panels[::3]] == ["", "random", "other"]
    (error,) = equivariance_errors(view, 1, num_points=4, seed=2, levels=[3])
    assert panels[5].get_xlabel() == f"error {error.error:.3f}\n({error.relative:.2f} of chance)"
    for panel in panels:
        assert len(panel.lines) == 1  # the star
    assert panels[2].lines[0].get_xydata().tolist() == [[30, 20]]
    np.testing.assert_array_equal(panels[4].lines[0].get_xydata(), panels[1].lines[0].get_xydata())


def test_neighbours_are_shown_on_one_scale(view):
    figure = draw_neighbours_of({"random": view}, [1, 2, 0], point=(20, 30), levels=[1, 4])
    assert [panel.get_title() for panel in figure.axes[:3]] == ["slice 1", "slice 2", "slice 0"]
    limits = {panel.images[0].get_clim() for panel in figure.axes[6:9]}
    assert len(limits) == 1
    assert limits.pop()[1] == 1
    own = figure.axes[6].images[0].get_array()
    assert own[20, 30] == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_drawn_is_said(view):
    empty = VolumeView(view.explorer, constant())
    with pytest.raises(UserError, match="no keypoints on slice 0, 1 of constant"):
        draw_keypoints_of(empty, [0, 1])
    coarse = VolumeView(Explorer.untrained(tiny_recipe(spacing=6.0)), view.volume)
    with pytest.raises(UserError, match="figures of their own"):
        draw_similarity_of({"a": view, "b": coarse}, 1)
    with pytest.raises(UserError, match="41 x 60 voxels, got 50,2"):
        draw_neighbours_of({"a": view}, [1, 2], point=(50, 2))


def test_dice_stands_under_each_model():
    truth = np.zeros((2, 24, 32), np.uint8)
    truth[0, 4:8, 4:12] = 1
    truth[0, 12:16, 4:12] = 2
    half = truth.copy()
    half[0, 4:8, 8:12] = 0  # half of class 1: Dice 2/3, class 2 is right
    figure = segmentation_comparison(
        np.random.default_rng(0).normal(size=truth.shape),
        truth,
        {"good": truth, "half": half},
        classes={1: "one", 2: "two"},
        slice_names=["slice 3", "slice 9"],
    )
    assert captions(figure) == ["100.0", "83.3", "nothing to find", "nothing to find"]
    assert titles(figure) == ["image", "good", "half", "truth"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    layer = figure.axes[3].images[1].get_array()  # the truth, from row 0 (margin) on
    assert to_hex(layer[5, 5][:3]) == "#56b4e9"
    assert layer[..., 3].astype(bool).sum() == 64
    assert slice_dice(truth[1], truth[1], {1: "one"}) != slice_dice(truth[1], truth[1], {1: "one"})


def test_curves_have_a_panel_for_each_quantity():
    runs = {
        "a": {"step": [1, 2, 3], "total": [3.0, 2.0, 1.0], "held-out dice": [None, 0.5, 0.6]},
        "b": {"step": [1, 2], "total": [4.0, 3.0]},
    }
    figure = curves_figure(runs)
    assert titles(figure) == ["total loss", "Dice on held-out slices"]
    total, dice = figure.axes
    assert len(total.lines) == 4
    assert dice.lines[0].get_xydata().tolist() == [[2, 0.5], [3, 0.6]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert running_mean(np.array([1.0, 3.0, 5.0]), 2).tolist() == [1.0, 2.0, 4.0]


def test_a_dozen_trainings_and_classes_can_be_told_apart():
    runs = {str(number): {"step": [1], "total": [1.0]} for number in range(12)}
    (panel,) = curves_figure(runs).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in panel.lines[1::2]}) == 12
    organs = 13  # of Synapse
    assert len(set(colours(organs))) == organs


def test_costs_are_drawn_against_the_edge():
    costs = [
        Cost(network, blocks, edge, gflops=edge * blocks, memory_mib=edge, parameters=1)
        for network in ("KAF-UNet", "SwinUNETR")
        for blocks in (4, 8)
        for edge in (64, 32)
    ]
    figure = compute_figure(costs)
    operations, memory = figure.axes
    assert len(operations.lines) == len(memory.lines) == 4
    assert operations.lines[1].get_xydata().tolist() == [[32, 256], [64, 512]]
    assert memory.lines[0].get_xydata().tolist() == [[32, 32], [64, 64]]
    figure.draw_without_rendering()
    shown = [
        tick.label1.get_text() for tick in operations.yaxis.get_major_ticks() if tick.label1.get_visible()
    ]
    assert {"200", "500"} <= set(shown)


@pytest.mark.parametrize("ending", ["png", "pdf", "svg", "PNG"])
def test_the_same_figure_gives_the_same_bytes(view, tmp_path, ending):
    paths = [tmp_path / f"{name}.{ending}" for name in "ab"]
    for path in paths:
        save_figure(draw_keypoints_of(view, [1], seed=3), path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[ending.lower()]
    assert first.startswith(start)


def test_other_endings_and_places_are_refused(view, tmp_path):
    figure = draw_keypoints_of(view, [1])
    with pytest.raises(UserError, match=r"NAME.png, NAME.pdf or NAME.svg, got figure.jpg"):
        save_figure(figure, tmp_path / "figure.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        save_figure(figure, tmp_path / "file" / "figure.png")
    assert torch.is_grad_enabled()
