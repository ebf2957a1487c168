"""Which trained models there are, and what each was trained on, read from headers without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from kaf_model.errors import UserError
from napari_kaf._paths import models_folder
from napari_kaf._runs import Run, RunStore, checkpoint_header


@dataclass(frozen=True)
class ModelChoice:
    """A model that can be chosen.

    Attributes:
        name: What it is called.
        path: Its checkpoint, or None for random weights.
        about: What it was trained on.
        kind: "pretrained", "segmentation", or nothing for random weights.
    """

    name: str
    path: Path | None
    about: str
    kind: str = ""


SCRATCH = ModelChoice(
    "From scratch", None, "Random weights: no pretrained model is bundled. Pretrain makes one."
)


def read_choice(path: Path, name: str = "") -> ModelChoice:
    """Describe a checkpoint.

    Raises:
        UserError: If it is missing, broken, or not one of ours.
    """
    try:
        header = checkpoint_header(path)
        kind, history = str(header["kind"]), list(header["history"])
        about = "; then ".join(_told(record) for record in history) or "no record of its training"
        classes = [str(label["name"]) for label in header["classes"] if label["value"]]
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be used: it is missing, broken or no checkpoint ({error})") from error
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} was not written by napari-kaf; choose another checkpoint") from error
    if classes:
        about += f". Classes: {', '.join(classes)}"
    return ModelChoice(name or path.stem, path, about, kind)


def choices(runs: Sequence[Run], store: RunStore | None, kinds: Sequence[str]) -> list[ModelChoice]:
    """The models in the models folder and the runs on the current volume, newest first.

    Args:
        runs: Runs of the current volume.
        store: Where they are kept.
        kinds: "pretrained", "segmentation" or both.
    """
    named = [
        (path, "") for path in sorted(models_folder().glob("*.safetensors")) if ".resume." not in path.name
    ]
    if store is not None:
        named += [(store.model_path(run.key), run.name) for run in runs]
    found = []
    for path, name in reversed(named):
        try:
            choice = read_choice(path, name)
        except UserError:
            continue  # a folder may hold what is not ours; a file that is chosen by hand is answered for
        if choice.kind in kinds:
            found.append(choice)
    return found


def _told(record: dict[str, Any]) -> str:
    steps = record.get("steps", "?")
    if record.get("stage") == "pretraining":
        return (
            f"pretrained {steps} steps on {record.get('num_volumes', '?')} volumes, "
            f"{record.get('num_slices', '?')} slices"
        )
    labelled = record.get("labelled_slices", [])
    names = sorted({str(name).rsplit(":", 2)[0] for name in labelled})
    return f"finetuned {steps} steps on {len(labelled)} labelled slices of {', '.join(names) or 'no volume'}"
