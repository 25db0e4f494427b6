"""The embedded task — definition → noun category — and everything that is held out of training.

Chosen so that a score on it can be believed: the rules stand beside the code that keeps them, tests/embedded checks
the result.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from qlora_exp.embedded.build.near_duplicates import (
    Grams,
    character_grams,
    near_duplicates,
    normalise,
    units,
    word_grams,
)
from qlora_exp.embedded.build.wordnet import NOUN_CATEGORIES, Synset

SIZES = {"train": 8000, "validation": 500, "test": 1000}
LEAST_PER_CLASS = {"train": 0, "validation": 10, "test": 20}
LEFT_OUT = {"motive"}  # 42 synsets in all of WordNet: no 20 test items and something to train on
CATEGORIES = sorted(set(NOUN_CATEGORIES.values()) - LEFT_OUT)
TEMPER = 0.5  # a class gets a share ∝ n^0.5: artifact and person (14 % each of WordNet) end below 10 %
POOL = 2.5  # candidates looked at per item wanted; more than half survive the rules in every class but the smallest
CHAT_HELD_OUT = 260
EXAMPLES_HELD_OUT = 9000
WORDS = range(3, 61)


@dataclass(frozen=True)
class Item:
    """One row of the task's files."""

    definition: str
    category: str
    lemma: str
    synonyms: list[str]
    synset: str
    hypernyms: list[str]
    has_training_sibling: bool
    contains_label: bool


@dataclass(frozen=True)
class Splits:
    """The task's items by split, and what else no training text may hold."""

    items: dict[str, list[Item]]
    chat_synsets: list[str]
    examples: list[str]
    dropped: dict[str, int] = field(default_factory=dict)


def make_splits(wordnet: dict[str, Synset], seed: int) -> Splits:
    """Choose the task's items, the synsets of the held-out chats and the held-out example sentences."""
    rng = random.Random(f"{seed}/splits")
    owners = _owners(wordnet.values())
    dropped: Counter[str] = Counter()
    candidates = [s for s in wordnet.values() if _has_form(s)]
    dropped["not a noun of the 24 categories, or not 3–60 plain words"] = len(wordnet) - len(candidates)
    unique = [s for s in candidates if all(len(owners[unit]) == 1 for unit in units(s.definition))]
    dropped["whole gloss or a part of it stands elsewhere in WordNet"] = len(candidates) - len(unique)

    quotas = {split: _quotas(unique, size, LEAST_PER_CLASS[split]) for split, size in SIZES.items()}
    wanted = {c: sum(quotas[split][c] for split in SIZES) for c in CATEGORIES}
    pool = _pool(unique, wanted, rng)
    pooled = {s.id for s in pool}
    chat_pool = rng.sample([s for s in unique if s.id not in pooled], 2 * CHAT_HELD_OUT)
    near = _with_neighbours({s.id: s.definition for s in [*pool, *chat_pool]}, owners, word_grams)
    kept = [s for s in pool if s.id not in near]
    dropped["has a near duplicate elsewhere in WordNet (word 3-grams)"] = len(pool) - len(kept)
    held_out = _held_out_candidates(kept, quotas)
    close = _with_neighbours({s.id: s.definition for s in held_out}, owners, character_grams)
    dropped["held-out candidates with a near duplicate by character 3-grams"] = len(close)

    chosen = _divide([s for s in kept if s.id not in close], held_out, quotas, rng)
    return Splits(
        items=_items(chosen, wordnet),
        chat_synsets=[s.id for s in chat_pool if s.id not in near][:CHAT_HELD_OUT],
        examples=_held_out_examples(wordnet, owners, rng),
        dropped=dict(dropped),
    )


def _owners(synsets: Iterable[Synset]) -> dict[str, set[str]]:
    """Which synsets hold each text unit, in a definition or in an example."""
    owners: dict[str, set[str]] = defaultdict(set)
    for synset in synsets:
        for text in (synset.definition, *synset.examples):
            for unit in units(text):
                owners[unit].add(synset.id)
    return owners


def _has_form(synset: Synset) -> bool:
    plain = '"' not in synset.definition and len(normalise(synset.definition).split()) in WORDS
    return synset.category in CATEGORIES and plain


