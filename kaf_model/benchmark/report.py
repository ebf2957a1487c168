"""The report of a benchmark: tables as Markdown and CSV, and learning curves."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from kaf_model.benchmark.curves import learning_curves
from kaf_model.benchmark.results import Cell, Results, read_results
from kaf_model.benchmark.runs import Column
from kaf_model.benchmark.statistics import Comparison, Spread
from kaf_model.errors import UserError
from kaf_model.text_files import write_atomically

_REPETITIONS = {
    "strict": "Per-volume Dice of the last step, no slice left out. Mean (standard deviation) over repetitions: "
    "draws of labelled patients with a seed each, or, for k, volumes.",
    "paper": "Dice pooled over all voxels of a fold, of the weights that are best on that same fold, after "
    "pretraining on all patients: the paper's protocol, which flatters. Mean (standard deviation, "
    "divided by n as there) over folds.",
}


@dataclass(frozen=True)
class Report:
    """Where a report was written.

    Attributes:
        text: The Markdown.
        markdown: Its file.
        table: CSV with a line per row and column.
        figure: Learning curves.
    """

    text: str
    markdown: Path
    table: Path
    figure: Path


def write_report(output: Path, reference: str | None = None) -> Report:
    """Write the report of what is finished into the folder of a benchmark.

    Args:
        output: The folder.
        reference: Row that the others are tested against; None takes the plan's.

    Raises:
        UserError: If there is nothing to report or the folder cannot be written.
    """
    results = read_results(output, reference)
    report = Report(
        markdown_report(results),
        output / "report.md",
        output / "report.csv",
        output / "learning-curves.png",
    )
    try:
        write_atomically(report.markdown, lambda file: file.write(report.text))
        write_atomically(report.table, lambda file: file.write(csv_report(results)))
        learning_curves(results).savefig(report.figure, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error
    return report


def markdown_report(results: Results) -> str:
    """Return the tables with what has to be known to read them."""
    plan = results.plan
    parts = [f"# {plan.name}", *([plan.description.strip()] if plan.description else [])]
    parts.append(_REPETITIONS[plan.protocol.kind])
    parts.append(_table(_dice_table(results)))
    parts.append(_costs_note(results))
    if any(column.kind == "slices" for column in results.columns):
        parts.append(
            "With k labelled slices, the Dice above is that of the other slices of the volume, which are fewer and "
            "others for each k. Of the whole volume, the labelled slices taken as they are labelled, it is:"
        )
        parts.append(_table(_volume_table(results)))
    if any(cell.comparison for cell in results.cells.values()):
        parts.append(
            f"**{plan.reference_row} against the others**: p of Wilcoxon's signed-rank test, two-sided, and the "
            "mean difference in Dice over n pairs. A pair is a volume in a repetition; repetitions share volumes, "
            "so that the pairs are not independent."
        )
        parts.append(_table(_comparison_table(results)))
    if results.unfinished_rows():
        parts.append("**Not finished**: the repetitions that are done, of those of the plan.")
        parts.append(_table(_unfinished_table(results)))
    return "\n\n".join(parts) + "\n"


def csv_report(results: Results) -> str:
    """Return one line per row and column, with a column for each class."""
    classes = list(dict.fromkeys(name for cell in results.cells.values() for name in cell.classes))
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_CSV_COLUMNS, *(f"dice {name}" for name in classes)])
    for cell in results.cells.values():
        compared = cell.comparison or Comparison(math.nan, math.nan, 0)
        numbers = [
            cell.dice.mean,
            cell.dice.std,
            cell.volume_dice.mean,
            compared.p_value,
            compared.difference,
            compared.pairs,
            *(cell.mean(field) for field in _CSV_COLUMNS[_COSTS:]),
            *(cell.classes.get(name, math.nan) for name in classes),
        ]
        written = ["" if number != number else number for number in numbers]
        repetitions = len(cell.runs), results.num_planned(cell.column)
        what = cell.row, cell.column.kind, cell.column.count, *repetitions, ", ".join(_flops_shapes([cell]))
        writer.writerow([*what, *written])
    return text.getvalue()


_CSV_COLUMNS = (
    *(
        "row",
        "kind",
        "count",
        "repetitions",
        "planned",
        "flops_shape",
        "dice_mean",
        "dice_std",
        "volume_dice_mean",
        "p_value",
        "difference",
        "pairs",
    ),
    *("parameters", "gigaflops", "steps", "seconds", "pretraining_steps", "pretraining_seconds"),
)
_COSTS = _CSV_COLUMNS.index("parameters")


def _dice_table(results: Results) -> list[list[str]]:
    header = ["", *map(str, results.columns), "parameters", "GFLOP a slice", "training", "pretraining"]
    best = {
        column: max(cell.dice.mean for (_, other), cell in results.cells.items() if other == column)
        for column in results.columns
    }
    one_shape = _one_shape(results)
    lines = [header]
    for row in results.rows:
        cells = [results.cells.get((row, column)) for column in results.columns]
        texts = [_dice(cell, best) for cell in cells]
        lines.append([row, *texts, *_costs([cell for cell in cells if cell is not None], one_shape)])
    return lines


def _dice(cell: Cell | None, best: dict[Column, float]) -> str:
    if cell is None:
        return "-"
    text = _mean_and_std(cell.dice)
    return f"**{text}**" if cell.dice.mean == best[cell.column] else text


def _volume_table(results: Results) -> list[list[str]]:
    columns = [column for column in results.columns if column.kind == "slices"]
    lines = [["", *map(str, columns)]]
    for row in results.rows:
        cells = [results.cells.get((row, column)) for column in columns]
        lines.append([row, *("-" if cell is None else _mean_and_std(cell.volume_dice) for cell in cells)])
    return lines


def _costs(cells: list[Cell], shape: str | None) -> list[str]:
    """What a row costs; `shape` is the size of the counted slice if that is one for all rows."""

    def mean(field: str) -> float:
        return Spread.of(cell.mean(field) for cell in cells).mean

    before = mean("pretraining_steps")
    counted = "" if shape else f" ({', '.join(_flops_shapes(cells))})"
    return [
        f"{mean('parameters') / 1e6:.2f} M",
        f"{mean('gigaflops'):.2f}{counted}",
        f"{mean('steps'):.0f} steps, {mean('seconds'):.0f} s",
        f"{before:.0f} steps, {mean('pretraining_seconds'):.0f} s" if before else "-",
    ]


def _one_shape(results: Results) -> str | None:
    """The size of the slice whose operations were counted; None where rows train on different crops."""
    shapes = _flops_shapes(results.cells.values())
    return shapes[0] if len(shapes) == 1 else None


def _flops_shapes(cells: Iterable[Cell]) -> list[str]:
    shapes = sorted({run.result.flops_shape for cell in cells for run in cell.runs})
    return [f"{height} x {width}" for height, width in shapes]


def _costs_note(results: Results) -> str:
    result = next(iter(results.cells.values())).runs[0].result
    one_shape = _one_shape(results)
    pixels = f"{one_shape} pixels" if one_shape else "as many pixels as stand beside it"
    devices = sorted({run.result.device for cell in results.cells.values() for run in cell.runs})
    dates = sorted(run.result.date[:10] for cell in results.cells.values() for run in cell.runs)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return (
        f"GFLOP: a forward pass of {pixels} with {result.flops_keypoints} keypoints, "
        f"multiplications and additions counted each. Times: on {', '.join(devices)}, {when}, mean over the columns."
    )


def _comparison_table(results: Results) -> list[list[str]]:
    lines = [["against", *map(str, results.columns)]]
    for row in results.rows:
        if row != results.plan.reference_row:
            cells = [results.cells.get((row, column)) for column in results.columns]
            lines.append([row, *(_comparison(cell) for cell in cells)])
    return lines


def _comparison(cell: Cell | None) -> str:
    if cell is None or cell.comparison is None or not cell.comparison.pairs:
        return "-"
    p_value = cell.comparison.p_value
    shown = "p < .001" if p_value < 0.001 else f"p = {p_value:.3f}"
    return f"{shown}, {cell.comparison.difference:+.3f} (n = {cell.comparison.pairs})"


def _unfinished_table(results: Results) -> list[list[str]]:
    lines = [["", *map(str, results.planned_columns)]]
    for row in results.unfinished_rows():
        lines.append([row, *(_done(results, row, column) for column in results.planned_columns)])
    return lines


def _done(results: Results, row: str, column: Column) -> str:
    at_most = column.kind == "slices" and isinstance(results.plan.k_slices.volumes, int)
    of = "of at most" if at_most else "of"
    return f"{results.num_done(row, column)} {of} {results.num_planned(column)}"


def _mean_and_std(spread: Spread) -> str:
    if not spread.count:
        return "-"
    return f"{spread.mean:.3f}" if math.isnan(spread.std) else f"{spread.mean:.3f} ({spread.std:.3f})"


def _table(lines: list[list[str]]) -> str:
    """Lay out a header and lines as a Markdown table."""
    rule = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
