"""CHD and ImageCHD: CT of congenital heart disease, `ct_1001_image.nii.gz` beside `ct_1001_label.nii.gz`.

Xu et al., "Whole heart and great vessel segmentation in congenital heart disease using deep neural networks
and graph matching", MICCAI 2019 (68 patients, the paper's CHD), and "ImageCHD", MICCAI 2020 (110 patients).
"""

from __future__ import annotations

from pathlib import Path

from kaf_model.benchmark.cohort import Case, Cohort, cohort_of
from kaf_model.volume_files import format_of, volume_name

CLASSES = {
    1: "left ventricle",
    2: "right ventricle",
    3: "left atrium",
    4: "right atrium",
    5: "myocardium",
    6: "aorta",
    7: "pulmonary artery",
}


def read_imagechd(folder: Path) -> Cohort:
    """Find images and label maps in a folder or those below it; one volume a patient.

    Raises:
        UserError: If there are none.
    """
    cases = []
    for image in sorted(folder.rglob("*_image.*")):
        ending = format_of(image)[1]
        if not ending or image.name.startswith("."):
            continue
        name = volume_name(image).removesuffix("_image")
        labels = image.with_name(f"{name}_label{ending}")
        cases.append(Case(name, name, image, labels if labels.is_file() else None))
    return cohort_of(cases, CLASSES, folder, "ct_XXXX_image.nii.gz beside ct_XXXX_label.nii.gz")
