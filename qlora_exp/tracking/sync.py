"""Deliver what MLflow has not received."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from qlora_exp.config.schema import TrackingConfig
from qlora_exp.errors import QloraExpError, TrackingError
from qlora_exp.paths import CONF, OutputPaths, RunPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.find import run_folders
from qlora_exp.records.redaction import REDACTED
from qlora_exp.records.types import RunRecord
from qlora_exp.system.environment import is_alive
from qlora_exp.tracking.deliver import PresentRun, create, deliver_all, find, present_runs, rename_earlier
from qlora_exp.tracking.interrupted import mark_records
from qlora_exp.tracking.state import (
    STATE_LOCK_SECONDS,
    TrackingState,
    delivered_state,
    delivery_lock,
    read_state,
    root_option,
    write_state,
)
from qlora_exp.tracking.store import OpenStore, Store, bounded_calls, locate, open_store, store_problem
from qlora_exp.tracking.study import deliver_study, parent_run, read_definition, read_summary, study_digest

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
    sync = _Sync(output, uri, experiment)
    if uri is not None or experiment is not None:
        locate(sync.tracking({}), output)
    marked = mark_records(output)
    return replace(sync.deliver(), repaired=tuple(marked.values()))


def deliver_folders(output: OutputPaths, names: Set[str]) -> None:
    """Deliver the runs in these folders, as :func:`sync_runs` does it."""
    _Sync(output).deliver(names)


def deliver_runs(output: OutputPaths, run_ids: Iterable[str], uri: str | None = None) -> None:
    """Deliver those of these runs that their own process could not deliver, for example because it was killed.

    Never raises, and calls MLflow only if something is missing. ``uri`` as for :func:`sync_runs`.
    """
    missing = {paths.folder.name for run_id in run_ids if delivered_state(paths := output.run(run_id)) is None}
    if missing:
        with contextlib.suppress(OSError):
            mark_records(output, missing)
        with contextlib.suppress(OSError):
            _Sync(output, uri, patience_seconds=TRIAL_PROCESS_SECONDS).deliver(missing)


class _Sync:
    """One pass over the run folders. A store that failed is not tried again: each try costs its timeout.

    ``patience_seconds``: how long to wait for another process that is delivering the same run.
    """

    def __init__(
        self,
        output: OutputPaths,
        uri: str | None = None,
        experiment: str | None = None,
        patience_seconds: float = STATE_LOCK_SECONDS,
    ) -> None:
        self._output, self._uri, self._experiment = output, uri, experiment
        self._patience_seconds = patience_seconds
        self._opened: dict[Store, OpenStore] = {}
        self._broken: dict[Store, str] = {}
        self._present: dict[Store, dict[str, PresentRun]] = {}
        self._parents: dict[tuple[Store, str, str | None], str | None] = {}
        self._studies: dict[tuple[Store, str], None] = {}
        """Studies of the runs, in their order."""

    def deliver(self, only: Set[str] | None = None) -> SyncReport:
        """Deliver the runs, ``only`` those in these folders, then the parent runs of their studies."""
        by_result: dict[str, list[str]] = {}
        failed: dict[str, str] = {}
        studies = []
        with FileLock(self._output.root / "sync.lock"):
            for paths in run_folders(self._output):
                if only is not None and paths.folder.name not in only:
                    continue
                try:
                    record = read_record(paths.record)
                    by_result.setdefault(self._deliver_run(record, paths), []).append(record.run_id)
                except QloraExpError as error:
                    failed[paths.folder.name] = str(error)
            for store, name in self._studies:
                try:
                    studies += [name] if self._deliver_study(store, name) else []
                except Exception as error:  # every backend raises its own types
                    failed[f"study {name}"] = f"not delivered: {store_problem(error)}"
        results = {name: tuple(run_ids) for name, run_ids in by_result.items()}
        return SyncReport(**results, studies=tuple(studies), failed=failed)

    def tracking(self, recorded: Mapping[str, Any]) -> TrackingConfig:
        """Return the settings ``recorded`` in a run's configuration, with the replacements of this pass."""
        defaults = yaml.safe_load((CONF / "tracking" / "mlflow.yaml").read_text(encoding="utf-8"))
        return TrackingConfig(
            enabled=True,
            uri=self._uri or recorded.get("uri"),
            experiment=self._experiment or recorded.get("experiment") or defaults["experiment"],
            timeout_seconds=float(recorded.get("timeout_seconds") or defaults["timeout_seconds"]),
        )

    def _deliver_run(self, record: RunRecord, paths: RunPaths) -> str:
        """Deliver one run, and return the field of :class:`SyncReport` that gets its id."""
        if not record.status.ended:
            return "elsewhere" if record.process is not None and is_alive(record.process) is None else "running"
        tracking = self.tracking(record.config.get("tracking") or {})
        if tracking.uri is not None and REDACTED in tracking.uri:
            raise TrackingError(
                "the record keeps tracking.uri without its password",
                tracking.uri,
                f"qlora-exp sync{root_option(self._output)} --uri URI, with the password in the URI or in the "
                "environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
            )
        store = locate(tracking, self._output)
        opened = self._open(store)
        if record.trial is not None:
            self._studies[store, record.trial.study] = None
        present = self._present[store].get(record.run_id)
        mlflow_run_id = present.mlflow_run_id if present is not None else None
        if present is not None and mlflow_run_id is None:
            return "deleted"
        if present is not None:
            with contextlib.suppress(Exception), bounded_calls(store.timeout_seconds):  # the old name does no harm
                rename_earlier(opened.client, present, record)
        if _is_complete(paths, mlflow_run_id):
            return "already"
        with delivery_lock(paths.tracking_lock, self._patience_seconds):
            record = read_record(paths.record)  # another process may have delivered or resumed the run meanwhile
            if not record.status.ended:
                return "running"
            state = TrackingState(store.shown_uri, store.experiment, opened.experiment_id)
            try:
                with bounded_calls(store.timeout_seconds):
                    mlflow_run_id = find(opened.client, opened.experiment_id, record.run_id)
                    if _is_complete(paths, mlflow_run_id):
                        return "already"
                    state = replace(state, mlflow_run_id=mlflow_run_id)
                    parent = self._parent(store, opened, record)
                    mlflow_run_id = mlflow_run_id or create(opened.client, opened.experiment_id, record, parent)
                    state = replace(state, mlflow_run_id=mlflow_run_id)
                    state = deliver_all(opened.client, state, record, paths, parent)
            except Exception as error:  # every backend raises its own types
                reason = store_problem(error)
                try:
                    open_store(store)
                except TrackingError as gone:  # the store itself has failed: don't try its other runs
                    self._broken[store] = gone.what
                write_state(paths, replace(state, error=reason))
                raise self._not_delivered(store, reason) from None
            write_state(paths, state)
        return "delivered"

    def _parent(self, store: Store, opened: OpenStore, record: RunRecord) -> str | None:
        if record.trial is None:
            return None
        key = (store, record.trial.study, record.trial.study_id)
        if key not in self._parents:
            self._parents[key] = parent_run(store, opened, self._output, record)
        return self._parents[key]

    def _deliver_study(self, store: Store, name: str) -> bool:
        """Deliver a study's parent run if the store lacks something of it. A running sweep delivers its own. Returns
        whether it was delivered."""
        paths = self._output.study(name)
        definition, summary = read_definition(paths), read_summary(paths)
        if definition is None or summary is None or not summary.status.ended:
            return False
        opened, state = self._open(store), read_state(paths)
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
        if store not in self._opened and store not in self._broken:
            try:
                opened = open_store(store)
                with bounded_calls(store.timeout_seconds):
                    self._present[store] = present_runs(opened.client, opened.experiment_id)
                self._opened[store] = opened
            except Exception as error:  # every backend raises its own types
                self._broken[store] = store_problem(error)
        if store in self._broken:
            raise self._not_delivered(store, self._broken[store])
        return self._opened[store]

    def _not_delivered(self, store: Store, reason: str) -> TrackingError:
        hint = f"qlora-exp sync{root_option(self._output)} tries again"
        return TrackingError(f"not delivered: {reason}", store.shown_uri, hint)


def _is_complete(paths: RunPaths, mlflow_run_id: str | None) -> bool:
    """Whether the store's run ``mlflow_run_id`` (``None``: there is none) has everything that the folder holds."""
    state = delivered_state(paths)
    return state is not None and state.mlflow_run_id == mlflow_run_id
