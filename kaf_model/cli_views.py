"""What the commands that look into networks share: options, numbers, networks, and slices of a volume."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kaf_model.cli_settings import choose_settings
from kaf_model.errors import UserError

if TYPE_CHECKING:
    from kaf_model.explore.explorer import Explorer
    from kaf_model.explore.views import VolumeView
    from kaf_model.volume import Volume

VolumeFile = Annotated[Path, typer.Argument(metavar="VOLUME", help="The volume.")]
FigureFile = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="NAME.png, NAME.pdf or NAME.svg.")
]
Slice = Annotated[
    int | None, typer.Option("--slice", metavar="Z", help="The slice, from 0; without it the middle one.")
]
Distance = Annotated[
    int, typer.Option("--distance", metavar="N", help="Slices to the neighbour, upwards or (-1) downwards.")
]
OneModel = Annotated[
    Path | None,
    typer.Option("--model", metavar="FILE", help="Checkpoint; its preprocessing and keypoints are used."),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", metavar="[NAME=]FILE", help="Checkpoint, and what to call it in the figure. Repeatable."
    ),
]
Untrained = Annotated[
    bool,
    typer.Option(
        "--untrained",
        metavar="",
        help="Add a network with random weights: of the architecture of the first model, else of --preset.",
    ),
]
Levels = Annotated[
    str, typer.Option("--levels", metavar="3,4", help="Encoder levels, 1 the finest to 4 the coarsest.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of everything random.")]
Title = Annotated[str, typer.Option("--title", metavar="TEXT", help="Heading of the figure.")]


def parse_numbers(option: str, text: str) -> list[float]:
    """Return the numbers of "2.5,4".

    Raises:
        UserError: If it is not written so.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} takes numbers such as 3,4; got {text!r}") from error


def parse_whole(option: str, text: str) -> list[int]:
    """Return the whole numbers of "3,5-7" or "-1,1".

    Raises:
        UserError: If it is not written so.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise UserError(f"{option} takes whole numbers such as 3,4; got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"{option}: a range runs upwards, like 3-5; got {text!r}")
        found += range(first, last + 1)
    return found


def load_explorers(
    models: Sequence[str], untrained: bool, preset: str | None, seed: int, device: str
) -> dict[str, Explorer]:
    """Load networks to look into, each by what to call it, the untrained one first.

    Raises:
        UserError: If a name is given twice or a preset beside models.
    """
    from kaf_model.engine import choose_device
    from kaf_model.explore.explorer import Explorer

    where = choose_device(device)
    if preset is not None and (models or not untrained):
        raise UserError(
            "--preset is that of an untrained network alone; checkpoints bring their own settings"
        )
    loaded = {name: Explorer.load(path, device=where) for name, path in named_files(models).items()}
    if not untrained:
        return loaded
    if "untrained" in loaded:
        raise UserError(
            "the untrained network is called untrained; give the checkpoint another name, NAME=FILE"
        )
    recipe = choose_settings(preset, None, None, {}).recipe
    if loaded:
        like = next(iter(loaded.values()))
        recipe = recipe.override(model=like.config, slices=like.slices, keypoints=like.keypoints)
    return {"untrained": Explorer.untrained(recipe, seed=seed, device=where), **loaded}


def named_files(models: Sequence[str]) -> dict[str, Path]:
    """Paths by what to call them, from NAME=FILE or FILE."""
    named: dict[str, Path] = {}
    for text in models:
        name, equals, path = text.partition("=")
        if Path(text).exists() or not equals:
            name, path = Path(text).stem, text
        if name in named:
            raise UserError(f"two models are called {name}; give them names, NAME=FILE")
        named[name] = Path(path)
    return named


def views_of(explorers: Mapping[str, Explorer], volume: Volume) -> dict[str, VolumeView]:
    """The volume as each network sees it, keypoints cached on disk."""
    from kaf_model.explore.views import VolumeView
    from kaf_model.keypoints import KeypointCache

    return {name: VolumeView(one, volume, cache=KeypointCache()) for name, one in explorers.items()}


def view_of(
    output: Path,
    source: Path,
    model: Path | None,
    preset: str | None,
    config: Path | None,
    assignments: list[str] | None,
    reading: tuple[int | None, int | None, float | None],
) -> VolumeView:
    """Read a volume as a checkpoint or the settings want it."""
    if model is not None and (preset or config or assignments):
        raise UserError("a checkpoint brings its own settings: drop --model, or --preset, --config and --set")
    recipe = choose_settings(preset, config, assignments).recipe
    check_output(output)

    from kaf_model.explore.explorer import Explorer

    explorer = Explorer.untrained(recipe) if model is None else Explorer.load(model)
    return views_of({"": explorer}, read(source, *reading))[""]


def read(source: Path, frame: int | None, slice_axis: int | None, fill_nan: float | None) -> Volume:
    """Read the volume of a command."""
    from kaf_model.volume import read_volume

    return read_volume(source, frame=frame, slice_axis=slice_axis, fill_nan=fill_nan)


def slice_or_middle(volume: Volume, index: int | None) -> int:
    """The slice asked for, which must exist, else the middle one."""
    z = volume.num_slices // 2 if index is None else index
    check_slices(volume, [z])
    return z


def with_neighbour(volume: Volume, index: int | None, distance: int) -> list[int]:
    """The slice asked for, else the middle one, and the one at a distance; both must exist."""
    if volume.num_slices < 2:
        raise UserError(f"{volume.name} has one slice; a neighbour needs at least 2")
    if distance == 0:
        raise UserError("--distance is that to another slice, such as 1 or -1; got 0")
    z = slice_or_middle(volume, index)
    if index is None:  # the nearest to the middle that has such a neighbour
        z = min(max(z, -distance), volume.num_slices - 1 - max(distance, 0))
    check_slices(volume, [z, z + distance])
    return [z, z + distance]


def check_slices(volume: Volume, slices: Sequence[int]) -> None:
    """Refuse slices that a volume does not have."""
    wrong = [z for z in slices if not 0 <= z < volume.num_slices]
    if wrong:
        raise UserError(f"slices of {volume.name} are 0 to {volume.num_slices - 1}, got {wrong[0]}")


def check_levels(levels: Sequence[int]) -> None:
    """Refuse levels that no encoder has."""
    wrong = [level for level in levels if level not in (1, 2, 3, 4)]
    if wrong:
        raise UserError(f"levels are 1 (fine) to 4 (coarse), got {wrong[0]}")


def check_output(output: Path) -> None:
    """Refuse, before the work, what a figure cannot be written to."""
    from kaf_model.figures.style import check_format

    check_format(output)
