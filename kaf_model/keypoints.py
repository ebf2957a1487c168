"""Keypoints of a slice: the value, the detectors, and a cache on disk so that none is found twice.

The paper (section 3.1) attends over SIFT keypoints of each 2-D slice. Detection here is deterministic,
keeps sub-pixel positions, and runs over many slices in threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from kaf_model.config import KeypointConfig
from kaf_model.geometry import from_xy

CONTRAST_PERCENTILES = (0.1, 99.9)
_MINUTES_OF_A_WRITE = 10


@dataclass(frozen=True, eq=False)
class Keypoints:
    """Keypoints of one slice, strongest response first.

    SIFT returns one keypoint for each dominant orientation, so a position can occur more than once, with
    other angles and descriptors. All are kept.

    Attributes:
        positions: (y, x) in pixels, sub-pixel, pixel centres at integers. Shape: (N, 2), float32.
        descriptors: Detector vectors. Shape: (N, D), float32.
        responses: Strength of each keypoint. Shape: (N,), float32.
        scales: Diameter of the described neighbourhood in pixels. Shape: (N,), float32.
        angles: Orientation in degrees, 0 along x, growing towards y. Shape: (N,), float32.
    """

    positions: np.ndarray
    descriptors: np.ndarray
    responses: np.ndarray
    scales: np.ndarray
    angles: np.ndarray

    def __post_init__(self) -> None:
        count = len(self.positions)
        if self.positions.shape != (count, 2):
            raise ValueError(f"positions must have shape (N, 2), got {self.positions.shape}")
        if self.descriptors.ndim != 2 or len(self.descriptors) != count:
            raise ValueError(f"descriptors must have shape ({count}, D), got {self.descriptors.shape}")
        for name in ("responses", "scales", "angles"):
            shape = getattr(self, name).shape
            if shape != (count,):
                raise ValueError(f"{name} must have shape ({count},), got {shape}")

    def __len__(self) -> int:
        return len(self.positions)

    @classmethod
    def empty(cls, dimension: int) -> Keypoints:
        """Return no keypoints, with descriptors of the given dimension."""
        return cls.from_columns(np.zeros((0, 5)), np.zeros((0, dimension)))

    @classmethod
    def from_columns(cls, columns: np.ndarray, descriptors: np.ndarray) -> Keypoints:
        """Return keypoints from one table.

        Args:
            columns: y, x, response, scale, angle. Shape: (N, 5).
            descriptors: Shape: (N, D).
        """
        columns = np.asarray(columns, np.float32).reshape(-1, 5)
        return cls(
            positions=np.ascontiguousarray(columns[:, :2]),
            descriptors=np.ascontiguousarray(descriptors, np.float32),
            responses=columns[:, 2].copy(),
            scales=columns[:, 3].copy(),
            angles=columns[:, 4].copy(),
        )

    def columns(self) -> np.ndarray:
        """Return the table that `from_columns` reads. Shape: (N, 5), float32."""
        return np.column_stack([self.positions, self.responses, self.scales, self.angles]).astype(np.float32)

    def select(self, indices: npt.ArrayLike) -> Keypoints:
        """Return the keypoints at some indices, in their order, or those where a boolean mask is true."""
        chosen = np.asarray(indices)
        if chosen.size == 0:
            chosen = chosen.astype(np.intp)
        return Keypoints(
            positions=self.positions[chosen],
            descriptors=self.descriptors[chosen],
            responses=self.responses[chosen],
            scales=self.scales[chosen],
            angles=self.angles[chosen],
        )

    def strongest(self, limit: int) -> Keypoints:
        """Return at most `limit` keypoints: by response, ties by y, x, scale, then angle."""
        y, x = self.positions.T
        order = np.lexsort((self.angles, self.scales, x, y, -self.responses))
        return self.select(order[:limit])


class Detector(Protocol):
    """What finds keypoints in a slice. `detect` may be called from several threads at once."""

    @property
    def fingerprint(self) -> str:
        """Name, every parameter, and versions that change the result; part of the cache's key."""
        ...

    @property
    def dimension(self) -> int:
        """Length of a descriptor."""
        ...

    def detect(self, slice_yx: np.ndarray) -> Keypoints:
        """Return the keypoints of a slice of shape (H, W)."""
        ...


