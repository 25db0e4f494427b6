"""Is it better to start from the instruct model or from the base? The 2 × 2 of variant and format, and its contrasts.

The primary contrast is fixed beforehand: best instruct cell − best base cell after tuning, cells chosen on validation.
All other contrasts are secondary; their p-values are Holm-adjusted together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from qlora_exp.analysis.comparable import answering_scores, base_model_scores, cell_of, finite_score
from qlora_exp.analysis.configurations import Configuration, configuration_settings, mean
from qlora_exp.analysis.contrasts import (
    INTERVAL,
    MIN_SEEDS,
    Difference,
    ItemScores,
    Side,
    difference,
    gain_difference,
    holm,
    scores_at,
)
from qlora_exp.analysis.margin import Margin
from qlora_exp.analysis.recommendation import ComparisonVerdict, comparison_verdict, margin_in_score
from qlora_exp.records.types import RunRecord, Scores

CELLS = (("base", "plain"), ("base", "chat"), ("instruct", "plain"), ("instruct", "chat"))
BITS_PER_BYTE = "bits_per_byte"
BEFORE, AFTER = "before tuning", "after tuning"
UNITS = {
    BITS_PER_BYTE: "bits/byte",
    "forgetting": "nats/byte",
    "accuracy": "accuracy",
    "exact_match": "exact match",
}
EQUAL_SHARE = 0.05
"""Two sides count as equal if their processed tokens differ by at most this share."""
DOCUMENTED = "sweeps/instruct_or_base.yaml"


@dataclass(frozen=True)
class Level:
    """A model's scores: bits per byte of the answer (comparable across formats), accuracy by likelihood, exact match by
    generation. Means over seeds or draws; ``None`` is unknown."""

    bits_per_byte: float | None
    accuracy: float | None
    exact_match: float | None


@dataclass(frozen=True)
class VariantCell:
    """One variant in one format, with the configuration that was best on validation."""

    variant: str
    written: str
    """``plain`` or ``chat``."""
    configuration: Configuration
    searched: int
    """How many configurations were tried for this cell, by its pilots and its answering runs."""
    before_tuning: Level
    """The base model, before training."""
    few_shot: Level | None
    """The base model with worked examples; ``None`` if that wasn't scored."""
    shots: int | None
    """The fewest worked examples of a draw."""
    tuned: Level
    forgetting: float | None
    """Nats per byte of general text."""
    seed_sd: float | None
    """Standard deviation over seeds of the tuned bits per byte; low and high: its 95 % interval."""
    seed_sd_low: float | None
    seed_sd_high: float | None
    tokens: float | None
    """Tokens processed in training, mean over runs."""

    @property
    def name(self) -> str:
        return f"{self.variant}, {self.written}"

    @property
    def runs(self) -> tuple[RunRecord, ...]:
        return self.configuration.runs

    def at(self, moment: str) -> Side:
        return Side(self.runs, moment)


@dataclass(frozen=True)
class VariantContrast:
    """A secondary contrast: how much better the side that is named first is."""

    name: str
    unit: str
    difference: Difference
    adjusted_p: float | None


@dataclass(frozen=True)
class TokenCheck:
    """``done``: both sides processed equally many tokens, or one was trained again until they did."""

    done: bool
    difference: Difference | None
    """Instruct against base at equal tokens; ``None`` if that wasn't run, or isn't needed."""
    sentence: str


@dataclass(frozen=True)
class InstructBase:
    cells: tuple[VariantCell, ...]
    missing: tuple[str, ...]
    instruct: VariantCell
    """The instruct cell that is better on validation; ``base`` likewise."""
    base: VariantCell
    chosen_by: str
    before_tuning: Difference | None
    """Before training."""
    gain: Difference | None
    """What tuning adds."""
    tuned: Difference | None
    """The primary contrast."""
    secondary: tuple[VariantContrast, ...]
    tokens: TokenCheck
    margin: float | None
    """In bits per byte."""
    margin_text: str | None
    """As the user wrote it."""
    notes: tuple[str, ...]
    """What weakens the comparison, e.g. a single seed."""

    @property
    def verdict(self) -> ComparisonVerdict:
        """Return whether instruct is better or worse than base after tuning, or equivalent."""
        return comparison_verdict(self.tuned, self.margin)


