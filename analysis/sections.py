"""The report's sections, one function each: about a group of comparable runs, or about a whole study."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlora_exp.analysis import figures, tradeoffs
from qlora_exp.analysis.comparable import Group, answering_scores, base_model_scores
from qlora_exp.analysis.configurations import (
    PEAK_PARTS,
    Configuration,
    Measure,
    known_mean,
    memory_by_part,
    mode_of,
    targets_of,
)
from qlora_exp.analysis.quantization import LevelComparison
from qlora_exp.analysis.quantization_words import quantization_recommendation, quantization_table
from qlora_exp.analysis.report_content import DisplayedValue, Section, StudyInfo, Table, formatted_value, value_table
from qlora_exp.formatting import bytes_text
from qlora_exp.records.types import RunRecord, Status

MAX_ROWS = 25
"""Rows shown of a long table; the report's last table has all runs."""
MIN_TRIALS_FOR_IMPORTANCE = 10
"""Per axis; with fewer, an importance is a guess."""
MAX_ERROR_RATE, MAX_ERROR_RATE_WITH_GROWING_NOISE = 0.05, 0.06
"""Shares of simulated ladders with a wrong answer: the largest in docs/calibration.md, rounded up."""
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


# Ladders.


def ladders_of(studies: Sequence[StudyInfo]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (name, answer) of each ladder that compares ranks."""
    return [
        (", ".join(f"{key}={value}" for key, value in (answer.get("axes") or {}).items()) or study.name, answer)
        for study in studies
        for answer in study.ladders
        if "decision" in answer
    ]


def ladder_sections(studies: Sequence[StudyInfo]) -> list[Section]:
    ladders = ladders_of(studies)
    columns = ("doubling", "decision", ("gain", "figure"), ("low", "figure"), ("high", "figure"))
    sections = []
    for number, (name, answer) in enumerate(ladders, start=1):
        figure = figures.ladder(answer)
        rows = [
            (f"{step.get('from_rank')} → {step.get('to_rank')}", *map(step.get, ("decision", "gain", "low", "high")))
            for step in answer.get("comparisons") or []
        ]
        sentence = str(answer.get("sentence") or f"The ladder's answer: {answer['decision']}.")
        more = (_ladder_cost(answer), error_rate_sentence(answer))
        section = Section(
            name=f"ladder-{number}",
            title="Rank doubling" + (f": {name}" if len(ladders) > 1 else ""),
            paragraphs=(sentence, *(text for text in more if text is not None)),
            tables=(value_table(columns, rows, f"margin {_figure(answer.get('margin'))}"),) if rows else (),
            figures=(figure,) if figure else (),
            points=tuple(str(warning) for warning in answer.get("warnings") or []),
        )
        sections.append(section)
    return sections


def _ladder_cost(answer: Mapping[str, Any]) -> str | None:
    """Return what the ladder cost and was decided from; ``None`` if the answer doesn't have it."""
    spent, seeds, items = answer.get("spent") or {}, answer.get("seeds") or {}, answer.get("items")
    if not spent:
        return None
    usd = f", {formatted_value(spent['cost_usd'], 'usd')}" if spent.get("cost_usd") is not None else ""
    stopped = f" ({spent['pilots_stopped']} stopped early)" if spent.get("pilots_stopped") else ""
    runs = f"{spent['runs']} runs, {spent['pilots']} of them pilots{stopped}"
    summary = f"{runs}, took {spent['seconds'] / 60:,.1f} minutes{usd}."
    if seeds and items:
        summary += (
            f" Decided from {items} test items and {', '.join(f'{n} seeds at r = {r}' for r, n in seeds.items())}."
        )
    return summary


def error_rate_sentence(answer: Mapping[str, Any]) -> str | None:
    """Return how to read a ladder's interval, and how often its answers are wrong; ``None`` if nothing was decided."""
    margin, zone = answer.get("margin"), answer.get("half_zone")
    if margin is None or zone is None or not answer.get("comparisons"):
        return None
    return (
        f"How sure: the answer is continue if the lower bound of a gain is above {margin - zone:.4g}, and stop if the"
        f" upper bound is below {margin + zone:.4g}. Of simulated ladders, at most {100 * MAX_ERROR_RATE:g} % got a"
        f" wrong answer, {100 * MAX_ERROR_RATE_WITH_GROWING_NOISE:g} % if the seeds' noise grows with the rank"
        " (docs/calibration.md)."
    )


def undecided_ladders(studies: Sequence[StudyInfo]) -> list[str]:
    """Return what each undecided ladder leaves open, and what would settle it."""
    points = []
    for name, answer in ladders_of(studies):
        if answer["decision"] == "inconclusive" and answer.get("comparisons"):
            last = answer["comparisons"][-1]
            step = f"whether r = {last['to_rank']} is worth its cost over r = {last['from_rank']}"
            points.append(f"{name}: it is not settled {step}. {answer.get('would_settle') or ''}".rstrip())
    return points


# A group of comparable runs.


def rank_section(configurations: Sequence[Configuration], measure: Measure, with_ladder: bool) -> Section | None:
    figure = figures.rank_curve(configurations, measure)
    if figure is None:
        return None
    note = "Means over seeds; bars are 95 % intervals from the variance over seeds, pooled over the configurations."
    if all(c.quality is None or c.quality.se is None for c in configurations):
        note = "One seed per configuration: how much of a difference is due to the seed is unknown."
    if len(figure["data"]) == figures.MAX_LINES:
        note += f" At most {figures.MAX_LINES} lines are drawn, those with the most ranks."
    if not with_ladder:
        note += " This describes the runs and decides nothing; qlora-exp sweep rank_doubling decides."
    return Section("rank", "Quality by rank", (note,), (), (figure,))


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
    configurations: Sequence[Configuration], measure: Measure, quantizations: LevelComparison | None
) -> Section:
    """Compare quantization modes and target sets between runs that agree in everything else."""
    at_equal_size = tradeoffs.targets_at_equal_parameters(configurations, measure)
    hint = None if at_equal_size else tradeoffs.equal_parameters_hint(configurations)
    comparisons = {
        "Target modules at equal rank": tradeoffs.target_contrasts(configurations, measure),
        "Target modules at equally many parameters": at_equal_size,
    }
    columns = (
        *("against", ("pairs", "integer"), ("gain", "figure"), ("low", "figure"), ("high", "figure")),
        *(("memory", "percent"), ("speed", "percent"), ("parameters", "percent")),
    )
    tables = [] if quantizations is None else [quantization_table(quantizations)]
    for caption, contrasts in comparisons.items():
        rows = [
            (
                *(f"{c.level} against {c.reference}", c.gain.seeds, c.gain.mean, c.gain.low, c.gain.high),
                *(c.memory_ratio, c.speed_ratio, c.parameters_ratio),
            )
            for c in contrasts
        ]
        tables += [value_table(columns, rows, caption)] if rows else []
    note = (
        f"Gain in {measure.label}: above 0, the one named first is better. Target modules are paired by configuration"
        " and seed; the 95 % interval is over these pairs, on these items."
    )
    paragraphs: tuple[str, ...] = (note,)
    if quantizations is not None:
        paragraphs = (quantization_recommendation(quantizations).sentence, note)
    if not tables:
        paragraphs = ("No two runs differ only in their quantization or target modules: there is nothing to compare.",)
    return Section("equal", "At equal everything else", paragraphs, tuple(tables), points=(hint,) if hint else ())


