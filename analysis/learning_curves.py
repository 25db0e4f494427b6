"""Training curves of the compared configurations, with the stopped runs faint behind them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from qlora_exp.analysis import figures
from qlora_exp.analysis.comparable import answering_scores, cell_of, finite_score, is_pilot
from qlora_exp.analysis.configurations import INTERVAL_CONFIDENCE, SAID, Configuration, Measure, known_mean
from qlora_exp.analysis.report_content import Section
from qlora_exp.records.method_name import is_lora, method_name
from qlora_exp.records.types import RunRecord, Status

Curves = Callable[[RunRecord], Mapping[int, float]]
"""Run → step → training loss, nats per token; empty if the run left no curve."""

MAX_CURVES = 8
"""Configurations whose curves are drawn; each is read from at most MAX_SEEDS files."""
MAX_SEEDS = 8
MAX_FAINT = 24
MAX_DRAWN_POINTS = 200
"""Points drawn of a curve."""
STOPPED = (Status.PRUNED, Status.DIVERGED, Status.OUT_OF_MEMORY, Status.INTERRUPTED, Status.FAILED)


def curves_section(
    configurations: Sequence[Configuration],
    records: Sequence[RunRecord],
    measure: Measure,
    first: Sequence[Configuration],
    curves: Curves | None,
) -> Section | None:
    """Return the learning curves; ``None`` if no run left one.

    Args:
        configurations: the compared ones.
        records: all runs; of these the stopped ones and the pilots are drawn faint.
        first: configurations that are drawn in any case, e.g. the one to use.
    """
    if curves is None:
        return None
    chosen = {id(c): c for c in [*first, *_best_first(configurations, measure)]}
    factors = _factors(configurations, measure)
    drawn: list[figures.CurveLine] = []
    by_configuration = [(c, _curves_of(c, curves, factors)) for c in list(chosen.values())[:MAX_CURVES]]
    sd = _pooled_log_sd([of_seeds for _, of_seeds in by_configuration])
    groups = {_group(c.first) for c, _ in by_configuration}
    several_rates = len({(_group(c.first), c.rank) for c, _ in by_configuration}) < len(by_configuration)
    for configuration, of_seeds in by_configuration:
        if of_seeds:
            drawn.append(_mean_line(configuration, of_seeds, sd, several_rates))
    answering = {run.run_id for c in configurations for run in c.runs}
    behind = [r for r in records if r.run_id not in answering and (r.status in STOPPED or is_pilot(r))]
    behind.sort(key=lambda r: r.status not in STOPPED)
    faint = list(_faint_lines([r for r in behind if _group(r) in groups][:MAX_FAINT], curves, factors))
    unit = measure.unit if measure.is_loss else "nats per token"
    figure = figures.learning_curves([*faint, *drawn], f"training loss, {unit} (lower is better)") if drawn else None
    if figure is None:
        return None
    notes = ["Mean over seeds; bands are 95 % intervals over seeds, pooled over the curves."]
    if all(not curve.low for curve in drawn):
        notes = ["One seed per curve: no interval is known."]
    if unit != "nats per token":
        notes.append(
            f"The trainer logs nats per token; the plot has {unit}, by the ratio of the two in the test scores."
        )
    if faint:
        stopped = sum(r.status in STOPPED for r in behind)
        pilots = sum(is_pilot(r) and r.status not in STOPPED for r in behind)
        kinds = [f"{count} {what}" for count, what in ((stopped, "stopped early"), (pilots, "pilots")) if count]
        shown = f", {MAX_FAINT} of them drawn" if stopped + pilots > MAX_FAINT else ""
        notes.append(f"Faint: {' and '.join(kinds)}{shown}.")
    if len(chosen) > MAX_CURVES:
        notes.append(f"{MAX_CURVES} of {len(chosen)} configurations are drawn, the best on validation first.")
    return Section("curves", "Learning curves", (" ".join(notes),), figures=(figure,), folded=False)


def _best_first(configurations: Sequence[Configuration], measure: Measure) -> list[Configuration]:
    def on_validation(configuration: Configuration) -> float:
        value = known_mean(measure.of(run.scores.after) for run in configuration.runs)
        return math.inf if value is None else -measure.sign * value

    return sorted(configurations, key=on_validation)


def _group(run: RunRecord) -> str:
    return cell_of(run)[0]


def _factors(configurations: Sequence[Configuration], measure: Measure) -> dict[tuple[str, str], float]:
    """Return cell → factor from nats per token to the measure's unit; 1 if the measure is no loss."""
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    for configuration in configurations:
        for run in configuration.runs:
            scores = answering_scores(run)
            loss, value = finite_score(scores, "loss"), measure.of(scores)
            if loss and value and measure.is_loss:
                ratios[cell_of(run)].append(value / loss)
    return {cell: float(np.mean(values)) for cell, values in ratios.items()}


