"""Readers of data sets on small trees of their layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import nibabel as nib
import numpy as np
import pytest

from kaf_model.benchmark.cohort import natural_key, patient_number, read_case
from kaf_model.benchmark.datasets import LAYOUTS
from kaf_model.benchmark.datasets.phantom import NUM_SUBJECTS
from kaf_model.benchmark.plan import Layout
from kaf_model.errors import UserError


def volume(path: Path, value: int = 1) -> None:
    """Write a small file of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.full((6, 5, 3), value, np.uint8), np.diag([1.5, 1.5, 8.0, 1.0])), path)


def test_every_layout_that_a_plan_can_name_has_a_reader() -> None:
    assert set(LAYOUTS) == set(get_args(Layout))


def acdc_patient(folder: Path, number: int, systole: int = 12) -> None:
    patient = folder / f"patient{number:03d}"
    for frame in (1, systole):
        volume(patient / f"patient{number:03d}_frame{frame:02d}.nii.gz")
        volume(patient / f"patient{number:03d}_frame{frame:02d}_gt.nii.gz")
    volume(patient / f"patient{number:03d}_4d.nii.gz")
    (patient / "Info.cfg").write_text(f"ED: 1\nES: {systole}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\n")


@pytest.mark.parametrize("inside", ["training", "database/training", "."])
def test_acdc_as_distributed(tmp_path: Path, inside: str) -> None:
    acdc_patient(tmp_path / inside, 10, systole=9)
    acdc_patient(tmp_path / inside, 2)
    cohort = LAYOUTS["acdc"](tmp_path)
    assert [case.name for case in cohort.cases] == [
        "patient002_frame01",
        "patient002_frame12",
        "patient010_frame01",
        "patient010_frame09",
    ]
    assert cohort.patients == ("patient002", "patient010")
    assert cohort.classes == {1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
    assert all(case.labels and case.labels.name == f"{case.name}_gt.nii.gz" for case in cohort.cases)


def test_acdc_says_what_is_missing(tmp_path: Path) -> None:
    acdc_patient(tmp_path, 1)
    (tmp_path / "patient001" / "patient001_frame12.nii.gz").unlink()
    with pytest.raises(UserError, match=r"names frame 12, but there is no patient001_frame12"):
        LAYOUTS["acdc"](tmp_path)
    (tmp_path / "patient001" / "Info.cfg").write_text("Group: DCM\n")
    with pytest.raises(UserError, match="names no frame"):
        LAYOUTS["acdc"](tmp_path)
    (tmp_path / "patient001" / "Info.cfg").unlink()
    with pytest.raises(UserError, match=r"Info\.cfg cannot be read"):
        LAYOUTS["acdc"](tmp_path)


def test_pairs_keep_the_frames_of_a_patient_together(tmp_path: Path) -> None:
    for name in ("patient007_frame01", "patient007_frame13", "heart_3"):
        volume(tmp_path / "images" / f"{name}.nii.gz")
        volume(tmp_path / "labels" / f"{name}.nii.gz")
    volume(tmp_path / "images" / "alone.nii.gz")
    (tmp_path / "labels" / "labels.json").write_text('{"0": "background", "4": "liver"}')
    cohort = LAYOUTS["pairs"](tmp_path)
    assert cohort.patients == ("heart_3", "patient007")
    assert [case.name for case in cohort.labelled(["patient007"])] == [
        "patient007_frame01",
        "patient007_frame13",
    ]
    assert [case.name for case in cohort.images(without=["patient007"])] == ["alone", "heart_3"]
    assert cohort.classes == {4: "liver"}


def test_imagechd(tmp_path: Path) -> None:
    for number in (1002, 1001):
        volume(tmp_path / "ImageCHD_dataset" / f"ct_{number}_image.nii.gz")
        volume(tmp_path / "ImageCHD_dataset" / f"ct_{number}_label.nii.gz", 7)
    (tmp_path / "ImageCHD_dataset" / "imageCHD_dataset_image.xlsx").touch()
    cohort = LAYOUTS["imagechd"](tmp_path)
    assert cohort.patients == ("ct_1001", "ct_1002")
    assert cohort.classes[7] == "pulmonary artery"
    assert len(cohort.classes) == 7


@pytest.mark.parametrize("inside", ["RawData", "."])
def test_synapse(tmp_path: Path, inside: str) -> None:
    root = tmp_path / inside
    for number in (1, 22):
        volume(root / "Training" / "img" / f"img{number:04d}.nii.gz")
        volume(root / "Training" / "label" / f"label{number:04d}.nii.gz", 13)
    volume(root / "Testing" / "img" / "img0061.nii.gz")
    cohort = LAYOUTS["synapse"](tmp_path)
    assert cohort.patients == ("img0001", "img0022")
    assert [case.name for case in cohort.cases if case.labels is None] == ["img0061"]
    assert len(cohort.classes) == 13


def test_decathlon(tmp_path: Path) -> None:
    for number in (2, 1):
        volume(tmp_path / "imagesTr" / f"liver_{number}.nii.gz")
        volume(tmp_path / "labelsTr" / f"liver_{number}.nii.gz", 2)
    volume(tmp_path / "imagesTr" / "._liver_1.nii.gz")
    volume(tmp_path / "imagesTs" / "liver_3.nii.gz")
    content = {
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "training": [
            {"image": f"./imagesTr/liver_{number}.nii.gz", "label": f"./labelsTr/liver_{number}.nii.gz"}
            for number in (2, 1)
        ],
        "test": ["./imagesTs/liver_3.nii.gz"],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    cohort = LAYOUTS["decathlon"](tmp_path)
    assert [case.name for case in cohort.cases] == ["liver_1", "liver_2", "liver_3"]
    assert cohort.patients == ("liver_1", "liver_2")
    assert cohort.classes == {1: "liver", 2: "cancer"}
    assert (read_case(cohort.cases[1]).labels == 2).all()
    assert (read_case(cohort.cases[1], classes={1: "liver"}).labels == 0).all()
    (tmp_path / "labelsTr" / "liver_2.nii.gz").unlink()
    with pytest.raises(UserError, match=r"labelsTr/liver_2\.nii\.gz, which does not exist"):
        LAYOUTS["decathlon"](tmp_path)


@pytest.mark.parametrize("text", ["not json", "{}", '{"training": [1]}', '{"training": [{"image": "a"}]}'])
def test_a_broken_dataset_json_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json must list"):
        LAYOUTS["decathlon"](tmp_path)


def test_phantoms_are_drawn_once(tmp_path: Path) -> None:
    cohort = LAYOUTS["phantom"](tmp_path)
    assert len(cohort.patients) == NUM_SUBJECTS
    written = (tmp_path / "images" / "heart_000.nii.gz").stat().st_mtime_ns
    assert LAYOUTS["phantom"](tmp_path) == cohort
    assert (tmp_path / "images" / "heart_000.nii.gz").stat().st_mtime_ns == written


@pytest.mark.parametrize("layout", ["acdc", "imagechd", "synapse"])
def test_a_folder_of_another_layout_is_refused(tmp_path: Path, layout: str) -> None:
    volume(tmp_path / "scan.nii.gz")
    with pytest.raises(UserError, match=r"there is no labelled volume in .*; expected"):
        LAYOUTS[layout](tmp_path)


def test_numbers_in_names() -> None:
    assert sorted(["case10", "case2", "case"], key=natural_key) == ["case", "case2", "case10"]
    assert patient_number("study2_patient007") == 7
    with pytest.raises(UserError, match="no number"):
        patient_number("anna")


def test_the_real_hearts(acdc: Path) -> None:
    cohort = LAYOUTS["pairs"](acdc)
    assert len(cohort.patients) == 40
    assert len(cohort.cases) == 80
