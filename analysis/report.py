"""A study's report, from its records: the answer in words with its confidence, and everything that supports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    split_budgeted,
)
from qlora_exp.analysis.configurations import Configuration, Measure, best_on_validation, configurations, measure_of
from qlora_exp.analysis.contrasts import ItemScores
from qlora_exp.analysis.goals import GoalAnswer, goal_answer, goal_recommendation
from qlora_exp.analysis.instruct_base import InstructBase, compare_variants, ladder_ranks
from qlora_exp.analysis.instruct_base_words import (
    baseline_note,
    instruct_section,
    primary_sentence,
    variant_recommendation,
)
from qlora_exp.analysis.margin import Margin
from qlora_exp.analysis.quantization import LevelComparison, compare_quantizations
from qlora_exp.analysis.quantization_words import quantization_recommendation
from qlora_exp.analysis.recommendation import Recommendation, study_margin
from qlora_exp.analysis.report_content import ReportContent, Section, StudyInfo
from qlora_exp.analysis.searches import search_recommendation
from qlora_exp.errors import AnalysisError, nearest
from qlora_exp.records.types import RunRecord, Status

MAX_GROUPS = 3
"""Groups of comparable runs that the report shows; it only counts further ones."""
MIN_SEEDS_SHOWN = 2


@dataclass(frozen=True)
class _Runs:
    """All runs of a report, and which of them are compared with each other."""

    records: Sequence[RunRecord]
    groups: list[Group]
    """Runs that are compared within their group."""
    pilots: list[RunRecord]
    """Finished runs that chose learning rates; empty if only pilots have finished: then these are compared."""
    budgeted: list[RunRecord]
    """Finished runs trained to a number of tokens, if the others were trained to a number of steps."""
    unreadable: int


@dataclass(frozen=True)
class _Compared:
    """A group of comparable runs, and what the report says about it."""

    group: Group
    measure: Measure | None
    candidates: list[Configuration]
    comparison: InstructBase | None
    quantizations: LevelComparison | None
    goal: GoalAnswer | None


def build(
    records: Sequence[RunRecord],
    studies: Sequence[StudyInfo],
    items: ItemScores | None = None,
    margin: Margin | None = None,
    unreadable: int = 0,
) -> ReportContent:
    """Return the report of these runs.

    Args:
        records: all runs of the studies, including failed ones.
        studies: one entry per study.
        items: per-item values for the intervals of comparisons; without them, those intervals are over seeds alone.
        margin: within which two sides count as equivalent; ``None``: that of the studies' ladder, else 0.25 % of the
            loss. A number without a unit is in bits per byte.
        unreadable: number of records that could not be read.

    Raises:
        AnalysisError: no runs, SYNTHETIC ones, or none that has finished.
    """
    where = "study " + ", ".join(study.name for study in studies)
    if not records:
        raise AnalysisError("the study has no run", where, "see qlora-exp status")
    refuse_synthetic(records)
    pilots = [record for record in records if is_pilot(record)]
    answering = groups_of([record for record in records if not is_pilot(record)])
    groups, budgeted = split_budgeted(answering or groups_of(pilots))
    runs = _Runs(records, groups, finished_runs(pilots) if answering else [], budgeted, unreadable)
    if not groups:
        states = ", ".join(sorted({record.status.value for record in records}))
        raise AnalysisError(
            f"no run has finished: {len(records)} are {states}", where, "wait for one, or qlora-exp resume"
        )
    margin, ranks = margin or study_margin(studies), ladder_ranks(studies)
    shown = []
    for group in groups[:MAX_GROUPS]:
        measure = measure_of(group.records)
        candidates = configurations(group.records, measure or Measure("loss_per_item", False))
        of_first = budgeted if group is groups[0] else ()
        comparison = compare_variants(candidates, items, margin, runs.pilots, of_first, ranks)
        quantizations = goal = None
        if measure is not None:
            quantizations = compare_quantizations(candidates, measure, items, margin)
            goal = goal_answer(candidates, _at_recommended_rank(candidates, measure, ranks), items)
        shown.append(_Compared(group, measure, candidates, comparison, quantizations, goal))
    why_none = _why_no_headline(groups, studies, shown[0].measure)
    headline = _ladder_sentences(studies)
    if why_none is None:
        headline += _headline(shown[0], studies, margin, with_best=not headline)
        why_none = None if headline else "No headline: no configuration has a finite score."
    completed = [record for record in records if record.status is Status.COMPLETED]
    parts = [
        *sections.ladder_sections(studies),
        *(section for compared in shown for section in _group_sections(compared, groups, studies, margin)),
        sections.importance_section(studies, completed),
        sections.failure_section(records),
        sections.feasibility_section(studies),
        sections.method_section(groups, records, shown[0].measure, studies),
        _limits_section(runs, shown[0], studies, why_none),
    ]
    return ReportContent(
        title=", ".join(study.name for study in studies),
        question=next((study.question for study in studies if study.question), None),
        headline=tuple(headline),
        why_none=None if headline else why_none,
        sections=tuple(part for part in parts if part is not None),
        runs=sections.table_of_runs(records),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {len(records)} runs",
    )


def only_section(report: ReportContent, name: str) -> ReportContent:
    """Return one section of the report without the headline, e.g. ``tradeoffs``, or every section of that kind:
    ``ladder`` gives ``ladder-1``, ``ladder-2`` …

    Raises:
        AnalysisError: the report has no such section.
    """
    name = name.replace("_", "-")
    chosen = [section for section in report.sections if f"{section.name}-".startswith(f"{name}-")]
    if not chosen:
        names = [section.name for section in report.sections]
        raise AnalysisError(f"the report of these runs has no section {name!r}", "--only", nearest(name, names))
    return replace(report, question=None, headline=(), sections=tuple(chosen))


def _group_sections(
    compared: _Compared, groups: Sequence[Group], studies: Sequence[StudyInfo], margin: Margin
) -> list[Section]:
    """Return the sections that compare within one group; if there are several groups, each title names the group."""
    group, measure, candidates = compared.group, compared.measure, compared.candidates
    parts: list[Section | None] = []
    if measure is not None:
        goal = compared.goal
        parts = [
            sections.rank_section(candidates, measure, any(study.ladders for study in studies)),
            sections.tradeoff_section(candidates, measure),
            _search_section(compared, studies, margin),
            _with_command(
                sections.equal_everything_section(candidates, measure, compared.quantizations),
                quantization_recommendation(compared.quantizations, studies) if compared.quantizations else None,
            ),
            _answered(Section("goal", "The cheapest that is good enough"), goal_recommendation(goal, studies))
            if goal
            else None,
            _with_command(instruct_section(compared.comparison), variant_recommendation(compared.comparison, studies))
            if compared.comparison
            else None,
        ]
    parts += [sections.memory_section(candidates, group.records), sections.speed_section(group.records)]
    known = [part for part in parts if part is not None]
    if len(groups) == 1:
        return known
    p = group.protocol
    subtitle = f"{len(group.records)} runs, {p.max_steps} steps, {p.scored_items} {p.split} items"
    anchor = f"-{p.max_steps}-{p.scored_items}-{p.split}-{p.batch_size}-{p.adapter_dtype}-{p.data_version}"
    if group is groups[0]:
        anchor = ""
    return [replace(part, name=part.name + anchor, title=f"{part.title} ({subtitle})") for part in known]


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


def _ladder_sentences(studies: Sequence[StudyInfo]) -> list[str]:
    """Return each ladder's sentence, and its error rates."""
    ladders = sections.ladders_of(studies)
    sentences, error_rates = [], []
    for name, answer in ladders:
        sentence = str(answer.get("sentence") or answer["decision"])
        sentences.append(f"{name}: {sentence}" if len(ladders) > 1 else sentence)
        error_rates.append(sections.error_rate_sentence(answer))
    return [*sentences, *dict.fromkeys(rate for rate in error_rates if rate is not None)]


