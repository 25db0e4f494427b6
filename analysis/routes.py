"""Which way to a small model? The model that ships by each way against the tuned model that isn't rounded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.analysis.comparable import answering_scores
from qlora_exp.analysis.configurations import Configuration, Measure, best_on_validation, known_mean, mean, mode_of
from qlora_exp.analysis.contrasts import Difference, ItemScores, stratified_difference
from qlora_exp.analysis.recommendation import joint_alpha
from qlora_exp.analysis.report_content import Section, value_table
from qlora_exp.config.allowed_values import QUANTIZED
from qlora_exp.records.method_name import LORA, method_name
from qlora_exp.records.types import RunRecord

ROUNDED_MODES = {mode.value for mode in QUANTIZED}


@dataclass(frozen=True)
class RouteResult:
    """One way; ``difference``: how much better the model that ships is than the reference, ``None`` for itself."""

    name: str
    configuration: Configuration
    difference: Difference | None

    @property
    def shipped_bytes(self) -> float | None:
        """Packed weights; of a model that isn't rounded its weights in 16 bits."""
        sizes = [run.shipped.bytes if run.shipped is not None else _in_16_bits(run) for run in self.configuration.runs]
        return mean(sizes)


@dataclass(frozen=True)
class RouteComparison:
    """All ways, the reference first."""

    results: tuple[RouteResult, ...]
    measure: Measure


def route_of(record: RunRecord) -> str:
    """Return how a run comes to the model that ships, e.g. ``LoRA on nf4, merged, int4_asym_g64``."""
    method = method_name(record.config)
    name = "LoRA" if method == LORA else method
    mode = mode_of(record)
    if record.shipped is None:
        return f"{name} on {mode}, not rounded" if mode not in ROUNDED_MODES else f"{name} on {mode}"
    if ((record.config.get("training") or {}).get("qat") or {}).get("format") is not None:
        return f"{name} with QAT, {record.shipped.format}"
    words = {"trained": "as trained", "merged": "merged", "merged_into_dequantized": f"merged into {mode}"}
    rounded = f", {record.shipped.format}" if record.shipped.format is not None else ""
    return f"{name} on {mode}, {words[record.shipped.model]}{rounded}"


def compare_routes(
    configurations: Sequence[Configuration], measure: Measure, items: ItemScores | None = None
) -> RouteComparison | None:
    """Compare what ships by each way with the tuned model that isn't rounded; ``None`` without such runs.

    A way with several configurations takes part with the one that is best on validation.
    """
    by_name: dict[str, list[Configuration]] = defaultdict(list)
    for c in configurations:
        by_name[route_of(c.first)].append(c)
    best = {name: found for name, own in by_name.items() if (found := best_on_validation(own, measure)) is not None}
    exact = [name for name, c in best.items() if c.first.shipped is None and mode_of(c.first) not in ROUNDED_MODES]
    if not exact or not any(c.first.shipped is not None for c in best.values()):
        return None
    names = sorted(best, key=lambda name: name != exact[0])
    reference = best[exact[0]]
    results = []
    for name in names:
        pair = [(best[name].runs, reference.runs)]
        difference = stratified_difference(pair, measure.name, items) if name != exact[0] else None
        results.append(RouteResult(name, best[name], difference))
    return RouteComparison(tuple(results), measure)


def route_sentence(comparison: RouteComparison) -> str:
    """Return which rounded model loses least against the exact one, and which ones are shown to be worse than it."""
    others = [r for r in comparison.results[1:] if r.difference is not None and r.configuration.first.shipped]
    if not others:
        return "No way to a rounded model was scored."
    best = max(others, key=lambda result: result.difference.value if result.difference is not None else 0.0)
    assert best.difference is not None
    difference, unit = best.difference, comparison.measure.label
    if difference.low is not None and difference.low > 0:
        how = f"it is better by {difference} in {unit}"
    elif difference.high is not None and difference.high < 0:
        how = f"it is worse by {_loss(difference)} in {unit}"
    else:
        how = f"a difference isn't shown ({difference} in {unit}; above 0 it would be better)"
    size = _ratio(best, comparison.results[0])
    sentence = f"{best.name} comes closest to {comparison.results[0].name}: {how}"
    sentence += f", at {100 * size:.0f} % of its size" if size is not None else ""
    alpha = joint_alpha(len(others))
    worse = [
        result.name
        for result in others
        if result is not best and result.difference is not None and (_upper(result.difference, alpha) or 0.0) < 0
    ]
    return f"{sentence}. Shown to be worse than the exact model: {', '.join(worse) or 'none'}."


def routes_section(comparison: RouteComparison) -> Section:
    """Return the section: the sentence, one table, and what it can't say."""
    columns = (
        *(
            "way",
            ("seeds", "integer"),
            ("predicted peak", "bytes"),
            ("measured peak", "bytes"),
            ("shipped", "bytes"),
            ("bits per weight", "figure"),
        ),
        *((comparison.measure.words, "figure"), ("better than the first by", "figure"), ("low", "figure")),
        *(("high", "figure"), ("accuracy", "figure"), ("forgetting", "figure"), ("before rounding", "figure")),
    )
    rows = []
    for result in comparison.results:
        runs, difference = result.configuration.runs, result.difference
        shipped = runs[0].shipped
        rows.append(
            (
                *(result.name, len(runs)),
                known_mean(run.plan.predicted_peak_train_bytes if run.plan else None for run in runs),
                known_mean(run.memory.train_working_set_bytes for run in runs),
                *(result.shipped_bytes, shipped.bits_per_weight if shipped is not None else None),
                mean(comparison.measure.of(answering_scores(run)) for run in runs),
                *((difference.value, difference.low, difference.high) if difference else (None, None, None)),
                mean(scores.accuracy if (scores := answering_scores(run)) else None for run in runs),
                mean(run.scores.forgetting.difference if run.scores.forgetting else None for run in runs),
                mean(comparison.measure.of(run.scores.trained_test or run.scores.trained) for run in runs),
            )
        )
    over = next((r.difference.over for r in comparison.results if r.difference is not None), "")
    return Section(
        "routes",
        "Which way to a small model?",
        (route_sentence(comparison),),
        (value_table(columns, rows, f"Differences are paired with the first way; 95 % intervals over {over}"),),
        points=(
            "Sizes count packed weights, scales and zero points by formula; embeddings, head and norms in 16 bits."
            " qlora-exp export writes files of GGUF's types and measures them.",
            "All ways have the same learning rate: the best one may differ between them.",
            "The first sentence names the closest of several ways: its interval doesn't count that choice.",
        ),
    )


def _in_16_bits(run: RunRecord) -> float | None:
    return 2.0 * run.plan.total_parameters if run.plan is not None else None


def _ratio(result: RouteResult, reference: RouteResult) -> float | None:
    size, whole = result.shipped_bytes, reference.shipped_bytes
    return size / whole if size is not None and whole else None


def _upper(difference: Difference, alpha: float) -> float | None:
    return difference.upper(alpha)


def _loss(difference: Difference) -> str:
    size = f"{abs(difference.value):.3g}"
    if difference.low is None or difference.high is None:
        return f"{size} (no interval: {difference.over})"
    sign = 1.0 if difference.value > 0 else -1.0
    low, high = sorted((sign * difference.low, sign * difference.high))
    return f"{size} (95 % CI {low:.3g} to {high:.3g}, {difference.over})"
