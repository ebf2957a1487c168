"""`kaf figure keypoints | correspondences | similarity | segmentation | curves | compute`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kaf_model import cli_options as options
from kaf_model.cli_progress import Output
from kaf_model.cli_settings import choose_settings
from kaf_model.cli_views import (
    Distance,
    FigureFile,
    Levels,
    Models,
    OneModel,
    Seed,
    Slice,
    Title,
    Untrained,
    VolumeFile,
    check_levels,
    check_output,
    check_slices,
    load_explorers,
    named_files,
    parse_numbers,
    parse_whole,
    read,
    slice_or_middle,
    view_of,
    views_of,
    with_neighbour,
)
from kaf_model.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kaf_model.checkpoint import ClassLabel

figure_app = typer.Typer(
    help="Draw figures for a paper, as PNG, PDF or SVG by the ending of the file's name.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@figure_app.command()
def keypoints(
    source: VolumeFile,
    output: FigureFile,
    slices: Annotated[
        str | None,
        typer.Option(
            "--slices", metavar="3,4", help="Slices, from 0; without it the middle one and the next."
        ),
    ] = None,
    orientation: Annotated[
        bool, typer.Option("--orientation", metavar="", help="Also draw the orientation of each keypoint.")
    ] = False,
    model: OneModel = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    assignments: options.SetOptions = None,
    seed: Seed = 0,
    title: Title = "",
    frame: options.Frame = None,
    slice_axis: options.SliceAxis = None,
    fill_nan: options.FillNan = None,
) -> None:
    """Draw keypoints of slices before and after augmentation."""
    chosen = parse_whole("--slices", slices) if slices is not None else None
    view = view_of(output, source, model, preset, config, assignments, (frame, slice_axis, fill_nan))
    if chosen is None:
        chosen = with_neighbour(view.volume, None, 1) if view.volume.num_slices > 1 else [0]
    check_slices(view.volume, chosen)

    from kaf_model.figures.from_views import draw_keypoints_of

    figure = draw_keypoints_of(view, chosen, seed=seed, orientation=orientation, title=title)
    _save(figure, output, [f"slice {z}: {len(view.keypoints(z))} keypoints" for z in chosen])


@figure_app.command()
def correspondences(
    source: VolumeFile,
    output: FigureFile,
    slice_index: Slice = None,
    distance: Distance = 1,
    radius: Annotated[
        float | None,
        typer.Option(
            "--radius",
            metavar="PIXELS",
            min=0.1,
            help="Largest Manhattan distance; without it that of pretrain.correspondences, 30.",
        ),
    ] = None,
    radii: Annotated[
        str | None,
        typer.Option("--radii", metavar="5,10,20", help="Draw one panel for each of these radii instead."),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio",
            metavar="0-1",
            min=0.01,
            max=1.0,
            help="Lowe's ratio; without it that of pretrain.correspondences, off.",
        ),
    ] = None,
    probability: Annotated[
        float,
        typer.Option(
            "--probability", metavar="0-1", min=0.0, max=1.0, help="Least probability of a learned match."
        ),
    ] = 0.2,
    model: OneModel = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    assignments: options.SetOptions = None,
    seed: Seed = 0,
    title: Title = "",
    frame: options.Frame = None,
    slice_axis: options.SliceAxis = None,
    fill_nan: options.FillNan = None,
) -> None:
    """Draw which keypoints of two slices correspond, before and after augmentation.

    With a pretrained model that has a matcher, its learned matches are drawn beside them.
    """
    row = parse_numbers("--radii", radii) if radii is not None else None
    view = view_of(output, source, model, preset, config, assignments, (frame, slice_axis, fill_nan))
    z0, z1 = with_neighbour(view.volume, slice_index, distance)

    from kaf_model.figures.from_views import draw_correspondences_of, draw_radii_of

    rule = choose_settings(preset, config, assignments).recipe.pretrain.correspondences
    given = {"radius": radius, "ratio": ratio}
    rule = rule.override(**{name: value for name, value in given.items() if value is not None})
    if row is not None:
        figure = draw_radii_of(view, z0, z1, row, ratio=rule.ratio, title=title)
    else:
        figure = draw_correspondences_of(view, z0, z1, rule, seed=seed, probability=probability, title=title)
    _save(
        figure,
        output,
        [f"{axis.get_title()}: {axis.get_xlabel()}" for axis in figure.axes if axis.get_title()],
    )


@figure_app.command()
def similarity(
    source: VolumeFile,
    output: FigureFile,
    models: Models = None,
    untrained: Untrained = False,
    slice_index: Slice = None,
    point: Annotated[
        str | None,
        typer.Option(
            "--point",
            metavar="Y,X",
            help="The point as a voxel of the slice; without it the strongest keypoint that stays in view.",
        ),
    ] = None,
    levels: Levels = "3,4",
    neighbours: Annotated[
        str | None,
        typer.Option(
            "--neighbours",
            metavar="1,2",
            help="Draw the maps on the slice and on those so many slices away, instead of augmentations.",
        ),
    ] = None,
    points: Annotated[
        int, typer.Option("--points", metavar="N", min=2, help="Random points for the mean error.")
    ] = 32,
    preset: options.Preset = None,
    seed: Seed = 0,
    title: Title = "",
    device: options.Device = "auto",
    frame: options.Frame = None,
    slice_axis: options.SliceAxis = None,
    fill_nan: options.FillNan = None,
) -> None:
    """Draw what is similar to a point for several models, under two augmentations or on neighbouring slices.

    Under each model stands the mean equivariance error over random points.
    """
    place = parse_numbers("--point", point) if point is not None else None
    if place is not None and len(place) != 2:
        raise UserError(f"--point is Y,X such as 120,96; got {point!r}")
    wanted = parse_whole("--levels", levels)
    steps = parse_whole("--neighbours", neighbours) if neighbours is not None else None
    check_levels(wanted)
    check_output(output)
    if not models and not untrained:
        raise UserError("give at least one --model FILE, or --untrained")
    explorers = load_explorers(models or [], untrained, preset, seed, device)
    volume = read(source, frame, slice_axis, fill_nan)
    views = views_of(explorers, volume)
    z = slice_or_middle(volume, slice_index)

    from kaf_model.figures.from_views import draw_neighbours_of, draw_similarity_of

    lines = [f"{name}: {explorer.note}" for name, explorer in explorers.items()]
    if steps is not None:
        chosen = [z, *(z + step for step in steps)]
        check_slices(volume, chosen)
        figure = draw_neighbours_of(views, chosen, point=place, levels=wanted, title=title)
    else:
        figure = draw_similarity_of(
            views, z, point=place, levels=wanted, num_points=points, seed=seed, title=title
        )
    _save(figure, output, lines)


@figure_app.command()
def segmentation(
    source: VolumeFile,
    output: FigureFile,
    labels: Annotated[
        Path, typer.Option("--labels", metavar="FILE", help="The true labels, on the grid of the volume.")
    ],
    models: Models = None,
    slices: Annotated[
        str | None,
        typer.Option(
            "--slices",
            metavar="3,5,7",
            help="Slices, from 0; without it three from base to apex of what is labelled.",
        ),
    ] = None,
    title: Title = "",
    device: options.Device = "auto",
    frame: options.Frame = None,
    slice_axis: options.SliceAxis = None,
    fill_nan: options.FillNan = None,
) -> None:
    """Draw what several finetuned models segment beside the truth, with the Dice of each slice."""
    chosen = parse_whole("--slices", slices) if slices is not None else None
    check_output(output)
    if not models:
        raise UserError("give at least one finetuned checkpoint with --model FILE")

    import numpy as np

    from kaf_model.checkpoint import load_model
    from kaf_model.engine import choose_device
    from kaf_model.figures import segmentation_comparison
    from kaf_model.segment import segment
    from kaf_model.volume import read_labels

    named = {
        name: load_model(path, device=choose_device(device)) for name, path in named_files(models).items()
    }
    volume = read(source, frame, slice_axis, fill_nan)
    truth = read_labels(labels, like=volume)
    if chosen is None:
        painted = np.flatnonzero(truth.any(axis=(1, 2)))
        if not len(painted):
            raise UserError(f"nothing is labelled in {labels}; choose slices with --slices")
        chosen = np.unique(np.linspace(painted[0], painted[-1], 5).round().astype(int)[1:-1]).tolist()
    check_slices(volume, chosen)
    out = Output()
    predictions = {}
    for name, loaded in named.items():
        predictions[name] = out.run(segment(loaded, volume)).labels[
            chosen
        ]  # cleaned, as kaf segment writes it
    figure = segmentation_comparison(
        volume.array[chosen],
        truth[chosen],
        predictions,
        classes=_classes([label for one in named.values() for label in one.classes], truth[chosen]),
        spacing=volume.spacing[1:],
        slice_names=[f"slice {z}" for z in chosen],
        title=title,
    )
    _save(figure, output, [])


@figure_app.command()
def curves(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]FILE...", help="Checkpoints; each holds the curves of its trainings."),
    ],
    output: FigureFile,
    title: Title = "",
) -> None:
    """Draw losses, and Dice on held-out slices, against the step of trainings."""
    check_output(output)

    from kaf_model.checkpoint import load_header
    from kaf_model.figures import curves_figure

    found = {}
    for name, path in named_files(runs).items():
        records = [record for record in load_header(path).get("history", ()) if record.get("curve")]
        if not records:
            raise UserError(
                f"{path} holds no curve: it was written by an older version or never trained here"
            )
        for stage, record in zip(_numbered([record["stage"] for record in records]), records, strict=True):
            found[name if len(records) == 1 else f"{name}, {stage}"] = record["curve"]
    _save(curves_figure(found, title=title), output, [])


@figure_app.command()
def compute(
    output: FigureFile,
    edges: Annotated[
        str, typer.Option("--edges", metavar="128,256", help="Edges of the slice in pixels, divisible by 32.")
    ] = "128,192,256,352,512",
    blocks: Annotated[
        str,
        typer.Option(
            "--blocks", metavar="20,100", help="Attention blocks in the whole network, divisible by 4."
        ),
    ] = "20,100",
    num_keypoints: Annotated[
        int, typer.Option("--keypoints", metavar="N", min=1, help="Keypoints of the slice.")
    ] = 400,
    training: Annotated[
        bool,
        typer.Option(
            "--training", metavar="", help="Measure a forward and backward pass, not a forward pass alone."
        ),
    ] = False,
    preset: Annotated[
        str, typer.Option("--preset", metavar="NAME", help="Preset of the KAF-UNet.")
    ] = "paper-acdc",
    device: options.Device = "auto",
    title: Title = "",
) -> None:
    """Measure and draw operations and memory of the KAF-UNet and a SwinUNETR against the size of the slice."""
    sizes, counts = parse_whole("--edges", edges), parse_whole("--blocks", blocks)
    check_output(output)
    recipe = choose_settings(preset, None, None, {}).recipe

    from kaf_model.compute import DEVICES, measure_costs
    from kaf_model.engine import choose_device
    from kaf_model.figures import compute_figure

    out = Output()
    where = choose_device(device)
    if device == "auto" and where.type not in DEVICES:
        where = choose_device("cpu")
    costs = out.run(
        measure_costs(
            recipe.model,
            edges=sizes,
            blocks=counts,
            num_keypoints=num_keypoints,
            training=training,
            device=where,
        )
    )
    lines = ["network      blocks   edge    GFLOP   MiB at most   parameters"]
    lines += [
        f"{cost.network:<12} {cost.blocks:>6} {cost.edge:>6} {cost.gflops:>8.1f} {cost.memory_mib:>13.0f} "
        f"{cost.parameters:>12,}"
        for cost in costs
    ]
    _save(compute_figure(costs, title=title), output, lines)


def _numbered(stages: Sequence[str]) -> list[str]:
    """The stages with a number behind those that come more than once."""
    return [
        stage if stages.count(stage) == 1 else f"{stage} {stages[: place + 1].count(stage)}"
        for place, stage in enumerate(stages)
    ]


def _classes(classes: Sequence[ClassLabel], truth: object) -> dict[int, str]:
    """Names of the classes of models, the first one's where they differ, and values that only the truth has."""
    import numpy as np

    named = {label.value: label.name for label in reversed(classes) if label.value}
    others = {
        int(value): str(value) for value in np.unique(np.asarray(truth)) if value and value not in named
    }
    return dict(sorted((named | others).items()))


def _save(figure: Figure, output: Path, lines: Sequence[str]) -> None:
    from kaf_model.figures.style import save_figure

    out = Output()
    for line in lines:
        out.line(line)
    save_figure(figure, output)
    out.line(f"wrote {output}")
