"""A study's report, from its records: the answer in words with its confidence, and everything that supports it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from qlora_exp.analysis import sections
from qlora_exp.analysis.comparable import (
    Group,
    answering_scores,
    finished_runs,
    groups_of,
    is_pilot,
    refuse_synthetic,
    setting_differences,
)
from qlora_exp.analysis.configurations import Configuration, Measure, best_on_validation, configurations, measure_of
from qlora_exp.analysis.contrasts import ItemScores
from qlora_exp.analysis.equal_tokens import token_groups
from qlora_exp.analysis.feasibility_section import feasibility_section
from qlora_exp.analysis.instruct_base import InstructBase, baseline_note, compare_variants
from qlora_exp.analysis.instruct_base_section import instruct_section
from qlora_exp.analysis.instruct_base_words import primary_lead, primary_sentence
from qlora_exp.analysis.report_content import ReportContent, Section, StudyInfo
from qlora_exp.analysis.tradeoffs import goal_answer
from qlora_exp.errors import AnalysisError
from qlora_exp.records.types import RunRecord, Status

MAX_GROUPS = 3
"""Groups of comparable runs that the report shows; it only counts further ones."""
MIN_SEEDS_SHOWN = 2


def build(
    records: Sequence[RunRecord],
    studies: Sequence[StudyInfo],
    items: ItemScores | None = None,
    margin: float | None = None,
    unreadable: int = 0,
) -> ReportContent:
    """Return the report of these runs.

    Args:
        records: all runs of the studies, including failed ones.
        studies: one entry per study.
        items: per-item values for the instruct-or-base intervals; without them, those intervals are over seeds alone.
        margin: bits per byte within which instruct and base count as equivalent.
        unreadable: number of records that could not be read.

    Raises:
        AnalysisError: no runs, SYNTHETIC ones, or none that has finished.
    """
    where = "study " + ", ".join(study.name for study in studies)
    if not records:
        raise AnalysisError("the study has no run", where, "see qlora-exp status")
    refuse_synthetic(records)
    groups, aside = _split_runs(records)
    if not groups:
        states = ", ".join(sorted({record.status.value for record in records}))
        raise AnalysisError(
            f"no run has finished: {len(records)} are {states}", where, "wait for one, or qlora-exp resume"
        )
    shown_groups = [_summarise_group(group) for group in groups[:MAX_GROUPS]]
    first, measure, candidates = shown_groups[0]
    comparison = compare_variants(candidates, items, margin, aside.pilots, aside.budgeted)
    why_none, several = _why_no_headline(groups, studies, measure), len(groups) > 1
    headline = _ladder_sentences(studies)
    if why_none is None:
        headline += _headline(first, measure, candidates, comparison, decided=bool(headline))
    parts = [
        *sections.ladder_sections(studies),
        *(
            s
            for summary in shown_groups
            for s in _group_sections(*summary, summary is shown_groups[0], several, studies, items, aside, margin)
        ),
        sections.importance_section(studies, [record for record in records if record.status is Status.COMPLETED]),
        sections.failure_section(records),
        feasibility_section(studies),
        sections.method_section(groups, records, measure, studies),
        _limits_section(
            records, groups, aside, candidates, measure, _open_points(studies, comparison, why_none), unreadable
        ),
    ]
    return ReportContent(
        title=", ".join(study.name for study in studies),
        question=next((study.question for study in studies if study.question), None),
        headline=headline,
        why_none=None if headline else why_none,
        sections=tuple(part for part in parts if part is not None),
        runs=sections.runs_section_table(records),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {len(records)} runs",
    )


@dataclass(frozen=True)
class SetAside:
    """Finished runs outside the comparison."""

    pilots: tuple[RunRecord, ...]
    """Runs that chose learning rates."""
    budgeted: tuple[RunRecord, ...]
    """Runs trained to a number of tokens, if the others were trained to a number of steps."""


def _split_runs(records: Sequence[RunRecord]) -> tuple[list[Group], SetAside]:
    """Return the groups to compare within, and the runs set aside. If only pilots have finished, these are grouped."""
    pilots = [record for record in records if is_pilot(record)]
    answering = groups_of([record for record in records if not is_pilot(record)])
    groups, budgeted = token_groups(answering or groups_of(pilots))
    return groups, SetAside(tuple(finished_runs(pilots)) if answering else (), tuple(budgeted))


def _summarise_group(group: Group) -> tuple[Group, Measure | None, list[Configuration]]:
    measure = measure_of(group.records)
    return group, measure, configurations(group.records, measure or Measure("loss_per_item", False))


def _group_sections(
    group: Group,
    measure: Measure | None,
    candidates: Sequence[Configuration],
    main: bool,
    several: bool,
    studies: Sequence[StudyInfo],
    items: ItemScores | None,
    aside: SetAside,
    margin: float | None,
) -> list[Section]:
    """Return the sections that compare within one group; if there are ``several``, each title names the group."""
    parts: list[Section | None] = []
    if measure is not None:
        goal = goal_answer(candidates)
        parts = [
            sections.rank_section(candidates, measure, any(study.ladder for study in studies)),
            sections.tradeoff_section(candidates, measure),
            sections.equal_everything_section(candidates, measure),
            Section("goal", "The cheapest that is good enough", (goal.sentence,)) if goal else None,
            instruct_section(candidates, items, margin, aside.pilots, aside.budgeted if main else ()),
        ]
    parts += [sections.memory_section(candidates, group.records), sections.speed_section(group.records)]
    known = [part for part in parts if part is not None]
    if not several:
        return known
    p = group.protocol
    subtitle = f"{len(group.records)} runs, {p.max_steps} steps, {p.scored_items} {p.split} items"
    number = "" if main else f"-{id_of(group)}"
    return [replace(part, name=part.name + number, title=f"{part.title} ({subtitle})") for part in known]


def id_of(group: Group) -> str:
    p = group.protocol
    return f"{p.max_steps}-{p.scored_items}-{p.split}-{p.batch_size}-{p.adapter_dtype}-{p.data_version}"


def _why_no_headline(groups: Sequence[Group], studies: Sequence[StudyInfo], measure: Measure | None) -> str | None:
    """Return why there is no headline; ``None`` with a score, one protocol, and a split that nothing was chosen on."""
    if measure is None:
        return "No headline: no finished run has a score."
    if len(groups) > 1:
        differences = "; ".join(setting_differences(groups))
        return f"No headline: the runs aren't all comparable ({differences}); the report shows them separately."
    searched = [text for study in studies for text in study.objectives if "scores.test" in text]
    if searched:
        return (
            f"No headline: the test split was searched ({searched[0]}), so its scores flatter the best configuration."
        )
    split = groups[0].protocol.split
    if split != "test":
        return (
            f"No headline: these are scores of the {split} split, which the search itself used. Score the finalists on"
            " the test split: evaluation.split=test with other seeds."
        )
    return None


def _ladder_sentences(studies: Sequence[StudyInfo]) -> tuple[str, ...]:
    """Return each ladder's sentence, and its error rates."""
    sentences, error_rates = [], []
    for study in studies:
        ladders = sections.ladders_of(study)
        for name, answer in ladders:
            sentences.append(
                (f"{name}: " if len(ladders) > 1 else "") + str(answer.get("sentence") or answer["decision"])
            )
            error_rates.append(sections.error_rate_sentence(answer))
    return (*sentences, *dict.fromkeys(rate for rate in error_rates if rate is not None))


