"""The commands that train: pretrain and finetune."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kaf_model import cli_options as options
from kaf_model.cli_options import duration_text, one_of
from kaf_model.cli_progress import Interrupted, Output, losses_text
from kaf_model.cli_settings import choose_settings
from kaf_model.errors import UserError
from kaf_model.progress import Progress

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from kaf_model.config import ModelConfig

Result = TypeVar("Result")


def pretrain(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="DIR_OR_FILES...", help="Unlabelled volumes: files, folders, DICOM folders."),
    ],
    output: options.OutputFile,
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
        preset,
        config,
        assignments,
        {"pretrain": given, "model": {"architecture": network}},
        reads=("slices", "keypoints", "model", "pretrain"),
    ).recipe

    from kaf_model.keypoints import KeypointCache
    from kaf_model.pretrain import pretrain as pretrain_on
    from kaf_model.volume_queue import VolumeFiles

    _check_interrupted(output, resume)
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
    say_notice(out, cache.notice)
    out.line(f"next: kaf finetune --images DIR --labels DIR --start {output} -o model.safetensors")


def finetune(
    images: Annotated[Path, typer.Option("--images", metavar="DIR", help="Folder of volumes.")],
    labels: Annotated[
        Path,
        typer.Option("--labels", metavar="DIR", help="Folder of label maps with the names of their volumes."),
    ],
    output: options.OutputFile,
    cases: Annotated[
        list[str] | None,
        typer.Option("--cases", metavar="NAME,NAME", help="Volumes to use; without it all that have labels."),
    ] = None,
    slices: options.CompleteSlices = None,
    partial: options.PartialSlices = None,
    empty: options.EmptySlices = None,
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
    """Train a segmentation model on a few labelled slices.

    Without any slice named, every slice of a case counts as complete; with one, only those named count.
    """
    seconds = options.parse_duration(time_budget) if time_budget is not None else None
    given = {"steps": steps, "time_budget": seconds, "seed": seed, "holdout": holdout}
    chosen = choose_settings(
        preset,
        config,
        assignments,
        {"finetune": given, "model": {"architecture": network}},
        reads=("slices", "keypoints", "model", "finetune"),
    )
    marks = options.slice_marks(slices, partial, empty)
    names = [name for text in cases for name in text.split(",")] if cases is not None else None
    named = options.parse_classes(classes) if classes is not None else None

    from kaf_model.cases import check_named, read_cases
    from kaf_model.checkpoint import load_checkpoint
    from kaf_model.finetune import finetune as finetune_on
    from kaf_model.keypoints import KeypointCache
    from kaf_model.label_names import class_names
    from kaf_model.labels import SliceStatus
    from kaf_model.volume_queue import VolumeFiles

    if start is not None and start.resolve() == output.resolve():
        raise UserError(f"{output} is the start and would be overwritten; give another output")
    _check_interrupted(output, resume)
    out = Output()
    fabric = _fabric(device, precision)
    if fabric.device.type == "cuda":
        chosen = chosen.on_a_gpu()
    origin = load_checkpoint(start) if start is not None else None
    model: ModelConfig | None = chosen.fresh_model()
    if origin is not None:
        asked = chosen.asked_for("model")
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
    say_notice(out, cache.notice)
    out.line(f"next: kaf segment VOLUME_OR_DIR --model {output} -o OUT")


def _check_interrupted(output: Path, resume: bool) -> None:
    """Refuse to begin anew where an interrupted training waits to be resumed."""
    from kaf_model.training_files import resume_path

    if not resume and resume_path(output).is_file():
        raise UserError(
            f"{output} is of an interrupted training: go on with --resume, give another output, or remove "
            f"{resume_path(output)} to start over"
        )


def _fabric(device: str, precision: str) -> Fabric:
    from kaf_model.engine import make_fabric

    chosen = one_of("precision", precision, ("auto", "float32"))
    return make_fabric(device, precision="float32" if chosen == "float32" else "auto")


def _train(out: Output, work: Generator[Progress, None, Result], path: Path) -> Result:
    from kaf_model.engine import leave_processes

    try:
        return out.run(work)
    except Interrupted as stop:
        stop.path = path
        raise
    finally:
        leave_processes()


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


def say_notice(out: Output, notice: str | None) -> None:
    """Print what the keypoint cache has to say, if anything."""
    if notice:
        out.line(notice)
