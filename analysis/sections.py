"""The report's sections, one function each: about a group of comparable runs, or about a whole study."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlora_exp.analysis import figures, tradeoffs
from qlora_exp.analysis.comparable import Group, answering_scores, base_model_scores
from qlora_exp.analysis.configurations import (
    PEAK_PARTS,
    Configuration,
    Estimate,
    Measure,
    known_mean,
    memory_by_part,
    memory_spread,
    mode_of,
    targets_of,
)
from qlora_exp.analysis.ladder_sections import error_rate_sentence, gains_figure
from qlora_exp.analysis.ladder_views import LadderView
from qlora_exp.analysis.quantization import LevelComparison
from qlora_exp.analysis.quantization_words import level_table
from qlora_exp.analysis.report_choice import TaskMetric, trainable_state_bytes
from qlora_exp.analysis.report_content import DisplayedValue, Section, StudyInfo, Table, value_table
from qlora_exp.formatting import bytes_text
from qlora_exp.records.method_name import is_lora, method_name
from qlora_exp.records.model_name import model_name
from qlora_exp.records.types import RunRecord, Status

MAX_ROWS = 25
"""Rows shown of a long table; the report's last table has all runs."""
MIN_TRIALS_FOR_IMPORTANCE = 10
"""Per axis; with fewer, an importance is a guess."""
NOT_SETTINGS = ("seed", "evaluation.split")
"""Axes of a ladder that are no settings of a configuration."""
QUANTIZATION_BITS = {32: ("fp32",), 16: ("fp16", "bf16"), 8: ("int8",), 4: ("nf4", "fp4")}

FEASIBILITY_COLUMNS = {
    "limit_bytes": ("memory limit", "bytes"),
    "skipped": ("not started", "integer"),
    "seconds_saved": ("training saved", "seconds"),
    "borderline": ("tried near the limit", "integer"),
    "borderline_out_of_memory": ("of these out of memory", "integer"),
    "out_of_memory": ("out of memory though predicted to fit", "integer"),
    "above_limit": ("peak above the limit", "integer"),
    "compared": ("compared", "integer"),
}


# A group of comparable runs.


def rank_section(
    configurations: Sequence[Configuration], measure: Measure, views: Sequence[LadderView], metric: TaskMetric | None
) -> Section | None:
    """Return quality by rank: in the compared measure, in the task's own metric, and what each doubling gains."""
    curve = figures.rank_curve(configurations, measure)
    plots = [gains_figure(views) if len(views) > 1 else None, curve]
    if metric is not None and metric.name != measure.name:
        plots.append(figures.rank_curve(configurations, Measure(metric.name, True), metric.tuned))
    drawn = tuple(plot for plot in plots if plot is not None)
    if not drawn:
        return None
    notes = ["Means over seeds with 95 % intervals; the variance over seeds is pooled over the configurations."]
    if all(c.quality is None or c.quality.se is None for c in configurations):
        notes = ["One seed per configuration: how much of a difference is due to the seed is unknown."]
    if metric is not None and metric.name != measure.name:
        notes.append(f"Intervals of {metric.words} are over seeds and items.")
    if curve is not None and len(curve["data"]) == figures.MAX_LINES:
        notes.append(f"At most {figures.MAX_LINES} lines are drawn, those with the most ranks.")
    if not views:
        notes.append("This describes the runs and decides nothing; qlora-exp sweep rank_doubling decides.")
    return Section("rank", "Quality by rank", (" ".join(notes),), (), drawn, folded=False)


