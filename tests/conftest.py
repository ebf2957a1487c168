"""Fixtures for tests of the plugin: a home of their own, nothing left running, and no window test passed over."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

DIALOG_PATIENCE = 60.0  # seconds

# Before anything imports torch. Threads that spin for each other on a busy machine make it ten times as slow, or worse:
# they sleep instead, as in kaf, and where two processes share the tests each has one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def plugin_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fresh folders for napari's settings and for what the plugin keeps."""
    import napari.settings

    home = tmp_path / "home"
    monkeypatch.setenv("KAF_HOME", str(home))
    monkeypatch.setenv("KAF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NAPARI_CONFIG", str(tmp_path / "napari" / "settings.yaml"))
    monkeypatch.setattr(napari.settings, "_CFG_PATH", str(tmp_path / "napari" / "settings.yaml"))
    monkeypatch.setattr(napari.settings, "_SETTINGS", None)
    monkeypatch.setattr(napari.settings, "_PLUGIN_SETTINGS", {})
    return home


@pytest.fixture
def no_dialog_stays(qapp):
    """Close a dialog that nobody answers, which would keep its test waiting for ever, and fail."""
    from qtpy.QtCore import QTimer
    from qtpy.QtWidgets import QMessageBox

    seen: dict[object, float] = {}
    left: list[str] = []

    def look() -> None:
        dialog = qapp.activeModalWidget()
        if dialog is None:
            seen.clear()
        elif time.monotonic() - seen.setdefault(dialog, time.monotonic()) > DIALOG_PATIENCE:
            text = dialog.text() if isinstance(dialog, QMessageBox) else ""
            left.append(f"{type(dialog).__name__} {dialog.windowTitle()!r} {text!r}")
            dialog.close()

    timer = QTimer()
    timer.timeout.connect(look)
    timer.start(1000)
    yield
    timer.stop()
    assert not left, f"dialogs that nobody answered: {left}"


@pytest.fixture
def nothing_left(qapp, no_dialog_stays):
    """Fail when a test leaves threads, workers, timers of ours or panels behind."""
    import gc

    from qtpy.QtCore import QThreadPool
    from superqt.utils._qthreading import WorkerBase

    from napari_kaf import _pulse, _session
    from napari_kaf.widgets._panel import Panel

    before = set(threading.enumerate())
    gc.collect()
    gc.freeze()  # what is there already, torch and napari above all, is not looked through again and again
    yield
    assert QThreadPool.globalInstance().waitForDone(30_000), "a worker is still running"
    for _ in range(3):
        qapp.processEvents()
        gc.collect()
    assert not WorkerBase._worker_set, "a worker was never let go"
    shown = [widget for widget in qapp.topLevelWidgets() if isinstance(widget, Panel)]
    assert not shown, f"panels left: {shown}"
    for pulse in qapp.findChildren(_pulse.Pulse):
        pulse.deleteLater()
    _pulse._beating.clear()
    _session._sessions.clear()
    ours = {
        thread
        for thread in set(threading.enumerate()) - before
        if not isinstance(thread, threading._DummyThread)
    }
    for thread in ours:
        thread.join(5)
    alive = [thread.name for thread in ours if thread.is_alive() and "pydev" not in thread.name]
    assert not alive, f"threads left: {alive}"


def acdc_folder() -> Path:
    """The folder of real cardiac volumes: $KAF_DATA, else the one beside the repository; skips without it."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("KAF_DATA", root.parent / "shared" / "data")) / "acdc"
    if not (folder / "images").is_dir():
        pytest.skip(f"no real volumes at {folder}; set KAF_DATA to the folder that holds acdc")
    return folder


@pytest.fixture
def acdc() -> Path:
    """Folder of real cardiac volumes."""
    return acdc_folder()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """With KAF_REQUIRE_WINDOW=1, a window test that is skipped has failed."""
    outcome = yield
    report = outcome.get_result()
    if (
        report.skipped
        and item.get_closest_marker("real_window")
        and os.environ.get("KAF_REQUIRE_WINDOW") == "1"
    ):
        report.outcome = "failed"
        report.longrepr = f"KAF_REQUIRE_WINDOW=1, but the window test was skipped: {report.longrepr}"
