"""Is it better to start from the instruct model or from the base? The 2 × 2 of variant and format, and its sentence."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from qlora_exp.analysis.comparable import answering_scores, untouched_scores
from qlora_exp.analysis.configurations import Configuration, mean
from qlora_exp.analysis.variance import Array, split_variance
from qlora_exp.records import RunRecord, Scores

INTERVAL = 0.90
LEAST_SEEDS = 2
"""Below, nothing tells what another seed would have trained."""
CELLS = (("base", "plain"), ("base", "chat"), ("instruct", "plain"), ("instruct", "chat"))

Losses = Callable[[RunRecord, str], Mapping[str, float] | None]
"""(run, ``before`` or ``after``) → bits per byte of each test item's answer, scaled so that their mean is the score;
``None`` where there are none."""


@dataclass(frozen=True)
class Cell:
    """One variant in one format, at the configuration that was best on validation. Bits per byte of the answer, which
    may be compared across formats; ``None`` is unknown."""

    variant: str
    written: str
    """``plain`` or ``chat``."""
    configuration: Configuration
    untouched: float | None
    tuned: float | None
    untouched_accuracy: float | None
    accuracy: float | None
    exact_match: float | None
    forgetting: float | None
    """Nats per byte of general text."""
    seed_sd: float | None
    searched: int
    """Configurations that the cell's was chosen among."""

    @property
    def name(self) -> str:
        return f"{self.variant}, {self.written}"


@dataclass(frozen=True)
class Difference:
    """Bits per byte by which instruct is better; low and high: 90 % over seeds and items, ``None`` where unknown."""

    value: float
    low: float | None
    high: float | None
    seeds: int
    over: str


@dataclass(frozen=True)
class InstructBase:
    cells: tuple[Cell, ...]
    missing: tuple[str, ...]
    untouched: Difference | None
    gain: Difference | None
    tuned: Difference | None
    sentence: str


def compare(
    configurations: Sequence[Configuration], losses: Losses | None = None, margin: float | None = None
) -> InstructBase | None:
    """The cells that there are, and the primary contrast: best instruct cell − best base cell after tuning, cells and
    configurations chosen on validation. ``None`` where only one variant was run.

    Args:
        losses: per-item values; without them the interval is over seeds alone.
        margin: bits per byte within which both count as equivalent; ``None``: equivalence is never said.
    """
    by_cell: dict[tuple[str, str], list[Configuration]] = defaultdict(list)
    for configuration in configurations:
        plan = configuration.first.plan
        variant = str((configuration.first.config.get("model") or {}).get("variant"))
        by_cell[variant, plan.format if plan is not None else "plain"].append(configuration)
    if {"base", "instruct"} - {variant for variant, _ in by_cell}:
        return None
    cells = tuple(_cell(*key, by_cell[key]) for key in CELLS if key in by_cell)
    missing = tuple(
        f"{variant} in the {written} format" for variant, written in CELLS if (variant, written) not in by_cell
    )
    best = {
        variant: min((c for c in cells if c.variant == variant), key=_on_validation) for variant in ("base", "instruct")
    }
    pair = best["instruct"].configuration, best["base"].configuration
    untouched = _difference(*pair, losses, "before")
    tuned = _difference(*pair, losses, "after")
    gain = _gain(*pair, losses, untouched, tuned)
    return InstructBase(cells, missing, untouched, gain, tuned, _sentence(best, cells, untouched, gain, tuned, margin))


def verdict(difference: Difference | None, margin: float | None) -> str:
    """``better``, ``worse``, ``equivalent within ±m`` or ``not settled``: of instruct, after tuning."""
    if difference is None or difference.low is None or difference.high is None or difference.seeds < LEAST_SEEDS:
        return "not settled"
    if margin is not None and -margin < difference.low and difference.high < margin:
        return f"equivalent within ±{margin:g}"
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "not settled"


def baseline_note(configuration: Configuration) -> str | None:
    """Whether the configuration beats the traditional baseline on the same split; ``None`` where that wasn't made."""
    scores, baselines = answering_scores(configuration.first), configuration.first.baselines
    accuracy = mean(_of(answering_scores(run), "accuracy") for run in configuration.runs)
    if scores is None or baselines is None or baselines.tfidf_accuracy is None or accuracy is None:
        return None
    if baselines.split != scores.split:
        return None
    baseline = f"TF-IDF with logistic regression ({baselines.tfidf_accuracy:.3f} on {baselines.split})"
    if accuracy > baselines.tfidf_accuracy:
        return f"Its accuracy of {accuracy:.3f} is above that of {baseline}."
    return f"Its accuracy of {accuracy:.3f} does not beat {baseline}, which costs next to nothing."


def _cell(variant: str, written: str, configurations: Sequence[Configuration]) -> Cell:
    chosen = min(configurations, key=_validation_loss)
    tuned = [scores.bits_per_byte for run in chosen.runs if (scores := answering_scores(run)) is not None]
    known = [value for value in tuned if value is not None]
    return Cell(
        variant=variant,
        written=written,
        configuration=chosen,
        untouched=mean(_of(untouched_scores(run), "bits_per_byte") for run in chosen.runs),
        tuned=mean(tuned),
        untouched_accuracy=mean(_of(untouched_scores(run), "accuracy") for run in chosen.runs),
        accuracy=mean(_of(answering_scores(run), "accuracy") for run in chosen.runs),
        exact_match=mean(_of(answering_scores(run), "exact_match") for run in chosen.runs),
        forgetting=mean(run.scores.forgetting.difference if run.scores.forgetting else None for run in chosen.runs),
        seed_sd=float(np.std(known, ddof=1)) if len(known) > 1 else None,
        searched=len(configurations),
    )


