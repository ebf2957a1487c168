"""The laws of splits: nobody on both sides, the same draws for all, report patients never chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaf_model.benchmark.cohort import Case, Cohort
from kaf_model.benchmark.patients import choose_patients
from kaf_model.benchmark.plan import Plan, ProtocolPlan, SlicesPlan
from kaf_model.benchmark.runs import all_runs
from kaf_model.benchmark.splits import (
    draw_patients,
    draw_volumes,
    evenly_spaced,
    k_folds,
    slices_to_label,
    splits,
    trials,
)
from kaf_model.errors import UserError


def cohort_of(count: int, frames: int = 2) -> Cohort:
    cases = [
        Case(
            f"p{number:03d}_frame{frame}",
            f"p{number:03d}",
            Path(f"i{number}-{frame}"),
            Path(f"l{number}-{frame}"),
        )
        for number in range(1, count + 1)
        for frame in range(frames)
    ]
    return Cohort((*cases, Case("unlabelled", "unlabelled", Path("u"), None)), {1: "left ventricle"})


PATIENTS = tuple(f"p{number:03d}" for number in range(1, 13))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("all", range(1, 13)),
        ("even", range(2, 13, 2)),
        ("odd", range(1, 13, 2)),
        ("3-5", [3, 4, 5]),
        ("first 2", [1, 2]),
        ("last 3", [10, 11, 12]),
        ("p007, 2", [2, 7]),
        ("even except 2,4-6", [8, 10, 12]),
        ("first 99", range(1, 13)),
    ],
)
def test_patients_by_text(text: str, numbers: list[int]) -> None:
    assert choose_patients(text, PATIENTS) == tuple(f"p{number:03d}" for number in numbers)


@pytest.mark.parametrize("text", ["", "20-30", "anna", "even except 99", "1,,2", "5-3"])
def test_a_term_that_means_nobody_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="no patient is meant by"):
        choose_patients(text, PATIENTS)


def test_nobody_left_is_refused() -> None:
    with pytest.raises(UserError, match="no patient is left"):
        choose_patients("even except all", PATIENTS)


def test_folds_are_those_of_scikit_learn() -> None:
    # KFold(5, shuffle=True, random_state=12345) of scikit-learn 1.x, patients counted from 1.
    assert k_folds(range(1, 13), 5) == [(1, 4, 9), (8, 11, 12), (7, 10), (2, 5), (3, 6)]  # type: ignore[arg-type]
    first = k_folds(range(1, 101), 5)[0]  # type: ignore[arg-type]
    assert first == (5, 10, 14, 21, 26, 29, 34, 36, 41, 43, 50, 52, 61, 64, 66, 70, 76, 79, 87, 89)
    with pytest.raises(UserError, match="5 folds need at least as many patients, got 4"):
        k_folds(PATIENTS[:4], 5)


PROTOCOLS = st.one_of(
    st.builds(
        ProtocolPlan,
        test=st.sampled_from(["odd", "first 3", "p004"]),
        draws=st.integers(1, 3),
    ),
    st.builds(
        ProtocolPlan,
        kind=st.sampled_from(["strict", "paper"]),
        folds=st.integers(2, 5),
        draws=st.integers(1, 3),
    ),
)


@settings(deadline=None, derandomize=True)
@given(count=st.integers(5, 14), protocol=PROTOCOLS)
def test_no_patient_is_on_both_sides(count: int, protocol: ProtocolPlan) -> None:
    cohort = cohort_of(count)
    for split in splits(cohort, protocol):
        assert split.test
        assert split.pool
        assert not set(split.test) & set(split.pool)
        seen = {case.patient for case in split.pretraining}
        if protocol.kind == "strict":
            assert not seen & set(split.test)
        else:
            assert seen > set(cohort.patients)
        for draw in range(protocol.num_draws):
            assert set(draw_patients(split, draw, protocol)) == set(split.pool)


@settings(deadline=None, derandomize=True)
@given(count=st.integers(5, 14), folds=st.integers(2, 5))
def test_every_patient_is_tested_once(count: int, folds: int) -> None:
    cohort = cohort_of(count)
    tested = [patient for split in splits(cohort, ProtocolPlan(folds=folds)) for patient in split.test]
    assert sorted(tested) == list(cohort.patients)


def test_a_patient_in_test_and_pool_is_refused() -> None:
    with pytest.raises(UserError, match="p001 is both in test 'odd' and in pool '1-3'"):
        splits(cohort_of(6), ProtocolPlan(test="odd", pool="1-3"))


def plan(**changes: object) -> Plan:
    content = {
        "name": "laws",
        "data": {"layout": "pairs"},
        "protocol": {"test": "odd", "pool": "even except 12", "draws": 3, "seeds": [0, 1, 2]},
        "columns": {"patients": [1, 2], "slices": [1, 3]},
        "k_slices": {"volumes": 4},
        "rows": [
            {"name": "UNet", "network": "unet"},
            {"name": "PCL", "network": "unet", "start": "pcl"},
            {"name": "KAF", "start": "kaf"},
            {"name": "KAF + recipe", "start": "kaf", "recipes": ["cleaned"]},
        ],
        "recipes": {"cleaned": {"segment": {"largest_component": "all"}}},
    }
    return Plan.model_validate({**content, **changes})


def test_all_rows_get_the_same_draws() -> None:
    by_row: dict[str, list[object]] = {}
    for run in all_runs(plan(), cohort_of(12)):
        key = (run.column, run.fold, run.draw, run.seed, run.train, run.test)
        by_row.setdefault(run.row, []).append(key)
    first, *others = by_row.values()
    assert len(by_row) == 4
    assert len(first) == 2 * 3 + 2 * 4
    assert all(other == first for other in others)


def test_report_patients_are_scored_and_nothing_else() -> None:
    for run in all_runs(plan(), cohort_of(12)):
        tested = {case.patient for case in run.test}
        assert all(int(patient[1:]) % 2 for patient in tested)
        if run.column.kind == "patients":
            assert not tested & {case.patient for case in run.train}
            assert all(int(case.patient[1:]) % 2 == 0 and case.patient != "p012" for case in run.train)
        else:
            assert run.train == run.test  # the rest of the volume whose slices are labelled
        assert not any(int(case.patient[1:]) % 2 for case in run.unlabelled if case.labels)
        assert not set(run.unlabelled) & {*run.train, *run.test}
        if run.pretraining is not None:
            assert not any(int(case.patient[1:]) % 2 for case in run.pretraining.cases if case.labels)


def test_only_recipes_with_pseudo_labels_look_at_unlabelled_volumes() -> None:
    recipes = {"plain": {"finetune": {"pseudo_labels": {"share": 0}}}}
    rows = [{"name": "plain", "recipes": ["plain"]}, {"name": "recipe"}]
    for unlabelled in ("own", "all"):
        changed = plan(recipes=recipes, rows=rows, k_slices={"volumes": 1, "unlabelled": unlabelled})
        for run in all_runs(changed, cohort_of(12)):
            uses = run.row == "recipe" and (run.column.kind == "patients" or unlabelled == "all")
            assert bool(run.unlabelled) == uses
            if uses:
                learnt = run.train if run.column.kind == "patients" else ()
                assert len(run.unlabelled) == 6 * 2 + 1 - len(learnt)


def test_draws_of_more_patients_hold_those_of_fewer_and_differ_from_each_other() -> None:
    runs = [
        run for run in all_runs(plan(), cohort_of(12)) if run.row == "UNet" and run.column.kind == "patients"
    ]
    by_draw = {(run.draw, run.column.count): {case.patient for case in run.train} for run in runs}
    assert all(by_draw[draw, 1] < by_draw[draw, 2] for draw in range(3))
    assert all(len(by_draw[draw, 2]) == 2 for draw in range(3))
    assert len({frozenset(by_draw[draw, 2]) for draw in range(3)}) > 1


def test_pretraining_is_shared_where_it_may_be() -> None:
    runs = all_runs(plan(), cohort_of(12))
    folders = {(run.row, run.seed): run.pretraining.folder for run in runs if run.pretraining}
    assert folders["KAF", 0] == folders["KAF + recipe", 0]
    assert folders["KAF", 0] != folders["KAF", 1]
    assert folders["KAF", 0] != folders["PCL", 0]
    shared = all_runs(plan(pretraining_seed=7), cohort_of(12))
    assert len({run.pretraining.folder for run in shared if run.pretraining}) == 2
    folds = all_runs(plan(protocol={"folds": 2}, columns={"patients": [1]}), cohort_of(12))
    kaf = {run.fold: run.pretraining.folder for run in folds if run.pretraining and run.row == "KAF"}
    assert kaf[0] != kaf[1]  # the one fold's pretraining has seen who is tested in the other


def test_the_paper_shares_one_pretraining_over_all_folds() -> None:
    runs = all_runs(plan(protocol={"kind": "paper", "folds": 5}, columns={"patients": [2]}), cohort_of(12))
    assert len({run.pretraining.folder for run in runs if run.pretraining and run.row == "KAF"}) == 1


def test_named_draws_and_volumes() -> None:
    named = plan(
        protocol={"test": "odd", "draws": [[4, 2], ["p006", "p008"]]},
        k_slices={"volumes": ["p003_frame1"]},
    )
    runs = [run for run in all_runs(named, cohort_of(12)) if run.row == "UNet"]
    labelled = {(str(run.column), run.draw): [case.name for case in run.train] for run in runs}
    assert labelled["M = 1", 0] == ["p004_frame0", "p004_frame1"]
    assert {name[:4] for name in labelled["M = 2", 1]} == {"p006", "p008"}
    assert labelled["k = 3", 0] == ["p003_frame1"]
    with pytest.raises(UserError, match="no patient is meant by 'p003'"):
        all_runs(plan(protocol={"test": "odd", "draws": [["p003", "p004"]]}), cohort_of(12))
    with pytest.raises(UserError, match="no labelled volume of a tested patient"):
        all_runs(plan(k_slices={"volumes": ["p002_frame0"]}), cohort_of(12))


def test_more_patients_than_the_pool_are_refused() -> None:
    with pytest.raises(UserError, match="M = 9 patients are to be labelled, but draw 0 has 5"):
        all_runs(plan(columns={"patients": [9]}), cohort_of(12))


def test_drawn_volumes_are_of_different_tested_patients() -> None:
    cohort = cohort_of(12)
    (split,) = splits(cohort, ProtocolPlan(test="odd"))
    volumes = draw_volumes(cohort, split, SlicesPlan(volumes=4))
    assert len({case.patient for case in volumes}) == 4
    assert {case.patient for case in volumes} < set(split.test)
    assert len(draw_volumes(cohort, split, SlicesPlan(volumes=99))) == len(split.test)


def test_trials() -> None:
    zipped = trials(2, ProtocolPlan(test="odd", draws=2, seeds=(5, 6, 7)))
    assert [(trial.draw, trial.seed) for trial in zipped] == [(0, 5), (1, 6), (0, 7)]
    crossed = trials(2, ProtocolPlan(test="odd", draws=2, seeds=(5, 6), combine="all"))
    assert [(trial.draw, trial.seed) for trial in crossed] == [(0, 5), (0, 6), (1, 5), (1, 6)]


@pytest.mark.parametrize(
    ("count", "slices", "expected"),
    [(1, 9, (4,)), (3, 9, (1, 4, 7)), (5, 9, (0, 2, 4, 6, 8)), (2, 10, (2, 7)), (1, 2, (1,))],
)
def test_slices_are_spaced_evenly(count: int, slices: int, expected: tuple[int, ...]) -> None:
    assert evenly_spaced(count, range(slices)) == expected


def test_slices_to_label() -> None:
    labels = np.zeros((9, 4, 6), np.uint8)
    labels[2:7, 1:3, 2:4] = 1
    assert slices_to_label(labels, 3, SlicesPlan()) == (1, 4, 7)
    assert slices_to_label(labels, 3, SlicesPlan(span="structures")) == (2, 4, 6)
    with pytest.raises(UserError, match="leaves nothing to segment"):
        slices_to_label(labels, 5, SlicesPlan(span="structures"))
    labels[3:7] = 0
    with pytest.raises(UserError, match="show no structure"):
        slices_to_label(labels, 1, SlicesPlan())
    with pytest.raises(UserError, match="nothing is labelled"):
        slices_to_label(np.zeros_like(labels), 1, SlicesPlan())