def compare_variants(
    configurations: Sequence[Configuration],
    items: ItemScores | None = None,
    margin: Margin | None = None,
    pilots: Sequence[RunRecord] = (),
    budgeted: Sequence[RunRecord] = (),
    rank_of: Callable[[RunRecord], int | None] = lambda run: None,
) -> InstructBase | None:
    """Return the cells that were run, and their contrasts; ``None`` if only one variant was run.

    Args:
        items: per-item values; without them intervals are over seeds alone.
        margin: within which both count as equivalent, relative to the base cell; ``None``: equivalence is never
            concluded. A number without a unit is in bits per byte.
        pilots: runs that were scored on validation only. They choose the cells if every cell has some whose seeds no
            answering run uses; else the answering runs' validation scores choose.
        budgeted: runs that were trained to a number of tokens, for the equal-token check.
        rank_of: the rank that a ladder says to use for a run's configuration. A cell that has it is compared at it.
    """
    by_cell: dict[tuple[str, str], list[Configuration]] = defaultdict(list)
    for configuration in configurations:
        by_cell[cell_of(configuration.first)].append(configuration)
    for key, of_cell in by_cell.items():
        at_rank = [c for c in of_cell if c.rank == rank_of(c.first)]
        by_cell[key] = at_rank or of_cell
    if {"base", "instruct"} - {variant for variant, _ in by_cell}:
        return None
    pilots_of = _pilots_by_cell(by_cell, pilots)
    cells = tuple(_cell(*key, by_cell[key], pilots_of.get(key, ())) for key in CELLS if key in by_cell)

    def on_validation(cell: VariantCell) -> float:
        if not pilots_of:
            return _validation_bits(cell.runs)
        return min(_validation_bits([pilot]) for pilot in pilots_of[cell.variant, cell.written])

    instruct, base = (
        min((cell for cell in cells if cell.variant == variant), key=on_validation) for variant in ("instruct", "base")
    )
    by_own_runs = "by the same runs' validation scores"
    chosen_by = by_own_runs
    if pilots_of:
        several = any(len(cell_configurations) > 1 for cell_configurations in by_cell.values())
        among = f", the configurations within a cell {by_own_runs}" if several else ""
        chosen_by = f"by pilots with other seeds{among}"
    before_tuning = difference(instruct.at("before"), base.at("before"), BITS_PER_BYTE, items)
    tuned = difference(instruct.at("after"), base.at("after"), BITS_PER_BYTE, items)
    gain = gain_difference(instruct.runs, base.runs, BITS_PER_BYTE, items)
    return InstructBase(
        cells=cells,
        missing=tuple(f"{v} in the {w} format" for v, w in CELLS if (v, w) not in by_cell),
        instruct=instruct,
        base=base,
        chosen_by=chosen_by,
        before_tuning=before_tuning,
        gain=gain,
        tuned=tuned,
        secondary=_secondary(cells, instruct, base, before_tuning, gain, items),
        tokens=check_equal_tokens(instruct.runs, base.runs, budgeted, items),
        margin=margin_in_score(margin, base.runs, BITS_PER_BYTE),
        margin_text=str(margin) if margin is not None else None,
        notes=tuple(_notes(instruct, base, tuned, items)),
    )


