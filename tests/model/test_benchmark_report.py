"""The numbers of a report, against numbers worked out by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kaf_model.benchmark.cohort import Case
from kaf_model.benchmark.plan import Plan
from kaf_model.benchmark.records import CaseScore, RunFolder, RunResult
from kaf_model.benchmark.report import write_report
from kaf_model.benchmark.results import possible_repetitions, read_results
from kaf_model.benchmark.runs import Column
from kaf_model.benchmark.scoring import compare, pooled_dice
from kaf_model.benchmark.statistics import Spread, compare_paired, mean_dice
from kaf_model.errors import UserError
from kaf_model.labels import LabelledVolume, SliceStatus
from kaf_model.volume import Volume

CASE = Case("heart_1", "heart", Path("i"), Path("l"))
CLASSES = {1: "left ventricle", 2: "myocardium"}


def score(case: str, dice: float, *, value: int = 1, voxels: int = 10) -> CaseScore:
    whole = (1 + dice) / 2
    return CaseScore(case, case, value, CLASSES[value], dice, whole, math.nan, 1.0, 2.0, voxels)


def truth(labels: np.ndarray, labelled: tuple[int, ...] = ()) -> LabelledVolume:
    volume = Volume.from_array(np.zeros(labels.shape, np.int16), spacing=(8.0, 1.0, 1.0))
    return LabelledVolume(volume, labels, dict.fromkeys(labelled, SliceStatus.COMPLETE))


def test_dice_of_a_volume() -> None:
    reference, predicted = np.zeros((2, 2, 4, 6), np.uint8)
    reference[0, 0, :4] = 1
    predicted[0, 0, 2:6] = 1
    one, two = compare(CASE, predicted, truth(reference), CLASSES)
    assert (one.dice, one.voxels, one.reference_ml) == (0.5, 8, pytest.approx(4 * 8 / 1000))
    assert math.isnan(two.dice)
    assert two.voxels == 0


def test_labelled_slices_do_not_count_for_dice_but_for_the_volume() -> None:
    reference, predicted = np.zeros((2, 3, 4, 6), np.uint8)
    reference[:, 0, :4] = 1
    predicted[0] = 2  # the slice that was labelled is not looked at
    predicted[1, 0, :4] = 1
    predicted[2, 0, 3:5] = 1
    one, two = compare(CASE, predicted, truth(reference, (0,)), CLASSES, without_labelled=True)
    assert one.dice == pytest.approx(2 * (4 + 1) / (4 + 4 + 4 + 2))
    assert one.voxels == 14
    assert one.volume_dice == pytest.approx(2 * (4 + 4 + 1) / (12 + 4 + 4 + 2))
    assert one.prediction_ml == pytest.approx((4 + 4 + 2) * 8 / 1000)
    assert one.reference_ml == pytest.approx(12 * 8 / 1000)
    assert math.isnan(two.dice)
    whole, _ = compare(CASE, predicted, truth(reference, (0,)), CLASSES)
    assert whole.dice == whole.volume_dice == pytest.approx(2 * (4 + 1) / (12 + 6))


def test_dice_pooled_over_voxels() -> None:
    # One volume with 2 of 4 and 4 voxels in common, one with 2 true voxels of which none is found.
    scores = [score("a", 0.5, voxels=8), score("b", 0.0, voxels=2)]
    assert pooled_dice(scores) == pytest.approx(2 * 2 / (4 + 4 + 2 + 0))
    absent = score("c", math.nan, value=2, voxels=0)
    assert pooled_dice([*scores, absent]) == pytest.approx(0.4)
    other = score("a", 0.8, value=2, voxels=5)
    assert pooled_dice([*scores, other]) == pytest.approx((0.4 + 0.8) / 2)
    assert math.isnan(pooled_dice([absent]))


def test_dice_per_volume() -> None:
    scores = [score("a", 0.4), score("a", 0.6, value=2), score("b", 0.9), score("b", math.nan, value=2)]
    assert mean_dice(scores) == pytest.approx((0.5 + 0.9) / 2)


def test_spread() -> None:
    assert Spread.of([0.7, math.nan, 0.9]) == Spread(pytest.approx(0.8), pytest.approx(math.sqrt(0.02)), 2)
    assert Spread.of([0.7]).count == 1
    assert math.isnan(Spread.of([0.7]).std)
    assert math.isnan(Spread.of([]).mean)


def paired(values: list[float]) -> dict[tuple[str, int, int, int], float]:
    return {(f"case{i}", 0, 0, 0): value for i, value in enumerate(values)}


def test_wilcoxon_by_hand() -> None:
    low = [0.1, 0.2, 0.3, 0.4, 0.5]
    all_better = compare_paired(paired([0.2, 0.4, 0.6, 0.8, 1.0]), paired(low))
    assert all_better.p_value == pytest.approx(2 / 2**5)  # 1 of 32 signs, two sides
    assert all_better.difference == pytest.approx(0.3)
    one_worse = compare_paired(paired([0.0, 0.4, 0.6, 0.8, 1.0]), paired(low))
    assert one_worse.p_value == pytest.approx(2 * 2 / 2**5)  # rank sums 0 and 1
    assert compare_paired(paired(low), paired(low)).p_value == 1.0
    assert compare_paired({}, paired(low)).pairs == 0
    assert math.isnan(compare_paired({}, paired(low)).p_value)


def test_only_what_both_have_is_paired() -> None:
    first = {("a", 0, 0, 0): 0.9, ("a", 0, 1, 0): 0.8, ("b", 0, 0, 0): 0.7, ("c", 0, 0, 0): math.nan}
    second = {("a", 0, 0, 0): 0.5, ("a", 0, 0, 1): 0.1, ("b", 0, 0, 0): 0.5, ("c", 0, 0, 0): 0.5}
    compared = compare_paired(first, second)
    assert (compared.pairs, compared.difference) == (2, pytest.approx(0.3))


def write_run(
    output: Path,
    row: str,
    column: Column,
    draw: int,
    scores: list[CaseScore],
    *,
    fold: int = 0,
    flops_shape: tuple[int, int] = (48, 64),
) -> None:
    folder = RunFolder(
        output / "runs" / row.lower() / f"{column.kind}-{column.count}" / f"fold{fold}-draw{draw}-seed0"
    )
    folder.claim(
        {
            "row": row,
            "column": {"kind": column.kind, "count": column.count},
            "fold": fold,
            "draw": draw,
            "seed": 0,
        }
    )
    folder.write_scores(scores)
    folder.write_result(
        RunResult(
            parameters=1_234_567,
            gigaflops=2.5,
            flops_shape=flops_shape,
            flops_keypoints=128,
            steps=100 + draw,
            seconds=10.0 + draw,
            pretraining_steps=50 if row == "Ours" else 0,
            pretraining_seconds=20.0 if row == "Ours" else 0.0,
            device="cpu",
            labelled=("heart_1:3",),
            selected_step=100 + draw,
            date="2026-01-02T03:04:05+00:00",
        )
    )


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """Two rows, M = 1 and 2 with two draws, k = 3 with one volume; one run of UNet is missing."""
    plan = Plan.model_validate(
        {
            "name": "by hand",
            "description": "Numbers to check.",
            "data": {"layout": "pairs"},
            "protocol": {"test": "odd", "draws": 2},
            "columns": {"patients": [1, 2], "slices": [3]},
            "k_slices": {"volumes": ["heart_0"]},
            "rows": [{"name": "UNet"}, {"name": "Ours"}, {"name": "Never"}],
            "reference": "Ours",
        }
    )
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    dice = {
        ("UNet", "patients", 1): [(0.1, 0.3), (0.5, 0.7)],
        ("Ours", "patients", 1): [(0.2, 0.5), (0.8, 0.9)],
        ("UNet", "patients", 2): [(0.5, 0.5)],
        ("Ours", "patients", 2): [(0.6, 0.8), (0.9, 0.9)],
        ("UNet", "slices", 3): [(0.9,)],
        ("Ours", "slices", 3): [(0.8,)],
    }
    for (row, kind, count), draws in dice.items():
        for draw, values in enumerate(draws):
            scores = [score(f"heart_{i}", value) for i, value in enumerate(values)]
            write_run(tmp_path, row, Column(kind, count), draw, scores)  # type: ignore[arg-type]
    return tmp_path


def test_the_tables_by_hand(benchmark: Path) -> None:
    text = write_report(benchmark).text
    lines = text.splitlines()
    # UNet at M = 1: draws of 0.2 and 0.6; their mean 0.4, their standard deviation 0.4 / sqrt(2).
    assert "| UNet | 0.400 (0.283) | 0.500 | **0.900** | 1.23 M | 2.50 | 100 steps, 10 s | - |" in lines
    assert (
        "| Ours | **0.600 (0.354)** | **0.800 (0.141)** | 0.800 | 1.23 M | 2.50 | 100 steps, 10 s | 50 steps, 20 s |"
        in lines
    )
    # Differences 0.1, 0.2, 0.3, 0.2, all positive: 1 of 16 signs, two sides.
    assert (
        "| UNet | p = 0.125, +0.200 (n = 4) | p = 0.500, +0.200 (n = 2) | p = 1.000, -0.100 (n = 1) |"
        in lines
    )
    assert "| Ours | 0.900 |" in lines  # of the whole volume at k = 3: (1 + 0.8) / 2
    assert not [line for line in lines if line.startswith("| Never") and "(" in line]
    assert "of 48 x 64 pixels with 128 keypoints" in text
    assert "on cpu, 2026-01-02," in text


def test_what_is_not_finished_is_said_of_every_row_and_column(benchmark: Path) -> None:
    lines = write_report(benchmark).text.splitlines()
    start = lines.index("**Not finished**: the repetitions that are done, of those of the plan.")
    assert lines[start + 2 :] == [
        "|  | M = 1 | M = 2 | k = 3 |",
        "| --- | --- | --- | --- |",
        "| UNet | 2 of 2 | 1 of 2 | 1 of 1 |",
        "| Never | 0 of 2 | 0 of 2 | 0 of 1 |",
    ]


def test_operations_of_slices_of_different_sizes_are_not_shown_as_of_one(benchmark: Path) -> None:
    column = Column("patients", 1)
    write_run(benchmark, "Never", column, 0, [score("heart_1", 0.5)], flops_shape=(96, 96))
    report = write_report(benchmark)
    lines = report.text.splitlines()
    assert [line.split(" | ")[5] for line in lines if line.startswith(("| Ours | **", "| Never | 0.5"))] == [
        "2.50 (48 x 64)",
        "2.50 (96 x 96)",
    ]
    assert "a forward pass of as many pixels as stand beside it with 128 keypoints" in report.text
    with open(report.table, newline="") as file:
        shapes = {line["row"]: line["flops_shape"] for line in csv.DictReader(file)}
    assert shapes == {"UNet": "48 x 64", "Ours": "48 x 64", "Never": "96 x 96"}


def change_plan(benchmark: Path, **changes: Any) -> None:
    plan = yaml.safe_load((benchmark / "plan.yaml").read_text())
    (benchmark / "plan.yaml").write_text(yaml.safe_dump(plan | changes))


def test_all_rows_can_be_half_done(benchmark: Path) -> None:
    change_plan(benchmark, protocol={"test": "odd", "draws": 2, "seeds": [0, 1], "combine": "all"})
    assert "| Ours | 2 of 4 | 2 of 4 | 1 of 2 |" in write_report(benchmark).text.splitlines()
    change_plan(benchmark, protocol={"folds": 3}, k_slices={"volumes": 6})
    assert "| Ours | 1 of 3 | 1 of 3 | 1 of at most 18 |" in write_report(benchmark).text.splitlines()


def test_runs_that_the_plan_no_longer_has_do_not_count(benchmark: Path) -> None:
    change_plan(benchmark, protocol={"test": "odd", "draws": 1})
    results = read_results(benchmark)
    assert results.cells["UNet", Column("patients", 1)].dice.mean == pytest.approx(0.2)
    assert results.unfinished_rows() == ["Never"]


def test_a_number_of_volumes_may_be_more_than_there_are(benchmark: Path) -> None:
    plan = read_results(benchmark).plan
    protocol = {"test": "odd", "seeds": [0, 1, 2]}
    plan = plan.override(protocol=protocol, k_slices={"volumes": 10})
    three_seeds_of_two_volumes = {(0, 0, 0), (0, 1, 1), (0, 0, 2)}
    assert three_seeds_of_two_volumes <= possible_repetitions(plan, Column("slices", 3))
    assert three_seeds_of_two_volumes - possible_repetitions(plan, Column("patients", 1)) == {(0, 1, 1)}


def test_standard_deviations_of_the_papers_protocol_are_those_of_its_tables(benchmark: Path) -> None:
    folds = [0.2259, 0.2133, 0.3297, 0.311, 0.3516]  # Table 9, M = 2, without KAF: .286(.056)
    for path in benchmark.rglob("result.json"):
        path.unlink()
    for fold, dice in enumerate(folds):
        write_run(benchmark, "Ours", Column("patients", 1), 0, [score("heart_1", dice)], fold=fold)
    change_plan(benchmark, protocol={"kind": "paper", "folds": 5}, columns={"patients": [1]})
    text = write_report(benchmark).text
    assert "| Ours | **0.286 (0.056)** |" in text
    assert "divided by n" in text


def test_the_csv_by_hand(benchmark: Path) -> None:
    with open(write_report(benchmark).table, newline="") as file:
        rows = {(line["row"], line["kind"], line["count"]): line for line in csv.DictReader(file)}
    line = rows["UNet", "patients", "1"]
    assert (line["repetitions"], line["pairs"]) == ("2", "4")
    assert float(line["dice_mean"]) == pytest.approx(0.4)
    assert float(line["dice left ventricle"]) == pytest.approx(0.4)
    assert float(line["steps"]) == pytest.approx(100.5)
    assert rows["Ours", "patients", "1"]["p_value"] == ""
    assert rows["UNet", "slices", "3"]["dice_std"] == ""
    line = rows["UNet", "patients", "2"]
    assert (line["repetitions"], line["planned"]) == ("1", "2")


def test_the_curves_show_what_the_table_says(benchmark: Path) -> None:
    from kaf_model.benchmark.curves import learning_curves

    figure = learning_curves(read_results(benchmark))
    left, right = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["UNet", "Ours"]
    drawn = {container.get_label(): container.lines[0].get_ydata().tolist() for container in left.containers}
    assert drawn == {"UNet": pytest.approx([0.4, 0.5]), "Ours": pytest.approx([0.6, 0.8])}
    assert [container.lines[0].get_ydata().tolist() for container in right.containers] == [[0.9], [0.8]]
    assert write_report(benchmark).figure.read_bytes().startswith(b"\x89PNG")


def test_twelve_rows_can_be_told_apart_by_their_curves(benchmark: Path) -> None:
    from kaf_model.benchmark.curves import learning_curves

    names = [f"row{number}" for number in range(12)]
    change_plan(benchmark, rows=[{"name": name} for name in names], reference=None)
    for name in names:
        write_run(benchmark, name, Column("patients", 1), 0, [score("heart_1", 0.5)])
    (panel,) = learning_curves(read_results(benchmark)).axes
    lines = [container.lines[0] for container in panel.containers]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == 12


def test_another_row_can_be_the_reference(benchmark: Path) -> None:
    results = read_results(benchmark, "UNet")
    assert results.cells["UNet", Column("patients", 1)].comparison is None
    compared = results.cells["Ours", Column("patients", 1)].comparison
    assert compared is not None
    assert compared.difference == pytest.approx(-0.2)


def test_what_cannot_be_reported(benchmark: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no row 'VNet'; the rows are: UNet, Ours, Never"):
        read_results(benchmark, "VNet")
    with pytest.raises(UserError, match=r"holds no benchmark: there is no plan\.yaml"):
        read_results(tmp_path / "elsewhere")
    for path in benchmark.rglob("result.json"):
        path.unlink()
    with pytest.raises(UserError, match=r"no run in .* is finished yet"):
        read_results(benchmark)


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim({"row": "UNet"})
    scores = [score("a", 1 / 3), score("a", math.nan, value=2, voxels=0)]
    folder.write_scores(scores)
    first, second = folder.read_scores()
    assert (first.case, first.dice, first.voxels) == ("a", 1 / 3, 10)
    assert math.isnan(second.dice)
    assert math.isnan(first.hd95_mm)


def test_a_folder_with_other_settings_is_not_touched(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim({"row": "UNet", "settings": {"finetune": {"steps": 5}}})
    folder.claim({"row": "UNet", "settings": {"finetune": {"steps": 5}}})
    with pytest.raises(UserError, match=r"settings\.finetune\.steps was 5, now 6\. Write to another folder"):
        folder.claim({"row": "UNet", "settings": {"finetune": {"steps": 6}}})
