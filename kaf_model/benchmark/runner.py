"""Doing the runs of a plan, one after the other, each in a folder of its own.

A killed or interrupted benchmark goes on where it stopped: finished runs stay, a half-finished training
resumes from its last saved step, pretrainings are shared by all runs that may share them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning_fabric import Fabric

from kaf_model.atlases import Atlases
from kaf_model.benchmark.cohort import Case, Cohort, read_case
from kaf_model.benchmark.costs import costs_of
from kaf_model.benchmark.plan import Plan
from kaf_model.benchmark.records import CaseScore, RunFolder, RunResult
from kaf_model.benchmark.runs import Pretraining, Run, all_runs, read_cohort
from kaf_model.benchmark.scoring import score_cases
from kaf_model.benchmark.selection import Selection, best_step, read_measurements, steps_between
from kaf_model.benchmark.splits import slices_to_label
from kaf_model.benchmark.starts import STARTS
from kaf_model.benchmark.statistics import trial_dice
from kaf_model.checkpoint import Model, load_header, load_model, now
from kaf_model.engine import NonFiniteLoss, make_fabric
from kaf_model.errors import UserError
from kaf_model.finetune import finetune
from kaf_model.keypoints import KeypointCache
from kaf_model.labels import ClassMap, LabelledVolume
from kaf_model.progress import Progress
from kaf_model.text_files import write_atomically
from kaf_model.volume_queue import VolumeFiles

_PATIENCE = 1.0  # seconds between looks at a pretraining that another process does
_COST_SHAPE = (256, 256)  # of the slice whose operations are counted where trainings do not crop


@dataclass(frozen=True)
class BenchmarkResult:
    """What came of a benchmark.

    Attributes:
        finished: Runs that have a result now.
        skipped: Those of them that had one before.
        failed: Runs that could not be done, and why.
        elsewhere: Runs that other processes were doing when nothing else was left.
    """

    finished: int
    skipped: int
    failed: tuple[tuple[str, str], ...]
    elsewhere: int = 0


def plan_runs(plan: Plan, data: Path, only: Collection[str] = ()) -> tuple[Cohort, list[Run]]:
    """Find a plan's data and its runs.

    Args:
        plan: The plan.
        data: Folder of the data set.
        only: Names of rows; none is all.

    Raises:
        UserError: If the data, the plan or the names do not fit.
    """
    unknown = sorted(set(only) - {row.name for row in plan.rows})
    if unknown:
        names = ", ".join(row.name for row in plan.rows)
        raise UserError(f"there is no row {unknown[0]!r}; the rows are: {names}")
    cohort = read_cohort(plan, data)
    return cohort, [run for run in all_runs(plan, cohort) if not only or run.row in only]


def run_benchmark(
    plan: Plan,
    data: Path,
    output: Path,
    *,
    only: Collection[str] = (),
    device: str = "auto",
    fabric: Fabric | None = None,
    cache: KeypointCache | None = None,
) -> Generator[Progress, None, BenchmarkResult]:
    """Do the runs of a plan that have no result yet, as far as no other process is doing them.

    Can be closed at any yield; called again it goes on.

    Args:
        plan: What to do.
        data: Folder of the data set.
        output: Folder to write to.
        only: Names of rows; none is all.
        device: "auto", "cpu", "cuda" or "mps".
        fabric: Use this set-up instead of one made for `device`.
        cache: Keypoints found before.

    Yields:
        Progress of every stage, and "runs" after each run.

    Raises:
        UserError: If plan and data do not fit, or the folder holds runs with other settings.
    """
    cohort, runs = plan_runs(plan, data, only)
    for each in all_runs(plan, cohort):
        RunFolder(output / each.folder).check(each.config())
    folders = {run.folder: RunFolder(output / run.folder) for run in runs}
    fabric = fabric or make_fabric(device)
    if fabric.world_size > 1:
        raise UserError("a benchmark trains in one process; start it without torchrun")
    _write_plan(plan, output)
    work = _Workplace(plan, cohort, output, fabric, cache or KeypointCache())
    waiting = [run for run in runs if not folders[run.folder].finished]
    skipped = len(runs) - len(waiting)
    note = f"{skipped} of {len(runs)} runs were finished before" if skipped else ""
    yield Progress("runs", skipped, len(runs), message=note)
    failed: list[tuple[str, str]] = []
    started, done, told = time.monotonic(), 0, ""
    while waiting:
        with contextlib.ExitStack() as taken:
            run = work.take(waiting, taken)
            if run is None:
                if not work.pretrained_elsewhere:
                    break
                news = "" if work.pretrained_elsewhere == told else work.pretrained_elsewhere
                told = work.pretrained_elsewhere
                yield Progress("runs", len(runs) - len(waiting), len(runs), message=news)
                time.sleep(_PATIENCE)
                continue
            waiting.remove(run)
            if folders[run.folder].finished:
                continue
            try:
                message = yield from work.do(run)
            except (UserError, NonFiniteLoss) as error:
                if _while_closing(error):  # what was reached could not be saved
                    raise
                failed.append((str(run), str(error)))
                message = f"{run}: failed: {error}"
        done += 1
        left = (time.monotonic() - started) / done * len(waiting)
        yield Progress("runs", len(runs) - len(waiting), len(runs), eta=left, message=message)
    elsewhere = sum(not folders[run.folder].finished for run in waiting)
    return BenchmarkResult(len(runs) - len(failed) - elsewhere, skipped, tuple(failed), elsewhere)


def _while_closing(error: BaseException) -> bool:
    """Whether something failed because, or while, a generator was closed."""
    context = error.__context__
    return context is not None and (isinstance(context, GeneratorExit) or _while_closing(context))


class _Workplace:
    """What all runs of a benchmark share."""

    def __init__(
        self, plan: Plan, cohort: Cohort, output: Path, fabric: Fabric, cache: KeypointCache
    ) -> None:
        self._plan = plan
        self._cohort = cohort
        self._output = output
        self._fabric = fabric
        self._cache = cache
        self._failed_pretrainings: dict[Path, str] = {}
        self.pretrained_elsewhere = ""
        """Which pretraining another process is doing that runs wait for; empty if none do."""

    def take(self, waiting: Sequence[Run], taken: contextlib.ExitStack) -> Run | None:
        """The first of some runs that no other process is doing, nor its pretraining; None if there is none.

        Args:
            waiting: Runs that are to be done.
            taken: Keeps other processes off what is needed for the run, until it is closed.
        """
        self.pretrained_elsewhere = ""
        for run in waiting:
            with contextlib.ExitStack() as these:
                if not these.enter_context(RunFolder(self._output / run.folder).taken()):
                    continue
                if run.pretraining is not None:
                    folder = RunFolder(self._output / run.pretraining.folder)
                    if not folder.trained and not these.enter_context(folder.taken()):
                        self.pretrained_elsewhere = (
                            f"waiting for {folder.path.name}, which another process pretrains"
                        )
                        continue
                taken.enter_context(these.pop_all())
                return run
        return None

    def do(self, run: Run) -> Generator[Progress, None, str]:
        """Pretrain if need be, finetune, score and write the result; returns a line about it."""
        folder = RunFolder(self._output / run.folder)
        folder.claim(run.config())
        start = None if run.pretraining is None else (yield from self._pretrained(run.pretraining))
        labelled = [self._labelled(case, run).without_unlabelled() for case in run.train]
        selection = self._selection(run, folder, labelled)
        if selection is not None:
            yield from selection.measure_saved()
        if not folder.trained:
            yield from self._train(run, folder, labelled, start, selection)
        model = load_model(self._counting(folder), device=self._fabric.device)
        atlases = yield from self._atlases(run, model, labelled)
        scores = yield from self._score(run, model, atlases)
        folder.write_scores(scores)
        result = self._result(run, folder, model, labelled, start)
        folder.write_result(result)
        kind = "pooled Dice" if self._plan.protocol.kind == "paper" else "Dice"
        dice = trial_dice(scores, self._plan.protocol.kind)
        return f"{run}: {kind} {dice:.3f} after {result.steps} steps in {result.seconds:.0f} s"

    def _pretrained(self, pretraining: Pretraining) -> Generator[Progress, None, Path]:
        folder = RunFolder(self._output / pretraining.folder)
        if pretraining.folder in self._failed_pretrainings:
            raise UserError(self._failed_pretrainings[pretraining.folder])
        folder.claim(pretraining.config())
        if folder.trained:
            return folder.weights
        try:
            result = yield from STARTS[pretraining.start].pretrain(
                pretraining.recipe,
                self._files(pretraining.cases),
                folder.weights,
                resume=folder.interrupted,
                fabric=self._fabric,
                cache=self._cache,
            )
        except (UserError, NonFiniteLoss) as error:
            self._failed_pretrainings[pretraining.folder] = f"pretraining {pretraining.folder.name}: {error}"
            raise
        assert result is not None
        folder.write_curve(result.curve)
        return folder.weights

    def _train(
        self,
        run: Run,
        folder: RunFolder,
        labelled: Sequence[LabelledVolume],
        start: Path | None,
        selection: Selection | None,
    ) -> Generator[Progress, None, None]:
        recipe = run.recipe
        work = finetune(
            recipe.model if start is None else None,
            labelled,
            recipe.finetune,
            start=start,
            unlabelled=self._files(run.unlabelled) if run.unlabelled else (),
            class_names=self._cohort.classes,
            slices=recipe.slices,
            keypoints=recipe.keypoints,
            output=folder.weights,
            resume=folder.interrupted,
            fabric=self._fabric,
            cache=self._cache,
        )
        if selection is not None:
            work = selection.keeping_best(work)
        with contextlib.closing(work):
            result = yield from work
        folder.write_curve(result.curve)

    def _selection(self, run: Run, folder: RunFolder, labelled: Sequence[LabelledVolume]) -> Selection | None:
        """How the weights that count are chosen on the tested fold, under the paper's protocol."""
        if self._plan.protocol.kind != "paper":
            return None
        num_slices = sum(len(case.statuses) for case in labelled)
        every = steps_between(self._plan.protocol.select_every, num_slices, run.recipe.finetune.batch_size)
        return Selection(folder, every, lambda model: self._score(run, model), self._fabric.device)

    def _counting(self, folder: RunFolder) -> Path:
        """The weights that count: of the last step, or, under the paper's protocol, the best."""
        return folder.best if self._plan.protocol.kind == "paper" else folder.weights

    def _atlases(
        self, run: Run, model: Model, labelled: Sequence[LabelledVolume]
    ) -> Generator[Progress, None, Atlases | None]:
        """Labelled volumes that are registered to the tested ones, if they can be and fit each other."""
        config = run.recipe.segment
        if not config.registration or run.column.kind == "slices":
            return None
        classes = ClassMap(model.classes)
        atlases = Atlases(labelled, classes, model.slices, most=config.atlases, device=model.device)
        if len(atlases) < 2:
            return None
        agreement = yield from atlases.agreement(config.least_agreement, "segment others by them")
        return None if agreement is None else atlases

    def _score(
        self, run: Run, model: Model, atlases: Atlases | None = None
    ) -> Generator[Progress, None, list[CaseScore]]:
        return (
            yield from score_cases(
                model,
                self._read(run.test, run),
                self._cohort.classes,
                run.recipe.segment,
                total=len(run.test),
                atlases=atlases,
                cache=self._cache,
                without_labelled=run.column.kind == "slices",
            )
        )

    def _files(self, cases: Sequence[Case]) -> VolumeFiles:
        return VolumeFiles([case.image for case in cases], **self._plan.data.reading)

    def _read(self, cases: Sequence[Case], run: Run) -> Iterator[tuple[Case, LabelledVolume]]:
        for case in cases:
            yield case, self._labelled(case, run)

    def _labelled(self, case: Case, run: Run) -> LabelledVolume:
        """A volume with all its slices labelled, or, with columns of slices, k of them."""
        others = self._cohort.classes if self._plan.data.other_labels == "background" else None
        whole = read_case(case, classes=others, **self._plan.data.reading)
        if run.column.kind == "patients":
            return whole
        chosen = slices_to_label(whole.labels, run.column.count, self._plan.k_slices)
        return LabelledVolume(whole.volume, whole.labels, {z: whole.statuses[z] for z in chosen})

    def _result(
        self,
        run: Run,
        folder: RunFolder,
        model: Model,
        labelled: Sequence[LabelledVolume],
        start: Path | None,
    ) -> RunResult:
        trained: dict[str, Any] = load_header(folder.weights)["history"][-1]
        before: dict[str, Any] = {} if start is None else load_header(start)["history"][-1]
        shape = run.recipe.finetune.augment.crop or _COST_SHAPE
        costs = costs_of(model.network, shape, input_slices=model.config.input_slices)
        measured = read_measurements(folder)
        return RunResult(
            parameters=costs.parameters,
            gigaflops=costs.gigaflops,
            flops_shape=costs.shape,
            flops_keypoints=costs.keypoints,
            steps=trained["steps"],
            seconds=trained["seconds"],
            pretraining_steps=before.get("steps", 0),
            pretraining_seconds=before.get("seconds", 0.0),
            device=trained["device"],
            labelled=tuple(f"{case.volume.name}:{z}" for case in labelled for z in sorted(case.statuses)),
            selected_step=best_step(measured) if measured else trained["steps"],
            date=now(),
        )


def _write_plan(plan: Plan, output: Path) -> None:
    text = yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "plan.yaml", lambda file: file.write(text))
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}; choose another place") from error