def configurations_section(
    configurations: Sequence[Configuration],
    measure: Measure,
    metric: TaskMetric | None,
    chosen: Configuration | None,
    command: str | None,
) -> Section:
    """Return the table of the configurations, the one to use first, and how to run it."""

    def on_validation(c: Configuration) -> tuple[bool, float]:
        value = known_mean(measure.of(run.scores.after) for run in c.runs)
        return c is not chosen, math.inf if value is None else -measure.sign * value

    ordered = sorted(configurations, key=on_validation)
    estimates = [metric.tuned(c) if metric is not None and metric.name != measure.name else None for c in ordered]
    name = metric.words if metric is not None else "metric"
    columns = (
        *("configuration", ("learning rate", "figure"), ("seeds", "integer")),
        *((measure.unit, "figure"), ("low", "figure"), ("high", "figure")),
        *((name, "figure"), (f"{name}, low", "figure"), (f"{name}, high", "figure")),
        *(("trainable state", "bytes"), ("memory", "bytes"), ("tokens/s", "figure"), ("training", "seconds")),
        ("cost", "usd"),
    )
    rows: list[tuple[DisplayedValue, ...]] = [
        (
            *(c.label + (" ← use" if c is chosen else ""), c.first.config["training"]["learning_rate"], len(c.runs)),
            *(*_ends(c.quality), *_ends(estimate)),
            *(known_mean(trainable_state_bytes(run) for run in c.runs), c.memory_bytes, c.tokens_per_second),
            *(c.train_seconds, c.cost_usd),
        )
        for c, estimate in list(zip(ordered, estimates, strict=True))[:MAX_ROWS]
    ]
    caption = f"{len(rows)} of {len(ordered)} configurations, the one to use first, then by the validation score"
    table = value_table(columns, rows, f"{caption}; low and high: 95 % CI")
    commands = (command,) if command is not None else ()
    text = (f"To run {ordered[0].label} again:",) if commands else ()
    return Section(
        "configurations", "Configurations, and how to run the best", text, (table,), commands=commands, folded=False
    )


def _ends(estimate: Estimate | None) -> tuple[float | None, float | None, float | None]:
    """Return (mean, low, high); ``None`` is unknown."""
    return (None, None, None) if estimate is None else (estimate.mean, estimate.low, estimate.high)


def tradeoff_section(configurations: Sequence[Configuration], measure: Measure) -> Section:
    front = tradeoffs.front(configurations, measure)
    if not front.configurations:
        return Section("tradeoffs", "Quality, memory and speed", (str(front.why_none),))
    paragraphs = [front.why_none or _front_sentence(front)]
    if len(front.configurations) > figures.MAX_DOMINATED_POINTS:
        paragraphs.append(
            f"About {figures.MAX_DOMINATED_POINTS:,} of the dominated points are drawn; the last table has all."
        )
    statuses = front.statuses or [None] * len(front.configurations)
    unbeaten = [
        (c, c.quality, status)
        for c, status in zip(front.configurations, statuses, strict=True)
        if c.quality is not None and status is not tradeoffs.ParetoStatus.DOMINATED
    ]
    unbeaten.sort(key=lambda row: -measure.sign * row[1].mean)
    columns = (
        *("configuration", ("seeds", "integer"), (measure.words, "figure"), ("low", "figure"), ("high", "figure")),
        *(("memory", "bytes"), ("tokens/s", "figure"), ("training", "seconds"), ("cost", "usd"), "standing"),
    )
    rows = [
        (
            *(c.label, q.seeds, q.mean, q.low, q.high),
            *(c.memory_bytes, c.tokens_per_second, c.train_seconds, c.cost_usd, str(status) if status else None),
        )
        for c, q, status in unbeaten[:MAX_ROWS]
    ]
    caption = f"The best {MAX_ROWS} of {len(unbeaten)} configurations that no other clearly beats"
    table = value_table(columns, rows, caption if len(unbeaten) > MAX_ROWS else None)
    plots = tuple(figures.pareto(front, measure, axis) for axis in ("memory", "speed"))
    return Section("tradeoffs", "Quality, memory and speed", tuple(paragraphs), (table,), plots)


