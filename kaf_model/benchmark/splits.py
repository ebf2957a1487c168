"""Who is tested, who is learnt from, and which slices: the same for all rows of a plan.

Nothing here knows of methods, so that no method can have a draw of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kaf_model.benchmark.cohort import Case, Cohort
from kaf_model.benchmark.patients import choose_patients
from kaf_model.benchmark.plan import ProtocolPlan, SlicesPlan
from kaf_model.errors import UserError

FOLD_SEED = 12345  # of the published folds
_DRAW, _VOLUME = 1, 2  # what a random generator is for


@dataclass(frozen=True)
class Split:
    """Patients of one part of a cohort.

    Attributes:
        fold: Its number; 0 where there is only one.
        test: Patients that are scored.
        pool: Patients whose labels may be learnt from.
        pretraining: Volumes that may be pretrained on.
    """

    fold: int
    test: tuple[str, ...]
    pool: tuple[str, ...]
    pretraining: tuple[Case, ...]


@dataclass(frozen=True)
class Trial:
    """One repetition of a cell of the table."""

    draw: int
    seed: int


def splits(cohort: Cohort, protocol: ProtocolPlan) -> list[Split]:
    """Divide a cohort as a protocol wants it.

    Raises:
        UserError: If a patient would be both tested and learnt from, or there are fewer patients than folds.
    """
    patients = cohort.patients
    if protocol.folds is None:
        assert protocol.test is not None
        test = choose_patients(protocol.test, patients)
        others = tuple(patient for patient in patients if patient not in test)
        pool = others if protocol.pool is None else choose_patients(protocol.pool, patients)
        both = [patient for patient in pool if patient in test]
        if both:
            raise UserError(f"{both[0]} is both in test {protocol.test!r} and in pool {protocol.pool!r}")
        if not pool:
            raise UserError(f"test {protocol.test!r} leaves no patient to learn from")
        return [Split(0, test, pool, cohort.images(without=test))]
    result = []
    for fold, test in enumerate(k_folds(patients, protocol.folds)):
        pool = tuple(patient for patient in patients if patient not in test)
        held_out = () if protocol.kind == "paper" else test
        result.append(Split(fold, test, pool, cohort.images(without=held_out)))
    return result


def k_folds(patients: Sequence[str], folds: int, seed: int = FOLD_SEED) -> list[tuple[str, ...]]:
    """The tested patients of each fold, as scikit-learn's `KFold(folds, shuffle=True, random_state=seed)`.

    Raises:
        UserError: If there are fewer patients than folds.
    """
    if len(patients) < folds:
        raise UserError(f"{folds} folds need at least as many patients, got {len(patients)}")
    order = np.arange(len(patients))
    np.random.RandomState(seed).shuffle(order)
    return [tuple(patients[i] for i in sorted(part)) for part in np.array_split(order, folds)]


def draw_patients(split: Split, draw: int, protocol: ProtocolPlan) -> tuple[str, ...]:
    """The pool in the order of a draw: its first M patients are labelled, so that draws of more hold those of fewer.

    Raises:
        UserError: If a draw that the plan names holds a patient who is not in the pool.
    """
    if isinstance(protocol.draws, int):
        order = np.random.default_rng((_DRAW, split.fold, draw)).permutation(len(split.pool))
        return tuple(split.pool[index] for index in order)
    named = [choose_patients(term, split.pool) for term in protocol.draws[draw]]
    return tuple(dict.fromkeys(itertools.chain.from_iterable(named)))


def draw_volumes(cohort: Cohort, split: Split, plan: SlicesPlan) -> tuple[Case, ...]:
    """The tested volumes of which slices are labelled: one a patient.

    Raises:
        UserError: If a volume that the plan names is not among the tested ones.
    """
    cases = cohort.labelled(split.test)
    if isinstance(plan.volumes, int):
        generator = np.random.default_rng((_VOLUME, split.fold))
        chosen = []
        for index in generator.permutation(len(split.test))[: plan.volumes]:
            own = [case for case in cases if case.patient == split.test[index]]
            chosen.append(own[generator.integers(len(own))])
        return tuple(chosen)
    by_name = {case.name: case for case in cases}
    missing = [name for name in plan.volumes if name not in by_name]
    if missing:
        raise UserError(f"k_slices names {missing[0]}, which is no labelled volume of a tested patient")
    return tuple(by_name[name] for name in plan.volumes)


def trials(draws: int, protocol: ProtocolPlan) -> list[Trial]:
    """The repetitions of a cell: draws with seeds."""
    seeds = protocol.seeds
    if protocol.combine == "all":
        return [Trial(draw, seed) for draw in range(draws) for seed in seeds]
    return [Trial(i % draws, seeds[i % len(seeds)]) for i in range(max(draws, len(seeds)))]


def evenly_spaced(count: int, among: Sequence[int]) -> tuple[int, ...]:
    """The middles of `count` equal parts of a row of slices.

    Raises:
        UserError: If there are not more slices than are to be labelled.
    """
    if count >= len(among):
        raise UserError(f"labelling {count} of {len(among)} slices leaves nothing to segment")
    return tuple(among[(2 * part + 1) * len(among) // (2 * count)] for part in range(count))


def slices_to_label(labels: NDArray[np.integer], count: int, plan: SlicesPlan) -> tuple[int, ...]:
    """The k slices of a volume (Z, Y, X) that are labelled.

    Raises:
        UserError: If the volume has too few, or none of them shows a structure.
    """
    shown = np.flatnonzero(labels.any(axis=(1, 2)))
    if not len(shown):
        raise UserError("nothing is labelled in the volume; choose another")
    first, last = (int(shown[0]), int(shown[-1])) if plan.span == "structures" else (0, len(labels) - 1)
    chosen = evenly_spaced(count, range(first, last + 1))
    if not labels[list(chosen)].any():
        raise UserError(f"slices {chosen} show no structure; use span: structures")
    return chosen
