"""Output in any encoding: a character that the encoding lacks is replaced (→ by ->), without an error."""

from __future__ import annotations

import codecs
import sys
import unicodedata
from collections.abc import Sequence

from qlora_exp.errors import ConfigError

HANDLER = "qlora_exp.ascii"
ASCII = {
    "→": "->",
    "←": "<-",
    "×": "x",
    "–": "-",
    "—": "-",
    "−": "-",
    "…": "...",
    "·": "-",
    "≤": "<=",
    "≥": ">=",
    "∝": "~",
    "±": "+-",
    "≈": "~",
    "½": "1/2",
    "⁶": "^6",
    "⁹": "^9",
    "•": "*",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "\N{NO-BREAK SPACE}": " ",
    "\N{NARROW NO-BREAK SPACE}": " ",
}


def show_any_text() -> None:
    """Let standard output and standard error take any text in any encoding (``LANG=C``, Latin-1, file names that aren't
    UTF-8)."""
    codecs.register_error(HANDLER, _replacement)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=HANDLER)


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for an argument that isn't valid text in this process's encoding: no record could
    hold it."""
    encoding = sys.getfilesystemencoding()
    for text in arguments:
        if any("\ud800" <= character <= "\udfff" for character in text):
            hint = "a name in UTF-8" if encoding == "utf-8" else "export PYTHONUTF8=1"
            raise ConfigError(f"an argument can't be read as text ({encoding})", ascii(text), hint)


def _replacement(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(map(_character, text)), error.end


def _character(character: str) -> str:
    if character in ASCII:
        return ASCII[character]
    if unicodedata.name(character, "").startswith("BOX DRAWINGS"):
        return "-" if "HORIZONTAL" in unicodedata.name(character) else "|"
    return character.encode("ascii", "backslashreplace").decode("ascii")
