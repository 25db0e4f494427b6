"""The straight line of a sweep: what is asked, the study, its parent run, the workers, the conclusion."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig

from qlora_exp.config.interpolations import texts_of
from qlora_exp.config.official_sweeper import problems_in
from qlora_exp.config.override_values import literal
from qlora_exp.config.overrides import is_hydra, override_key
from qlora_exp.config.schema import BudgetConfig, WorkersConfig
from qlora_exp.config.search_path import SEARCH_PATH, search_folders, search_path
from qlora_exp.errors import QloraExpError, StudyError, raise_all, unwritable
from qlora_exp.estimate.budget import StudyBudget, budget_of, check_energy
from qlora_exp.formatting import bytes_text
from qlora_exp.orchestration import launcher_signals
from qlora_exp.orchestration.budget_forecast import affordable_trials_message, check_memory
from qlora_exp.orchestration.command import SweepCommand, spec_settings, study_spec
from qlora_exp.orchestration.launcher_processes import launched_work
from qlora_exp.orchestration.memory_feedback import MAX_CONSECUTIVE_SKIPS
from qlora_exp.orchestration.orchestrator import Orchestration, orchestrating, wait_for_others
from qlora_exp.orchestration.prestart import prestarted
from qlora_exp.orchestration.status import LiveStatus, best_table, predicted_memory, show_progress, tracked
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.rank_doubling import ladder_sweep
from qlora_exp.records.schema import from_dict, to_dict
from qlora_exp.records.types import Status
from qlora_exp.runs.process import (
    EXIT_COMPLETED,
    EXIT_INTERRUPTED,
    EXIT_RUN_FAILED,
    EXIT_WRONG_INPUT,
    ExitCode,
    print_error,
)
from qlora_exp.study.space import point_overrides
from qlora_exp.study.spec import read_spec, storage_of, without_secrets, write_spec
from qlora_exp.study.types import Counts, StudySpec
from qlora_exp.system import signals, streams
from qlora_exp.system.distributed import one_rank_only

Launch = Callable[[list[list[str]]], Sequence[Any]]
"""Takes the overrides of each job, returns when all have ended; the results have Hydra's ``return_value``."""


def sweep_for_hydra(config: DictConfig, arguments: Sequence[str], launcher: Any) -> None:
    """Hydra's door: ``arguments`` are the command line's overrides. ``hydra.sweeper.params`` are read as they were
    written, since an axis may change what they name.

    Leaves by :class:`~qlora_exp.runs.process.ExitCode`: Hydra drops what a sweeper returns.
    """
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    texts = texts_of(config.hydra.overrides, "hydra")
    hydra = [text for text in texts if not text.startswith(("hydra.mode=", SEARCH_PATH))]
    given = [text for text in texts if text.startswith(SEARCH_PATH)]
    own = search_folders(given)[1:]
    if own:
        hydra.append(search_path(own))
    asked = None
    try:
        raise_all(problems_in(list(config.hydra.sweeper)))
        asked = study_spec([*arguments, *hydra], texts_of(config.hydra.sweeper, "params"))
        job = config.hydra.job
        here = isinstance(launcher, BasicLauncher) and not (job.env_set or job.chdir)
        code = run_sweep(asked, lambda jobs: launcher.launch(jobs, initial_job_idx=0), here)
    except QloraExpError as error:
        print_error(error)
        code = EXIT_WRONG_INPUT
    except Exception as error:
        told = _told_of(error, asked.spec if asked is not None else None)
        if told is None:
            raise
        print_error(told)
        code = EXIT_WRONG_INPUT
    raise ExitCode(code)


def _told_of(error: Exception, spec: StudySpec | None) -> QloraExpError | None:
    """``None``: a fault of ours, which shows itself."""
    from qlora_exp.study.storage import lost, unreachable

    if isinstance(error, OSError):
        return unwritable(error)
    return lost(error, spec.storage, spec.name) if spec is not None and unreachable(error) else None


