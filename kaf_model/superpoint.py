"""SuperPoint (DeTone et al., 2018) as a keypoint detector, through the optional `transformers`."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from kaf_model.config import KeypointConfig
from kaf_model.errors import UserError
from kaf_model.keypoints import Keypoints, stretch_contrast

_CELL = 8  # the network's output stride in pixels


class SuperPointDetector:
    """SuperPoint at the slice's own resolution, on the device where its model lies.

    Its positions are whole pixels, its responses are probabilities, and it knows neither scale nor angle:
    scales are the 8 pixels of its cells, angles 0. Its weights are never downloaded here.
    """

    def __init__(
        self,
        config: KeypointConfig | None = None,
        model: Any = None,
    ) -> None:
        """Take a loaded model, or load weights from this computer.

        Args:
            config: Only `max_keypoints` and `superpoint_weights` are read; thresholds are the model's own.
            model: A `transformers.SuperPointForKeypointDetection`; None loads the configured weights.

        Raises:
            UserError: If `transformers` is not installed.
            UserError: If the weights are not on this computer.
        """
        self.config = config or KeypointConfig(detector="superpoint")
        self.model = (_load(self.config.superpoint_weights) if model is None else model).eval()
        self.dimension: int = self.model.config.descriptor_decoder_dim
        self.fingerprint = (
            f"superpoint max_keypoints={self.config.max_keypoints} weights={_digest(self.model)} "
            f"threshold={self.model.config.keypoint_threshold} nms_radius={self.model.config.nms_radius} "
            f"border={self.model.config.border_removal_distance} limit={self.model.config.max_keypoints} "
            f"torch={torch.__version__} transformers={_transformers().__version__}"
        )

    def detect(self, slice_yx: np.ndarray) -> Keypoints:
        """Return the keypoints of a slice of shape (H, W).

        Raises:
            ValueError: If the array is not 2-D, not numeric, or has values that are NaN or infinite.
        """
        image = stretch_contrast(slice_yx).astype(np.float32)
        if not image.any():
            return Keypoints.empty(self.dimension)
        height, width = image.shape
        padded = np.pad(image, ((0, -height % _CELL), (0, -width % _CELL)), mode="edge")
        parameter = next(self.model.parameters())
        with torch.inference_mode():
            found = self.model(torch.from_numpy(padded)[None, None].to(parameter.device, parameter.dtype))
        relative, responses, descriptors = (
            part[0].float().cpu().numpy() for part in (found.keypoints, found.scores, found.descriptors)
        )
        # The model gives (x, y) relative to the padded image; they were whole pixels before.
        positions = np.rint(relative[:, ::-1] * padded.shape)
        columns = np.zeros((len(positions), 5))
        columns[:, :2], columns[:, 2], columns[:, 3] = positions, responses, _CELL
        border = max(self.model.config.border_removal_distance, 0)
        inside = ((positions >= border) & (positions < np.array([height, width]) - border)).all(axis=1)
        return (
            Keypoints.from_columns(columns, descriptors).select(inside).strongest(self.config.max_keypoints)
        )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "the SuperPoint detector needs transformers: pip install transformers (or choose the detector sift, which "
            "needs nothing)"
        ) from error
    return transformers


def _load(weights: str) -> Any:
    try:
        return _transformers().SuperPointForKeypointDetection.from_pretrained(weights, local_files_only=True)
    except OSError as error:
        raise UserError(
            f"SuperPoint's weights are not on this computer: {weights}. Give a folder with config.json and "
            f"model.safetensors as superpoint_weights, or fetch them once with: hf download {weights}"
        ) from error


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
