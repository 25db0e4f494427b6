"""Checks that a tokenizer can write an answer: its tokens must decode to the same text."""

from __future__ import annotations

import unicodedata

from qlora_exp.data.texts import comparable


def answer_as_written(answer: str, completion: str, decoded: str) -> str | None:
    """Return ``answer`` as the tokenizer writes it, to compare generated answers with. ``None``: the tokenizer changes
    the answer, so no generated answer could equal it.

    ``completion`` is the tokenized text with the answer, ``decoded`` the text of its tokens. Comparisons ignore case
    and use the Unicode form NFC anyway. The form NFKC ("①" becomes "1") and the spaces of a one-line answer are taken
    from ``decoded``.
    """
    written, read_back = completion.strip(), decoded.strip()
    if comparable(read_back) == comparable(written):
        return answer
    one_line = "\n" not in written and answer == answer.strip()
    if _compatible(read_back) == _compatible(written) or (one_line and _letters(read_back) == _letters(written)):
        return read_back if written == answer.strip() else answer
    return None


def _compatible(text: str) -> str:
    return comparable(unicodedata.normalize("NFKC", text))


def _letters(text: str) -> str:
    return "".join(_compatible(text).split())
