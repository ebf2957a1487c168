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
import time
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import ValidationError

from kaf_model import cli_options as options
from kaf_model.cli_benchmark import benchmark_app
from kaf_model.cli_explore import explore_report
from kaf_model.cli_figure import figure_app
from kaf_model.cli_options import duration_text, one_of
from kaf_model.cli_progress import Interrupted, Output, losses_text
from kaf_model.cli_settings import choose_settings, settings_yaml
from kaf_model.errors import UserError
from kaf_model.heap import keep_freed_memory
from kaf_model.progress import Progress
from kaf_model.settings_layers import validation_text

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from kaf_model.config import ModelConfig

Result = TypeVar("Result")
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
    # Threads that wait sleep instead of spinning, which on a machine with other work to do saves most of the
    # time of a step. It must be said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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


app.add_typer(benchmark_app, name="benchmark")


# --- the main job ------------------------------------------------------------------------------------------

OutputFile = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="Checkpoint to write, NAME.safetensors.")
]


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to.")] = Path(
        "demo-output"
    ),
    time_budget: Annotated[
        str, typer.Option("--time-budget", metavar="90s|10m|2h", help="Time until both models are trained.")
    ] = "200s",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of weights and sampling.")] = 0,
    device: options.Device = "auto",
) -> None:
    """Run the main job on a synthetic heart cohort: pretrain, finetune, segment, evaluate."""
    from kaf_model.demo import demo_report, run_demo

    out = Output()
    seconds = options.parse_duration(time_budget)
    started = time.monotonic()
    result = out.run(run_demo(output, time_budget=seconds, seed=seed, device=device))
    out.line()
    out.line(demo_report(result))
    out.line(f"\nTook {duration_text(time.monotonic() - started)}.")


@app.command()
def pretrain(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="DIR_OR_FILES...", help="Unlabelled volumes: files, folders, DICOM folders."),
    ],
    output: OutputFile,
    preset: options.Preset = None,
    time_budget: options.TimeBudget = None,
    steps: options.Steps = None,
    seed: options.Seed = None,
    resume: options.Resume = False,
    network: options.Network = None,
    config: options.ConfigFile = None,
    assignments: options.SetOptions = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    frame: options.Frame = None,
    slice_axis: options.SliceAxis = None,
    fill_nan: options.FillNan = None,
) -> None:
    """Pretrain an encoder on unlabelled volumes."""
    seconds = options.parse_duration(time_budget) if time_budget is not None else None
    given = {"steps": steps, "time_budget": seconds, "seed": seed}
    recipe = choose_settings(
        preset, config, assignments, {"pretrain": given, "model": {"architecture": network}}
    ).recipe

    from kaf_model.keypoints import KeypointCache
    from kaf_model.pretrain import pretrain as pretrain_on
    from kaf_model.volume_queue import VolumeFiles

    volumes = VolumeFiles(inputs, frame=frame, slice_axis=slice_axis, fill_nan=fill_nan)
    cache = KeypointCache()
    work = pretrain_on(
        recipe.model,
        volumes,
        recipe.pretrain,
        slices=recipe.slices,
        keypoints=recipe.keypoints,
        output=output,
        resume=resume,
        fabric=_fabric(device, precision),
        cache=cache,
    )
    out = Output()
    result = _train(out, work, output)
    record = result.checkpoint.history[-1]
    _say_what_was_trained(out, output, record, result.curve)
    out.line(f"trained on {record['num_slices']} slices of {record['num_volumes']} of {len(volumes)} volumes")
    _say_notice(out, cache.notice)
    out.line(f"next: kaf finetune --images DIR --labels DIR --start {output} -o model.safetensors")


