"""`kaf explore-report`: numbers on what networks see, over a folder of volumes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kaf_model import cli_options as options
from kaf_model.cli_progress import Output
from kaf_model.cli_views import Models, Seed, Untrained, load_explorers, parse_numbers
from kaf_model.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kaf_model.volume import Volume


def explore_report(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="DIR_OR_FILES...", help="Volumes: files, folders, DICOM folders.")
    ],
    models: Models = None,
    untrained: Untrained = False,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="DIR",
            help="Folder of label maps with the names of their volumes, for the share of keypoints on foreground; "
            "volumes without one are measured without it.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="CSV with a line for each number.")
    ] = None,
    radii: Annotated[
        str, typer.Option("--radii", metavar="5,10,20", help="Manhattan radii in pixels.")
    ] = "5,10,20,30,40",
    slices: Annotated[
        int,
        typer.Option(
            "--slices",
            metavar="N",
            min=1,
            help="Slices of each volume on which known transforms are measured.",
        ),
    ] = 3,
    points: Annotated[
        int, typer.Option("--points", metavar="N", min=2, help="Random points on each of these slices.")
    ] = 16,
    preset: options.Preset = None,
    seed: Seed = 0,
    device: options.Device = "auto",
    frame: options.Frame = None,
    slice_axis: options.SliceAxis = None,
    fill_nan: options.FillNan = None,
) -> None:
    """Measure keypoints, matches and equivariance of networks on a folder of volumes."""
    chosen = parse_numbers("--radii", radii)
    if min(chosen) <= 0:
        raise UserError(f"--radii are above 0, got {radii}")
    if not models and not untrained:
        raise UserError("give at least one --model FILE, or --untrained")
    if labels is not None and not labels.is_dir():
        raise UserError(f"labels: there is no folder {labels}")

    from kaf_model.explore.report import explore_report as measure
    from kaf_model.keypoints import KeypointCache
    from kaf_model.volume_queue import VolumeFiles

    volumes = VolumeFiles(inputs, frame=frame, slice_axis=slice_axis, fill_nan=fill_nan)
    out = Output()
    report = out.run(
        measure(
            load_explorers(models or [], untrained, preset, seed, device),
            volumes,
            labels_of=None if labels is None else _Labels(labels),
            radii=chosen,
            slices_per_volume=slices,
            num_points=points,
            seed=seed,
            cache=KeypointCache(),
        )
    )
    for notice in report.notices:
        out.line(notice)
    out.line(report.table())
    if output is not None:
        report.to_csv(output)
        out.line(f"wrote {output}: {len(report.numbers)} lines")


class _Labels:
    """The label maps of a folder, by the names of their volumes."""

    def __init__(self, folder: Path) -> None:
        from kaf_model.volume import find_volumes, volume_name

        self.files = {volume_name(path): path for path in find_volumes([folder])}
        if not self.files:
            raise UserError(f"labels: there is no volume in {folder}")

    def __call__(self, volume: Volume) -> NDArray[np.integer] | None:
        from kaf_model.volume import read_labels

        path = self.files.get(volume.name)
        return None if path is None else read_labels(path, like=volume)
