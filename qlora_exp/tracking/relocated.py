"""Artifact paths of a tracking database that was moved with its artifacts: MLflow stores absolute paths."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

PATH_COLUMNS = (("experiments", "artifact_location"), ("runs", "artifact_uri"))


def relocate_artifacts(database: Path, location: str, artifacts: Path) -> bool:
    """Replace the artifacts' former folder by ``artifacts`` in all paths of the ``database``.

    Args:
        location: an experiment's artifact location, as the database has it.
        artifacts: the folder next to the database.

    Returns: whether the folder had moved.
    """
    parts = urlsplit(location)
    recorded = Path(unquote(parts.path))
    is_ours = parts.scheme == "file" and recorded.name == artifacts.name and artifacts.is_dir()
    if not is_ours or recorded == artifacts or (recorded.exists() and recorded.samefile(artifacts)):
        return False
    old, new = recorded.as_uri(), artifacts.as_uri()
    with closing(sqlite3.connect(database)) as connection, connection:
        for table, column in PATH_COLUMNS:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
            )
    return True
