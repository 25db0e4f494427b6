"""Log records to an MLflow run, by explicit run id. Every function can be repeated: it duplicates nothing."""

from __future__ import annotations

import contextlib
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, RunTag, ViewType

from qlora_exp.paths import RunPaths
from qlora_exp.records.files import read_curve
from qlora_exp.records.labels import run_name
from qlora_exp.records.model_card import model_card
from qlora_exp.records.redaction import redact
from qlora_exp.records.types import RunRecord
from qlora_exp.tracking import fields
from qlora_exp.tracking.answers_table import log_answers
from qlora_exp.tracking.state import TrackingState, file_digest

T = TypeVar("T")

METRICS_PER_CALL = 500
"""MLflow's limit is 1,000 values and 1 MB a call."""

ADAPTER_SUFFIXES = frozenset({".safetensors", ".json", ".jinja"})
"""Files of adapter/ that are logged. Pickles (``.bin``, ``.pt``) are not: they run code when they are loaded."""


class DeliveryThread(threading.Thread, Generic[T]):
    """Calls ``deliver`` with all entries that were put since its last call; ``deliver`` must not raise.

    A daemon: a server that hangs must not keep the process alive.
    """

    def __init__(self, deliver: Callable[[list[T]], None]) -> None:
        super().__init__(name="qlora-exp-tracking", daemon=True)
        self.started = threading.Event()
        """Set after the first call."""
        self._deliver = deliver
        self._queue: queue.SimpleQueue[tuple[float, T] | None] = queue.SimpleQueue()
        self.start()

    def put(self, entry: T, patience_seconds: float = 0.0) -> None:
        """Queue ``entry``. It may wait so long for others that are delivered with it."""
        self._queue.put((time.monotonic() + patience_seconds, entry))

    def close(self, seconds: float) -> None:
        """Wait until everything in the queue is delivered, at most ``seconds``."""
        self._queue.put(None)
        self.join(seconds)

    def run(self) -> None:
        is_open = True
        while is_open:
            entries: list[T] = []
            due = math.inf
            with contextlib.suppress(queue.Empty):  # raised once the queue is empty and the first entry is due
                while is_open:
                    item = self._queue.get(timeout=max(0.0, due - time.monotonic()) if entries else None)
                    if item is None:
                        is_open = False
                    else:
                        due = min(due, item[0])
                        entries.append(item[1])
            if entries:
                self._deliver(entries)
            self.started.set()


def find(client: MlflowClient, experiment_id: str, run_id: str) -> str | None:
    """Return the MLflow run that has our ``run_id`` as tag; ``None``: there is none, or a person deleted it."""
    query = f"tags.`{fields.RUN_ID_TAG}` = '{run_id}'"
    matches = client.search_runs([experiment_id], query, run_view_type=ViewType.ACTIVE_ONLY, max_results=1)
    return str(matches[0].info.run_id) if matches else None


def create(client: MlflowClient, experiment_id: str, record: RunRecord, parent: str | None) -> str:
    """Create this record's MLflow run and return its id."""
    run = client.create_run(
        experiment_id,
        start_time=fields.milliseconds(record.started_at),
        tags=fields.run_tags(record, parent),
        run_name=run_name(record),
    )
    return str(run.info.run_id)


@dataclass(frozen=True)
class PresentRun:
    """A run that a store has: its MLflow id, ``None`` if a person deleted it, and its name there."""

    mlflow_run_id: str | None
    name: str | None


def present_runs(client: MlflowClient, experiment_id: str) -> dict[str, PresentRun]:
    """Return the experiment's runs by our run id. One call per 200 runs."""
    present: dict[str, PresentRun] = {}
    page: str | None = None
    while True:
        runs = client.search_runs([experiment_id], "", ViewType.ALL, max_results=200, page_token=page)
        for run in runs:
            run_id = run.data.tags.get(fields.RUN_ID_TAG)
            if run_id is None:
                continue
            if run.info.lifecycle_stage == LifecycleStage.ACTIVE:
                present[run_id] = PresentRun(run.info.run_id, run.info.run_name)
            else:
                present.setdefault(run_id, PresentRun(None, None))
        page = runs.token
        if not page:
            return present