def run_sweep(asked: SweepCommand, launch: Launch, here: bool = False) -> int:
    """Work on the study until it is complete, stopped or has failed too often, and tell what came of it.

    ``here``: whether ``launch`` runs its jobs in this process, as it is now: same environment, same folder.

    Exit codes: 0 complete; 1 ``sweep.max_failures`` reached, no trial completed, or a worker failed; 130 interrupted.

    Raises:
        QloraExpError: another process orchestrates the study (and ``sweep.join`` is false), or the study can't be
            opened, or was begun with another space; nothing was started.
    """
    from qlora_exp.study.study import Study

    spec, paths = asked.spec, asked.paths
    budget = budget_of(asked.config)
    check_energy(budget, asked.config.training.device)
    if budget.memory_bytes is not None:
        check_memory(asked)
    purse = StudyBudget(budget, OutputPaths.of(spec.output_root))
    with contextlib.ExitStack() as held:
        duty = held.enter_context(orchestrating(paths, spec.name, asked.sweep.join, asked.workers))
        if here:
            held.enter_context(prestarted(asked.config, asked.workers, paths, spec.n_trials))
        opened = Study.open(spec, paths, spec.storage)
        spec = opened.spec
        asked = replace(asked, spec=spec)
        write_spec(spec, paths)
        held.callback(_tell_not_delivered, asked, opened)
        if _is_complete(opened.counts()):
            print(f"study {spec.name} is complete; sweep.n_trials=… goes on with it, sweep.name=… starts another")
            with _concluding(asked, opened, duty, purse, EXIT_COMPLETED):
                return _conclude(opened, spec, paths, purse, budget)
        bought = [f"\n  {text}" for text in affordable_trials_message(asked, opened, purse)]
        print(_announcement(asked, opened.counts()), *bought, sep="", file=sys.stderr, flush=True)
        if spec.ladder is not None:
            ladder_sweep.announce(spec, asked.sweep.ladder)
        with contextlib.ExitStack() as told:
            shares = not duty.held
            tracker = told.enter_context(_tracked(asked, opened, duty, purse))
            with LiveStatus(spec, opened, paths, tracker):
                code = _launch(launch, asked, opened)
            if shares:
                told.enter_context(_concluding(asked, opened, duty, purse, code))
            if code not in (EXIT_COMPLETED, EXIT_INTERRUPTED):
                return code
            conclusion = _conclude(opened, spec, paths, purse, budget)
            return conclusion if _is_complete(opened.counts()) else code or conclusion


def work(raw: Any, overrides: Sequence[str]) -> Any:
    """One launcher job: a worker that runs trials until nothing is left. Needs only the study's name and place, so
    that any launcher can carry it to another machine that shares the folder."""
    from qlora_exp.orchestration.worker import run_worker

    streams.keep_writing()  # a launcher may have brought this job to a process of its own
    paths = OutputPaths.of(str(raw.output_root)).study(str(raw.sweep.name))
    spec, workers = read_spec(paths), spec_settings(raw.workers, WorkersConfig)
    # The file holds no secrets; the command line that brought this job here does.
    own = [text for text in overrides if not text.startswith(("workers.job=", "sweep.name=", "sweep.storage="))]
    kept = [text for text in spec.overrides if is_hydra(override_key(text))]
    try:
        one_rank_only()
        spec = replace(spec, overrides=(*own, *kept), storage=storage_of(spec, raw.sweep.storage))
        with launched_work():
            result = run_worker(spec, paths, workers, int(raw.workers.job))
        if result.by_signal and launcher_signals.asked_here():
            raise ExitCode(EXIT_INTERRUPTED)
        return result
    except QloraExpError as error:
        print_error(error)
        raise ExitCode(error.exit_code) from None


def jobs_of(asked: SweepCommand) -> list[list[str]]:
    """The overrides of each launcher job."""
    spec = asked.spec
    own = [text for text in spec.overrides if not is_hydra(override_key(text))]
    named: dict[str, Any] = {"sweep.name": literal(spec.name)}
    if asked.sweep.storage is not None:
        named["sweep.storage"] = spec.storage
    return [[*own, *point_overrides(named), f"workers.job={job}"] for job in range(asked.workers.jobs)]


