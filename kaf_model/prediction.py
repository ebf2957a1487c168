"""What a network says of slices as they lie, mirrored, or turned to where it contradicts itself least.

A network that has learnt from few patients knows structures as they lay in those, give or take what it was
augmented by. In another patient they may lie turned by a right angle, and half of a structure is missed. So
an angle is looked for about which it makes no difference if slices are turned a little more.
"""

from __future__ import annotations

import functools
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
from kaf_model.slices import crop_to, likeliest, pad_to_multiple
from kaf_model.unet import SegmentationNetwork

STEP = 30.0
"""Degrees between angles that are tried or averaged over: what a network is augmented by either way."""

_LEAST_GAIN = 0.05  # of agreement; for less slices stay as they are
_AGREED = 0.85  # where slices as they lie reach that, no other angle is tried
_SEARCHED = 3  # slices of a volume
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
        images: (n, S, H, W) any size; padded here to what the network needs.
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
    stack = torch.from_numpy(images).to(device)
    with torch.inference_mode():
        parts = [_turned(network, stack, positions, valid, angle, flips) for angle in angles]
        return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)


def best_angle(predict: Callable[[float], Iterable[Tensor]]) -> Generator[tuple[int, int], None, float]:
    """Look for the angle at which a network contradicts itself least on slices of one volume.

    That is where labels have the highest Dice with those that it gives `STEP` degrees either way: mean over
    structures, all slices together, 0 for a structure that is not found. A network is as sure of what it makes up
    as of what it has learnt, but makes up something else when slices are turned a little.

    Args:
        predict: Given an angle, the probabilities (n, K, H, W) of the slices that `sampled` chooses, in parts,
            as `predict_slices` gives them at that angle.

    Yields:
        Angles tried, and how many there are; less are tried where slices as they lie will do.

    Returns:
        Degrees, clockwise; 0 where another angle is hardly better.
    """
    count = round(360 / STEP)
    found: dict[int, list[NDArray[np.int64]]] = {}

    @functools.cache
    def alike(place: int) -> float:
        return _mean_dice(found[place], found[(place + 1) % count], structures)

    def agreement(place: int) -> float:
        return (alike((place - 1) % count) + alike(place)) / 2

    for place in sorted(range(count), key=lambda place: min(place, count - place)):
        parts = list(predict(place * STEP))
        structures = parts[0].shape[1] - 1
        found[place] = [likeliest(maps) for maps in parts]
        yield len(found), count
        if len(found) == 3 and agreement(0) >= _AGREED:
            return 0.0
    agreements = [agreement(place) for place in range(count)]
    best = int(np.argmax(agreements))
    return best * STEP if agreements[best] > agreements[0] + _LEAST_GAIN else 0.0


def angles_at(angle: float, orientation: Orientation) -> tuple[float, ...]:
    """Angles over which a prediction is averaged that is best at one of them."""
    return (angle, angle - STEP, angle + STEP) if orientation == "average" else (angle,)


def sampled(count: int) -> list[int]:
    """Slices of a volume on which an angle is looked for, evenly spaced away from its ends."""
    if count <= _SEARCHED:
        return list(range(count))
    return [(place + 1) * count // (_SEARCHED + 1) for place in range(_SEARCHED)]


def _turned(
    network: InferenceNetwork, stack: Tensor, positions: Tensor, valid: Tensor, angle: float, flips: bool
) -> Tensor:
    """Probabilities (n, K, H, W) of slices (n, S, H, W) that are turned for the network and back."""
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


def _mean_dice(one: list[NDArray[np.int64]], other: list[NDArray[np.int64]], structures: int) -> float:
    """Mean over structures, numbered from 1, of the Dice between two lists of label maps; 0 for one in neither."""
    overlap, size = np.zeros(structures + 1), np.zeros(structures + 1)
    for first, second in zip(one, other, strict=True):
        overlap += np.bincount(first[first == second], minlength=structures + 1)
        size += np.bincount(first.ravel(), minlength=structures + 1)
        size += np.bincount(second.ravel(), minlength=structures + 1)
    return float((2 * overlap / np.maximum(size, 1))[1:].mean())


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
