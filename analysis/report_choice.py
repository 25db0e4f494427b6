"""What to use: the chosen configuration, its score in the task's own metric, and the report's first line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_exp.analysis.comparable import answering_scores, base_model_scores, finite_score
from qlora_exp.analysis.configurations import (
    SAID,
    Configuration,
    Estimate,
    Measure,
    best_on_validation,
    known_mean,
    mode_of,
    pooled_sd,
    targets_of,
    variant_of,
)
from qlora_exp.analysis.ladder_views import LadderStep, LadderView
from qlora_exp.analysis.margin import TASK_METRICS
from qlora_exp.formatting import bytes_text
from qlora_exp.records.method_name import method_name
from qlora_exp.records.types import RunRecord, Scores


@dataclass(frozen=True)
class TaskMetric:
    """The task's own metric over the compared configurations. ``sd`` and ``df``: over seeds, pooled over these."""

    name: str
    sd: float | None
    df: int

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")

    def tuned(self, configuration: Configuration) -> Estimate | None:
        """Return the tuned model's metric."""
        return self._estimate([answering_scores(run) for run in configuration.runs], self.sd)

    def before(self, configuration: Configuration) -> Estimate | None:
        """Return the base model's metric before tuning; it has no seed."""
        return self._estimate([base_model_scores(configuration.first)], 0.0)

    def with_examples(self, configuration: Configuration) -> Estimate | None:
        """Return the base model's metric with worked examples, over draws and items."""
        run = configuration.first
        scores = [draw.test if run.scores.test is not None else draw.validation for draw in run.scores.few_shot]
        values = [value for one in scores if (value := finite_score(one, self.name)) is not None]
        sd, df = pooled_sd([values])
        return replace(self, sd=sd, df=df)._estimate(scores, sd) if values else None

    def _estimate(self, scores: Sequence[Scores | None], seed_sd: float | None) -> Estimate | None:
        """Return the mean over seeds and its standard error over seeds and items.

        The items' part is p·(1 − p) / items: exact for a score of 0 or 1 an item, and an upper bound for one between.
        """
        values = [value for one in scores if (value := finite_score(one, self.name)) is not None]
        items = min((one.items for one in scores if one is not None), default=0)
        if not values or not items:
            return None
        mean = math.fsum(values) / len(values)
        item_variance = max(mean * (1 - mean), 0.0) / items
        seed_variance = (seed_sd or 0.0) ** 2 / len(values)
        variance = item_variance + seed_variance
        # Welch–Satterthwaite; the items, of which there are many, have infinite degrees of freedom.
        df = variance**2 / seed_variance**2 * self.df if seed_variance > 0 else math.inf
        return Estimate(mean, len(values), math.sqrt(variance), df)


def task_metric_of(configurations: Sequence[Configuration]) -> TaskMetric | None:
    """Return the task's own metric: the first that every configuration has; ``None`` if only losses were scored."""
    for name in TASK_METRICS:
        values = [
            [value for run in c.runs if (value := finite_score(answering_scores(run), name)) is not None]
            for c in configurations
        ]
        if values and all(values):
            return TaskMetric(name, *pooled_sd(values))
    return None


def difference_from_baseline(tuned: Estimate, baseline: float, items: int) -> Estimate:
    """Return the tuned accuracy minus a baseline's on the same items.

    The records don't have the baseline's answers, so the variances are added as those of unpaired samples: too wide if
    the two find the same items easy.
    """
    assert tuned.se is not None
    assert tuned.df is not None
    of_baseline = baseline * (1 - baseline) / items
    variance = tuned.se**2 + of_baseline
    df = variance**2 / (tuned.se**4 / tuned.df) if tuned.se and math.isfinite(tuned.df) else math.inf
    return Estimate(tuned.mean - baseline, tuned.seeds, math.sqrt(variance), df)


# What to use.


@dataclass(frozen=True)
class ChosenConfiguration:
    """The configuration to use, and the ladder that chose its rank, if one did."""

    configuration: Configuration
    ladder: LadderView | None


def choose(
    configurations: Sequence[Configuration], ladders: Sequence[LadderView], measure: Measure
) -> ChosenConfiguration | None:
    """Return what to use: each ladder's rank to use, and of these (without ladders, of all) the best on validation.

    The test split, on which the choice is then scored, chooses nothing. ``None`` without a score.
    """
    picks = ladder_picks(configurations, ladders, measure)
    best = best_on_validation([pick.configuration for pick in picks] or configurations, measure)
    if best is None:
        return None
    return next((pick for pick in picks if pick.configuration is best), ChosenConfiguration(best, None))


def ladder_picks(
    configurations: Sequence[Configuration], ladders: Sequence[LadderView], measure: Measure
) -> list[ChosenConfiguration]:
    """Return the configuration at each ladder's rank to use; of several learning rates the best on validation."""
    picks = []
    for view in ladders:
        runs = {run.run_id for run in view.runs}
        at_rank = [c for c in configurations if c.rank == view.use_rank and any(run.run_id in runs for run in c.runs)]
        best = best_on_validation(at_rank, measure)
        if best is not None:
            picks.append(ChosenConfiguration(best, view))
    return picks