def _curves_of(
    configuration: Configuration, curves: Curves, factors: Mapping[tuple[str, str], float]
) -> list[dict[int, float]]:
    found = [_scaled(curves(run), factors.get(cell_of(run), 1.0)) for run in configuration.runs[:MAX_SEEDS]]
    return [curve for curve in found if curve]


def _scaled(curve: Mapping[int, float], factor: float) -> dict[int, float]:
    steps = [step for step in sorted(curve) if math.isfinite(curve[step]) and curve[step] > 0]
    kept = steps[:: max(1, -(-len(steps) // MAX_DRAWN_POINTS))]
    return {step: curve[step] * factor for step in kept}


def _pooled_log_sd(by_configuration: Sequence[Sequence[Mapping[int, float]]]) -> tuple[float, int] | None:
    """Return the standard deviation over seeds of the logarithm of a step's loss, pooled over configurations and steps,
    and the degrees of freedom of one step; ``None`` without a second seed.

    Steps of one run are correlated, so they add no degrees of freedom.
    """
    squares, df = [], 0
    for of_seeds in by_configuration:
        if len(of_seeds) < 2:
            continue
        df += len(of_seeds) - 1
        for step in set.intersection(*(set(curve) for curve in of_seeds)):
            squares.append(float(np.var([math.log(curve[step]) for curve in of_seeds], ddof=1)))
    return (math.sqrt(float(np.mean(squares))), df) if squares and df else None


def _mean_line(
    configuration: Configuration, of_seeds: Sequence[Mapping[int, float]], sd: tuple[float, int] | None, rates: bool
) -> figures.CurveLine:
    shared = sorted(set.intersection(*(set(curve) for curve in of_seeds)))
    means = [math.exp(float(np.mean([math.log(curve[step]) for curve in of_seeds]))) for step in shared]
    tuning = f"r {configuration.rank}" if configuration.rank else method_name(configuration.first.config)
    said = "".join(f", {configuration.settings[key]}" for key in SAID if configuration.settings.get(key))
    name = f"{_group(configuration.first)}, {tuning}{said}"
    if rates:
        name += f", lr {configuration.first.config['training']['learning_rate']:.3g}"
    bounds: dict[str, Any] = {}
    if sd is not None:
        t = float(stats.t.ppf((1 + INTERVAL_CONFIDENCE) / 2, sd[1]))
        factor = math.exp(t * sd[0] / math.sqrt(len(of_seeds)))
        bounds = {"low": [mean / factor for mean in means], "high": [mean * factor for mean in means]}
    return figures.CurveLine(
        f"{name} ({len(of_seeds)} seed{'s' * (len(of_seeds) > 1)})",
        _group(configuration.first),
        configuration.rank,
        shared,
        means,
        run_id=configuration.first.run_id,
        **bounds,
    )


def _faint_lines(
    records: Sequence[RunRecord], curves: Curves, factors: Mapping[tuple[str, str], float]
) -> Iterator[figures.CurveLine]:
    named: set[str] = set()
    for record in records:
        curve = _scaled(curves(record), factors.get(cell_of(record), 1.0))
        if curve:
            name = f"{_group(record)}, {'stopped early' if record.status in STOPPED else 'pilot'}"
            rank = int(record.config["lora"]["r"]) if is_lora(record.config) else 0
            yield figures.CurveLine(
                name, _group(record), rank, list(curve), list(curve.values()), faint=True, legend=name not in named,
                run_id=record.run_id,
            )  # fmt: skip
            named.add(name)
