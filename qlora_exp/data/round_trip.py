"""Whether a tokenizer can write an answer: what its tokens read back as."""

from __future__ import annotations

import unicodedata

from qlora_exp.data.texts import comparable


def answer_as_written(answer: str, completion: str, decoded: str) -> str | None:
    """``answer`` in the form that the tokenizer writes, which generated answers are compared with. ``None``: the
    tokenizer changes it, so that no generated answer could be equal to it.

    ``completion`` is the text with the answer that was tokenized, ``decoded`` what its tokens read back as. Comparisons
    pass over case and the Unicode form NFC anyway. The form NFKC ("①" becomes "1"), and spaces in an answer of one
    line, are taken over from the tokenizer.
    """
    given, read = completion.strip(), decoded.strip()
    if comparable(read) == comparable(given):
        return answer
    one_line = "\n" not in given and answer == answer.strip()
    if _compatible(read) == _compatible(given) or (one_line and _letters(read) == _letters(given)):
        return read if given == answer.strip() else answer
    return None


def _compatible(text: str) -> str:
    return comparable(unicodedata.normalize("NFKC", text))


def _letters(text: str) -> str:
    return "".join(_compatible(text).split())
