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
    """Rename a database that can't be opened for ``reason`` and that was never whole; False: it is none such."""
    if not any(sign in reason for sign in HALF_MADE) or _was_whole(database):
        return False
    number = 1
    while (aside := database.with_name(f"{database.name}.half-made-{number}")).exists():
        number += 1
    engine = SqlAlchemyStore._engine_map.pop(uri, None)
    if engine is not None:
        engine.dispose()
    os.replace(database, aside)
    return True


def _was_whole(database: Path) -> bool:
    """Whether MLflow has used it: with its first experiment, which it makes after the last migration, or a run. Such a
    database is another version's, and a server may have it open. True also where that can't be known."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(database)) as opened:
        there = {name for (name,) in opened.execute("select name from sqlite_master where type = 'table'")}
        used = [table for table in ("experiments", "runs") if table in there]
        return any(opened.execute(f"select 1 from {table} limit 1").fetchone() is not None for table in used)
    return True
