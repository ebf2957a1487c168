"""Settings in layers: a later one over an earlier, on top of a preset's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from kaf_model.config import Recipe, Settings
from kaf_model.errors import UserError
from kaf_model.presets import PresetName

AnySettings = TypeVar("AnySettings", bound=Settings)

BUDGETS = ("steps", "epochs", "time_budget")


def layered_recipe(preset: PresetName, layers: Sequence[Mapping[str, Any]], *, gpu: bool = False) -> Recipe:
    """Lay settings over those of a preset.

    A layer that gives a training budget (steps, epochs or time) replaces all budgets of the layers below,
    so that asking for ten minutes is not cut short by a preset's number of steps.

    Args:
        preset: Name of a preset.
        layers: Section -> field -> value each; a later one counts more.
        gpu: Whether an NVIDIA GPU trains, for which a preset may say something else.

    Raises:
        UserError: On an unknown key or a value that does not fit, naming it.
    """
    tree = Recipe.preset(preset, gpu=gpu).model_dump()
    for layer in layers:
        _check_keys(layer, Recipe)
        for section, fields in layer.items():
            if any(fields.get(field) is not None for field in BUDGETS):
                tree[section] |= {field: None for field in BUDGETS if field in tree[section]}
        merge_settings(tree, layer)
    return validated(Recipe, tree)


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


def merge_settings(tree: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Write the values of a layer over those of a tree, in place."""
    for name, value in layer.items():
        if isinstance(value, Mapping) and isinstance(tree.get(name, {}), dict):
            merge_settings(tree.setdefault(name, {}), value)
        else:
            tree[name] = value
