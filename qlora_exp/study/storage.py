"""Optuna's storage of a study: opened by many processes at once, also read-only, checked for damage and lost
connections."""

from __future__ import annotations

import shlex
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import psutil
import sqlalchemy
from filelock import FileLock

from qlora_exp.errors import StudyError

SQLITE = "sqlite:///"
BUSY_SECONDS = 120.0
"""How long a writer waits for the others; each locks SQLite for milliseconds only."""

LOCAL_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "apfs", "hfs")
"""SQLite's write-ahead log needs memory that all writers share: on a network file system it would corrupt the
database."""

_copies: list[tempfile.TemporaryDirectory[str]] = []
"""Databases that had to be copied before reading; the copies are deleted when the process ends."""


def connect(url: str, name: str) -> optuna.storages.BaseStorage:
    """Open the storage at ``url``; the first process creates its tables.

    Raises:
        StudyError: the database is damaged, can't be reached, or is one in memory.
    """
    if url == "sqlite://" or (url.startswith(SQLITE) and (":memory:" in url or "mode=memory" in url)):
        what = "a study has several processes, and they can't share a storage in memory"
        raise StudyError(what, url, "sweep.storage=null for optuna.db under output_root, or sqlite:////DIR/FILE.db")
    file = sqlite_file(url)
    if file is None:
        return _open(url, {}, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(f"{file}.lock")
    try:
        lock.touch()
    except FileNotFoundError:  # a folder that can't hold files, such as /proc: FileLock would retry forever
        hint = "sweep.storage=null for optuna.db under output_root, or sqlite:////DIR/FILE.db"
        raise StudyError("the study's database can't be created there", str(file), hint) from None
    with FileLock(lock):
        check_intact(file, name)
        write_ahead = on_local_disk(file)
        _set_journal(file, write_ahead)
        return _open(_braces_escaped(url), {"connect_args": {"timeout": BUSY_SECONDS}}, name, write_ahead)


def connect_read_only(url: str, name: str) -> optuna.storages.BaseStorage:
    """Open the storage at ``url`` without writing anything, so that a copy on a read-only disk can be read, too.

    Raises:
        StudyError: the database is damaged or lost, or can't be read.
    """
    file = sqlite_file(url)
    if file is None:
        return connect(url, name)
    if not file.exists():
        raise damaged_error("the study's database doesn't exist", file, name)
    address = _read_only_uri(file, name)

    def connection() -> sqlite3.Connection:
        return sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)

    try:
        url = _braces_escaped(f"{SQLITE}{file}")
        backend = optuna.storages.RDBStorage(url, engine_kwargs={"creator": connection}, skip_table_creation=True)
        return optuna.storages.get_storage(backend)
    except Exception as error:  # SQLAlchemy and Optuna each raise their own
        raise StudyError(
            f"the study's database can't be read: {str(error).splitlines()[0]}", str(file), "qlora-exp doctor"
        ) from None


def _braces_escaped(url: str) -> str:
    """Return the URL as Optuna takes it: it fills in placeholders in braces."""
    return url.replace("{", "{{").replace("}", "}}")


def _read_only_uri(file: Path, name: str) -> str:
    """Return a URI under which SQLite reads ``file`` without writing.

    The write-ahead log of an unfinished sweep can only be read in a writable folder. In a read-only one, this copies
    database and log and returns the copy's URI.
    """
    address = f"file:{quote(str(file.absolute()))}?mode=ro"
    try:
        _quick_check(address, file, name)
        return address
    except sqlite3.OperationalError:
        log = file.with_name(f"{file.name}-wal")
        if not log.exists() or log.stat().st_size == 0:
            address += "&immutable=1"
        else:
            _copies.append(tempfile.TemporaryDirectory(prefix="qlora-exp-study-"))
            copy = Path(_copies[-1].name) / file.name
            shutil.copyfile(file, copy)
            shutil.copyfile(log, copy.with_name(log.name))
            address = f"file:{quote(str(copy))}"
    try:
        _quick_check(address, file, name)
    except sqlite3.OperationalError as error:
        raise StudyError(
            f"the study's database can't be opened: {error}", str(file), "check its folder's permissions"
        ) from None
    return address


def on_local_disk(file: Path) -> bool:
    """Return whether the file is on a file system that only this machine can write; an unknown kind counts as
    shared."""
    file = file.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if file.is_relative_to(part.mountpoint)]
    # If two are mounted on one folder, the later one hides the earlier one.
    nearest = max(reversed(mounts), key=lambda part: len(part.mountpoint), default=None)
    return nearest is not None and nearest.fstype.lower() in LOCAL_DISKS


