"""Peak memory of segmenting a large CT, from file to file, in a process of its own.

    python benchmarks/memory.py [--slices 600] [--edge 512]

Writes a synthetic int16 volume, segments it with an untrained `small` network through the command line, and
prints the largest resident memory of that process and its time.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from kaf_model.checkpoint import ClassLabel, Model
from kaf_model.config import KeypointConfig, ModelConfig, SliceConfig
from kaf_model.unet import build_network


def write_volume(path: Path, edge: int, slices: int) -> None:
    """A noisy ellipsoid in air, in Hounsfield units."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : edge * 1j, -1 : 1 : edge * 1j]
    body = np.where(np.hypot(x / 0.9, y / 0.7) < 1, 40.0, -1000.0)
    organ = np.where(np.hypot(x - 0.2, y) < 0.2, 120.0, 0.0)
    array = np.empty((edge, edge, slices), np.int16)
    for z in range(slices):
        array[..., z] = body + organ * (z % 100 > 20) + generator.normal(0, 20, (edge, edge))
    nib.save(nib.Nifti1Image(array, np.diag([0.7, 0.7, 1.0, 1.0])), path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slices", type=int, default=600)
    parser.add_argument("--edge", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        volume, model = Path(folder) / "ct.nii", Path(folder) / "model.safetensors"
        write_volume(volume, options.edge, options.slices)
        config = ModelConfig.preset("small", num_classes=3)
        classes = tuple(ClassLabel(value, f"class {value}") for value in range(3))
        network = build_network(config).eval()
        Model(network, config, SliceConfig(), KeypointConfig(), classes).save(model)
        started = time.monotonic()
        command = [sys.executable, "-m", "kaf_model.cli", "segment", str(volume), "--model", str(model)]
        subprocess.run([*command, "-o", str(Path(folder) / "labels.nii.gz"), "--device", "cpu"], check=True)
        seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"{options.edge} x {options.edge} x {options.slices} int16: peak {peak:.2f} GiB, {seconds:.0f} s, file to file"
    )


if __name__ == "__main__":
    main()
