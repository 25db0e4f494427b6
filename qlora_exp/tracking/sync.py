"""Deliver what MLflow has not received, and mark runs whose process died as interrupted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Set
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from qlora_exp.config.schema import TrackingConfig
from qlora_exp.errors import QloraExpError, RecordError, TrackingError
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.find import run_folders
from qlora_exp.records.redaction import REDACTED
from qlora_exp.records.types import Failure, RunRecord, Status
from qlora_exp.system.environment import is_alive
from qlora_exp.system.out_of_memory import killed_for_memory
from qlora_exp.tracking.pending import root_option, sync_command

if TYPE_CHECKING:
    from qlora_exp.tracking.store import OpenStore, Store

DEFAULT_EXPERIMENT = "qlora-exp"
DEFAULT_TIMEOUT_SECONDS = 5.0
"""For records whose configuration has no tracking settings (same values as conf/tracking/mlflow.yaml)."""


TRIAL_PROCESS_SECONDS = 5.0
"""How long the end of a sweep waits for a trial process that is delivering its own trial."""


@dataclass(frozen=True)
class SyncReport:
    """Run ids by result. ``failed``: the reason by run id."""

    delivered: tuple[str, ...] = ()
    already: tuple[str, ...] = ()
    running: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    """RUNNING, by a process of another host, which can't be checked from here; left as they are."""
    deleted: tuple[str, ...] = ()
    """Deleted in MLflow by a person; ``sync`` doesn't restore them."""
    repaired: tuple[str, ...] = ()
    studies: tuple[str, ...] = ()
    """Names of the studies whose parent run was delivered."""
    failed: dict[str, str] = field(default_factory=dict)


def sync_runs(output_root: str | Path, uri: str | None = None, experiment: str | None = None) -> SyncReport:
    """Deliver every ended run under ``output_root`` that its store lacks wholly or in part. Repeating it adds nothing.

    Args:
        uri: replaces the records' own ``tracking.uri``; needed if that had a password, which records don't keep.
        experiment: replaces the records' own ``tracking.experiment``.

    Raises:
        TrackingError: ``uri`` is invalid. A store that doesn't answer is in the report's ``failed`` instead.
    """
    output = OutputPaths.of(output_root)
    if not output.runs.is_dir():
        return SyncReport()
    if uri is not None or experiment is not None:
        _locate(TrackingConfig(True, uri, experiment or DEFAULT_EXPERIMENT, DEFAULT_TIMEOUT_SECONDS), output)
    repaired = tuple(_mark_records(output).values())
    with FileLock(output.root / "sync.lock"):
        return replace(_Sync(output, uri, experiment=experiment).deliver(), repaired=repaired)


def mark_interrupted(output_root: str | Path) -> tuple[str, ...]:
    """Mark runs whose process is dead: INTERRUPTED in the record, KILLED in MLflow. Returns their run ids.

    A run of another host stays RUNNING: its process can't be checked from here. The function reads every record, and
    calls MLflow only if it changed one. If the store doesn't answer, :func:`sync_runs` delivers them later.
    """
    output = OutputPaths.of(output_root)
    repaired = _mark_records(output)
    if repaired:
        with FileLock(output.root / "sync.lock"):
            _Sync(output, None).deliver(only=set(repaired))
    return tuple(repaired.values())


def deliver_runs(output: OutputPaths, run_ids: Iterable[str], uri: str | None = None) -> None:
    """Deliver those of these runs that their own process could not deliver, for example because it was killed.

    Never raises, and calls MLflow only if something is missing. ``uri`` as for :func:`sync_runs`.
    """
    missing = {paths.folder.name for run_id in run_ids if not _is_delivered(paths := output.run(run_id))}
    if missing:
        with contextlib.suppress(OSError):
            _mark_records(output, missing)
        with contextlib.suppress(OSError), FileLock(output.root / "sync.lock"):
            _Sync(output, uri, patience_seconds=TRIAL_PROCESS_SECONDS).deliver(only=missing)


def _is_delivered(paths: RunPaths) -> bool:
    from qlora_exp.tracking.state import read_state, record_digest

    state = read_state(paths)
    return state is not None and state.delivered and state.record_digest == record_digest(paths)


def _is_complete(paths: RunPaths, mlflow_run_id: str | None) -> bool:
    """Whether the store's run ``mlflow_run_id`` (``None``: there is none) has everything that the folder holds."""
    from qlora_exp.tracking.state import read_state

    state = read_state(paths)
    return _is_delivered(paths) and state is not None and state.mlflow_run_id == mlflow_run_id


