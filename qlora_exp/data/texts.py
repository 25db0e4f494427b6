"""White space and Unicode normal forms: what texts keep of them, and which texts count as equal."""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import NamedTuple

_SCRIPTS_WITHOUT_SPACES = (
    (0x0E00, 0x10A0),  # Thai, Lao, Tibetan, Myanmar
    (0x1780, 0x1800),  # Khmer
    (0x1950, 0x1A00),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A20, 0x1AB0),  # Tai Tham
    (0x2E80, 0x3130),  # radicals, Chinese and Japanese punctuation, kana, Bopomofo
    (0x3190, 0xA4D0),  # further CJK symbols, Han, Yi
    (0xA980, 0xAA00),  # Javanese, Myanmar
    (0xAA60, 0xAAE0),  # Myanmar, Tai Viet
    (0xF900, 0xFB00),  # compatibility ideographs
    (0xFE30, 0xFE50),  # vertical forms
    (0xFF00, 0xFFA0),  # full-width forms, half-width kana
    (0x1AFF0, 0x1B170),  # kana supplements
    (0x20000, 0x40000),  # rarer Han
)
"""Code points of scripts that write no spaces between words. Korean writes them, so it isn't included."""
_LINE_INDENTATION = re.compile(r"\n[ \t]")
_FIRST_INDENTATION = re.compile(r"\t| {2}")


class StrippedText(NamedTuple):
    """A text and the white space around it. The indentation of a code block's first line is part of the text."""

    before: str
    text: str
    after: str


@functools.lru_cache(maxsize=4096)
def writes_no_spaces(character: str) -> bool:
    """Return whether the character's script writes no spaces between words: Chinese, Japanese, Thai, Khmer …"""
    return any(first <= ord(character) < end for first, end in _SCRIPTS_WITHOUT_SPACES)


def separator_between(before: str, after: str) -> str:
    """Return what the plain format puts between two texts: one space, or nothing if one of them has white space there
    already or is in a script without spaces."""
    last, first = before[-1:], after[:1]
    if not last or not first or last.isspace() or first.isspace() or writes_no_spaces(last) or writes_no_spaces(first):
        return ""
    return " "


def strip_text(text: str) -> StrippedText:
    """Return ``text`` without the white space around it, and that white space.

    A text of several lines keeps the indentation of its first line: a tab, two spaces, or one space if another line is
    indented, too. Example: ``"\\n    y = 1\\n    z\\n"`` gives ``("\\n", "    y = 1\\n    z", "\\n")``.
    """
    body = text.strip()
    before = text[: len(text) - len(text.lstrip())]
    after = text[len(before) + len(body) :]
    indentation = re.search(r"[ \t]*\Z", before)
    assert indentation is not None
    indented = indentation.group()
    if "\n" in body and indented and (_FIRST_INDENTATION.match(indented) or _LINE_INDENTATION.search(body)):
        return StrippedText(before[: len(before) - len(indented)], indented + body, after)
    return StrippedText(before, body, after)


def normal_form(text: str) -> str:
    """Return ``text`` in Unicode NFC: "é" is one character, in whichever form the file or the tokenizer writes it."""
    return unicodedata.normalize("NFC", text)


def comparable(text: str, fold_case: bool = True) -> str:
    """Return a form that is equal for texts that differ only in Unicode normal form and (``fold_case``) case."""
    return normal_form(normal_form(text).casefold()) if fold_case else normal_form(text)


def same_text(prediction: str, reference: str, fold_case: bool = True) -> bool:
    """Return whether the texts are equal in Unicode NFC, without the white space around them and (``fold_case``) case.

    The indentation of ``reference``'s first line counts if :func:`strip_text` keeps it.
    """
    expected = strip_text(reference).text
    predicted = strip_text(prediction).text if expected[:1].isspace() else prediction.strip()
    return comparable(predicted, fold_case) == comparable(expected, fold_case)


def collapse_white_space(text: str) -> str:
    """Return a form that is equal for texts that differ only in meaningless white space and Unicode normal form.

    Runs of white space count as one space. In a text with indented lines, line breaks and indentation count, too.
    """
    text = normal_form(text)
    if not _LINE_INDENTATION.search(text) and not _FIRST_INDENTATION.match(text):
        return " ".join(text.split())
    *earlier, last = text.split("\n")
    lines = [*map(_compact_line, earlier), _compact_line(last) or _indentation(last)]
    return "\n".join(line for line in lines if line)


def _compact_line(line: str) -> str:
    words = " ".join(line.split())
    return words and _indentation(line) + words


def _indentation(line: str) -> str:
    return line[: len(line) - len(line.lstrip(" \t"))]


def visible(text: str) -> str:
    """Return ``text`` without invisible characters: zero-width ones, byte order marks, variation selectors of emojis.
    Runs of white space become one space."""
    return " ".join("".join(character for character in text if not _invisible(character)).split())


def is_blank(text: str) -> bool:
    """Return whether the text has no visible character."""
    if text.isascii():  # none of them is invisible, but for white space
        return not text.strip()
    return all(character.isspace() or _invisible(character) for character in text)


def _invisible(character: str) -> bool:
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


_NUMBER = re.compile(r"[$€£]?\s*([-+]?\d[\d,]*(?:\.\d+)?)\s*\.?")


def final_answer(text: str, mark: str | None) -> str:
    """Return what follows the last ``mark`` in ``text``; all of it without a mark, or if it has none.

    A number loses its thousands separators, currency sign and full stop. Example with the mark ``####``: ``"3 * 500 =
    1500\\n#### 1,500"`` gives ``"1500"``.
    """
    if mark is None:
        return text
    final = text.rpartition(mark)[2].strip()
    number = _NUMBER.fullmatch(final)
    return number[1].replace(",", "") if number else final
