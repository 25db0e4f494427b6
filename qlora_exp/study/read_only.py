"""Read a study without writing anything, so that a copy on a read-only disk can be read, too."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import optuna

from qlora_exp.errors import StudyError
from qlora_exp.study.identity import IDENTITY, different_study_error
from qlora_exp.study.storage import BUSY_SECONDS, connect, damaged_error, sqlite_file
from qlora_exp.study.types import StudySpec

_copies: list[tempfile.TemporaryDirectory[str]] = []
"""Databases that had to be copied before reading; the copies are deleted when the process ends."""


def read_study(spec: StudySpec, url: str) -> optuna.Study:
    """See :meth:`~qlora_exp.study.study.Study.read`."""
    file = sqlite_file(url)
    storage = connect(url, spec.name) if file is None else _read_only(file, spec.name)
    location = url.rpartition("@")[2]
    try:
        study_id = storage.get_study_id_from_name(spec.name)
    except KeyError:
        raise damaged_error(f"the database no longer contains the study {spec.name}", location, spec.name) from None
    attributes = storage.get_study_user_attrs(study_id)
    if None not in (spec.id, attributes.get(IDENTITY)) and attributes[IDENTITY] != spec.id:
        raise different_study_error(spec, url, attributes)
    return optuna.load_study(study_name=spec.name, storage=storage)


def _read_only(file: Path, name: str) -> optuna.storages.BaseStorage:
    if not file.exists():
        raise damaged_error("the study's database doesn't exist", file, name)
    address = _read_only_uri(file, name)

    def connection() -> sqlite3.Connection:
        return sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)

    url = f"sqlite:///{file}".replace("{", "{{").replace("}", "}}")
    try:
        backend = optuna.storages.RDBStorage(url, engine_kwargs={"creator": connection}, skip_table_creation=True)
        return optuna.storages.get_storage(backend)
    except Exception as error:  # SQLAlchemy and Optuna each raise their own
        raise StudyError(
            f"the study's database can't be read: {str(error).splitlines()[0]}", str(file), "qlora-exp doctor"
        ) from None


def _read_only_uri(file: Path, name: str) -> str:
    """Return a URI under which SQLite reads ``file`` without writing.

    The write-ahead log of an unfinished sweep can only be read in a writable folder. In a read-only one, this copies
    database and log and returns the copy's URI.
    """
    address = f"file:{quote(str(file.absolute()))}?mode=ro"
    try:
        _check_database(address, file, name)
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
        _check_database(address, file, name)
    except sqlite3.OperationalError as error:
        raise StudyError(
            f"the study's database can't be opened: {error}", str(file), "check its folder's permissions"
        ) from None
    return address


def _check_database(address: str, file: Path, name: str) -> None:
    """Raise ``sqlite3.OperationalError`` if ``address`` can't be opened, :class:`StudyError` if the database is
    damaged."""
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS)) as database:
            result = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError as error:
        if "malformed" not in str(error):
            raise
        result = str(error)
    except sqlite3.DatabaseError as error:
        result = str(error)
    if result != "ok":
        raise damaged_error(f"the study's database is damaged: {result}", file, name)