class _Sync:
    """One pass over the run folders. A store that failed is not tried again: each try costs its timeout.

    ``patience_seconds``: how long to wait for another process that is delivering the same run.
    """

    def __init__(
        self, output: OutputPaths, uri: str | None, patience_seconds: float = 60.0, experiment: str | None = None
    ) -> None:
        self._patience_seconds = patience_seconds
        self._experiment = experiment
        self._output = output
        self._uri = uri
        self._opened: dict[Store, OpenStore] = {}
        self._present: dict[Store, dict[str, str | None]] = {}
        self._broken: dict[Store, str] = {}
        self._parents: dict[tuple[Store, str, str | None], str | None] = {}
        self._studies: dict[tuple[Store, str], None] = {}

    def deliver(self, only: Set[str] | None = None) -> SyncReport:
        from qlora_exp.tracking.store import store_problem

        by_result: dict[str, list[str]] = {
            "delivered": [],
            "already": [],
            "running": [],
            "elsewhere": [],
            "deleted": [],
        }
        failed: dict[str, str] = {}
        for paths in run_folders(self._output):
            if only is not None and paths.folder.name not in only:
                continue
            try:
                record = read_record(paths.record)
                by_result[self._one(record, paths)].append(record.run_id)
            except QloraExpError as error:
                failed[paths.folder.name] = str(error)
        studies = []
        for store, name in self._studies:
            try:
                studies += [name] if self._study(store, name) else []
            except Exception as error:  # every backend raises its own types
                failed[f"study {name}"] = f"not delivered: {store_problem(error)}"
        return SyncReport(
            **{name: tuple(ids) for name, ids in by_result.items()}, studies=tuple(studies), failed=failed
        )

    def _one(self, record: RunRecord, paths: RunPaths) -> str:
        from qlora_exp.tracking.state import delivery_lock

        if not record.status.ended:
            return "elsewhere" if record.process is not None and is_alive(record.process) is None else "running"
        store = _locate(self._tracking(record), self._output)
        opened = self._open(store)
        if record.trial is not None:
            self._studies[store, record.trial.study] = None
        mlflow_run_id = self._present[store].get(record.run_id)
        if record.run_id in self._present[store] and mlflow_run_id is None:
            return "deleted"
        if _is_complete(paths, mlflow_run_id):
            return "already"
        with delivery_lock(paths.tracking_lock, self._patience_seconds):
            return self._deliver_one(read_record(paths.record), paths, store, opened)

    def _deliver_one(self, record: RunRecord, paths: RunPaths, store: Store, opened: OpenStore) -> str:
        """Deliver ``record``, read again under the lock: another process may have delivered or resumed the run
        meanwhile."""
        from qlora_exp.tracking.deliver import create, deliver_all, find
        from qlora_exp.tracking.state import TrackingState, record_digest, write_state
        from qlora_exp.tracking.store import bounded_calls, store_problem

        if not record.status.ended:
            return "running"
        digest, mlflow_run_id = record_digest(paths), None
        state = TrackingState(store.shown_uri, store.experiment, opened.experiment_id)
        try:
            with bounded_calls(store.timeout_seconds):
                mlflow_run_id = find(opened.client, opened.experiment_id, record.run_id)
                if _is_complete(paths, mlflow_run_id):
                    return "already"
                parent = self._parent(store, opened, record)
                mlflow_run_id = mlflow_run_id or create(opened.client, opened.experiment_id, record, parent)
                deliver_all(opened.client, mlflow_run_id, record, paths, parent)
        except Exception as error:  # every backend raises its own types
            reason = store_problem(error)
            self._forget_if_gone(store)
            write_state(paths, replace(state, mlflow_run_id=mlflow_run_id, error=reason))
            raise TrackingError(
                f"not delivered: {reason}", store.shown_uri, sync_command(self._output) + " tries again"
            ) from None
        write_state(paths, replace(state, mlflow_run_id=mlflow_run_id, delivered=True, record_digest=digest))
        return "delivered"

    def _parent(self, store: Store, opened: OpenStore, record: RunRecord) -> str | None:
        from qlora_exp.tracking.study import parent_run

        if record.trial is None:
            return None
        key = (store, record.trial.study, record.trial.study_id)
        if key not in self._parents:
            self._parents[key] = parent_run(store, opened, self._output, record)
        return self._parents[key]

    def _study(self, store: Store, name: str) -> bool:
        """Deliver a study's parent run if the store lacks something of it. A running sweep delivers its own. Returns
        whether it was delivered."""
        from qlora_exp.tracking.state import read_state, write_state
        from qlora_exp.tracking.study import deliver_study, read_definition, read_summary, study_digest

        paths = self._output.study(name)
        definition, summary = read_definition(paths), read_summary(paths)
        if definition is None or summary is None or not summary.status.ended:
            return False
        opened = self._open(store)
        state = read_state(paths)
        if (
            state is not None
            and state.delivered
            and state.record_digest == study_digest(paths)
            and (state.uri, state.experiment_id) == (store.shown_uri, opened.experiment_id)
        ):
            return False
        write_state(paths, deliver_study(store, opened, paths, definition, summary))
        return True

    def _open(self, store: Store) -> OpenStore:
        from qlora_exp.tracking.deliver import present_runs
        from qlora_exp.tracking.store import bounded_calls, open_store, store_problem

        if store in self._broken:
            raise TrackingError(
                f"not delivered: {self._broken[store]}", store.shown_uri, sync_command(self._output) + " tries again"
            )
        if store not in self._opened:
            try:
                opened = open_store(store)
                with bounded_calls(store.timeout_seconds):
                    self._present[store] = present_runs(opened.client, opened.experiment_id)
                self._opened[store] = opened
            except Exception as error:  # every backend raises its own types
                self._broken[store] = store_problem(error)
                raise self._failed(self._broken[store], store) from None
        return self._opened[store]

    def _failed(self, reason: str, store: Store) -> TrackingError:
        return TrackingError(f"not delivered: {reason}", store.shown_uri, f"{sync_command(self._output)} tries again")

    def _forget_if_gone(self, store: Store) -> None:
        """After a failed delivery, check whether the store itself has failed. If so, its other runs are not tried."""
        from qlora_exp.tracking.store import open_store

        try:
            open_store(store)
        except TrackingError as error:
            self._broken[store] = error.what

    def _tracking(self, record: RunRecord) -> TrackingConfig:
        raw: dict[str, Any] = record.config.get("tracking") or {}
        uri = self._uri or raw.get("uri")
        if uri is not None and REDACTED in uri:
            raise TrackingError(
                "the record keeps tracking.uri without its password",
                uri,
                f"qlora-exp sync{root_option(self._output)} --uri URI, with the password in the URI or in the "
                "environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
            )
        return TrackingConfig(
            enabled=True,
            uri=uri,
            experiment=self._experiment or raw.get("experiment") or DEFAULT_EXPERIMENT,
            timeout_seconds=float(raw.get("timeout_seconds") or DEFAULT_TIMEOUT_SECONDS),
        )


