"""The content of a data file as text or JSON: endings, compression, encoding. Nothing is guessed or repaired."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

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


def read_content(path: Path) -> bytes:
    """Return the file's bytes, decompressed. Raises :class:`DataError` if it can't be read or isn't what its ending
    says."""
    try:
        content = _decompress(path, path.read_bytes())
    except OSError as error:
        what = f"the file can't be read: {error.strerror}"
        raise DataError(what, str(path), "check its name and permissions") from None
    if not content.strip():
        raise DataError("the file is empty", str(path), "give a file with at least one row")
    begin = content[:64].lstrip().lower()
    for mark, what, hint in _OTHER_CONTENT:
        is_parquet = mark == b"PAR1" and ending_of(path) == ".parquet"
        if begin.startswith(mark.lower()) and not is_parquet:
            raise DataError(what, str(path), hint)
    return content


def _decompress(path: Path, content: bytes) -> bytes:
    suffix = path.suffix.lower()
    try:
        match suffix:
            case ".gz":
                return gzip.decompress(content)
            case ".bz2":
                return _decompress_streams(content, bz2.BZ2Decompressor)
            case ".xz":
                return _decompress_streams(content, lzma.LZMADecompressor)
            case ".zst":
                import pyarrow

                with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd") as stream:
                    return b"".join(iter(lambda: stream.read(2**20), b""))
        return content
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

_UNICODE_MARKS = (
    *((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32")),  # before UTF-16's, which begin one of them
    *((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")),
)
_BYTE_ORDER_MARKS = re.compile("(?:^|(?<=[\n\r]))\ufeff+")


def decode_utf8(path: Path, content: bytes) -> str:
    """Return the UTF-8 text without byte order marks. Spreadsheets write one; concatenated files have several."""
    for mark, encoding in _UNICODE_MARKS:
        if content.startswith(mark):
            hint = f"iconv -f {encoding} -t UTF-8 '{path.name}' > NEW"
            raise DataError(f"the file is {encoding}, not UTF-8", str(path), hint)
    if wide := _guess_utf16(content[:1000]):
        hint = f"iconv -f {wide} -t UTF-8 '{path.name}' > NEW"
        raise DataError("the file holds NUL bytes: it seems to be UTF-16, not UTF-8", str(path), hint)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"row {row} is not UTF-8: byte 0x{content[error.start]:02x}",
            f"{path}, row {row}",
            f"save the file as UTF-8: iconv -f ENCODING -t UTF-8 '{path.name}' > NEW, where ENCODING is its "
            "present one: WINDOWS-1252 in western Europe, SHIFT_JIS in Japan, GB18030 in China; "
            "then look at a few rows",
        ) from None
    return _BYTE_ORDER_MARKS.sub("", text) if "\ufeff" in text else text


def _guess_utf16(start: bytes) -> str | None:
    """Return the kind of UTF-16 that the text seems to be, if any: each ASCII character has a NUL byte on one side."""
    even_nuls, odd_nuls = start[::2].count(0), start[1::2].count(0)
    few_nuls = even_nuls + odd_nuls <= len(start) // 4
    if few_nuls and (max(even_nuls, odd_nuls) < 8 or min(even_nuls, odd_nuls) > max(even_nuls, odd_nuls) // 4):
        return None
    return "UTF-16BE" if even_nuls > odd_nuls else "UTF-16LE"


class DuplicateKey(Exception):
    """A key occurs twice in one JSON object. Python's reader would silently keep the last value."""


def parse_json(text: str) -> Any:
    """Return the JSON value. Raises :class:`DuplicateKey`, ``ValueError`` or ``RecursionError``."""
    return json.loads(text, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DuplicateKey(f"{key!r} occurs twice in the object")
    return values
