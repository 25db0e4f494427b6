"""The endings of data files, and the content of compressed ones."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path

from qlora_exp.errors import DataError

ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".tsv", ".ndjson", ".arrow", ".feather")
OTHER_ENDINGS = {".jsonlines": ".jsonl", ".jl": ".jsonl", ".pq": ".parquet", ".parq": ".parquet", ".tab": ".tsv"}
"""Other tools' endings for the same kinds of files, and the ending that is read."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".lz4", ".z")


def ending_of(path: Path) -> str:
    """Return ``.jsonl`` for both ``train.JSONL`` and ``train.jsonl.gz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def stem_of(path: Path) -> str:
    """Return ``train`` for both ``train.jsonl`` and ``train.jsonl.gz``."""
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSED else path.stem


def decompress(path: Path, content: bytes) -> bytes:
    """Return the decompressed bytes of a compressed file, and the bytes of any other file as they are.

    Raises :class:`DataError` for a truncated file, and for one that isn't what its ending says.
    """
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED:
        return content
    try:
        if suffix == ".gz":
            return gzip.decompress(content)
        if suffix == ".bz2":
            return _decompress_streams(content, bz2.BZ2Decompressor)
        if suffix == ".xz":
            return _decompress_streams(content, lzma.LZMADecompressor)
        return _decompress_zstandard(content)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        what = f"the file can't be unpacked as {suffix}: {reason}"
        raise DataError(what, str(path), "check that it was copied whole, or unpack it by hand") from None


def _decompress_streams(content: bytes, stream: type[bz2.BZ2Decompressor] | type[lzma.LZMADecompressor]) -> bytes:
    """Return all streams of the file. Python's own functions ignore a damaged stream that follows a good one."""
    unpacked = []
    while content:
        decompressor = stream()
        unpacked.append(decompressor.decompress(content))
        if not decompressor.eof:
            raise EOFError("the file ends before its end-of-stream marker")
        content = decompressor.unused_data.lstrip(b"\0")  # padding between streams
    return b"".join(unpacked)


def _decompress_zstandard(content: bytes) -> bytes:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd") as stream:
        unpacked = io.BytesIO()
        while chunk := stream.read(2**20):
            unpacked.write(chunk)
    return unpacked.getvalue()


_OTHER_CONTENT = (
    (b"version https://git-lfs", "the file is a Git LFS pointer, not the data", "git lfs pull"),
    (b"PAR1", "the file is Parquet", "name it .parquet"),
    (b"\x1f\x8b", "the file is compressed by gzip", "add .gz to its name"),
    (b"BZh", "the file is compressed by bzip2", "add .bz2 to its name"),
    (b"\xfd7zXZ", "the file is compressed by xz", "add .xz to its name"),
    (b"\x28\xb5\x2f\xfd", "the file is compressed by zstandard", "add .zst to its name"),
    (b"PK\x03\x04", "the file is a ZIP archive or a spreadsheet", "unpack it, or save the sheet as CSV (UTF-8)"),
    (b"<!doctype html", "the file is a web page, not the data", "download the file itself"),
    (b"<html", "the file is a web page, not the data", "download the file itself"),
)
"""The first bytes of other files that often have a data file's name."""


def check_content(path: Path, content: bytes) -> None:
    """Raise :class:`DataError` if the first bytes show that the file isn't what its ending says."""
    begin = content[:64].lstrip().lower()
    for mark, what, hint in _OTHER_CONTENT:
        is_parquet = mark == b"PAR1" and ending_of(path) == ".parquet"
        if begin.startswith(mark.lower()) and not is_parquet:
            raise DataError(what, str(path), hint)
