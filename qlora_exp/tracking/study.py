"""A study's parent run in MLflow: found by its tag or created from ``study.json``, and updated after each trial."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Run, RunTag, ViewType

from qlora_exp.config.schema import TrackingConfig
from qlora_exp.errors import RecordError
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records.files import read_or_none, read_record, write_json
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.records.upgrade import upgrade_study
from qlora_exp.system.environment import is_alive, process_identity
from qlora_exp.system.orchestrator_lease import held_lease
from qlora_exp.tracking import study_fields
from qlora_exp.tracking.deliver import DeliveryThread, log_missing_params
from qlora_exp.tracking.fields import MLFLOW_STATUS, NOTE_TAG, milliseconds, run_metrics
from qlora_exp.tracking.state import (
    NOT_DELIVERED_YET,
    TrackingState,
    delivery_lock,
    file_digest,
    read_state,
    write_state,
)
from qlora_exp.tracking.store import OpenStore, Store, bounded_calls, locate, open_or_warn, open_store, store_problem
from qlora_exp.tracking.study_fields import STUDY_ID_TAG, STUDY_TAG, StudyDefinition, StudySummary, SummaryTrial

FINISH_SECONDS = 60.0
"""How long the end of a sweep waits for a local database, which other processes may keep busy."""

ANSWER_FILES = ("ladder.json", "confirm.json", "best.yaml", "report.html", "report.md", "runs.csv")
"""Files that a sweep's end and ``qlora-exp report`` write into a study's folder."""


class StudyTracker:
    """Logs one study to MLflow: :meth:`start`, :meth:`update` after each trial, :meth:`finish`.

    The constructor raises :class:`TrackingError` for an invalid URI and for a local database that can't be opened.
    After that nothing raises, and only :meth:`start` and :meth:`finish` wait. ``summary.json`` has what could not be
    delivered, ``tracking.json`` the reason; the next update or ``qlora-exp sync`` tries again.
    """

    def __init__(self, tracking: TrackingConfig, output: OutputPaths, name: str) -> None:
        self._paths = output.study(name)
        self._store = locate(tracking, output)
        self._opened = open_or_warn(self._store) if self._store.database is not None else None
        self._summary = read_summary(self._paths) or StudySummary(Status.RUNNING, _now())
        self._state = TrackingState(self._store.shown_uri, self._store.experiment, error=NOT_DELIVERED_YET)

    def start(self, definition: StudyDefinition) -> None:
        """Create the parent run, or reopen that of an earlier sweep of this name. Waits at most
        ``tracking.timeout_seconds``."""
        self._definition = definition
        self._thread: DeliveryThread[StudySummary] = DeliveryThread(self._deliver)
        self._publish(status=Status.RUNNING, process=process_identity())
        self._thread.started.wait(self._store.timeout_seconds)

    def update(self, trials: Sequence[SummaryTrial], best: Sequence[int] = ()) -> None:
        """Queue the study's state: all trials so far, and the numbers of the best, best first. Returns at once."""
        self._publish(trials=tuple(trials), best=tuple(best))

    def finish(self, status: Status) -> bool:
        """Deliver the end of the study. Returns whether all of it was delivered in time: ``tracking.timeout_seconds``
        for a server, a minute for a local database."""
        self._publish(status=status, process=None)
        self._thread.close(self._store.timeout_seconds if self._store.is_server else FINISH_SECONDS)
        return not self._thread.is_alive() and self._state.delivered

    def _publish(self, **changes: Any) -> None:
        self._summary = replace(self._summary, updated_at=_now(), **changes)
        with contextlib.suppress(OSError):  # the sweep reports a full disk
            write_json(self._paths.summary, self._summary)
        self._thread.put(self._summary)

    def _deliver(self, summaries: list[StudySummary]) -> None:
        try:
            if self._opened is None:
                self._opened = open_store(self._store)
            self._state = deliver_study(self._store, self._opened, self._paths, self._definition, summaries[-1])
        except Exception as error:  # must not stop the sweep; every backend raises its own types
            self._state = replace(self._state, delivered=False, error=store_problem(error))
        with contextlib.suppress(OSError):
            write_state(self._paths, self._state)


def read_definition(paths: StudyPaths) -> StudyDefinition | None:
    """Return ``study.json``; ``None`` if it is missing or can't be read."""
    return read_or_none(StudyDefinition, paths.spec, upgrade_study)