class SiftDetector:
    """SIFT (Lowe, 2004) through OpenCV.

    OpenCV's default doubling of the image shifts every keypoint by a quarter pixel along both axes; its
    precise doubling does not and is used here.
    """

    dimension = 128

    def __init__(self, config: KeypointConfig | None = None) -> None:
        self.config = config or KeypointConfig()

    @property
    def fingerprint(self) -> str:
        """Name, parameters and OpenCV's version."""
        config = self.config
        return (
            f"sift contrast_threshold={config.contrast_threshold} edge_threshold={config.edge_threshold} "
            f"sigma={config.sigma} max_keypoints={config.max_keypoints} percentiles={CONTRAST_PERCENTILES} "
            f"upscale=precise opencv={cv2.__version__}"
        )

    def detect(self, slice_yx: np.ndarray) -> Keypoints:
        """Return the keypoints of a slice of shape (H, W); see `detect_keypoints`."""
        image = np.rint(255 * stretch_contrast(slice_yx)).astype(np.uint8)
        if not image.any():
            return Keypoints.empty(self.dimension)
        sift = cv2.SIFT_create(  # type: ignore[attr-defined, unused-ignore]
            nfeatures=0,
            contrastThreshold=self.config.contrast_threshold,
            edgeThreshold=self.config.edge_threshold,
            sigma=self.config.sigma,
            enable_precise_upscale=True,
        )
        found, descriptors = sift.detectAndCompute(image, None)
        if descriptors is None:
            return Keypoints.empty(self.dimension)
        columns = np.array([(*point.pt, point.response, point.size, point.angle) for point in found])
        columns[:, :2] = from_xy(columns[:, :2])
        return Keypoints.from_columns(columns, descriptors).strongest(self.config.max_keypoints)


def make_detector(config: KeypointConfig | None = None) -> Detector:
    """Return the detector that the settings name.

    Raises:
        UserError: If it is SuperPoint, and `transformers` or its weights are not on this computer.
    """
    config = config or KeypointConfig()
    if config.detector == "superpoint":
        from kaf_model.superpoint import SuperPointDetector

        return SuperPointDetector(config)
    return SiftDetector(config)


def detect_keypoints(slice_yx: np.ndarray, detector: Detector | None = None) -> Keypoints:
    """Return the keypoints of one slice, strongest response first.

    The contrast of the slice is stretched to its own 0.1..99.9 percentiles, so intensity scale and offset
    do not matter. A constant slice has no keypoints.

    Args:
        slice_yx: Any real, finite 2-D array. Shape: (H, W).
        detector: Default: SIFT with default settings.

    Raises:
        ValueError: If the array is not 2-D, not numeric, or has values that are NaN or infinite.
    """
    return (detector or SiftDetector()).detect(slice_yx)


