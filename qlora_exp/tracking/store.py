"""Locate and open the MLflow store of a run: under a lock, with short timeouts, without telemetry."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shlex
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from qlora_exp.config.schema import TrackingConfig
from qlora_exp.errors import TrackingError, nearest
from qlora_exp.paths import OutputPaths
from qlora_exp.records.redaction import redact_text
from qlora_exp.system.environment import NO_TELEMETRY
from qlora_exp.tracking.database import (
    LOCK_SECONDS,
    check_writable,
    create_if_missing,
    relocate_artifacts,
    set_aside_if_incomplete,
)
from qlora_exp.tracking.ui import EXPERIMENT_TAGS, VIEW_TAGS

# Before mlflow is imported: it decides on telemetry at import.
os.environ.update(NO_TELEMETRY)

from mlflow import MlflowClient
from mlflow.environment_variables import (
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
)
from mlflow.exceptions import MlflowException

DATABASE_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")
SERVER_SCHEMES = ("http", "https", "databricks")

_environment_lock = threading.RLock()
"""MLflow reads its HTTP settings from the process's environment: one thread at a time may set them."""


@dataclass(frozen=True)
class Store:
    """An MLflow store. ``database``: its SQLite file. ``artifacts``: the folder of a database's artifacts. A server has
    neither, and no ``lock``."""

    uri: str
    experiment: str
    timeout_seconds: float
    database: Path | None = None
    artifacts: Path | None = None
    lock: Path | None = None

    @property
    def is_server(self) -> bool:
        return self.lock is None

    @property
    def shown_uri(self) -> str:
        return redact_text(self.uri)


@dataclass(frozen=True)
class OpenStore:
    """A store that was reached: its client, and the experiment's id there."""

    client: MlflowClient
    experiment_id: str


def locate(tracking: TrackingConfig, output: OutputPaths) -> Store:
    """Return the store that ``tracking`` names, without opening it.

    Raises:
        TrackingError: MLflow can't use the URI, or the experiment's name or the timeout is invalid.
    """
    if not tracking.experiment.strip():
        raise TrackingError("tracking.experiment is empty", "tracking.experiment", "tracking.experiment=qlora-exp")
    if not (math.isfinite(tracking.timeout_seconds) and tracking.timeout_seconds > 0):
        raise TrackingError(
            f"tracking.timeout_seconds={tracking.timeout_seconds} is not a waiting time",
            "tracking.timeout_seconds",
            "a positive number of seconds, e.g. tracking.timeout_seconds=5",
        )
    uri = tracking.uri or f"sqlite:///{output.mlflow_database}"
    scheme = uri.split("://")[0].split(":")[0].split("+")[0].lower() if ":" in uri else uri
    store = Store(uri, tracking.experiment, tracking.timeout_seconds)
    if scheme in SERVER_SCHEMES:
        if scheme != "databricks" and not _has_host(uri):
            raise TrackingError(
                f"tracking.uri={redact_text(uri)} is not a server's address",
                "tracking.uri",
                "tracking.uri=http://HOST:PORT",
            )
        return store
    if scheme not in DATABASE_SCHEMES:
        raise TrackingError(
            f"tracking.uri={redact_text(uri)} is not a tracking store",
            "tracking.uri",
            f"{nearest(scheme, (*DATABASE_SCHEMES, *SERVER_SCHEMES))} e.g. tracking.uri=sqlite:////data/mlflow.db or "
            "tracking.uri=http://127.0.0.1:5000; null: mlflow.db next to output_root",
        )
    if scheme != "sqlite":
        return replace(store, artifacts=output.mlflow_artifacts, lock=output.root / "tracking.lock")
    path = uri.partition(":///")[2]
    if not path or path == ":memory:":
        raise TrackingError(
            f"tracking.uri={uri} names no file",
            "tracking.uri",
            "tracking.uri=sqlite:////data/mlflow.db (four slashes before an absolute path)",
        )
    database = Path(path).expanduser().absolute()
    return replace(
        store,
        uri=f"sqlite:///{database}",
        database=database,
        artifacts=database.parent / output.mlflow_artifacts.name,
        lock=database.with_name(f"{database.name}.lock"),
    )


