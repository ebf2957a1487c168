"""Which patients a text means: `even except 6,16`, `1-80`, `first 80`, `patient007,patient012`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kaf_model.benchmark.cohort import patient_number
from kaf_model.errors import UserError

HELP = "all, even, odd, 1-80, first 80, last 80, names or numbers with commas, and 'A except B'"


def choose_patients(text: str, patients: Sequence[str]) -> tuple[str, ...]:
    """Choose patients by a text.

    `even` and `odd` go by the number in a patient's name, and so do `7` and `1-80`; `first 80` and `last 80`
    go by place. Terms are joined by commas; what follows `except` is taken away.

    Args:
        text: Which ones.
        patients: All, in order.

    Returns:
        Those meant, in the order of `patients`.

    Raises:
        UserError: If a term means nobody, or nobody is left.
    """
    wanted, _, unwanted = text.partition(" except ")
    kept = _meant(wanted, patients) - (_meant(unwanted, patients) if unwanted else set())
    if not kept:
        raise UserError(f"no patient is left of {text!r}")
    return tuple(patient for patient in patients if patient in kept)


def _meant(text: str, patients: Sequence[str]) -> set[str]:
    meant: set[str] = set()
    for term in text.split(","):
        found = _term(term.strip(), patients)
        if not found:
            raise UserError(
                f"no patient is meant by {term.strip()!r}; choose by {HELP}. There are {len(patients)}: "
                f"{', '.join(patients[:4])} ..."
            )
        meant |= found
    return meant


def _term(term: str, patients: Sequence[str]) -> set[str]:
    if term in patients:
        return {term}
    if term == "all":
        return set(patients)
    if term in ("even", "odd"):
        return {patient for patient in patients if patient_number(patient) % 2 == (term == "odd")}
    place = re.fullmatch(r"(first|last) (\d+)", term)
    if place:
        count = min(int(place[2]), len(patients))
        return set(patients[:count] if place[1] == "first" else patients[len(patients) - count :])
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", term)
    if numbers:
        span = range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1)
        return {patient for patient in patients if patient_number(patient) in span}
    return set()
