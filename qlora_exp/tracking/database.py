"""The SQLite file of a local MLflow store: created completely or not at all, checked, and moved with its artifacts."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qlora_exp.errors import TrackingError

LOCK_SECONDS = 180.0
"""A fresh database takes seconds to create, more on a busy machine; other processes wait for it."""

INCOMPLETE_ERRORS = (
    "out-of-date database schema",
    "already exists",
    "duplicate column",
    "no such table",
    "no such column",
)
"""Parts of the errors of MLflow and its migrations if the tables are incomplete, or older than this MLflow."""


def check_writable(database: Path) -> None:
    """Fail at once if the file is no writable database; MLflow would retry for a minute and a half."""
    database.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=LOCK_SECONDS)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
            # Takes and releases the write lock: a read-only file or folder fails here, not after the training.
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        hint = "move it away (qlora-exp sync rebuilds it from the run folders) or set tracking.uri"
        if "locked" in str(error):
            hint = "end the process that uses it, or run with tracking=off and qlora-exp sync later"
        raise TrackingError(f"the tracking database can't be used: {error}", str(database), hint) from None


def create_if_missing(database: Path) -> None:
    """Create the database unless it exists, and delete what an interrupted creation left. Requires the store's lock.

    MLflow creates its tables by a series of migrations, which takes seconds. A process that is killed meanwhile would
    leave a database that MLflow can never open. So the database has a temporary name until it is complete.
    """
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine_with_retry

    if database.exists() and database.stat().st_size > 0:
        return
    for leftover in database.parent.glob(f"{database.name}.part-*"):
        leftover.unlink(missing_ok=True)
    unfinished = database.with_name(f"{database.name}.part-{os.getpid()}")
    engine = create_sqlalchemy_engine_with_retry(f"sqlite:///{unfinished}")
    try:
        _initialize_tables(engine)
    finally:
        engine.dispose()
    os.replace(unfinished, database)


def set_aside_if_incomplete(database: Path, uri: str, reason: str) -> bool:
    """Rename a database that was never complete and fails with ``reason``. Returns whether it was such a database."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if not any(part in reason for part in INCOMPLETE_ERRORS) or _was_used(database):
        return False
    number = 1
    while (aside := database.with_name(f"{database.name}.half-made-{number}")).exists():
        number += 1
    engine = SqlAlchemyStore._engine_map.pop(uri, None)
    if engine is not None:
        engine.dispose()
    os.replace(database, aside)
    return True


def _was_used(database: Path) -> bool:
    """Whether MLflow has used the database: it holds an experiment, which MLflow creates after the last migration, or a
    run. Such a database belongs to another version, and a server may have it open. True also if it can't be read."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(database)) as connection:
        existing = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
        used = [table for table in ("experiments", "runs") if table in existing]
        return any(connection.execute(f"select 1 from {table} limit 1").fetchone() is not None for table in used)
    return True


def relocate_artifacts(database: Path, location: str, artifacts: Path) -> None:
    """Replace the artifacts' former folder by ``artifacts``, the folder next to the ``database``, in all its paths.

    MLflow stores absolute paths. ``location``: an experiment's artifact location, as the database has it.
    """
    parts = urlsplit(location)
    recorded = Path(unquote(parts.path))
    is_ours = parts.scheme == "file" and recorded.name == artifacts.name and artifacts.is_dir()
    if not is_ours or recorded == artifacts or (recorded.exists() and recorded.samefile(artifacts)):
        return
    old, new = recorded.as_uri(), artifacts.as_uri()
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
            )
