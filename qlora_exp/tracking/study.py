"""A study's parent run in MLflow: found by its tag or created from ``study.json``, and updated after each trial."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Run, RunTag, ViewType

from qlora_exp.config.schema import TrackingConfig
from qlora_exp.errors import RecordError
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.records.upgrade import upgrade_study
from qlora_exp.system.environment import is_alive, process_identity
from qlora_exp.system.orchestrator_lease import held_lease
from qlora_exp.tracking import study_fields
from qlora_exp.tracking.deliver import log_missing_params
from qlora_exp.tracking.fields import MLFLOW_STATUS, NOTE_TAG
from qlora_exp.tracking.state import TrackingState, delivery_lock, file_digest, read_state, write_state
from qlora_exp.tracking.store import OpenStore, Store, bounded_calls, locate, open_or_warn, open_store, store_problem
from qlora_exp.tracking.study_fields import StudyDefinition, StudySummary, TrialRow

FINISH_SECONDS = 60.0
"""How long the end of a sweep waits for a local database, which other processes may keep busy."""

ANSWER_FILES = ("ladder.json", "report.html", "report.md", "runs.csv")
"""Files that rank doubling and ``qlora-exp report`` write into a study's folder."""


class StudyTracker:
    """Logs one study to MLflow: :meth:`start`, :meth:`update` after each trial, :meth:`finish`.

    The constructor raises :class:`TrackingError` for an invalid URI and for a local database that can't be opened.
    After that nothing raises, and only :meth:`start` and :meth:`finish` wait. ``summary.json`` has what could not be
    delivered, ``tracking.json`` the reason; the next update or ``qlora-exp sync`` tries again.
    """

    def __init__(self, tracking: TrackingConfig, output: OutputPaths, name: str) -> None:
        self._paths = output.study(name)
        self._store: Store | None = locate(tracking, output) if tracking.enabled else None
        self._opened: OpenStore | None = None
        self._delivery: _DeliveryThread | None = None
        self._summary = read_summary(self._paths) or StudySummary(Status.RUNNING, _now())
        if self._store is not None and self._store.database is not None:
            self._opened = open_or_warn(self._store)

    def start(self, definition: StudyDefinition) -> None:
        """Create the parent run, or reopen that of an earlier sweep of this name. Waits at most
        ``tracking.timeout_seconds``."""
        if self._store is not None:
            self._delivery = _DeliveryThread(self._store, self._opened, self._paths, definition)
        self._publish(status=Status.RUNNING, process=process_identity())
        if self._delivery is not None and self._store is not None:
            self._delivery.started.wait(self._store.timeout_seconds)

    def update(self, trials: Sequence[TrialRow], best: Sequence[int] = ()) -> None:
        """Queue the study's state: all trials so far, and the numbers of the best, best first. Returns at once."""
        self._publish(trials=tuple(trials), best=tuple(best))

    def finish(self, status: Status) -> bool:
        """Deliver the end of the study. Returns whether all of it was delivered in time: ``tracking.timeout_seconds``
        for a server, a minute for a local database."""
        self._publish(status=status, process=None)
        if self._store is None or self._delivery is None:
            return False
        delivery, self._delivery = self._delivery, None
        delivery.close(self._store.timeout_seconds if self._store.is_server else FINISH_SECONDS)
        return not delivery.is_alive() and delivery.state.delivered

    def _publish(self, **changes: Any) -> None:
        self._summary = replace(self._summary, updated_at=_now(), **changes)
        with contextlib.suppress(OSError):  # the sweep reports a full disk
            write_json(self._paths.summary, self._summary)
        if self._delivery is not None:
            self._delivery.put(self._summary)


