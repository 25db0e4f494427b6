"""Live logging of one run to MLflow, by a background thread, so that training never waits for MLflow."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from qlora_exp.config.schema import TrackingConfig
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.records.types import RunRecord
from qlora_exp.tracking.deliver import adapter_files, deliver_all, deliver_curve, deliver_start, find_or_create
from qlora_exp.tracking.state import TrackingState, delivery_lock, record_digest, write_state
from qlora_exp.tracking.store import OpenStore, Store, bounded_calls, locate, open_or_warn, open_store, store_problem
from qlora_exp.tracking.study import parent_run

CURVE_SECONDS = 5.0
"""Curve points are collected this long and then logged as one batch: a batch costs milliseconds of the trainer's
core."""

LOCAL_DATABASE_SECONDS = 60.0
"""How long the end of a run waits for a local database, which other processes may keep busy."""

UPLOAD_BYTES_PER_SECOND = 1_000_000
"""Assumed upload speed: a server gets the time for the adapter in addition to ``tracking.timeout_seconds``."""


class Tracker:
    """Logs one run at a time to MLflow: :meth:`start`, :meth:`log_curve` …, :meth:`finish`.

    The constructor raises :class:`TrackingError` for an invalid URI and for a local database that can't be opened.
    After that nothing raises: at the first failure delivery stops, ``tracking.json`` in the run folder says why, and
    ``qlora-exp sync`` delivers the rest from the run folder.
    """

    def __init__(self, tracking: TrackingConfig, output: OutputPaths, warm: bool = False) -> None:
        """``warm``: the sweep has opened the store before. Then the delivery thread opens it, once per process, and no
        trial waits for that."""
        self._output = output
        self._store: Store | None = locate(tracking, output) if tracking.enabled else None
        self._opened: OpenStore | None = None
        self._delivery: _DeliveryThread | None = None
        self._warm = warm
        if self._store is not None and self._store.database is not None and not warm:
            self._opened = open_or_warn(self._store)

    def start(self, record: RunRecord, paths: RunPaths, wait: bool = True) -> None:
        """Create the MLflow run (RUNNING). With ``wait``, wait for that at most ``tracking.timeout_seconds``."""
        if self._store is None:
            return
        self._delivery = _DeliveryThread(
            self._store, self._opened, self._output, paths, _open_once if self._warm else open_store
        )
        self._delivery.put(record)
        if wait:
            self._delivery.started.wait(self._store.timeout_seconds)

    def log_curve(self, points: Iterable[Mapping[str, Any]]) -> None:
        """Queue points of the training curve (the objects of curve.jsonl); returns at once."""
        if self._delivery is not None:
            self._delivery.put(list(points))

    def finish(self, record: RunRecord) -> bool:
        """Deliver the ended run; ``record.json`` must be written. Returns whether all of it was delivered in time.

        The limit is ``tracking.timeout_seconds`` plus a second per megabyte of adapter; for a local database at least a
        minute. After that, delivery continues in the background while the process lives; ``sync`` does the rest.
        """
        if self._store is None or self._delivery is None:
            return False
        delivery, self._delivery = self._delivery, None
        delivery.put(record)
        seconds = self._store.timeout_seconds + delivery.adapter_bytes() / UPLOAD_BYTES_PER_SECOND
        delivery.close(seconds if self._store.is_server else max(LOCAL_DATABASE_SECONDS, seconds))
        self._opened = delivery.opened
        return delivery.delivered


_open_once = functools.lru_cache(maxsize=8)(open_store)


class _DeliveryThread(threading.Thread):
    """Takes records and curve points from a queue. A daemon: a server that hangs must not keep the process alive."""

    def __init__(
        self,
        store: Store,
        opened: OpenStore | None,
        output: OutputPaths,
        paths: RunPaths,
        connect: Callable[[Store], OpenStore],
    ) -> None:
        super().__init__(name="qlora-exp-tracking", daemon=True)
        self.opened = opened
        self._open = connect
        self.delivered = False
        self.started = threading.Event()
        """Set when the start was delivered or has failed."""
        self._store = store
        self._output = output
        self._paths = paths
        self._queue: queue.SimpleQueue[RunRecord | list[Mapping[str, Any]] | None] = queue.SimpleQueue()
        self._record: RunRecord | None = None
        self._parent: str | None = None
        self._state = TrackingState(store.shown_uri, store.experiment)
        self._save(error="not delivered yet")
        self.start()

    def put(self, item: RunRecord | list[Mapping[str, Any]]) -> None:
        if self.is_alive():
            self._queue.put(item)

    def close(self, seconds: float) -> None:
        """Wait until everything in the queue is delivered, at most ``seconds``."""
        self._queue.put(None)
        self.join(seconds)

    def adapter_bytes(self) -> int:
        return sum(file.stat().st_size for file in adapter_files(self._paths))

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:  # must not stop the training; every backend raises its own types
            self._save(error=store_problem(error))
        finally:
            self.started.set()

    def _work(self) -> None:
        points: list[Mapping[str, Any]] = []
        due: float | None = None
        while True:
            try:
                item = self._queue.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
            except queue.Empty:
                self._curve(points)
                points, due = [], None
                continue
            if item is None:
                return
            if isinstance(item, RunRecord):
                self._deliver(item)
                self.started.set()
            else:
                points = points + item
                due = due or time.monotonic() + CURVE_SECONDS

    def _deliver(self, record: RunRecord) -> None:
        if self.opened is None:
            self.opened = self._open(self._store)
        self._record = record
        with delivery_lock(self._paths.tracking_lock), bounded_calls(self._store.timeout_seconds):
            client = self.opened.client
            self._parent = self._parent or parent_run(self._store, self.opened, self._output, record)
            if self._state.mlflow_run_id is None:
                experiment_id = self.opened.experiment_id
                mlflow_run_id = find_or_create(client, experiment_id, record, self._parent)
                self._save(experiment_id=experiment_id, mlflow_run_id=mlflow_run_id)
            run_id = str(self._state.mlflow_run_id)
            if not record.status.ended:
                deliver_start(client, run_id, record, self._parent)
                return
            digest = record_digest(self._paths)
            deliver_all(client, run_id, record, self._paths, self._parent)
            self.delivered = True
            self._save(delivered=True, record_digest=digest, error=None)

    def _curve(self, points: list[Mapping[str, Any]]) -> None:
        """Log one batch. A failure loses nothing: the end of the run logs the points of curve.jsonl that are
        missing."""
        if self.opened is None or self._record is None or self._state.mlflow_run_id is None:
            return
        try:
            with delivery_lock(self._paths.tracking_lock), bounded_calls(self._store.timeout_seconds):
                deliver_curve(self.opened.client, self._state.mlflow_run_id, self._record, points)
        except Exception as error:  # as in run()
            self._save(error=f"part of the curve was not delivered: {store_problem(error)}")

    def _save(self, **changes: Any) -> None:
        self._state = replace(self._state, **changes)
        with contextlib.suppress(OSError):  # the training reports a full disk; sync delivers this run again
            write_state(self._paths, self._state)
