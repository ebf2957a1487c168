"""The network and the volume that are looked into. Made on the GUI thread, filled and used on worker threads."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kaf_model.config import KeypointConfig, Recipe
from kaf_model.presets import PresetName
from kaf_model.progress import Progress
from kaf_model.volume import Volume
from napari_kaf._device import describe_device, share_processor
from napari_kaf._jobs import Control, Report

if TYPE_CHECKING:
    from kaf_model.explore.equivariance import AugmentedSlice, EquivarianceError
    from kaf_model.explore.matches import LearnedMatches
    from kaf_model.explore.views import VolumeView


@dataclass(frozen=True)
class Network:
    """What the panel has to know of a network.

    Attributes:
        note: What it has learned, in words.
        device: What it runs on, in words.
        trained: False for random weights.
        blocks: Attention blocks of each level with a KAF layer, by level; empty for a network without.
        heads: Heads of each block.
        has_matcher: Whether it can match keypoints.
        keypoints: Detection it was trained with.
        pixel: Size in mm of the pixels it reads, (y, x).
    """

    note: str
    device: str
    trained: bool
    blocks: Mapping[int, int]
    heads: int
    has_matcher: bool
    keypoints: KeypointConfig
    pixel: tuple[float, float]


class Lab:
    """One network and one volume. What is computed of them is kept until the lab is let go.

    Args:
        volume: The volume.
        model: Checkpoint, or None for random weights.
        preset: Size of a network with random weights.
        device: A device name of the engine.
    """

    def __init__(self, *, volume: Volume, model: Path | None, preset: PresetName, device: str) -> None:
        self.volume = volume
        self.model = model
        self.preset: PresetName = preset
        self._device = device
        self._view: VolumeView | None = None
        self._learned: dict[tuple[int, int], LearnedMatches] = {}
        self._augmented: dict[tuple[int, int], list[AugmentedSlice]] = {}
        self._errors: dict[tuple[int, int, int], EquivarianceError] = {}
        self._loading = threading.Lock()
        self._keeping = threading.Lock()

    def view(self) -> VolumeView:
        """The volume through the eyes of the network; the first call loads it."""
        with self._loading:
            if self._view is None:
                share_processor()
                from kaf_model.engine import choose_device
                from kaf_model.explore.explorer import Explorer
                from kaf_model.explore.views import VolumeView
                from kaf_model.keypoints import KeypointCache

                device = choose_device(self._device)
                if self.model is None:
                    explorer = Explorer.untrained(Recipe.preset(self.preset), device=device)
                else:
                    explorer = Explorer.load(self.model, device=device)
                self._view = VolumeView(explorer, self.volume, cache=KeypointCache())
            return self._view

    def network(self) -> Network:
        """Describe the network."""
        view = self.view()
        explorer = view.explorer
        levels = explorer.kaf_levels
        return Network(
            note=explorer.note,
            device=describe_device(explorer.device),
            trained=explorer.kind != "untrained",
            blocks={level: len(explorer.kaf_layer(level).attention) for level in levels},
            heads=explorer.config.heads,
            has_matcher=explorer.matching is not None,
            keypoints=explorer.keypoints,
            pixel=view.stack.spacing,
        )

    def learned(self, z0: int, z1: int) -> LearnedMatches:
        """Matches of two slices by the trained matcher, computed once."""
        from kaf_model.explore.matches import learned_matches

        with self._keeping:
            if (z0, z1) not in self._learned:
                self._learned[z0, z1] = learned_matches(self.view(), z0, z1)
            return self._learned[z0, z1]

    def augmented(self, z: int, draw: int) -> list[AugmentedSlice]:
        """A slice under the random transforms of a draw; those of the last slice and draw are kept."""
        from kaf_model.explore.equivariance import NUM_VIEWS, augment_slice

        with self._keeping:
            if (z, draw) not in self._augmented:
                view = self.view()
                made = [augment_slice(view, z, seed=draw * NUM_VIEWS + number) for number in range(NUM_VIEWS)]
                self._augmented = {(z, draw): made}
            return self._augmented[z, draw]

    def error(self, z: int, level: int, draw: int, num_points: int) -> EquivarianceError:
        """Equivariance error of a slice under the transforms of a draw, measured once."""
        from kaf_model.explore.equivariance import equivariance_errors

        with self._keeping:
            if (z, level, draw) not in self._errors:
                (found,) = equivariance_errors(
                    self.view(), z, num_points=num_points, seed=draw, levels=(level,)
                )
                self._errors[z, level, draw] = found
            return self._errors[z, level, draw]


def open_task(lab: Lab, control: Control) -> Generator[Any, None, Network]:
    """Load the network."""
    yield Report(Progress("loading the model", 0, None))
    return lab.network()
