"""What a network sees in a volume, on cases that can be checked by eye."""

import numpy as np
import pytest
import torch
from explore_cases import SHAPE, constant, heart, pretrained, pretrained_checkpoint, tiny_recipe

from kaf_model.checkpoint import ClassLabel, Model
from kaf_model.config import CorrespondenceConfig
from kaf_model.correspondences import UNMATCHED, find_correspondences
from kaf_model.errors import UserError
from kaf_model.explore.attention_weights import attention_weights
from kaf_model.explore.equivariance import augment_slice
from kaf_model.explore.explorer import Explorer
from kaf_model.explore.matches import learned_matches, match_features
from kaf_model.explore.similarity import look_alikes, peaks, similarity_maps
from kaf_model.explore.views import (
    LEVELS,
    SliceFeatures,
    VolumeView,
    cell_centres,
    cells_of,
    cells_shape,
    level_to_pixels,
)
from kaf_model.keypoints import KeypointCache, Keypoints
from kaf_model.unet import build_network
from kaf_model.volume import Volume


def finished(work):
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


@pytest.fixture(scope="module")
def view():
    return VolumeView(Explorer.untrained(tiny_recipe()), heart())


@pytest.fixture(scope="module")
def trained_view():
    return VolumeView(pretrained(), heart())


# --- the network and what it knows ------------------------------------------------------------------------


def test_three_kinds_of_network_say_what_they_are(tmp_path):
    assert Explorer.untrained(tiny_recipe(), seed=4).kind == "untrained"
    assert "random weights (seed 4)" in Explorer.untrained(tiny_recipe(), seed=4).note
    with_matcher, without = pretrained(), pretrained(weight_local=0.0)
    assert with_matcher.kind == without.kind == "pretrained"
    assert (
        with_matcher.note
        == "Pretrained without labels for 7 steps with L_PCL, L_global, L_local; it has a matcher."
    )
    assert without.matching is None
    assert without.note.endswith("with L_PCL, L_global; it has no matcher.")
    recipe = tiny_recipe()
    model = Model(
        build_network(recipe.model).eval(),
        recipe.model,
        recipe.slices,
        recipe.keypoints,
        (ClassLabel(0, "background"), ClassLabel(1, "heart")),
        history=({"steps": 12, "labelled_slices": ["a:1", "a:2"]},),
    )
    model.save(tmp_path / "model.safetensors")
    for finetuned in (Explorer.from_model(model), Explorer.load(tmp_path / "model.safetensors")):
        assert finetuned.kind == "finetuned"
        assert finetuned.note.startswith("Finetuned for 12 steps on 2 labelled slices; it has no matcher")
        own = dict(model.network.encoder.named_parameters())
        assert all(torch.equal(own[name], value) for name, value in finetuned.encoder.named_parameters())


def test_networks_without_four_halving_blocks_are_refused():
    recipe = tiny_recipe()
    swin = recipe.override(model=recipe.model.override(architecture="swin-unetr", start_channels=12))
    with pytest.raises(UserError, match="a swin-unetr has no four levels"):
        Explorer.untrained(swin)


