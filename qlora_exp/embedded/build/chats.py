"""Instructions and answers about words, to tune the instruct model on.

None of them resembles the embedded task: no chat asks for a kind, a category or the word of a definition, and none
names a word of a held-out item.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from qlora_exp.embedded.build.training_texts import Entry, Message

_SYSTEM = "You are a dictionary. Answer briefly."
_WITH_SYSTEM = 0.2
_TWO_TURNS = 0.3
_ARTICLE = {"noun": "a noun", "verb": "a verb", "adjective": "an adjective", "adverb": "an adverb"}

Turn = tuple[str, str]


def make_chats(entries: Iterable[Entry], avoid: set[str], rng: random.Random) -> list[list[Message]]:
    """Return one chat for each entry that has a word outside `avoid` (lower case), in shuffled order."""
    chats = []
    for entry in entries:
        turns = [turn for make in _MAKERS for turn in make(entry, avoid, rng)]
        if not turns:
            continue
        count = 2 if rng.random() < _TWO_TURNS else 1
        # every word has a definition: drawn evenly, nearly all chats would be about definitions
        weights = [0.5 if "mean" in question or "efin" in question else 1.0 for question, _ in turns]
        first = rng.choices(turns, weights)[0]
        chosen = [first, *rng.sample([turn for turn in turns if turn != first], min(count - 1, len(set(turns)) - 1))]
        chats.append(_chat(chosen, rng))
    rng.shuffle(chats)
    return chats


def _chat(turns: list[Turn], rng: random.Random) -> list[Message]:
    messages = [{"role": "system", "content": _SYSTEM}] if rng.random() < _WITH_SYSTEM else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _words(entry: Entry, avoid: set[str]) -> list[str]:
    return [lemma for lemma in entry.lemmas if lemma.lower() not in avoid]


def _define(entry: Entry, avoid: set[str], rng: random.Random) -> list[Turn]:
    ask = ["What does {0} mean?", "Define the word {0}.", "What is the meaning of {0}?", "Give a definition of {0}."]
    return [(rng.choice(ask).format(word), entry.definition) for word in _words(entry, avoid)[:1]]


def _synonym(entry: Entry, avoid: set[str], rng: random.Random) -> list[Turn]:
    words = _words(entry, avoid)
    if len(words) < 2:
        return []
    word, synonym = rng.sample(words, 2)
    ask = ["Give a synonym for {0}.", "Name another word for {0}.", "What is a synonym of {0}?"]
    return [(rng.choice(ask).format(word), synonym)]


def _example(entry: Entry, avoid: set[str], rng: random.Random) -> list[Turn]:
    pairs = [(word, e) for word in _words(entry, avoid) for e in entry.examples if word.lower() in e.lower()]
    ask = ["Use {0} in a sentence.", "Give an example sentence with the word {0}.", "Write a sentence that uses {0}."]
    return [(rng.choice(ask).format(word), example) for word, example in pairs[:1]]


def _part_of_speech(entry: Entry, avoid: set[str], rng: random.Random) -> list[Turn]:
    pairs = [(word, e) for word in _words(entry, avoid) for e in entry.examples if word.lower() in e.lower()]
    ask = ['Which part of speech is {0} in "{1}"?', '"{1}" Is {0} a noun, a verb, an adjective or an adverb here?']
    return [(rng.choice(ask).format(*pair), _ARTICLE[entry.part_of_speech]) for pair in pairs[:1]]


def _antonym(entry: Entry, avoid: set[str], rng: random.Random) -> list[Turn]:
    pairs = [pair for pair in entry.antonyms if not {word.lower() for word in pair} & avoid]
    ask = ["What is the opposite of {0}?", "Give an antonym of {0}."]
    return [(rng.choice(ask).format(word), opposite) for word, opposite in pairs]


def _first_letter(entry: Entry, avoid: set[str], rng: random.Random) -> list[Turn]:
    ask = ["Which letter does {0} begin with?", "What is the first letter of {0}?"]
    return [(rng.choice(ask).format(w), w[0].upper()) for w in _words(entry, avoid)[:1] if rng.random() < 0.2]


def _count_words(entry: Entry, avoid: set[str], rng: random.Random) -> list[Turn]:
    words = [word for word in _words(entry, avoid) if " " in word]
    return [(f'How many words are there in "{word}"?', str(len(word.split()))) for word in words[:1]]


_MAKERS: list[Callable[[Entry, set[str], random.Random], list[Turn]]] = [
    _define, _synonym, _example, _part_of_speech, _antonym, _first_letter, _count_words,
]  # fmt: skip
