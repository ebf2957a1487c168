"""The tree of settings that a command line chooses.

Settings come in layers, a later one over an earlier: preset, `--config` file, `--set`, explicit options.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from kaf_model.cli_options import one_of
from kaf_model.config import PRESETS, PresetName, Recipe, Settings
from kaf_model.errors import UserError

AnySettings = TypeVar("AnySettings", bound=Settings)

BUDGETS = ("steps", "epochs", "time_budget")


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