def check_equal_tokens(
    instruct: Sequence[RunRecord], base: Sequence[RunRecord], budgeted: Sequence[RunRecord], items: ItemScores | None
) -> TokenCheck:
    """Return the primary contrast at equal tokens: a chat template adds its tokens to every example.

    Args:
        budgeted: runs of the same protocol, of any cell, that were trained to a number of tokens.
    """
    sides = {"instruct": tuple(instruct), "base": tuple(base)}
    tokens = {side: mean(run.speed.train_tokens for run in runs) for side, runs in sides.items()}
    known = {side: count for side, count in tokens.items() if count is not None}
    if len(known) < len(tokens):
        return TokenCheck(False, None, "Equal-token check: not done, because the processed tokens are unknown.")
    fewer, more = sorted(known, key=lambda side: known[side])
    counted = f"training processed {known['instruct']:,.0f} tokens for instruct and {known['base']:,.0f} for base"
    if known[more] <= known[fewer] * (1 + EQUAL_SHARE):
        return TokenCheck(True, None, f"Equal examples are equal tokens here: {counted}.")
    least, most = known[more] / (1 + EQUAL_SHARE), known[more] * (1 + EQUAL_SHARE)
    cell = cell_of(sides[fewer][0])
    repeated = [run for run in budgeted if cell_of(run) == cell and least <= (run.speed.train_tokens or 0) <= most]
    if not repeated:
        command = f"training.max_steps=null training.max_tokens={known[more]:.0f}"
        next_step = f"To check, train {fewer} again with {command} ({DOCUMENTED} says how)"
        return TokenCheck(False, None, f"Equal-token check: not done. At equal examples, {counted}. {next_step}.")
    sides[fewer] = tuple(repeated)
    contrast = difference(Side(sides["instruct"], "after"), Side(sides["base"], "after"), BITS_PER_BYTE, items)
    sentence = f"At equal tokens ({fewer} trained to {known[more]:,.0f}): {contrast or 'unknown'}."
    return TokenCheck(contrast is not None, contrast, sentence)


# Cells.


def _pilots_by_cell(
    by_cell: Mapping[tuple[str, str], Sequence[Configuration]], pilots: Sequence[RunRecord]
) -> dict[tuple[str, str], list[RunRecord]]:
    """Return each cell's pilots; empty unless every cell has scored pilots whose seeds no answering run of it uses."""
    seeds = {key: {run.seed for cell in cells for run in cell.runs} for key, cells in by_cell.items()}
    usable: dict[tuple[str, str], list[RunRecord]] = {key: [] for key in by_cell}
    for pilot in pilots:
        key = cell_of(pilot)
        if key in by_cell and pilot.seed not in seeds[key] and _validation_bits([pilot]) < math.inf:
            usable[key].append(pilot)
    return usable if all(usable.values()) else {}


def _cell(
    variant: str, written: str, configurations: Sequence[Configuration], pilots: Sequence[RunRecord]
) -> VariantCell:
    chosen = min(configurations, key=lambda configuration: _validation_bits(configuration.runs))
    runs, draws = chosen.runs, chosen.first.scores.few_shot
    tuned = [finite_score(answering_scores(run), BITS_PER_BYTE) for run in runs]
    sd, low, high = _sd_with_interval([value for value in tuned if value is not None])
    # A pilot and an answering run may share a configuration.
    tried = [*(configuration.first for configuration in configurations), *pilots]
    return VariantCell(
        variant=variant,
        written=written,
        configuration=chosen,
        searched=len({str(sorted(configuration_settings(run).items())) for run in tried}),
        before_tuning=_level([base_model_scores(run) for run in runs]),
        few_shot=_level([scores_at(runs[0], f"few_shot_{draw.draw}") for draw in draws]) if draws else None,
        shots=min((len(draw.examples) for draw in draws), default=None),
        tuned=_level([answering_scores(run) for run in runs]),
        forgetting=mean(run.scores.forgetting.difference if run.scores.forgetting else None for run in runs),
        seed_sd=sd,
        seed_sd_low=low,
        seed_sd_high=high,
        tokens=mean(run.speed.train_tokens for run in runs),
    )


def _validation_bits(runs: Sequence[RunRecord]) -> float:
    """Return the mean bits per byte on validation; infinite if a run has none."""
    value = mean(finite_score(run.scores.after, BITS_PER_BYTE) for run in runs)
    return math.inf if value is None else value


