"""Plans: what they refuse, how settings lie over each other, and the plans that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kaf_model.benchmark.cohort import Case, Cohort, patient_number
from kaf_model.benchmark.patients import choose_patients
from kaf_model.benchmark.plan import Plan, load_plan, plan_text, shipped_plans
from kaf_model.benchmark.runs import all_runs, row_recipe
from kaf_model.errors import UserError

PLAN: dict[str, Any] = {
    "name": "tiny",
    "data": {"layout": "pairs"},
    "protocol": {"test": "odd"},
    "columns": {"patients": [1]},
    "rows": [{"name": "UNet", "network": "unet"}],
}


def written(folder: Path, **changes: Any) -> str:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN, **changes}))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rwos": []}, r"rwos: Extra inputs are not permitted"),
        ({"rows": []}, "rows: "),
        ({"rows": [{"name": "A b"}, {"name": "a-B"}]}, "rows must have different names"),
        ({"rows": [{"name": "A", "recipes": ["b"]}]}, "uses recipe 'b', which the plan does not have"),
        ({"reference": "B"}, "reference must be one of the rows"),
        ({"columns": {}}, "columns need at least one"),
        ({"columns": {"patients": [0]}}, "each at least 1"),
        ({"protocol": {}}, "give one of them"),
        ({"protocol": {"test": "odd", "folds": 5}}, "give one of them"),
        ({"protocol": {"folds": 5, "pool": "even"}}, "`pool` goes with `test`"),
        ({"protocol": {"kind": "paper", "test": "odd"}}, "the paper's protocol needs folds: 5"),
        ({"protocol": {"kind": "paper", "folds": 5}, "columns": {"slices": [1]}}, "need the strict protocol"),
        ({"protocol": {"test": "odd", "draws": 0}}, "draws must be at least 1"),
        ({"protocol": {"test": "odd", "seeds": []}}, "seeds"),
        ({"budgets": {"finetune": {}}}, "a budget needs steps, epochs or seconds"),
        ({"data": {"layout": "dicom"}}, r"data\.layout"),
        ({"extends": "nothing"}, "only these can be extended: acdc-develop"),
    ],
)
def test_what_a_plan_refuses(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_plan(written(tmp_path, **changes))


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"there is no plan 'quikc'; give a file NAME\.yaml or one of .*quick"
    ):
        load_plan("quikc")
    with pytest.raises(UserError, match="cannot read the plan"):
        load_plan(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="must hold a plan"):
        load_plan(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match="is not YAML"):
        load_plan(str(tmp_path / "broken.yaml"))


def test_settings_lie_over_each_other(tmp_path: Path) -> None:
    plan = load_plan(
        written(
            tmp_path,
            settings={"finetune": {"learning_rate": 0.1, "batch_size": 3, "foreground": 0.5}},
            budgets={"finetune": {"seconds": 60}},
            recipes={"ours": {"finetune": {"batch_size": 4, "foreground": 0.6}}},
            rows=[
                {"name": "plain", "network": "unet"},
                {
                    "name": "ours",
                    "start": "pcl",
                    "recipes": ["ours"],
                    "settings": {"finetune": {"foreground": 0.7}, "pretrain": {"weight_local": 3}},
                    "budgets": {"finetune": {"steps": 5}},
                },
            ],
        )
    )
    plain, ours = (row_recipe(plan, row) for row in plan.rows)
    assert plain.model.architecture == "unet"
    assert (plain.finetune.learning_rate, plain.finetune.batch_size) == (0.1, 3)
    assert (plain.finetune.steps, plain.finetune.time_budget) == (None, 60)
    assert (ours.finetune.learning_rate, ours.finetune.batch_size, ours.finetune.foreground) == (0.1, 4, 0.7)
    assert (ours.finetune.steps, ours.finetune.time_budget) == (5, None)
    weights = ours.pretrain.weight_pcl, ours.pretrain.weight_global, ours.pretrain.weight_local
    assert weights == (1, 0, 0)  # that is what PCL means


def test_a_transformer_gets_a_width_that_suits_it(tmp_path: Path) -> None:
    rows = [
        {"name": "a", "network": "swin-unetr"},
        {"name": "b", "network": "swin-unetr", "settings": {"model": {"start_channels": 36}}},
    ]
    plan = load_plan(written(tmp_path, rows=rows))
    assert [row_recipe(plan, row).model.start_channels for row in plan.rows] == [24, 36]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"name": "A", "start": "magic"}, "row 'A': unknown start 'magic'; choose one of random, kaf, pcl"),
        ({"name": "A", "network": "vnet"}, "row 'A': unknown network 'vnet'; choose one of unet"),
        (
            {"name": "A", "settings": {"finetune": {"rate": 1}}},
            r"row 'A': there is no setting finetune\.rate",
        ),
        ({"name": "A", "settings": {"finetune": {"loss": "l1"}}}, r"row 'A': finetune\.loss"),
    ],
)
def test_rows_that_do_not_make_sense_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    plan = load_plan(written(tmp_path, rows=[row]))
    with pytest.raises(UserError, match=message):
        row_recipe(plan, plan.rows[0])


def test_a_plan_can_extend_a_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: quick\nname: mine\ncolumns: {patients: [3]}\n")
    mine, quick = load_plan(str(path)), load_plan("quick")
    assert mine.rows == quick.rows
    assert (mine.name, mine.columns.patients, mine.columns.slices) == ("mine", (3,), ())


CHD, ACDC = 68, 100


@pytest.mark.parametrize("name", shipped_plans())
def test_every_shipped_plan_can_be_done(name: str) -> None:
    plan = load_plan(name)
    assert plan.name == name
    assert plan_text(name).endswith("\n")
    count = {"imagechd": CHD, "phantom": 10}.get(plan.data.layout, 160 if "hippocampus" in name else ACDC)
    cases = [
        Case(f"patient{i:03d}", f"patient{i:03d}", Path(f"{i}"), Path(f"l{i}")) for i in range(1, count + 1)
    ]
    runs = all_runs(plan, Cohort(tuple(cases), {1: "one"}))
    assert {run.row for run in runs} == {row.name for row in plan.rows}
    assert len({run.folder for run in runs}) == len(runs)
    starts = {run.row: run.pretraining.start if run.pretraining else "random" for run in runs}
    recipes = {run.row: run.recipe.model_dump_json() + starts[run.row] for run in runs}
    assert len(set(recipes.values())) == len(plan.rows), "two rows are the same method"


def hearts_of_acdc() -> Cohort:
    """The forty patients with numbers 1 or 2 modulo 5, two frames each."""
    numbers = [number for number in range(1, 101) if number % 5 in (1, 2)]
    names = [f"patient{number:03d}" for number in numbers]
    cases = [Case(f"{name}_frame{f:02d}", name, Path(name), Path(name)) for name in names for f in (1, 12)]
    return Cohort(tuple(cases), {1: "right ventricle"})


def numbers_in(cases: tuple[Case, ...]) -> set[int]:
    return {patient_number(case.patient) for case in cases}


def test_the_report_on_acdc_learns_from_even_patients_and_tests_odd_ones() -> None:
    runs = all_runs(load_plan("acdc-report"), hearts_of_acdc())
    assert {run.column.kind for run in runs} == {"patients", "slices"}
    for run in runs:
        assert all(number % 2 for number in numbers_in(run.test))
        learnt = run.unlabelled + (run.pretraining.cases if run.pretraining else ())
        learnt += run.train if run.column.kind == "patients" else ()
        assert all(number % 2 == 0 for number in numbers_in(learnt))


def test_development_on_acdc_never_sees_an_odd_patient_nor_labels_of_the_published_test() -> None:
    plan = load_plan("acdc-develop")
    cohort = hearts_of_acdc()
    kept = cohort.restricted(choose_patients(plan.data.patients, cohort.patients))
    for run in all_runs(plan, kept):
        seen = run.train + run.test + run.unlabelled + (run.pretraining.cases if run.pretraining else ())
        assert all(number % 2 == 0 for number in numbers_in(seen))
        assert not numbers_in(run.train + run.test) & {6, 16, 26, 36, 46, 56, 66, 86}


@pytest.mark.parametrize("name", ["table-1-acdc", "table-2-acdc", "table-2-chd", "table-7-acdc"])
def test_the_tables_use_the_published_protocol(name: str) -> None:
    plan = load_plan(name)
    assert (plan.protocol.kind, plan.protocol.folds) == ("paper", 5)
    recipe = row_recipe(plan, plan.rows[0])
    assert (recipe.model.start_channels, recipe.finetune.loss) == (
        48 if "acdc" in name else 32,
        "cross-entropy",
    )


@pytest.mark.parametrize("name", [name for name in shipped_plans() if name.startswith("table-")])
def test_the_tables_score_what_the_network_says(name: str) -> None:
    plan = load_plan(name)
    for row in plan.rows:
        recipe = row_recipe(plan, row)
        segment = recipe.segment
        assert (segment.largest_component, segment.propagation, segment.orientation) == ("none", 0.0, "fixed")
        assert recipe.finetune.pseudo_labels.share == 0


def test_the_plan_is_written_and_read_back_the_same() -> None:
    for name in shipped_plans():
        plan = load_plan(name)
        assert Plan.model_validate(yaml.safe_load(yaml.safe_dump(plan.model_dump(mode="json")))) == plan
