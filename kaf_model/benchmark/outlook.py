"""What a benchmark will do, in words, before it does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kaf_model.benchmark.cohort import Cohort
from kaf_model.benchmark.plan import Plan
from kaf_model.benchmark.records import RunFolder
from kaf_model.benchmark.runs import Pretraining, Run, columns
from kaf_model.benchmark.splits import splits


def outlook(plan: Plan, cohort: Cohort, runs: Sequence[Run], output: Path) -> list[str]:
    """Describe splits, runs and pretrainings, with the seconds of training that are left where that is known.

    Args:
        plan: The plan.
        cohort: Its data.
        runs: Its runs.
        output: Folder it would write to; what is finished there is left out of the time.
    """
    lines = [
        f"{plan.name}: {len(runs)} runs of {len({run.row for run in runs})} rows and {len(columns(plan))} columns "
        f"({', '.join(map(str, columns(plan)))}), protocol {plan.protocol.kind}"
    ]
    names = ", ".join(f"{value} {name}" for value, name in cohort.classes.items())
    lines.append(f"{len(cohort.cases)} volumes of {len(cohort.patients)} labelled patients; classes: {names}")
    for split in splits(cohort, plan.protocol):
        lines += [
            f"fold {split.fold}: tested {', '.join(split.test)}",
            f"fold {split.fold}: learnt from, as drawn, {', '.join(split.pool)}",
            f"fold {split.fold}: pretraining sees {len(split.pretraining)} volumes",
        ]
    waiting = [run for run in runs if not RunFolder(output / run.folder).finished]
    pretrainings = {run.pretraining.folder: run.pretraining for run in waiting if run.pretraining}
    untrained = [item for item in pretrainings.values() if not RunFolder(output / item.folder).trained]
    lines.append(f"to do: {len(waiting)} finetunings, {len(untrained)} pretrainings")
    lines += [f"  {run}: learns from {_listed(run)}" for run in waiting]
    lines.append(_time(waiting, untrained))
    return lines


def _listed(run: Run) -> str:
    names = ", ".join(case.name for case in run.train)
    if run.column.kind == "slices":
        names = f"{run.column.count} slice{'s' if run.column.count > 1 else ''} of {names}"
    return names + (f", after {run.pretraining.folder.name}" if run.pretraining else "")


def _time(waiting: Sequence[Run], untrained: Sequence[Pretraining]) -> str:
    budgets = [run.recipe.finetune.time_budget for run in waiting]
    budgets += [item.recipe.pretrain.time_budget for item in untrained]
    known = sum(budget for budget in budgets if budget is not None)
    unknown = sum(budget is None for budget in budgets)
    more = f", and {unknown} that are measured in steps or epochs" if unknown else ""
    return f"training time: at most {known / 3600:.1f} h{more}"