def _level(several_scores: Sequence[Scores | None]) -> Level:
    names = (BITS_PER_BYTE, "accuracy", "exact_match")
    return Level(*(mean(finite_score(scores, name) for scores in several_scores) for name in names))


def _sd_with_interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the standard deviation over seeds and its 95 % interval: (n − 1)·s²/σ² is chi-squared distributed."""
    if len(values) < MIN_SEEDS:
        return None, None, None
    df, sd = len(values) - 1, float(np.std(values, ddof=1))
    upper, lower = (float(stats.chi2.ppf(share, df)) for share in ((1 + INTERVAL) / 2, (1 - INTERVAL) / 2))
    return sd, sd * math.sqrt(df / upper), sd * math.sqrt(df / lower)


# Contrasts.


def _secondary(
    cells: Sequence[VariantCell],
    instruct: VariantCell,
    base: VariantCell,
    before_tuning: Difference | None,
    gain: Difference | None,
    items: ItemScores | None,
) -> tuple[VariantContrast, ...]:
    """Return every contrast besides the primary one, so that Holm's m counts them all."""
    contrasts = [
        (f"instruct over base, {BEFORE}", BITS_PER_BYTE, before_tuning),
        ("gain of tuning, instruct over base", BITS_PER_BYTE, gain),
    ]

    def add(name: str, score: str, first: Side, second: Side) -> None:
        # Forgetting has no values of single items.
        contrasts.append((name, score, difference(first, second, score, None if score == "forgetting" else items)))

    for moment, when in (("before", BEFORE), ("after", AFTER)):
        sides = instruct.at(moment), base.at(moment)
        add(f"instruct over base, {when}, by likelihood", "accuracy", *sides)
        add(f"instruct over base, {when}, by generation", "exact_match", *sides)
    add("instruct over base, general text kept", "forgetting", instruct.at("after"), base.at("after"))
    for variant in ("base", "instruct"):
        by_format = {cell.written: cell for cell in cells if cell.variant == variant}
        if by_format.keys() >= {"chat", "plain"}:
            for moment, when in (("before", BEFORE), ("after", AFTER)):
                sides = by_format["chat"].at(moment), by_format["plain"].at(moment)
                add(f"chat over plain, {variant}, {when}", BITS_PER_BYTE, *sides)
    for cell in (base, instruct):
        if cell.few_shot is not None:
            name = f"{cell.shots} examples over none, {cell.name}, {BEFORE}"
            add(name, BITS_PER_BYTE, cell.at("few_shot"), cell.at("before"))
    known = [(name, score, contrast) for name, score, contrast in contrasts if contrast is not None]
    adjusted = holm([contrast.p for _, _, contrast in known])
    return tuple(
        VariantContrast(name, UNITS[score], contrast, p)
        for (name, score, contrast), p in zip(known, adjusted, strict=True)
    )


def _notes(instruct: VariantCell, base: VariantCell, tuned: Difference | None, items: ItemScores | None) -> list[str]:
    shared = len({run.seed for run in instruct.runs} & {run.seed for run in base.runs})
    if not shared:
        return [f"{instruct.name} and {base.name} share no seed: no runs can be paired. Run both with seed=1,2,3."]
    notes = []
    if instruct.runs[0].scores.test is None:
        notes.append(
            "These are scores of the validation split, which also chose the cells: they flatter the choice."
            " Run evaluation.split=test with other seeds."
        )
    if shared < MIN_SEEDS:
        notes.append("One seed: the variation from seed to seed is unknown. Run seed=1,2,3.")
    if unscored := shared - (tuned.seeds if tuned is not None else 0):
        notes.append(f"{unscored} of {shared} shared seeds have no finite score on both sides and are left out.")
    if tuned is not None and items is not None and "item" not in tuned.over:
        notes.append("Per-item results are missing, or are of other items: the interval is over seeds alone.")
    return notes
