"""Small volumes with two structures in a textured body, for what is registered."""

import numpy as np
from scipy.ndimage import gaussian_filter, shift

from kaf_model.checkpoint import ClassLabel
from kaf_model.config import SliceConfig
from kaf_model.labels import ClassMap, LabelledVolume, SliceStatus
from kaf_model.volume import Volume

CLASSES = ClassMap((ClassLabel(0, "background"), ClassLabel(4, "front"), ClassLabel(7, "back")))
CONFIG = SliceConfig(spacing=None)
SHAPE = (18, 28, 24)


def done(work):
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def labels_at(centre):
    z, y, x = np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij")
    inside = ((z - centre[0]) / 5) ** 2 + ((y - centre[1]) / 7) ** 2 + ((x - centre[2]) / 5) ** 2 <= 1
    return np.where(inside, np.where(y < centre[1], 4, 7), 0).astype(np.int16)


def subject(move=(0, 0, 0), seed=0, spacing=(1, 1, 1), name="v"):
    """A volume with two structures against each other; the same body with the same seed, moved by some voxels."""
    texture = gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 1.5)
    labels = labels_at((9, 14, 12))
    body = texture / texture.std() + 2 * (labels == 4) - 1 * (labels == 7)
    volume = Volume.from_array(
        shift(body, move, order=1, mode="nearest").astype(np.float32), spacing, name=name
    )
    return volume, labels_at(np.array((9, 14, 12)) + move)


def whole(volume, labels):
    return LabelledVolume(volume, labels, dict.fromkeys(range(len(labels)), SliceStatus.COMPLETE))
