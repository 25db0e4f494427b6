"""How much of the teacher fits into the student? Students with and without the teacher, and the teacher itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from qlora_exp.analysis.comparable import answering_scores, base_model_scores
from qlora_exp.analysis.configurations import INTERVAL_CONFIDENCE, Configuration, Measure, known_mean, mean
from qlora_exp.analysis.contrasts import Difference, ItemScores, stratified_difference
from qlora_exp.analysis.report_content import Section, value_table
from qlora_exp.records.teacher_run import TeacherRun
from qlora_exp.records.types import RunRecord

ROWS_ALONE = "the rows' answers alone"
"""What the student learns that the others are compared with."""


NOT_OF_THE_STUDENT = ("distillation", "seed", "name", "output_root", "tracking", "budget", "notify", "sweep", "workers")
"""Sections and keys of a configuration in which compared students may differ."""


@dataclass(frozen=True)
class StudentResult:
    """A student, and what it learns, in words. ``gain``: against the student that learned the rows' answers alone.

    ``share``: of the gap between that student and the teacher, how much is closed, with its interval over seeds.
    """

    learns: str
    configuration: Configuration
    gain: Difference | None
    share: tuple[float, float | None, float | None] | None


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
    students: dict[str, Configuration] = {}
    settings = None
    for c in configurations:
        if c.first.teacher is None or c.quality is None:
            continue
        own = {key: value for key, value in c.first.config.items() if key not in NOT_OF_THE_STUDENT}
        settings = settings if settings is not None else own
        if own == settings:
            students.setdefault(what_is_learned(c.first.config), c)
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
        results.append(StudentResult(learns, student, gain, _share(student.runs, alone.runs, teacher, measure)))
    return Distilled(tuple(results), teacher, measure)


def what_is_learned(config: Mapping[str, Any]) -> str:
    """Return what the student of a configuration learns, e.g. ``the teacher's probabilities``."""
    settings = config.get("distillation") or {}
    gold = float(settings.get("gold_weight", 1.0))
    if settings.get("mode") == "answers":
        return "the answers that the teacher writes"
    if gold == 1.0:
        return ROWS_ALONE
    kind = "" if settings.get("divergence") == "forward" else f", {settings.get('divergence')}"
    soft = "" if settings.get("temperature") == 1.0 else f", temperature {settings.get('temperature'):g}"
    return f"the teacher's probabilities{f' and the rows, gold weight {gold:g}' if gold else ''}{kind}{soft}"


def fieller(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return mean(numerators) / mean(denominators) with its 95 % interval over pairs (Fieller 1954).

    No interval with fewer than two pairs, or if the denominator isn't shown to differ from 0.
    """
    a, b = np.asarray(numerators, float), np.asarray(denominators, float)
    ratio = float(a.mean() / b.mean()) if b.mean() else math.nan
    if len(a) < 2:
        return ratio, None, None
    n, t2 = len(a), float(stats.t.ppf((1 + INTERVAL_CONFIDENCE) / 2, len(a) - 1)) ** 2
    aa, bb, ab = float(a.var(ddof=1)) / n, float(b.var(ddof=1)) / n, float(np.cov(a, b, ddof=1)[0, 1]) / n
    g = t2 * bb / float(b.mean()) ** 2 if b.mean() else math.inf
    if g >= 1:
        return ratio, None, None
    middle = (a.mean() * b.mean() - t2 * ab) / (b.mean() ** 2 - t2 * bb)
    inside = (a.mean() * b.mean() - t2 * ab) ** 2 - (a.mean() ** 2 - t2 * aa) * (b.mean() ** 2 - t2 * bb)
    half = math.sqrt(max(float(inside), 0.0)) / float(b.mean() ** 2 - t2 * bb)
    return ratio, float(middle) - half, float(middle) + half


def student_sentence(found: Distilled) -> str:
    """Return how much of the gap to the teacher the best student closes, in one sentence."""
    others = [r for r in found.results[1:] if r.gain is not None]
    if not others:
        return "No student of the teacher was scored."
    best = max(others, key=lambda result: result.gain.value if result.gain is not None else 0.0)
    assert best.gain is not None
    name = f"The student that learns {best.learns}"
    shown = best.gain.low is not None and best.gain.low > 0
    if not shown:
        return f"{name} isn't shown to be better than one that learns {ROWS_ALONE}: {best.gain}."
    closed = ""
    if best.share is not None and best.share[1] is not None and best.share[2] is not None:
        share, low, high = (100 * value for value in best.share if value is not None)
        closed = f", which closes {share:.0f} % of the gap to the teacher (95 % CI {low:.0f} to {high:.0f} %)"
    better = f"is better than one that learns {ROWS_ALONE} by {best.gain} in {found.measure.label}"
    chosen = f" It is the best of {len(others)}, which flatters it." if len(others) > 1 else ""
    return f"{name} {better}{closed}.{chosen}"


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
        rows.append(("student before training", len(first), parameters, *cells))
    for result in found.results:
        runs, gain, share = result.configuration.runs, result.gain, result.share or (None, None, None)
        close = [run.agreement for run in runs if run.agreement is not None]
        rows.append(
            (
                *(f"student: {result.learns}", len(runs), runs[0].plan.total_parameters if runs[0].plan else None),
                mean(measure.of(answering_scores(run)) for run in runs),
                *((gain.value, gain.low, gain.high) if gain else (None, None, None)),
                *share,
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
            "The teacher is one run: the interval of the share is over the students' seeds alone (Fieller's), and"
            " another teacher may teach more or less.",
            "KL is that of the student from the teacher on the validation items' answers; answers are compared on the"
            " scored items.",
        ),
    )


def _share(
    students: Sequence[RunRecord], alone: Sequence[RunRecord], teacher: TeacherRun, measure: Measure
) -> tuple[float, float | None, float | None] | None:
    target = teacher.score(measure.name)
    by_seed = {run.seed: measure.of(answering_scores(run)) for run in alone}
    pairs = [(measure.of(answering_scores(run)), by_seed.get(run.seed)) for run in students]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if target is None or not known:
        return None
    return fieller([a - b for a, b in known], [target - b for _, b in known])
