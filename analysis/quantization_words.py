"""Quantizations and target modules in words: one plain sentence each, what to use now, what would settle it."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_exp.analysis.contrasts import MIN_SEEDS
from qlora_exp.analysis.quantization import LevelComparison, LevelContrast
from qlora_exp.analysis.recommendation import (
    MAX_SEEDS_ADVISED,
    SEEDS_ADVISED,
    ComparisonVerdict,
    Recommendation,
    cost_words,
    difference_words,
    margin_note,
    seeds_command,
    size_words,
)
from qlora_exp.analysis.report_content import StudyInfo, Table, value_table

NEGLIGIBLE = 0.005
"""Ratios closer to 1 aren't named."""


def quantization_recommendation(comparison: LevelComparison, studies: Sequence[StudyInfo] = ()) -> Recommendation:
    """Return which quantization to use now. ``studies``: for the command that would settle it."""
    return _recommendation(comparison, "Which quantization?", studies)


def targets_recommendation(comparison: LevelComparison, studies: Sequence[StudyInfo] = ()) -> Recommendation:
    """Return which target modules to use now, at equal rank."""
    return _recommendation(comparison, "Which target modules?", studies)


def contrast_sentence(comparison: LevelComparison, contrast: LevelContrast) -> str:
    """Return e.g. ``nf4 costs 0.4 % of the loss (95 % CI 0.1 to 0.7 %, 3 seeds and 300 items) against bf16 and saves
    70 % of the memory of the weights.``"""
    quality = difference_words(contrast.difference, comparison.measure, contrast.reference_score)
    sentence = f"{contrast.level} {quality} against {contrast.reference}"
    saved = [
        (contrast.ratio("weight_bytes"), "of the memory of the weights"),
        (contrast.ratio("peak_bytes"), "of the peak of training"),
        (contrast.ratio("parameters"), "of the trainable parameters"),
    ]
    parts = [
        f"{'saves' if ratio < 1 else 'adds'} {100 * abs(1 - ratio):.0f} % {what}"
        for ratio, what in saved
        if ratio is not None and abs(ratio - 1) > NEGLIGIBLE
    ]
    speed = contrast.ratio("tokens_per_second")
    if speed is not None:
        parts.append(f"trains at {100 * speed:.0f} % of its tokens per second")
    if len(parts) > 1:
        parts = [", ".join(parts[:-1]), parts[-1]]
    return " and ".join([sentence, *parts]) + "."


def verdict_words(comparison: LevelComparison, contrast: LevelContrast) -> str:
    """Return e.g. ``nf4 is equivalent to bf16 within 0.25 % of the loss``."""
    sides = contrast.level, contrast.reference
    if contrast.verdict is ComparisonVerdict.EQUIVALENT and comparison.margin is not None:
        size = size_words(comparison.margin, comparison.measure, comparison.reference_score)
        return f"{sides[0]} is equivalent to {sides[1]} within {size}"
    if contrast.verdict is ComparisonVerdict.OPEN:
        return f"{sides[0]} against {sides[1]}: not settled"
    return f"{sides[0]} is {contrast.verdict} than {sides[1]}"


def level_table(comparison: LevelComparison, caption: str) -> Table:
    """Return one row for each quantization or target set against the reference."""
    columns = (
        *("against", ("gain", "figure"), ("low", "figure"), ("high", "figure"), "over"),
        *(("weights", "percent"), ("peak of training", "percent"), ("tokens/s", "percent")),
        *(("trainable parameters", "percent"), "verdict"),
    )
    rows = [
        (
            *(f"{c.level} against {c.reference}", c.difference.value, c.difference.low, c.difference.high),
            *(c.difference.over, c.ratio("weight_bytes"), c.ratio("peak_bytes"), c.ratio("tokens_per_second")),
            *(c.ratio("parameters"), verdict_words(comparison, c)),
        )
        for c in comparison.contrasts
    ]
    return value_table(columns, rows, caption)


def _recommendation(comparison: LevelComparison, question: str, studies: Sequence[StudyInfo]) -> Recommendation:
    measure, level = comparison.measure, comparison.reference_score

    def size(value: float) -> str:
        return size_words(value, measure, level)

    undecided = [contrast for contrast in comparison.contrasts if contrast.verdict is ComparisonVerdict.OPEN]
    settle, command = _settle(undecided, studies)
    few = min(contrast.difference.seeds for contrast in comparison.contrasts) < MIN_SEEDS
    why = "with one seed, the variation from seed to seed is unknown" if few else "not all of them have shared runs"
    notes = [margin_note(comparison.margin, comparison.margin_text, measure)]
    if any(contrast.own_rates for contrast in comparison.contrasts):
        notes.append("Each side uses the learning rate that was best for it on validation.")
    several = max(len(contrast.pairs) for contrast in comparison.contrasts)
    if several > 1:
        notes.append(f"Means over up to {several} pairs of otherwise equal configurations.")
    return Recommendation(
        question=question,
        use=comparison.use,
        verdict="; ".join(verdict_words(comparison, contrast) for contrast in comparison.contrasts),
        evidence=" ".join(contrast_sentence(comparison, contrast) for contrast in comparison.contrasts),
        cost=cost_words(comparison.regret_bound, comparison.regret_against, size, why),
        settle=settle,
        settle_command=command,
        regret_bound=comparison.regret_bound,
        regret_against=comparison.regret_against,
        unit=measure.label,
        margin=comparison.margin,
        margin_text=comparison.margin_text,
        notes=tuple(note for note in notes if note is not None),
    )


def _settle(undecided: Sequence[LevelContrast], studies: Sequence[StudyInfo]) -> tuple[str | None, str | None]:
    """Return what would settle the contrasts, and the command for it."""
    if not undecided:
        return None, None
    names = " and ".join(dict.fromkeys(contrast.level for contrast in undecided))
    runs = [c for contrast in undecided for pair in contrast.pairs for c in pair]
    if min(contrast.difference.seeds for contrast in undecided) < MIN_SEEDS:
        return f"{SEEDS_ADVISED} seeds of each would tell more about {names}.", seeds_command(
            runs, SEEDS_ADVISED, studies
        )
    needed = [contrast.seeds_to_settle for contrast in undecided]
    known = [seeds for seeds in needed if seeds is not None]
    if len(known) < len(needed):
        return f"More test items or a wider margin would settle {names}: {MAX_SEEDS_ADVISED} seeds wouldn't.", None
    return f"About {max(known)} seeds of each would settle {names}.", seeds_command(runs, max(known), studies)
