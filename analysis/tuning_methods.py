"""What should I tune? Each tuning method at its best learning rate against LoRA, paired by seed and item."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.analysis.comparable import answering_scores
from qlora_exp.analysis.configurations import Configuration, Measure, best_on_validation, known_mean, mean
from qlora_exp.analysis.contrasts import Difference, ItemScores, stratified_difference
from qlora_exp.analysis.recommendation import joint_alpha
from qlora_exp.analysis.report_content import Section, value_table
from qlora_exp.records.method_name import LORA, is_lora, method_name
from qlora_exp.records.types import RunRecord

NEVER_MERGES = "bottleneck"
FORGETTING = "forgetting"


@dataclass(frozen=True)
class MethodResult:
    """One method at the learning rate that is best for it on validation. ``None`` is unknown."""

    name: str
    configuration: Configuration
    rates: tuple[float, ...]
    """All learning rates with which it was run."""
    quality: Difference | None
    """How much better it is than the reference; ``None`` for the reference itself."""
    forgetting: Difference | None
    """How much less it forgets than the reference, in nats per byte."""

    @property
    def rate(self) -> float:
        return float(self.configuration.first.config["training"]["learning_rate"])

    @property
    def at_edge(self) -> str | None:
        """``smallest`` or ``largest`` if the best of several learning rates is one of these: a better one may lie
        beyond."""
        if len(self.rates) < 2:
            return None
        return {min(self.rates): "smallest", max(self.rates): "largest"}.get(self.rate)


@dataclass(frozen=True)
class MethodComparison:
    """All methods, the reference first; ``measure``: the score."""

    results: tuple[MethodResult, ...]
    measure: Measure
    chosen_on_test_rows: bool
    """The rates were chosen by the score that is shown."""
    searched_before: bool = False
    """The runs confirm a search with other seeds, which chose the rates."""

    @property
    def reference(self) -> MethodResult:
        return self.results[0]


def compare_methods(
    configurations: Sequence[Configuration],
    measure: Measure,
    items: ItemScores | None = None,
    searched_before: bool = False,
) -> MethodComparison | None:
    """Compare each method with LoRA; ``None`` if fewer than two methods have a score. Without LoRA, the first method is
    the reference.

    A method with several configurations (ranks, sizes, learning rates) takes part with the one that is best on
    validation: at equal rates the comparison would favour the method that the rate suits.
    """
    by_name: dict[str, list[Configuration]] = defaultdict(list)
    for c in configurations:
        by_name[method_name(c.first.config)].append(c)
    best = {name: found for name, own in by_name.items() if (found := best_on_validation(own, measure)) is not None}
    if len(best) < 2:
        return None
    names = sorted(best, key=lambda name: name != LORA)
    reference, results = best[names[0]], []
    for name in names:
        rates = {float(c.first.config["training"]["learning_rate"]) for c in by_name[name]}
        pair = [(best[name].runs, reference.runs)]
        quality = stratified_difference(pair, measure.name, items) if name != names[0] else None
        forgetting = stratified_difference(pair, FORGETTING, None) if name != names[0] else None
        results.append(MethodResult(name, best[name], tuple(sorted(rates)), quality, forgetting))
    searched = any(len(own) > 1 for own in by_name.values())
    on_validation = all(run.scores.test is None for c in best.values() for run in c.runs)
    return MethodComparison(tuple(results), measure, searched and on_validation, searched_before)


def method_sentence(comparison: MethodComparison) -> str:
    """Return which method is best, and what it costs against the reference, in one sentence."""
    reference, others = comparison.reference, comparison.results[1:]
    alpha = joint_alpha(len(others))
    words, best = comparison.measure.label, None
    for result in others:
        lower = _lower(result.quality, alpha)
        if lower is not None and lower > 0 and (best is None or _value(result) > _value(best)):
            best = result
    name = _shown(reference)
    if best is None or best.quality is None:
        behind = [r for r in others if (upper := _upper(r.quality, alpha)) is not None and upper < 0]
        worse = f"; {_listed([r.name for r in behind])} {'is' if len(behind) == 1 else 'are'} worse" if behind else ""
        return f"No method is shown to be better than {name} in {words}{worse}."
    state, reference_state = _state(best), _state(reference)
    ratio = state / reference_state if state and reference_state else None
    cost = f", for {ratio:.2g}× the trained weights, gradients and optimizer state" if ratio else ""
    sentence = f"{best.name} is better than {name} by {best.quality} in {words}{cost}"
    if best.forgetting is not None and best.forgetting.low is not None:
        more = -best.forgetting.value
        verb = "forgets more by" if more > 0 else "forgets less by"
        bounds = sorted(abs(bound) for bound in (best.forgetting.low, best.forgetting.high or 0.0))
        clear = best.forgetting.low > 0 or (best.forgetting.high or 0.0) < 0
        forgets = f"{verb} {abs(more):.3g} nats per byte (95 % CI {bounds[0]:.3g} to {bounds[1]:.3g})"
        sentence += f"; it {forgets}" if clear else "; a difference in forgetting isn't shown"
    return f"{sentence}."


def methods_section(comparison: MethodComparison) -> Section:
    """Return the section: the sentence, one table, and what it can't say."""
    columns = (
        *("method", ("learning rate", "figure"), ("seeds", "integer"), ("trained", "integer")),
        *(("predicted peak", "bytes"), ("measured peak", "bytes"), ("file", "bytes")),
        *((comparison.measure.words, "figure"), ("better than the first by", "figure"), ("low", "figure")),
        *(("high", "figure"), ("accuracy", "figure"), ("forgetting", "figure"), ("forgets less by", "figure")),
        *(("from", "figure"), ("to", "figure"), ("tokens/s", "figure"), "merges into one model"),
    )
    rows = []
    for result in comparison.results:
        runs, quality, forgetting = result.configuration.runs, result.quality, result.forgetting
        plans = [run.plan for run in runs]
        rows.append(
            (
                *(_shown(result), result.rate, len(runs), plans[0].trainable_parameters if plans[0] else None),
                known_mean(plan.predicted_peak_train_bytes if plan else None for plan in plans),
                known_mean(run.memory.train_working_set_bytes for run in runs),
                known_mean(run.memory.saved_bytes for run in runs),
                mean(comparison.measure.of(answering_scores(run)) for run in runs),
                *((quality.value, quality.low, quality.high) if quality else (None, None, None)),
                mean(scores.accuracy if (scores := answering_scores(run)) else None for run in runs),
                mean(_forgetting(run) for run in runs),
                *((forgetting.value, forgetting.low, forgetting.high) if forgetting else (None, None, None)),
                known_mean(run.speed.train_tokens_per_second for run in runs),
                "no" if result.name.startswith(NEVER_MERGES) else "yes",
            )
        )
    over = next((r.quality.over for r in comparison.results if r.quality is not None), "")
    caption = f"Differences are paired with {_shown(comparison.reference)}; 95 % intervals over {over}"
    return Section(
        "methods",
        "What should I tune?",
        (method_sentence(comparison),),
        (value_table(columns, rows, caption),),
        points=tuple(_limits(comparison)),
    )