def rename_earlier(client: MlflowClient, present: PresentRun, record: RunRecord) -> None:
    """Give a trial that an earlier version logged its name of today. A name that a person gave it stays."""
    if present.mlflow_run_id is not None and present.name == record.name != run_name(record):
        client.update_run(present.mlflow_run_id, name=run_name(record))


def deliver_start(client: MlflowClient, run_id: str, record: RunRecord, parent: str | None) -> None:
    """Set a run that has not ended to RUNNING (also after an interruption), and log the params known so far."""
    client.update_run(run_id, status="RUNNING", name=run_name(record))
    log_missing_params(client, run_id, fields.run_params(record))
    _log_tags(client, run_id, record, parent)


def deliver_curve(client: MlflowClient, run_id: str, record: RunRecord, points: Iterable[Mapping[str, Any]]) -> None:
    """Log points of the training curve, at most ``METRICS_PER_CALL`` values a call."""
    _log_metrics(client, run_id, fields.curve_metrics(record, points))


def deliver_all(
    client: MlflowClient, state: TrackingState, record: RunRecord, paths: RunPaths, parent: str | None
) -> TrackingState:
    """Log all of the run folder to the MLflow run that ``state`` names, and return the state after that.

    The status comes before the artifacts: a slow upload must not leave it RUNNING.
    """
    run_id, digest = str(state.mlflow_run_id), file_digest(paths.record)
    moment = fields.milliseconds(record.ended_at or record.started_at)  # the same at every delivery
    log_missing_params(client, run_id, fields.run_params(record))
    curve = fields.curve_metrics(record, read_curve(paths.curve))
    logged = {
        (key, entry.step) for key in {row.key for row in curve} for entry in client.get_metric_history(run_id, key)
    }
    _log_metrics(client, run_id, [row for row in curve if (row.key, row.step) not in logged])
    _log_metrics(client, run_id, [Metric(key, value, moment, 0) for key, value in fields.run_metrics(record).items()])
    _log_tags(client, run_id, record, parent)
    client.set_tag(run_id, fields.NOTE_TAG, fields.run_note(record))
    dataset = fields.dataset_input(record)
    if dataset is not None:
        client.log_inputs(run_id, [dataset])
    client.set_terminated(run_id, fields.MLFLOW_STATUS[record.status], end_time=moment)
    _log_artifacts(client, run_id, record, paths)
    return replace(state, delivered=True, record_digest=digest, error=None)


def adapter_files(paths: RunPaths) -> list[Path]:
    """Return the adapter's files that are logged, sorted by name."""
    files = paths.weights.iterdir() if paths.weights.is_dir() else []
    return sorted(file for file in files if file.is_file() and file.suffix in ADAPTER_SUFFIXES)


def log_missing_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    """Log the params that the run doesn't have yet: MLflow refuses to change one."""
    logged = client.get_run(run_id).data.params
    missing = [Param(key, value) for key, value in params.items() if key not in logged]
    if missing:
        client.log_batch(run_id, params=missing)


def _log_tags(client: MlflowClient, run_id: str, record: RunRecord, parent: str | None) -> None:
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in fields.run_tags(record, parent).items()])


def _log_metrics(client: MlflowClient, run_id: str, rows: list[Metric]) -> None:
    for start in range(0, len(rows), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=rows[start : start + METRICS_PER_CALL])


def _log_artifacts(client: MlflowClient, run_id: str, record: RunRecord, paths: RunPaths) -> None:
    """Upload record, configuration, adapter, answers. Texts are redacted again: a store is often shared more widely."""
    if paths.record.is_file():
        redacted = redact(json.loads(paths.record.read_text(encoding="utf-8")))
        client.log_text(run_id, json.dumps(redacted, indent=1, ensure_ascii=False) + "\n", "record.json")
    if paths.config.is_file():
        redacted = redact(yaml.safe_load(paths.config.read_text(encoding="utf-8")))
        client.log_text(run_id, yaml.safe_dump(redacted, sort_keys=False, allow_unicode=True), "config.yaml")
    files = adapter_files(paths)
    for file in files:
        client.log_artifact(run_id, str(file), paths.weights.name)
    if files:
        client.log_text(run_id, model_card(record), f"{paths.weights.name}/README.md")
    log_answers(client, run_id, paths)
