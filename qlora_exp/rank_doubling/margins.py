"""A ladder's margin: its text, what it is relative to, and its size in several units."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qlora_exp.analysis.margin import Levels, levels_of, margin_units, margin_words, task_slope
from qlora_exp.analysis.rank_rule import Rule
from qlora_exp.rank_doubling.ladder_trials import LadderTrial
from qlora_exp.rank_doubling.settings import SEED, margin_of
from qlora_exp.study.types import LadderSpec

Runs = Mapping[int, Sequence[LadderTrial]]
"""Rank → its ended decision runs, by seed."""


def start_levels(spec: LadderSpec, runs: Runs) -> Levels | None:
    """Return what the margin is relative to: means over the first ``seeds`` seeds at r_start.

    Seeds that are added later don't count, so that the margin is fixed. If all of these runs were lost, the first later
    one counts. ``None``: no run there has left losses.
    """
    completed = [trial for trial in runs.get(spec.r_start, ()) if trial.completed and trial.losses]
    first = [trial for trial in completed if trial.params[SEED] < spec.first_seed + spec.seeds] or completed[:1]
    if not first:
        return None
    levels = levels_of([trial.record for trial in first if trial.record is not None])
    # From the losses that are compared: with groups of items, all groups count the same.
    loss = statistics.fmean(statistics.fmean((trial.losses or {}).values()) for trial in first)
    return Levels(loss) if levels is None else replace(levels, loss_per_item=loss)


def margin_fields(spec: LadderSpec, rule: Rule | None, runs: Runs) -> dict[str, Any]:
    """Return ``margin_text`` and ``margin_units`` of a ladder's answer, and the sentence on them.

    The task's metric follows the loss over the study's own completed decision runs.
    """
    completed = [trial.record for trials in runs.values() for trial in trials if trial.completed and trial.record]
    text = str(margin_of(spec))
    units = margin_units(rule.margin if rule else None, start_levels(spec, runs), task_slope(completed))
    return {
        "margin_text": text,
        "margin_units": units.as_object(),
        "sentence": f"Margin per doubling: {margin_words(text, units)}.",
    }