class _DeliveryThread(threading.Thread):
    """Takes summaries from a queue and delivers the newest. A daemon: a server that hangs must not keep the process."""

    def __init__(self, store: Store, opened: OpenStore | None, paths: StudyPaths, definition: StudyDefinition) -> None:
        super().__init__(name="qlora-exp-study-tracking", daemon=True)
        self.started = threading.Event()
        """Set when the first summary was delivered or has failed."""
        self.state = TrackingState(store.shown_uri, store.experiment, error="not delivered yet")
        self._store, self._opened = store, opened
        self._paths, self._definition = paths, definition
        self._queue: queue.SimpleQueue[StudySummary | None] = queue.SimpleQueue()
        self.start()

    def put(self, summary: StudySummary) -> None:
        self._queue.put(summary)

    def close(self, seconds: float) -> None:
        self._queue.put(None)
        self.join(seconds)

    def run(self) -> None:
        summary: StudySummary | None = None
        while True:
            item = self._queue.get()
            summary = item or summary
            if item is not None and not self._queue.empty():
                continue  # a newer summary is in the queue
            if summary is not None:
                self._deliver(summary)
                summary = None
            self.started.set()
            if item is None:
                return

    def _deliver(self, summary: StudySummary) -> None:
        try:
            if self._opened is None:
                self._opened = open_store(self._store)
            self.state = deliver_study(self._store, self._opened, self._paths, self._definition, summary)
        except Exception as error:  # must not stop the sweep; every backend raises its own types
            self.state = replace(self.state, delivered=False, error=store_problem(error))
        with contextlib.suppress(OSError):
            write_state(self._paths, self.state)


def read_definition(paths: StudyPaths) -> StudyDefinition | None:
    """Return ``study.json``; ``None`` if it is missing or can't be read."""
    try:
        return from_dict(StudyDefinition, upgrade_study(json.loads(paths.spec.read_text(encoding="utf-8"))))
    except (OSError, ValueError, RecordError):
        return None


def read_summary(paths: StudyPaths) -> StudySummary | None:
    """Return ``summary.json``; ``None`` if it is missing or can't be read. If the sweep's process died, the status is
    INTERRUPTED."""
    try:
        summary = from_dict(StudySummary, json.loads(paths.summary.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecordError):
        return None
    if summary.status is Status.RUNNING and not _is_running(summary, paths):
        return replace(summary, status=Status.INTERRUPTED, process=None)
    return summary


def summary_status(paths: StudyPaths) -> Status | None:
    """Return the status in ``summary.json``, which the tracking store gets; ``None``: there is no summary."""
    summary = read_summary(paths)
    return summary.status if summary is not None else None


def _is_running(summary: StudySummary, paths: StudyPaths) -> bool:
    if summary.process is None:
        return False
    found_alive = is_alive(summary.process)
    if found_alive is None:  # on another host: its lease decides
        lease = held_lease(paths.orchestrator)
        return lease is not None and lease.process == summary.process
    return found_alive


def read_answers(paths: StudyPaths) -> list[str]:
    """Return the sentence of each ladder in ``ladder.json``, preceded by the axes that distinguish it. Empty if the
    file is missing or can't be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        sentences = []
        for ladder in json.loads(paths.ladder.read_text(encoding="utf-8"))["ladders"]:
            axes = ", ".join(f"{key}={value}" for key, value in ladder["axes"].items())
            sentences.append(f"{axes}: {ladder['sentence']}" if axes else str(ladder["sentence"]))
        return sentences
    return []


def parent_run(store: Store, opened: OpenStore, output: OutputPaths, record: RunRecord) -> str | None:
    """Return the MLflow run id of the study that ``record`` is a trial of; create that run if the store lacks it.

    ``None``: the record is not of a trial, nothing is known of its study here, or a person deleted the parent run.
    """
    if record.trial is None:
        return None
    paths = output.study(record.trial.study)
    definition = read_definition(paths)
    if definition is not None and record.trial.study_id not in (None, definition.id):
        # The folder now holds another study, which was started under the same name.
        return _find_parent(opened, StudyDefinition(record.trial.study, id=record.trial.study_id), None)[0]
    if definition is None:
        state = read_state(paths)
        return state.mlflow_run_id if state is not None and state.uri == store.shown_uri else None
    return _find_or_create_parent(store, opened, paths, definition)


def deliver_study(
    store: Store, opened: OpenStore, paths: StudyPaths, definition: StudyDefinition, summary: StudySummary
) -> TrackingState:
    """Log all of the study to its parent run; repeating it duplicates nothing. Returns what the store then has: a
    running study doesn't count as delivered."""
    digest = study_digest(paths)
    with bounded_calls(store.timeout_seconds):
        with delivery_lock(paths.delivery_lock):
            run_id = _find_or_create_parent(store, opened, paths, definition)
            if run_id is not None:
                _deliver(opened.client, run_id, definition, summary, read_answers(paths))
        if run_id is not None:
            for file in (paths.folder / name for name in ANSWER_FILES):
                if file.is_file():
                    opened.client.log_artifact(run_id, str(file))
    return TrackingState(store.shown_uri, store.experiment, opened.experiment_id, run_id, summary.status.ended, digest)


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


def _deliver(
    client: MlflowClient, run_id: str, definition: StudyDefinition, summary: StudySummary, answers: Sequence[str]
) -> None:
    log_missing_params(client, run_id, study_fields.study_params(definition))
    moment, step = study_fields.milliseconds(summary.updated_at), len(summary.trials)
    rows = [Metric(key, value, moment, step) for key, value in study_fields.study_metrics(definition, summary).items()]
    tags = study_fields.study_tags(definition) | {
        NOTE_TAG: study_fields.study_note(definition, summary, answers),
        "qlora_exp.status": summary.status.value,
    }
    client.log_batch(run_id, metrics=rows, tags=[RunTag(key, value) for key, value in tags.items()])
    if summary.status is Status.RUNNING:
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, MLFLOW_STATUS[summary.status], end_time=moment)
    client.log_text(run_id, study_fields.trials_csv(definition, summary), "trials.csv")
    best = study_fields.best_yaml(definition, summary)
    if best is not None:
        client.log_text(run_id, best, "best.yaml")