def use_sentence(choice: ChosenConfiguration, configurations: Sequence[Configuration], measure: Measure) -> str:
    """Return the report's first line: variant, rank, quantization, learning rate, score with interval, cost, and what a
    doubling of the rank gains."""
    chosen = choice.configuration
    rate = chosen.first.config["training"]["learning_rate"]
    targets = {targets_of(c.first) for c in configurations}
    settings = [
        variant_of(chosen),
        *([f"{chosen.settings['format']} prompts"] if chosen.settings.get("format") else []),
        f"r = {chosen.rank}" if chosen.rank else method_name(chosen.first.config),
        mode_of(chosen.first),
        *([targets_of(chosen.first)] if len(targets) > 1 and chosen.rank else []),
        *(str(chosen.settings[key]) for key in SAID if chosen.settings.get(key)),
        f"learning rate {rate:.4g}",
    ]
    return f"Use {', '.join(settings)}: {'; '.join(_results(choice, configurations, measure))}."


def is_search_on_validation(choice: ChosenConfiguration, configurations: Sequence[Configuration], split: str) -> bool:
    """Return whether the configuration was chosen among several by the very scores that are shown."""
    return choice.ladder is None and len(configurations) > 1 and split != "test"


def hedged_sentence(line: str, configurations: Sequence[Configuration], confirm: str | None) -> str:
    """Return the first line of a search on validation: what is best so far, and why that isn't sure.

    Example: ``Best on validation, not confirmed: base, r = 8 …; chosen among 12 configurations with one seed each, so
    the score is optimistic. To confirm it: qlora-exp confirm STUDY``
    """
    counts = sorted({len(c.runs) for c in configurations})
    seeds = (
        "one seed" if counts == [1] else f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]}–{counts[-1]} seeds"
    )
    best = line.removeprefix("Use ").removesuffix(".").replace(": ", "; ", 1)
    chosen = f"chosen among {len(configurations)} configurations with {seeds} each, so the score is optimistic"
    return f"Best on validation, not confirmed: {best}; {chosen}." + (f" To confirm it: {confirm}" if confirm else "")


def _results(choice: ChosenConfiguration, configurations: Sequence[Configuration], measure: Measure) -> list[str]:
    chosen, metric = choice.configuration, task_metric_of(configurations)
    estimate = metric.tuned(chosen) if metric is not None else chosen.quality
    scores = answering_scores(chosen.first)
    items = scores.items if scores is not None else 0
    parts = []
    if estimate is not None:
        name = metric.words if metric is not None else measure.label
        parts.append(f"{name} {with_interval(estimate, items if metric is not None else None)}")
    state = known_mean(trainable_state_bytes(run) for run in chosen.runs)
    if state is not None:
        parts.append(f"{bytes_text(state)} of trainable state")
    step = choice.ladder.deciding_step if choice.ladder is not None else None
    if choice.ladder is not None and step is not None:
        which = "doubling r gains" if step.doublings == 1 else f"r = {step.to_rank} gains"
        if step.from_rank != choice.ladder.use_rank:
            which = f"the last doubling, {step.name}, gained" if step.doublings == 1 else f"{step.name} gained"
        parts.append(f"{which} {gain_words(choice.ladder, step)}")
    return parts


def with_interval(estimate: Estimate, items: int | None = None, digits: int = 3) -> str:
    """Return e.g. ``0.46 (95 % CI 0.43 to 0.49, 5 seeds and 500 items)``.

    Args:
        items: items that the interval is over, besides seeds; an infinite ``df`` then means items alone.
    """
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.{digits}g} (no interval: one seed)"
    seeds = f"{estimate.seeds} seed{'s' * (estimate.seeds > 1)}"
    over = seeds
    if items:
        over = f"{items:,} items alone: one seed" if estimate.df == math.inf else f"{seeds} and {items:,} items"
    return f"{estimate.mean:.{digits}g} (95 % CI {estimate.low:.{digits}g} to {estimate.high:.{digits}g}, {over})"


def trainable_state_bytes(run: RunRecord) -> float | None:
    """Return adapter + gradients + optimizer; ``None`` if one is unknown."""
    memory = run.memory
    parts = (memory.adapter_bytes, memory.gradient_bytes, memory.optimizer_bytes)
    known = [part for part in parts if part is not None]
    return float(sum(known)) if len(known) == len(parts) else None


def gain_words(view: LadderView, step: LadderStep) -> str:
    """Return e.g. ``+2.1 % of the loss (95 % CI +1.0 to +3.6 %)``."""
    words = f"{view.text(step.gain)} {view.unit}"
    if step.low is None or step.high is None:
        return f"{words} (no interval)"
    return f"{words} (95 % CI {view.text(step.low).removesuffix(' %')} to {view.text(step.high)})"
