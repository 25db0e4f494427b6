"""Optuna's storage behind a study: opened by many processes at once, and told apart from a damaged one."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
from filelock import FileLock

from qlora_exp.errors import StudyError

SQLITE = "sqlite:///"
BUSY_SECONDS = 120.0
"""How long a writer waits for the others'; each holds SQLite for milliseconds."""


def connect(url: str, name: str) -> optuna.storages.BaseStorage:
    """Open the storage at ``url``, creating its tables once whoever comes first.

    Raises:
        StudyError: the database is damaged, or can't be reached.
    """
    file = sqlite_file(url)
    if file is None:
        return _opened(url, {}, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        check_whole(file, name)
        braces_escaped = url.replace("{", "{{").replace("}", "}}")
        return _opened(braces_escaped, {"connect_args": {"timeout": BUSY_SECONDS}}, name)


def sqlite_file(url: str) -> Path | None:
    """The database file of an SQLite URL (``file:…?uri=true`` as well); ``None`` for a server's."""
    if not url.startswith(SQLITE):
        return None
    name = url.removeprefix(SQLITE)
    return Path(name.removeprefix("file:").partition("?")[0] if name.startswith("file:") else name)


def check_whole(file: Path, name: str) -> None:
    """Raise :class:`StudyError` where ``file`` exists and is no whole SQLite database."""
    if not file.exists():
        return
    try:
        with closing(sqlite3.connect(file, timeout=BUSY_SECONDS)) as database:
            answer = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError as error:
        if "malformed" not in str(error):
            raise StudyError(
                f"the study's database can't be opened: {error}", str(file), "check its folder's permissions and space"
            ) from None
        answer = str(error)
    except sqlite3.DatabaseError as error:
        answer = str(error)
    if answer != "ok":
        raise damaged(f"the study's database is damaged: {answer}", file, name)


def damaged(what: str, where: Path | str, name: str) -> StudyError:
    return StudyError(what, str(where), f"qlora-exp resume {name} --rebuild makes the study again from its runs")


def set_aside(file: Path) -> Path:
    """Rename a damaged database and its journal, which belongs to it alone, to ``….damaged-N``: the new name."""
    number = 1
    while (aside := file.with_name(f"{file.name}.damaged-{number}")).exists():
        number += 1
    for suffix in ("-journal", "-wal", "-shm"):
        extra = file.with_name(file.name + suffix)
        if extra.exists():
            extra.rename(aside.with_name(aside.name + suffix))
    return file.rename(aside)


def _opened(url: str, engine_options: dict[str, object], name: str) -> optuna.storages.BaseStorage:
    try:
        return optuna.storages.get_storage(optuna.storages.RDBStorage(url, engine_kwargs=engine_options))
    except ImportError as error:
        raise StudyError(
            f"the storage needs a package: {error}", _shown(url), "pip install 'psycopg[binary]' for PostgreSQL"
        ) from None
    except Exception as error:  # every driver has its own
        reason = str(error).splitlines()[0]
        raise StudyError(
            f"the storage can't be opened: {reason}", _shown(url), f"then qlora-exp resume {name}"
        ) from None


def _shown(url: str) -> str:
    """The URL without user and password."""
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.rpartition("@")[2]
