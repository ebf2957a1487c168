"""The command that carries labels from finished slices to the others, without any model: propagate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kaf_model import cli_options as options
from kaf_model.cli_progress import Output
from kaf_model.errors import UserError

if TYPE_CHECKING:
    from kaf_model.labels import LabelledVolume


def propagate(
    images: Annotated[Path, typer.Option("--images", metavar="DIR", help="Folder of volumes.")],
    labels: Annotated[
        Path,
        typer.Option("--labels", metavar="DIR", help="Folder of label maps with the names of their volumes."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to: DIR/NAME.nii.gz.")
    ],
    slices: options.CompleteSlices = None,
    empty: options.EmptySlices = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace label maps that are already there.")
    ] = False,
    frame: options.Frame = None,
    slice_axis: options.SliceAxis = None,
    fill_nan: options.FillNan = None,
) -> None:
    """Carry the labels of finished slices to the other slices of their volumes, in seconds and without a model.

    A beginning for volumes of which a few slices are labelled; kaf finetune and kaf segment --labels go on
    from there.
    """
    marks = options.slice_marks(slices, None, empty)
    if not any(marks.values()):
        raise UserError("say which slices are finished, such as --slices patient_01:3,5,7")

    from kaf_model.cases import read_cases
    from kaf_model.checkpoint import ClassLabel
    from kaf_model.config import SliceConfig
    from kaf_model.label_names import class_names
    from kaf_model.labels import ClassMap, SliceStatus
    from kaf_model.propagation import propagate as propagate_case
    from kaf_model.segment_files import volumes_ml
    from kaf_model.volume import find_volumes, same_grid, volume_name, write_labels

    out = Output()
    statuses = {SliceStatus(status): named for status, named in marks.items()}
    reading: dict[str, Any] = {"frame": frame, "slice_axis": slice_axis, "fill_nan": fill_nan}
    cases = out.run(read_cases(images, labels, marks=statuses, **reading))
    targets = {case.volume.name: output / f"{case.volume.name}.nii.gz" for case in cases}
    if output.resolve() == labels.resolve():
        raise UserError(f"{labels} holds what was drawn; write the label maps into another folder")
    for target in targets.values():
        if target.exists() and not overwrite:
            raise UserError(f"{target} exists; give another folder, or --overwrite to replace label maps")
    for volume in find_volumes([images]):
        if (output / f"{volume_name(volume)}.nii.gz").resolve() == volume.resolve():
            raise UserError(f"{volume} is an input and would be overwritten; give another folder")
    names = class_names(labels)
    for case in cases:
        classes = ClassMap.of_labels([case], None)
        values = [int(value) for value in classes.values]
        carried = out.run(propagate_case(case, values, SliceConfig()))
        if carried is None:
            raise UserError(
                f"the finished slices of {case.volume.name} show no structure; name one that does"
            )
        found, target = carried.labels(), targets[case.volume.name]
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {output}: {error.strerror}; choose another place") from error
        write_labels(target, found, like=case.volume)
        differences = same_grid(target, like=case.volume)
        grid = (
            f"NOT on the grid of the source: {'; '.join(differences)}"
            if differences
            else "same grid as source"
        )
        shown = [ClassLabel(value, names.get(value, f"class {value}")) for value in values]
        out.line(f"{target}: {volumes_ml(found, case.volume, shown)}; {grid}")
        say_open_ends(out, case)


def say_open_ends(out: Output, case: LabelledVolume) -> None:
    """Say on which sides of a volume nothing shows where its structures end, and what to do."""
    from kaf_model.labels import open_ends

    ends = open_ends(case.labels, case.finished)
    if ends:
        out.line(
            f"  where structures end {' and '.join(ends)} is a guess: if they do, name the first slice without "
            f"any, --empty {case.volume.name}:Z"
        )