def _quotas(synsets: list[Synset], size: int, least: int) -> dict[str, int]:
    """Items per class: ∝ n^TEMPER, at least `least`, `size` in all (largest remainders round up)."""
    weights = {c: float(n) ** TEMPER for c, n in Counter(s.category or "" for s in synsets).items()}
    floor: set[str] = set()
    while True:
        rest = (size - least * len(floor)) / sum(w for c, w in weights.items() if c not in floor)
        below = {c for c, w in weights.items() if c not in floor and w * rest < least}
        if not below:
            break
        floor |= below
    shares = {c: float(least) if c in floor else weights[c] * rest for c in sorted(weights)}
    quotas = {c: int(share) for c, share in shares.items()}
    for c in sorted(shares, key=lambda c: quotas[c] - shares[c])[: size - sum(quotas.values())]:
        quotas[c] += 1
    return quotas


def _pool(synsets: list[Synset], wanted: dict[str, int], rng: random.Random) -> list[Synset]:
    shuffled = rng.sample(synsets, len(synsets))
    return [s for c in CATEGORIES for s in [s for s in shuffled if s.category == c][: int(POOL * wanted[c])]]


def _with_neighbours(texts: dict[str, str], owners: dict[str, set[str]], grams: Grams) -> set[str]:
    """Ids of the texts (id -> text) that have a near duplicate in another synset of WordNet."""
    everything = list(owners)
    mine = [(unit, id_) for id_, text in texts.items() for unit in sorted(units(text))]
    return {
        mine[i][1]
        for i, j in near_duplicates([unit for unit, _ in mine], everything, grams)
        if everything[j] != mine[i][0] and owners[everything[j]] != owners[mine[i][0]]
    }


def _held_out_candidates(kept: list[Synset], quotas: dict[str, dict[str, int]]) -> list[Synset]:
    """The first of each class, twice as many as validation and test want."""
    firsts = []
    for category in CATEGORIES:
        of_class = [s for s in kept if s.category == category]
        firsts += of_class[: 2 * (quotas["test"][category] + quotas["validation"][category])]
    return firsts


def _divide(
    kept: list[Synset], held_out: list[Synset], quotas: dict[str, dict[str, int]], rng: random.Random
) -> dict[str, list[Synset]]:
    """Test and validation get their quota of every class first, from `held_out`; train gets its quota and, where a
    small class runs out, what the other classes have left over."""
    chosen: dict[str, list[Synset]] = {split: [] for split in SIZES}
    spare: list[Synset] = []
    checked = {s.id for s in held_out}
    for category in CATEGORIES:
        rest = [s for s in kept if s.category == category]
        for split in ("test", "validation", "train"):
            fit = [s for s in rest if split == "train" or s.id in checked][: quotas[split][category]]
            chosen[split] += fit
            taken = {s.id for s in fit}
            rest = [s for s in rest if s.id not in taken]
        spare += rest
    rng.shuffle(spare)
    chosen["train"] += spare[: SIZES["train"] - len(chosen["train"])]
    for split, size in SIZES.items():
        if len(chosen[split]) != size:
            raise ValueError(f"{split}: {len(chosen[split])} items instead of {size}; raise POOL (now {POOL})")
        rng.shuffle(chosen[split])
    return chosen


def _items(chosen: dict[str, list[Synset]], wordnet: dict[str, Synset]) -> dict[str, list[Item]]:
    children = Counter(parent for s in chosen["train"] for parent in _parents(s))
    return {
        split: [
            Item(
                definition=s.definition,
                category=str(s.category),
                lemma=s.lemmas[0],
                synonyms=list(s.lemmas[1:]),
                synset=s.id,
                hypernyms=list(_parents(s)),
                has_training_sibling=any(children[p] > (split == "train") for p in _parents(s)),
                contains_label=contains_label(s.definition, str(s.category)),
            )
            for s in synsets
        ]
        for split, synsets in chosen.items()
    }


def contains_label(definition: str, category: str) -> bool:
    """Whether the label, or its plural in -s, is one of the definition's words."""
    return bool({category, category + "s"} & set(normalise(definition).split()))


def _parents(synset: Synset) -> tuple[str, ...]:
    return (*synset.hypernyms, *synset.instance_hypernyms)


def _held_out_examples(wordnet: dict[str, Synset], owners: dict[str, set[str]], rng: random.Random) -> list[str]:
    """Example sentences of at least four words that stand once in WordNet and have no near duplicate there."""
    once = [
        e
        for s in wordnet.values()
        for e in s.examples
        if len(normalise(e).split()) >= 4 and all(len(owners[unit]) == 1 for unit in units(e))
    ]
    sampled = {e: e for e in rng.sample(sorted(set(once)), EXAMPLES_HELD_OUT)}
    near = _with_neighbours(sampled, owners, word_grams)
    return [e for e in sampled if e not in near]