def _front_sentence(front: tradeoffs.Front) -> str:
    counts = Counter(front.statuses)
    noise = f"; {counts[tradeoffs.ParetoStatus.NEAR]} more are within noise of the front (95 %, over seeds)."
    if all(c.quality is None or c.quality.se is None for c in front.configurations):
        noise = ". With one seed per configuration, a place on the front may be chance."
    return (
        f"{counts[tradeoffs.ParetoStatus.FRONT]} of {len(front.configurations)} configurations are on the Pareto front:"
        f" no other beats them in quality, memory and speed at once (large marks){noise}"
    )


def equal_everything_section(
    configurations: Sequence[Configuration],
    measure: Measure,
    quantizations: LevelComparison | None,
    targets: LevelComparison | None,
) -> Section:
    """Compare quantization modes and target sets between runs that agree in everything else."""
    at_equal_size = tradeoffs.targets_at_equal_parameters(configurations, measure)
    hint = None if at_equal_size else tradeoffs.equal_parameters_hint(configurations)
    columns = (
        *("against", ("pairs", "integer"), ("gain", "figure"), ("low", "figure"), ("high", "figure")),
        *(("memory", "percent"), ("speed", "percent"), ("parameters", "percent")),
    )
    rows = [
        (
            *(f"{c.level} against {c.reference}", c.gain.seeds, c.gain.mean, c.gain.low, c.gain.high),
            *(c.memory_ratio, c.speed_ratio, c.parameters_ratio),
        )
        for c in at_equal_size
    ]
    levels = {"Quantizations, everything else equal": quantizations, "Target modules at equal rank": targets}
    known = {caption: comparison for caption, comparison in levels.items() if comparison is not None}
    tables = [level_table(comparison, f"{caption}; low and high: 95 % CI") for caption, comparison in known.items()]
    caption = "Target modules at equally many parameters; low and high: 95 % CI over pairs"
    tables += [value_table(columns, rows, caption)] if rows else []
    note = f"Gain in {measure.label}: above 0, the one named first is better."
    if not tables:
        note = "No two runs differ only in their quantization or target modules: there is nothing to compare."
    points = [
        figures.ContrastPoint(
            f"{c.level} against {c.reference}", c.difference.value, c.difference.low, c.difference.high
        )
        for comparison in known.values()
        for c in comparison.contrasts
    ]
    figure = figures.contrasts(points, f"gain, {measure.unit}<br>(above 0: the first is better)")
    return Section(
        *("equal", "Quantization and target modules, everything else equal", (note,), tuple(tables)),
        figures=(figure,) if figure else (),
        points=(hint,) if hint else (),
    )


def memory_section(configurations: Sequence[Configuration], records: Sequence[RunRecord]) -> Section:
    """Show what uses the memory, and how large weights and adapters are."""
    parts_of = memory_by_part(configurations)
    figure = figures.memory_bars(parts_of, memory_spread(configurations))
    rows = [(label, *(parts[part] for part in PEAK_PARTS)) for label, parts in parts_of.items()][:MAX_ROWS]
    by_part = value_table(("configuration", *((part, "bytes") for part in PEAK_PARTS)), rows, "Memory by part")
    tables = (by_part, _weight_sizes(records), _adapter_sizes(records))
    note = (
        "Activations are the peak of training minus the other parts; they are unknown if a process ran several trials"
        " on a CPU. Embeddings and norms stay unquantized, so measured weights are larger than parameters × bits / 8."
    )
    shown = tuple(table for table in tables if table.rows)
    return Section("memory", "Memory", (note,), shown, (figure,) if figure else ())


