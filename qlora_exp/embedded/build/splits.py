"""The embedded task (definition → noun category), and all texts that are held out of training.

The rules make a score on it credible. Each rule stands next to the code that applies it; tests/embedded checks the
result.
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
MIN_PER_CLASS = {"train": 0, "validation": 10, "test": 20}
LEFT_OUT = {"motive"}  # only 42 synsets in WordNet: too few for 20 test items and training
CATEGORIES = sorted(set(NOUN_CATEGORIES.values()) - LEFT_OUT)
CLASS_SHARE_EXPONENT = 0.5  # a class gets a share ∝ n^0.5: artifact and person, 14 % of WordNet each, get below 10 %
POOL = 2.5  # candidates per item; in every class but the smallest, more than half pass the rules
CHAT_HELD_OUT = 260
EXAMPLES_HELD_OUT = 9000
DEFINITION_WORDS = range(3, 61)


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
    """The task's items by split, and the other texts that no training text may contain."""

    items: dict[str, list[Item]]
    chat_synsets: list[str]
    examples: list[str]
    dropped: dict[str, int] = field(default_factory=dict)


def make_splits(wordnet: dict[str, Synset], seed: int) -> Splits:
    """Choose the task's items, the synsets of the held-out chats and the held-out example sentences."""
    rng = random.Random(f"{seed}/splits")
    owners = _synsets_by_unit(wordnet.values())
    dropped: Counter[str] = Counter()
    candidates = [s for s in wordnet.values() if _is_candidate(s)]
    dropped["not a noun of the 24 categories, or not 3–60 plain words"] = len(wordnet) - len(candidates)
    unique = [s for s in candidates if all(len(owners[unit]) == 1 for unit in units(s.definition))]
    dropped["whole gloss or a part of it stands elsewhere in WordNet"] = len(candidates) - len(unique)

    quotas = {split: _quotas(unique, size, MIN_PER_CLASS[split]) for split, size in SIZES.items()}
    needed = {c: sum(quotas[split][c] for split in SIZES) for c in CATEGORIES}
    pool = _pool(unique, needed, rng)
    pooled = {s.id for s in pool}
    chat_pool = rng.sample([s for s in unique if s.id not in pooled], 2 * CHAT_HELD_OUT)
    near = _with_neighbours({s.id: s.definition for s in [*pool, *chat_pool]}, owners, word_grams)
    distinct = [s for s in pool if s.id not in near]
    dropped["has a near duplicate elsewhere in WordNet (word 3-grams)"] = len(pool) - len(distinct)
    held_out = _held_out_candidates(distinct, quotas)
    close = _with_neighbours({s.id: s.definition for s in held_out}, owners, character_grams)
    dropped["held-out candidates with a near duplicate by character 3-grams"] = len(close)

    chosen = _divide([s for s in distinct if s.id not in close], held_out, quotas, rng)
    return Splits(
        items=_items(chosen, wordnet),
        chat_synsets=[s.id for s in chat_pool if s.id not in near][:CHAT_HELD_OUT],
        examples=_held_out_examples(wordnet, owners, rng),
        dropped=dict(dropped),
    )


def _synsets_by_unit(synsets: Iterable[Synset]) -> dict[str, set[str]]:
    """Return the synsets that contain each text unit, in a definition or an example."""
    owners: dict[str, set[str]] = defaultdict(set)
    for synset in synsets:
        for text in (synset.definition, *synset.examples):
            for unit in units(text):
                owners[unit].add(synset.id)
    return owners


def _is_candidate(synset: Synset) -> bool:
    plain = '"' not in synset.definition and len(normalise(synset.definition).split()) in DEFINITION_WORDS
    return synset.category in CATEGORIES and plain


def _quotas(synsets: list[Synset], size: int, minimum: int) -> dict[str, int]:
    """Return items per class: ∝ n^TEMPER, at least `minimum`, `size` in total (largest remainders are rounded up)."""
    weights = {c: float(n) ** CLASS_SHARE_EXPONENT for c, n in Counter(s.category or "" for s in synsets).items()}
    floor: set[str] = set()
    while True:
        rest = (size - minimum * len(floor)) / sum(w for c, w in weights.items() if c not in floor)
        below = {c for c, w in weights.items() if c not in floor and w * rest < minimum}
        if not below:
            break
        floor |= below
    shares = {c: float(minimum) if c in floor else weights[c] * rest for c in sorted(weights)}
    quotas = {c: int(share) for c, share in shares.items()}
    for c in sorted(shares, key=lambda c: quotas[c] - shares[c])[: size - sum(quotas.values())]:
        quotas[c] += 1
    return quotas


def _pool(synsets: list[Synset], needed: dict[str, int], rng: random.Random) -> list[Synset]:
    shuffled = rng.sample(synsets, len(synsets))
    return [s for c in CATEGORIES for s in [s for s in shuffled if s.category == c][: int(POOL * needed[c])]]


def _with_neighbours(texts: dict[str, str], owners: dict[str, set[str]], grams: Grams) -> set[str]:
    """Return the ids of the texts (id -> text) that have a near duplicate in another synset of WordNet."""
    all_units = list(owners)
    owned_units = [(unit, id_) for id_, text in texts.items() for unit in sorted(units(text))]
    return {
        owned_units[i][1]
        for i, j in near_duplicates([unit for unit, _ in owned_units], all_units, grams)
        if all_units[j] != owned_units[i][0] and owners[all_units[j]] != owners[owned_units[i][0]]
    }


def _held_out_candidates(synsets: list[Synset], quotas: dict[str, dict[str, int]]) -> list[Synset]:
    """Return the first synsets of each class, twice as many as validation and test need."""
    firsts = []
    for category in CATEGORIES:
        of_class = [s for s in synsets if s.category == category]
        firsts += of_class[: 2 * (quotas["test"][category] + quotas["validation"][category])]
    return firsts


def _divide(
    synsets: list[Synset], held_out: list[Synset], quotas: dict[str, dict[str, int]], rng: random.Random
) -> dict[str, list[Synset]]:
    """Divide the synsets into splits. Test and validation first get their quota of every class, from `held_out`.

    Train gets its quota, too; synsets left over from other classes fill up for classes that are too small."""
    chosen: dict[str, list[Synset]] = {split: [] for split in SIZES}
    spare: list[Synset] = []
    checked = {s.id for s in held_out}
    for category in CATEGORIES:
        rest = [s for s in synsets if s.category == category]
        for split in ("test", "validation", "train"):
            taken = [s for s in rest if split == "train" or s.id in checked][: quotas[split][category]]
            chosen[split] += taken
            taken_ids = {s.id for s in taken}
            rest = [s for s in rest if s.id not in taken_ids]
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
    """Return whether the label, or its plural in -s, is one of the definition's words."""
    return bool({category, category + "s"} & set(normalise(definition).split()))


def _parents(synset: Synset) -> tuple[str, ...]:
    return (*synset.hypernyms, *synset.instance_hypernyms)


def _held_out_examples(wordnet: dict[str, Synset], owners: dict[str, set[str]], rng: random.Random) -> list[str]:
    """Return example sentences of at least four words that occur once in WordNet, without near duplicates there."""
    once = [
        e
        for s in wordnet.values()
        for e in s.examples
        if len(normalise(e).split()) >= 4 and all(len(owners[unit]) == 1 for unit in units(e))
    ]
    sampled = {e: e for e in rng.sample(sorted(set(once)), EXAMPLES_HELD_OUT)}
    near = _with_neighbours(sampled, owners, word_grams)
    return [e for e in sampled if e not in near]
