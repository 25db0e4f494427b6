"""How much of the teacher fits into the student? Students with and without the teacher, and the teacher itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize

from qlora_exp.analysis.comparable import answering_scores, base_model_scores
from qlora_exp.analysis.configurations import Configuration, Measure, known_mean, mean
from qlora_exp.analysis.contrasts import (
    MIN_SEEDS,
    Difference,
    GroupScores,
    ItemScores,
    interval,
    stratified_difference,
)
from qlora_exp.analysis.recommendation import joint_alpha
from qlora_exp.analysis.report_content import Section, value_table
from qlora_exp.analysis.variance import Array
from qlora_exp.records.teacher_run import TeacherRun
from qlora_exp.records.types import RunRecord

ROWS_ALONE = "the rows' answers alone"
"""What the student learns that the others are compared with."""
MAX_DOUBLINGS = 40
"""Of the distance from a ratio, when the end of its interval is looked for."""
NOT_OF_THE_STUDENT = ("distillation", "seed", "name", "output_root", "tracking", "budget", "notify", "sweep", "workers")
"""Sections and keys of a configuration in which compared students may differ."""


@dataclass(frozen=True)
class GapShare:
    """How much of the gap to the teacher a student closes; ``low`` and ``high``: its 95 % interval, ``None`` if there
    is none. ``over``: what the interval is over, e.g. ``3 seeds and 300 items``."""

    value: float
    low: float | None
    high: float | None
    over: str


@dataclass(frozen=True)
class StudentResult:
    """A student, and what it learns, in words. ``gain``: against the student that learned the rows' answers alone.

    ``share``: of the gap between that student and the teacher; ``None`` if the teacher isn't better than that student,
    or has no score of this kind.
    """

    learns: str
    configuration: Configuration
    gain: Difference | None
    share: GapShare | None


@dataclass(frozen=True)
class Distilled:
    """All students, the one that learned the rows' answers alone first, and their teacher."""

    results: tuple[StudentResult, ...]
    teacher: TeacherRun
    measure: Measure


def compare_students(
    configurations: Sequence[Configuration], measure: Measure, items: ItemScores | None = None
) -> Distilled | None:
    """Compare students of one teacher.

    ``None`` unless one of them learned the rows' answers alone (``distillation.gold_weight=1``), another one from the
    teacher, and the teacher was scored on the same split. Students that differ in anything but what they learn are left
    to the report's other sections: only those with the settings of the first one are compared.
    """
    candidates: list[Configuration] = []
    settings = None
    for c in configurations:
        if c.first.teacher is None or c.quality is None:
            continue
        own = {key: value for key, value in c.first.config.items() if key not in NOT_OF_THE_STUDENT}
        settings = settings if settings is not None else own
        if own == settings:
            candidates.append(c)
    several = len({(c.first.config.get("distillation") or {}).get("top_k") for c in candidates}) > 1
    students: dict[str, Configuration] = {}
    for c in candidates:
        students.setdefault(what_is_learned(c.first.config, name_top_k=several), c)
    teachers = {c.first.teacher for c in students.values()}
    if ROWS_ALONE not in students or len(students) < 2 or len(teachers) != 1:
        return None
    (teacher,) = teachers
    alone = students.pop(ROWS_ALONE)
    scored = answering_scores(alone.first)
    assert teacher is not None
    if scored is None or (teacher.split, teacher.items) != (scored.split, scored.items):
        return None
    results = [StudentResult(ROWS_ALONE, alone, None, None)]
    for learns, student in students.items():
        gain = stratified_difference([(student.runs, alone.runs)], measure.name, items)
        share = _share(student.runs, alone.runs, teacher, measure, items)
        results.append(StudentResult(learns, student, gain, share))
    return Distilled(tuple(results), teacher, measure)


def what_is_learned(config: Mapping[str, Any], name_top_k: bool = False) -> str:
    """Return what the student of a configuration learns, e.g. ``the teacher's probabilities``."""
    settings = config.get("distillation") or {}
    gold = float(settings.get("gold_weight", 1.0))
    if settings.get("mode") == "answers":
        return "the answers that the teacher writes"
    if gold == 1.0:
        return ROWS_ALONE
    kind = "" if settings.get("divergence") == "forward" else f", {settings.get('divergence')}"
    soft = "" if settings.get("temperature") == 1.0 else f", temperature {settings.get('temperature'):g}"
    top = f", top {settings.get('top_k')}" if name_top_k else ""
    return f"the teacher's probabilities{f' and the rows, gold weight {gold:g}' if gold else ''}{kind}{soft}{top}"