def _weight_sizes(records: Sequence[RunRecord]) -> Table:
    """Return the sizes of the largest model among the runs at 32, 16, 8 and 4 bits."""
    parameters = max((record.plan.total_parameters for record in records if record.plan is not None), default=None)
    measured: dict[str, float] = {}
    for record in records:
        weights, state = record.memory.base_weight_bytes, record.memory.quantization_state_bytes
        if not is_lora(record.config):
            continue  # what the run trains of the base doesn't count as the base
        if record.plan is not None and record.plan.total_parameters == parameters and weights is not None:
            measured.setdefault(mode_of(record), weights + (state or 0))
    rows: list[tuple[DisplayedValue, ...]] = []
    for bits, modes in QUANTIZATION_BITS.items():
        if parameters is not None:
            sizes = ", ".join(f"{mode} {bytes_text(measured[mode])}" for mode in modes if mode in measured)
            rows.append((f"{bits} bits", parameters * bits / 8, sizes or None))
    columns = ("weights at", ("parameters × bits / 8", "bytes"), "measured, with quantization state")
    return value_table(columns, rows, "Size of the base's weights")


def _adapter_sizes(records: Sequence[RunRecord]) -> Table:
    """Return one size per rank and target set, the smallest first."""
    sizes: dict[tuple[int, str], tuple[int, str, int, int | None]] = {}
    for record in records:
        if record.plan is not None and is_lora(record.config):
            kind = int(record.config["lora"]["r"]), targets_of(record)
            sizes.setdefault(kind, (*kind, record.plan.trainable_parameters, record.memory.adapter_bytes))
    rows = sorted(sizes.values(), key=lambda size: size[2])[:MAX_ROWS]
    columns = (("r", "integer"), "targets", ("parameters", "integer"), ("adapter", "bytes"))
    return value_table(columns, rows, "Size of the adapters")


def speed_section(records: Sequence[RunRecord]) -> Section:
    by_kind: dict[tuple[str, str], list[RunRecord]] = defaultdict(list)
    for record in records:
        device = record.environment.device
        by_kind[mode_of(record), device.name or device.kind].append(record)
    names = ("train_tokens_per_second", "step_seconds_p50", "train_seconds", "cost_usd")
    rows = [
        (mode, device, len(runs), *(known_mean(getattr(run.speed, name) for run in runs) for name in names))
        for (mode, device), runs in by_kind.items()
    ]
    columns = (
        *("quantization", "device", ("runs", "integer"), ("tokens/s", "figure"), ("seconds a step, median", "figure")),
        *(("training", "seconds"), ("cost", "usd")),
    )
    notes = [
        "Means over runs; the first steps, evaluation and saving are not counted. Compare runs on one device only, and"
        " only if nothing else ran on it."
    ]
    # Older records have a single price.
    plans = [record.plan for record in records if record.plan is not None and record.plan.usd_per_hour is not None]
    prices = sorted({(str(plan.usd_per_hour_from), plan.usd_per_hour or 0.0) for plan in plans})
    if prices:
        priced = ", ".join(f"{price:g} USD ({source})" for source, price in prices)
        notes.append(f"Costs: all seconds of a run, including loading and scoring, at the price per hour: {priced}.")
    return Section("speed", "Speed and cost", tuple(notes), (value_table(columns, rows),))


# Whole studies.


def importance_section(studies: Sequence[StudyInfo], completed: Sequence[RunRecord]) -> Section | None:
    importances = [
        (objective, of_settings)
        for study in studies
        for objective, shares in study.importance.items()
        if (of_settings := _of_settings(shares))
    ]
    if not importances:
        return None
    rows = [(objective, axis, share) for objective, shares in importances for axis, share in shares.items()]
    axes = max(len(shares) for _, shares in importances)
    note = (
        "Share of the objective's variance over the trials that each axis explains (fANOVA). It describes this"
        " search, not what would matter elsewhere."
    )
    points, trials = [], len(completed)
    formats = {record.plan.format for record in completed if record.plan}
    if any(".loss" in objective for objective, _ in importances) and len(formats) > 1:
        points.append("A loss counts end tokens, which depend on the format: they cause a part of the format's share.")
    if trials < MIN_TRIALS_FOR_IMPORTANCE * axes:
        points.append(
            f"{trials} trials for {axes} axes are too few to trust: run at least {MIN_TRIALS_FOR_IMPORTANCE} an axis."
        )
    if any("decision" in answer for study in studies for answer in study.ladders):
        points.append("A ladder's trials don't cover the axes evenly: rank and learning rate change together.")
    columns = ("objective", "axis", ("share", "percent"))
    return Section("importance", "What mattered", (note,), (value_table(columns, rows),), points=tuple(points))


