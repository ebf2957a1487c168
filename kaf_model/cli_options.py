"""What a command line says, as values: durations, slices, class names, and the tree of settings.

Settings come in layers, a later one over an earlier: preset, `--config` file, `--set`, explicit options.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer
import yaml
from pydantic import ValidationError

from kaf_model.config import PRESETS, PresetName, Recipe, Settings
from kaf_model.errors import UserError

AnySettings = TypeVar("AnySettings", bound=Settings)

BUDGETS = ("steps", "epochs", "time_budget")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


# --- options that several commands share -------------------------------------------------------------------

_TRAINING, _SETTINGS, _READING, _RUNNING = "Training", "Settings", "Reading volumes", "Running"

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
        metavar="kaf-unet|unet|unet-c2",
        help="Architecture; the plain unet ignores keypoints.",
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
        slices += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not slices:
        raise UserError(f"a range of slices runs upwards, like 3-5; got {text!r}")
    return name, slices


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


# --- settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChosenSettings:
    """A tree of settings, and what in it somebody asked for.

    Attributes:
        recipe: The settings.
        explicit: Values given beside the preset: section -> field -> value.
    """

    recipe: Recipe
    explicit: Mapping[str, Mapping[str, Any]]

    def asked_for(self, section: str) -> dict[str, Any]:
        """The validated values of the fields of a section that were asked for."""
        settings = getattr(self.recipe, section)
        return {name: getattr(settings, name) for name in self.explicit.get(section, {})}


def choose_settings(
    preset: str | None = None,
    config: Path | None = None,
    assignments: Sequence[str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> ChosenSettings:
    """Lay the settings of a command line over those of a preset.

    A layer that gives a training budget (steps, epochs or time) replaces all budgets of the layers below,
    so that asking for ten minutes is not cut short by a preset's number of steps.

    Args:
        preset: Name of a preset; None is "small".
        config: YAML file with sections of fields.
        assignments: "section.field=value" each.
        options: Values of explicit options by section and field; None means the option was not given.

    Raises:
        UserError: On an unknown preset, key or value, naming it.
    """
    name = preset_name(preset)
    layers: list[dict[str, Any]] = []
    if config is not None:
        layers.append(_read_config(config))
    layers.append(_assigned(assignments or ()))
    layers.append(
        {
            section: {field: value for field, value in fields.items() if value is not None}
            for section, fields in (options or {}).items()
        }
    )
    tree = Recipe.preset(name).model_dump()
    explicit: dict[str, Any] = {}
    for layer in layers:
        _check_keys(layer, Recipe)
        for section, fields in layer.items():
            given = {field for field in BUDGETS if fields.get(field) is not None}
            if given:
                tree[section] |= {field: None for field in BUDGETS if field in tree[section]}
        _merge(tree, layer)
        _merge(explicit, layer)
    return ChosenSettings(validated(Recipe, tree), explicit)


def preset_name(name: str | None) -> PresetName:
    """Return a preset's name, "small" for None.

    Raises:
        UserError: If there is no such preset.
    """
    chosen = one_of("preset", "small" if name is None else name, PRESETS)
    return next(preset for preset in get_args(PresetName) if preset == chosen)


def validated(kind: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """Make settings from values.

    Raises:
        UserError: In one line, naming the settings that do not fit.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(validation_text(error)) from error


def validation_text(error: ValidationError) -> str:
    """Say in one line which settings do not fit and why."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        reason = item["msg"].removeprefix("Value error, ")
        value = item["input"]
        got = f", got {value!r}" if not isinstance(value, Mapping) and "got" not in reason else ""
        lines.append(f"{where}: {reason}{got}" if where else f"{reason}{got}")
    return "; ".join(dict.fromkeys(lines))


def settings_yaml(recipe: Recipe) -> str:
    """Return every setting with its description, as YAML that `--config` reads."""
    return "\n".join(_yaml_lines(recipe, 0)) + "\n"


def _yaml_lines(settings: Settings, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if depth == 0 and name != next(iter(type(settings).model_fields)):
            yield ""
        yield f"{indent}# {field.description}"
        if isinstance(value, Settings):
            yield f"{indent}{name}:"
            yield from _yaml_lines(value, depth + 1)
        else:
            plain = list(value) if isinstance(value, tuple) else value
            yield f"{indent}{name}: {yaml.safe_dump(plain, default_flow_style=True).splitlines()[0]}"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the settings {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections of settings, as kaf settings prints them")
    return content


def _assigned(assignments: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for text in assignments:
        path, equals, written = text.partition("=")
        names = path.strip().split(".")
        if not equals or len(names) < 2 or not all(names):
            raise UserError(f"--set wants SECTION.FIELD=VALUE, e.g. finetune.steps=500; got {text!r}")
        node = tree
        for name in names[:-1]:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise UserError(f"--set {path}: {name} was already given a value")
        node[names[-1]] = _written_value(written.strip(), text)
    return tree


def _written_value(written: str, text: str) -> Any:
    if written.lower() in {"none", "null", ""}:
        return None
    if "," in written and written[0] not in "[({":
        written = f"[{written}]"
    try:
        return yaml.safe_load(written.replace("(", "[").replace(")", "]"))
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value cannot be read") from error


def _check_keys(layer: Any, kind: type[Settings], path: str = "") -> None:
    """Check that a layer holds only known names, down to its leaves."""
    if not isinstance(layer, Mapping):
        raise UserError(f"{path or 'the settings'} holds settings of its own, not the value {layer!r}")
    for name, value in layer.items():
        where = f"{path}.{name}" if path else str(name)
        if name not in kind.model_fields:
            what = "setting" if path else "section"
            known = kind.model_fields
            raise UserError(f"there is no {what} {where}; {_did_you_mean(str(name), known, path)}")
        inner = kind.model_fields[name].annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            _check_keys(value, inner, where)


def _did_you_mean(name: str, known: Iterable[str], path: str) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    listed = ", ".join(f"{path}.{one}" if path else one for one in close or known)
    return f"nearest: {listed}" if close else f"there are: {listed}"


def _merge(tree: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for name, value in layer.items():
        if isinstance(value, Mapping) and isinstance(tree.get(name, {}), dict):
            _merge(tree.setdefault(name, {}), value)
        else:
            tree[name] = value
