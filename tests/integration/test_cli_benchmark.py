"""`kaf benchmark` from the command line, on synthetic hearts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kaf_model.benchmark.plan import shipped_plans
from kaf_model.cli import main

ROWS = ["--only", "UNet", "--only", "KAF-SSL"]
NUM_RUNS = 2 * (2 * 2 + 1)


@pytest.fixture(autouse=True, scope="module")
def _own_cache_and_one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("KAF_CACHE", str(tmp_path_factory.mktemp("cache")))
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("OMP_WAIT_POLICY", "PASSIVE")
        yield
    torch.set_num_threads(threads)


def quick(output: Path) -> list[str]:
    return ["benchmark", "run", "quick", "-o", str(output), "--device", "cpu", *ROWS]


def started(output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kaf_model", *quick(output)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


def results(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in output.rglob("result.json")}


def wait_for_results(process: subprocess.Popen[str], output: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(results(output)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no result after five minutes"
        time.sleep(0.02)


def test_killed_and_interrupted_it_goes_on_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = started(tmp_path)
    wait_for_results(killed, tmp_path, 1)
    killed.kill()
    killed.communicate()
    after_kill = results(tmp_path)
    assert 1 <= len(after_kill) < NUM_RUNS

    interrupted = started(tmp_path)
    wait_for_results(interrupted, tmp_path, len(after_kill) + 1)
    interrupted.send_signal(signal.SIGINT)
    out, err = interrupted.communicate(timeout=300)
    assert interrupted.returncode == 130, err
    assert "interrupted; what is done stays, and the same line goes on from here" in out
    assert f"{len(after_kill)} of {NUM_RUNS} runs were finished before" in out

    before = results(tmp_path)
    assert main(quick(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert f"{NUM_RUNS} runs are finished, {len(before)} of them before: {tmp_path}" in printed
    assert f"next: kaf benchmark report {tmp_path}" in printed
    assert len(results(tmp_path)) == NUM_RUNS
    assert all(results(tmp_path)[path] == written for path, written in before.items())
    assert not list(tmp_path.rglob("*.resume.safetensors"))

    assert main(["benchmark", "report", str(tmp_path), "--against", "UNet"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# quick\n")
    assert "|  | M = 1 | M = 2 | k = 2 | parameters |" in printed
    assert "**UNet against the others**" in printed
    for name in ("report.md", "report.csv", "learning-curves.png"):
        assert (tmp_path / name).stat().st_size > 100
    assert (tmp_path / "report.md").read_text().strip() in printed


def test_a_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*quick(tmp_path), "--dry-run", "--patients", "first 6"]) == 0
    printed = capsys.readouterr().out
    assert "fold 0: tested heart_003, heart_004, heart_005" in printed
    assert "fold 0: pretraining sees 3 volumes" in printed
    assert f"to do: {NUM_RUNS} finetunings, 1 pretrainings" in printed
    assert "k = 2, fold 0, draw 0, seed 0: learns from 2 slices of heart_00" in printed
    assert "training time: at most 0.0 h, and 11 that are measured in steps or epochs" in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["benchmark", "run", "quikc", "-o", "x"], "there is no plan 'quikc'"),
        (["benchmark", "run", "acdc-report", "-o", "x"], "needs data of layout pairs: give --data DIR"),
        (["benchmark", "run", "acdc-report", "-o", "x", "--data", "none"], "there is no folder none"),
        (["benchmark", "run", "quick", "-o", "x", "--only", "VNet"], "there is no row 'VNet'"),
        (["benchmark", "run", "quick", "-o", "x", "--patients", "none"], "no patient is meant by 'none'"),
        (["benchmark", "run", "quick", "-o", "x", "--precision", "half"], "unknown precision 'half'"),
        (["benchmark", "run", "quick"], "see kaf benchmark run --help"),
        (["benchmark", "report", "nowhere"], "nowhere holds no benchmark"),
        (["benchmark", "plans", "--show", "quikc"], "there is no plan 'quikc'"),
    ],
)
def test_mistakes_are_one_line(
    line: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_failed_run_is_named_and_the_exit_code_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "extends: quick\nname: fails\ncolumns: {patients: [1]}\nrows: [{name: UNet, network: unet}]\nreference: UNet\n"
        "data: {layout: phantom, classes: {1: right ventricle}}\n"
    )
    assert main(["benchmark", "run", str(plan), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "failed: UNet, M = 1, fold 0, draw 0, seed 0: slice" in printed
    assert "which is no class" in printed


def test_plans_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "plans"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == shipped_plans()
    assert all(line.endswith(".") for line in listed), "a description is cut in the middle of a sentence"
    (report,) = (line for line in listed if line.startswith("acdc-report "))
    assert report.endswith("on patients that nothing was chosen on.")
    assert main(["benchmark", "plans", "--show", "quick"]) == 0
    assert capsys.readouterr().out.startswith("name: quick\n")


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "report", "plans"):
        assert main(["benchmark", command, "--help"]) == 0
        assert f"kaf benchmark {command}" in capsys.readouterr().out