def _mark_records(output: OutputPaths, only: Set[str] | None = None) -> dict[str, str]:
    """Mark records of dead processes as INTERRUPTED. Returns their run ids by folder name."""
    repaired = {}
    for paths in run_folders(output):
        if only is not None and paths.folder.name not in only:
            continue
        try:
            record = read_record(paths.record)
        except RecordError:
            continue  # ls and sync report it; it can't be repaired
        if record.status is not Status.RUNNING or (
            record.process is not None and is_alive(record.process) is not False
        ):
            continue
        write_json(paths.record, _interrupted(record, paths))
        repaired[paths.folder.name] = record.run_id
    return repaired


def _interrupted(record: RunRecord, paths: RunPaths) -> RunRecord:
    """Return the record of a run whose process died; its end is the last modification of a file in the folder."""
    files = [file for file in (paths.record, paths.curve) if file.is_file()]
    last = datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC).isoformat(timespec="seconds")
    process = f"process {record.process.pid}" if record.process is not None else "the process"
    return record.replace(
        status=Status.INTERRUPTED,
        ended_at=last,
        failure=killed_for_memory(record, None, None)
        or Failure(
            kind="ProcessDied",
            message=f"{process} ended without finishing the run (killed, out of memory, or the machine stopped); "
            f"its last sign of life was at {last}",
            hint="run it again with the same settings; if training.save_every_steps is set, it continues from the "
            "newest checkpoint",
        ),
    )


def _locate(tracking: TrackingConfig, output: OutputPaths) -> Store:
    from qlora_exp.tracking.store import locate

    return locate(tracking, output)
