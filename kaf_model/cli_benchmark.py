"""The commands `kaf benchmark run | report | plans`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kaf_model import cli_options as options
from kaf_model.cli_options import one_of
from kaf_model.cli_progress import Interrupted, Output
from kaf_model.errors import UserError

SOME_FAILED = 1

benchmark_app = typer.Typer(
    help="Compare methods with few labels under one protocol.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@benchmark_app.command()
def run(
    plan: Annotated[
        str,
        typer.Argument(metavar="PLAN", help="File PLAN.yaml, or the name of one of kaf benchmark plans."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder to write to; finished runs in it are not done again.",
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Folder of the data set; synthetic hearts need none."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="ROW", help="Do this row of the plan. Repeatable.")
    ] = None,
    patients: Annotated[
        str | None,
        typer.Option(
            "--patients",
            metavar="even|odd|1-80|A,B",
            help="Patients that take part, in place of the plan's: all, even, odd, 1-80, first 80, last 80, names "
            "or numbers with commas, and 'A except B'.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Say what would be done, and train nothing.")
    ] = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Do the runs of a plan; the same line again goes on where it was stopped.

    Started more than once at the same time, for several GPUs say, each takes the runs that the others have not begun.
    """
    float32 = one_of("precision", precision, ("auto", "float32")) == "float32"

    from kaf_model.benchmark.outlook import outlook
    from kaf_model.benchmark.plan import load_plan
    from kaf_model.benchmark.runner import plan_runs, run_benchmark
    from kaf_model.engine import make_fabric
    from kaf_model.keypoints import KeypointCache

    chosen = load_plan(plan)
    if patients is not None:
        chosen = chosen.override(data=chosen.data.override(patients=patients).model_dump())
    if data is None and chosen.data.layout != "phantom":
        raise UserError(f"the plan {chosen.name} needs data of layout {chosen.data.layout}: give --data DIR")
    folder = data if data is not None else output / "data"
    out = Output()
    if dry_run:
        cohort, runs = plan_runs(chosen, folder, only or ())
        for line in outlook(chosen, cohort, runs, output):
            out.line(line)
        return
    cache = KeypointCache()
    fabric = make_fabric(device, precision="float32" if float32 else "auto")
    work = run_benchmark(chosen, folder, output, only=only or (), fabric=fabric, cache=cache)
    try:
        result = out.run(work)
    except Interrupted as stop:
        stop.advice = "interrupted; what is done stays, and the same line goes on from here"
        raise
    out.line(f"{result.finished} runs are finished, {result.skipped} of them before: {output}")
    if cache.notice:
        out.line(cache.notice)
    for name, reason in result.failed:
        out.line(f"failed: {name}: {reason}")
    if result.failed:
        raise typer.Exit(SOME_FAILED)
    if result.elsewhere:
        out.line(f"{result.elsewhere} more are being done by other processes")
        return
    out.line(f"next: kaf benchmark report {output}")


@benchmark_app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a benchmark.")],
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="ROW", help="Row to test the others against; else the plan's."),
    ] = None,
) -> None:
    """Write tables, p-values and learning curves of what is finished, and print the tables."""
    from kaf_model.benchmark.report import write_report

    out = Output()
    written = write_report(folder, against)
    out.line(written.text)
    out.line(f"wrote {written.markdown}, {written.table} and {written.figure}")


@benchmark_app.command()
def plans(
    show: Annotated[
        str | None, typer.Option("--show", metavar="NAME", help="Print a plan, to change it in a file.")
    ] = None,
) -> None:
    """List the plans that come with kaf."""
    from kaf_model.benchmark.plan import load_plan, plan_text, shipped_plans

    if show is not None:
        print(plan_text(show), end="")
        return
    out = Output()
    width = max(map(len, shipped_plans()))
    for name in shipped_plans():
        out.line(f"{name:{width}}  {load_plan(name).summary}")
