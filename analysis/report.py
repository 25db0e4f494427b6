"""A study's report, from its records: the answer in words with its confidence, and everything that supports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from qlora_exp.analysis import sections
from qlora_exp.analysis.answer_samples import Answers, Losses, changes_section, samples_section
from qlora_exp.analysis.answers_section import answers_section, by_validation
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
from qlora_exp.analysis.configurations import (
    Configuration,
    Measure,
    configurations,
    measure_of,
    mode_of,
    targets_of,
    variant_of,
)
from qlora_exp.analysis.confirmation import Confirmation, confirm_finalists, margin_unit_of, planned_runs
from qlora_exp.analysis.confirmation_words import (
    ConfirmedSearch,
    confirmation_card,
    confirmation_lines,
    confirmation_section,
    unanswered_sentence,
)
from qlora_exp.analysis.contrasts import ItemScores
from qlora_exp.analysis.distilled import Distilled, compare_students, students_section
from qlora_exp.analysis.goals import GoalAnswer, goal_answer, goal_recommendation
from qlora_exp.analysis.instruct_base import InstructBase, compare_variants
from qlora_exp.analysis.instruct_base_words import instruct_section, variant_recommendation
from qlora_exp.analysis.ladder_sections import ladder_sections
from qlora_exp.analysis.ladder_views import LadderView, ladder_rank_of, ladder_views
from qlora_exp.analysis.learning_curves import Curves, curves_section
from qlora_exp.analysis.margin import Margin, parse_margin
from qlora_exp.analysis.post_training import QuantizationFiles, post_training_section
from qlora_exp.analysis.quantization import LevelComparison, compare_quantizations, compare_targets
from qlora_exp.analysis.quantization_words import quantization_recommendation, targets_recommendation
from qlora_exp.analysis.recommendation import study_margin
from qlora_exp.analysis.report_cards import answer_card, baseline_card, not_asked_card, rank_card, screening_card
from qlora_exp.analysis.report_choice import (
    ChosenConfiguration,
    TaskMetric,
    choose,
    hedged_sentence,
    is_search_on_validation,
    ladder_picks,
    task_metric_of,
    use_sentence,
)
from qlora_exp.analysis.report_content import AnswerCard, CardStatus, ReportContent, Section, StudyInfo
from qlora_exp.analysis.routes import RouteComparison, compare_routes, routes_section
from qlora_exp.analysis.searches import search_recommendation
from qlora_exp.analysis.tuning_methods import MethodComparison, compare_methods, methods_section
from qlora_exp.errors import AnalysisError, nearest
from qlora_exp.records.types import RunRecord, Status

MAX_GROUPS = 3
"""Groups of comparable runs that the report shows; it only counts further ones."""
MIN_SEEDS_SHOWN = 2
ONLY_OF_SOME = {
    "rank": "it needs runs with at least two ranks that were scored on the same items",
    "ladder": "it needs a study of sweeps=rank_doubling",
    "instruct-base": "it needs runs of both variants that were scored on the same items",
    "importance": "it needs a study that searched with Optuna",
    "confirmation": "it needs a study that qlora-exp confirm started",
    "methods": "it needs runs of at least two tuning methods",
    "routes": "it needs runs that ship a smaller model (sweeps=routes)",
    "post-training": "it needs runs that qlora-exp quantize rounded",
    "students": "it needs runs with distillation.teacher (sweeps=distill)",
}
"""Sections that not every report has, and what they need."""
CONFIRM_SETTLES = "The best ones with new seeds, scored on test, would tell more."


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
    choice: ChosenConfiguration | None
    """The configuration to use; ``None`` without a score."""
    metric: TaskMetric | None
    quantizations: LevelComparison | None
    targets: LevelComparison | None
    goal: GoalAnswer | None
    methods: MethodComparison | None
    routes: RouteComparison | None
    students: Distilled | None


def build(
    records: Sequence[RunRecord],
    studies: Sequence[StudyInfo],
    items: ItemScores | None = None,
    margin: Margin | None = None,
    unreadable: int = 0,
    curves: Curves | None = None,
    command_of: Callable[[RunRecord], str | None] | None = None,
    answers: Answers | None = None,
    quantized: QuantizationFiles | None = None,
    losses: Losses | None = None,
) -> ReportContent:
    """Return the report of these runs.

    Args:
        records: all runs of the studies, including failed ones.
        studies: one entry per study.
        items: per-item values for the intervals of comparisons; without them, those intervals are over seeds alone.
        margin: within which two sides count as equivalent; ``None``: that of the studies' ladder, else 0.25 % of the
            loss. A number without a unit is in bits per byte.
        unreadable: number of records that could not be read.
        curves: training curves of runs; without them there are no learning curves.
        command_of: run → command that runs its configuration; ``None`` if none is known.
        answers: run → its items with their answers; without them, the report doesn't show what a model says.
        losses: run → the losses of its items; without them, the report doesn't show what tuning changed most.
        quantized: run → what ``qlora-exp quantize`` wrote for it; without them, the report has no section on it.

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
    margin, views = margin or study_margin(studies), ladder_views(studies, records)
    confirmed = _confirmed(records, studies, items)
    searched_before = any(study.confirmation is not None for study in studies)
    shown = []
    for group in groups[:MAX_GROUPS]:
        measure = measure_of(group.records)
        candidates = configurations(group.records, measure or Measure("loss_per_item", False))
        of_first = budgeted if group is groups[0] else ()
        comparison = compare_variants(candidates, items, margin, runs.pilots, of_first, ladder_rank_of(views))
        choice = quantizations = targets = goal = methods = routes = students = None
        if measure is not None:
            confirmed_choice = _of_confirmation(confirmed, candidates)
            choice = confirmed_choice or choose(candidates, views, measure)
            quantizations = compare_quantizations(candidates, measure, items, margin)
            targets = compare_targets(candidates, measure, items, margin)
            methods = compare_methods(candidates, measure, items, searched_before)
            routes = compare_routes(candidates, measure, items)
            students = compare_students(candidates, measure, items)
            decided = choice is not None and (choice.ladder is not None or choice is confirmed_choice)
            goal = goal_answer(candidates, choice.configuration if choice is not None and decided else None, items)
        metric = task_metric_of(candidates)
        answered = (comparison, choice, metric, quantizations, targets, goal, methods, routes, students)
        shown.append(_Compared(group, measure, candidates, *answered))
    first = shown[0]
    headline, why_none = [], None
    if confirmed is not None:
        headline = list(confirmation_lines(*confirmed))
    elif len(studies) == 1 and (content := studies[0].confirmation) is not None:
        headline = [unanswered_sentence(records, len(content["trials"]), ConfirmedSearch.of(content))]
    elif first.choice is None:
        whose = "finished run has a score" if first.measure is None else "configuration has a finite score"
        why_none = f"No answer: no {whose}."
    else:
        assert first.measure is not None
        line, why = use_sentence(first.choice, first.candidates, first.measure), _why(first, views)
        if is_search_on_validation(first.choice, first.candidates, groups[0].protocol.split):
            line, why = hedged_sentence(line, first.candidates, _confirm_command(studies)), []
        headline = [line, *why, *_cautions(groups, studies)]
    headline = [*(section.paragraphs[0] for section in _asked_sections(first)), *headline]
    completed = [record for record in records if record.status is Status.COMPLETED]
    chosen = first.choice.configuration if first.choice is not None else None
    chosen = confirmed[0].use if confirmed is not None else chosen
    command = command_of(chosen.first) if chosen is not None and command_of is not None else None
    parts = [
        confirmation_section(*confirmed) if confirmed is not None else None,
        *(replace(section, folded=False) for section in _asked_sections(first)),
        *_first_sections(first, runs, views, curves, command),
        *_answers_sections(first, answers, losses),
        post_training_section(first.candidates, quantized) if quantized is not None else None,
        *ladder_sections(views),
        *(section for compared in shown for section in _group_sections(compared, groups)),
        sections.importance_section(studies, completed),
        sections.failure_section(records),
        sections.feasibility_section(studies),
        sections.method_section(groups, records, first.measure, views),
        _limits_section(runs, first),
    ]
    return ReportContent(
        title=", ".join(study.name for study in studies),
        question=next((study.question for study in studies if study.question), None),
        headline=tuple(headline),
        why_none=why_none,
        sections=tuple(part for part in parts if part is not None),
        runs=sections.table_of_runs(records),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {len(records)} runs",
        cards=_with_confirmation(_cards(first, views, studies, margin), confirmed),
        command=command,
    )