def read_summary(paths: StudyPaths) -> StudySummary | None:
    """Return ``summary.json``; ``None`` if it is missing or can't be read. If the sweep's process died, the status is
    INTERRUPTED."""
    summary = read_or_none(StudySummary, paths.summary)
    if summary is None or summary.status is not Status.RUNNING:
        return summary
    running: bool | None = False
    if summary.process is not None:
        running = is_alive(summary.process)
        if running is None:  # on another host: its lease decides
            lease = held_lease(paths.orchestrator)
            running = lease is not None and lease.process == summary.process
    return summary if running else replace(summary, status=Status.INTERRUPTED, process=None)


def read_answers(paths: StudyPaths) -> list[study_fields.LadderAnswer]:
    """Return the answer of each ladder in ``ladder.json``; before there is a ladder, that of the screening runs; or the
    answer of a study that confirms. Empty if there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        answer = json.loads(paths.confirmation.read_text(encoding="utf-8"))["answer"]
        return [study_fields.LadderAnswer({}, " ".join(answer["sentences"]), {"use": answer.get("use")})]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = json.loads(paths.ladder.read_text(encoding="utf-8"))
        if not content["ladders"] and "screening" in content:
            return [study_fields.LadderAnswer({}, str(content["screening"]["sentence"]))]
        return [
            study_fields.LadderAnswer(dict(ladder["axes"]), str(ladder["sentence"]), ladder)
            for ladder in content["ladders"]
        ]
    return []


def deliver_study(
    store: Store, opened: OpenStore, paths: StudyPaths, definition: StudyDefinition, summary: StudySummary
) -> TrackingState:
    """Log all of the study to its parent run; repeating it duplicates nothing. Returns what the store then has: a
    running study doesn't count as delivered."""
    digest, client = study_digest(paths), opened.client
    summary = _with_confirmed_first(summary, paths)
    with bounded_calls(store.timeout_seconds):
        with delivery_lock(paths.delivery_lock):
            run_id = _find_or_create_parent(store, opened, paths, definition)
            if run_id is not None:
                _log_summary(client, run_id, definition, summary, read_answers(paths), _best_metrics(paths, summary))
                if not paths.best.is_file() and (best := study_fields.best_yaml(definition, summary)) is not None:
                    client.log_text(run_id, best, "best.yaml")
        if run_id is not None:
            for file in (paths.folder / name for name in ANSWER_FILES):
                if file.is_file():
                    client.log_artifact(run_id, str(file))
    return TrackingState(store.shown_uri, store.experiment, opened.experiment_id, run_id, summary.status.ended, digest)


def _with_confirmed_first(summary: StudySummary, paths: StudyPaths) -> StudySummary:
    """Return ``summary`` with the run of the confirmed configuration as the best: the single best run of a study that
    confirms may belong to another configuration."""
    try:
        used = json.loads(paths.confirmation.read_text(encoding="utf-8"))["answer"]["use_run"]
    except (OSError, ValueError, KeyError, TypeError):
        return summary
    numbers = [trial.number for trial in summary.trials if used is not None and trial.run_id == used]
    return replace(summary, best=tuple(numbers)) if numbers else summary


def study_digest(paths: StudyPaths) -> str:
    """Return the SHA-256 of the study's files that its parent run shows."""
    return file_digest(paths.spec, paths.summary, *(paths.folder / name for name in ANSWER_FILES))


def deliver_report(tracking: TrackingConfig, output: OutputPaths, name: str) -> str | None:
    """Log the study with its report to its parent run. Returns the reason if that fails, else ``None``; ``qlora-exp
    sync`` tries again."""
    paths = output.study(name)
    definition, summary = read_definition(paths), read_summary(paths)
    if definition is None or summary is None:
        return "study.json or summary.json can't be read"
    try:
        store = locate(tracking, output)
        write_state(paths, deliver_study(store, open_store(store), paths, definition, summary))
    except Exception as error:  # every backend raises its own types
        return store_problem(error)
    return None


def parent_run(store: Store, opened: OpenStore, output: OutputPaths, record: RunRecord) -> str | None:
    """Return the MLflow run id of the study that ``record`` is a trial of; create that run if the store lacks it.

    ``None``: the record is not of a trial, nothing is known of its study here, or a person deleted the parent run.
    """
    if record.trial is None:
        return None
    paths = output.study(record.trial.study)
    definition = read_definition(paths)
    if definition is None:
        state = read_state(paths)
        return state.mlflow_run_id if state is not None and state.uri == store.shown_uri else None
    if record.trial.study_id not in (None, definition.id):
        # The folder now holds another study, which was started under the same name.
        return _active_id(_find_parent(opened, StudyDefinition(record.trial.study, id=record.trial.study_id), None))
    return _find_or_create_parent(store, opened, paths, definition)


