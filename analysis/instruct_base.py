"""Is it better to start from the instruct model or from the base? The 2 × 2 of variant and format, and its contrasts.

The primary contrast is fixed beforehand: best instruct cell − best base cell after tuning, cells chosen on validation.
All other contrasts are secondary; their p-values are Holm-adjusted together.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from qlora_exp.analysis import equal_tokens
from qlora_exp.analysis.comparable import answering_scores, base_model_scores
from qlora_exp.analysis.configurations import Configuration, configuration_settings, mean
from qlora_exp.analysis.contrasts import (
    INTERVAL,
    MIN_SEEDS,
    Difference,
    ItemScores,
    Side,
    difference,
    finite,
    gain_difference,
    holm,
    scores_at,
)
from qlora_exp.analysis.equal_tokens import TokenCheck, cell_of, processed_tokens
from qlora_exp.records.types import RunRecord, Scores

CELLS = (("base", "plain"), ("base", "chat"), ("instruct", "plain"), ("instruct", "chat"))
BITS_PER_BYTE = "bits_per_byte"
BEFORE, AFTER = "before tuning", "after tuning"


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
    """Standard deviation over seeds of the tuned bits per byte; low and high: its 90 % interval."""
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

    @property
    def rank(self) -> int:
        return int(self.configuration.first.config["lora"]["r"])


@dataclass(frozen=True)
class VariantContrast:
    """A secondary contrast: how much better the side that is named first is."""

    name: str
    unit: str
    difference: Difference
    adjusted_p: float | None


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
    notes: tuple[str, ...]
    """What weakens the comparison, e.g. a single seed."""


@dataclass(frozen=True)
class _Pilot:
    best: float
    """The lowest bits per byte on validation among them."""
    runs: tuple[RunRecord, ...]


_Pilots = Mapping[tuple[str, str], _Pilot]
"""(variant, format) → its pilots."""


def compare_variants(
    configurations: Sequence[Configuration],
    items: ItemScores | None = None,
    margin: float | None = None,
    pilots: Sequence[RunRecord] = (),
    budgeted: Sequence[RunRecord] = (),
) -> InstructBase | None:
    """Return the cells that were run, and their contrasts; ``None`` if only one variant was run.

    Args:
        items: per-item values; without them intervals are over seeds alone.
        margin: bits per byte within which both count as equivalent; ``None``: equivalence is never concluded.
        pilots: runs that were scored on validation only. They choose the cells if every cell has some whose seeds no
            answering run uses; else the answering runs' validation scores choose.
        budgeted: runs that were trained to a number of tokens, for the equal-token check.
    """
    by_cell: dict[tuple[str, str], list[Configuration]] = defaultdict(list)
    for configuration in configurations:
        by_cell[cell_of(configuration.first)].append(configuration)
    if {"base", "instruct"} - {variant for variant, _ in by_cell}:
        return None
    piloted = _pilots_by_cell(by_cell, pilots)
    cells = tuple(_cell(*key, by_cell[key], piloted) for key in CELLS if key in by_cell)
    best = {
        variant: min((c for c in cells if c.variant == variant), key=lambda cell: _on_validation(cell, piloted))
        for variant in ("base", "instruct")
    }
    instruct, base = best["instruct"], best["base"]
    before_tuning = difference(Side(instruct.runs, "before"), Side(base.runs, "before"), BITS_PER_BYTE, items)
    tuned = difference(Side(instruct.runs, "after"), Side(base.runs, "after"), BITS_PER_BYTE, items)
    gain = gain_difference(instruct.runs, base.runs, BITS_PER_BYTE, items)
    return InstructBase(
        cells=cells,
        missing=tuple(f"{v} in the {w} format" for v, w in CELLS if (v, w) not in by_cell),
        instruct=instruct,
        base=base,
        chosen_by=_chosen_by(piloted, max(len(cell_configurations) for cell_configurations in by_cell.values())),
        before_tuning=before_tuning,
        gain=gain,
        tuned=tuned,
        secondary=_secondary(cells, instruct, base, before_tuning, gain, items),
        tokens=equal_tokens.check_equal_tokens(instruct.runs, base.runs, budgeted, items),
        margin=margin,
        notes=tuple(_notes(instruct, base, tuned, items)),
    )


def verdict(contrast: Difference | None, margin: float | None) -> str:
    """Return ``better``, ``worse``, ``equivalent within ±m`` or ``not settled``: instruct against base, tuned."""
    if contrast is None or contrast.low is None or contrast.high is None or contrast.seeds < MIN_SEEDS:
        return "not settled"
    if margin is not None and -margin < contrast.low and contrast.high < margin:
        return f"equivalent within ±{margin:g}"
    if contrast.low > 0:
        return "better"
    return "worse" if contrast.high < 0 else "not settled"


def baseline_note(configuration: Configuration) -> str | None:
    """Say whether the configuration beats the traditional baselines on the same split; ``None`` if there are none."""
    scores, baselines = answering_scores(configuration.first), configuration.first.baselines
    accuracy = mean(_of(answering_scores(run), "accuracy") for run in configuration.runs)
    if scores is None or baselines is None or accuracy is None or baselines.split != scores.split:
        return None
    majority, linear = baselines.majority_accuracy, baselines.tfidf_accuracy
    if majority is not None and accuracy <= majority:
        baseline = f"always answering {baselines.majority_label!r} ({majority:.3f} on {baselines.split})"
        return f"Its accuracy of {accuracy:.3f} does not even beat {baseline}."
    if linear is None:
        return None
    baseline = f"TF-IDF with logistic regression ({linear:.3f} on {baselines.split})"
    if accuracy > linear:
        return f"Its accuracy of {accuracy:.3f} is above that of {baseline}."
    return f"Its accuracy of {accuracy:.3f} does not beat {baseline}, which costs almost nothing."


# Cells.


def _cell(variant: str, written: str, configurations: Sequence[Configuration], piloted: _Pilots) -> VariantCell:
    chosen = min(configurations, key=_validation_loss)
    runs = chosen.runs
    tuned = [_of(answering_scores(run), BITS_PER_BYTE) for run in runs]
    sd, low, high = _sd_with_interval([value for value in tuned if value is not None])
    draws = runs[0].scores.few_shot
    return VariantCell(
        variant=variant,
        written=written,
        configuration=chosen,
        searched=_count_configurations(configurations, piloted[variant, written].runs if piloted else ()),
        before_tuning=_level([base_model_scores(run) for run in runs]),
        few_shot=_level([scores_at(runs[0], f"few_shot_{draw.draw}") for draw in draws]) if draws else None,
        shots=min((len(draw.examples) for draw in draws), default=None),
        tuned=_level([answering_scores(run) for run in runs]),
        forgetting=mean(run.scores.forgetting.difference if run.scores.forgetting else None for run in runs),
        seed_sd=sd,
        seed_sd_low=low,
        seed_sd_high=high,
        tokens=processed_tokens(runs),
    )


def _level(several_scores: Sequence[Scores | None]) -> Level:
    return Level(
        *(mean(_of(scores, name) for scores in several_scores) for name in (BITS_PER_BYTE, "accuracy", "exact_match"))
    )


def _sd_with_interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the standard deviation over seeds and its 90 % interval: (n − 1)·s²/σ² is chi-squared distributed."""
    if len(values) < MIN_SEEDS:
        return None, None, None
    df, sd = len(values) - 1, float(np.std(values, ddof=1))
    upper, lower = (float(stats.chi2.ppf(share, df)) for share in ((1 + INTERVAL) / 2, (1 - INTERVAL) / 2))
    return sd, sd * math.sqrt(df / upper), sd * math.sqrt(df / lower)