def _set_journal(file: Path, write_ahead: bool) -> None:
    """Set the journal mode. SQLite stores it in the file, so a database copied from a local disk may have to leave WAL
    mode."""
    try:
        with closing(sqlite3.connect(file, timeout=BUSY_SECONDS)) as database:
            database.execute(f"PRAGMA journal_mode={'WAL' if write_ahead else 'DELETE'}")
    except sqlite3.OperationalError as error:
        if write_ahead:  # the disk is full, or the database is in use: it then keeps its mode
            return
        raise StudyError(
            f"the study's database can't leave WAL mode, which doesn't work on a network file system: {error}",
            str(file),
            "wait until no process uses it, or use a PostgreSQL server: sweep.storage=postgresql://…",
        ) from None


def sqlite_file(url: str) -> Path | None:
    """Return the database file of an SQLite URL (``file:…?uri=true`` included); ``None`` for a server."""
    if not url.startswith(SQLITE):
        return None
    name = url.removeprefix(SQLITE)
    return Path(name.removeprefix("file:").partition("?")[0] if name.startswith("file:") else name)


def check_intact(file: Path, name: str) -> None:
    """Raise :class:`StudyError` if ``file`` exists and isn't an intact SQLite database."""
    if not file.exists():
        return
    try:
        _quick_check(file, file, name)
    except sqlite3.OperationalError as error:
        raise StudyError(
            f"the study's database can't be opened: {error}", str(file), "check its folder's permissions and space"
        ) from None


def _quick_check(address: str | Path, file: Path, name: str) -> None:
    """Raise ``sqlite3.OperationalError`` if ``address`` (a path or a URI) can't be opened, :class:`StudyError` if the
    database is damaged."""
    try:
        with closing(sqlite3.connect(address, uri=isinstance(address, str), timeout=BUSY_SECONDS)) as database:
            result = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError as error:
        if "malformed" not in str(error):
            raise
        result = str(error)
    except sqlite3.DatabaseError as error:
        result = str(error)
    if result != "ok":
        raise damaged_error(f"the study's database is damaged: {result}", file, name)


def damaged_error(what: str, where: Path | str, name: str) -> StudyError:
    """Return the error for a damaged or lost database."""
    hint = f"qlora-exp resume {shlex.quote(name)} --rebuild rebuilds the study from its runs"
    return StudyError(what, str(where), hint)


def set_aside(file: Path) -> Path:
    """Rename a damaged database and its journal files to ``….damaged-N``; return the new path."""
    number = 1
    while (new_file := file.with_name(f"{file.name}.damaged-{number}")).exists():
        number += 1
    for suffix in ("-journal", "-wal", "-shm"):
        journal = file.with_name(file.name + suffix)
        if journal.exists():
            journal.rename(new_file.with_name(new_file.name + suffix))
    return file.rename(new_file)


def _open(
    url: str, engine_options: dict[str, object], name: str, write_ahead: bool = False
) -> optuna.storages.BaseStorage:
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs=engine_options)
        if write_ahead:
            storage.engine.dispose()  # close connections made before the listener below
            sqlalchemy.event.listen(storage.engine, "connect", _disable_sync)
        return optuna.storages.get_storage(storage)
    except ImportError as error:
        raise StudyError(
            f"the storage needs a package: {error}",
            _without_password(url),
            "pip install 'psycopg[binary]' for PostgreSQL",
        ) from None
    except Exception as error:  # every database driver raises its own exceptions
        reason = str(error).splitlines()[0]
        raise StudyError(
            f"the storage can't be opened: {reason}",
            _without_password(url),
            f"then qlora-exp resume {shlex.quote(name)}",
        ) from None


def is_unreachable(error: BaseException) -> bool:
    """Return whether ``error`` means that the storage doesn't answer: the server is gone, or the file stays locked."""
    return isinstance(error, sqlalchemy.exc.OperationalError | optuna.exceptions.StorageInternalError)


def unreachable_error(error: BaseException, url: str, name: str) -> StudyError:
    """Return the error to show for an :func:`is_unreachable` storage."""
    reason = str(error.__cause__ or error).splitlines()[0]
    hint = f"when it answers again: qlora-exp resume {shlex.quote(name)}"
    return StudyError(f"the study's storage doesn't answer: {reason}", _without_password(url), hint)


def _disable_sync(connection: Any, _: object) -> None:
    """Make a commit to the write-ahead log return without waiting for the disk.

    Committed data survive the kill of any process. A power failure may undo the last commits, but doesn't corrupt the
    file.
    """
    connection.execute("PRAGMA synchronous=NORMAL")


def _without_password(url: str) -> str:
    """Return the URL without user and password."""
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.rpartition("@")[2]
