"""The tree of settings that a command line chooses.

Settings come in layers, a later one over an earlier: preset, `--config` file, `--set`, explicit options.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import yaml

from kaf_model.cli_options import one_of
from kaf_model.config import KAF_FIELDS, ModelConfig, Recipe, Settings
from kaf_model.errors import UserError
from kaf_model.presets import PRESETS, PresetName
from kaf_model.settings_layers import layered_recipe

SECTIONS = tuple(Recipe.model_fields)


@dataclass(frozen=True)
class ChosenSettings:
    """A tree of settings, and what in it somebody asked for.

    Attributes:
        preset: What they were laid over.
        recipe: The settings.
        layers: What was given beside the preset, section -> field -> value each; a later one counts more.
        gpu: Whether an NVIDIA GPU trains, for which a preset may say something else.
    """

    preset: PresetName
    recipe: Recipe
    layers: Sequence[Mapping[str, Any]]
    gpu: bool = False

    def on_a_gpu(self) -> ChosenSettings:
        """The same where an NVIDIA GPU trains."""
        return replace(self, recipe=layered_recipe(self.preset, self.layers, gpu=True), gpu=True)

    def asked_for(self, section: str) -> dict[str, Any]:
        """The validated values of the fields of a section that were asked for."""
        settings = getattr(self.recipe, section)
        names = dict.fromkeys(name for layer in self.layers for name in layer.get(section, {}))
        return {name: getattr(settings, name) for name in names}

    def fresh_model(self) -> ModelConfig:
        """The architecture of a finetuning from random weights, see `ModelConfig.fresh`.

        Who asks for anything that only KAF layers have gets that.
        """
        asked = self.asked_for("model")
        if asked.keys() & KAF_FIELDS:
            return self.recipe.model
        return ModelConfig.fresh(self.preset, gpu=self.gpu, **asked)


def choose_settings(
    preset: str | None = None,
    config: Path | None = None,
    assignments: Sequence[str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    reads: Sequence[str] = SECTIONS,
) -> ChosenSettings:
    """Lay the settings of a command line over those of a preset.

    Args:
        preset: Name of a preset; None is "small".
        config: YAML file with sections of fields.
        assignments: "section.field=value" each.
        options: Values of explicit options by section and field; None means the option was not given.
        reads: Sections that the command reads. A file may hold others, for other commands; an assignment may not.

    Raises:
        UserError: On an unknown preset, key or value, or an assignment that would change nothing, naming it.
    """
    name = preset_name(preset)
    layers: list[dict[str, Any]] = []
    if config is not None:
        layers.append(_read_config(config))
    layers.append(_assigned(assignments or (), reads))
    layers.append(
        {
            section: {field: value for field, value in fields.items() if value is not None}
            for section, fields in (options or {}).items()
        }
    )
    return ChosenSettings(name, layered_recipe(name, layers), layers)


def preset_name(name: str | None) -> PresetName:
    """Return a preset's name, "small" for None.

    Raises:
        UserError: If there is no such preset.
    """
    chosen = one_of("preset", "small" if name is None else name, PRESETS)
    return next(preset for preset in get_args(PresetName) if preset == chosen)


def settings_yaml(recipe: Recipe) -> str:
    """Return every setting with its description, as YAML that `--config` reads."""
    return "\n".join([_KEEP_FEW, "", *_yaml_lines(recipe, 0)]) + "\n"


_KEEP_FEW = "# Keep only the lines that you change: whatever --config is given counts as asked for."


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


def _assigned(assignments: Sequence[str], reads: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for text in assignments:
        path, equals, written = text.partition("=")
        names = path.strip().split(".")
        if not equals or len(names) < 2 or not all(names):
            raise UserError(f"--set wants SECTION.FIELD=VALUE, e.g. finetune.steps=500; got {text!r}")
        if names[0] in SECTIONS and names[0] not in reads:
            raise UserError(f"--set {text} would change nothing: this command reads {', '.join(reads)}")
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