@app.command()
def finetune(
    images: Annotated[Path, typer.Option("--images", metavar="DIR", help="Folder of volumes.")],
    labels: Annotated[
        Path,
        typer.Option("--labels", metavar="DIR", help="Folder of label maps with the names of their volumes."),
    ],
    output: OutputFile,
    cases: Annotated[
        list[str] | None,
        typer.Option("--cases", metavar="NAME,NAME", help="Volumes to use; without it all that have labels."),
    ] = None,
    slices: Annotated[
        list[str] | None,
        typer.Option(
            "--slices",
            metavar="NAME:3,5,7-9",
            help="Slices that are labelled completely; unpainted is background. Repeatable. Without any slice "
            "named, every slice of a case counts as complete; with one, only those named count.",
        ),
    ] = None,
    partial: Annotated[
        list[str] | None,
        typer.Option(
            "--partial",
            metavar="NAME:4,6",
            help="Slices that are labelled in part; unpainted is unknown. Repeatable.",
        ),
    ] = None,
    empty: Annotated[
        list[str] | None,
        typer.Option(
            "--empty", metavar="NAME:0,1", help="Slices on which nothing is to be found. Repeatable."
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="1=RV,2=MYO",
            help="Names of all label values; without it from labels.json or dataset.json beside the labels.",
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--start",
            metavar="FILE",
            help="Pretrained or finetuned checkpoint; its architecture and preprocessing are kept.",
        ),
    ] = None,
    unlabelled: Annotated[
        list[Path] | None,
        typer.Option(
            "--unlabelled",
            metavar="DIR_OR_FILE",
            help="Volumes without labels to learn from as well, by what the model is sure of. Repeatable. The "
            "unlabelled slices of the cases are used without it.",
        ),
    ] = None,
    preset: options.Preset = None,
    time_budget: options.TimeBudget = None,
    steps: options.Steps = None,
    seed: options.Seed = None,
    holdout: Annotated[
        float | None,
        typer.Option(
            "--holdout",
            metavar="PART",
            help="Part of the labelled slices (0 to 1) held out to measure Dice; the best weights are kept.",
            rich_help_panel="Training",
        ),
    ] = None,
    resume: options.Resume = False,
    network: options.Network = None,
    config: options.ConfigFile = None,
    assignments: options.SetOptions = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    frame: options.Frame = None,
    slice_axis: options.SliceAxis = None,
    fill_nan: options.FillNan = None,
) -> None:
    """Train a segmentation model on a few labelled slices."""
    seconds = options.parse_duration(time_budget) if time_budget is not None else None
    given = {"steps": steps, "time_budget": seconds, "seed": seed, "holdout": holdout}
    chosen = choose_settings(
        preset, config, assignments, {"finetune": given, "model": {"architecture": network}}
    )
    marks = {
        "complete": [options.parse_slices(text) for text in slices or ()],
        "partial": [options.parse_slices(text) for text in partial or ()],
        "empty": [options.parse_slices(text) for text in empty or ()],
    }
    names = [name for text in cases for name in text.split(",")] if cases is not None else None
    named = options.parse_classes(classes) if classes is not None else None

    from kaf_model.cases import check_named, class_names, read_cases
    from kaf_model.checkpoint import load_checkpoint
    from kaf_model.finetune import finetune as finetune_on
    from kaf_model.keypoints import KeypointCache
    from kaf_model.labels import SliceStatus
    from kaf_model.volume_queue import VolumeFiles

    out = Output()
    fabric = _fabric(device, precision)
    origin = load_checkpoint(start) if start is not None else None
    model: ModelConfig | None = chosen.recipe.model
    if origin is not None:
        asked = {**chosen.asked_for("model")}
        asked.pop("num_classes", None)
        model = origin.model.override(**asked) if asked else None
        for section, theirs in (("slices", origin.slices), ("keypoints", origin.keypoints)):
            for field, value in chosen.asked_for(section).items():
                if getattr(theirs, field) != value:
                    raise UserError(
                        f"{section}.{field} is {getattr(theirs, field)} in {start} and stays so; leave it out"
                    )
    reading = read_cases(
        images,
        labels,
        names=names,
        marks={SliceStatus(status): listed for status, listed in marks.items()},
        frame=frame,
        slice_axis=slice_axis,
        fill_nan=fill_nan,
    )
    labelled = out.run(reading)
    others = (
        VolumeFiles(unlabelled, frame=frame, slice_axis=slice_axis, fill_nan=fill_nan) if unlabelled else ()
    )
    if named is not None:
        check_named(labelled, named)
    cache = KeypointCache()
    work = finetune_on(
        model,
        labelled,
        chosen.recipe.finetune,
        start=origin,
        unlabelled=others,
        class_names=named if named is not None else class_names(labels),
        slices=chosen.recipe.slices if origin is None else None,
        keypoints=chosen.recipe.keypoints if origin is None else None,
        output=output,
        resume=resume,
        fabric=fabric,
        cache=cache,
    )
    result = _train(out, work, output)
    _say_what_was_trained(out, output, result.model.history[-1], result.curve)
    _say_notice(out, cache.notice)
    out.line(f"next: kaf segment VOLUME_OR_DIR --model {output} -o OUT")


