"""SHA-256 of model files. That of a large file is kept in the user's cache, because hashing it takes seconds."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import time
from pathlib import Path

from qlora_exp.paths import user_cache
from qlora_exp.progress import report_progress
from qlora_exp.records.files import write_json

MIN_CACHED_BYTES = 32 * 2**20
"""Smaller files are hashed in milliseconds."""
HASHED_BYTES = 2**24
BYTES_PER_MB = 10**6
SETTLED_SECONDS = 2.0
"""A file that was written within this time isn't cached: a file system with coarse timestamps may show the same one
after another write."""


def model_file_digest(file: Path) -> str:
    """Return the SHA-256 of ``file`` as hexadecimal digits.

    A file counts as unchanged while its path, inode, size, modification time and change time are the same; the last one
    shows a write after which a tool restored the modification time.
    """
    state = file.stat()
    identity = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    return _known_digest(file.absolute(), identity)


@functools.lru_cache(maxsize=4096)
def _known_digest(file: Path, identity: tuple[int, ...]) -> str:
    if identity[1] < MIN_CACHED_BYTES:
        return _hash(file)
    cached = _read(file, identity)
    if cached is not None:
        return cached
    digest = _hash(file)
    # Without a home, or where it can't be written, the file is hashed in each process.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        _write(file, identity, digest)
    return digest


def _hash(file: Path) -> str:
    size = file.stat().st_size
    if size < MIN_CACHED_BYTES:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest, done = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(HASHED_BYTES):
            digest.update(chunk)
            done += len(chunk)
            report_progress(done // BYTES_PER_MB, size // BYTES_PER_MB, f"MB of {file.name} hashed")
    return digest.hexdigest()


def _cache_file(file: Path) -> Path:
    """Return the file that holds the digest of ``file`` alone, so that processes don't overwrite each other's."""
    return user_cache() / "digests" / f"{hashlib.sha256(os.fsencode(file)).hexdigest()[:32]}.json"


def _read(file: Path, identity: tuple[int, ...]) -> str | None:
    """Return the kept digest; ``None`` if there is none, if the file has changed, or if the cache is damaged."""
    try:
        entry = json.loads(_cache_file(file).read_text(encoding="utf-8"))
        digest = entry["sha256"]
        is_same = entry["path"] == str(file) and tuple(entry["identity"]) == identity
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None
    return digest if is_same and isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) else None


def _write(file: Path, identity: tuple[int, ...], digest: str) -> None:
    state = file.stat()
    now = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    is_settled = time.time() - max(state.st_mtime, state.st_ctime) > SETTLED_SECONDS
    if now == identity and is_settled:
        write_json(_cache_file(file), {"path": str(file), "identity": list(identity), "sha256": digest}, durable=False)
