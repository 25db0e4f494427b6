"""Optuna's storage behind a study: opened by many processes at once, and told apart from a damaged one."""

from __future__ import annotations

import shlex
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import psutil
import sqlalchemy
from filelock import FileLock

from qlora_exp.errors import StudyError

SQLITE = "sqlite:///"
BUSY_SECONDS = 120.0
"""How long a writer waits for the others'; each holds SQLite for milliseconds."""

LOCAL_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "apfs", "hfs")
"""SQLite's write-ahead log needs memory that all writers share: on a network's disk it would damage the database."""


def connect(url: str, name: str) -> optuna.storages.BaseStorage:
    """Open the storage at ``url``, creating its tables once whoever comes first.

    Raises:
        StudyError: the database is damaged, can't be reached, or is one in memory.
    """
    if url == "sqlite://" or (url.startswith(SQLITE) and (":memory:" in url or "mode=memory" in url)):
        what = "a storage in memory ends with its process, and those of a study are several"
        raise StudyError(what, url, "sweep.storage=null for optuna.db under output_root, or sqlite:////DIR/FILE.db")
    file = sqlite_file(url)
    if file is None:
        return _opened(url, {}, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(f"{file}.lock")
    try:
        lock.touch()
    except FileNotFoundError:  # a folder that takes no files, as /proc: the lock would be tried for ever
        hint = "sweep.storage=null for optuna.db under output_root, or sqlite:////DIR/FILE.db"
        raise StudyError("the study's database can't be made there", str(file), hint) from None
    with FileLock(lock):
        check_whole(file, name)
        braces_escaped = url.replace("{", "{{").replace("}", "}}")
        write_ahead = on_local_disk(file)
        _set_journal(file, write_ahead)
        return _opened(braces_escaped, {"connect_args": {"timeout": BUSY_SECONDS}}, name, write_ahead)


def on_local_disk(file: Path) -> bool:
    """Whether the file is where one machine alone can write it; a disk of an unknown kind may be another's as well."""
    file = file.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if file.is_relative_to(part.mountpoint)]
    # Of two on one folder the later hides the earlier.
    nearest = max(reversed(mounts), key=lambda part: len(part.mountpoint), default=None)
    return nearest is not None and nearest.fstype.lower() in LOCAL_DISKS


def _set_journal(file: Path, write_ahead: bool) -> None:
    """A database keeps its mode: one brought here from a local disk may have to leave it."""
    try:
        with closing(sqlite3.connect(file, timeout=BUSY_SECONDS)) as database:
            database.execute(f"PRAGMA journal_mode={'WAL' if write_ahead else 'DELETE'}")
    except sqlite3.OperationalError as error:
        if write_ahead:  # a disk that is full, or a database in use in its old mode: it then keeps that
            return
        raise StudyError(
            f"the study's database can't leave the write-ahead mode, which a network's disk doesn't carry: {error}",
            str(file),
            "wait until nobody uses it, or give all machines a PostgreSQL server: sweep.storage=postgresql://…",
        ) from None


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
    hint = f"qlora-exp resume {shlex.quote(name)} --rebuild makes the study again from its runs"
    return StudyError(what, str(where), hint)


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


def _opened(
    url: str, engine_options: dict[str, object], name: str, write_ahead: bool = False
) -> optuna.storages.BaseStorage:
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs=engine_options)
        if write_ahead:
            storage.engine.dispose()  # connections of before
            sqlalchemy.event.listen(storage.engine, "connect", _do_not_wait)
        return optuna.storages.get_storage(storage)
    except ImportError as error:
        raise StudyError(
            f"the storage needs a package: {error}", _shown(url), "pip install 'psycopg[binary]' for PostgreSQL"
        ) from None
    except Exception as error:  # every driver has its own
        reason = str(error).splitlines()[0]
        raise StudyError(
            f"the storage can't be opened: {reason}", _shown(url), f"then qlora-exp resume {shlex.quote(name)}"
        ) from None


def unreachable(error: BaseException) -> bool:
    """Whether ``error`` is that of a storage which doesn't answer: its server is gone, or its file kept locked."""
    return isinstance(error, sqlalchemy.exc.OperationalError | optuna.exceptions.StorageInternalError)


def lost(error: BaseException, url: str, name: str) -> StudyError:
    """What to tell of an :func:`unreachable` storage."""
    reason = str(error.__cause__ or error).splitlines()[0]
    hint = f"when it answers again: qlora-exp resume {shlex.quote(name)}"
    return StudyError(f"the study's storage doesn't answer: {reason}", _shown(url), hint)


def _do_not_wait(connection: Any, _: object) -> None:
    """A commit to the write-ahead log then is one write without a wait for the disk. What is committed outlives every
    process that is killed; a power failure may take back the last commits, never damage the file."""
    connection.execute("PRAGMA synchronous=NORMAL")


def _shown(url: str) -> str:
    """The URL without user and password."""
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.rpartition("@")[2]