def _has_host(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def open_store(store: Store) -> OpenStore:
    """Open the store, and find or create the experiment. No other call checks that the store can be reached.

    A file lock guards the creation of a database: eight processes that start on a fresh SQLite database would otherwise
    destroy it.

    Raises:
        TrackingError: the store can't be opened.
    """
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if store.lock is None:
        return _connect(store)
    try:
        store.lock.parent.mkdir(parents=True, exist_ok=True)
        if store.database is not None:
            check_writable(store.database)
        with FileLock(store.lock, timeout=LOCK_SECONDS):
            if store.database is None:
                return _connect(store)
            create_if_missing(store.database)
            try:
                return _connect(store)
            except TrackingError as error:
                cause = error.__cause__
                if cause is None or not set_aside_if_incomplete(store.database, store.uri, str(cause)):
                    raise
            create_if_missing(store.database)
            return _connect(store)
    except Timeout:
        raise TrackingError(
            f"another process has kept the tracking store locked for {LOCK_SECONDS:.0f} s",
            str(store.lock),
            "see which process holds it, or run with tracking=off and qlora-exp sync later",
        ) from None
    except OSError as error:
        raise TrackingError(
            f"the tracking store can't be opened: {error.strerror or error}",
            str(store.database or store.shown_uri),
            "choose a writable folder: tracking.uri=sqlite:////DIR/mlflow.db, or output_root=DIR",
        ) from None


def open_or_warn(store: Store) -> OpenStore | None:
    """Return the open store. If another MLflow version made its tables, print a warning and return ``None``."""
    try:
        return open_store(store)
    except OtherVersion as error:
        warning = f"warning: nothing is delivered to MLflow: {error.what}"
        print(f"{warning}\n  where: {error.where}\n  do:    {error.hint}", file=sys.stderr, flush=True)
        return None


@contextlib.contextmanager
def bounded_calls(timeout_seconds: float) -> Iterator[None]:
    """Limit each of MLflow's calls to one short try. Its defaults are 120 s a call and seven retries, four minutes in
    all.

    The settings are restored afterwards, because the calling program may use MLflow, too. A variable that was unset
    gets MLflow's default, which has the same effect: deleting it could break a thread that iterates over the
    environment.
    """
    settings = {
        MLFLOW_HTTP_REQUEST_TIMEOUT: str(max(1, math.ceil(timeout_seconds))),
        MLFLOW_HTTP_REQUEST_MAX_RETRIES: "0",
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT: "true",
    }
    with _environment_lock:
        previous = {variable.name: os.environ.get(variable.name, str(variable.default)) for variable in settings}
        os.environ.update({variable.name: value for variable, value in settings.items()})
        try:
            yield
        finally:
            os.environ.update(previous)


def store_problem(error: BaseException) -> str:
    """Return why the store failed, as one redacted line."""
    text = str(error).strip() or type(error).__name__
    return redact_text(" ".join(text.split()))[:500]


def _connect(store: Store) -> OpenStore:
    try:
        with bounded_calls(store.timeout_seconds):
            client = MlflowClient(tracking_uri=store.uri, registry_uri=store.uri)
            return OpenStore(client, _experiment_id(client, store))
    except TrackingError:
        raise
    except Exception as error:  # every backend's driver raises its own types
        version_error = _other_version(error, store)
        if version_error is not None:
            raise version_error from error
        raise TrackingError(
            f"the tracking store can't be opened: {store_problem(error)}",
            store.shown_uri,
            "start it, name another (tracking.uri=URI, for sync --uri URI), or run with tracking=off and "
            "qlora-exp sync later",
        ) from error


class OtherVersion(TrackingError):
    """Another MLflow version made the database's tables. Runs continue; ``sync`` delivers them once the versions
    match."""


def _other_version(error: Exception, store: Store) -> OtherVersion | None:
    import mlflow

    revision = re.search(r"found version (\w+), but expected|Can't locate revision identified by '(\w+)'", str(error))
    if revision is None:
        return None
    table_version = revision[1] or revision[2]
    migrations = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    if any(file.name.startswith(table_version) for file in migrations.glob("*.py")):
        hint = f"copy the database, then: mlflow db upgrade {store.shown_uri}; then qlora-exp sync"
        return OtherVersion(f"an older MLflow than {mlflow.__version__} made the tables", store.shown_uri, hint)
    hint = "pip install --upgrade mlflow, or tracking.uri=sqlite:////DIR/OTHER.db; then qlora-exp sync"
    what = f"a newer MLflow than {mlflow.__version__} made the tables (their version {table_version} is unknown here)"
    return OtherVersion(what, store.shown_uri, hint)


def _experiment_id(client: MlflowClient, store: Store) -> str:
    """Return the experiment's id; create the experiment if it is missing."""
    experiment = client.get_experiment_by_name(store.experiment)
    if experiment is None:
        location = store.artifacts.as_uri() if store.artifacts is not None else None
        try:
            return str(client.create_experiment(store.experiment, artifact_location=location, tags=EXPERIMENT_TAGS))
        except MlflowException:
            experiment = client.get_experiment_by_name(store.experiment)  # another process was faster
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {store.experiment!r} was deleted in MLflow",
            "tracking.experiment",
            f"restore it: MLFLOW_TRACKING_URI={shlex.quote(store.shown_uri)} mlflow experiments restore -x "
            f"{experiment.experiment_id}; or use another: tracking.experiment=NAME, for sync --experiment NAME",
        )
    if not store.is_server and str(experiment.artifact_location).startswith("mlflow-artifacts:"):
        raise TrackingError(
            f"the experiment {store.experiment!r} was made by a server, and only a server can write its artifacts",
            "tracking.experiment",
            "use another: tracking.experiment=NAME, for sync --experiment NAME; or that server: "
            "tracking.uri=http://127.0.0.1:PORT, for sync --uri http://127.0.0.1:PORT",
        )
    if store.database is not None and store.artifacts is not None:
        relocate_artifacts(store.database, str(experiment.artifact_location), store.artifacts)
    for key, value in VIEW_TAGS.items():  # earlier versions stored other views
        if experiment.tags.get(key) != value:
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return str(experiment.experiment_id)
