"""The manifest names things that exist, and importing the plugin stays light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from npe2 import PluginManifest

ROOT = Path(__file__).resolve().parents[2]


def test_every_command_can_be_imported(plugin_home):
    manifest = PluginManifest.from_file(ROOT / "napari_kaf" / "napari.yaml")
    manifest.validate_imports()
    assert manifest.contributions.widgets[0].display_name == "Finetune"  # what `-w napari-kaf` opens


def test_the_top_level_manifest_is_a_link_to_the_packaged_one():
    assert (ROOT / "napari.yaml").resolve() == ROOT / "napari_kaf" / "napari.yaml"


def test_panels_import_nothing_heavy():
    code = (
        "import sys, napari_kaf.widgets.finetune, napari_kaf.widgets.segment, napari_kaf.widgets.pretrain,"
        "napari_kaf.widgets.explore;"
        "heavy = {'torch', 'monai', 'lightning_fabric', 'SimpleITK', 'nibabel', 'cv2'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