def _launch(launch: Launch, asked: SweepCommand, opened: Any) -> int:
    """Run the jobs to their end. An exit code other than 0: the study isn't complete, and a worker could not work at
    all, or was lost."""
    name, code = asked.spec.name, EXIT_COMPLETED
    problems: list[QloraExpError] = []
    try:
        with launcher_signals.passed_on(asked.paths):
            results = launch(jobs_of(asked))
    except ExitCode as ended:
        return ended.code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # every launcher has its own for a job that was killed
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        hint = f"qlora-exp resume {shlex.quote(name)} goes on with it"
        code = EXIT_RUN_FAILED
        problems.append(StudyError(f"the launcher lost a worker: {reason}", f"study {name}", hint))
        results = []
        wait_for_others(opened, asked.workers)
    for result in results:
        try:
            _ = result.return_value
        except QloraExpError as error:
            problems.append(error)
            code = error.exit_code
    if code and _is_complete(opened.counts()):
        for problem in problems:
            print(f"{problem.what}; the other workers completed the study", file=sys.stderr, flush=True)
        return EXIT_COMPLETED
    for problem in problems:
        print_error(problem)
    return code


@contextlib.contextmanager
def _concluding(asked: SweepCommand, opened: Any, duty: Orchestration, purse: StudyBudget, code: int) -> Iterator[None]:
    """Tell the study's tracker of its end where nobody has: the process that held the study is gone. ``code``: how the
    work of this process ended; one that was interrupted doesn't wait for others."""
    status = _status(opened.counts(), purse.short(opened.trials()) is not None)
    if not duty.inherits(code == EXIT_COMPLETED) or _end_is_told(asked.paths, status):
        yield
        return
    with _tracked(asked, opened, duty, purse) as tracker:
        if tracker is not None:
            tracker.update(tracked(opened.trials()), [row.number for row in opened.best()])
        yield


@contextlib.contextmanager
def _tracked(asked: SweepCommand, opened: Any, duty: Orchestration, purse: StudyBudget) -> Iterator[Any]:
    """The study's tracker, told of the end however that comes; what killed hosts could not deliver goes before it.
    None for a process that shares the work, and no end from one whose place another has taken."""
    if not (duty.held and asked.tracking.enabled):
        yield None
        return
    from qlora_exp.tracking.study import StudyTracker
    from qlora_exp.tracking.study_fields import StudyDefinition
    from qlora_exp.tracking.sync import deliver_runs

    outputs = OutputPaths(asked.paths.folder.parent.parent)
    tracker = StudyTracker(asked.tracking, outputs, asked.spec.name)
    try:
        tracker.start(from_dict(StudyDefinition, to_dict(without_secrets(asked.spec))))
        yield _WhileHeld(tracker, duty)
    finally:
        with signals.held_back("the study is being delivered to MLflow; Ctrl-C again: leave that to qlora-exp sync"):
            own = [row.run_id for row in opened.trials() if row.run_id is not None]
            deliver_runs(outputs, own, asked.tracking.uri)
            if duty.held:
                tracker.finish(_status(opened.counts(), purse.short(opened.trials()) is not None))


@dataclass(frozen=True)
class _WhileHeld:
    """A study's tracker that falls silent when another process takes the study over."""

    tracker: Any
    duty: Orchestration

    def update(self, *how_it_stands: Any) -> None:
        if self.duty.held:
            self.tracker.update(*how_it_stands)


def _tell_not_delivered(asked: SweepCommand, opened: Any) -> None:
    """The last line of a sweep, whatever ended it."""
    if not asked.tracking.enabled:
        return
    from qlora_exp.tracking.pending import not_delivered

    with contextlib.suppress(Exception):  # a storage that is gone: that has been told
        runs = [row.run_id for row in opened.trials() if row.run_id is not None]
        missing = not_delivered(OutputPaths(asked.paths.folder.parent.parent), runs, asked.spec.name)
        if missing is not None:
            print(missing, flush=True)


def _end_is_told(paths: StudyPaths, status: Status) -> bool:
    from qlora_exp.tracking.state import read_state
    from qlora_exp.tracking.study import told_status

    state = read_state(paths)
    return state is not None and state.delivered and told_status(paths) is status


def _is_complete(counts: Counts) -> bool:
    return counts.running + counts.waiting + counts.to_ask == 0


def _status(counts: Counts, budget_is_spent: bool) -> Status:
    if not _is_complete(counts) and (counts.running or not budget_is_spent):
        return Status.INTERRUPTED
    return Status.COMPLETED if counts.completed else Status.FAILED


