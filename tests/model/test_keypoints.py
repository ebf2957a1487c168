"""Detection is deterministic and unbiased, the same in threads, and never done twice."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kaf_model.config import KeypointConfig
from kaf_model.errors import UserError
from kaf_model.keypoints import (
    KeypointCache,
    Keypoints,
    SiftDetector,
    default_cache_folder,
    detect_keypoints,
    detect_many,
    iter_detect,
    make_detector,
    stretch_contrast,
)

DATA = Path(os.environ.get("KAF_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))


def blobs(centres, sigma=3.0, shape=(48, 64)):
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = np.zeros(shape)
    for row, column in centres:
        image += np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * sigma**2))
    return image


def texture(seed, shape=(48, 64)):
    generator = np.random.default_rng(seed)
    height, width = shape
    count = height * width // 40
    centres = generator.random((count, 2)) * shape
    y, x = np.mgrid[:height, :width]
    image = np.zeros(shape)
    for (row, column), sigma, sign in zip(
        centres, generator.uniform(1, 4, count), generator.choice([-1, 1], count), strict=True
    ):
        image += sign * np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * sigma**2))
    return image.astype(np.float32)


def real_slices(name, every, step):
    nibabel = pytest.importorskip("nibabel")
    files = sorted((DATA / name / "images").glob("*.nii.gz"))
    if not files:
        pytest.skip(f"no real volumes at {DATA / name}; set KAF_DATA to the folder that holds them")
    slices = []
    for file in files[::every]:
        volume = np.asanyarray(nibabel.load(file).dataobj)
        slices += [np.ascontiguousarray(volume[:, :, index].T) for index in range(0, volume.shape[2], step)]
    return slices


def assert_equal(actual, expected):
    for name in ("positions", "descriptors", "responses", "scales", "angles"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
        assert getattr(actual, name).dtype == np.float32


class Spy:
    """A detector that counts its calls; slower for earlier slices, so that threads finish out of order."""

    fingerprint = "spy"
    dimension = 3

    def __init__(self):
        self.calls = 0

    def detect(self, slice_yx):
        self.calls += 1
        time.sleep(0.002 * (self.calls % 3 == 1))
        columns = np.zeros((2, 5))
        columns[:, 0] = slice_yx[0, 0]
        return Keypoints.from_columns(columns, np.full((2, 3), slice_yx[0, 0] / 7))


# --- the value ---------------------------------------------------------------------------------------------


def test_select_takes_indices_or_a_mask():
    keypoints = detect_keypoints(texture(0))
    assert len(keypoints) > 10
    picked = keypoints.select([3, 1])
    np.testing.assert_array_equal(picked.positions, keypoints.positions[[3, 1]])
    np.testing.assert_array_equal(picked.descriptors, keypoints.descriptors[[3, 1]])
    assert len(keypoints.select([])) == 0
    mask = keypoints.positions[:, 0] > 20
    assert len(keypoints.select(mask)) == mask.sum()


def test_empty_has_the_dimension_of_its_detector():
    empty = Keypoints.empty(128)
    assert len(empty) == 0
    assert empty.positions.shape == (0, 2)
    assert empty.descriptors.shape == (0, 128)
    assert empty.responses.dtype == np.float32


def test_inconsistent_arrays_are_refused():
    one = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match=r"descriptors must have shape \(1, D\), got \(2, 4\)"):
        Keypoints(np.zeros((1, 2), np.float32), np.zeros((2, 4), np.float32), one, one, one)
    with pytest.raises(ValueError, match=r"positions must have shape \(N, 2\), got \(1, 3\)"):
        Keypoints(np.zeros((1, 3), np.float32), np.zeros((1, 4), np.float32), one, one, one)
    with pytest.raises(ValueError, match=r"scales must have shape \(1,\), got \(2,\)"):
        Keypoints(np.zeros((1, 2), np.float32), np.zeros((1, 4), np.float32), one, np.zeros(2), one)


# --- detection ---------------------------------------------------------------------------------------------


def test_two_blobs_are_found_where_they_are():
    centres = np.array([[15.3, 20.75], [30.0, 44.5]])
    keypoints = detect_keypoints(blobs(centres))
    for centre in centres:
        distance = np.abs(keypoints.positions - centre).max(axis=1).min()
        assert distance < 0.1


@pytest.mark.parametrize("sigma", [2.0, 3.0, 6.0])
def test_positions_have_no_systematic_offset(sigma):
    generator = np.random.default_rng(0)
    errors = []
    for _ in range(12):
        centre = np.array([40, 60]) + generator.random(2)
        errors.append(detect_keypoints(blobs([centre], sigma, (96, 128))).positions[0] - centre)
    assert np.abs(np.mean(errors, axis=0)).max() < 0.05  # OpenCV's default is off by 0.25
    assert np.abs(errors).max() < 0.15


def test_whole_pixel_shift_moves_keypoints_alike():
    blob = texture(3, (32, 40))
    blob -= blob.mean()
    y, x = np.mgrid[-1:1:32j, -1:1:40j]
    blob *= np.clip(1.2 - np.hypot(y, x), 0, 1)
    base = np.zeros((96, 120), np.float32)
    moved = base.copy()
    base[20:52, 24:64] = blob
    moved[36:68, 40:80] = blob  # 16 pixels both ways: whole pixels in the coarse octaves too
    first, second = detect_keypoints(base), detect_keypoints(moved)
    assert len(first) > 10
    nearest = np.abs(first.positions[:, None] + 16 - second.positions[None]).max(axis=2).min(axis=1)
    assert np.mean(nearest < 0.05) > 0.95


def test_order_is_by_response_and_repeatable():
    image = texture(1)
    first, second = detect_keypoints(image), detect_keypoints(image.copy())
    assert_equal(first, second)
    assert (np.diff(first.responses) <= 0).all()


def test_ties_are_ordered_by_place_then_scale_then_angle():
    columns = [
        [2, 1, 5, 1, 0],
        [1, 2, 5, 1, 0],
        [1, 1, 5, 2, 0],
        [1, 1, 5, 1, 9],
        [1, 1, 5, 1, 3],
        [9, 9, 6, 1, 0],
    ]
    shuffled = Keypoints.from_columns(np.array(columns), np.zeros((6, 1)))
    expected = [columns[index] for index in (5, 4, 3, 2, 1, 0)]
    np.testing.assert_array_equal(shuffled.strongest(9).columns(), expected)


def test_every_orientation_of_a_position_is_kept():
    keypoints = detect_keypoints(texture(1))
    places, counts = np.unique(keypoints.positions, axis=0, return_counts=True)
    assert counts.max() > 1
    for place in places[counts > 1]:
        same = (keypoints.positions == place).all(axis=1)
        assert len(np.unique(keypoints.columns()[same][:, 3:], axis=0)) == same.sum()


def test_cap_keeps_the_strongest():
    every = detect_keypoints(texture(2))
    capped = SiftDetector(KeypointConfig(max_keypoints=7)).detect(texture(2))
    assert len(every) > 7
    assert_equal(capped, every.select(np.arange(7)))


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int16, np.uint16, np.int64, np.float16, np.float32, np.float64]
)
def test_any_real_type_gives_the_same_keypoints(dtype):
    levels = np.rint(200 * stretch_contrast(texture(4)))
    assert_equal(detect_keypoints(levels.astype(dtype)), detect_keypoints(levels))


def test_intensity_scale_and_offset_do_not_matter():
    image = texture(4)
    assert_equal(detect_keypoints(image * 1024), detect_keypoints(image))
    assert_equal(detect_keypoints(np.rint(image * 1e4) - 3e6), detect_keypoints(np.rint(image * 1e4)))


def test_memory_layout_does_not_matter():
    image = texture(4)
    assert_equal(detect_keypoints(np.asfortranarray(image)), detect_keypoints(image))
    assert_equal(detect_keypoints(np.repeat(image, 2, axis=1)[:, ::2]), detect_keypoints(image))


@pytest.mark.parametrize("value", [0, -7.5, 1e30])
def test_constant_slice_has_no_keypoints(value):
    keypoints = detect_keypoints(np.full((48, 64), value))
    assert len(keypoints) == 0
    assert keypoints.descriptors.shape == (0, 128)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (2, 3), (1, 90), (8, 8)])
def test_tiny_slices_have_no_keypoints(shape):
    assert len(detect_keypoints(np.random.default_rng(0).random(shape))) == 0


def test_a_few_outliers_do_not_hide_the_anatomy():
    image = texture(5)
    spoiled = image.copy()
    spoiled[0, 0], spoiled[47, 63] = 1e6, -1e6
    assert len(detect_keypoints(spoiled)) > 0.9 * len(detect_keypoints(image))


def test_less_than_the_percentiles_keep_is_still_seen():
    image = np.zeros((200, 240))
    image[100:104, 100:104] = 1  # 16 of 48,000 pixels
    assert len(detect_keypoints(image)) > 0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (np.zeros((2, 48, 64)), r"must be 2-D \(H, W\), got shape \(2, 48, 64\)"),
        (np.zeros(48), r"got shape \(48,\)"),
        (np.array([[0, np.nan], [np.inf, 1]]), "got 2 NaN or infinite of 4 values"),
        (np.zeros((4, 4), complex), "real numbers, got complex128"),
    ],
)
def test_what_is_no_slice_is_refused(broken, message):
    with pytest.raises(ValueError, match=message):
        detect_keypoints(broken)


def test_fingerprint_names_every_setting():
    changes = [
        {},
        {"max_keypoints": 5},
        {"contrast_threshold": 0.03},
        {"edge_threshold": 9.0},
        {"sigma": 1.5},
    ]
    fingerprints = {SiftDetector(KeypointConfig(**change)).fingerprint for change in changes}
    assert len(fingerprints) == len(changes)
    assert isinstance(make_detector(), SiftDetector)


def test_heart_slices_have_as_many_keypoints_as_published():
    counts = [len(keypoints) for keypoints in detect_many(real_slices("acdc", every=10, step=4))]
    assert min(counts) > 100
    assert 300 < np.median(counts) < 480
    assert max(counts) < KeypointConfig().max_keypoints


def test_hippocampus_crops_work():
    slices = real_slices("hippocampus", every=16, step=6)
    counts = [len(keypoints) for keypoints in detect_many(slices)]
    assert min(counts) > 0
    assert 12 < np.median(counts) < 32


# --- many slices -------------------------------------------------------------------------------------------


def test_parallel_equals_serial_in_order():
    stack = np.stack([texture(seed) for seed in range(9)])
    serial = [detect_keypoints(image) for image in stack]
    for workers in (1, 4):
        parallel = detect_many(stack, workers=workers)
        assert len(parallel) == len(serial)
        for actual, expected in zip(parallel, serial, strict=True):
            assert_equal(actual, expected)


def test_mixed_shapes_and_no_slices():
    assert [
        len(found) > 5 for found in detect_many([texture(0), texture(1, (35, 50)), texture(2, (90, 40))])
    ] == [True] * 3
    assert detect_many([]) == []


def test_slices_are_taken_only_a_little_ahead():
    taken = []

    def slices():
        for index in range(50):
            taken.append(index)
            yield np.full((1, 1), float(index))

    results = iter_detect(slices(), Spy(), workers=2)
    for index in range(5):
        assert next(results).positions[0, 0] == index
        assert len(taken) <= index + 5
    results.close()
    assert len(taken) < 12


def test_a_bad_slice_is_raised_at_its_turn():
    results = iter_detect([texture(0), np.full((4, 4), np.nan), texture(1)], workers=2)
    assert len(next(results)) > 0
    with pytest.raises(ValueError, match="NaN"):
        next(results)


def test_workers_must_be_positive():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        iter_detect([], workers=0)


# --- the cache ---------------------------------------------------------------------------------------------


def test_a_hit_is_identical_and_not_detected_again(tmp_path):
    cache = KeypointCache(tmp_path / "cache")
    images = [texture(0), np.zeros((48, 64))]
    first = detect_many(images, cache=cache)
    assert len(list(cache.folder.iterdir())) == 2

    class Never(SiftDetector):
        def detect(self, slice_yx):
            raise AssertionError("detected twice")

    for actual, expected in zip(detect_many(images, Never(), cache=cache), first, strict=True):
        assert_equal(actual, expected)
    assert cache.notice is None


def test_descriptors_that_are_no_bytes_are_kept_exactly(tmp_path):
    cache, spy = KeypointCache(tmp_path), Spy()
    for value in (1.0, -3.0, 4e6):
        image = np.full((2, 2), value)
        assert_equal(cache.detect(image, spy), cache.detect(image, spy))
    assert spy.calls == 3


def test_content_type_shape_and_detector_make_the_key(tmp_path):
    cache, spy = KeypointCache(tmp_path), Spy()
    image = np.zeros((4, 6), np.int16)
    other = Spy()
    other.fingerprint = "another"
    for value, detector in [
        (image, spy),
        (image + 1, spy),
        (image.view(np.uint16), spy),
        (image.reshape(6, 4), spy),
        (image, other),
    ]:
        cache.detect(value.astype(value.dtype), detector)
    assert (spy.calls, other.calls) == (4, 1)
    cache.detect(np.asfortranarray(image), spy)  # the same slice, laid out otherwise
    assert spy.calls == 4


@pytest.mark.parametrize("damage", ["empty", "half", "text", "foreign", "flipped", "dimension"])
def test_damaged_entries_are_found_anew(tmp_path, damage):
    cache = KeypointCache(tmp_path)
    expected = cache.detect(texture(0), SiftDetector())
    (entry,) = tmp_path.iterdir()
    good = entry.read_bytes()
    if damage == "foreign":
        np.savez(entry, something=np.zeros(3))
    elif damage == "dimension":
        np.savez(entry, columns=np.zeros((2, 5)), descriptors=np.zeros((2, 64)))
    else:
        middle = len(good) // 2
        flipped = good[:middle] + bytes([good[middle] ^ 4]) + good[middle + 1 :]
        entry.write_bytes(
            {"empty": b"", "half": good[:middle], "text": b"not a file", "flipped": flipped}[damage]
        )
    assert_equal(cache.detect(texture(0), SiftDetector()), expected)
    assert entry.read_bytes() == good
    assert cache.notice is None


def test_no_flipped_bit_changes_keypoints(tmp_path):
    cache = KeypointCache(tmp_path)
    detector = SiftDetector(KeypointConfig(max_keypoints=3))
    expected = cache.detect(texture(0), detector)
    (entry,) = tmp_path.iterdir()
    good = entry.read_bytes()
    for place in range(0, len(good), 7):
        entry.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        assert_equal(cache.detect(texture(0), detector), expected)


def test_a_folder_that_cannot_be_written_does_not_fail_the_run(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = KeypointCache(tmp_path / "file")
    results = detect_many([texture(0), texture(1)], cache=cache)
    assert_equal(results[1], detect_keypoints(texture(1)))
    assert cache.notice is not None
    assert str(tmp_path / "file") in cache.notice
    assert "KAF_CACHE" in cache.notice


def test_a_full_disk_does_not_fail_the_run(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache = KeypointCache(tmp_path)
    assert_equal(cache.detect(texture(0), SiftDetector()), detect_keypoints(texture(0)))
    assert "No space left on device" in cache.notice
    assert list(tmp_path.iterdir()) == []


def test_least_recently_used_entries_are_pruned(tmp_path):
    spy = Spy()
    cache = KeypointCache(tmp_path)
    cache.detect(np.zeros((1, 1)), spy)
    (first,) = tmp_path.iterdir()
    size = first.stat().st_size
    (tmp_path / "notes.txt").write_text("not ours")
    stale, fresh = tmp_path / "old.partial", tmp_path / "new.partial"
    stale.write_text("crashed")
    fresh.write_text("being written")
    os.utime(stale, (0, 0))

    cache = KeypointCache(tmp_path, limit=int(5.5 * size))
    for value in range(1, 5):
        cache.detect(np.full((1, 1), float(value)), spy)
        os.utime(max(tmp_path.glob("*.npz"), key=lambda path: path.stat().st_ctime_ns), (value, value))
    cache.detect(np.zeros((1, 1)), spy)  # used again: newest
    assert spy.calls == 5
    cache.detect(np.full((1, 1), 5.0), spy)
    kept = list(tmp_path.glob("*.npz"))
    assert sum(path.stat().st_size for path in kept) <= 5.5 * size
    assert first in kept
    assert len(kept) == 4
    assert (tmp_path / "notes.txt").exists()
    assert fresh.exists()
    assert not stale.exists()


def test_default_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("KAF_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for platform, folder in {"linux": ".cache", "darwin": "Library/Caches", "win32": "AppData/Local"}.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert default_cache_folder() == tmp_path / folder / "napari-kaf"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_cache_folder() == tmp_path / "local" / "napari-kaf"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_folder() == tmp_path / ".cache" / "napari-kaf"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_folder() == tmp_path / "xdg" / "napari-kaf"
    monkeypatch.setenv("KAF_CACHE", str(tmp_path / "own"))
    assert default_cache_folder() == tmp_path / "own"
    assert KeypointCache().folder == tmp_path / "own" / "keypoints"


# --- SuperPoint --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def superpoint():
    import torch
    from transformers import SuperPointConfig, SuperPointForKeypointDetection

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SuperPointForKeypointDetection(SuperPointConfig())


@pytest.mark.parametrize("shape", [(48, 64), (35, 50)])
def test_superpoint_finds_whole_pixels_inside_the_slice(superpoint, shape):
    from kaf_model.superpoint import SuperPointDetector

    detector = SuperPointDetector(KeypointConfig(detector="superpoint", max_keypoints=20), superpoint)
    keypoints = detector.detect(texture(0, shape))
    assert 5 < len(keypoints) <= 20
    assert keypoints.descriptors.shape == (len(keypoints), detector.dimension)
    np.testing.assert_allclose(np.linalg.norm(keypoints.descriptors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(keypoints.positions, np.rint(keypoints.positions))
    assert (keypoints.positions >= 4).all()
    assert (keypoints.positions < np.array(shape) - 4).all()
    assert (np.diff(keypoints.responses) <= 0).all()
    assert_equal(detector.detect(texture(0, shape)), keypoints)


def test_superpoint_is_cached_and_runs_in_threads(superpoint, tmp_path):
    from kaf_model.superpoint import SuperPointDetector

    detector = SuperPointDetector(model=superpoint)
    images = [texture(0), np.zeros((48, 64)), texture(1)]
    cache = KeypointCache(tmp_path)
    first = detect_many(images, detector, cache=cache, workers=2)
    assert len(first[1]) == 0
    for actual, expected in zip(detect_many(images, detector, cache=cache), first, strict=True):
        assert_equal(actual, expected)


def test_superpoint_without_any_keypoint_over_its_threshold(superpoint):
    from transformers import SuperPointConfig, SuperPointForKeypointDetection

    from kaf_model.superpoint import SuperPointDetector

    detector = SuperPointDetector(
        model=SuperPointForKeypointDetection(SuperPointConfig(keypoint_threshold=0.99))
    )
    assert len(detector.detect(texture(0))) == 0


def test_superpoint_fingerprint_follows_the_weights(superpoint, tmp_path):
    import torch

    from kaf_model.superpoint import SuperPointDetector

    superpoint.save_pretrained(tmp_path / "weights")
    loaded = SuperPointDetector(KeypointConfig(superpoint_weights=str(tmp_path / "weights")))
    assert loaded.fingerprint == SuperPointDetector(model=superpoint).fingerprint
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1e-3)
    assert SuperPointDetector(model=loaded.model).fingerprint != loaded.fingerprint


def test_superpoint_says_what_is_missing(tmp_path, monkeypatch):
    from kaf_model.superpoint import SuperPointDetector

    with pytest.raises(UserError, match="weights are not on this computer"):
        SuperPointDetector(KeypointConfig(superpoint_weights=str(tmp_path / "nowhere")))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs transformers: pip install transformers"):
        make_detector(KeypointConfig(detector="superpoint"))


def test_sift_alone_imports_no_torch():
    code = "import sys, kaf_model.keypoints, kaf_model.correspondences; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"
