"""Options that several commands share, and what their texts mean: durations, slices, class names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from kaf_model.errors import UserError
from kaf_model.presets import PRESETS

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


# --- options that several commands share -------------------------------------------------------------------

_TRAINING, _SETTINGS, _READING, _RUNNING = "Training", "Settings", "Reading volumes", "Running"

OutputFile = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="Checkpoint to write, NAME.safetensors.")
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="|".join(PRESETS),
        help="Named settings to start from; small is for two CPU cores, base for a workstation with a GPU. "
        "Without it: small.",
        rich_help_panel=_SETTINGS,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="YAML file as printed by kaf settings.", rich_help_panel=_SETTINGS
    ),
]
SetOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.FIELD=VALUE",
        help="One setting, e.g. finetune.learning_rate=1e-3. Repeatable; kaf settings lists all.",
        rich_help_panel=_SETTINGS,
    ),
]
Network = Annotated[
    str | None,
    typer.Option(
        "--network",
        metavar="kaf-unet|unet|unet-c2|kaf-fcn|fcn|swin-unetr|swin-unet",
        help="Architecture; only those named kaf- read keypoints. Without it that of the preset, or of the start; a "
        "finetuning without a start takes unet with the preset small, which is ahead in few minutes.",
        rich_help_panel=_SETTINGS,
    ),
]
TimeBudget = Annotated[
    str | None,
    typer.Option(
        "--time-budget", metavar="90s|10m|2h", help="Train for this long.", rich_help_panel=_TRAINING
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        metavar="N",
        help="Train for this many optimiser steps; with --time-budget, what ends first counts.",
        rich_help_panel=_TRAINING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Seed of weights and sampling.", rich_help_panel=_TRAINING),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        metavar="",
        help="Go on with an interrupted training of the same output.",
        rich_help_panel=_TRAINING,
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="auto|float32",
        help="auto computes in mixed bfloat16 where that is fast.",
        rich_help_panel=_RUNNING,
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="auto|cpu|cuda|mps", help="Where to compute.", rich_help_panel=_RUNNING),
]
Frame = Annotated[
    int | None,
    typer.Option("--frame", metavar="N", help="Which volume of 4-D files, from 0.", rich_help_panel=_READING),
]
SliceAxis = Annotated[
    int | None,
    typer.Option(
        "--slice-axis",
        metavar="0|1|2",
        help="Stored axis to slice along; without it the one with the largest spacing.",
        rich_help_panel=_READING,
    ),
]
FillNan = Annotated[
    float | None,
    typer.Option(
        "--fill-nan",
        metavar="VALUE",
        help="Value for voxels that are NaN or infinite.",
        rich_help_panel=_READING,
    ),
]
CompleteSlices = Annotated[
    list[str] | None,
    typer.Option(
        "--slices",
        metavar="NAME:3,5,7-9",
        help="Slices that are labelled completely; unpainted is background. Repeatable. Slices are counted from 0.",
    ),
]
PartialSlices = Annotated[
    list[str] | None,
    typer.Option(
        "--partial",
        metavar="NAME:4,6",
        help="Slices that are labelled in part; unpainted is unknown. Repeatable.",
    ),
]
EmptySlices = Annotated[
    list[str] | None,
    typer.Option("--empty", metavar="NAME:0,1", help="Slices on which nothing is to be found. Repeatable."),
]


# --- values ------------------------------------------------------------------------------------------------


def parse_duration(text: str) -> float:
    """Return the seconds of "90s", "10m", "1.5h", "1h30m" or "90".

    Raises:
        UserError: On anything else, or nothing at all.
    """
    compact = text.strip().lower().replace(" ", "")
    parts = re.findall(r"(\d+(?:\.\d*)?|\.\d+)([smh]?)", compact)
    seconds = sum(float(number) * _SECONDS[unit or "s"] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != compact or not 0 < seconds < float("inf"):
        raise UserError(f"a duration is a number with s, m or h, such as 90s or 10m; got {text!r}")
    return seconds


def duration_text(seconds: float) -> str:
    """Return seconds as a clock shows them: "0:42", "12:05", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def parse_slices(text: str) -> tuple[str, list[int]]:
    """Return the case and the slices of "NAME:3,5,7-9".

    Raises:
        UserError: If it is not written so.
    """
    name, colon, listed = text.rpartition(":")
    slices: list[int] = []
    for part in listed.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not (name and colon and match):
            raise UserError(f"slices are named like patient_01:3,5,7-9; got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"a range of slices runs upwards, like 3-5; got {text!r}")
        slices += range(first, last + 1)
    return name, slices


def slice_marks(
    complete: Iterable[str] | None, partial: Iterable[str] | None, empty: Iterable[str] | None
) -> dict[str, list[tuple[str, list[int]]]]:
    """Return the named slices by what their labels mean.

    Raises:
        UserError: If one is not written like patient_01:3,5,7-9.
    """
    named = {"complete": complete, "partial": partial, "empty": empty}
    return {status: [parse_slices(text) for text in texts or ()] for status, texts in named.items()}


def parse_classes(text: str) -> dict[int, str]:
    """Return the names of "1=RV,2=MYO" by label value.

    Raises:
        UserError: If it is not written so.
    """
    names: dict[int, str] = {}
    for part in text.split(","):
        value, equals, name = (piece.strip() for piece in part.partition("="))
        if not (equals and name and re.fullmatch(r"\d+", value)):
            raise UserError(f"classes are named like 1=RV,2=MYO; got {text!r}")
        names[int(value)] = name
    return names


def one_of(what: str, value: str, known: Sequence[str]) -> str:
    """Return a value that must be among the known ones.

    Raises:
        UserError: If it is not.
    """
    if value not in known:
        raise UserError(f"unknown {what} {value!r}; choose {_nearest(value, known)}")
    return value


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return the names a mistyped one may have meant, else all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6) or known
    return close[0] if len(close) == 1 else f"{', '.join(close[:-1])} or {close[-1]}"
