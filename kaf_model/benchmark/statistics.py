"""Numbers of a report: means over repetitions, and paired tests between methods."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kaf_model.benchmark.records import CaseScore
from kaf_model.benchmark.scoring import pooled_dice

Pair = tuple[str, int, int, int]
"""What two methods must share to be compared: case, fold, draw and seed."""
DiceField = Literal["dice", "volume_dice"]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation; nan where there is none.

    Attributes:
        mean: Mean.
        std: Standard deviation; nan for one value.
        count: Values.
    """

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float], *, ddof: int = 1) -> Spread:
        """Of the values that are not nan; squares are divided by their number less `ddof`."""
        known = [value for value in values if not math.isnan(value)]
        if not known:
            return cls(math.nan, math.nan, 0)
        std = float(np.std(known, ddof=ddof)) if len(known) > 1 else math.nan
        return cls(float(np.mean(known)), std, len(known))


@dataclass(frozen=True)
class Comparison:
    """A method against another on the same volumes.

    Attributes:
        p_value: Of Wilcoxon's signed-rank test, two-sided; nan without pairs.
        difference: Mean of the differences in Dice; positive when the first is better.
        pairs: Volumes, counted once for each repetition.
    """

    p_value: float
    difference: float
    pairs: int


def dice_by_volume(scores: Sequence[CaseScore], field: DiceField = "dice") -> dict[str, float]:
    """Mean Dice over the classes of each volume; a class that is in neither label map does not count."""
    by_case: dict[str, list[float]] = {}
    for score in scores:
        by_case.setdefault(score.case, []).append(getattr(score, field))
    return {case: Spread.of(dice).mean for case, dice in by_case.items()}


def mean_dice(scores: Sequence[CaseScore], field: DiceField = "dice") -> float:
    """Mean over volumes of their mean Dice, the strict protocol's measure."""
    return Spread.of(dice_by_volume(scores, field).values()).mean


def trial_dice(scores: Sequence[CaseScore], protocol: str) -> float:
    """The Dice of one repetition: pooled over voxels by the paper's protocol, else per volume."""
    return pooled_dice(scores) if protocol == "paper" else mean_dice(scores)


def class_dice(scores: Sequence[CaseScore]) -> dict[str, float]:
    """Mean Dice over volumes of each class."""
    names = dict.fromkeys(score.name for score in scores)
    return {name: Spread.of(score.dice for score in scores if score.name == name).mean for name in names}


def compare_paired(first: Mapping[Pair, float], second: Mapping[Pair, float]) -> Comparison:
    """Test whether two methods differ on the volumes that both have scored, in the same repetition.

    Wilcoxon, "Individual comparisons by ranking methods", Biometrics Bulletin 1(6), 1945.
    """
    from scipy.stats import wilcoxon

    common = [pair for pair in first if pair in second]
    differences = np.array([first[pair] - second[pair] for pair in common])
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        return Comparison(math.nan, math.nan, 0)
    p_value = float(wilcoxon(differences).pvalue) if differences.any() else 1.0
    return Comparison(p_value, float(differences.mean()), len(differences))
