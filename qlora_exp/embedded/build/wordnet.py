"""Read the WordNet 3.0 database files (format: manual page wndb(5))."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Lexicographer files 04…28 are the noun categories (lexnames(5)); 03 is noun.Tops, the roots of all the others.
NOUN_CATEGORIES = {
    4: "act",
    5: "animal",
    6: "artifact",
    7: "attribute",
    8: "body",
    9: "cognition",
    10: "communication",
    11: "event",
    12: "feeling",
    13: "food",
    14: "group",
    15: "location",
    16: "motive",
    17: "object",
    18: "person",
    19: "phenomenon",
    20: "plant",
    21: "possession",
    22: "process",
    23: "quantity",
    24: "relation",
    25: "shape",
    26: "state",
    27: "substance",
    28: "time",
}
PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
_FILES = ("noun", "verb", "adj", "adv")
_SYNTACTIC_MARKER = re.compile(
    r"\((?:a|p|ip)\)$"
)  # "galore(ip)": says where an adjective may stand, not part of the word
_FIRST_EXAMPLE = re.compile(r'(?:^|[;:,.)]\s*|\s)"')
_EXAMPLE = re.compile(r'"([^"]+)"')


@dataclass(frozen=True)
class Relation:
    """A pointer between two words: `source` in this synset, `target` in the synset `synset`."""

    source: str
    synset: str
    target_index: int


@dataclass(frozen=True)
class Synset:
    """One sense: its words, its definition without examples, its examples and its relations."""

    id: str
    part_of_speech: str
    category: str | None
    lemmas: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    hypernyms: tuple[str, ...]
    instance_hypernyms: tuple[str, ...]
    antonyms: tuple[Relation, ...]


def read_wordnet(directory: Path) -> dict[str, Synset]:
    """Return all synsets by id ("02084071-n"), in file order.

    Raises FileNotFoundError, which names the package to install, if the database is not in `directory`.
    """
    missing = [name for name in _FILES if not (directory / f"data.{name}").is_file()]
    if missing:
        raise FileNotFoundError(
            f"no WordNet 3.0 database in {directory}: data.{missing[0]} is not there. "
            "Install it with `apt-get install wordnet-base`, or name its folder with --wordnet DIR."
        )
    return {synset.id: synset for name in _FILES for synset in _read_file(directory / f"data.{name}")}


def _read_file(path: Path) -> Iterator[Synset]:
    with path.open(encoding="latin-1") as lines:
        for line in lines:
            if not line.startswith("  "):  # the licence at the top is indented
                yield _parse(line)


def _parse(line: str) -> Synset:
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    offset, file_number, kind, word_count = fields[0], int(fields[1]), fields[2], int(fields[3], 16)
    lemmas = tuple(_lemma(word) for word in fields[4 : 4 + 2 * word_count : 2])
    first = 5 + 2 * word_count
    pointers = [fields[i : i + 4] for i in range(first, first + 4 * int(fields[first - 1]), 4)]
    definition, examples = split_gloss(gloss)
    return Synset(
        id=f"{offset}-{'a' if kind == 's' else kind}",
        part_of_speech=PARTS_OF_SPEECH[kind],
        category=NOUN_CATEGORIES.get(file_number),
        lemmas=lemmas,
        definition=definition,
        examples=examples,
        hypernyms=_targets(pointers, "@"),
        instance_hypernyms=_targets(pointers, "@i"),
        antonyms=tuple(
            Relation(lemmas[int(where[:2], 16) - 1], f"{target}-{_pos(pos)}", int(where[2:], 16) - 1)
            for symbol, target, pos, where in pointers
            if symbol == "!" and where != "0000"
        ),
    )


def split_gloss(gloss: str) -> tuple[str, tuple[str, ...]]:
    """Return the definition and the examples of a gloss: 'definition; "example"; "example"'."""
    gloss = " ".join(gloss.split())
    quote = _FIRST_EXAMPLE.search(gloss, gloss.find(";") if ";" in gloss else 0)
    if quote is None:
        return gloss.strip(" ;:"), ()
    examples = _EXAMPLE.findall(gloss[quote.start() :])
    return gloss[: quote.start()].strip(" ;:,"), tuple(text.strip() for text in examples)


def _lemma(word: str) -> str:
    return _SYNTACTIC_MARKER.sub("", word).replace("_", " ")


def _targets(pointers: list[list[str]], symbol: str) -> tuple[str, ...]:
    return tuple(f"{target}-{_pos(pos)}" for kind, target, pos, _ in pointers if kind == symbol)


def _pos(pos: str) -> str:
    return "a" if pos == "s" else pos
