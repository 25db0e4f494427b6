"""Is it better to start from the instruct model or from the base? The 2 × 2 of variant and format, and its paragraph.

Named beforehand, the primary contrast: best instruct cell − best base cell after tuning, cells chosen on validation.
Every other contrast is secondary, and its p is Holm-adjusted over all of them.
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


@dataclass(frozen=True)
class Level:
    """One model's scores: bits per byte of the answer (comparable across formats), accuracy by likelihood, exact match
    by generation. Means over seeds or draws; ``None`` is unknown."""

    bits_per_byte: float | None
    accuracy: float | None
    exact_match: float | None


@dataclass(frozen=True)
class VariantCell:
    """One variant in one format, at the configuration that was best on validation."""

    variant: str
    written: str
    """``plain`` or ``chat``."""
    configuration: Configuration
    searched: int
    """Configurations that the cell's was chosen among: those of its pilots and of its own runs."""
    untouched: Level
    few_shot: Level | None
    """The untouched model with worked examples; ``None`` where that wasn't scored."""
    shots: int | None
    """The fewest examples of a draw."""
    tuned: Level
    forgetting: float | None
    """Nats per byte of general text."""
    seed_sd: float | None
    """Of the tuned bits per byte; low and high: 90 %."""
    seed_sd_low: float | None
    seed_sd_high: float | None
    tokens: float | None
    """Processed in a training."""

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
    """A secondary contrast: by how much the first that is named is better."""

    name: str
    unit: str
    difference: Difference
    adjusted_p: float | None


@dataclass(frozen=True)
class InstructBase:
    cells: tuple[VariantCell, ...]
    missing: tuple[str, ...]
    instruct: VariantCell
    """The better of its variant, on validation."""
    base: VariantCell
    chosen_by: str
    untouched: Difference | None
    gain: Difference | None
    tuned: Difference | None
    """The primary contrast."""
    secondary: tuple[VariantContrast, ...]
    tokens: TokenCheck
    margin: float | None
    notes: tuple[str, ...]
    """What is less than it should be."""


@dataclass(frozen=True)
class _Pilot:
    best: float
    """Bits per byte on validation, of the best of them."""
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
    """The cells that there are, and their contrasts. ``None`` where only one variant was run.

    Args:
        items: per-item values; without them intervals are over seeds alone.
        margin: bits per byte within which both count as equivalent; ``None``: equivalence is never said.
        pilots: runs that were scored on validation only; where every cell has some, of seeds that answer nothing, the
            cells are chosen by them instead of by their own runs' validation scores.
        budgeted: runs that were trained to a number of tokens, for the equal-token check.
    """
    by_cell: dict[tuple[str, str], list[Configuration]] = defaultdict(list)
    for configuration in configurations:
        by_cell[cell_of(configuration.first)].append(configuration)
    if {"base", "instruct"} - {variant for variant, _ in by_cell}:
        return None
    piloted = _piloted(by_cell, pilots)
    cells = tuple(_cell(*key, by_cell[key], piloted) for key in CELLS if key in by_cell)
    best = {
        variant: min((c for c in cells if c.variant == variant), key=lambda cell: _on_validation(cell, piloted))
        for variant in ("base", "instruct")
    }
    instruct, base = best["instruct"], best["base"]
    untouched = difference(Side(instruct.runs, "before"), Side(base.runs, "before"), BITS_PER_BYTE, items)
    tuned = difference(Side(instruct.runs, "after"), Side(base.runs, "after"), BITS_PER_BYTE, items)
    gain = gain_difference(instruct.runs, base.runs, BITS_PER_BYTE, items)
    return InstructBase(
        cells=cells,
        missing=tuple(f"{v} in the {w} format" for v, w in CELLS if (v, w) not in by_cell),
        instruct=instruct,
        base=base,
        chosen_by=_chosen_by(piloted, max(len(several) for several in by_cell.values())),
        untouched=untouched,
        gain=gain,
        tuned=tuned,
        secondary=_secondary(cells, instruct, base, untouched, gain, items),
        tokens=equal_tokens.check_equal_tokens(instruct.runs, base.runs, budgeted, items),
        margin=margin,
        notes=tuple(_notes(instruct, base, tuned, items)),
    )


