"""Labelled volumes that are registered to a volume help to segment it: arithmetic, files, command line, benchmark."""

import csv
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from atlas_cases import CLASSES, CONFIG, done, subject, whole

from kaf_model.atlases import LEAST_SHARE, Atlases, AtlasLabels
from kaf_model.benchmark.plan import Plan
from kaf_model.benchmark.runner import run_benchmark
from kaf_model.checkpoint import Model
from kaf_model.cli import main
from kaf_model.config import KeypointConfig, ModelConfig, SegmentConfig
from kaf_model.evaluate import evaluate_volume
from kaf_model.prediction import predict_slices
from kaf_model.segment import segment, segment_volume
from kaf_model.segment_files import plan_outputs, segment_files
from kaf_model.unet import build_network
from kaf_model.volume import read_labels, read_volume

NAMES = {label.value: label.name for label in CLASSES.classes[1:]}
SIMPLE = SegmentConfig(largest_component="none")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Registered in a few steps: these images lie near to each other."""
    monkeypatch.setattr("kaf_model.registration._AFFINE_STEPS", 25)
    monkeypatch.setattr("kaf_model.registration._LEVELS", ((2, 4, 5), (1, 2, 2)))


@pytest.fixture(scope="module")
def model():
    """A network that knows nothing."""
    config = ModelConfig(architecture="unet", start_channels=4, num_classes=len(CLASSES))
    torch.manual_seed(0)
    network = build_network(config).eval()
    return Model(network, config, CONFIG, KeypointConfig(), CLASSES.classes)


def two_atlases():
    cases = [whole(*subject()), whole(*subject((1, -2, 1), name="w"))]
    return Atlases(cases, CLASSES, CONFIG, most=3)


def dice(labels, truth):
    """The lower Dice of the two structures."""
    scores = evaluate_volume(labels, truth, spacing=(1, 1, 1), voxel_ml=1, classes=NAMES, volume="v")
    return min(score.dice for score in scores)


def write(path, array, spacing=(1, 1, 1)):
    """An array (Z, Y, X) as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), np.diag([*spacing[::-1], 1.0])), path)


def messages(work):
    return [report.message for report in work if report.message]