def _find_or_create_parent(
    store: Store, opened: OpenStore, paths: StudyPaths, definition: StudyDefinition
) -> str | None:
    """Return the parent's MLflow run id and keep it in ``tracking.json``; ``None`` if a person deleted the run. The
    lock makes sure that trials that start together create only one."""
    with delivery_lock(paths.tracking_lock):
        state = read_state(paths)
        run_id, deleted = _find_parent(opened, definition, state.mlflow_run_id if state is not None else None)
        if run_id is None and not deleted:
            run_id = _create_parent(opened, definition)
        recorded = (state.uri, state.experiment_id, state.mlflow_run_id) if state is not None else None
        if recorded != (store.shown_uri, opened.experiment_id, run_id):
            write_state(paths, TrackingState(store.shown_uri, store.experiment, opened.experiment_id, run_id))
    return run_id


def _find_parent(opened: OpenStore, definition: StudyDefinition, known: str | None) -> tuple[str | None, bool]:
    """Return the parent's run id, and whether any parent was found, deleted ones included.

    The study's identity finds it. A parent that an earlier version created has no identity: it is the study's if its
    run id is ``known``, or if it started when the study did.
    """
    matches: list[Run] = []
    if definition.id is not None:
        query = f"tags.`{study_fields.STUDY_ID_TAG}` = '{definition.id}'"
        matches = list(opened.client.search_runs([opened.experiment_id], query, ViewType.ALL))
    matches = matches or [
        run for run in _parents_without_identity(opened, definition) if _is_parent_of(run, definition, known)
    ]
    active = [run for run in matches if run.info.lifecycle_stage == LifecycleStage.ACTIVE]
    return (str(active[0].info.run_id) if active else None), bool(matches)


def _parents_without_identity(opened: OpenStore, definition: StudyDefinition) -> list[Run]:
    """Return parents of this name without an identity. MLflow's query language can't quote all names: compare here."""
    name = study_fields.study_tags(definition)[study_fields.STUDY_TAG]
    query = f"tags.`{study_fields.STUDY_TAG}` != ''"
    runs = opened.client.search_runs([opened.experiment_id], query, ViewType.ALL, max_results=1000)
    tagged = [(run, run.data.tags) for run in runs]
    return [
        run
        for run, tags in tagged
        if tags.get(study_fields.STUDY_TAG) == name and study_fields.STUDY_ID_TAG not in tags
    ]


def _is_parent_of(run: Run, definition: StudyDefinition, known: str | None) -> bool:
    """Whether ``run``, a parent without an identity, belongs to this study."""
    if definition.id is None or run.info.run_id == known:
        return True
    started = study_fields.milliseconds(definition.created_at) if definition.created_at is not None else None
    return started is not None and run.info.start_time == started


def _create_parent(opened: OpenStore, definition: StudyDefinition) -> str:
    start = study_fields.milliseconds(definition.created_at) if definition.created_at is not None else None
    run = opened.client.create_run(
        opened.experiment_id, start_time=start, tags=study_fields.study_tags(definition), run_name=definition.name
    )
    log_missing_params(opened.client, run.info.run_id, study_fields.study_params(definition))
    return str(run.info.run_id)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