def _confirmed(
    records: Sequence[RunRecord], studies: Sequence[StudyInfo], items: ItemScores | None
) -> tuple[Confirmation, ConfirmedSearch] | None:
    """Return the answer of the study that confirms another one's finalists, if these are its runs alone."""
    if len(studies) != 1 or studies[0].confirmation is None:
        return None
    content = studies[0].confirmation
    measure = Measure(str(content["score"]), str(content["objective"]).startswith("maximize"))
    margin = parse_margin(content["margin"], margin_unit_of(measure))
    found = confirm_finalists(records, measure, items, margin, planned_runs(content))
    return None if found is None else (found, ConfirmedSearch.of(content))


def _with_confirmation(
    cards: Sequence[AnswerCard], confirmed: tuple[Confirmation, ConfirmedSearch] | None
) -> tuple[AnswerCard, ...]:
    """Return the cards with the confirmation's first. It replaces those that a search on validation has."""
    if confirmed is None:
        return tuple(cards)
    kept = [card for card in cards if card.name in ("goal", "baseline")]
    return confirmation_card(*confirmed), *kept


def _of_confirmation(
    confirmed: tuple[Confirmation, ConfirmedSearch] | None, candidates: Sequence[Configuration]
) -> ChosenConfiguration | None:
    """Return the candidate that the confirmation says to use; ``None`` if it is none of them."""
    if confirmed is None:
        return None
    run = confirmed[0].use.first.run_id
    found = next((c for c in candidates if any(own.run_id == run for own in c.runs)), None)
    return None if found is None else ChosenConfiguration(found, None)


