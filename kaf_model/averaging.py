"""The weights a finetuning hands over: their running average, or the best average on held-out slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kaf_model.engine import channels_last
from kaf_model.inference import InferenceNetwork
from kaf_model.labels import ClassMap
from kaf_model.losses import IGNORED
from kaf_model.prediction import predict_slices
from kaf_model.preparation import LabelledSlice
from kaf_model.slices import likeliest
from kaf_model.unet import SegmentationNetwork, build_network


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


class WeightAverage:
    """Keeps the running average of a network's weights, and the best average on held-out slices.

    Attributes:
        best_dice: The highest Dice on the held-out slices so far; None before it was measured.

    Args:
        network: The network in training.
        decay: Of the running average; 0 keeps the last weights.
        held_out: Slices to measure on.
        classes: Channels of their labels.
    """

    def __init__(
        self, network: SegmentationNetwork, decay: float, held_out: Sequence[LabelledSlice], classes: ClassMap
    ) -> None:
        self._network = network
        self._decay = decay
        self._held_out = held_out
        self._classes = classes
        self.best_dice: float | None = None
        self._best: dict[str, Tensor] | None = None
        self._model = AveragedModel(network, use_buffers=True)
        pairs = list(zip(_tensors(self._model.module), _tensors(network), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after a step into the average."""
        # By lists that are made once: AveragedModel's own method, which makes them anew, takes a GPU's whole step.
        count = int(self._model.n_averaged)
        # A short training forgets its start too.
        share = min(self._decay, (1 + count) / (10 + count)) if count else 0.0
        averages, current = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, current, 1 - share)
        if self._copied:
            averages, current = zip(*self._copied, strict=True)
            torch._foreach_copy_(averages, current)
        self._model.n_averaged += 1

    def network(self) -> SegmentationNetwork:
        """The averaged network, in evaluation mode."""
        average = self._model.module
        assert isinstance(average, SegmentationNetwork)
        return average.eval()

    def best(self) -> SegmentationNetwork:
        """The best weights on held-out slices if there are any, else the average."""
        if self._best is None:
            return self.network()
        network = build_network(self._network.config).to(next(self._network.parameters()).device)
        network.load_state_dict(self._best)
        channels_last(network)
        return network.eval()

    def measure(self, device: torch.device) -> float:
        """Mean Dice of the foreground classes over the held-out slices; keeps the weights if it is the best."""
        overlap, size = np.zeros(len(self._classes)), np.zeros(len(self._classes))
        network = self.network()
        folded = InferenceNetwork(network)
        for item in self._held_out:
            probabilities = predict_slices(
                folded, item.image[None].astype(np.float32), [item.keypoints], device
            )
            predicted = likeliest(probabilities[0])
            known = item.labels != IGNORED
            for channel in range(1, len(self._classes)):
                ours, theirs = (predicted == channel) & known, item.labels == channel
                overlap[channel] += 2 * np.count_nonzero(ours & theirs)
                size[channel] += np.count_nonzero(ours) + np.count_nonzero(theirs)
        there = size > 0
        dice = float((overlap[there] / size[there]).mean()) if there.any() else 1.0
        if self.best_dice is None or dice >= self.best_dice:
            self.best_dice = dice
            self._best = {name: value.clone() for name, value in network.state_dict().items()}
        return dice

    def state(self) -> dict[str, Tensor]:
        """Tensors that `load` takes back."""
        tensors = {f"average.{name}": value for name, value in self._model.state_dict().items()}
        if self._best is not None:
            tensors |= {f"best.{name}": value for name, value in self._best.items()}
            tensors["best_dice"] = torch.tensor(self.best_dice, dtype=torch.float64)
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `state` gave; other tensors are passed over."""
        device = next(self._network.parameters()).device
        parts: dict[str, dict[str, Tensor]] = {"average": {}, "best": {}}
        for name, value in tensors.items():
            part, _, key = name.partition(".")
            if part in parts:
                parts[part][key] = value.to(device)
        self._model.load_state_dict(parts["average"])
        if parts["best"]:
            self._best = parts["best"]
            self.best_dice = float(tensors["best_dice"])