def verdict(found: Difference | None, margin: float | None) -> str:
    """``better``, ``worse``, ``equivalent within ±m`` or ``not settled``: of instruct, after tuning."""
    if found is None or found.low is None or found.high is None or found.seeds < MIN_SEEDS:
        return "not settled"
    if margin is not None and -margin < found.low and found.high < margin:
        return f"equivalent within ±{margin:g}"
    if found.low > 0:
        return "better"
    return "worse" if found.high < 0 else "not settled"


def baseline_note(configuration: Configuration) -> str | None:
    """Whether the configuration beats the traditional baselines on the same split; ``None`` where none was made."""
    scores, baselines = answering_scores(configuration.first), configuration.first.baselines
    accuracy = mean(_of(answering_scores(run), "accuracy") for run in configuration.runs)
    if scores is None or baselines is None or accuracy is None or baselines.split != scores.split:
        return None
    majority, linear = baselines.majority_accuracy, baselines.tfidf_accuracy
    if majority is not None and accuracy <= majority:
        told_of = f"always answering {baselines.majority_label!r} ({majority:.3f} on {baselines.split})"
        return f"Its accuracy of {accuracy:.3f} does not even beat {told_of}."
    if linear is None:
        return None
    told_of = f"TF-IDF with logistic regression ({linear:.3f} on {baselines.split})"
    if accuracy > linear:
        return f"Its accuracy of {accuracy:.3f} is above that of {told_of}."
    return f"Its accuracy of {accuracy:.3f} does not beat {told_of}, which costs next to nothing."


# Cells.


def _cell(variant: str, written: str, configurations: Sequence[Configuration], piloted: _Pilots) -> VariantCell:
    chosen = min(configurations, key=_validation_loss)
    runs = chosen.runs
    tuned = [_of(answering_scores(run), BITS_PER_BYTE) for run in runs]
    sd, low, high = _spread([value for value in tuned if value is not None])
    shown = runs[0].scores.few_shot
    return VariantCell(
        variant=variant,
        written=written,
        configuration=chosen,
        searched=_tried(configurations, piloted[variant, written].runs if piloted else ()),
        untouched=_level([base_model_scores(run) for run in runs]),
        few_shot=_level([scores_at(runs[0], f"few_shot_{one.draw}") for one in shown]) if shown else None,
        shots=min((len(one.examples) for one in shown), default=None),
        tuned=_level([answering_scores(run) for run in runs]),
        forgetting=mean(run.scores.forgetting.difference if run.scores.forgetting else None for run in runs),
        seed_sd=sd,
        seed_sd_low=low,
        seed_sd_high=high,
        tokens=processed_tokens(runs),
    )


def _level(found: Sequence[Scores | None]) -> Level:
    return Level(*(mean(_of(scores, name) for scores in found) for name in (BITS_PER_BYTE, "accuracy", "exact_match")))


