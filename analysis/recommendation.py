"""What to use now, what it may cost at most, and what would settle it: the end of every comparison.

The rule is fixed beforehand. Two sides are *equivalent* if the 95 % interval of their difference lies within the
margin: that is two one-sided tests at 2.5 % each (Schuirmann 1987, J. Pharmacokin. Biopharm. 15). The first side is
*better* or *worse* if the interval excludes 0. Else it is *not settled*, as with a single seed.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qlora_exp.analysis.comparable import answering_scores, base_model_scores, finite_score
from qlora_exp.analysis.configurations import Configuration, Measure, known_mean
from qlora_exp.analysis.contrasts import INTERVAL, MIN_SEEDS, Difference
from qlora_exp.analysis.margin import DEFAULT_SHARE, Levels, Margin, MarginUnit, parse_margin
from qlora_exp.analysis.report_content import StudyInfo
from qlora_exp.records.types import RunRecord

LOSS_MEASURES = ("loss_per_item", "loss", "bits_per_byte")
"""Scores of which a relative margin is a share. They are proportional to each other for the same answers."""
SEEDS_ADVISED = 3
"""Seeds to run where there are fewer: with two, an interval is too wide to be of use."""
MAX_SEEDS_ADVISED = 64
TAIL = (1 - INTERVAL) / 2
JOINT_ERROR = 0.05
"""Error rate of a bound on what the choice may cost, against all others together."""


class ComparisonVerdict(StrEnum):
    BETTER = "better"
    WORSE = "worse"
    EQUIVALENT = "equivalent"
    OPEN = "not settled"


@dataclass(frozen=True)
class Recommendation:
    """The answer to one question. ``None`` is unknown."""

    question: str
    use: str | None
    """What to use now, e.g. ``nf4``."""
    verdict: str
    evidence: str
    """One sentence in plain words with its 95 % interval."""
    cost: str
    """One sentence: what ``use`` may cost at most."""
    settle: str | None
    """What would settle the question; ``None`` if it is settled."""
    settle_command: str | None
    """A command that would settle it, ready to run."""
    regret_bound: float | None
    """The most that ``use`` may cost in the score, in ``unit``, at least 0."""
    regret_against: str | None
    """The alternative against which ``regret_bound`` holds."""
    unit: str
    margin: float | None = None
    """In ``unit``."""
    margin_text: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        parts = [f"Use {self.use}: {self.evidence}" if self.use else self.evidence, self.cost, self.settle]
        return " ".join(part for part in parts if part)

    def as_object(self) -> dict[str, Any]:
        """Return the answer in plain JSON types."""
        return {**dataclasses.asdict(self), "notes": list(self.notes), "sentence": self.sentence}


def comparison_verdict(contrast: Difference | None, margin: float | None) -> ComparisonVerdict:
    """Return the verdict on the contrast's first side.

    Args:
        margin: in the contrast's units; ``None``: equivalence is never concluded.
    """
    if contrast is None or contrast.low is None or contrast.high is None or contrast.seeds < MIN_SEEDS:
        return ComparisonVerdict.OPEN
    if margin is not None and -margin < contrast.low and contrast.high < margin:
        return ComparisonVerdict.EQUIVALENT
    if contrast.low > 0:
        return ComparisonVerdict.BETTER
    return ComparisonVerdict.WORSE if contrast.high < 0 else ComparisonVerdict.OPEN


def joint_alpha(others: int) -> float:
    """Return the one-sided error rate of each of ``others`` bounds, so that all hold together with 95 %.

    With one or two others it is that of a 95 % interval's end; with more, 5 % divided by their number (Bonferroni).
    """
    return min(TAIL, JOINT_ERROR / max(others, 1))


def seeds_to_settle(contrast: Difference | None, margin: float | None) -> int | None:
    """Return the fewest seeds in all with which the interval would exclude 0 or lie within the margin, if the
    difference and the noise stay as they are; ``None`` if 64 aren't enough, or the noise is unknown."""
    if contrast is None:
        return None
    size = abs(contrast.value)
    for seeds in range(max(contrast.seeds + 1, MIN_SEEDS + 1), MAX_SEEDS_ADVISED + 1):
        half = contrast.half_width_with(seeds)
        if half is None:
            return None
        if half < size or (margin is not None and half < margin - size):
            return seeds
    return None


# Margins.


def study_margin(studies: Sequence[StudyInfo]) -> Margin:
    """Return the margin that a study's ladder fixed beforehand, else 0.25 % of the loss."""
    for study in studies:
        for answer in study.ladders:
            written = answer.get("margin_text") or answer.get("margin")
            if written is not None:
                return parse_margin(written)
    return Margin(DEFAULT_SHARE, MarginUnit.SHARE_OF_LOSS)


def share_of_loss(margin: Margin, runs: Sequence[RunRecord]) -> float | None:
    """Return the margin as a share of the loss of ``runs``; ``None`` if they have no loss.

    A number without a unit is in bits per byte of the answer.

    Raises:
        AnalysisError: the level that the margin's unit needs is unknown, e.g. there is no score before tuning.
    """
    if margin.unit is MarginUnit.SHARE_OF_LOSS:
        return margin.value
    if margin.unit is MarginUnit.SCORE:
        level = _mean_score(runs, "bits_per_byte")
        return margin.value / level if level else None
    loss = _mean_score(runs, "loss_per_item")
    if not loss:
        return None
    per_token = _mean_score(runs, "loss")
    before = known_mean(finite_score(base_model_scores(run), "loss_per_item") for run in runs)
    levels = Levels(loss, loss / per_token if per_token else None, None if before is None else before - loss)
    return margin.per_item(levels) / loss


