"""Sample data in napari's menu: synthetic hearts, drawn when first opened and kept as files."""

from __future__ import annotations

from pathlib import Path

from napari_kaf._paths import data_folder
from napari_kaf._reader import LayerData, read_layers

HEART_SEED = 7
COHORT_SEED = 100
COHORT_SIZE = 4


def write_samples(folder: Path) -> tuple[Path, list[Path]]:
    """Write the sample files that are not there yet.

    Args:
        folder: Where `heart` (with labels) and `cohort` (without) go.

    Returns:
        The heart's image and the cohort's images.
    """
    from kaf_model.phantom import write_cohort

    heart = folder / "heart" / "images" / f"heart_{HEART_SEED:03d}.nii.gz"
    if not heart.is_file():
        write_cohort(folder / "heart", num_subjects=1, first_seed=HEART_SEED)
    seeds = range(COHORT_SEED, COHORT_SEED + COHORT_SIZE)
    images = [folder / "cohort" / "images" / f"heart_{seed:03d}.nii.gz" for seed in seeds]
    for seed, image in zip(seeds, images, strict=True):
        if not image.is_file():
            write_cohort(folder / "cohort", num_subjects=1, first_seed=seed, labelled=False)
    return heart, images


def sample_folder() -> Path:
    """Where the sample files are kept."""
    return data_folder() / "samples"


def heart() -> list[LayerData]:
    """A heart to label."""
    image, _ = write_samples(sample_folder())
    return read_layers(str(image))


def labelled_heart() -> list[LayerData]:
    """The same heart with its true labels."""
    image, _ = write_samples(sample_folder())
    labels = image.parents[1] / "labels" / image.name
    return read_layers([str(image), str(labels)])


def cohort() -> list[LayerData]:
    """Hearts without labels, to pretrain on; the notice names their folder."""
    from napari.utils.notifications import show_info

    _, images = write_samples(sample_folder())
    show_info(f"The hearts lie in {images[0].parent}; Pretrain can be pointed at that folder")
    return read_layers([str(image) for image in images])
