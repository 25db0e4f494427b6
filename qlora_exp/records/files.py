"""Record files: atomic writes, and reads that raise an error for a damaged file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qlora_exp.errors import RecordError
from qlora_exp.records.schema import from_dict, to_dict
from qlora_exp.records.types import SCHEMA_VERSION, RunRecord
from qlora_exp.records.upgrade import upgrade_record

T = TypeVar("T")


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Write ``value`` as JSON, atomically: a reader sees the old file or the new one, even if the process is killed."""
    write_text(path, json.dumps(to_dict(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n", durable)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Write ``text`` atomically.

    ``durable``: sync file and folder to disk, so that the file survives a power failure. Turn it off for files that are
    soon written again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if not durable:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_record(path: Path) -> RunRecord:
    """Return the record in a ``record.json``. Raises :class:`RecordError` if it is missing, damaged or another file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError("there is no record", str(path), "qlora-exp ls runs shows all runs") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"the record can't be read: {error}", str(path), "restore it, or run again") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("schema_version"), int):
        raise RecordError("this is not the record of a run: schema_version is missing", str(path))
    if raw["schema_version"] > SCHEMA_VERSION:
        raise RecordError(
            f"the record has schema version {raw['schema_version']}, this version reads up to {SCHEMA_VERSION}",
            str(path),
            "upgrade qlora-exp",
        )
    return from_dict(RunRecord, upgrade_record(raw), str(path))


def read_or_none(kind: type[T], path: Path, upgrade: Callable[[Any], Any] = lambda raw: raw) -> T | None:
    """Return the ``kind`` (a dataclass) in a JSON file; ``None`` if the file is missing, damaged or another.

    ``upgrade``: turns what an earlier version wrote into this version's names.
    """
    try:
        return from_dict(kind, upgrade(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, RecordError):
        return None


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Return the curve's points, sorted by step; lines of one step are merged, the last value counts.

    A line that a killed process left incomplete is skipped.
    """
    points: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            point = json.loads(line)
        except ValueError:
            continue
        if isinstance(point, dict) and isinstance(point.get("step"), int):
            points[point["step"]] = points.get(point["step"], {}) | point
    return [points[step] for step in sorted(points)]


def training_losses(points: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return step → training loss of a curve's points that have a finite one."""
    return {point["step"]: point["loss"] for point in points if point.get("loss") is not None}
