"""The margin of a table: what the user wrote, or a default that depends on the score; per doubling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_exp.analysis.margin import DEFAULT_SHARE, Levels, Margin, MarginUnit, MarginUnits, margin_units, parse_margin
from qlora_exp.analysis.table_columns import Columns, name_words
from qlora_exp.analysis.table_results import Result
from qlora_exp.errors import AnalysisError

LOSS_WORDS = frozenset(("loss", "nll", "logloss", "crossentropy", "bpb", "bpc"))
LOSS_PHRASES = (("bits", "per", "byte"), ("bits", "byte"), ("cross", "entropy"))
ASSUMED_SHARE = 0.01
"""Default margin of a score that isn't a loss, as a share of the smallest rank's mean score."""
OPTION = "--margin"


@dataclass(frozen=True)
class TableMargin:
    """The margin of one doubling. ``value`` is in the score's units."""

    value: float
    text: str
    units: MarginUnits
    score: str
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        share = f" ({100 * self.units.share_of_loss:.2g}% of the loss)" if self.units.share_of_loss is not None else ""
        return f"Margin per doubling: {self.value:.3g} in {self.score}{share}."


def table_margin(written: Sequence[str], results: Sequence[Result], columns: Columns) -> TableMargin:
    """Return the margin that ``--margin`` gives for these results, or the default for this kind of score.

    Raises:
        AnalysisError: several margins, an unknown unit, or a unit that this table's score can't be converted to.
    """
    if len(written) > 1:
        what = f"{len(written)} margins: {', '.join(written)}"
        raise AnalysisError(what, OPTION, "use one, for example 0.25%, or a number in the score's units")
    smallest = min(result.rank for result in results)
    level = abs(float(np.mean([result.score for result in results if result.rank == smallest])))
    is_loss = _is_loss(columns)
    if written:
        margin = parse_margin(written[0], MarginUnit.SCORE, OPTION)
        value, notes = _value(margin, level, columns), list[str]()
    else:
        margin = Margin(DEFAULT_SHARE if is_loss else ASSUMED_SHARE, MarginUnit.SHARE_OF_LOSS)
        value, notes = _of_level(margin, level), [_default_note(margin, level, smallest, columns)]
    return TableMargin(value, str(margin), _units(value, level, columns), columns.score, tuple(notes))


def _value(margin: Margin, level: float, columns: Columns) -> float:
    """Return the margin in the score's units."""
    match margin.unit:
        case MarginUnit.SCORE:
            return margin.value
        case MarginUnit.SHARE_OF_LOSS if not columns.higher_is_better:
            return _of_level(margin, level)
        case MarginUnit.SHARE_OF_LOSS:
            what = f"a share of {columns.score} has no meaning: only losses and errors are counted from zero"
            raise AnalysisError(what, f"{OPTION} {margin}", "use a number in the score's units, e.g. --margin 0.5")
        case MarginUnit.SHARE_OF_TUNING_GAIN:
            what = "a table has no score before tuning, so the tuning gain is unknown"
            raise AnalysisError(what, f"{OPTION} '{margin}'", "use 0.25%, or a number in the score's units")
    if margin.unit is not _unit_of(columns):
        what = f"column {columns.score!r} isn't known to be in {margin.unit.replace('_', ' ')}"
        hint = f"use a number in the score's units, e.g. --margin {margin.value:g}"
        raise AnalysisError(what, f"{OPTION} '{margin}'", hint)
    return margin.value


def _of_level(margin: Margin, level: float) -> float:
    if level <= 0:
        what = f"no margin can be assumed from a score of {level:g}"
        raise AnalysisError(what, OPTION, "say how much a doubling must gain to be worth its cost")
    return margin.value * level


def _default_note(margin: Margin, level: float, smallest: int, columns: Columns) -> str:
    size = f"{margin.value * level:.3g} per doubling is assumed, {margin} of the score at r = {smallest}"
    decide = "Decide beforehand how much a doubling must gain to be worth its cost, and give it with --margin."
    if _is_loss(columns):
        return f"No margin was given: {size}, as in a sweep. {decide}"
    why = f"{columns.score} isn't a loss, so a share of it says little about what a gain is worth"
    return f"No margin was given: {size}. That is only a start: {why}. {decide}"


def _is_loss(columns: Columns) -> bool:
    words = name_words(columns.score)
    phrases = any(
        tuple(words[start : start + len(phrase)]) == phrase for phrase in LOSS_PHRASES for start in range(len(words))
    )
    return not columns.higher_is_better and (phrases or bool(LOSS_WORDS.intersection(words)))


def _unit_of(columns: Columns) -> MarginUnit | None:
    """Return the unit of a loss whose name says it: ``loss_per_item``, or ``loss``, a mean over tokens everywhere."""
    words = name_words(columns.score)
    if columns.higher_is_better or "loss" not in words:
        return None
    return MarginUnit.NATS_PER_ITEM if "item" in words else MarginUnit.NATS_PER_TOKEN


def _units(value: float, level: float, columns: Columns) -> MarginUnits:
    share = value / level if _is_loss(columns) and level > 0 else None
    match _unit_of(columns):
        case MarginUnit.NATS_PER_ITEM if level > 0:
            return margin_units(value, Levels(level))
        case MarginUnit.NATS_PER_TOKEN:
            return MarginUnits(share, None, value, None)
    return MarginUnits(share, None, None, None)
