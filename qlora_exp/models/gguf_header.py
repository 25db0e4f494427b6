"""Reads the header of a GGUF file (metadata and tensors), and finds the other files of a model that is split into
several."""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qlora_exp.errors import ModelError

PART_FILE_NAME = re.compile(r"^(?P<name>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf$")
"""How llama.cpp names the parts of a split model."""
NUMBER_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALWAYS_TIED = ("falcon", "bloom")
"""Architectures that transformers always ties, even if the file has an ``output.weight``."""
MAX_ARRAY_LENGTH = 4096
"""Longer arrays are vocabularies, whose values nobody needs here."""
COPY_AGAIN_HINT = "copy or download it again"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: ``shape`` in torch's order, ``kind`` as GGML's number of the block type, ``offset`` from the start of
    the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of one file. ``metadata`` leaves out long arrays and arrays of strings."""

    file: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    file_bytes: int


def read_header(file: Path) -> GgufHeader:
    """Return the header of ``file``. Raises :class:`ModelError` if the file isn't GGUF or is damaged."""
    state = file.stat()
    return _read(file, state.st_size, state.st_mtime_ns)


def gguf_parts(file: Path) -> list[Path]:
    """Return all files of the model that ``file`` is, or is a part of, in their order.

    Raises:
        ModelError: parts are missing, or don't belong together.
    """
    header = read_header(file)
    count = int(header.metadata.get("split.count", 1))
    match = PART_FILE_NAME.match(file.name)
    if count <= 1:
        return [file]
    if match is None or int(match["parts"]) != count:
        what = f"the file is one of {count} parts of a model, and its name doesn't say which"
        raise ModelError(what, str(file), f"name the parts as llama.cpp does: MODEL-00001-of-{count:05d}.gguf …")
    parts = [file.with_name(f"{match['name']}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        what = f"the model is split into {count} parts, and {', '.join(missing)} {_is_or_are(missing)} missing"
        raise ModelError(what, str(file.parent), "download the missing parts to the same directory")
    _check_parts(parts)
    return parts


def is_tied(parts: list[Path]) -> bool:
    """Return whether the model's head is its embedding: its architecture always ties them, or no part has
    ``output.weight``."""
    headers = [read_header(part) for part in parts]
    architecture = headers[0].metadata.get("general.architecture")
    return architecture in ALWAYS_TIED or all(t.name != "output.weight" for header in headers for t in header.tensors)


def _check_parts(parts: list[Path]) -> None:
    headers = [read_header(part) for part in parts]
    for number, header in enumerate(headers):
        split = (int(header.metadata.get("split.no", -1)), int(header.metadata.get("split.count", -1)))
        if split != (number, len(parts)):
            what = (
                f"by its metadata this is part {split[0] + 1} of {split[1]}, by its name {number + 1} of {len(parts)}"
            )
            raise ModelError(what, str(header.file), "download the parts again, all from one source")
    names = [tensor.name for header in headers for tensor in header.tensors]
    declared = int(headers[0].metadata.get("split.tensors.count", len(names)))
    if len(names) != declared or len(set(names)) != len(names):
        what = f"the parts hold {len(set(names))} tensors, and the first one says that the model has {declared}"
        raise ModelError(what, str(parts[0]), "download the parts again, all from one source")


def _is_or_are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


@functools.lru_cache(maxsize=64)
def _read(file: Path, size: int, modified: int) -> GgufHeader:
    """Read the header. Size and modification time are part of the cache's key: a rewritten file is read again."""
    try:
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ModelError("the file isn't GGUF", str(file), COPY_AGAIN_HINT)
            version, tensor_count, value_count = struct.unpack("<IQQ", _bytes(stream, 20))
            if version not in (2, 3):
                raise ModelError(
                    f"the file is GGUF version {version}, and only 2 and 3 can be read", str(file), COPY_AGAIN_HINT
                )
            metadata: dict[str, Any] = {}
            for _ in range(value_count):
                key = _text(stream)
                (kind,) = struct.unpack("<I", _bytes(stream, 4))
                value = _value(stream, kind)
                if value is not None:
                    metadata[key] = value
            entries = [_tensor(stream) for _ in range(tensor_count)]
            alignment = int(metadata.get("general.alignment", 32))
            data_start = -(-stream.tell() // alignment) * alignment
    except (OSError, struct.error, EOFError, UnicodeDecodeError, ValueError, OverflowError) as error:
        line = str(error) or "it ends within its header"
        raise ModelError(f"the GGUF file can't be read: {line}", str(file), COPY_AGAIN_HINT) from None
    tensors = tuple(GgufTensor(name, shape, kind, data_start + offset) for name, shape, kind, offset in entries)
    return GgufHeader(file, metadata, tensors, size)


def _tensor(stream: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _text(stream)
    (dimensions,) = struct.unpack("<I", _bytes(stream, 4))
    if dimensions > 8:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = struct.unpack(f"<{dimensions}Q", _bytes(stream, 8 * dimensions))
    kind, offset = struct.unpack("<IQ", _bytes(stream, 12))
    return name, tuple(reversed(shape)), kind, offset


def _value(stream: BinaryIO, kind: int) -> Any:
    """Return a value of the metadata, or ``None`` for one that is skipped."""
    if kind in NUMBER_FORMATS:
        (number,) = struct.unpack(
            f"<{NUMBER_FORMATS[kind]}", _bytes(stream, struct.calcsize(f"<{NUMBER_FORMATS[kind]}"))
        )
        return number
    if kind == STRING:
        return _text(stream)
    if kind != ARRAY:
        raise ValueError(f"its metadata has a value of type {kind}")
    inner, count = struct.unpack("<IQ", _bytes(stream, 12))
    if inner in NUMBER_FORMATS:
        code = NUMBER_FORMATS[inner]
        raw = _bytes(stream, count * struct.calcsize(f"<{code}"))
        return list(struct.unpack(f"<{count}{code}", raw)) if count <= MAX_ARRAY_LENGTH else None
    for _ in range(count):
        _value(stream, inner)
    return None


def _text(stream: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", _bytes(stream, 8))
    return _bytes(stream, length).decode("utf-8")


def _bytes(stream: BinaryIO, count: int) -> bytes:
    if count > 1 << 28:
        raise ValueError("it says that a value has more than 256 MiB")
    content = stream.read(count)
    if len(content) != count:
        raise EOFError
    return content