def _on_validation(cell: VariantCell, piloted: _Pilots) -> float:
    return piloted[cell.variant, cell.written].best if piloted else _validation_loss(cell.configuration)


def _pilots_by_cell(by_cell: Mapping[tuple[str, str], Sequence[Configuration]], pilots: Sequence[RunRecord]) -> _Pilots:
    """Return each cell's pilots; empty unless every cell has scored pilots whose seeds no answering run of it uses."""
    bits: dict[tuple[str, str], list[tuple[float, RunRecord]]] = defaultdict(list)
    for run in pilots:
        key, value = cell_of(run), _of(run.scores.after, BITS_PER_BYTE)
        answering = {other.seed for configuration in by_cell.get(key, ()) for other in configuration.runs}
        if value is not None and run.seed not in answering:
            bits[key].append((value, run))
    if any(not bits[key] for key in by_cell):
        return {}
    return {key: _Pilot(min(value for value, _ in bits[key]), tuple(run for _, run in bits[key])) for key in by_cell}


def _chosen_by(piloted: _Pilots, configurations: int) -> str:
    """Say how the cells were chosen. ``configurations``: the number in the cell that has the most."""
    by_own_runs = "by the same runs' validation scores"
    if not piloted:
        return by_own_runs
    among = f", the configurations within a cell {by_own_runs}" if configurations > 1 else ""
    return f"by pilots with other seeds{among}"


