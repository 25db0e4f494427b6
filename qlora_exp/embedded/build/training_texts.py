"""The training texts: WordNet entries for the base, chats for the instruct model, in one compressed file.

Tokenizer and models are built from this file only. It is committed with the tests, so that they can check the splits
against the texts that were really used, without WordNet.
"""

from __future__ import annotations

import json
import lzma
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_exp.embedded.build.near_duplicates import units
from qlora_exp.embedded.build.splits import Splits
from qlora_exp.embedded.build.wordnet import Synset

Message = dict[str, str]
KIND_OF = " is a kind of "
_KINDS_PER_ENTRY = 3
_DEFINITION_FIRST = 0.5


@dataclass(frozen=True)
class Entry:
    """One dictionary entry: words, definition, examples and pairs (x, y) of "x is a kind of y"."""

    part_of_speech: str
    lemmas: list[str]
    definition: str
    examples: list[str]
    kinds: list[list[str]]
    antonyms: list[list[str]]

    def render(self, rng: random.Random) -> str:
        """Return the entry as pretraining text. Each epoch draws its order: word first or definition first."""
        kinds = [KIND_OF.join(pair) + "." for pair in self.kinds]
        rng.shuffle(kinds)
        if kinds and rng.random() < _DEFINITION_FIRST:
            lines = [self.definition, *kinds, *self.examples]
        else:
            lines = [f"{', '.join(self.lemmas)}: {self.definition}", *self.examples, *kinds]
        return "\n".join(lines)


@dataclass(frozen=True)
class TrainingTexts:
    """All texts that the two models are trained on."""

    entries: list[Entry]
    chats: list[list[Message]]


def make_entries(wordnet: dict[str, Synset], splits: Splits) -> list[Entry]:
    """Return the pretraining entries.

    They contain no task item, no held-out chat and no held-out example. No kind-of line has a word of a validation or
    test item, in any sense, on either side."""
    words = held_out_words(wordnet, splits)
    hidden = {item.synset for rows in splits.items.values() for item in rows} | set(splits.chat_synsets)
    examples = set(splits.examples)
    return [
        Entry(
            part_of_speech=synset.part_of_speech,
            lemmas=list(synset.lemmas),
            definition=synset.definition,
            examples=[e for e in synset.examples if e not in examples],
            kinds=_kinds(synset, wordnet, hidden, words),
            antonyms=[[r.source, wordnet[r.synset].lemmas[r.target_index]] for r in synset.antonyms],
        )
        for synset in wordnet.values()
        if synset.id not in hidden
    ]


def trained_units(texts: TrainingTexts) -> frozenset[str]:
    """Return every text that a model is trained on, whole and in its parts between semicolons, normalised."""
    words = {lemma for entry in texts.entries for lemma in entry.lemmas}
    strings = [text for entry in texts.entries for text in (entry.definition, *entry.examples)]
    # an answer that is a word of the dictionary is a synonym or an antonym, not a gloss
    strings += [m["content"] for chat in texts.chats for m in chat if m["content"] not in words]
    return frozenset(unit for text in strings for unit in units(text))


def make_chat_entries(wordnet: dict[str, Synset], splits: Splits, entries: list[Entry]) -> list[Entry]:
    """Return the entries for the held-out chats, without examples that a training entry has, too."""
    seen = {example for entry in entries for example in entry.examples}
    synsets = [wordnet[id_] for id_ in splits.chat_synsets]
    return [
        Entry(s.part_of_speech, list(s.lemmas), s.definition, [e for e in s.examples if e not in seen], [], [])
        for s in synsets
    ]


def held_out_words(wordnet: dict[str, Synset], splits: Splits) -> set[str]:
    """Return the words of the validation and test items, in lower case."""
    ids = {item.synset for split in ("validation", "test") for item in splits.items[split]}
    return {lemma.lower() for id_ in ids for lemma in wordnet[id_].lemmas}


def _kinds(synset: Synset, wordnet: dict[str, Synset], hidden: set[str], words: set[str]) -> list[list[str]]:
    """Return up to three (word, word of a direct hypernym). No instances: "Einstein is a kind of physicist"."""
    below = [lemma for lemma in synset.lemmas if lemma.lower() not in words]
    pairs = []
    for hypernym in synset.hypernyms:
        above = [lemma for lemma in wordnet[hypernym].lemmas if lemma.lower() not in words]
        if hypernym not in hidden and above:
            pairs += [[lemma, above[0]] for lemma in below]
    return pairs[:_KINDS_PER_ENTRY]


def write_training_texts(path: Path, texts: TrainingTexts) -> None:
    """Write one JSON value per line: an object is an entry, a list is a chat."""
    values = [*map(asdict, texts.entries), *texts.chats]
    lines = [json.dumps(value, ensure_ascii=False, separators=(",", ":")) for value in values]
    path.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=9 | lzma.PRESET_EXTREME))


def read_training_texts(path: Path) -> TrainingTexts:
    """Read the file that `write_training_texts` wrote."""
    entries: list[Entry] = []
    chats: list[list[Message]] = []
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            value = json.loads(line)
            if isinstance(value, list):
                chats.append(value)
            else:
                entries.append(Entry(**value))
    return TrainingTexts(entries, chats)