def _limits(comparison: MethodComparison) -> list[str]:
    points = [
        "Each method has its own learning rate: at one rate for all, the table would show which method the rate suits."
    ]
    if all(len(result.rates) == 1 for result in comparison.results):
        points = ["At guessed rates: each method was run at one learning rate, and no search chose it."]
        if comparison.searched_before:
            points = ["Each rate is the best of the search that these runs confirm, chosen on validation, other seeds."]
    for result in comparison.results:
        if result.at_edge:
            points.append(
                f"The best rate of {result.name} is the {result.at_edge} that was tried ({result.rate:g}):"
                f" a {'lower' if result.at_edge == 'smallest' else 'higher'} one may be better."
            )
    if comparison.chosen_on_test_rows:
        points.append(
            "The rates were chosen by the scores shown here, which flatters all methods: confirm them with new seeds on"
            " test (qlora-exp confirm STUDY --each method)."
        )
    return points


def _shown(result: MethodResult) -> str:
    config = result.configuration.first.config
    return f"LoRA r = {config['lora']['r']}" if is_lora(config) else result.name


def _state(result: MethodResult) -> float | None:
    """Return the bytes of trained weights, gradients and optimizer state."""
    parts = [
        mean(getattr(run.memory, name) for run in result.configuration.runs)
        for name in ("adapter_bytes", "gradient_bytes", "optimizer_bytes")
    ]
    return None if None in parts else sum(part for part in parts if part is not None)


def _forgetting(run: RunRecord) -> float | None:
    return run.scores.forgetting.difference if run.scores.forgetting is not None else None


def _value(result: MethodResult) -> float:
    return result.quality.value if result.quality is not None else 0.0


def _upper(difference: Difference | None, alpha: float) -> float | None:
    return difference.upper(alpha) if difference is not None else None


def _lower(difference: Difference | None, alpha: float) -> float | None:
    upper = _upper(difference, alpha)
    return None if difference is None or upper is None else 2 * difference.value - upper


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
