"""Create MLflow's SQLite database completely or not at all.

MLflow creates its tables by a series of migrations, which takes seconds. A process that is killed or interrupted
meanwhile would leave a database that MLflow can never open. So the database gets a temporary name until it is complete.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine_with_retry
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

INCOMPLETE_ERRORS = (
    "out-of-date database schema",
    "already exists",
    "duplicate column",
    "no such table",
    "no such column",
)
"""Parts of the errors of MLflow and its migrations if the tables are incomplete, or older than this MLflow."""


def create_if_missing(database: Path) -> None:
    """Create the database unless it exists, and delete what an interrupted creation left. Requires the store's lock."""
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