@app.command()
def segment(
    source: Annotated[
        Path, typer.Argument(metavar="VOLUME_OR_DIR", help="A volume, or a folder of volumes.")
    ],
    model: Annotated[Path, typer.Option("--model", metavar="FILE", help="Finetuned checkpoint.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="File NAME.nii.gz for one volume, or a folder: OUT/NAME.nii.gz.",
        ),
    ],
    probabilities: Annotated[
        bool, typer.Option("--probabilities", metavar="", help="Also write OUT/NAME_probabilities.nii.gz.")
    ] = False,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty", metavar="", help="Also write OUT/NAME_uncertainty.nii.gz: entropy from 0 to 1."
        ),
    ] = False,
    flips: Annotated[
        bool, typer.Option("--flips", metavar="", help="Average over mirrored copies; 4 times the work.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace label maps that are already in OUT.")
    ] = False,
    largest_component: Annotated[
        str | None,
        typer.Option(
            "--largest-component",
            metavar="learned|all|none",
            help="Keep only the largest piece of classes that were labelled in one piece, of all, or of none.",
        ),
    ] = None,
    config: options.ConfigFile = None,
    assignments: options.SetOptions = None,
    device: options.Device = "auto",
    frame: options.Frame = None,
    slice_axis: options.SliceAxis = None,
    fill_nan: options.FillNan = None,
) -> None:
    """Segment a volume, or every volume of a folder, on its own grid."""
    switches = {"probabilities": probabilities, "uncertainty": uncertainty, "flips": flips}
    given = {"largest_component": largest_component, **{name: on or None for name, on in switches.items()}}
    recipe = choose_settings(None, config, assignments, {"segment": given}).recipe

    from kaf_model.checkpoint import load_model
    from kaf_model.engine import choose_device
    from kaf_model.keypoints import KeypointCache
    from kaf_model.segment_files import plan_outputs, segment_files, write_class_names

    planned = plan_outputs(source, output, overwrite=overwrite)
    loaded = load_model(model, device=choose_device(device))
    out = Output()
    started = time.monotonic()
    cache = KeypointCache()
    work = segment_files(
        loaded,
        planned,
        recipe.segment,
        cache=cache,
        frame=frame,
        slice_axis=slice_axis,
        fill_nan=fill_nan,
    )
    done = out.run(work)
    if planned[0].labels != output:
        write_class_names(output, loaded.classes)
    failed = f", {len(done.failed)} failed" if done.failed else ""
    took = duration_text(time.monotonic() - started)
    out.line(f"segmented {len(done.written)} of {len(planned)} volumes in {took}{failed}: {output}")
    _say_notice(out, cache.notice)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="Label map or folder of them.")],
    references: Annotated[
        Path, typer.Argument(metavar="REFERENCES", help="The true ones, of the same names.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="CSV with a line per volume and class."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="1=RV,2=MYO",
            help="Classes to score; without it those of labels.json or dataset.json, and all others found.",
        ),
    ] = None,
) -> None:
    """Compare label maps with reference label maps: Dice, HD95 in mm, volumes in ml."""
    named = options.parse_classes(classes) if classes is not None else None

    from kaf_model.cases import class_names
    from kaf_model.evaluate import LABEL_NAMES, evaluate_folders

    folder = references if references.is_dir() else references.parent
    if named is None and not (folder / LABEL_NAMES).is_file():
        named = class_names(folder) or None
    out = Output()
    scores = out.run(evaluate_folders(predictions, references, classes=named))
    out.line(scores.table().rstrip())
    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            scores.to_csv(output)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror}; choose another place") from error
        out.line(f"wrote {output}: {len(scores.rows)} lines")


app.add_typer(figure_app, name="figure")
app.command("explore-report")(explore_report)


# --- files and settings ------------------------------------------------------------------------------------


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
    output: OutputFile,
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


# --- what the commands share -------------------------------------------------------------------------------


def _fabric(device: str, precision: str) -> Fabric:
    from kaf_model.engine import make_fabric

    chosen = one_of("precision", precision, ("auto", "float32"))
    return make_fabric(device, precision="float32" if chosen == "float32" else "auto")


def _train(out: Output, work: Generator[Progress, None, Result], path: Path) -> Result:
    import torch

    try:
        return out.run(work)
    except Interrupted as stop:
        stop.path = path
        raise
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _say_what_was_trained(
    out: Output, path: Path, record: Mapping[str, Any], curve: Sequence[Mapping[str, float]]
) -> None:
    took = duration_text(record["seconds"])
    waited = f"{record['waiting_share']:.0%} of it waiting for data"
    out.line(f"wrote {path}: {record['steps']} steps in {took} on {record['device']}, {waited}")
    losses = {name: value for name, value in curve[-1].items() if name not in ("step", "held-out dice")}
    out.line(f"last losses: {losses_text(losses)}")
    if record.get("held_out_dice") is not None:
        out.line(f"best Dice on held-out slices: {record['held_out_dice']:.3f}")


def _say_notice(out: Output, notice: str | None) -> None:
    if notice:
        out.line(notice)


if __name__ == "__main__":
    sys.exit(main())