def _difference(instruct: Configuration, base: Configuration, losses: Losses | None, moment: str) -> Difference | None:
    """base − instruct in bits per byte: above 0, instruct is better."""
    by_seed = [{run.seed: run for run in side.runs} for side in (instruct, base)]
    seeds = [seed for seed in by_seed[0] if seed in by_seed[1]]
    pairs = [(by_seed[0][seed], by_seed[1][seed]) for seed in seeds]
    # An untouched model has no seed: one pair is all there is.
    pairs = pairs[:1] if moment == "before" else pairs
    items = _item_differences(pairs, losses, moment)
    if items is not None:
        return _interval(items, f"{_count(len(pairs), 'seed')} and {items.shape[1]} items")
    values = [
        second - first
        for a, b in pairs
        if (first := _of(_at(a, moment), "bits_per_byte")) is not None
        and (second := _of(_at(b, moment), "bits_per_byte")) is not None
    ]
    return _interval(np.array(values)[:, None], _count(len(values), "seed")) if values else None


def _gain(
    instruct: Configuration,
    base: Configuration,
    losses: Losses | None,
    untouched: Difference | None,
    tuned: Difference | None,
) -> Difference | None:
    """How much more tuning gains from instruct: the tuned difference less the untouched one."""
    if untouched is None or tuned is None:
        return None
    by_seed = [{run.seed: run for run in side.runs} for side in (instruct, base)]
    pairs = [(by_seed[0][seed], by_seed[1][seed]) for seed in by_seed[0] if seed in by_seed[1]]
    after, before = _item_differences(pairs, losses, "after"), _item_differences(pairs[:1], losses, "before")
    if after is not None and before is not None and after.shape[1] == before.shape[1]:
        return _interval(after - before, tuned.over)
    shift = untouched.value
    low, high = (None if bound is None else bound - shift for bound in (tuned.low, tuned.high))
    return Difference(tuned.value - shift, low, high, tuned.seeds, tuned.over)


def _item_differences(pairs: Sequence[tuple[RunRecord, RunRecord]], losses: Losses | None, moment: str) -> Array | None:
    """(seeds, items) of base − instruct; ``None`` where a run has no per-item values or they are of other items."""
    if losses is None or not pairs:
        return None
    rows = []
    for instruct, base in pairs:
        own, other = losses(instruct, moment), losses(base, moment)
        if own is None or other is None or own.keys() != other.keys():
            return None
        rows.append([other[item] - own[item] for item in own])
    return np.array(rows, dtype=float) if len({len(row) for row in rows}) == 1 else None


def _interval(values: Array, over: str) -> Difference:
    """The mean of (seeds, items) with its 90 % interval: over both, over the items of a single seed, or none."""
    seeds, items = values.shape
    value = float(values.mean())
    if seeds > 1:
        split = split_variance(values, np.array(np.nan), np.array(seeds - 1.0))
        half = float(stats.t.ppf((1 + INTERVAL) / 2, split.df)) * math.sqrt(float(split.variance))
    elif items > 1:
        half = float(stats.t.ppf((1 + INTERVAL) / 2, items - 1)) * float(values.std(ddof=1)) / math.sqrt(items)
        over = f"{items} items alone"
    else:
        return Difference(value, None, None, seeds, over)
    return Difference(value, value - half, value + half, seeds, over)


def _sentence(
    best: Mapping[str, Cell],
    cells: Sequence[Cell],
    untouched: Difference | None,
    gain: Difference | None,
    tuned: Difference | None,
    margin: float | None,
) -> str:
    run = best["instruct"].configuration.first
    task = run.data.task if run.data is not None else "this task"
    template = [
        f"{variant} {plain.tuned - chat.tuned:+.3g}"
        for variant in ("base", "instruct")
        for plain in cells
        for chat in cells
        if (plain.variant, plain.written, chat.variant, chat.written) == (variant, "plain", variant, "chat")
        and plain.tuned is not None
        and chat.tuned is not None
    ]
    worth = f" The chat template gains within each: {', '.join(template)}." if template else ""
    return (
        f"On {task}, for this pair of checkpoints ({best['instruct'].name} against {best['base'].name}), in bits per"
        f" byte of the answer: untouched, instruct gains {_told(untouched)}; tuning adds {_told(gain)}; after tuning"
        f" {_told(tuned)}: {verdict(tuned, margin)}.{worth} This says nothing about instruct models in general."
    )


def _told(difference: Difference | None) -> str:
    if difference is None:
        return "an unknown amount"
    if difference.low is None or difference.high is None:
        return f"{difference.value:+.3g} (no interval: {difference.over})"
    return f"{difference.value:+.3g} [90 % {difference.low:+.3g}, {difference.high:+.3g}; {difference.over}]"


def _on_validation(cell: Cell) -> float:
    return _validation_loss(cell.configuration)


def _validation_loss(configuration: Configuration) -> float:
    value = mean(_of(run.scores.after, "bits_per_byte") for run in configuration.runs)
    return math.inf if value is None else value


def _at(record: RunRecord, moment: str) -> Scores | None:
    return answering_scores(record) if moment == "after" else untouched_scores(record)


def _of(scores: Scores | None, name: str) -> float | None:
    value = getattr(scores, name) if scores is not None else None
    return value if value is not None and math.isfinite(value) else None


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def main(arguments: Sequence[str] | None = None) -> None:
    """The answer and its tables of a folder of runs; ``--page FILE`` saves the plots."""
    from qlora_exp.analysis.ask import main as ask

    ask(["instruct_base", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
