"""What a network says of slices as they lie, mirrored, or turned to where it is surest.

A network that has learnt from few patients knows structures as they lay in those, give or take what it was
augmented by. In another patient they may lie turned by a right angle, and half of a structure is missed. So
an angle is looked for at which the network agrees with itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from kaf_model.config import Orientation
from kaf_model.datasets import pad_keypoints
from kaf_model.inference import InferenceNetwork
from kaf_model.slices import crop_to, pad_to_multiple
from kaf_model.unet import SegmentationNetwork

STEP = 60.0
"""Degrees between the angles that are tried: augmented by 30 either way, a network knows what is between two."""

_SPREAD = 30.0  # degrees either way over which a prediction is averaged
_LEAST_GAIN = 0.02  # of agreement; for less slices stay as they are
_SEARCHED = 5  # slices of a volume
_DIVISOR = 16
_FLIPS: tuple[tuple[int, ...], ...] = ((), (2,), (3,), (2, 3))


def predict_slices(
    network: SegmentationNetwork | InferenceNetwork,
    images: NDArray[np.float32],
    keypoints: Sequence[NDArray[np.float32]],
    device: torch.device,
    *,
    flips: bool = False,
    angles: Sequence[float] = (0.0,),
) -> Tensor:
    """Class probabilities of normalised slices of one size.

    Args:
        network: On `device`. One that is not folded is folded here, at every call.
        images: (n, H, W) any size; padded here to what the network needs.
        keypoints: Positions (N_i, 2) of each slice.
        device: Where the network is.
        flips: Average over mirrored copies.
        angles: Degrees, clockwise. Average over copies turned by each.

    Returns:
        (n, K, H, W) float32 on `device`.
    """
    if isinstance(network, SegmentationNetwork):
        network = InferenceNetwork(network)
    positions, valid = (tensor.to(device) for tensor in pad_keypoints(keypoints))
    stack = torch.from_numpy(images)[:, None].to(device)
    with torch.inference_mode():
        parts = [_turned(network, stack, positions, valid, angle, flips) for angle in angles]
        return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)


def best_angle(predict: Callable[[float], Iterable[Tensor]]) -> Generator[tuple[int, int], None, float]:
    """Look for the angle at which a network agrees most with itself on slices of one volume.

    That is the mean over structures of the soft Dice between its probabilities and the labels that they give,
    over all slices together, smoothed over neighbouring angles.

    Args:
        predict: Given an angle, the probabilities (n, K, H, W) of the slices that `sampled` chooses, in parts,
            as `predict_slices` gives them at that angle.

    Yields:
        Angles tried, and how many there will be.

    Returns:
        Degrees, clockwise; 0 where another angle is hardly better.
    """
    tried = np.arange(0.0, 360.0, STEP)
    found = []
    for angle in tried:
        found.append(_agreement(predict(float(angle))))
        yield len(found), len(tried)
    agreement = np.array(found)
    smooth = (agreement + (np.roll(agreement, 1) + np.roll(agreement, -1)) / 2) / 2
    best = int(smooth.argmax())
    return float(tried[best]) if smooth[best] > smooth[0] + _LEAST_GAIN else 0.0


def angles_at(angle: float, orientation: Orientation) -> tuple[float, ...]:
    """Angles over which a prediction is averaged that is best at one of them."""
    return (angle, angle - _SPREAD, angle + _SPREAD) if orientation == "average" else (angle,)


def sampled(count: int) -> list[int]:
    """Slices of a volume on which an angle is looked for, evenly spaced away from its ends."""
    if count <= _SEARCHED:
        return list(range(count))
    return [(place + 1) * count // (_SEARCHED + 1) for place in range(_SEARCHED)]


def _turned(
    network: InferenceNetwork, stack: Tensor, positions: Tensor, valid: Tensor, angle: float, flips: bool
) -> Tensor:
    """Probabilities (n, K, H, W) of slices (n, 1, H, W) that are turned for the network and back."""
    shape = tuple(stack.shape[2:])
    if angle:
        room = _room(shape, angle)
        positions = _turned_points(positions, angle, shape, room)
        return _turn(_mirrored(network, _turn(stack, angle, room), positions, valid, flips), -angle, shape)
    padded = pad_to_multiple(stack, _DIVISOR)
    return crop_to(_mirrored(network, padded, positions, valid, flips), shape)


def _mirrored(
    network: InferenceNetwork, stack: Tensor, positions: Tensor, valid: Tensor, flips: bool
) -> Tensor:
    """Probabilities of slices whose sides the network can halve, averaged over mirrored copies if asked for."""
    stack = stack.contiguous(memory_format=torch.channels_last)
    size = torch.tensor(stack.shape[2:], device=stack.device)
    total: Tensor | None = None
    for axes in _FLIPS if flips else _FLIPS[:1]:
        mirrored = positions.clone()
        for axis in axes:
            mirrored[..., axis - 2] = size[axis - 2] - 1 - mirrored[..., axis - 2]
        logits = network(stack.flip(axes) if axes else stack, mirrored, valid)
        probabilities = (logits.flip(axes) if axes else logits).softmax(1)
        total = probabilities if total is None else total + probabilities
    assert total is not None
    return total / len(_FLIPS) if flips else total


def _agreement(parts: Iterable[Tensor]) -> float:
    """Mean over structures of the soft Dice between probabilities (n, K, H, W) and their labels."""
    sums: Tensor | float = 0.0
    for probabilities in parts:
        labels = functional.one_hot(probabilities.argmax(1), probabilities.shape[1]).movedim(-1, 1)
        sums = sums + torch.stack((2 * probabilities * labels, probabilities + labels)).sum((1, 3, 4))
    assert isinstance(sums, Tensor)
    overlap, size = sums[:, 1:]
    return float((overlap / size.clamp_min(1e-6)).mean())


def _room(shape: tuple[int, ...], angle: float) -> tuple[int, int]:
    """Size that holds a turned slice of a shape (H, W), as the network needs it."""
    height, width = shape
    cosine, sine = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    sides = (height * cosine + width * sine, width * cosine + height * sine)
    rows, columns = (math.ceil(round(side, 6) / _DIVISOR) * _DIVISOR for side in sides)
    return rows, columns


def _turn(maps: Tensor, angle: float, shape: tuple[int, ...]) -> Tensor:
    """Turn maps (n, C, H, W) clockwise about their centre onto maps of another shape; edges are repeated."""
    height, width = maps.shape[2:]
    rows, columns = shape
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    matrix = [
        [cosine * columns / width, sine * rows / width, 0.0],
        [-sine * columns / height, cosine * rows / height, 0.0],
    ]
    theta = torch.tensor(matrix, device=maps.device).expand(len(maps), 2, 3)
    grid = functional.affine_grid(theta, [len(maps), 1, rows, columns], align_corners=False)
    return functional.grid_sample(maps, grid, padding_mode="border", align_corners=False)


def _turned_points(points: Tensor, angle: float, shape: tuple[int, ...], room: tuple[int, int]) -> Tensor:
    """Where points (B, N, 2) lie once their slices were turned."""
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    y, x = ((points[..., axis] - (shape[axis] - 1) / 2) for axis in (0, 1))
    turned = torch.stack((sine * x + cosine * y, cosine * x - sine * y), dim=-1)
    return turned + torch.tensor([(side - 1) / 2 for side in room], device=points.device)
