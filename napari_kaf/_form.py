"""From the engine's settings to form rows: tooltips and limits come from the fields themselves."""

from __future__ import annotations

from collections.abc import Mapping

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel
from qtpy.QtWidgets import QCheckBox, QComboBox, QDoubleSpinBox, QSpinBox


def tip(settings: type[BaseModel], name: str) -> str:
    """What a setting does, in its own words."""
    return settings.model_fields[name].description or ""


def check_box(settings: type[BaseModel], name: str, text: str) -> QCheckBox:
    """A box for a setting that is on or off."""
    box = QCheckBox(text)
    box.setToolTip(tip(settings, name))
    box.setChecked(bool(settings.model_fields[name].default))
    return box


def choice_box(settings: type[BaseModel], name: str, words: Mapping[str, str]) -> QComboBox:
    """A box for a setting with a few named values.

    Args:
        settings: The settings.
        name: The field.
        words: What each of its values is called; the value is the item's data.
    """
    box = QComboBox()
    box.setToolTip(tip(settings, name))
    for value, text in words.items():
        box.addItem(text, value)
    box.setCurrentIndex(box.findData(settings.model_fields[name].default))
    return box


def spin_box(settings: type[BaseModel], name: str, *, highest: int = 10_000_000) -> QSpinBox:
    """A box for a whole number, within the limits of its field."""
    box = QSpinBox()
    box.setToolTip(tip(settings, name))
    lowest = 0
    for limit in settings.model_fields[name].metadata:
        if isinstance(limit, Gt):
            lowest = int(str(limit.gt)) + 1
        elif isinstance(limit, Ge):
            lowest = int(str(limit.ge))
        elif isinstance(limit, Le):
            highest = int(str(limit.le))
    box.setRange(lowest, highest)
    box.setValue(int(settings.model_fields[name].default))
    return box


def number_box(
    settings: type[BaseModel], name: str, *, lowest: float, highest: float, decimals: int
) -> QDoubleSpinBox:
    """A box for a number; a step is one of its last digit."""
    box = QDoubleSpinBox()
    box.setToolTip(tip(settings, name))
    box.setDecimals(decimals)
    box.setSingleStep(10**-decimals)
    box.setRange(lowest, highest)
    box.setValue(float(settings.model_fields[name].default))
    return box