def test_what_atlases_say_multiplies_what_the_network_says():
    shares = torch.tensor([0.2, 0.8, 0.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2).half()
    brought = AtlasLabels((4, 5, 6), (slice(1, 2), slice(2, 4), slice(0, 2)), shares)
    maps = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0)).softmax(1)
    found = brought.fused(maps, [1, 3], weight=2.0)
    said = (
        torch.tensor([1.0, LEAST_SHARE, LEAST_SHARE]).view(1, 3, 1, 1).repeat(2, 1, 5, 6)
    )  # nothing: background
    said[0, :, 2:4, 0:2] = torch.tensor([0.2, 0.8, LEAST_SHARE]).view(3, 1, 1)
    product = maps * said**2
    torch.testing.assert_close(found, product / product.sum(1, keepdim=True), rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(brought.fused(maps, [1, 3], weight=0.0), maps, rtol=1e-4, atol=1e-5)


def test_the_likeliest_channel_fills_the_box_and_background_the_rest():
    shares = torch.tensor([[0.5, 0.1], [0.3, 0.3], [0.2, 0.6]]).view(3, 1, 1, 2).half()
    channels = AtlasLabels((2, 3, 4), (slice(1, 2), slice(0, 1), slice(2, 4)), shares).channels()
    assert channels.shape == (2, 3, 4)
    assert np.argwhere(channels).tolist() == [[1, 0, 3]]
    assert channels[1, 0, 3] == 2


def test_shares_sum_to_one():
    brought = done(two_atlases().labels_of(subject((0, 1, 1))[0]))
    assert torch.allclose(brought.shares.float().sum(0), torch.ones(1), atol=2e-3)
    assert brought.shares.min() > -1e-3


def test_atlases_help_a_network_as_much_as_their_weight_says(model):
    volume, truth = subject((-1, 2, 1), name="u")
    brought = done(two_atlases().labels_of(volume))
    alone = segment_volume(model, volume, SIMPLE.override(orientation="fixed"))
    helped = done(segment(model, volume, SIMPLE, atlas_labels=brought)).labels
    assert dice(alone, truth) < 0.5
    assert dice(helped, truth) > 0.9
    without = done(segment(model, volume, SIMPLE.override(registration=0), atlas_labels=brought)).labels
    assert np.array_equal(without, alone)


@pytest.mark.parametrize(("orientation", "expected"), [("best", (0.0,)), ("average", (0.0, -30.0, 30.0))])
def test_no_angle_is_looked_for_in_a_volume_that_atlases_fit(model, monkeypatch, orientation, expected):
    asked = set()

    def spying(*given, angles, **more):
        asked.add(tuple(angles))
        return predict_slices(*given, angles=angles, **more)

    monkeypatch.setattr("kaf_model.segment.predict_slices", spying)
    volume, _ = subject()
    brought = done(two_atlases().labels_of(volume))
    done(segment(model, volume, SIMPLE.override(orientation=orientation), atlas_labels=brought))
    assert asked == {expected}


@pytest.mark.parametrize(
    ("why", "spacing"),
    [
        ("lie too far apart", (5, 1, 1)),
        ("no labelled volume could", (1, 1, 1)),
        ("memory ran out", (1, 1, 1)),
    ],
)
def test_a_volume_that_cannot_be_reached_is_segmented_without_atlases(
    model, monkeypatch, tmp_path, why, spacing
):
    def register(moving, structure, fixed):
        yield
        if why == "memory ran out":
            raise torch.OutOfMemoryError("no room")

    atlases = two_atlases()
    monkeypatch.setattr("kaf_model.atlases.register", register)
    write(tmp_path / "u.nii.gz", subject()[0].array, spacing)
    volume = read_volume(tmp_path / "u.nii.gz")
    planned = plan_outputs(tmp_path / "u.nii.gz", tmp_path / "out.nii.gz")
    told = messages(segment_files(model, planned, SIMPLE, atlases=atlases))
    assert any(why in message and "u" in message and "segmented without them" in message for message in told)
    assert np.array_equal(
        read_labels(tmp_path / "out.nii.gz", like=volume), segment_volume(model, volume, SIMPLE)
    )


# Files and command line


@pytest.fixture
def folder(tmp_path, model):
    """A model, two labelled volumes, and one to segment."""
    for name, move in (("a", (0, 0, 0)), ("b", (1, -2, 1)), ("u", (-1, 2, 1))):
        volume, labels = subject(move, name=name)
        where = "others" if name == "u" else "images"
        write(tmp_path / where / f"{name}.nii.gz", volume.array)
        write(tmp_path / ("truth" if name == "u" else "labels") / f"{name}.nii.gz", labels)
    model.save(tmp_path / "model.safetensors")
    return tmp_path


def line(folder, *more, images="images", labels="labels"):
    atlases = ("--atlas-images", folder / images, "--atlas-labels", folder / labels)
    fixed = ("segment", folder / "others", "--model", folder / "model.safetensors", "-o", folder / "out")
    return [str(part) for part in (*fixed, *atlases, "--device", "cpu", *more)]


def segmented(folder):
    like = read_volume(folder / "others/u.nii.gz")
    return read_labels(folder / "out/u.nii.gz", like=like), read_labels(folder / "truth/u.nii.gz", like=like)


def test_labelled_volumes_are_given_as_folders(folder, capsys):
    assert main(line(folder)) == 0
    assert re.search(
        r"agree to a Dice of \d\.\d\d: enough to segment others by them", capsys.readouterr().out
    )
    assert dice(*segmented(folder)) > 0.9


def test_none_is_registered_with_a_weight_of_zero(folder, capsys):
    assert main(line(folder, "--set", "segment.registration=0")) == 0
    assert "labelled volumes" not in capsys.readouterr().out
    assert dice(*segmented(folder)) < 0.5


def test_labelled_volumes_that_do_not_fit_are_left_out_and_it_is_said(folder, capsys):
    volume, labels = subject((4, 5, 5), seed=1, name="b")
    write(folder / "images/b.nii.gz", volume.array)
    write(folder / "labels/b.nii.gz", labels)
    assert main(line(folder, "--set", "segment.least_agreement=0.95")) == 0
    assert "too little to segment others by them" in capsys.readouterr().out
    assert dice(*segmented(folder)) < 0.5


def test_mistakes_about_labelled_volumes_cost_nothing(folder, capsys):
    def error(arguments):
        assert main([str(argument) for argument in arguments]) == 2
        assert not list(folder.glob("out/*.nii.gz"))
        return capsys.readouterr().err

    whole_line = line(folder)
    place = whole_line.index("--atlas-labels")
    assert "need each other" in error(whole_line[:place] + whole_line[place + 2 :])
    assert "no folder" in error(line(folder, images="nowhere"))
    assert "holds what was drawn" in error([*line(folder, "--overwrite"), "-o", folder / "labels"])
    labels = subject()[1]
    write(folder / "labels/b.nii.gz", np.where(labels == 4, 9, labels).astype(np.int16))
    assert "label 9" in error(line(folder))
    (folder / "labels/b.nii.gz").unlink()
    assert "two or more" in error(line(folder))


# Benchmark


def test_a_benchmark_registers_what_it_has_labelled(tmp_path):
    for number, move in enumerate([(0, 0, 0), (1, -2, 1), (0, 1, 0), (-1, 2, 1)]):
        volume, labels = subject(move, name=f"v{number}")
        write(tmp_path / f"data/images/v{number}.nii.gz", volume.array)
        write(tmp_path / f"data/labels/v{number}.nii.gz", labels)
    alone = {"segment": {"registration": 0}}
    plan = Plan.model_validate(
        {
            "name": "tiny",
            "data": {"layout": "pairs", "classes": NAMES},
            "protocol": {"test": "last 1", "pool": "first 2"},
            "columns": {"patients": [2]},
            "settings": {
                "slices": {"spacing": None},
                "model": {"start_channels": 4},
                "finetune": {"augment": {"crop": [16, 16]}, "pseudo_labels": {"share": 0}, "batch_size": 2},
            },
            "budgets": {"finetune": {"steps": 2}},
            "rows": [
                {"name": "with", "network": "unet"},
                {"name": "without", "network": "unet", "settings": alone},
            ],
        }
    )
    reports = list(run_benchmark(plan, tmp_path / "data", tmp_path / "out"))
    assert "comparing labelled volumes" in [report.stage for report in reports]
    found = {}
    for row in ("with", "without"):
        (path,) = (tmp_path / "out/runs" / row).rglob("scores.csv")
        found[row] = min(float(score["dice"]) for score in csv.DictReader(path.read_text().splitlines()))
    assert found["with"] > 0.85
    assert found["without"] < 0.6
