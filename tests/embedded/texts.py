"""The committed task and training texts, read once, and the searches that the honesty tests share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from qlora_exp.embedded.build.near_duplicates import Grams, near_duplicates, units
from qlora_exp.embedded.build.training_texts import TrainingTexts, read_training_texts, trained_units
from qlora_exp.paths import EMBEDDED

SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")


@cache
def training_texts() -> TrainingTexts:
    return read_training_texts(Path(__file__).with_name("training_texts.txt.xz"))


@cache
def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EMBEDDED / f"{name}.jsonl").read_text("utf-8").splitlines()]


def task(split: str) -> list[dict[str, Any]]:
    return rows(f"task/{split}")


@cache
def trained() -> frozenset[str]:
    return trained_units(training_texts())


def copies(texts: Iterable[str], others: Iterable[str]) -> set[str]:
    """Which normalised units of `texts` stand among `others` (normalised units)."""
    return {unit for text in texts for unit in units(text)} & set(others)


def close(texts: Iterable[str], others: Iterable[str], grams: Grams) -> list[tuple[str, str]]:
    """Near duplicates between the units of `texts` and the normalised units `others`."""
    left, right = sorted({unit for text in texts for unit in units(text)}), sorted(others)
    return [(left[i], right[j]) for i, j in near_duplicates(left, right, grams)]
