"""The keys of the plugin, in one place: bound in the viewer, shown in tooltips and in the list of keys."""

from __future__ import annotations

KEYS = {
    "complete": ("Shift-C", "Mark the slice complete"),
    "empty": ("Shift-E", "Mark the slice verified empty"),
    "untouched": ("Shift-U", "Mark the slice untouched"),
    "partial": ("Shift-P", "Mark the slice partial"),
    "next": ("Shift-N", "Go to the next labelled slice"),
    "previous": ("Shift-B", "Go to the previous labelled slice"),
    "propagate": ("Shift-G", "Propagate finished slices to the others"),
    "finetune": ("Shift-F", "Start finetuning, or cancel it"),
    "accept": ("Shift-A", "Accept the result on this slice"),
    "accept_all": ("Shift-Alt-A", "Accept the result on all slices, wherever you have not painted"),
    "reject": ("Shift-R", "Reject the result"),
    "panel": ("Shift-T", "Go into the panel; Tab and Shift+Tab move there, Escape goes back"),
}


def with_key(action: str, text: str = "") -> str:
    """A tooltip that names the key of an action."""
    key, what = KEYS[action]
    return f"{text or what} ({key.replace('-', '+')})"


def key_list() -> str:
    """All keys as lines of HTML."""
    rows = "".join(
        f"<tr><td><b>{key.replace('-', '+')}</b></td><td>&nbsp; {what}</td></tr>"
        for key, what in KEYS.values()
    )
    return f"<table>{rows}</table>"
