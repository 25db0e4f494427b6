"""A fresh MLflow database in SQLite, made whole or not at all.

MLflow creates its tables by a row of migrations, which takes seconds. A process that is killed in between, or
interrupted, would leave a database that MLflow never opens again. So it is made under another name and then renamed.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine_with_retry
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

HALF_MADE = ("out-of-date database schema", "already exists", "duplicate column", "no such table", "no such column")
"""How MLflow and its migrations tell of one that an earlier version left; or of one that is older than this MLflow."""


def create_if_missing(database: Path) -> None:
    """Called with the store's lock held: what an earlier process left half-made under another name is removed."""
    if database.exists() and database.stat().st_size > 0:
        return
    for left in database.parent.glob(f"{database.name}.part-*"):
        left.unlink(missing_ok=True)
    part = database.with_name(f"{database.name}.part-{os.getpid()}")
    engine = create_sqlalchemy_engine_with_retry(f"sqlite:///{part}")
    try:
        _initialize_tables(engine)
    finally:
        engine.dispose()
    os.replace(part, database)


def set_aside_if_half_made(database: Path, uri: str, reason: str) -> bool:
    """Rename a database that can't be opened for ``reason`` and never held a run; False: it is none such."""
    if not any(sign in reason for sign in HALF_MADE) or _holds_runs(database):
        return False
    number = 1
    while (aside := database.with_name(f"{database.name}.half-made-{number}")).exists():
        number += 1
    engine = SqlAlchemyStore._engine_map.pop(uri, None)
    if engine is not None:
        engine.dispose()
    os.replace(database, aside)
    return True


def _holds_runs(database: Path) -> bool:
    """Also where that can't be known."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(database)) as opened:
        tables = {name for (name,) in opened.execute("select name from sqlite_master where type = 'table'")}
        return "runs" in tables and opened.execute("select 1 from runs limit 1").fetchone() is not None
    return True
