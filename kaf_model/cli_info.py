"""What `kaf info` tells about a file: a checkpoint, an interrupted training, or a volume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kaf_model.cli_options import duration_text
from kaf_model.cli_progress import losses_text
from kaf_model.volume_files import format_of


def describe_file(path: Path) -> dict[str, Any]:
    """Return what is in a file, ready for JSON.

    Raises:
        UserError: If it cannot be read.
    """
    if path.is_dir() or format_of(path)[0]:
        return _describe_volume(path)
    from kaf_model.checkpoint import load_header

    header = load_header(path)
    return {"kind": "interrupted training", **header} if "resume" in header else header


def info_rows(path: Path, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the same as labelled lines of text."""
    if content["kind"] == "volume":
        return _volume_rows(path, content)
    if content["kind"] == "interrupted training":
        return _resume_rows(path, content)
    return _checkpoint_rows(path, content)


def _describe_volume(path: Path) -> dict[str, Any]:
    import nibabel as nib

    from kaf_model.geometry import spacing_of
    from kaf_model.volume_grid import choose_source
    from kaf_model.volume_read import open_stored

    stored = open_stored(path)
    source = choose_source(stored, None, 0)
    return {
        "kind": "volume",
        "format": stored.format,
        "shape": list(source.display_shape),
        "spacing_mm": [round(step, 4) for step in spacing_of(source.display_affine)],
        "frames": stored.num_frames,
        "stored_shape": list(stored.shape),
        "orientation": "".join(str(code) for code in nib.aff2axcodes(stored.affine)),
        "slice_axis": source.axes[0],
        "affine": stored.affine.round(4).tolist(),
        "notices": list(stored.notices),
    }


def _volume_rows(path: Path, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    slices, rows, columns = content["shape"]
    thick, down, across = content["spacing_mm"]
    lines = [
        ("file", str(path)),
        ("kind", f"volume ({content['format']})"),
        ("slices", f"{slices} of {rows} x {columns} pixels, along stored axis {content['slice_axis']}"),
        ("spacing", f"{thick:g} mm between slices, {down:g} x {across:g} mm in plane"),
        ("orientation", f"{content['orientation']} (where the stored axes run to)"),
    ]
    if content["frames"] > 1:
        lines.append(("frames", f"{content['frames']}; choose one with --frame"))
    return lines + [("notice", notice) for notice in content["notices"]]


def _resume_rows(path: Path, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    state = content["resume"]
    output = path.name.replace(".resume.safetensors", ".safetensors")
    return [
        ("file", str(path)),
        ("kind", f"interrupted training; goes on with the line that made {output} and --resume"),
        ("step", f"{state['step']} after {duration_text(state['seconds'])}"),
        ("losses", losses_text(state["losses"])),
    ]


def _checkpoint_rows(path: Path, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    kinds = {
        "pretrained": "pretrained encoder; the start of a finetuning",
        "segmentation": "segmentation model",
    }
    lines = [
        ("file", str(path)),
        ("kind", kinds.get(content["kind"], content["kind"])),
        ("parameters", f"{content['parameters']:,}"),
        ("architecture", _architecture(content["model"])),
    ]
    if content["classes"]:
        named = ", ".join(f"{label['value']} {label['name']}" for label in content["classes"])
        lines.append(("classes", named))
        whole = [label["name"] for label in content["classes"] if label.get("one_piece")]
        if whole:
            lines.append(("in one piece", f"{', '.join(whole)}; smaller pieces are left out when segmenting"))
        beside = [label["name"] for label in content["classes"] if label.get("together")]
        if beside:
            lines.append(("together", f"{', '.join(beside)}; what lies apart is left out when segmenting"))
    lines += [
        ("preprocessing", _preprocessing(content["slices"])),
        (
            "keypoints",
            f"{content['keypoints']['detector']}, at most {content['keypoints']['max_keypoints']} a slice",
        ),
    ]
    statistics = content["statistics"]
    if statistics:
        spacing = " x ".join(f"{step:g}" for step in statistics["median_spacing_mm"])
        count = f"{statistics['num_slices']} slices of {statistics['num_volumes']} volumes"
        lines.append(("trained on", f"{count}, median spacing {spacing} mm"))
    for number, record in enumerate(content["history"], start=1):
        lines += _history_rows(number, record)
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines.append(("written with", versions))
    return lines


def _architecture(model: Mapping[str, Any]) -> str:
    text = f"{model['architecture']}, {model['start_channels']} channels at the start"
    if model["architecture"].startswith("kaf-"):
        levels = ", ".join(map(str, model["kaf_levels"]))
        text += (
            f"; KAF layers at levels {levels} with {model['attention_blocks']} attention blocks, "
            f"{model['heads']} heads, width {model['embedding_width']}"
        )
    return text


def _preprocessing(slices: Mapping[str, Any]) -> str:
    pixels = "pixels as stored" if slices["spacing"] is None else f"pixels of {slices['spacing']:g} mm"
    low, high = slices["clip_percentiles"]
    text = f"{pixels}, intensities clipped at percentiles {low:g} and {high:g}, then z-scored"
    if slices.get("context"):
        step = slices.get("context_step")
        apart = "the next" if step is None else f"{step:g} mm apart"
        text += f"; each read with {slices['context']} above and as many below, {apart}"
    return text


def _history_rows(number: int, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    label = f"training {number}"
    if not {"stage", "date", "steps", "seconds", "losses"} <= record.keys():
        return [(label, ", ".join(f"{key} {value}" for key, value in record.items()))]
    state = "" if record.get("complete", True) else ", not finished"
    how = f" by {record['pretext']['method']}" if record.get("pretext") else ""
    when, took = record["date"].replace("T", " "), duration_text(record["seconds"])
    lines = [
        (
            label,
            f"{record['stage']}{how}, {when}: {record['steps']} steps in {took} on {record['device']}{state}",
        )
    ]
    if record["losses"]:
        lines.append(("", losses_text(record["losses"])))
    labelled = record.get("labelled_slices")
    if labelled:
        more = f" and {len(labelled) - 6} more" if len(labelled) > 6 else ""
        lines.append(("", f"{len(labelled)} labelled slices: {', '.join(labelled[:6])}{more}"))
    if record.get("unlabelled_slices"):
        lines.append(("", f"{record['unlabelled_slices']} unlabelled slices for pseudo-labels"))
    if record.get("registration_dice") is not None:
        dice = record["registration_dice"]
        lines.append(
            ("", f"other volumes labelled by registration; labelled ones agree so to a Dice of {dice:.2f}")
        )
    if record.get("held_out_dice") is not None:
        lines.append(("", f"Dice on held-out slices {record['held_out_dice']:.3f}"))
    return lines
