"""The Explore panel: each view on a small heart, with an untrained and a pretrained network."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
from napari.utils.interactions import (
    mouse_move_callbacks,
    mouse_press_callbacks,
    mouse_release_callbacks,
)
from qtpy.QtCore import Qt

from napari_kaf import _explore_layers
from napari_kaf._explore_lab import Lab
from napari_kaf._jobs import Control
from napari_kaf._similarity_task import SimilarityAnswer, similarity_task
from napari_kaf.widgets._similarity_view import _picture

KEYPOINTS, MATCHES, ATTENTION, SIMILARITY, LOOK_ALIKES = range(5)


def settle(panel, qtbot) -> None:
    qtbot.waitUntil(lambda: not panel.exploration.desk.busy, timeout=120_000)


@pytest.fixture
def explored(open_panel, small_heart, qtbot):
    """Viewer and panel on the small heart with random weights, the third slice shown."""
    viewer, panel = open_panel("Explore", small_heart)
    settle(panel, qtbot)
    panel.session.go_to(2)
    settle(panel, qtbot)
    return viewer, panel


@pytest.fixture
def trained(explored, pretrained, qtbot):
    """The same with a pretrained network."""
    viewer, panel = explored
    panel.model.add_file(pretrained)
    settle(panel, qtbot)
    return viewer, panel


def see(panel, qtbot, tab: int) -> None:
    panel.tabs.setCurrentIndex(tab)
    settle(panel, qtbot)


def layer(viewer, part):
    return _explore_layers.find(viewer, part)


def click(viewer, voxel, *, drag: float = 0.0, button: int = 1) -> None:
    """Press and release the mouse over a voxel of the first layer, perhaps far apart."""
    event = SimpleNamespace(
        type="mouse_press",
        pos=np.array([100.0, 100.0]),
        position=tuple(viewer.layers[0].data_to_world(voxel)),
        button=button,
        modifiers=(),
        is_dragging=False,
    )
    mouse_press_callbacks(viewer, event)
    event.type, event.pos, event.is_dragging = "mouse_move", event.pos + drag, True
    mouse_move_callbacks(viewer, event)
    event.type = "mouse_release"
    mouse_release_callbacks(viewer, event)


def test_without_a_volume_it_says_what_to_do(open_panel):
    viewer, panel = open_panel("Explore")
    for tab in range(5):
        panel.tabs.setCurrentIndex(tab)
        assert "No volume is open" in panel.views[tab].status.text()
    assert not panel.place.isEnabled()
    assert not viewer.layers


def test_random_weights_are_said_plainly(explored, pretrained, qtbot):
    _viewer, panel = explored
    assert "<b>Untrained: random weights" in panel.note.text()
    panel.model.add_file(pretrained)
    settle(panel, qtbot)
    assert panel.note.text().startswith("Pretrained without labels for 7 steps")


def test_keypoints_follow_the_slider(explored, qtbot):
    viewer, panel = explored
    points = layer(viewer, "keypoints")
    assert panel.keypoints.status.text() == f"{len(points.data)} keypoints on slice 2"
    assert len(points.data) > 5
    assert set(points.data[:, 0]) == {2}
    assert points.features["descriptor"][0].shape == (128,)
    np.testing.assert_allclose(points.size, points.features["scale"])
    assert viewer.layers.selection.active is viewer.layers[0]
    panel.session.go_to(3)
    settle(panel, qtbot)
    assert set(points.data[:, 0]) == {3}
    assert panel.keypoints.status.text() == f"{len(points.data)} keypoints on slice 3"
    assert len(points.features) == len(points.data)


def test_keypoints_lie_where_the_engine_finds_them(explored):
    from kaf_model.config import Recipe
    from kaf_model.keypoints import make_detector
    from kaf_model.slices import Slices

    viewer, panel = explored
    recipe = Recipe.preset("small")
    stack = Slices(panel.session.opened.volume, recipe.slices)  # resampled: 2.4 mm to 1.5 mm
    found = make_detector(recipe.keypoints).detect(stack.images([2])[0])
    points = layer(viewer, "keypoints")
    np.testing.assert_allclose(points.data[:, 1:], stack.points_to_source(found.positions), atol=1e-4)
    np.testing.assert_allclose(points.size, found.scales * 1.5 / 2.4, rtol=0.03)


def test_cap_and_thresholds_change_the_count(explored, qtbot):
    viewer, panel = explored
    view, before = panel.keypoints, len(layer(viewer, "keypoints").data)
    view.contrast.setValue(0.01)
    settle(panel, qtbot)
    many = len(layer(viewer, "keypoints").data)
    assert many > before
    view.cap.setValue(3)
    settle(panel, qtbot)
    assert len(layer(viewer, "keypoints").data) == 3
    assert "cap was reached" in view.status.text()
    view.contrast.setValue(0.5)
    settle(panel, qtbot)
    assert view.status.text().startswith("0 keypoints on slice 2. Lower the contrast")
    assert len(layer(viewer, "keypoints").data) == 0
    view.reset.click()
    settle(panel, qtbot)
    assert len(layer(viewer, "keypoints").data) == before


def test_keypoints_of_the_whole_volume_with_orientations(explored, qtbot):
    viewer, panel = explored
    view = panel.keypoints
    view.extent.setCurrentIndex(1)
    view.orientations.setChecked(True)
    settle(panel, qtbot)
    points, lines = layer(viewer, "keypoints"), layer(viewer, "orientations")
    assert len(np.unique(points.data[:, 0])) == 5
    assert f"{len(points.data)} keypoints on 5 slices" in view.status.text()
    np.testing.assert_allclose(lines.data[:, 0], points.data)
    length = np.linalg.norm(lines.data[:, 1], axis=1)
    np.testing.assert_allclose(length, points.size / 2, rtol=0.05)
    angle = np.deg2rad(points.features["angle"])
    np.testing.assert_allclose(lines.data[:, 1, 1] / length, np.sin(angle), atol=0.05)
    view.orientations.setChecked(False)
    assert layer(viewer, "orientations") is None


def test_a_detector_that_is_not_there_is_explained(explored, qtbot, monkeypatch):
    _viewer, panel = explored
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    panel.keypoints.detector.setCurrentText("SuperPoint")
    settle(panel, qtbot)
    assert panel.keypoints.status.text().startswith("It did not work: ")
    assert not panel.keypoints.contrast.isEnabled()


def test_heuristic_matches_are_counted(explored, qtbot):
    _viewer, panel = explored
    see(panel, qtbot, MATCHES)
    view = panel.matches
    pair = view._pair
    told = f"{len(pair.pairs)} matched; unmatched: {len(pair.points[0]) - len(pair.pairs)} on slice 2"
    assert view.heuristic_words.text().startswith(told)
    assert "no trained matcher" in view.learned_words.text()
    assert not view.probability.isEnabled()
    counts = []
    for ratio in (1.0, 0.8, 0.6):
        view.ratio.setValue(ratio)
        settle(panel, qtbot)
        counts.append(len(view._pair.pairs))
    assert counts[0] > counts[1] > counts[2]
    view.ratio.setValue(1.0)
    view.radius.setValue(3)
    settle(panel, qtbot)
    assert len(view._pair.pairs) < counts[0]
    apart = view._pair.points[0][view._pair.pairs[:, 0]] - view._pair.points[1][view._pair.pairs[:, 1]]
    assert np.abs(apart).sum(axis=1).max(initial=0) < 3


def test_the_neighbour_lies_at_the_chosen_distance(explored, qtbot):
    _viewer, panel = explored
    see(panel, qtbot, MATCHES)
    panel.matches.distance.setValue(2)
    settle(panel, qtbot)
    assert (panel.matches._pair.z0, panel.matches._pair.z1) == (2, 4)
    panel.session.go_to(4)
    settle(panel, qtbot)
    assert (panel.matches._pair.z0, panel.matches._pair.z1) == (4, 2)
    panel.matches.distance.setValue(4)
    panel.session.go_to(2)
    settle(panel, qtbot)
    assert "No slice lies 4 from this one" in panel.matches.status.text()
    assert panel.matches.heuristic.isHidden()


@pytest.fixture
def matcher(monkeypatch):
    """Matches by a matcher that is sure of the first keypoints and less so of the next."""
    from kaf_model.explore.matches import LearnedMatches

    def learned(self: Lab, z0: int, z1: int) -> LearnedMatches:
        counts = [len(self.view().keypoints(z)) for z in (z0, z1)]
        first = np.arange(min(counts))
        return LearnedMatches(
            np.column_stack([first, first]),
            np.linspace(0.9, 0.1, len(first)).astype(np.float32),
            *(np.zeros(count, np.float32) for count in counts),
        )

    monkeypatch.setattr(Lab, "learned", learned)


def test_learned_matches_lie_beside_the_heuristic_ones(matcher, trained, qtbot):
    _viewer, panel = trained
    see(panel, qtbot, MATCHES)
    view = panel.matches
    view.probability.setValue(0)
    left, right = map(len, view._pair.points)
    total = min(left, right)
    told = f"{total} matched; unmatched: {left - total} on slice 2, {right - total} on slice 3; "
    assert view.learned_words.text().startswith(told)
    assert not view.learned.isHidden()
    assert not view.heuristic.isHidden()
    view.probability.setValue(0.5)
    assert view.learned_words.text().startswith(f"{-(-total // 2)} matched; ")


def test_the_trained_matcher_is_asked(trained, qtbot):
    from kaf_model.explore.matches import learned_matches

    _viewer, panel = trained
    see(panel, qtbot, MATCHES)
    expected = learned_matches(panel.exploration.lab.view(), 2, 3)
    np.testing.assert_array_equal(panel.matches._pair.learned, expected.pairs)
    np.testing.assert_allclose(panel.matches._pair.probabilities, expected.probabilities)


def test_tracks_go_through_the_stack(matcher, trained, qtbot):
    viewer, panel = trained
    see(panel, qtbot, MATCHES)
    view = panel.matches
    view.probability.setValue(0)
    view.tracks.setChecked(True)
    settle(panel, qtbot)
    tracks, learned = layer(viewer, "tracks"), layer(viewer, "learned tracks")
    assert (
        view.tracks_words.text()
        == f"{len(np.unique(tracks.data[:, 0]))} tracks, {len(np.unique(learned.data[:, 0]))} learned tracks"
    )
    assert learned.color_by == "probability"
    closest = tracks.features["descriptor distance"].argmin()
    assert tracks.color_by == "closeness"
    assert tracks.features["closeness"][closest] == 1
    for one in np.unique(tracks.data[:, 0]):
        assert set(np.diff(tracks.data[tracks.data[:, 0] == one, 1])) == {1}
    asked = view._followed
    panel.session.go_to(1)  # the whole stack is there already
    settle(panel, qtbot)
    assert view._followed is asked
    assert layer(viewer, "tracks") is tracks
    view.tracks.setChecked(False)
    assert layer(viewer, "tracks") is None
    assert layer(viewer, "learned tracks") is None


def test_attention_of_the_keypoint_that_is_clicked(trained, qtbot):
    viewer, panel = trained
    see(panel, qtbot, ATTENTION)
    view = panel.attention
    assert "Press Pick a place" in view.status.text()
    target = panel.exploration.lab.view().keypoints(2).positions[4]
    panel.exploration.pick((2.0, float(target[0]), float(target[1])))
    settle(panel, qtbot)
    assert [view.level.itemText(i) for i in range(view.level.count())] == ["2", "4"]
    assert (view.block.count(), view.head.count()) == (2, 3)
    points, arrows = layer(viewer, "attention"), layer(viewer, "attention arrows")
    assert points.features["weight"].sum() == pytest.approx(1, abs=1e-4)
    assert len(arrows.data) == min(view.strongest.value(), len(points.data) - 1)
    np.testing.assert_allclose(arrows.data[:, 0, 1:], np.tile(target, (len(arrows.data), 1)), atol=1e-4)
    assert view.status.text().startswith(f"Keypoint 5 of {len(points.data)} on slice 2, 0.0 mm")
    mean = points.features["weight"].to_numpy()
    heads = []
    for head in (1, 2):
        view.head.setCurrentIndex(head)
        view.head.activated.emit(head)
        settle(panel, qtbot)
        heads.append(points.features["weight"].to_numpy())
    np.testing.assert_allclose(np.mean(heads, axis=0), mean, atol=1e-6)
    view.style_box.setCurrentIndex(0)
    assert layer(viewer, "attention") is None


def test_attention_without_keypoints_is_explained(trained, qtbot, monkeypatch):
    from kaf_model.explore.views import VolumeView
    from kaf_model.keypoints import Keypoints

    _viewer, panel = trained
    monkeypatch.setattr(VolumeView, "keypoints", lambda self, z, config=None: Keypoints.empty(128))
    see(panel, qtbot, ATTENTION)
    panel.exploration.pick((0.0, 3.0, 3.0))
    settle(panel, qtbot)
    assert "slice 0 has no keypoints" in panel.attention.status.text()


def test_a_network_without_kaf_layers_has_no_attention(explored, qtbot, tmp_path):
    from kaf_model.checkpoint import ClassLabel, Model
    from kaf_model.config import KeypointConfig, ModelConfig, SliceConfig
    from kaf_model.unet import build_network

    config = ModelConfig.preset("small", architecture="unet", start_channels=4)
    classes = (ClassLabel(0, "background"), ClassLabel(1, "heart"))
    model = Model(build_network(config), config, SliceConfig(), KeypointConfig(), classes)
    viewer, panel = explored
    panel.model.add_file(model.save(tmp_path / "plain.safetensors"))
    settle(panel, qtbot)
    assert panel.note.text().startswith("Finetuned")
    panel.exploration.pick((2.0, 20.0, 20.0))
    see(panel, qtbot, ATTENTION)
    assert "no KAF layers" in panel.attention.status.text()
    see(panel, qtbot, SIMILARITY)
    assert layer(viewer, "similarity") is not None


def test_a_network_with_other_levels_is_refused_in_words(explored, qtbot, tmp_path):
    from kaf_model.checkpoint import ClassLabel, Model
    from kaf_model.config import KeypointConfig, ModelConfig, SliceConfig
    from kaf_model.unet import build_network

    config = ModelConfig.preset("small", architecture="swin-unet", start_channels=12)
    classes = (ClassLabel(0, "background"), ClassLabel(1, "heart"))
    model = Model(build_network(config), config, SliceConfig(), KeypointConfig(), classes)
    _viewer, panel = explored
    panel.model.add_file(model.save(tmp_path / "swin.safetensors"))
    settle(panel, qtbot)
    assert "a swin-unet has no four levels" in panel.note.text()
    assert "a swin-unet has no four levels" in panel.keypoints.status.text()


def test_similarity_of_a_clicked_voxel(trained, qtbot):
    viewer, panel = trained
    see(panel, qtbot, SIMILARITY)
    panel.place.pick.click()
    click(viewer, (2, 20, 33))
    assert panel.exploration.place == pytest.approx((2, 20, 33))
    settle(panel, qtbot)
    view, heat = panel.similarity, layer(viewer, "similarity")
    assert heat.data.shape == (3, 48, 64)
    np.testing.assert_allclose(heat.translate - viewer.layers[0].translate, [16, 0, 0], atol=1e-4)
    assert view._answer.maps[2, 1][20, 33] == pytest.approx(1, abs=1e-5)  # a place is like itself
    assert all(-1 <= one.min() <= one.max() <= 1 for one in view._answer.maps.values())
    assert [len(row) for row in view.grid.pictures] == [4, 4, 4]
    view.neighbours.setValue(5)
    settle(panel, qtbot)
    assert heat.data.shape == (5, 48, 64)
    cell = view.grid.cell(4, 0).center().toPoint()
    qtbot.mouseClick(view.grid, Qt.MouseButton.LeftButton, pos=cell)
    settle(panel, qtbot)
    assert panel.session.slice == 4
    assert view.level.currentText() == "1"


def test_cells_that_go_beyond_a_slice_do_so_in_its_picture(qapp):
    """Squeezed into the slice, the brightest cell would not be under the cross."""
    image = np.zeros((33, 41), np.float32)
    maps = {
        (0, level): np.zeros((-(-33 // side), -(-41 // side)), np.float32) for level, side in ((1, 1), (4, 8))
    }
    answer = SimilarityAnswer((0, 32, 40), 4, [0], {0: image}, (32.0, 40.0), maps, image, 0.0, 0.0)
    assert _picture(answer, 0, 1, (0, 1)).reach == (1, 1)
    assert _picture(answer, 0, 4, (0, 1)).reach == (40 / 33, 48 / 41)


def test_a_second_place_needs_no_network(trained, qtbot, monkeypatch):
    from kaf_model.explore.explorer import Explorer

    _viewer, panel = trained
    panel.exploration.pick((2.0, 20.0, 33.0))
    see(panel, qtbot, SIMILARITY)
    first = panel.similarity._answer
    monkeypatch.setattr(Explorer, "encode", lambda *_: pytest.fail("the network ran again"))
    panel.exploration.pick((2.0, 30.0, 12.0))
    settle(panel, qtbot)
    assert panel.similarity._answer is not first
    assert panel.similarity._answer.place == (2.0, 30.0, 12.0)
    assert "Shown " in panel.similarity.status.text()


def test_comparing_takes_less_than_300_ms_of_the_processor(plugin_home):
    from kaf_model.volume import Volume

    noise = np.random.default_rng(0).normal(size=(3, 256, 256)).astype(np.float32)
    lab = Lab(volume=Volume.from_array(noise, (5.0, 1.5, 1.5)), model=None, preset="small", device="cpu")
    times = []
    for x in range(5):
        began = time.process_time()
        for _report in similarity_task(lab, (1.0, 100.0, 100.0 + x), 1, 1, Control()):
            pass
        times.append(time.process_time() - began)
    assert min(times[1:]) < 0.3


def test_equivariance_under_two_augmentations(trained, qtbot):
    _viewer, panel = trained
    view = panel.similarity
    panel.exploration.pick((2.0, 24.0, 32.0))
    see(panel, qtbot, SIMILARITY)
    assert view.augmented.isHidden()
    view.augment.setChecked(True)
    settle(panel, qtbot)
    assert "Equivariance error of this place" in view.error_words.text()
    assert "of chance" in view.whole_words.text()
    assert [len(row) for row in view.augmented.pictures] == [3, 3]
    before = view.whole_words.text()
    view.again.click()
    settle(panel, qtbot)
    assert view.whole_words.text() != before
    view.augment.setChecked(False)
    assert view.augmented.isHidden()
    assert not view.whole_words.text()


def test_look_alikes_lie_in_other_slices_and_a_click_goes_there(trained, qtbot):
    viewer, panel = trained
    panel.exploration.pick((2.0, 20.0, 33.0))
    see(panel, qtbot, LOOK_ALIKES)
    buttons = panel.look_alikes.buttons
    assert 1 < len(buttons) <= 1 + panel.look_alikes.count.value()
    slices = [int(button.text().split(",")[0].removeprefix("z ")) for button in buttons]
    assert slices[0] == 2
    assert 2 not in slices[1:]
    buttons[1].click()
    assert panel.session.slice == slices[1]
    np.testing.assert_allclose(layer(viewer, "places").data[0], [2, 20, 33])
    assert layer(viewer, "places").data[1, 0] == slices[1]
    buttons[0].click()
    assert panel.session.slice == 2


def test_picking_never_disturbs_painting(explored, qtbot, notifications):
    viewer, panel = explored
    panel.session.new_labels()
    labels = panel.session.labels
    labels.selected_label = 3
    see(panel, qtbot, SIMILARITY)
    click(viewer, (2, 20, 33))  # the label layer is selected: nothing is picked
    assert panel.exploration.place is None
    panel.place.pick.click()
    assert viewer.layers.selection.active is layer(viewer, "places")
    assert labels.mode == "paint"
    before = labels.data.copy()
    click(viewer, (2, 20, 33), drag=30)  # moves the camera
    click(viewer, (2, 20, 33), button=2)
    assert panel.exploration.place is None
    click(viewer, (2, 20, 33))
    assert panel.exploration.place == pytest.approx((2, 20, 33))
    settle(panel, qtbot)
    np.testing.assert_array_equal(labels.data, before)
    assert panel.place.pick.isChecked()
    click(viewer, (2, 20, 900))
    assert "outside the volume" in notifications[-1]
    panel.place.pick.click()
    assert viewer.layers.selection.active is labels
    assert (labels.mode, labels.selected_label) == ("paint", 3)
    panel.place.pick.click()
    viewer.layers.selection.active = labels  # going back to draw ends the picking
    assert not panel.place.pick.isChecked()
    click(viewer, (2, 10, 10))
    assert panel.exploration.place == pytest.approx((2, 20, 33))


def test_the_wheel_moves_no_slider_it_passes_over(explored):
    from qtpy.QtCore import QPoint, QPointF
    from qtpy.QtGui import QWheelEvent
    from qtpy.QtWidgets import QAbstractSlider, QApplication

    viewer, panel = explored
    viewer.show()
    turn = QWheelEvent(
        QPointF(5, 5),
        QPointF(5, 5),
        QPoint(0, 0),
        QPoint(0, -120),
        Qt.MouseButton.NoButton,
        Qt.KeyboardModifier.NoModifier,
        Qt.ScrollPhase.NoScrollPhase,
        False,
    )
    radius = panel.matches.radius
    before = radius.value()
    for slider in [radius, *radius.findChildren(QAbstractSlider)]:
        QApplication.sendEvent(slider, turn)
    assert radius.value() == before


def test_places_can_be_typed(explored, qtbot):
    _viewer, panel = explored
    panel.place.y_box.setValue(7)
    panel.place.x_box.setValue(9)
    assert panel.exploration.place == (2.0, 7.0, 9.0)
    assert panel.place.told.text() == "Place: slice 2, y 7, x 9."
    panel.session.go_to(4)
    assert panel.place.told.text() == "Place: slice 2, y 7, x 9; the slice you see is 4."


def test_layers_go_when_asked_and_stay_away(explored, qtbot):
    viewer, panel = explored
    panel.session.new_labels()
    labels = panel.session.labels
    panel.exploration.pick((2.0, 20.0, 33.0))
    see(panel, qtbot, SIMILARITY)
    names = [one.name for one in viewer.layers if one.name.startswith("Explore: ")]
    assert names == ["Explore: keypoints", "Explore: similarity", "Explore: places"]
    assert not layer(viewer, "keypoints").visible  # of another tab
    panel.remove.click()
    assert [one.name for one in viewer.layers] == ["heart_003", labels.name]
    see(panel, qtbot, KEYPOINTS)
    panel.session.go_to(1)
    settle(panel, qtbot)
    assert layer(viewer, "keypoints") is None
    assert "keypoints on slice 1" in panel.keypoints.status.text()  # the count is still shown
    panel.keypoints.show_box.setChecked(True)
    settle(panel, qtbot)
    assert layer(viewer, "keypoints") is not None
    assert viewer.layers.selection.active is labels


def test_the_layers_lie_together_with_the_places_on_top(explored, qtbot):
    viewer, panel = explored
    panel.session.new_labels()  # above the keypoints
    panel.exploration.pick((2.0, 20.0, 33.0))
    see(panel, qtbot, SIMILARITY)
    assert [one.name for one in viewer.layers] == [
        "heart_003",
        "Explore: keypoints",
        "Explore: similarity",
        "Explore: places",
        "heart_003 labels",
    ]


def test_a_layer_that_the_user_deletes_stays_deleted(explored, qtbot):
    viewer, panel = explored
    viewer.layers.remove(layer(viewer, "keypoints"))
    assert not panel.keypoints.show_box.isChecked()
    assert "You deleted the layer" in panel.keypoints.status.text()
    panel.session.go_to(1)
    settle(panel, qtbot)
    assert layer(viewer, "keypoints") is None


def test_closing_takes_the_layers_and_the_questions_along(explored, qtbot):
    viewer, panel = explored
    panel.session.new_labels()
    labels = panel.session.labels
    panel.exploration.pick((2.0, 20.0, 33.0))
    panel.place.pick.click()
    panel.tabs.setCurrentIndex(LOOK_ALIKES)  # is asking now
    viewer.window.remove_dock_widget("all")
    assert not [one for one in viewer.layers if one.name.startswith("Explore")]
    assert viewer.layers.selection.active is labels
    assert panel.exploration.picking._pressed not in viewer.mouse_drag_callbacks


def test_the_panel_can_be_opened_again(explored, qtbot):
    viewer, _panel = explored
    viewer.window.remove_dock_widget("all")
    _dock, again = viewer.window.add_plugin_dock_widget("napari-kaf", "Explore")
    settle(again, qtbot)
    assert layer(viewer, "keypoints") is not None


def test_deleting_the_volume_ends_everything(explored, qtbot):
    viewer, panel = explored
    panel.exploration.pick((2.0, 20.0, 33.0))
    panel.tabs.setCurrentIndex(LOOK_ALIKES)
    viewer.layers.remove(viewer.layers[0])
    panel.session.poll()
    assert not panel.exploration.desk.busy
    assert "No volume is open" in panel.look_alikes.status.text()
    assert not viewer.layers


def test_another_model_drops_what_the_first_would_answer(explored, pretrained, qtbot):
    viewer, panel = explored
    panel.exploration.pick((2.0, 20.0, 33.0))
    panel.tabs.setCurrentIndex(SIMILARITY)  # asks the first
    panel.model.add_file(pretrained)
    assert layer(viewer, "similarity") is None
    settle(panel, qtbot)
    assert panel.similarity._answer.maps[2, 1].shape == (48, 64)  # this one does not resample
    assert layer(viewer, "similarity") is not None


def test_a_checkpoint_that_broke_is_explained(explored, pretrained, qtbot, tmp_path):
    _viewer, panel = explored
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(pretrained.read_bytes())
    panel.model.add_file(broken)
    settle(panel, qtbot)
    broken.write_bytes(pretrained.read_bytes()[:-1000])
    panel.model.box.activated.emit(panel.model.box.currentIndex())
    settle(panel, qtbot)
    assert "The model was not loaded" in panel.note.text()
    assert "broken" in panel.keypoints.status.text()
    panel.model.box.setCurrentIndex(0)
    panel.model._tell()
    settle(panel, qtbot)
    assert "keypoints on slice 2" in panel.keypoints.status.text()


def test_cancel_says_so_and_the_tab_can_ask_again(explored, qtbot):
    _viewer, panel = explored
    panel.exploration.pick((2.0, 20.0, 33.0))
    panel.tabs.setCurrentIndex(LOOK_ALIKES)
    assert not panel.busy_row.isHidden()
    panel.cancel.click()
    assert panel.busy_row.isHidden()
    assert panel.look_alikes.status.text().startswith("Cancelled")
    panel.tabs.setCurrentIndex(KEYPOINTS)
    see(panel, qtbot, LOOK_ALIKES)
    assert panel.look_alikes.buttons


def test_loading_can_be_cancelled_and_asked_for_again(explored, pretrained, qtbot):
    _viewer, panel = explored
    panel.model.add_file(pretrained)
    panel.cancel.click()
    assert "cancelled; choose it again" in panel.note.text()
    panel.model.box.activated.emit(panel.model.box.currentIndex())
    settle(panel, qtbot)
    assert panel.note.text().startswith("Pretrained")


def test_a_picture_of_one_slice_has_no_neighbours(open_panel, qtbot):
    viewer, panel = open_panel("Explore")
    viewer.add_image(np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32), name="picture")
    panel.session.poll()
    settle(panel, qtbot)
    assert "keypoints on slice 0" in panel.keypoints.status.text()
    see(panel, qtbot, MATCHES)
    assert "single slice" in panel.matches.status.text()
    panel.place.pick.click()
    click(viewer, (20, 30))
    see(panel, qtbot, SIMILARITY)
    assert layer(viewer, "similarity").data.shape == (48, 64)
    see(panel, qtbot, LOOK_ALIKES)
    assert "single slice" in panel.look_alikes.status.text()