def ratio_of_means(numerators: Array, denominators: Array) -> tuple[float, float | None, float | None]:
    """Return mean(numerators) / mean(denominators) with its 95 % interval; both are (seeds, items) or (seeds, 1).

    The interval holds each ratio r for which the mean of numerators − r × denominators isn't shown to differ from 0
    (Fieller 1954), with the variance of seeds and items as in all paired differences. No interval with fewer than two
    seeds, or if the mean of the denominators isn't shown to differ from 0: the ratio could then be anything.
    """

    def excess(r: float) -> float:
        found = interval(numerators - r * denominators, "", trained=True)
        assert found.low is not None
        return abs(found.value) - (found.value - found.low)

    below = float(denominators.mean())
    ratio = float(numerators.mean()) / below if below else math.nan
    if len(denominators) < MIN_SEEDS:
        return ratio, None, None
    gap = interval(denominators, "", trained=True)
    assert gap.low is not None
    assert gap.high is not None
    if gap.low <= 0 <= gap.high:
        return ratio, None, None
    return ratio, _end(excess, ratio, -1.0), _end(excess, ratio, 1.0)


def _end(excess: Callable[[float], float], ratio: float, direction: float) -> float | None:
    """Return the end of the interval in this direction: where ``excess``, which isn't positive at ``ratio``, is 0."""
    if excess(ratio) >= 0:  # no variation at all
        return ratio
    step = direction * 1e-3
    for _ in range(MAX_DOUBLINGS):
        if excess(ratio + step) > 0:
            return float(optimize.brentq(excess, ratio, ratio + step, xtol=1e-9))
        step *= 2
    return None


def student_sentence(found: Distilled) -> str:
    """Return how much of the gap to the teacher the best student closes, in one sentence.

    A student is called better only if the bounds of all students hold together with 95 %.
    """
    others = [(r, r.gain) for r in found.results[1:] if r.gain is not None]
    if not others:
        return "No student of the teacher was scored."
    alpha = joint_alpha(len(others))
    clear = [(r, gain) for r, gain in others if (lower := gain.lower(alpha)) is not None and lower > 0]
    result, gain = max(clear or others, key=lambda pair: pair[1].value)
    if not clear:
        best = f"the best one learns {result.learns}: {gain}"
        return f"No student is shown to be better than one that learns {ROWS_ALONE}; {best}."
    closed, share = "", result.share
    if share is not None and share.low is not None and share.high is not None:
        bounds = f"95 % CI {100 * share.low:.0f} to {100 * share.high:.0f} %, {share.over}"
        closed = f", which closes {100 * share.value:.0f} % of the gap to the teacher ({bounds})"
    better = f"is better than one that learns {ROWS_ALONE} by {gain} in {found.measure.label}"
    chosen = f" It is the best of {len(others)}, which flatters it." if len(others) > 1 else ""
    return f"The student that learns {result.learns} {better}{closed}.{chosen}"


def students_section(found: Distilled) -> Section:
    """Return the section: the sentence, one table, and what it can't say."""
    measure, teacher = found.measure, found.teacher
    columns = (
        *("model", ("seeds", "integer"), ("parameters", "integer"), (measure.words, "figure")),
        *(("better by", "figure"), ("low", "figure"), ("high", "figure")),
        *(("of the gap", "percent"), ("from", "percent"), ("to", "percent"), ("accuracy", "figure")),
        *(("answers as the teacher", "percent"), ("KL per token, nats", "figure"), ("tokens/s", "figure")),
    )
    unknown: list[None] = [None] * 6
    score = teacher.score(measure.name)
    rows: list[tuple[str | float | None, ...]] = [
        (f"teacher {teacher.name}", 1, teacher.parameters, score, *unknown, teacher.accuracy, None, None, None)
    ]
    first = found.results[0].configuration.runs
    untuned = [measure.of(scores) if (scores := base_model_scores(run)) else None for run in first]
    if any(value is not None for value in untuned):
        parameters = first[0].plan.total_parameters if first[0].plan else None
        accuracies = [scores.accuracy if (scores := base_model_scores(run)) else None for run in first]
        cells = (mean(untuned), *unknown, mean(accuracies), None, None, None)
        rows.append(("student before training", None, parameters, *cells))
    for result in found.results:
        runs, gain, share = result.configuration.runs, result.gain, result.share
        close = [run.agreement for run in runs if run.agreement is not None]
        rows.append(
            (
                *(f"student: {result.learns}", len(runs), runs[0].plan.total_parameters if runs[0].plan else None),
                mean(measure.of(answering_scores(run)) for run in runs),
                *((gain.value, gain.low, gain.high) if gain else (None, None, None)),
                *((share.value, share.low, share.high) if share else (None, None, None)),
                mean(scores.accuracy if (scores := answering_scores(run)) else None for run in runs),
                known_mean(one.equal_answers for one in close),
                known_mean(one.kl_nats_per_token for one in close),
                known_mean(run.speed.train_tokens_per_second for run in runs),
            )
        )
    over = next((r.gain.over for r in found.results if r.gain is not None), "")
    caption = f"Differences are paired with the student that learns {ROWS_ALONE}; 95 % intervals over {over}"
    return Section(
        "students",
        "How much of the teacher fits into the student?",
        (student_sentence(found),),
        (value_table(columns, rows, caption),),
        points=(
            _of_the_share(found),
            f"The difference and the share of the best of {len(found.results) - 1} students are chosen, and so likely"
            " too high; each interval holds for its own student.",
            "KL is that of the student from the teacher on the validation items' answers, a lower bound over the tokens"
            " that are kept; answers are compared on the scored items.",
        ),
    )