def test_an_untrained_network_is_that_of_its_seed_and_leaves_the_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, again = (Explorer.untrained(tiny_recipe(), seed=2) for _ in range(2))
    other = Explorer.untrained(tiny_recipe(), seed=3)
    assert torch.equal(torch.rand(3), expected)
    name = "blocks.0.0.weight"
    weights = [dict(one.encoder.named_parameters())[name] for one in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_what_is_recorded_is_what_the_encoder_computes(view):
    explorer, z = view.explorer, 1
    found = view.features(z)
    image = torch.nn.functional.pad(
        torch.from_numpy(view.image(z))[None, None], (0, 4, 0, 7), mode="replicate"
    )
    points = torch.from_numpy(view.keypoints(z).positions)[None]
    with torch.inference_mode():
        encoded = explorer.encoder(image, points)
    for level, own, expected in zip(LEVELS, found.maps, encoded.maps, strict=True):
        height, width = cells_shape((41, 60), level)
        cropped = expected[0, :, :height, :width]
        torch.testing.assert_close(own, (cropped / cropped.norm(dim=0)).permute(1, 2, 0))
    assert set(found.keypoint_features) == {2, 4}
    for own, expected in zip(found.keypoint_features.values(), encoded.keypoint_features, strict=True):
        torch.testing.assert_close(own, expected)
    assert not any(block._forward_pre_hooks for block in explorer.encoder.modules())


# --- places -----------------------------------------------------------------------------------------------


def test_a_network_that_reads_slices_together_is_looked_into():
    recipe = tiny_recipe()
    recipe = recipe.override(slices=recipe.slices.override(context=1))
    view = VolumeView(Explorer.untrained(recipe), heart())
    assert view.read(1).shape == (3, 41, 60)
    assert np.array_equal(view.image(1), view.stack.images([1])[0])
    assert np.array_equal(view.read(1)[2], view.image(2))
    changed = view.volume.array.copy()
    changed[2] = changed[2, ::-1]
    other = VolumeView(view.explorer, Volume.from_array(changed, view.volume.spacing, name="other"))
    apart = [(view.features(z).maps[0] - other.features(z).maps[0]).abs().max().item() for z in range(4)]
    assert [difference > 1e-3 for difference in apart] == [False, True, True, True]
    moved = augment_slice(view, 1, seed=2)
    assert moved.inputs.shape == (3, *moved.image.shape)


def test_places_go_from_voxels_to_pixels_to_cells_and_back():
    # 3 mm voxels at 1.5 mm: every voxel is two pixels wide, its centre between them.
    view = VolumeView(Explorer.untrained(tiny_recipe(spacing=1.5)), heart())
    assert view.shape == (82, 120)
    np.testing.assert_allclose(view.to_pixels([(2, 0, 10)]), [(0.5, 20.5)])
    np.testing.assert_allclose(view.to_voxels(2, [(0.5, 20.5)]), [(2, 0, 10)])
    assert cells_of([(0.5, 20.5), (200, -3)], 3, view.shape).tolist() == [[0, 5], [20, 0]]
    np.testing.assert_allclose(cell_centres([(0, 5)], 3), [(1.5, 21.5)])
    assert cells_shape((41, 60), 4) == (6, 8)
    with pytest.raises(ValueError, match="level must be 1"):
        cells_of([(0, 0)], 5, view.shape)


def test_a_map_lies_over_its_voxels():
    view = VolumeView(Explorer.untrained(tiny_recipe(spacing=1.5)), heart())
    cells = torch.zeros(cells_shape(view.shape, 3))
    cells[4, 10] = 1.0  # pixels 16..19 and 40..43, voxels 8..9 and 20..21
    voxels = view.voxel_map(cells, 3)
    assert voxels.shape == SHAPE[1:]
    assert np.unravel_index(voxels.argmax(), voxels.shape) in {(8, 20), (8, 21), (9, 20), (9, 21)}
    np.testing.assert_allclose(voxels[8:10, 20:22], voxels[8, 20], atol=1e-6)
    with pytest.raises(ValueError, match="level 2 of a slice"):
        level_to_pixels(cells[None], 2, view.shape)


def test_keypoints_of_a_slice_are_found_once_and_again_for_other_settings(tmp_path, view):
    found = view.keypoints(1)
    assert len(found) > 5
    assert view.keypoints(1) is found
    fewer = view.keypoints(1, view.explorer.keypoints.override(max_keypoints=3))
    np.testing.assert_array_equal(fewer.positions, found.positions[:3])
    np.testing.assert_array_equal(fewer.scales, found.scales[:3])
    cached = VolumeView(view.explorer, view.volume, cache=KeypointCache(tmp_path))
    np.testing.assert_array_equal(cached.keypoints(1).positions, found.positions)
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_features_are_kept_until_memory_is_full(view):
    size = view.features(0).nbytes
    small = VolumeView(view.explorer, view.volume, limit=round(2.5 * size))
    first = small.features(0)
    small.features(1)
    assert small.features(0) is first
    small.features(2)  # slice 1 was not used for longest
    assert [small.has_features(z) for z in range(4)] == [True, False, True, False]
    tiny = VolumeView(view.explorer, view.volume, limit=0)
    assert tiny.features(3) is tiny.features(3)


def test_a_thumbnail_repeats_the_edge(view):
    image = view.image(1)
    np.testing.assert_array_equal(view.crop(1, (20.2, 29.6), 8), image[16:24, 26:34])
    corner = view.crop(1, (0, 0), 8)
    np.testing.assert_array_equal(corner[4:, 4:], image[:4, :4])
    assert (corner[:5, :5] == image[0, 0]).all()


# --- self-similarity --------------------------------------------------------------------------------------


def test_a_place_is_most_similar_to_itself(view):
    point = (17.3, 40.8)
    maps = similarity_maps(view, 1, point)
    assert [found.level for found in maps] == [1, 2, 3, 4]
    for found in maps:
        row, column = cells_of(point, found.level, view.shape)[0]
        assert found.cells.shape == cells_shape(view.shape, found.level)
        assert found.cells[row, column] == pytest.approx(1, abs=1e-5)
        assert found.cells.max() <= 1
        assert found.cells.min() < 0.999


def test_similarity_is_the_cosine_of_features(view):
    (found,) = similarity_maps(view, 1, (17, 40), slices=[2], levels=[2])
    here = view.features(1).level(2)[8, 20].double()
    there = view.features(2).level(2)[3, 5].double()
    expected = (here @ there) / (here.norm() * there.norm())
    assert float(found.cells[3, 5]) == pytest.approx(float(expected), abs=1e-5)
    assert (found.z, found.level) == (2, 2)


def test_everywhere_on_a_constant_slice_is_alike_but_for_the_edge():
    view = VolumeView(Explorer.untrained(tiny_recipe("unet")), constant())
    assert len(view.keypoints(0)) == 0
    found = similarity_maps(view, 0, (20, 30), slices=[0, 3], levels=[1, 2])
    for one in found:
        edge = 2 if one.level == 1 else 4  # as far as zeros outside of the image are seen
        torch.testing.assert_close(
            one.cells[edge:-edge, edge:-edge], torch.ones_like(one.cells[edge:-edge, edge:-edge])
        )


def test_a_slice_without_keypoints_is_an_ordinary_slice():
    view = VolumeView(pretrained(), constant())
    assert [tuple(found.cells.shape) for found in similarity_maps(view, 0, (3, 3))] == [
        (41, 60),
        (21, 30),
        (11, 15),
        (6, 8),
    ]
    assert attention_weights(view.explorer, view.features(0), 2, 0).shape == (0, 0)
    assert len(learned_matches(view, 0, 1)) == 0


# --- look-alikes ------------------------------------------------------------------------------------------


def test_peaks_keep_their_distance():
    cells = torch.zeros(5, 7)
    cells[1, 1], cells[1, 3], cells[4, 6] = 3.0, 2.0, 1.0
    found, values = peaks(cells, 2, distance=3)
    assert found.tolist() == [[1, 1], [4, 6]]
    assert values.tolist() == [3.0, 1.0]
    assert peaks(cells, 2, distance=2)[0].tolist() == [[1, 1], [1, 3]]
    assert len(peaks(torch.zeros(2, 2), 9, distance=5)[0]) == 1


def test_the_same_slice_again_is_the_best_look_alike():
    array = heart().array
    repeated = Volume.from_array(np.stack([array[1], array[2], array[1]]), (8.0, 3.0, 3.0))
    view = VolumeView(Explorer.untrained(tiny_recipe()), repeated)
    reports = []
    work = look_alikes(view, 0, (20.0, 30.0), level=3, count=3)
    try:
        while True:
            reports.append(next(work))
    except StopIteration as done:
        found = done.value
    assert [report.step for report in reports] == [1, 2]
    assert len(found) == 3
    assert found[0].z == 2
    assert found[0].similarity == pytest.approx(1, abs=1e-5)
    assert found[0].point == (21.5, 29.5)  # the centre of the cell: pixels 20..23 and 28..31
    assert found[0].voxel == (2, 21.5, 29.5)
    assert [one.similarity for one in found] == sorted((one.similarity for one in found), reverse=True)


def test_a_look_alike_lies_on_the_slice_also_where_its_cell_does_not():
    array = np.zeros((2, 33, 41), np.float32)
    array[:, 32, 40] = 100
    volume = Volume.from_array(array, (8.0, 3.0, 3.0))
    view = VolumeView(Explorer.untrained(tiny_recipe()), volume)
    work = look_alikes(view, 0, (32.0, 40.0), level=4, count=1)
    try:
        while True:
            next(work)
    except StopIteration as done:
        (found,) = done.value
    assert found.point == (32, 40)  # the cell goes to pixel 39 and 47


# --- attention --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_are_those_of_the_forward_pass(trained_view):
    explorer, features = trained_view.explorer, trained_view.features(1)
    for level in (2, 4):
        outputs = [*features.attention_inputs[level][1:], features.keypoint_features[level]]
        for number, (block, output) in enumerate(
            zip(explorer.kaf_layer(level).attention, outputs, strict=True)
        ):
            read = features.attention_inputs[level][number]
            heads = [attention_weights(explorer, features, level, number, head) for head in (0, 1)]
            value = block.query_key_value(read)[:, 16:]  # width 8: queries, keys, values
            message = block.merge(
                torch.cat(
                    [weights @ value[:, 4 * head : 4 * head + 4] for head, weights in enumerate(heads)], 1
                )
            )
            torch.testing.assert_close(read + block.mlp(torch.cat([read, message], 1)), output)
            mean = attention_weights(explorer, features, level, number)
            torch.testing.assert_close(mean, (heads[0] + heads[1]) / 2)
            torch.testing.assert_close(mean.sum(1), torch.ones(len(mean)))


def test_unknown_levels_blocks_and_heads_are_refused(trained_view):
    explorer, features = trained_view.explorer, trained_view.features(1)
    with pytest.raises(ValueError, match=r"level 1 has no KAF layer.*2, 4"):
        attention_weights(explorer, features, 1, 0)
    with pytest.raises(ValueError, match="blocks 0 to 1, got 2"):
        attention_weights(explorer, features, 2, 2)
    with pytest.raises(ValueError, match="heads 0 to 1, got 2"):
        attention_weights(explorer, features, 2, 0, 2)
    plain = Explorer.untrained(tiny_recipe("unet"))
    with pytest.raises(ValueError, match="with one: none"):
        plain.kaf_layer(2)


# --- matches ----------------------------------------------------------------------------------------------


def test_learned_matches_are_the_assignment_of_the_pretraining_network(trained_view):
    from kaf_model.attention import PackedKeypoints
    from kaf_model.config import PretrainConfig
    from kaf_model.datasets import pad_keypoints
    from kaf_model.pretrain import PretrainingNetwork

    checkpoint = pretrained_checkpoint()
    network = PretrainingNetwork(
        checkpoint.model, PretrainConfig.model_validate(checkpoint.history[0]["settings"])
    ).eval()
    network.load_state_dict(dict(checkpoint.weights))
    keypoints = [trained_view.keypoints(z).positions for z in (1, 2)]
    images = torch.nn.functional.pad(
        torch.from_numpy(np.stack([trained_view.image(z) for z in (1, 2)]))[:, None],
        (0, 4, 0, 7),
        mode="replicate",
    )
    with torch.inference_mode():
        encoded = network.encoder(images, *pad_keypoints(keypoints))
        projected = network.keypoint_projection(torch.cat(encoded.keypoint_features, 1))
        packed = PackedKeypoints.from_padded(*pad_keypoints(keypoints))
        probabilities = network.matcher(projected, packed, (48, 64)).log_assignment[0].exp().numpy()
    found = learned_matches(trained_view, 1, 2)
    num0, num1 = map(len, keypoints)
    likely = probabilities[:num0, :num1]
    mutual = [
        (a, b)
        for a in range(num0)
        for b in range(num1)
        if likely[a].argmax() == b and likely[:, b].argmax() == a
    ]
    assert [tuple(pair) for pair in found.pairs] == mutual
    assert len(mutual) > 0
    np.testing.assert_allclose(found.probabilities, [likely[pair] for pair in mutual], rtol=1e-4)
    np.testing.assert_allclose(found.unmatched0, probabilities[:num0, -1], rtol=1e-4)
    np.testing.assert_allclose(found.unmatched1, probabilities[-1, :num1], rtol=1e-4)
    assert (found.matches0 == UNMATCHED).sum() == num0 - len(mutual)
    sure = found.likelier_than(float(np.median(found.probabilities)))
    assert 0 < len(sure) <= len(found)
    assert sure.probabilities.min() >= np.median(found.probabilities)


def test_without_a_matcher_it_is_said(view):
    with pytest.raises(UserError, match=r"this untrained network has no matcher.*weight_local"):
        learned_matches(view, 0, 1)
    with pytest.raises(UserError, match="this pretrained network has no matcher"):
        learned_matches(VolumeView(pretrained(weight_local=0.0), view.volume), 0, 1)


def test_one_side_without_keypoints_leaves_all_unmatched(trained_view):
    nothing = SliceFeatures.compute(
        trained_view.explorer, trained_view.read(0), Keypoints.empty(128).positions
    )
    found = match_features(trained_view.explorer, trained_view.features(1), nothing)
    assert len(found) == 0
    assert (found.unmatched0 == 1).all()
    assert len(found.unmatched0) == len(trained_view.keypoints(1))


def test_a_known_shift_is_found_by_the_heuristic():
    # The same texture 3 pixels lower and 5 to the left: every correspondence has that displacement.
    generator = np.random.default_rng(0)
    texture = np.kron(generator.normal(size=(20, 26)), np.ones((4, 4)))
    first, second = texture[10:58, 20:84], texture[7:55, 25:89]
    view = VolumeView(Explorer.untrained(tiny_recipe()), Volume.from_array(np.stack([first, second])))
    keypoints0, keypoints1 = view.keypoints(0), view.keypoints(1)
    found = find_correspondences(keypoints0, keypoints1, CorrespondenceConfig(radius=12.0, ratio=0.8))
    assert len(found) > 20
    moved = keypoints1.positions[found.pairs[:, 1]] - keypoints0.positions[found.pairs[:, 0]]
    assert np.median(np.abs(moved - (3, -5)).max(axis=1)) < 0.1