def _of_settings(shares: Mapping[str, float]) -> dict[str, float]:
    """Return the shares without those of seed and split, which nobody chooses; importance.json of earlier versions has
    them."""
    kept = {axis: share for axis, share in shares.items() if axis not in NOT_SETTINGS}
    total = sum(kept.values())
    return {axis: share / total for axis, share in kept.items()} if total > 0 else {}


def failure_section(records: Sequence[RunRecord]) -> Section:
    ended = [r for r in records if r.status.ended and r.status is not Status.COMPLETED]
    if not ended:
        all_ended = all(r.status.ended for r in records)
        summary = "Every run completed." if all_ended else "Every run that has ended completed."
        return Section("failures", "Failures", (summary,))
    by_status: dict[Status, list[RunRecord]] = defaultdict(list)
    for record in records:
        by_status[record.status].append(record)
    seconds = {s: sum(run.speed.total_seconds or 0.0 for run in runs) for s, runs in by_status.items()}
    total = sum(seconds.values())
    rows = []
    for status, runs in by_status.items():
        costs = [run.speed.cost_usd for run in runs if run.speed.cost_usd is not None]
        share = seconds[status] / total if total else None
        rows.append((str(status), len(runs), seconds[status], share, sum(costs) if costs else None))
    columns = ("status", ("runs", "integer"), ("time", "seconds"), ("of all time", "percent"), ("cost", "usd"))
    tables = [value_table(columns, rows)]
    kinds: Counter[tuple[str, str]] = Counter()
    for record in ended:
        if record.failure is not None:
            first_line = (record.failure.message.splitlines() or [""])[0]
            kinds[record.status.value, f"{record.failure.kind}: {first_line}"[:200]] += 1
    reasons = [(status, why, count) for (status, why), count in kinds.most_common(MAX_ROWS)]
    tables += [value_table(("status", "why", ("runs", "integer")), reasons, "Reasons")] if reasons else []
    wasted = sum(record.speed.total_seconds or 0.0 for record in ended)
    summary = f"{len(ended)} of {len(records)} runs did not complete; they took {wasted / 60:,.1f} minutes."
    return Section("failures", "Failures and what they cost", (summary,), tuple(tables))


def feasibility_section(studies: Sequence[StudyInfo]) -> Section | None:
    """Show which trials were skipped, and how often the prediction was wrong; ``None`` if no study has a memory
    limit."""
    limited = [study for study in studies if study.predicted_memory]
    if not limited:
        return None
    rows = [(study.name, *(study.predicted_memory.get(key) for key in FEASIBILITY_COLUMNS)) for study in limited]
    point = (
        "Whether a trial that was not started would have fitted after all is unknown. The time saved is its"
        " predicted training time; it might have run out of memory sooner."
    )
    return Section(
        "feasibility",
        "Trials that would not have fitted",
        tuple(f"{study.predicted_memory['sentence']}." for study in limited),
        (value_table(("study", *FEASIBILITY_COLUMNS.values()), rows),),
        points=(point,),
    )