def _headline(
    group: Group,
    measure: Measure | None,
    candidates: Sequence[Configuration],
    comparison: InstructBase | None,
    decided: bool,
) -> tuple[str, ...]:
    """Return the sentences after the ladders' answers; ``decided``: whether a ladder answered."""
    sentences = [f"{primary_lead(comparison)} {primary_sentence(comparison)}"] if comparison is not None else []
    best = best_on_validation(candidates, measure) if measure is not None else None
    if best is not None and measure is not None and not decided:
        sentences.append(_best_sentence(best, candidates, measure))
        note = baseline_note(best)
        sentences += [note] if note else []
    goal = goal_answer(candidates)
    return (*sentences, *([goal.sentence] if goal is not None and goal.split == group.protocol.split else []))


def _best_sentence(best: Configuration, candidates: Sequence[Configuration], measure: Measure) -> str:
    """Return the test score of the configuration that validation chose, and whether it is shown to be the best."""
    estimate = best.quality
    assert estimate is not None
    score = f"{measure.name.replace('_', ' ')} {estimate.mean:.4g}"
    if estimate.low is not None and estimate.high is not None:
        seeds = f"{estimate.seeds} seed{'s' * (estimate.seeds > 1)}"
        score += f" (95 % CI {estimate.low:.4g} to {estimate.high:.4g}, {seeds})"
    else:
        score += " (one seed: no interval)"
    if len(candidates) < 2:
        return f"The only configuration is {best.label}; on test it has {score}."
    sentence = f"Of {len(candidates)} configurations, {best.label} is best on validation; on test it has {score}"
    if estimate.se is None:
        return f"{sentence}."
    ties = sum(_is_tie(best, other, measure) for other in candidates if other is not best)
    if ties:
        return f"{sentence}. It isn't shown to be better than {ties} of the others."
    return f"{sentence}. It is shown to be better than all others."


