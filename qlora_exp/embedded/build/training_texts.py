"""What the models are trained on: WordNet entries for the base, chats for the instruct model, in one compressed file.

The file is the only thing that tokenizer and models are built from, and it is committed beside the tests, so that the
honesty of the splits can be checked against the very texts without WordNet.
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
        """The entry as pretraining text; its order varies from epoch to epoch: word first or definition first."""
        kinds = [KIND_OF.join(pair) + "." for pair in self.kinds]
        rng.shuffle(kinds)
        if kinds and rng.random() < _DEFINITION_FIRST:
            lines = [self.definition, *kinds, *self.examples]
        else:
            lines = [f"{', '.join(self.lemmas)}: {self.definition}", *self.examples, *kinds]
        return "\n".join(lines)


@dataclass(frozen=True)
class TrainingTexts:
    """Everything that the two models have seen."""

    entries: list[Entry]
    chats: list[list[Message]]


def make_entries(wordnet: dict[str, Synset], splits: Splits) -> list[Entry]:
    """The pretraining entries: nothing of a task item or of a held-out chat, no held-out example, and no kind-of line
    with a held-out item's word (in whichever sense) on either side."""
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
    """Every text that a model is trained on, whole and in its parts between semicolons, normalised."""
    words = {lemma for entry in texts.entries for lemma in entry.lemmas}
    strings = [text for entry in texts.entries for text in (entry.definition, *entry.examples)]
    # an answer that is a word of the dictionary is a synonym or an antonym, no gloss
    strings += [m["content"] for chat in texts.chats for m in chat if m["content"] not in words]
    return frozenset(unit for text in strings for unit in units(text))


def make_chat_entries(wordnet: dict[str, Synset], splits: Splits, entries: list[Entry]) -> list[Entry]:
    """The entries kept back for the held-out chats, without the examples that another entry shares."""
    seen = {example for entry in entries for example in entry.examples}
    kept = [wordnet[id_] for id_ in splits.chat_synsets]
    return [
        Entry(s.part_of_speech, list(s.lemmas), s.definition, [e for e in s.examples if e not in seen], [], [])
        for s in kept
    ]


def held_out_words(wordnet: dict[str, Synset], splits: Splits) -> set[str]:
    """The words of the validation and test items, in lower case."""
    ids = {item.synset for split in ("validation", "test") for item in splits.items[split]}
    return {lemma.lower() for id_ in ids for lemma in wordnet[id_].lemmas}


def _kinds(synset: Synset, wordnet: dict[str, Synset], hidden: set[str], words: set[str]) -> list[list[str]]:
    """Up to three (word, word of a direct hypernym); instances ("Einstein is a kind of physicist") are no kinds."""
    below = [lemma for lemma in synset.lemmas if lemma.lower() not in words]
    pairs = []
    for hypernym in synset.hypernyms:
        above = [lemma for lemma in wordnet[hypernym].lemmas if lemma.lower() not in words]
        if hypernym not in hidden and above:
            pairs += [[lemma, above[0]] for lemma in below]
    return pairs[:_KINDS_PER_ENTRY]


def write_training_texts(path: Path, texts: TrainingTexts) -> None:
    """One JSON value a line: an object is an entry, a list is a chat."""
    values = [*map(asdict, texts.entries), *texts.chats]
    lines = [json.dumps(value, ensure_ascii=False, separators=(",", ":")) for value in values]
    path.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=9 | lzma.PRESET_EXTREME))


def read_training_texts(path: Path) -> TrainingTexts:
    """The file that `write_training_texts` wrote."""
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
