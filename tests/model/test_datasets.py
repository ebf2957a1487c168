"""Batches: pure functions of the step, shards of one joint batch, and keypoints that keep their partners."""

import errno
import gc
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kaf_model import datasets, temporary_arrays
from kaf_model.augment import SpatialTransform
from kaf_model.config import AugmentConfig, CorrespondenceConfig, KeypointConfig, SliceConfig
from kaf_model.correspondences import UNMATCHED
from kaf_model.datasets import (
    LabelledSlices,
    PretrainingPairs,
    Shard,
    compact,
    concatenate,
    pad_keypoints,
    stack_padded,
    whole_canvas,
)
from kaf_model.errors import UserError
from kaf_model.keypoints import Keypoints
from kaf_model.labels import ClassMap, LabelledVolume, SliceStatus
from kaf_model.losses import IGNORED
from kaf_model.phantom import make_heart
from kaf_model.preparation import (
    LabelledSlice,
    PreparedVolume,
    SliceStore,
    prepare_labelled,
    prepare_volumes,
    statistics_of,
)
from kaf_model.volume import Volume

CPU = torch.device("cpu")
STRONG = AugmentConfig(crop=(48, 64), elastic_sigma=(6.0, 9.0), elastic_alpha=(0.0, 60.0), mirror=True)
PLAIN = AugmentConfig.preset("none", crop=None)


def finish(generator):
    reports = []
    while True:
        try:
            reports.append(next(generator))
        except StopIteration as done:
            return reports, done.value


def volume(name, num_slices=5, size=(48, 64), seed=0):
    """Slices with keypoints whose descriptors say which anatomy they are: index i is anatomy i everywhere."""
    rng = np.random.default_rng(seed)
    keypoints = []
    places = rng.uniform((4, 4), (size[0] - 5, size[1] - 5), (12, 2))
    anatomy = rng.integers(0, 200, (12, 8))
    for z in range(num_slices):
        shown = rng.permutation(12)[: 12 - z]
        columns = np.column_stack(
            [places[shown] + rng.normal(0, 0.7, (len(shown), 2)), np.ones((len(shown), 3))]
        )
        keypoints.append(Keypoints.from_columns(columns, anatomy[shown]))
    images = rng.normal(size=(num_slices, 1, *size)).astype(np.float16)
    positions = (
        np.linspace(0, 1, num_slices, dtype=np.float32) if num_slices > 1 else np.full(1, 0.5, np.float32)
    )
    return PreparedVolume(name, images, keypoints, positions, (8.0, 1.5, 1.5), {"mean": 1.0, "std": 2.0})


def pretraining_pairs(volumes=None, **settings):
    defaults = {"augment": STRONG, "neighbour_range": 0.3, "batch_size": 6, "seed": 3}
    options = {**defaults, "correspondences": CorrespondenceConfig(radius=15), **settings}
    return PretrainingPairs(volumes or [volume("a"), volume("b", size=(64, 48), seed=1)], **options)