def _count_configurations(configurations: Sequence[Configuration], pilots: Sequence[RunRecord]) -> int:
    """Count the different configurations; a pilot and an answering run may share one."""
    runs = [*(configuration.first for configuration in configurations), *pilots]
    return len({str(sorted(configuration_settings(run).items())) for run in runs})


def _validation_loss(configuration: Configuration) -> float:
    value = mean(_of(run.scores.after, BITS_PER_BYTE) for run in configuration.runs)
    return math.inf if value is None else value


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
    tuned_sides = Side(instruct.runs, "after"), Side(base.runs, "after")
    base_model_sides = Side(instruct.runs, "before"), Side(base.runs, "before")
    contrasts = [
        (f"instruct over base, {BEFORE}", BITS_PER_BYTE, before_tuning),
        ("gain of tuning, instruct over base", BITS_PER_BYTE, gain),
        (f"instruct over base, {BEFORE}, by likelihood", "accuracy", difference(*base_model_sides, "accuracy", items)),
        (
            f"instruct over base, {BEFORE}, by generation",
            "exact_match",
            difference(*base_model_sides, "exact_match", items),
        ),
        (f"instruct over base, {AFTER}, by likelihood", "accuracy", difference(*tuned_sides, "accuracy", items)),
        (f"instruct over base, {AFTER}, by generation", "exact_match", difference(*tuned_sides, "exact_match", items)),
        ("instruct over base, general text kept", "forgetting", difference(*tuned_sides, "forgetting", None)),
    ]
    for variant in ("base", "instruct"):
        by_format = {cell.written: cell for cell in cells if cell.variant == variant}
        chat, plain = by_format.get("chat"), by_format.get("plain")
        if chat is None or plain is None:
            continue
        for moment, when in (("before", BEFORE), ("after", AFTER)):
            sides = Side(chat.runs, moment), Side(plain.runs, moment)
            contrasts.append(
                (f"chat over plain, {variant}, {when}", BITS_PER_BYTE, difference(*sides, BITS_PER_BYTE, items))
            )
    for cell in (base, instruct):
        if cell.few_shot is not None:
            sides = Side(cell.runs, "few_shot"), Side(cell.runs, "before")
            name = f"{cell.shots} examples over none, {cell.name}, {BEFORE}"
            contrasts.append((name, BITS_PER_BYTE, difference(*sides, BITS_PER_BYTE, items)))
    known = [(name, score, contrast) for name, score, contrast in contrasts if contrast is not None]
    units = {
        BITS_PER_BYTE: "bits/byte",
        "forgetting": "nats/byte",
        "accuracy": "accuracy",
        "exact_match": "exact match",
    }
    adjusted = holm([contrast.p for _, _, contrast in known])
    return tuple(
        VariantContrast(name, units[score], contrast, p)
        for (name, score, contrast), p in zip(known, adjusted, strict=True)
    )


def _notes(instruct: VariantCell, base: VariantCell, tuned: Difference | None, items: ItemScores | None) -> list[str]:
    seeds = [{run.seed for run in cell.runs} for cell in (instruct, base)]
    if not seeds[0] & seeds[1]:
        return [f"{instruct.name} and {base.name} share no seed: no runs can be paired. Run both with seed=1,2,3."]
    notes = []
    if instruct.runs[0].scores.test is None:
        notes.append(
            "These are scores of the validation split, which also chose the cells: they flatter the choice."
            " Run evaluation.split=test with other seeds."
        )
    if len(seeds[0] & seeds[1]) < MIN_SEEDS:
        notes.append("One seed: the variation from seed to seed is unknown. Run seed=1,2,3.")
    shared = len(seeds[0] & seeds[1])
    if unscored := shared - (tuned.seeds if tuned is not None else 0):
        notes.append(f"{unscored} of {shared} shared seeds have no finite score on both sides and are left out.")
    if tuned is None:
        return notes
    if items is not None and "items" not in tuned.over:
        notes.append("Per-item results are missing, or are of other items: the interval is over seeds alone.")
    return notes


def _of(scores: Scores | None, name: str) -> float | None:
    return finite(getattr(scores, name)) if scores is not None else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the answer and its tables for a folder of runs; ``--page FILE`` saves the plots."""
    from qlora_exp.analysis.ask import main as ask

    ask(["instruct_base", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