def margin_in_score(margin: Margin | None, runs: Sequence[RunRecord], score: str) -> float | None:
    """Return the margin in the units of ``score``, relative to ``runs``; ``None`` if the score isn't a loss."""
    level = _mean_score(runs, score)
    if margin is None or level is None or score not in LOSS_MEASURES:
        return None
    share = share_of_loss(margin, runs)
    return None if share is None else share * level


def _mean_score(runs: Sequence[RunRecord], score: str) -> float | None:
    return known_mean(finite_score(answering_scores(run), score) for run in runs)


# Words.


def size_words(size: float, measure: Measure, level: float | None) -> str:
    """Return e.g. ``0.4 % of the loss``, ``1.2 points of accuracy`` or ``0.1 of rouge l``."""
    if measure.name in LOSS_MEASURES and level:
        return f"{_two_digits(100 * size / level)} % of the loss"
    if measure.name in ("accuracy", "exact_match"):
        return f"{_two_digits(100 * size)} points of {measure.words}"
    return f"{_two_digits(size)} of {measure.words}"


def difference_words(contrast: Difference, measure: Measure, level: float | None) -> str:
    """Return e.g. ``costs 0.4 % of the loss (95 % CI 0.1 to 0.7 %, 3 seeds and 300 items)``."""
    verb, sign = ("gains", 1.0) if contrast.value > 0 else ("costs", -1.0)
    return (
        f"{verb} {size_words(abs(contrast.value), measure, level)} ({interval_words(contrast, measure, level, sign)})"
    )


def interval_words(contrast: Difference, measure: Measure, level: float | None, sign: float = 1.0) -> str:
    """Return e.g. ``95 % CI 0.1 to 0.7 %, 3 seeds and 300 items``, of the difference times ``sign``."""
    if contrast.low is None or contrast.high is None:
        return f"no interval: {contrast.over}"
    low, high = sorted((sign * contrast.low, sign * contrast.high))
    if measure.name in LOSS_MEASURES and level:
        return f"95 % CI {_two_digits(100 * low / level)} to {_two_digits(100 * high / level)} %, {contrast.over}"
    scale = 100.0 if measure.name in ("accuracy", "exact_match") else 1.0
    return f"95 % CI {_two_digits(scale * low)} to {_two_digits(scale * high)}, {contrast.over}"


def cost_words(bound: float | None, against: str | None, size: Callable[[float], str], why_unknown: str) -> str:
    """Return the sentence on the most that the choice may cost."""
    if bound is None:
        return f"What this may cost is unknown: {why_unknown}."
    if bound <= 0:
        return "No alternative is better (95 %)."
    return f"It may cost at most {size(bound)} against {against} (95 %)."


def margin_note(margin: float | None, text: str | None, measure: Measure) -> str | None:
    """Return why equivalence can't be concluded; ``None`` if it can."""
    if margin is not None:
        return None
    return (
        f"The margin {text} can't be converted to {measure.words}: equivalence isn't concluded."
        if text
        else "No margin was given: equivalence isn't concluded."
    )


# Commands.


def seeds_command(
    configurations: Sequence[Configuration], seeds: int | None, studies: Sequence[StudyInfo]
) -> str | None:
    """Return a command that runs the configurations with further seeds, up to ``seeds`` in all.

    ``None`` if the runs' study, or the overrides of its trials, are unknown: of runs that are no trials.
    """
    from qlora_exp.config.overrides import override_key  # Hydra

    points: list[dict[str, Any]] = []
    used: list[int] = []
    for configuration in configurations:
        trial = configuration.first.trial
        if trial is None:
            return None
        point = {key: value for key, value in trial.params.items() if key != "seed"}
        points += [point] if point not in points else []
        used += [run.seed for run in configuration.runs if run.seed is not None]
    study = next((s for s in studies if configurations and s.name == configurations[0].first.trial.study), None)  # type: ignore[union-attr]
    fewest = min((len(configuration.runs) for configuration in configurations), default=0)
    if study is None or study.overrides is None or seeds is None or seeds <= fewest or not used:
        return None
    further = [max(used) + 1 + number for number in range(seeds - fewest)]
    chosen = f"seed={','.join(map(str, further))}"
    commands = []
    for number, swept in enumerate(_grids(points)):
        keys = {text.partition("=")[0] for text in swept} | {"seed"}
        fixed = [text for text in study.overrides if override_key(text) not in keys]
        name = f"{study.name}_seeds_{further[0]}_to_{further[-1]}" + (f"_{number + 1}" if number else "")
        commands.append(shlex.join(["python", "-m", "qlora_exp", "-m", *fixed, *swept, chosen, f"sweep.name={name}"]))
    return " && ".join(commands)


def _grids(points: Sequence[dict[str, Any]]) -> Iterable[list[str]]:
    """Return the overrides of one grid if the points are one, else those of each point."""
    from qlora_exp.config.overrides import hydra_value

    keys = list(dict.fromkeys(key for point in points for key in point))
    texts = [{key: hydra_value(value) for key, value in point.items()} for point in points]
    values = {key: list(dict.fromkeys(text[key] for text in texts if key in text)) for key in keys}
    if all(text.keys() == set(keys) for text in texts) and math.prod(map(len, values.values())) == len(points):
        return [[f"{key}={','.join(values[key])}" for key in keys]]
    return [[f"{key}={value}" for key, value in text.items()] for text in texts]


def _two_digits(value: float) -> str:
    """Return two significant digits, and whole numbers from 100 on without an exponent."""
    return f"{value:.2g}" if abs(value) < 99.5 else f"{value:.0f}"