def memory_section(configurations: Sequence[Configuration], records: Sequence[RunRecord]) -> Section:
    """Show what uses the memory, and how large weights and adapters are."""
    parts_of = memory_by_part(configurations)
    figure = figures.memory_bars(parts_of)
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
        if record.plan is not None:
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
    importances = [(objective, shares) for study in studies for objective, shares in study.importance.items() if shares]
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
    if ladders_of(studies):
        points.append("A ladder's trials don't cover the axes evenly: rank and learning rate change together.")
    columns = ("objective", "axis", ("share", "percent"))
    drawn = tuple(figures.importance_bars(shares) for _, shares in importances)
    return Section("importance", "What mattered", (note,), (value_table(columns, rows),), drawn, tuple(points))


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
    groups: Sequence[Group], records: Sequence[RunRecord], measure: Measure | None, studies: Sequence[StudyInfo]
) -> Section:
    rows: list[tuple[str, str]] = []
    if measure is not None:
        rows.append(("quality", f"{measure.label}, {'higher' if measure.higher_is_better else 'lower'} is better"))
    margins = []
    for _, answer in ladders_of(studies):
        zone = answer.get("half_zone")
        either = "" if zone is None else f"; within ± {_figure(zone)} of it, either answer counts as right"
        margins.append(f"{_figure(answer.get('margin'))} nats per item per doubling{either}")
    rows += [("margin, fixed beforehand", margin) for margin in dict.fromkeys(margins)]
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


def _run_row(record: RunRecord) -> tuple[DisplayedValue, ...]:
    config, plan, speed, memory, fit = record.config, record.plan, record.speed, record.memory, record.fit
    scores, before = answering_scores(record), base_model_scores(record)
    return (
        *(record.run_id, record.status.value, record.trial.study if record.trial else None),
        record.trial.number if record.trial else None,
        *(config["model"]["family"], config["model"]["variant"], plan.format if plan else None),
        *(config["quantization"]["mode"], config["lora"]["r"], plan.alpha if plan else None, targets_of(record)),
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