def _log_summary(
    client: MlflowClient,
    run_id: str,
    definition: StudyDefinition,
    summary: StudySummary,
    answers: Sequence[study_fields.LadderAnswer],
    best_metrics: Mapping[str, float],
) -> None:
    log_missing_params(client, run_id, study_fields.study_params(definition))
    moment, step = milliseconds(summary.updated_at), len(summary.trials)
    metrics = {**best_metrics, **study_fields.study_metrics(definition, summary)}
    rows = [Metric(key, value, moment, step) for key, value in metrics.items()]
    tags = (
        study_fields.study_tags(definition)
        | study_fields.ladder_tags(answers)
        | study_fields.best_tag(definition, summary, answers)
        | {
            NOTE_TAG: study_fields.study_note(definition, summary, answers),
            "qlora_exp.status": summary.status.value,
        }
    )
    client.log_batch(run_id, metrics=rows, tags=[RunTag(key, value) for key, value in tags.items()])
    if summary.status is Status.RUNNING:
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, MLFLOW_STATUS[summary.status], end_time=moment)
    client.log_text(run_id, study_fields.trials_csv(definition, summary), "trials.csv")


def _best_metrics(paths: StudyPaths, summary: StudySummary) -> dict[str, float]:
    """Return the metrics of the best trial's run that the parent shows; empty if there is none."""
    run_id = summary.best_trials[0].run_id if summary.best_trials else None
    if run_id is None:
        return {}
    try:
        metrics = run_metrics(read_record(paths.outputs.run(run_id).record))
    except RecordError:
        return {}
    return {key: metrics[key] for key in study_fields.BEST_METRICS if key in metrics}


def _find_or_create_parent(
    store: Store, opened: OpenStore, paths: StudyPaths, definition: StudyDefinition
) -> str | None:
    """Return the parent's MLflow run id and keep it in ``tracking.json``; ``None`` if a person deleted the run. The
    lock makes sure that trials that start together create only one."""
    with delivery_lock(paths.tracking_lock):
        state = read_state(paths)
        parent = _find_parent(opened, definition, state.mlflow_run_id if state is not None else None)
        if parent is None:
            start, tags = _start_milliseconds(definition), study_fields.study_tags(definition)
            parent = opened.client.create_run(opened.experiment_id, start, tags, definition.name)
            log_missing_params(opened.client, parent.info.run_id, study_fields.study_params(definition))
        run_id = _active_id(parent)
        recorded = (state.uri, state.experiment_id, state.mlflow_run_id) if state is not None else None
        if recorded != (store.shown_uri, opened.experiment_id, run_id):
            write_state(paths, TrackingState(store.shown_uri, store.experiment, opened.experiment_id, run_id))
    return run_id


def _find_parent(opened: OpenStore, definition: StudyDefinition, known: str | None) -> Run | None:
    """Return the study's parent run; one that a person deleted only if there is no other.

    The study's identity finds it. A parent that an earlier version created has no identity: it is the study's if its
    run id is ``known``, or if it started when the study did.
    """
    matches: list[Run] = []
    if definition.id is not None:
        query = f"tags.`{STUDY_ID_TAG}` = '{definition.id}'"
        matches = list(opened.client.search_runs([opened.experiment_id], query, ViewType.ALL))
    if not matches:
        # MLflow's query language can't quote all names: compare here.
        name, start = study_fields.study_tags(definition)[STUDY_TAG], _start_milliseconds(definition)
        query = f"tags.`{STUDY_TAG}` != ''"
        for run in opened.client.search_runs([opened.experiment_id], query, ViewType.ALL, max_results=1000):
            same_name = run.data.tags.get(STUDY_TAG) == name and STUDY_ID_TAG not in run.data.tags
            same_start = start is not None and run.info.start_time == start
            if same_name and (definition.id is None or run.info.run_id == known or same_start):
                matches.append(run)
    return min(matches, key=lambda run: _active_id(run) is None, default=None)


def _active_id(run: Run | None) -> str | None:
    return str(run.info.run_id) if run is not None and run.info.lifecycle_stage == LifecycleStage.ACTIVE else None


def _start_milliseconds(definition: StudyDefinition) -> int | None:
    return milliseconds(definition.created_at) if definition.created_at is not None else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
