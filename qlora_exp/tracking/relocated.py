"""A tracking database that was moved or copied with its artifacts: MLflow keeps their absolute places."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

PLACES = (("experiments", "artifact_location"), ("runs", "artifact_uri"))


def relocate_artifacts(database: Path, location: str, artifacts: Path) -> bool:
    """Have the ``database`` name ``artifacts``, which are beside it, where it names those of its former place.

    Args:
        location: of an experiment's artifacts, as the database has it.

    Returns: whether there was something to change.
    """
    parts = urlsplit(location)
    before = Path(unquote(parts.path))
    ours = parts.scheme == "file" and before.name == artifacts.name and artifacts.is_dir()
    if not ours or before == artifacts or (before.exists() and before.samefile(artifacts)):
        return False
    old, new = before.as_uri(), artifacts.as_uri()
    with closing(sqlite3.connect(database)) as connection, connection:
        for table, column in PLACES:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
            )
    return True
