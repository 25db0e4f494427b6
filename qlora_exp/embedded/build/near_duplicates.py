"""Exact search for near-duplicate texts: normalisation, n-gram sets, and all pairs above a Jaccard threshold.

Two texts are near duplicates if the Jaccard similarity of their 3-grams is at least 0.5. Word 3-grams find sentences
that were copied and extended. Character 3-grams are stricter: they find short glosses that differ only in a name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy import sparse

THRESHOLD = 0.5
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_ROWS_AT_ONCE = 200  # bounds the memory of one block of pairs

Grams = Callable[[str], set[str]]


def normalise(text: str) -> str:
    """Return the text in NFKC and lower case, without punctuation, with single spaces."""
    return " ".join(_PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", text).lower()).split())


def gloss_parts(gloss: str) -> list[str]:
    """Return the gloss's non-empty parts between semicolons, normalised."""
    return [part for part in map(normalise, gloss.split(";")) if part]


def units(text: str) -> set[str]:
    """Return what is compared of a text: the whole text and each of its parts, normalised."""
    return {full for full in [normalise(text)] if full} | set(gloss_parts(text))


def word_grams(text: str) -> set[str]:
    """Return the word 3-grams of a normalised text, or the text itself if it has fewer than three words."""
    words = text.split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def character_grams(text: str) -> set[str]:
    """Return the character 3-grams of a normalised text."""
    return {text[i : i + 3] for i in range(max(1, len(text) - 2))}


def near_duplicates(left: Sequence[str], right: Sequence[str], grams: Grams) -> Iterator[tuple[int, int]]:
    """Yield all pairs (i, j) of normalised texts with Jaccard(grams(left[i]), grams(right[j])) >= 0.5, exactly."""
    column: dict[str, int] = {}
    sets = [[column.setdefault(gram, len(column)) for gram in sorted(grams(text))] for text in [*left, *right]]
    sizes = np.array([len(s) for s in sets])
    rows, others = _matrix(sets[: len(left)], len(column)), _matrix(sets[len(left) :], len(column)).T.tocsr()
    for start in range(0, len(left), _ROWS_AT_ONCE):
        shared = (rows[start : start + _ROWS_AT_ONCE] @ others).tocoo()
        i, j = shared.row + start, shared.col
        near = shared.data >= THRESHOLD * (sizes[i] + sizes[j + len(left)] - shared.data)
        yield from zip(i[near].tolist(), j[near].tolist(), strict=True)


def _matrix(rows: list[list[int]], columns: int) -> Any:
    indices = np.fromiter((column for row in rows for column in row), dtype=np.int32)
    pointers = np.cumsum([0, *map(len, rows)])
    return sparse.csr_matrix((np.ones(len(indices), dtype=np.int32), indices, pointers), shape=(len(rows), columns))