def _of_the_share(found: Distilled) -> str:
    """Return what the interval of the share is over, or why there is no share."""
    fixed = "The teacher is one run and counts as given: another one may teach more or less."
    shares = [r.share for r in found.results if r.share is not None]
    if found.teacher.score(found.measure.name) is None:
        return f"The teacher has no score in {found.measure.label}: no share of a gap. {fixed}"
    if not shares:
        return f"The teacher isn't better than the student that learns {ROWS_ALONE}: there is no gap to close. {fixed}"
    if all(share.low is None for share in shares):
        return f"The share has no interval: the gap to the teacher isn't shown to differ from 0. {fixed}"
    where = "" if "items" in shares[0].over else "; the teacher's scores of single items aren't kept"
    return f"The interval of the share (Fieller's) is over {shares[0].over}{where}. {fixed}"


def _share(
    students: Sequence[RunRecord],
    alone: Sequence[RunRecord],
    teacher: TeacherRun,
    measure: Measure,
    items: ItemScores | None,
) -> GapShare | None:
    """Return the share with an interval over seeds and items; over seeds alone if the teacher's items are unknown."""
    target = teacher.score(measure.name)
    by_seed = {run.seed: run for run in alone}
    pairs = [(run, by_seed[run.seed]) for run in students if run.seed in by_seed]
    scores = [(measure.of(answering_scores(a)), measure.of(answering_scores(b))) for a, b in pairs]
    known = [(a, b, pair) for (a, b), pair in zip(scores, pairs, strict=True) if a is not None and b is not None]
    if target is None or not known:
        return None
    seeds = f"{len(known)} seed{'s' * (len(known) > 1)}"
    by_item = _by_item([pair for *_, pair in known], teacher, measure, items)
    if by_item is not None:
        a, b, taught, unit = by_item
        over = f"{seeds} and {len(taught)} {unit}"
    else:
        a, b = (np.array([[row[side]] for row in known], dtype=float) for side in (0, 1))
        taught, over = np.array(target), seeds
    sign = 1.0 if measure.higher_is_better else -1.0
    gained, gap = sign * (a - b), sign * (taught - b)
    return GapShare(*ratio_of_means(gained, gap), over) if gap.mean() > 0 else None


def _by_item(
    pairs: Sequence[tuple[RunRecord, RunRecord]], teacher: TeacherRun, measure: Measure, items: ItemScores | None
) -> tuple[Array, Array, Array, str] | None:
    """Return the scores of single items, (seeds, items) of both students and (items) of the teacher, and what an item
    is called; ``None`` if they aren't those of the same items, or the teacher isn't a run as it was trained."""
    if items is None or teacher.run_id is None or teacher.quantization is not None:
        return None
    taught = items(pairs[0][1].replace(run_id=teacher.run_id), "after", measure.name)
    sides = [[items(run, "after", measure.name) for run in pair] for pair in pairs]
    names = list(taught or ())
    if not taught or any(side is None or side.keys() != taught.keys() for pair in sides for side in pair):
        return None
    a, b = (np.array([[(pair[n] or {})[name] for name in names] for pair in sides], dtype=float) for n in (0, 1))
    own = np.array([taught[name] for name in names], dtype=float)
    unit = "groups of items" if isinstance(taught, GroupScores) else "items"
    return (a, b, own, unit) if all(np.isfinite(values).all() for values in (a, b, own)) else None