def _spread(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Standard deviation over seeds with its 90 % interval, from the chi-squared distribution of (n − 1)·s²/σ²."""
    if len(values) < MIN_SEEDS:
        return None, None, None
    df, sd = len(values) - 1, float(np.std(values, ddof=1))
    upper, lower = (float(stats.chi2.ppf(share, df)) for share in ((1 + INTERVAL) / 2, (1 - INTERVAL) / 2))
    return sd, sd * math.sqrt(df / upper), sd * math.sqrt(df / lower)


def _on_validation(cell: VariantCell, piloted: _Pilots) -> float:
    return piloted[cell.variant, cell.written].best if piloted else _validation_loss(cell.configuration)


def _piloted(by_cell: Mapping[tuple[str, str], Sequence[Configuration]], pilots: Sequence[RunRecord]) -> _Pilots:
    """Empty unless every cell has pilots with a score and of seeds that answer nothing in it."""
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
    """``configurations``: of the cell that has the most."""
    own = "by the same runs' validation scores"
    if not piloted:
        return own
    among = f", the configurations within a cell {own}" if configurations > 1 else ""
    return f"by pilots of seeds that answer nothing{among}"


def _tried(configurations: Sequence[Configuration], pilots: Sequence[RunRecord]) -> int:
    """Different configurations; a pilot's may be one of those that answer."""
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
    untouched: Difference | None,
    gain: Difference | None,
    items: ItemScores | None,
) -> tuple[VariantContrast, ...]:
    """All that is looked at besides the primary contrast, so that Holm's m is what it says."""
    pair = Side(instruct.runs, "after"), Side(base.runs, "after")
    before = Side(instruct.runs, "before"), Side(base.runs, "before")
    found = [
        ("instruct over base, untouched", BITS_PER_BYTE, untouched),
        ("what tuning adds, instruct over base", BITS_PER_BYTE, gain),
        ("instruct over base, untouched, by likelihood", "accuracy", difference(*before, "accuracy", items)),
        ("instruct over base, untouched, by generation", "exact_match", difference(*before, "exact_match", items)),
        ("instruct over base, tuned, by likelihood", "accuracy", difference(*pair, "accuracy", items)),
        ("instruct over base, tuned, by generation", "exact_match", difference(*pair, "exact_match", items)),
        ("instruct over base, general text kept", "forgetting", difference(*pair, "forgetting", None)),
    ]
    for variant in ("base", "instruct"):
        by_format = {cell.written: cell for cell in cells if cell.variant == variant}
        chat, plain = by_format.get("chat"), by_format.get("plain")
        if chat is None or plain is None:
            continue
        for moment, when in (("before", "untouched"), ("after", "tuned")):
            sides = Side(chat.runs, moment), Side(plain.runs, moment)
            found.append(
                (f"chat over plain, {variant}, {when}", BITS_PER_BYTE, difference(*sides, BITS_PER_BYTE, items))
            )
    for cell in (base, instruct):
        if cell.few_shot is not None:
            sides = Side(cell.runs, "few_shot"), Side(cell.runs, "before")
            name = f"{cell.shots} examples over none, {cell.name}, untouched"
            found.append((name, BITS_PER_BYTE, difference(*sides, BITS_PER_BYTE, items)))
    known = [(name, score, one) for name, score, one in found if one is not None]
    units = {
        BITS_PER_BYTE: "bits/byte",
        "forgetting": "nats/byte",
        "accuracy": "accuracy",
        "exact_match": "exact match",
    }
    adjusted = holm([one.p for _, _, one in known])
    return tuple(
        VariantContrast(name, units[score], one, p) for (name, score, one), p in zip(known, adjusted, strict=True)
    )


def _notes(instruct: VariantCell, base: VariantCell, tuned: Difference | None, items: ItemScores | None) -> list[str]:
    seeds = [{run.seed for run in cell.runs} for cell in (instruct, base)]
    if not seeds[0] & seeds[1]:
        return [f"{instruct.name} and {base.name} share no seed: nothing pairs. Run both with seed=1,2,3."]
    notes = []
    if instruct.runs[0].scores.test is None:
        notes.append(
            "These are scores of the validation split, on which the cells were chosen too: they flatter the choice."
            " It takes evaluation.split=test with other seeds."
        )
    if len(seeds[0] & seeds[1]) < MIN_SEEDS:
        notes.append("One seed: nothing tells what another seed would have trained. It takes seed=1,2,3.")
    shared = len(seeds[0] & seeds[1])
    if lost := shared - (tuned.seeds if tuned is not None else 0):
        notes.append(f"{lost} of {shared} shared seeds have no finite score on both sides and are left out.")
    if tuned is None:
        return notes
    if items is not None and "items" not in tuned.over:
        notes.append("Per-item results are missing, or are of other items: the interval is over seeds alone.")
    return notes


def _of(scores: Scores | None, name: str) -> float | None:
    return finite(getattr(scores, name)) if scores is not None else None


def main(arguments: Sequence[str] | None = None) -> None:
    """The answer and its tables of a folder of runs; ``--page FILE`` saves the plots."""
    from qlora_exp.analysis.ask import main as ask

    ask(["instruct_base", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