def _confirm_command(studies: Sequence[StudyInfo]) -> str | None:
    return next((study.confirm_command for study in studies if study.confirm_command is not None), None)


def _first_sections(
    first: _Compared, runs: _Runs, views: Sequence[LadderView], curves: Curves | None, command: str | None
) -> list[Section | None]:
    """Return the sections that are open on the page: quality by rank, learning curves, the configurations."""
    if first.measure is None:
        return []
    drawn = [pick.configuration for pick in ladder_picks(first.candidates, views, first.measure)]
    if first.choice is not None:
        drawn = [first.choice.configuration, *(c for c in drawn if c is not first.choice.configuration)]
    chosen = first.choice.configuration if first.choice is not None else None
    return [
        sections.rank_section(first.candidates, first.measure, views, first.metric),
        curves_section(first.candidates, runs.records, first.measure, drawn, curves),
        sections.configurations_section(first.candidates, first.measure, first.metric, chosen, command),
    ]


def _asked_sections(compared: _Compared) -> list[Section]:
    """Return the sections on methods, on ways to a small model, and on students: what the study is about if it has
    such runs. The first paragraph of each is its answer."""
    return [
        *([methods_section(compared.methods)] if compared.methods is not None else []),
        *([routes_section(compared.routes)] if compared.routes is not None else []),
        *([students_section(compared.students)] if compared.students is not None else []),
    ]


