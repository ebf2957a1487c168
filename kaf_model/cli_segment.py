"""The commands that show the main job, apply a trained model and score it: demo, segment and evaluate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kaf_model import cli_options as options
from kaf_model.cli_options import duration_text
from kaf_model.cli_progress import Interrupted, Output
from kaf_model.cli_propagate import say_open_ends
from kaf_model.cli_settings import choose_settings
from kaf_model.cli_train import say_notice
from kaf_model.errors import UserError


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
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="DIR",
            help="Folder of label maps of these volumes: slices named by --slices or --empty are kept, and what they "
            "show is carried to the other slices of their volume.",
        ),
    ] = None,
    slices: options.CompleteSlices = None,
    empty: options.EmptySlices = None,
    atlas_images: Annotated[
        Path | None,
        typer.Option(
            "--atlas-images",
            metavar="DIR",
            help="Folder of volumes that are labelled throughout, such as the model was finetuned on: they are "
            "registered to each volume, and what they bring is joined with what the model says. Two or more, whose "
            "slices lie at most two pixels apart.",
        ),
    ] = None,
    atlas_labels: Annotated[
        Path | None,
        typer.Option(
            "--atlas-labels",
            metavar="DIR",
            help="Folder of their label maps, with the names of their volumes.",
        ),
    ] = None,
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
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            metavar="",
            help="Leave label maps that are already in OUT, and segment the other volumes.",
        ),
    ] = False,
    largest_component: Annotated[
        str | None,
        typer.Option(
            "--largest-component",
            metavar="learned|all|none",
            help="Keep only the largest piece of classes that were labelled in one piece, of all, or of none.",
        ),
    ] = None,
    orientation: Annotated[
        str | None,
        typer.Option(
            "--orientation",
            metavar="fixed|best|average",
            help="Slices as they lie, turned to where the model contradicts itself least, or averaged around that.",
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
    marks = options.slice_marks(slices, None, empty)
    if (labels is None) == any(marks.values()):
        raise UserError(
            "--labels needs --slices or --empty to say which slices are finished, and they need it"
        )
    if (atlas_images is None) != (atlas_labels is None):
        raise UserError(
            "--atlas-images and --atlas-labels need each other: the volumes, and their label maps"
        )
    for text in assignments or ():
        if not text.strip().startswith("segment."):
            raise UserError(f"--set {text}: the model brings its own; only segment.FIELD can be set here")
    switches = {"probabilities": probabilities, "uncertainty": uncertainty, "flips": flips}
    chosen = {"largest_component": largest_component, "orientation": orientation}
    given = {**chosen, **{name: on or None for name, on in switches.items()}}
    recipe = choose_settings(None, config, assignments, {"segment": given}).recipe

    from kaf_model.cases import read_cases
    from kaf_model.checkpoint import load_model
    from kaf_model.engine import choose_device
    from kaf_model.keypoints import KeypointCache
    from kaf_model.labels import SliceStatus
    from kaf_model.segment_files import (
        check_known,
        plan_outputs,
        read_atlases,
        segment_files,
        write_class_names,
    )
    from kaf_model.volume import volume_name

    if overwrite and skip_existing:
        raise UserError(
            "--overwrite replaces label maps that are there, --skip-existing leaves them: give one"
        )
    planned = plan_outputs(source, output, overwrite=overwrite or skip_existing)
    for drawn in (labels, atlas_labels):
        if drawn is not None and any(plan.labels.resolve().parent == drawn.resolve() for plan in planned):
            raise UserError(f"{drawn} holds what was drawn; write the label maps into another folder")
    todo = [plan for plan in planned if not (skip_existing and plan.labels.exists())]
    loaded = load_model(model, device=choose_device(device))
    out = Output()
    started = time.monotonic()
    cache = KeypointCache()
    reading: dict[str, Any] = {"frame": frame, "slice_axis": slice_axis, "fill_nan": fill_nan}
    known = {}
    if labels is not None:
        images = source if len(planned) > 1 or planned[0].volume != source else source.parent
        statuses = {SliceStatus(status): named for status, named in marks.items()}
        for case in out.run(read_cases(images, labels, marks=statuses, tell_unpaired=False, **reading)):
            known[case.volume.name] = case
        unused = sorted(known.keys() - {volume_name(plan.volume) for plan in planned})
        if unused:
            raise UserError(f"slices of {unused[0]} are named, which is not segmented")
        check_known(known.values(), loaded)
    if not todo:
        out.line(f"all {len(planned)} label maps are there: {output}")
        return
    atlases = None
    if atlas_images is not None and atlas_labels is not None and recipe.segment.registration:
        same = {"slice_axis": slice_axis, "fill_nan": fill_nan}
        atlases = out.run(read_atlases(loaded, recipe.segment, atlas_images, atlas_labels, **same))
    work = segment_files(
        loaded, todo, recipe.segment, labelled=known, atlases=atlases, cache=cache, **reading
    )
    try:
        done = out.run(work)
    except Interrupted as stop:
        stop.advice = "interrupted; the same line does it again"
        if len(planned) > 1 and not overwrite:
            stop.advice = "interrupted; label maps that are written stay: go on with --skip-existing"
        raise
    for plan in todo:
        if volume_name(plan.volume) in known:
            say_open_ends(out, known[volume_name(plan.volume)])
    if planned[0].labels != output:
        kept = write_class_names(output, loaded.classes, overwrite=overwrite)
        if kept:
            out.line(kept)
    there = f", {len(planned) - len(todo)} were there" if len(todo) < len(planned) else ""
    failed = f", {len(done.failed)} failed" if done.failed else ""
    took = duration_text(time.monotonic() - started)
    out.line(f"segmented {len(done.written)} of {len(planned)} volumes in {took}{there}{failed}: {output}")
    say_notice(out, cache.notice)


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
    frame: options.Frame = None,
) -> None:
    """Compare label maps with reference label maps: Dice, HD95 in mm, volumes in ml."""
    named = options.parse_classes(classes) if classes is not None else None

    from kaf_model.evaluate import evaluate_folders

    out = Output()
    scores = out.run(evaluate_folders(predictions, references, classes=named, frame=frame))
    out.line(scores.table().rstrip())
    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            scores.to_csv(output)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror}; choose another place") from error
        out.line(f"wrote {output}: {len(scores.rows)} lines")