def _is_tie(best: Configuration, other: Configuration, measure: Measure) -> bool:
    """Return whether the best is not shown (95 %, over seeds) to be better than the other."""
    if best.quality is None or other.quality is None:
        return True
    halves = [estimate.half_width() for estimate in (best.quality, other.quality)]
    ahead = measure.sign * (best.quality.mean - other.quality.mean)
    return None in halves or ahead <= math.hypot(*(half or 0.0 for half in halves))


def _open_points(studies: Sequence[StudyInfo], comparison: InstructBase | None, why_none: str | None) -> list[str]:
    points = [why_none] if why_none else []
    points += sections.open_ends(studies)
    points += [comparison.tokens.sentence] if comparison is not None and not comparison.tokens.done else []
    return points


def _limits_section(
    records: Sequence[RunRecord],
    groups: Sequence[Group],
    aside: SetAside,
    candidates: Sequence[Configuration],
    measure: Measure | None,
    left_open: Sequence[str],
    unreadable: int,
) -> Section:
    """Return the section on what can't be concluded, and what would settle it."""
    points = [*left_open]
    if len(groups) > 1:
        points.append(f"The groups can't be compared with each other: {'; '.join(setting_differences(groups))}.")
    if len(groups) > MAX_GROUPS:
        points.append(f"{len(groups) - MAX_GROUPS} smaller groups of runs are only in the table of runs.")
    if all(len(c.runs) < MIN_SEEDS_SHOWN for c in candidates):
        points.append("One seed per configuration: no difference can be distinguished from chance. Run seed=1,2,3.")
    ranks = {int(c.first.config["lora"]["r"]) for c in candidates}
    if len(ranks) == 1:
        points.append(f"Only r = {ranks.pop()} was run: nothing follows about the rank. Run lora.r=8,16,32.")
    running = sum(not record.status.ended for record in records)
    points += [f"{running} runs have not ended: the answer may change."] if running else []
    scored = sum(measure is not None and measure.of(answering_scores(r)) is None for g in groups for r in g.records)
    points += [f"{scored} finished runs have no finite score and are left out of every comparison."] if scored else []
    considered = sum(len(g.records) for g in groups) + len(aside.pilots) + len(aside.budgeted)
    unscored = sum(r.status is Status.COMPLETED for r in records) - considered
    points += [f"{unscored} completed runs lack scores, plan or data and are left out."] if unscored else []
    points += [f"{unreadable} records could not be read: qlora-exp ls runs lists them."] if unreadable else []
    if aside.pilots:
        points.append(f"{len(aside.pilots)} pilots chose learning rates on validation and are in no comparison.")
    points.append(
        "Intervals are over seeds, on these items. A ladder's intervals, and those that name items, are also over items"
        " of this kind. Another task may give another answer."
    )
    return Section("limits", "What can't be concluded, and what it would take", points=tuple(points))