def method_section(
    groups: Sequence[Group], records: Sequence[RunRecord], measure: Measure | None, views: Sequence[LadderView]
) -> Section:
    rows: list[tuple[str, str]] = []
    if measure is not None:
        rows.append(("quality", f"{measure.label}, {'higher' if measure.higher_is_better else 'lower'} is better"))
    rows += [("error rates", rates)] if (rates := error_rate_sentence(views)) else []
    for number, group in enumerate(groups[:3], start=1):
        p = group.protocol
        rows += [
            (f"protocol {number}" if len(groups) > 1 else "protocol", f"{len(group.records)} finished runs"),
            ("task", f"{p.task}: {p.train_items} training items, {len(p.labels)} labels"),
            ("scored on", f"{p.scored_items} items of the {p.split} split"),
            ("training", f"{p.max_steps} steps × {p.batch_size}; adapters in {p.adapter_dtype}"),
        ]
    finished = [record for group in groups for record in group.records]
    environments = [record.environment for record in finished]
    commits = [
        e.git_commit[:10] + (" (with changes)" if e.git_dirty else "") for e in environments if e.git_commit is not None
    ]
    rows += [
        ("seeds", ", ".join(sorted({str(r.seed) for r in finished}, key=lambda s: (len(s), s))[:MAX_ROWS])),
        ("devices", _most_common(e.device.name or e.device.kind for e in environments)),
    ]
    for package in ("qlora-exp", "torch", "transformers", "peft", "trl", "bitsandbytes"):
        rows.append((package, _most_common(e.packages.get(package) for e in environments)))
    rows.append(("git commit", _most_common(commits)))
    warned = Counter(warning for record in records for warning in record.warnings)
    points = tuple(f"{warning} ({count} runs)" for warning, count in warned.most_common(10))
    return Section("method", "How it was measured", (), (value_table(("what", "how"), rows),), points=points)


def _most_common(values: Iterable[str | None]) -> str:
    counts = Counter(value for value in values if value is not None)
    return ", ".join(value for value, _ in counts.most_common(4)) + (", …" if len(counts) > 4 else "")


def table_of_runs(records: Sequence[RunRecord]) -> Table:
    """Return the table of all runs, with raw values."""
    columns = (
        *("run", "status", "study", ("trial", "integer"), "model", "variant", "format", "quantization"),
        *(("r", "integer"), ("alpha", "figure"), "targets", ("learning rate", "figure"), ("seed", "integer"), "split"),
        *(("loss per item", "figure"), ("accuracy", "figure"), ("base accuracy", "figure")),
        *(("bits/byte", "figure"), ("forgetting", "figure"), ("parameters", "integer"), ("weights", "bytes")),
        *(("model state", "bytes"), ("peak memory", "bytes"), ("predicted need", "bytes"), ("memory bound", "bytes")),
        *(("tokens/s", "figure"), ("training", "seconds"), ("total", "seconds"), ("cost", "usd")),
    )
    return value_table(columns, [_run_row(record) for record in records], keep_empty=True)


def _tuning(record: RunRecord) -> tuple[DisplayedValue, DisplayedValue, DisplayedValue]:
    """Return rank, alpha and targets; or another method's name in the last column."""
    if not is_lora(record.config):
        return None, None, method_name(record.config)
    return record.config["lora"]["r"], record.plan.alpha if record.plan else None, targets_of(record)


def _run_row(record: RunRecord) -> tuple[DisplayedValue, ...]:
    config, plan, speed, memory, fit = record.config, record.plan, record.speed, record.memory, record.fit
    scores, before = answering_scores(record), base_model_scores(record)
    return (
        *(record.run_id, record.status.value, record.trial.study if record.trial else None),
        record.trial.number if record.trial else None,
        *(model_name(config["model"]), config["model"]["variant"], plan.format if plan else None),
        *(config["quantization"]["mode"], *_tuning(record)),
        *(config["training"]["learning_rate"], record.seed, scores.split if scores else None),
        *(scores.loss_per_item if scores else None, scores.accuracy if scores else None),
        *(before.accuracy if before else None, scores.bits_per_byte if scores else None),
        record.scores.forgetting.difference if record.scores.forgetting else None,
        *(plan.trainable_parameters if plan else None, memory.base_weight_bytes, memory.model_state_bytes),
        *(memory.peak_train_bytes, fit.corrected_bytes if fit else None, fit.limit_bytes if fit else None),
        *(speed.train_tokens_per_second, speed.train_seconds, speed.total_seconds, speed.cost_usd),
    )


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "unknown"