def stretch_contrast(slice_yx: np.ndarray) -> np.ndarray:
    """Return a slice scaled to 0..1 between its own robust extremes; a constant slice becomes zero.

    Shape: (H, W) -> (H, W), float64.

    Raises:
        ValueError: If the array is not 2-D, not numeric, or has values that are NaN or infinite.
    """
    array = np.asarray(slice_yx)
    if array.ndim != 2:
        raise ValueError(f"a slice must be 2-D (H, W), got shape {array.shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"a slice must hold real numbers, got {array.dtype}")
    image = array.astype(np.float64)
    broken = image.size - np.count_nonzero(np.isfinite(image))
    if broken:
        raise ValueError(f"a slice must be finite, got {broken} NaN or infinite of {image.size} values")
    if image.size == 0:
        return image
    low, high = np.percentile(image, CONTRAST_PERCENTILES)
    if low == high:  # less than 0.1 % of the slice differs from the rest
        low, high = image.min(), image.max()
    if low == high:
        return np.zeros_like(image)
    stretched: np.ndarray = np.clip((image - low) / (high - low), 0, 1)
    return stretched


def detect_many(
    slices: Iterable[np.ndarray],
    detector: Detector | None = None,
    *,
    cache: KeypointCache | None = None,
    workers: int | None = None,
) -> list[Keypoints]:
    """Return the keypoints of many slices, in order: `list(iter_detect(...))`."""
    return list(iter_detect(slices, detector, cache=cache, workers=workers))


def iter_detect(
    slices: Iterable[np.ndarray],
    detector: Detector | None = None,
    *,
    cache: KeypointCache | None = None,
    workers: int | None = None,
) -> Iterator[Keypoints]:
    """Yield the keypoints of slice after slice, in order, found in parallel threads.

    At most two slices a worker are taken ahead of the one that is yielded, so `slices` may be a
    generator over a volume that does not fit in memory.

    Args:
        slices: 2-D arrays, or one array of shape (Z, H, W).
        detector: Default: SIFT with default settings.
        cache: Where results are looked up and kept; None detects always.
        workers: Threads; default: the processors that this process may use.

    Raises:
        ValueError: If `workers` is not positive, or when the turn of a slice comes that is not a finite
            2-D array.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    return _iter_detect(slices, detector or SiftDetector(), cache, workers or _processors())


def _iter_detect(
    slices: Iterable[np.ndarray], detector: Detector, cache: KeypointCache | None, workers: int
) -> Iterator[Keypoints]:
    def detect(slice_yx: np.ndarray) -> Keypoints:
        return detector.detect(slice_yx) if cache is None else cache.detect(slice_yx, detector)

    pending: deque[Future[Keypoints]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="keypoints") as pool:
        try:
            for slice_yx in slices:
                pending.append(pool.submit(detect, slice_yx))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class KeypointCache:
    """Keypoints on disk, found again by the content of the slice and the detector's fingerprint.

    One checksummed `.npz` a slice, written atomically, so processes may share a folder. An entry that
    cannot be read is found anew. Where nothing can be written, detection goes on without, and `notice`
    says so.

    Attributes:
        folder: Where the entries are.
        limit: Bytes; above it the entries that were not used for the longest time are deleted.
        notice: A sentence for the user once something could not be written, else None.
    """

    def __init__(self, folder: Path | None = None, *, limit: int = 2 << 30) -> None:
        """Use `folder`, by default the folder `keypoints` in `default_cache_folder()`."""
        self.folder = default_cache_folder() / "keypoints" if folder is None else Path(folder)
        self.limit = limit
        self.notice: str | None = None
        self._bytes: int | None = None  # None: not looked yet
        self._lock = threading.Lock()

    def detect(self, slice_yx: np.ndarray, detector: Detector) -> Keypoints:
        """Return the keypoints of a slice from the cache, or detect and keep them."""
        slice_yx = np.asarray(slice_yx)
        entry = self.folder / f"{_key(slice_yx, detector.fingerprint)}.npz"
        keypoints = _read_entry(entry, detector.dimension)
        if keypoints is None:
            keypoints = detector.detect(slice_yx)
            self._write(entry, keypoints)
        return keypoints

    def _write(self, entry: Path, keypoints: Keypoints) -> None:
        if self.notice:
            return
        content = _pack(keypoints)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_atomically(entry, content)
            with self._lock:
                self._bytes = self._prune() if self._bytes is None else self._bytes + len(content)
                if self._bytes > self.limit:
                    self._bytes = self._prune()
        except OSError as error:
            self.notice = (
                f"Keypoints are not kept and will be detected again next time: cannot write to {self.folder} "
                f"({error.strerror or error}). Set KAF_CACHE to a folder with space that can be written."
            )

    def _prune(self) -> int:
        """Delete partial writes left over and, above the limit, the oldest entries; return the bytes left."""
        entries = []
        with os.scandir(self.folder) as files:
            found = list(files)
        for file in found:
            with contextlib.suppress(OSError):  # another process may prune too
                status = file.stat()
                if _is_entry(file.name):
                    entries.append((status.st_mtime, status.st_size, file.path))
                elif (
                    file.name.endswith(".partial")
                    and time.time() - status.st_mtime > 60 * _MINUTES_OF_A_WRITE
                ):
                    os.unlink(file.path)
        total = sum(size for _, size, _ in entries)
        if total > self.limit:
            for _, size, path in sorted(entries):
                if total <= 0.9 * self.limit:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    total -= size
        return total


def default_cache_folder() -> Path:
    """Return $KAF_CACHE, else the user's cache folder for napari-kaf on this platform."""
    own, xdg = os.environ.get("KAF_CACHE", ""), os.environ.get("XDG_CACHE_HOME", "")
    local = os.environ.get("LOCALAPPDATA", "")
    if own:
        return Path(os.path.expanduser(own))
    if sys.platform == "win32" and local:
        return Path(local) / "napari-kaf"
    if sys.platform != "win32" and os.path.isabs(xdg):
        return Path(xdg) / "napari-kaf"
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "napari-kaf"
    folders = {"win32": "AppData/Local", "darwin": "Library/Caches"}
    return home / folders.get(sys.platform, ".cache") / "napari-kaf"


def _key(slice_yx: np.ndarray, fingerprint: str) -> str:
    digest = hashlib.sha256(f"1 {fingerprint} {slice_yx.dtype.str} {slice_yx.shape} ".encode())
    digest.update(np.ascontiguousarray(slice_yx).tobytes())
    return digest.hexdigest()


def _is_entry(name: str) -> bool:
    stem, _, suffix = name.rpartition(".")
    return suffix == "npz" and len(stem) == 64 and set(stem) <= set("0123456789abcdef")


def _pack(keypoints: Keypoints) -> bytes:
    descriptors = keypoints.descriptors
    # SIFT's descriptors are whole numbers 0..255: a quarter of the space, and nothing lost.
    if descriptors.size == 0 or (descriptors.min() >= 0 and descriptors.max() <= 255):
        small = descriptors.astype(np.uint8)
        descriptors = small if np.array_equal(small, descriptors) else descriptors
    content = io.BytesIO()
    np.savez(content, columns=keypoints.columns(), descriptors=descriptors)
    return content.getvalue()


def _read_entry(entry: Path, dimension: int) -> Keypoints | None:
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            keypoints = Keypoints.from_columns(arrays["columns"], arrays["descriptors"])
    except Exception:  # damaged bytes make zip and npy readers raise nearly anything
        return None
    if keypoints.descriptors.shape[1] != dimension:
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)  # it is in use: pruned last
    return keypoints


def _write_atomically(path: Path, content: bytes) -> None:
    handle, partial = tempfile.mkstemp(suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        try:
            os.replace(partial, path)
        except PermissionError:  # Windows, while another thread or process reads the same entry
            if not path.is_file():
                raise
            os.unlink(partial)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1