def _headline(compared: _Compared, studies: Sequence[StudyInfo], margin: Margin, with_best: bool) -> list[str]:
    """Return instruct or base, the quantization, the best configuration (unless a ladder has chosen one), and the
    goal's answer."""
    measure, comparison, quantizations = compared.measure, compared.comparison, compared.quantizations
    sentences = []
    if comparison is not None:
        sentences.append(f"{variant_recommendation(comparison, studies).sentence} {primary_sentence(comparison)}")
    if quantizations is not None:
        sentences.append(quantization_recommendation(quantizations, studies).sentence)
    best = best_on_validation(compared.candidates, measure) if measure is not None and with_best else None
    if best is not None and measure is not None:
        search = search_recommendation(compared.candidates, measure, margin, studies)
        sentences.append(search.sentence if search is not None else _only_sentence(best, measure))
        sentences += [note] if (note := baseline_note(best)) else []
    goal = compared.goal
    if goal is not None and goal.split == compared.group.protocol.split:
        sentences.append(goal_recommendation(goal, studies).sentence)
    return sentences


def _at_recommended_rank(
    candidates: Sequence[Configuration], measure: Measure, rank_of: Callable[[RunRecord], int | None]
) -> Configuration | None:
    """Return the best configuration on validation among those that ladders recommend; ``None`` without a ladder."""
    recommended = [c for c in candidates if c.rank == rank_of(c.first)]
    return best_on_validation(recommended, measure)


