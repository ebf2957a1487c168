"""The command line, `kaf`: demo, pretrain, finetune, segment, evaluate, figure, benchmark and more.

Commands only read options, call the engine and print. What computes is imported when a command runs, so
that `--help` is quick. A user's mistake is one line on standard error and exit code 2; an interrupted
training exits with 130, anything unexpected with 1.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from kaf_model import cli_options as options
from kaf_model.cli_benchmark import benchmark_app
from kaf_model.cli_explore import explore_report
from kaf_model.cli_figure import figure_app
from kaf_model.cli_progress import Interrupted, Output
from kaf_model.cli_propagate import propagate
from kaf_model.cli_segment import demo, evaluate, segment
from kaf_model.cli_settings import choose_settings, settings_yaml
from kaf_model.cli_train import finetune, pretrain
from kaf_model.errors import UserError
from kaf_model.heap import keep_freed_memory
from kaf_model.openmp import let_threads_sleep
from kaf_model.settings_layers import validation_text

OK, UNEXPECTED, USER_MISTAKE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="kaf",
    help="Segment MRI and CT volumes from a few labelled slices, with keypoint-augmented pretraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of this process, and return its exit code."""
    let_threads_sleep()
    if arguments is None:
        keep_freed_memory()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    if arguments is None and not debug:  # what libraries announce to programmers
        warnings.filterwarnings("ignore", category=FutureWarning)
    given = [argument for argument in given if argument != "--debug"]
    try:
        code = app(given, prog_name="kaf", standalone_mode=False)
        return code if isinstance(code, int) else OK
    except (UserError, ValidationError) as error:
        text = validation_text(error) if isinstance(error, ValidationError) else str(error)
        return _fail(_as_options(text), USER_MISTAKE)
    except Interrupted as stop:
        _say_how_to_resume(stop, given)
        return INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; nothing was written", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return OK
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help has been printed
            return USER_MISTAKE
        if hasattr(error, "format_message"):  # a command line that the parser refuses
            where = getattr(error, "ctx", None)
            path = where.command_path if where is not None else "kaf"
            return _fail(f"{error.format_message().rstrip('.')}; see {path} --help", USER_MISTAKE)
        if _is_non_finite_loss(error):
            return _fail(str(error), UNEXPECTED)
        if debug:
            raise
        return _fail(
            f"unexpected {type(error).__name__}: {error}; the same line with --debug shows where", UNEXPECTED
        )


def _fail(text: str, code: int) -> int:
    if code != USER_MISTAKE or int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code


def _as_options(text: str) -> str:
    """Say `--fill-nan 0` where the engine says `fill_nan=0`."""
    found = r"\b(frame|fill_nan|slice_axis)=(\d+)"
    return re.sub(found, lambda match: f"--{match[1].replace('_', '-')} {match[2]}", text)


def _is_non_finite_loss(error: Exception) -> bool:
    engine = sys.modules.get("kaf_model.engine")
    return engine is not None and isinstance(error, engine.NonFiniteLoss)


def _say_how_to_resume(stop: Interrupted, arguments: Sequence[str]) -> None:
    output = Output()
    if stop.advice:
        output.line(stop.advice)
        return
    if stop.path is None or not stop.trained:
        output.line("interrupted; run the same line again to start over")
        return
    output.line(f"interrupted: {stop.path} is usable as it is; go on with")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        output.line("  the same torchrun line with --resume at its end")
        return
    resumed = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
    output.line(f"  {_program()} {shlex.join(resumed)}")


def _program() -> str:
    script = Path(sys.argv[0])
    if script.stem != "kaf":
        return f"{shlex.quote(sys.executable)} -m kaf_model"
    on_path = shutil.which("kaf")
    return "kaf" if on_path and Path(on_path).resolve() == script.resolve() else shlex.quote(str(script))


def _print_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        try:
            print(f"kaf {importlib.metadata.version('napari-kaf')}")
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            print("kaf of a checkout that is not installed")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", metavar="", help="Show the traceback of an unexpected error. Goes anywhere."),
    ] = False,
) -> None:
    pass


for command in (demo, pretrain, finetune, propagate, segment, evaluate):
    app.command()(command)
app.add_typer(figure_app, name="figure")
app.command("explore-report")(explore_report)
app.add_typer(benchmark_app, name="benchmark")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Checkpoint or volume.")],
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print everything as JSON.")] = False,
) -> None:
    """Tell what is inside a checkpoint or a volume."""
    from kaf_model.cli_info import describe_file, info_rows

    content = describe_file(file)
    if as_json:
        print(json.dumps(content, indent=2))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, text in info_rows(file, content):
        table.add_row(label, Text(text))
    Output().console.print(table)


@app.command("import")
def import_weights(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.pth", help="Weights of the published implementation.")
    ],
    output: options.OutputFile,
    num_classes: Annotated[
        int | None,
        typer.Option(
            "--num-classes", help="Classes with background, for a pretraining checkpoint: it has none."
        ),
    ] = None,
) -> None:
    """Convert weights of the published implementation into a checkpoint."""
    from kaf_model.checkpoint import save_checkpoint
    from kaf_model.import_published import import_published
    from kaf_model.training_files import RunFiles

    RunFiles(output).check(resume=False)
    checkpoint = import_published(file, num_classes=num_classes)
    save_checkpoint(output, checkpoint)
    Output().line(
        f"wrote {output}: {checkpoint.kind}, {len(checkpoint.weights)} tensors; see kaf info {output}"
    )


@app.command()
def settings(
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    assignments: options.SetOptions = None,
) -> None:
    """Print every setting with its value and meaning, as YAML for --config."""
    print(settings_yaml(choose_settings(preset, config, assignments).recipe), end="")


if __name__ == "__main__":
    sys.exit(main())
