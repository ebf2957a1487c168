"""Two slices side by side with their keypoints and the pairs taken for the same anatomy, as a value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class PairPicture:
    """Two slices as the network sees them.

    Attributes:
        images: Both slices (H, W), normalised.
        points: Keypoints (N, 2) and (M, 2), (y, x).
        pairs: Index pairs (P, 2) of keypoints taken for the same anatomy.
        title: Which slices they are.
        values: What the lines are coloured by, (P,) from 0 to 1; None draws them in one colour.
    """

    images: tuple[NDArray[np.float32], NDArray[np.float32]]
    points: tuple[NDArray[np.float32], NDArray[np.float32]]
    pairs: NDArray[np.int64]
    title: str
    values: NDArray[np.floating] | None = None