def _announcement(asked: SweepCommand, counts: Counts) -> str:
    spec = asked.spec
    synthetic = "SYNTHETIC " if spec.synthetic else ""
    gone_on = f", {counts.finished} of them done" if counts.finished else ""
    axes = " × ".join(f"{axis.key}={axis.text}" for axis in spec.axes) or "no axes"
    axes += "".join(f"\n  {text} on the command line fixes an axis of the sweep" for text in asked.fixed_axes)
    search = f"{spec.sampler}, pruner {spec.pruner}"
    at_most = "at most " if spec.ladder is not None else ""
    return f"{synthetic}study {spec.name}: {at_most}{spec.n_trials} trials{gone_on} ({search})\n  {axes}"


def _conclude(opened: Any, spec: StudySpec, paths: StudyPaths, purse: StudyBudget, budget: BudgetConfig) -> int:
    from qlora_exp.formatting import print_table

    counts, best = opened.counts(), opened.best()
    if spec.ladder is not None:
        ladder_sweep.conclude(opened, spec, paths)
    elif best:
        print_table(best_table(best, spec))
    print(("SYNTHETIC " if spec.synthetic else "") + show_progress(counts))
    predicted = predicted_memory(opened.trials(), paths)
    if predicted is not None:
        print(predicted.sentence)
    outputs = OutputPaths(paths.folder.parent.parent)
    option = "" if outputs == OutputPaths.of("outputs") else f" --output-root {shlex.quote(str(outputs.root))}"
    name = shlex.quote(spec.name)
    if counts.refused and _nothing_fits(opened, counts, budget):
        print_error(_told_nothing_fits(opened, spec, counts, budget, option))
        return EXIT_COMPLETED if counts.completed else EXIT_WRONG_INPUT
    if not _is_complete(counts):
        failed = opened.failures_reached()
        short = purse.short(opened.trials())
        if short is not None and not failed and not counts.running:
            more = f"budget.{short.name}={2 * short.limit:g}"
            print(f"the budget is spent ({short}): qlora-exp resume {name} {more}{option}")
            return EXIT_COMPLETED if counts.completed else EXIT_RUN_FAILED
        why = f"sweep.max_failures={spec.max_failures:g} is reached" if failed else "not complete"
        allow = " sweep.max_failures=null" if failed else ""
        print(f"{why}: qlora-exp resume {name}{allow}{option}")
        return EXIT_RUN_FAILED if failed else EXIT_INTERRUPTED
    if best:
        print(f"  qlora-exp best {name}{option}")
    print(f"  qlora-exp trials {name} --csv{option}")
    if counts.failed:
        print(f"  qlora-exp resume {name} --retry failed{option}")
    return EXIT_COMPLETED if counts.completed and not opened.failures_reached() else EXIT_RUN_FAILED


def _nothing_fits(opened: Any, counts: Counts, budget: BudgetConfig) -> bool:
    """Whether the sampler doesn't find anything that fits any more, or every point of a grid has been refused."""
    if _is_complete(counts):
        return counts.finished == counts.refused
    return not counts.running and opened.consecutive_skips(budget.memory_bytes) >= MAX_CONSECUTIVE_SKIPS


def _told_nothing_fits(
    opened: Any, spec: StudySpec, counts: Counts, budget: BudgetConfig, option: str
) -> QloraExpError:
    refusals = [row.refusal for row in opened.trials() if row.refusal is not None]
    smallest = min((refusal.fit for refusal in refusals), key=lambda fit: fit.corrected_bytes)
    least, bound = smallest.corrected_bytes, refusals[-1].fit.bound_bytes
    which = "none of them" if not counts.completed else f"none of the last {MAX_CONSECUTIVE_SKIPS}"
    retry = " --retry does_not_fit" if spec.sampler in ("grid", "ladder") else ""
    again = f"qlora-exp resume {shlex.quote(spec.name)}{retry}{option}"
    if budget.memory_bytes is not None:
        hint = "a space with smaller batches, lengths or models under another sweep.name, or a larger bound: "
        hint += f"{again} budget.memory_bytes={least}"
    else:
        would_fit = smallest.would_fit or "smaller batches, lengths or models"
        hint = f"under another sweep.name: {would_fit}; to start them all the same: {again} --force"
    return StudyError(
        f"{counts.finished} trials were asked for, and {which} is predicted to fit into {bytes_text(bound)}",
        f"study {spec.name}: the smallest needs {bytes_text(least)}",
        hint,
    )