def _answers_sections(first: _Compared, answers: Answers | None, losses: Losses | None) -> list[Section | None]:
    """Return the sections that show items and answers."""
    if answers is None or first.choice is None or first.measure is None:
        return []
    chosen = first.choice.configuration
    ordered = [chosen, *by_validation([c for c in first.candidates if c is not chosen], first.measure)]
    return [
        answers_section(ordered, answers),
        samples_section(ordered, answers),
        changes_section(ordered, answers, losses) if losses is not None else None,
    ]


def _why(first: _Compared, views: Sequence[LadderView]) -> list[str]:
    """Return how the first line's configuration was chosen."""
    assert first.choice is not None
    if len(first.candidates) < 2:
        return ["It is the only configuration that was scored."]
    if first.choice.ladder is None:
        return [f"Of {len(first.candidates)} configurations it is the best on validation."]
    ladders = sum(view.use_rank is not None for view in views)
    by = "A ladder chose the rank"
    if ladders > 1:
        by = f"{ladders} ladders chose the ranks, and the validation score chose among these"
    return [f"{by}; the scores are of {_split_words(first.group)}."]


def _split_words(group: Group) -> str:
    return f"{group.protocol.scored_items:,} {group.protocol.split} items"


def _cards(
    first: _Compared, views: Sequence[LadderView], studies: Sequence[StudyInfo], margin: Margin
) -> list[AnswerCard]:
    """Return a card for each question: those that were asked first."""
    measure, candidates, choice = first.measure, first.candidates, first.choice
    if measure is None:
        return []
    variants = list(dict.fromkeys(variant_of(c) for c in candidates))
    modes = list(dict.fromkeys(mode_of(c.first) for c in candidates))
    targets = list(dict.fromkeys(targets_of(c.first) for c in candidates if c.rank))
    cards = [rank_card(views, choice, sorted({c.rank for c in candidates if c.rank}))]
    if first.comparison is not None:
        cards.append(answer_card("variant", variant_recommendation(first.comparison, studies), "instruct-base"))
    else:
        cards.append(not_asked_card("variant", "Instruct or base?", variants, "qlora-exp sweep instruct_or_base"))
    if first.quantizations is not None:
        answer = quantization_recommendation(first.quantizations, studies)
        cards.append(answer_card("quantization", answer, "equal"))
    else:
        cards.append(not_asked_card("quantization", "Which quantization?", modes, "qlora-exp sweep pareto"))
    if first.targets is not None:
        cards.append(answer_card("targets", targets_recommendation(first.targets, studies), "equal"))
    else:
        sweep = "qlora-exp sweep rank_doubling targets=all_linear,attention"
        cards.append(not_asked_card("targets", "Which target modules?", targets, sweep))
    search = search_recommendation(candidates, measure, margin, studies) if not views else None
    if search is not None:
        card, confirm = answer_card("configuration", search, "configurations"), _confirm_command(studies)
        if card.status is CardStatus.OPEN and confirm is not None and first.group.protocol.split != "test":
            card = replace(card, settle=CONFIRM_SETTLES, command=confirm)
        cards.append(card)
    if first.goal is not None and first.goal.split == first.group.protocol.split:
        cards.append(answer_card("goal", goal_recommendation(first.goal, studies), None))
    screenings = [(study.screening, study.name) for study in studies if study.screening is not None]
    if any(not screening.get("chosen") for screening, _ in screenings):
        # These questions are what the study is about: it just hasn't compared anything yet.
        cards = [card for card in cards if card.status is not CardStatus.NOT_ASKED or card.name == "targets"]
    cards = [*(screening_card(screening, name) for screening, name in screenings), *cards]
    baseline = baseline_card(choice, first.metric) if choice is not None else None
    cards += [baseline] if baseline is not None else []
    return sorted(cards, key=lambda card: card.status is CardStatus.NOT_ASKED)


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
        hint = nearest(name, names)
        if name in ONLY_OF_SOME:
            hint = f"{ONLY_OF_SOME[name]}; this report has: {', '.join(names)}"
        raise AnalysisError(f"the report of these runs has no section {name!r}", f"--only {name}", hint)
    shown = {section.name for section in chosen} | ({"ladder-1"} if name == "rank" else set())
    cards = tuple(card for card in report.cards if card.section in shown)
    return replace(report, question=None, headline=(), cards=cards, command=None, sections=tuple(chosen))


