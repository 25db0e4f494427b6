"""Live logging of one run to MLflow, by a background thread, so that training never waits for MLflow."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from qlora_exp.config.schema import TrackingConfig
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.records.types import RunRecord
from qlora_exp.tracking.deliver import (
    DeliveryThread,
    adapter_files,
    create,
    deliver_all,
    deliver_curve,
    deliver_start,
    find,
)
from qlora_exp.tracking.state import NOT_DELIVERED_YET, TrackingState, delivery_lock, write_state
from qlora_exp.tracking.store import OpenStore, bounded_calls, locate, open_or_warn, open_store, store_problem
from qlora_exp.tracking.study import parent_run

CURVE_SECONDS = 5.0
"""Curve points are collected this long and then logged as one batch: a batch costs milliseconds of the trainer's
core."""

LOCAL_DATABASE_SECONDS = 60.0
"""How long the end of a run waits for a local database, which other processes may keep busy."""

UPLOAD_BYTES_PER_SECOND = 1_000_000
"""Assumed upload speed: a server gets the time for the adapter in addition to ``tracking.timeout_seconds``."""

_open_once = functools.lru_cache(maxsize=8)(open_store)


class Tracker:
    """Logs one run to MLflow: :meth:`start`, :meth:`log_curve` …, :meth:`finish`.

    The constructor raises :class:`TrackingError` for an invalid URI and for a local database that can't be opened.
    After that nothing raises: at the first failure delivery stops, ``tracking.json`` in the run folder says why, and
    ``qlora-exp sync`` delivers the rest from the run folder.
    """

    def __init__(self, tracking: TrackingConfig, output: OutputPaths, warm: bool = False) -> None:
        """``warm``: the sweep has opened the store before. Then the delivery thread opens it, once per process, and no
        trial waits for that."""
        self._output = output
        self._store = locate(tracking, output)
        self._connect = _open_once if warm else open_store
        self._opened: OpenStore | None = None
        self._record: RunRecord | None = None
        self._parent: str | None = None
        self._state = TrackingState(self._store.shown_uri, self._store.experiment)
        self._is_broken = False
        if self._store.database is not None and not warm:
            self._opened = open_or_warn(self._store)

    def start(self, record: RunRecord, paths: RunPaths, wait: bool = True) -> None:
        """Create the MLflow run (RUNNING). With ``wait``, wait for that at most ``tracking.timeout_seconds``."""
        self._paths = paths
        self._save(replace(self._state, error=NOT_DELIVERED_YET))
        self._thread: DeliveryThread[RunRecord | list[Mapping[str, Any]]] = DeliveryThread(self._deliver)
        self._thread.put(record)
        if wait:
            self._thread.started.wait(self._store.timeout_seconds)

    def log_curve(self, points: Iterable[Mapping[str, Any]]) -> None:
        """Queue points of the training curve (the objects of curve.jsonl); returns at once."""
        self._thread.put(list(points), CURVE_SECONDS)

    def finish(self, record: RunRecord) -> bool:
        """Deliver the ended run; ``record.json`` must be written. Returns whether all of it was delivered in time.

        The limit is ``tracking.timeout_seconds`` plus a second per megabyte of adapter; for a local database at least a
        minute. After that, delivery continues in the background while the process lives; ``sync`` does the rest.
        """
        self._thread.put(record)
        adapter_bytes = sum(file.stat().st_size for file in adapter_files(self._paths))
        seconds = self._store.timeout_seconds + adapter_bytes / UPLOAD_BYTES_PER_SECOND
        self._thread.close(seconds if self._store.is_server else max(LOCAL_DATABASE_SECONDS, seconds))
        return self._state.delivered

    def _deliver(self, entries: list[RunRecord | list[Mapping[str, Any]]]) -> None:
        """Deliver the newest record and the curve points among ``entries``."""
        if self._is_broken:
            return
        records = [entry for entry in entries if isinstance(entry, RunRecord)]
        points = [point for entry in entries if isinstance(entry, list) for point in entry]
        try:
            if records:
                self._record = records[-1]
                self._deliver_record(self._record)
        except Exception as error:  # must not stop the training; every backend raises its own types
            self._is_broken = True
            self._save(replace(self._state, error=store_problem(error)))
            return
        if not points or self._opened is None or self._record is None or self._record.status.ended:
            return
        try:
            with delivery_lock(self._paths.tracking_lock), bounded_calls(self._store.timeout_seconds):
                deliver_curve(self._opened.client, str(self._state.mlflow_run_id), self._record, points)
        except Exception as error:  # nothing is lost: the end of the run logs the points that are missing
            problem = f"part of the curve was not delivered: {store_problem(error)}"
            self._save(replace(self._state, error=problem))

    def _deliver_record(self, record: RunRecord) -> None:
        opened = self._opened = self._opened or self._connect(self._store)
        with delivery_lock(self._paths.tracking_lock), bounded_calls(self._store.timeout_seconds):
            self._parent = self._parent or parent_run(self._store, opened, self._output, record)
            if self._state.mlflow_run_id is None:
                # It may exist already: an earlier process died before it could note the id.
                run_id = find(opened.client, opened.experiment_id, record.run_id)
                run_id = run_id or create(opened.client, opened.experiment_id, record, self._parent)
                self._save(replace(self._state, experiment_id=opened.experiment_id, mlflow_run_id=run_id))
            if record.status.ended:
                self._save(deliver_all(opened.client, self._state, record, self._paths, self._parent))
            else:
                deliver_start(opened.client, str(self._state.mlflow_run_id), record, self._parent)

    def _save(self, state: TrackingState) -> None:
        self._state = state
        with contextlib.suppress(OSError):  # the training reports a full disk; sync delivers this run again
            write_state(self._paths, self._state)