def same(first, second):
    """Whether two batches agree, nested tuples of tensors."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))


# Preparation


def test_volumes_become_slices_with_keypoints(tmp_path):
    heart = make_heart(0, shape=(4, 64, 80))
    (tmp_path / "broken.nii").write_bytes(b"no volume")
    sources = [Volume.from_array(heart.image, heart.spacing, name="one"), tmp_path / "broken.nii"]
    reports, prepared = finish(prepare_volumes(sources, SliceConfig(spacing=2.0), KeypointConfig()))
    (one,) = prepared
    assert one.images.shape == (4, 1, 48, 60)
    assert one.images.dtype == np.float16
    assert len(one) == len(one.keypoints) == 4
    assert one.positions.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert sum(len(found) for found in one.keypoints) > 20
    assert abs(float(one.images.astype(np.float32).mean())) < 0.1
    (passed_over,) = [report.message for report in reports if report.message]
    assert "broken.nii" in passed_over
    assert reports[-1].step == reports[-1].total == 2
    statistics = statistics_of(prepared)
    assert statistics["num_slices"] == 4
    assert statistics["median_spacing_mm"] == [8.0, 1.5, 1.5]


def test_no_usable_volume_is_an_error(tmp_path):
    (tmp_path / "broken.nii").write_bytes(b"no volume")
    with pytest.raises(UserError, match=r"no volume can be used: broken\.nii"):
        finish(prepare_volumes([tmp_path / "broken.nii"], SliceConfig(), KeypointConfig()))
    with pytest.raises(UserError, match="there was none"):
        finish(prepare_volumes([], SliceConfig(), KeypointConfig()))


def test_only_labelled_slices_are_prepared():
    heart = make_heart(1, shape=(6, 48, 64))
    labels = heart.labels.astype(np.int16) * 10
    case = LabelledVolume(
        Volume.from_array(heart.image, heart.spacing, name="one"),
        labels,
        {4: SliceStatus.PARTIAL, 1: SliceStatus.COMPLETE},
    )
    classes = ClassMap.of_labels([case])
    _, (volumes, labelled) = finish(
        prepare_labelled([case], classes, SliceConfig(spacing=None), KeypointConfig())
    )
    assert len(volumes[0]) == len(labelled) == 2
    assert volumes[0].positions.tolist() == pytest.approx([0.2, 0.8])
    assert np.array_equal(labelled[0].labels, heart.labels[1])
    assert np.array_equal(
        labelled[1].labels, np.where(heart.labels[4] == 0, IGNORED, heart.labels[4].astype(int))
    )


def test_slices_beyond_the_limit_lie_in_files(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary_arrays.tempfile, "tempdir", str(tmp_path))
    store = SliceStore(limit=2 * 100)
    arrays = [store.empty((10, 10)), store.empty((2, 3, 4)), store.empty((5, 4))]
    assert [isinstance(array, np.memmap) for array in arrays] == [False, True, True]
    for index, array in enumerate(arrays):
        array[...] = index
    part = arrays[1][1]
    del store
    gc.collect()
    assert [float(array.mean()) for array in arrays] == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) > 0
    del arrays, array
    gc.collect()
    assert float(part.sum()) == 12  # a part keeps its whole
    del part
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_files_of_slices_have_their_disk_space(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary_arrays.tempfile, "tempdir", str(tmp_path))
    array = SliceStore(limit=0).empty((2, 256, 1024))
    assert Path(array.filename).stat().st_blocks * 512 >= array.nbytes
    assert not array.any()


def test_without_posix_the_free_space_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary_arrays.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    assert not SliceStore(limit=0).empty((2, 3)).any()
    monkeypatch.setattr(temporary_arrays.shutil, "disk_usage", lambda path: SimpleNamespace(free=11))
    with pytest.raises(UserError, match="No space left on device"):
        SliceStore(limit=0).empty((2, 3))


def test_a_disk_that_is_full_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(temporary_arrays.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(temporary_arrays.os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"slices need 3 GiB .*No space left on device.* set TMPDIR"):
        SliceStore(limit=0).empty((3, 1024, 512, 1024))
    gc.collect()
    assert list(tmp_path.iterdir()) == []


# Small parts


def test_stacking_mixed_sizes():
    first, second = np.array([[1, 2], [3, 4]], np.float16), np.array([[5, 6, 7]], np.float16)
    assert stack_padded([first, second]).tolist() == [
        [[1, 2, 2], [3, 4, 4]],
        [[5, 6, 7], [5, 6, 7]],
    ]
    labels = stack_padded([first.astype(np.int64), second.astype(np.int64)], fill=IGNORED)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [[[1, 2, -1], [3, 4, -1]], [[5, 6, 7], [-1, -1, -1]]]
    assert whole_canvas(torch.tensor([[48, 60], [50, 30]])) == (64, 64)


def test_padding_keypoints():
    points = [np.array([[1, 2], [3, 4]], np.float32), np.zeros((0, 2), np.float32)]
    padded, valid = pad_keypoints(points)
    assert padded.tolist() == [[[1, 2], [3, 4]], [[0, 0], [0, 0]]]
    assert valid.tolist() == [[True, True], [False, False]]
    assert pad_keypoints(points[1:])[0].shape == (1, 0, 2)


def test_compacting_keypoints():
    keypoints = torch.arange(12.0).view(2, 3, 2)
    valid = torch.tensor([[False, True, True], [False, False, True]])
    points, there, order = compact(keypoints, valid)
    assert points[0].tolist() == [[2, 3], [4, 5]]
    assert points[1, 0].tolist() == [10, 11]
    assert there.tolist() == [[True, True], [True, False]]
    assert order[0].tolist() == [1, 2]
    nothing = compact(keypoints, torch.zeros(2, 3, dtype=torch.bool))
    assert [tensor.shape[1] for tensor in nothing] == [0, 0, 0]


@pytest.mark.parametrize(
    ("size", "world", "parts"), [(10, 1, 1), (10, 2, 1), (10, 2, 2), (7, 1, 3), (3, 3, 1)]
)
def test_shards_share_a_batch(size, world, parts):
    shards = [Shard(rank, world, part, parts).rows(size) for rank in range(world) for part in range(parts)]
    assert torch.equal(torch.cat(shards), torch.arange(size))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_every_shard_has_something_to_do():
    assert [Shard(0, 1, part, 4).rows(2).tolist() for part in range(4)] == [[0], [0], [0], [1]]


# Pretraining pairs


def test_pairs_are_neighbours_and_never_the_slice_itself():
    pairs = pretraining_pairs(neighbour_range=0.3)  # of five slices, a quarter apart
    assert pairs.neighbours(0, 0) == [1]
    assert pairs.neighbours(0, 2) == [1, 3]
    assert pretraining_pairs(neighbour_range=0.6).neighbours(0, 2) == [0, 1, 3, 4]
    assert pretraining_pairs(neighbour_range=0.01).neighbours(0, 2) == [1, 3]  # none in range: the next ones
    drawn = [pair for step in range(20) for pair in pairs.pairs(step)]
    assert all(z1 in pairs.neighbours(v, z0) and z1 != z0 for v, z0, z1 in drawn)
    assert {(0, 2, 1), (0, 2, 3)} <= set(drawn)


def test_every_epoch_shows_every_slice_once():
    pairs = pretraining_pairs(batch_size=4)  # 10 slices: epochs end within a batch
    drawn = [(v, z0) for step in range(5) for v, z0, _ in pairs.pairs(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(pairs.index)
    assert drawn[:10] != drawn[10:]


def test_a_single_slice_is_its_own_neighbour():
    pairs = pretraining_pairs([volume("one", num_slices=1)], batch_size=3)
    assert pairs.pairs(0) == [(0, 0, 0)] * 3
    batch = pairs.batch(0, CPU)
    assert not torch.equal(batch.views.images[0], batch.views.images[3])
    assert (batch.matches0 != UNMATCHED).any()


def test_a_batch_depends_on_its_step_only():
    first, again = pretraining_pairs(), pretraining_pairs()
    first.batch(0, CPU)
    assert same(first.batch(7, CPU), again.batch(7, CPU))
    assert not same(first.batch(8, CPU), again.batch(7, CPU))
    assert not same(pretraining_pairs(seed=4).batch(7, CPU), again.batch(7, CPU))


def test_shapes_of_a_batch():
    batch = pretraining_pairs().batch(1, CPU)
    images, keypoints, valid = batch.views
    assert images.shape == (12, 1, 48, 64)
    assert keypoints.shape == (12, valid.shape[1], 2)
    assert batch.slice_position.shape == (12,)
    assert torch.equal(batch.slice_position[:6], batch.slice_position[6:])
    assert batch.matches0.shape == (6, valid.shape[1])
    assert valid.any(0)[-1]  # no padding but what the longest needs
    assert images.dtype == torch.float32
    assert ((keypoints >= 0) & (keypoints <= torch.tensor([47.0, 63.0]))).all()


@pytest.mark.parametrize(("world", "parts"), [(2, 1), (3, 1), (2, 2), (1, 6)])
def test_shards_are_rows_of_the_joint_batch(world, parts):
    pairs = pretraining_pairs()
    joint = pairs.batch(2, CPU)
    for rank in range(world):
        for part in range(parts):
            shard = Shard(rank, world, part, parts)
            rows = shard.rows(6)
            both = torch.cat([rows, rows + 6])
            batch = pairs.batch(2, CPU, shard)
            slots = batch.views.valid.shape[1]
            assert torch.allclose(batch.views.images, joint.views.images[both], atol=1e-5)
            assert torch.equal(batch.views.valid, joint.views.valid[both, :slots])
            assert torch.allclose(batch.views.keypoints, joint.views.keypoints[both, :slots], atol=1e-4)
            assert torch.equal(batch.slice_position, joint.slice_position[both])
            assert torch.equal(batch.matches0, joint.matches0[rows, :slots])


def test_matches_lead_to_the_same_anatomy_after_augmentation(monkeypatch):
    """Positions are traced back through the map; then what is matched must be the original correspondence."""
    maps = []
    monkeypatch.setattr(
        datasets,
        "SpatialTransform",
        type(
            "Spy", (), {"sample": lambda *a, **k: maps.append(SpatialTransform.sample(*a, **k)) or maps[-1]}
        ),
    )
    pairs = pretraining_pairs()
    lost = found = 0
    for step in range(6):
        batch = pairs.batch(step, CPU)
        back, known = maps[-1].inverse_points(batch.views.keypoints, batch.views.valid)
        assert torch.equal(known, batch.views.valid)
        for row, (v, z0, z1) in enumerate(pairs.pairs(step)):
            here, there = (pairs.volumes[v].keypoints[z].positions for z in (z0, z1))
            source0, source1 = (
                [
                    int(np.linalg.norm(points - back[index, n].numpy(), axis=1).argmin())
                    for n in range(int(known[index].sum()))
                ]
                for index, points in ((row, here), (row + 6, there))
            )
            for n, index in enumerate(source0):  # traced back they are where they came from
                assert np.linalg.norm(here[index] - back[row, n].numpy()) < 0.05
            expected = pairs.matches0(v, z0, z1)
            for n, partner in enumerate(batch.matches0[row].tolist()):
                original = expected[source0[n]] if n < len(source0) else UNMATCHED
                if original == UNMATCHED or original not in source1:
                    assert partner == UNMATCHED
                    lost += original != UNMATCHED
                else:
                    assert source1[partner] == original
                    found += 1
    assert found > 50
    assert lost > 5  # some partners left the crop, and their keypoints are unmatched


def test_slices_without_keypoints_make_a_batch():
    one = volume("none")
    bare = PreparedVolume(
        one.name, one.images, [Keypoints.empty(8)] * 5, one.positions, one.spacing, one.intensity
    )
    batch = pretraining_pairs([bare]).batch(0, CPU)
    assert batch.views.keypoints.shape == (12, 0, 2)
    assert batch.matches0.shape == (6, 0)
    mixed = pretraining_pairs([bare, one]).batch(0, CPU)
    assert mixed.views.valid.any()
    assert not mixed.views.valid.any(1).all()


def test_mixed_sizes_without_a_crop():
    batch = pretraining_pairs(augment=PLAIN).batch(0, CPU)
    assert batch.views.images.shape == (12, 1, 64, 64)


# Labelled slices


def labelled_slice(size=(48, 64), seed=0, foreground=(10, 30)):
    rng = np.random.default_rng(seed)
    labels = np.zeros(size, np.int64)
    if foreground:
        labels[foreground] = 1
    keypoints = rng.uniform(0, 40, (6, 2)).astype(np.float32)
    return LabelledSlice(rng.normal(size=(1, *size)).astype(np.float16), keypoints, labels)


def labelled_slices(slices=None, **settings):
    defaults = {"augment": PLAIN, "foreground": 0.0, "batch_size": 4, "seed": 0}
    return LabelledSlices(slices or [labelled_slice(seed=s) for s in range(3)], **{**defaults, **settings})


def test_without_augmentation_a_batch_is_the_slices():
    slices = [labelled_slice(seed=s) for s in range(3)]
    batch = labelled_slices(slices, batch_size=3).batch(0, CPU)
    order = [
        next(i for i, s in enumerate(slices) if np.allclose(s.image, image, atol=1e-3))
        for image in batch.views.images
    ]
    assert sorted(order) == [0, 1, 2]
    for row, index in enumerate(order):
        assert np.array_equal(batch.labels[row], slices[index].labels)
        assert np.allclose(batch.views.keypoints[row], slices[index].keypoints, atol=1e-4)
    assert batch.views.valid.all()


def test_labels_move_with_the_image():
    """A slice whose intensities are its labels stays so: wherever a pixel is well inside a structure, both agree."""
    rows, columns = np.mgrid[:48, :64]
    labels = ((rows - 20) ** 2 + (columns - 40) ** 2 < 150).astype(np.int64)
    one = LabelledSlice(labels.astype(np.float16)[None], np.array([[20, 40]], np.float32), labels)
    augment = STRONG.override(intensity_probability=0.0)
    data = labelled_slices([one], augment=augment)
    for step in range(4):
        batch = data.batch(step, CPU)
        known = batch.labels != IGNORED
        clear = known & ((batch.views.images[:, 0] - 0.5).abs() > 0.4)
        assert clear.float().mean() > 0.3
        assert torch.equal((batch.views.images[:, 0] > 0.5)[clear], batch.labels[clear] == 1)
        y, x = batch.views.keypoints[batch.views.valid].round().long().unbind(-1)
        image = batch.views.valid.nonzero()[:, 0]
        assert (batch.labels[image, y, x] == 1).all()


def test_outside_of_a_slice_nothing_is_known():
    small, large = labelled_slice((32, 64)), labelled_slice((48, 40))
    batch = labelled_slices([small, large], batch_size=2).batch(0, CPU)
    assert batch.labels.shape == (2, 48, 64)
    for labels in batch.labels:
        known = labels != IGNORED
        assert known.sum() in (32 * 64, 48 * 40)
        assert known[8:40, 12:52].all()  # smaller slices lie in the middle


def test_partial_slices_stay_partial():
    one = labelled_slice()
    one.labels[one.labels == 0] = IGNORED
    batch = labelled_slices([one], batch_size=8, augment=STRONG).batch(0, CPU)
    assert set(batch.labels.unique().tolist()) <= {IGNORED, 1}


def test_crops_are_centred_on_the_foreground():
    wide = AugmentConfig.preset("none", crop=(16, 16))
    one = labelled_slice(foreground=(slice(20, 22), slice(40, 42)))
    centred = labelled_slices([one], augment=wide, foreground=1.0, batch_size=12).batch(0, CPU)
    assert (centred.labels == 1).any((1, 2)).all()
    anywhere = labelled_slices([one], augment=wide, foreground=0.0, batch_size=12).batch(0, CPU)
    assert not (anywhere.labels == 1).any((1, 2)).all()
    empty = labelled_slices([labelled_slice(foreground=None)], augment=wide, foreground=1.0)
    assert empty.batch(0, CPU).labels.shape == (4, 16, 16)


def test_labelled_batches_depend_on_their_step_only_and_share_out():
    data = labelled_slices(augment=STRONG, foreground=0.5, batch_size=5)
    joint = data.batch(3, CPU)
    assert same(joint, labelled_slices(augment=STRONG, foreground=0.5, batch_size=5).batch(3, CPU))
    for rank in range(2):
        rows = Shard(rank, 2).rows(5)
        batch = data.batch(3, CPU, Shard(rank, 2))
        assert torch.allclose(batch.views.images, joint.views.images[rows], atol=1e-5)
        assert torch.equal(batch.labels, joint.labels[rows])
        assert torch.equal(batch.views.valid, joint.views.valid[rows, : batch.views.valid.shape[1]])


@pytest.mark.parametrize("together", [3, 8])
def test_steps_that_are_augmented_together_are_those_of_each_alone(monkeypatch, together):
    sizes = [(48, 64), (60, 80), (40, 100)]
    slices = [labelled_slice(size, seed=seed) for seed, size in enumerate(sizes)]
    alone = labelled_slices(slices, batch_size=2, augment=STRONG)
    joined = labelled_slices(slices, batch_size=2, augment=STRONG)
    monkeypatch.setattr(joined, "_steps_together", lambda device: together)
    shard = Shard(1, 2)
    for step in (0, 1, 2, 5, 4, 9):  # in any order
        for part in (None, shard):
            expected, found = (data.batch(step, CPU, part) for data in (alone, joined))
            # A larger canvas changes how a coordinate is rounded.
            torch.testing.assert_close(found.views.images, expected.views.images, atol=1e-3, rtol=0)
            assert torch.equal(found.views.valid, expected.views.valid)
            torch.testing.assert_close(found.views.keypoints, expected.views.keypoints)
            assert torch.equal(found.labels, expected.labels)


def test_gpus_augment_as_many_steps_together_as_memory_allows():
    cuda, many = torch.device("cuda"), datasets._MOST_STEPS_TOGETHER
    assert labelled_slices(augment=STRONG)._steps_together(CPU) == 1
    assert labelled_slices(augment=STRONG)._steps_together(cuda) == many
    assert labelled_slices(augment=PLAIN)._steps_together(cuda) == 1  # slices keep their sizes
    large = STRONG.override(crop=(1024, 1024))
    assert labelled_slices(augment=large, batch_size=4)._steps_together(cuda) == 4
    assert labelled_slices(augment=large, batch_size=64)._steps_together(cuda) == 1


def test_joined_batches_share_the_largest_canvas():
    def batch_of(height, width):
        image = np.random.default_rng(height).normal(size=(1, height, width)).astype(np.float16)
        keypoints = np.array([[3, 5], [height - 1, width - 1]], np.float32)[: height // 16]
        item = LabelledSlice(image, keypoints, np.ones((height, width), np.int64))
        return LabelledSlices([item], augment=PLAIN, foreground=0, batch_size=1, seed=0).batch(0, CPU)

    tall, wide = batch_of(32, 16), batch_of(16, 48)
    joined = concatenate([tall, wide])
    assert joined.views.images.shape == (2, 1, 32, 48)
    assert torch.equal(joined.views.images[0, :, :, :16], tall.views.images[0])
    assert torch.equal(joined.views.images[1, :, :16], wide.views.images[0])
    assert (joined.views.images[1, 0, 16:] == joined.views.images[1, 0, 15]).all()
    assert (joined.labels[0, :, 16:] == IGNORED).all()
    assert (joined.labels[0, :, :16] == 1).all()
    assert (joined.labels[1, 16:] == IGNORED).all()
    assert (joined.labels[1, :16] == 1).all()
    assert torch.equal(joined.views.keypoints[1, :1], wide.views.keypoints[0])
    assert joined.views.valid.tolist() == [[True, True], [True, False]]