def _group_sections(compared: _Compared, groups: Sequence[Group]) -> list[Section]:
    """Return the sections that compare within one group; if there are several groups, each title names the group."""
    group, measure, candidates = compared.group, compared.measure, compared.candidates
    parts: list[Section | None] = []
    if measure is not None:
        levels = (compared.quantizations, compared.targets)
        # The cards have the first group's answers.
        answers = () if group is groups[0] else _answers(compared)
        parts = [
            None if group is groups[0] else sections.rank_section(candidates, measure, (), compared.metric),
            Section("answers", "Answers", answers) if answers else None,
            instruct_section(compared.comparison) if compared.comparison else None,
            sections.equal_everything_section(candidates, measure, *levels),
            sections.tradeoff_section(candidates, measure),
            *(() if group is groups[0] else _asked_sections(compared)),
        ]
    parts += [sections.memory_section(candidates, group.records), sections.speed_section(group.records)]
    known = [replace(part, folded=True) for part in parts if part is not None]
    if len(groups) == 1:
        return known
    p = group.protocol
    subtitle = f"{len(group.records)} runs, {p.max_steps} steps, {p.scored_items} {p.split} items"
    anchor = f"-{p.max_steps}-{p.scored_items}-{p.split}-{p.batch_size}-{p.adapter_dtype}-{p.data_version}"
    if group is groups[0]:
        anchor = ""
    return [replace(part, name=part.name + anchor, title=f"{part.title} ({subtitle})") for part in known]


def _answers(compared: _Compared) -> tuple[str, ...]:
    """Return what a group without cards answers, in one sentence a question."""
    answers = []
    if compared.comparison is not None:
        answers.append(variant_recommendation(compared.comparison))
    if compared.quantizations is not None:
        answers.append(quantization_recommendation(compared.quantizations))
    if compared.targets is not None:
        answers.append(targets_recommendation(compared.targets))
    return tuple(answer.sentence for answer in answers)


def _cautions(groups: Sequence[Group], studies: Sequence[StudyInfo]) -> list[str]:
    """Return what weakens the first line: runs that aren't comparable, and splits on which something was chosen."""
    cautions = []
    if len(groups) > 1:
        differences = "; ".join(setting_differences(groups))
        cautions.append(
            f"The runs aren't all comparable ({differences}): this is of the {len(groups[0].records)} runs of the first"
            " kind, and the others are shown separately."
        )
    searched = [text for study in studies for text in study.objectives if "scores.test" in text]
    split = groups[0].protocol.split
    if searched:
        cautions.append(
            f"The test split was searched ({searched[0]}), so this score flatters the configuration: score it on data"
            " that the search didn't use."
        )
    elif split != "test" and _confirm_command(studies) is None:
        cautions.append(
            f"These are scores of the {split} split, which the search itself used: they flatter the best. Score this"
            " configuration on the test split: evaluation.split=test, with other seeds."
        )
    return cautions


def _limits_section(runs: _Runs, first: _Compared) -> Section:
    """Return the section on what can't be concluded besides the cards' questions, and what would settle it."""
    groups, measure, candidates = runs.groups, first.measure, first.candidates
    points: list[str] = []
    if len(groups) > MAX_GROUPS:
        points.append(f"{len(groups) - MAX_GROUPS} smaller groups of runs are only in the table of runs.")
    if all(len(c.runs) < MIN_SEEDS_SHOWN for c in candidates):
        points.append("One seed per configuration: no difference can be distinguished from chance. Run seed=1,2,3.")
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
        "Every interval is a 95 % interval over seeds, on these items. A ladder's intervals, and those that name items,"
        " are also over items of this kind. Another task may give another answer."
    )
    return Section("limits", "What can't be concluded, and what it would take", points=tuple(points))