def _answered(section: Section, answer: Recommendation) -> Section:
    """Return the section with the answer's sentence first, then what would settle it."""
    points = (*answer.notes, *([f"To run: {answer.settle_command}"] if answer.settle_command else []))
    return replace(section, paragraphs=(answer.sentence, *section.paragraphs), points=(*points, *section.points))


def _with_command(section: Section, answer: Recommendation | None) -> Section:
    """Return the section with the command that would settle its question as another point."""
    if answer is None or answer.settle is None or answer.settle_command is None:
        return section
    return replace(section, points=(*section.points, f"{answer.settle} To run: {answer.settle_command}"))


def _search_section(compared: _Compared, studies: Sequence[StudyInfo], margin: Margin) -> Section | None:
    """Return which configuration of a search to use; ``None`` if ladders decide, or there is one configuration."""
    if compared.measure is None or any(study.ladders for study in studies):
        return None
    answer = search_recommendation(compared.candidates, compared.measure, margin, studies)
    return None if answer is None else _answered(Section("search", "Which configuration to use"), answer)


def _only_sentence(best: Configuration, measure: Measure) -> str:
    """Return the test score of the only configuration."""
    estimate = best.quality
    assert estimate is not None
    score = f"{measure.words} {estimate.mean:.4g}"
    if estimate.low is not None and estimate.high is not None:
        seeds = f"{estimate.seeds} seed{'s' * (estimate.seeds > 1)}"
        score += f" (95 % CI {estimate.low:.4g} to {estimate.high:.4g}, {seeds})"
    else:
        score += " (one seed: no interval)"
    return f"The only configuration is {best.label}; on test it has {score}."


def _limits_section(
    runs: _Runs, first: _Compared, studies: Sequence[StudyInfo], why_no_headline: str | None
) -> Section:
    """Return the section on what can't be concluded, and what would settle it."""
    groups, measure, candidates = runs.groups, first.measure, first.candidates
    points = [why_no_headline] if why_no_headline else []
    points += sections.undecided_ladders(studies)
    if first.comparison is not None and not first.comparison.tokens.done:
        points.append(first.comparison.tokens.sentence)
    if len(groups) > 1:
        points.append(f"The groups can't be compared with each other: {'; '.join(setting_differences(groups))}.")
    if len(groups) > MAX_GROUPS:
        points.append(f"{len(groups) - MAX_GROUPS} smaller groups of runs are only in the table of runs.")
    if all(len(c.runs) < MIN_SEEDS_SHOWN for c in candidates):
        points.append("One seed per configuration: no difference can be distinguished from chance. Run seed=1,2,3.")
    ranks = {c.rank for c in candidates}
    if len(ranks) == 1:
        points.append(f"Only r = {ranks.pop()} was run: nothing follows about the rank. Run lora.r=8,16,32.")
    if running := sum(not record.status.ended for record in runs.records):
        points.append(f"{running} runs have not ended: the answer may change.")
    finished = [record for group in groups for record in group.records]
    if unscored := sum(measure is not None and measure.of(answering_scores(r)) is None for r in finished):
        points.append(f"{unscored} finished runs have no finite score and are left out of every comparison.")
    completed = sum(record.status is Status.COMPLETED for record in runs.records)
    if lacking := completed - len(finished) - len(runs.pilots) - len(runs.budgeted):
        points.append(f"{lacking} completed runs lack scores, plan or data and are left out.")
    if runs.unreadable:
        points.append(f"{runs.unreadable} records could not be read: qlora-exp ls runs lists them.")
    if runs.pilots:
        points.append(f"{len(runs.pilots)} pilots chose learning rates on validation and are in no comparison.")
    points.append(
        "Intervals are over seeds, on these items. A ladder's intervals, and those that name items, are also over items"
        " of this kind. Another task may give another answer."
    )
    return Section("limits", "What can't be concluded, and what it would take", points=tuple(points))
