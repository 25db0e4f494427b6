"""The report's sections, one function each: about a group of comparable runs, or about a whole study."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_exp.analysis import figures, memory, tradeoffs
from qlora_exp.analysis.comparable import Group, answering_scores, base_model_scores
from qlora_exp.analysis.configurations import Configuration, Measure, mean, model_state_bytes
from qlora_exp.analysis.report_content import DisplayedValue, Section, StudyInfo, Table, formatted_value, value_table
from qlora_exp.records.types import RunRecord, Status

MAX_ROWS = 25
"""Rows shown of a long table; the report's last table has all runs."""
MIN_TRIALS_FOR_IMPORTANCE = 10
"""Per axis; with fewer, an importance is a guess."""
MAX_ERROR_RATE, MAX_ERROR_RATE_WITH_GROWING_NOISE = 0.05, 0.06
"""Shares of simulated ladders with a wrong answer: the largest in docs/calibration.md, rounded up."""


def ladders_of(study: StudyInfo) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (name, answer) of each ladder, whether the study stored one, a list, or one per configuration."""
    raw = study.ladder
    if isinstance(raw, Mapping) and "decision" in raw:
        return [(study.name, raw)]
    if isinstance(raw, Mapping):
        inner = raw.get("ladders") or raw.get("configurations")
        if inner is None:
            return [
                (str(name), entry) for name, entry in raw.items() if isinstance(entry, Mapping) and "decision" in entry
            ]
        raw = inner
    if isinstance(raw, Mapping):
        raw = [{"configuration": name, **entry} for name, entry in raw.items() if isinstance(entry, Mapping)]
    if not isinstance(raw, list):
        return []
    answers = [entry for entry in raw if isinstance(entry, Mapping) and "decision" in entry]
    return [(_ladder_name(entry, number), entry) for number, entry in enumerate(answers, start=1)]


def ladder_sections(studies: Sequence[StudyInfo]) -> list[Section]:
    ladders = [(name, answer) for study in studies for name, answer in ladders_of(study)]
    sections = []
    for number, (name, answer) in enumerate(ladders, start=1):
        figure = figures.ladder(answer)
        rows = [
            (
                f"{s.get('from_rank')} → {s.get('to_rank')}",
                s.get("decision"),
                s.get("gain"),
                s.get("low"),
                s.get("high"),
            )
            for s in answer.get("comparisons") or []
        ]
        columns = ("doubling", "decision", ("gain", "figure"), ("low", "figure"), ("high", "figure"))
        notes = [str(note) for note in answer.get("notes") or [] if note]
        warnings = tuple(str(warning) for warning in answer.get("warnings") or [])
        sections.append(
            Section(
                name=f"ladder-{number}",
                title="Rank doubling" + (f": {name}" if len(ladders) > 1 else ""),
                paragraphs=(
                    str(answer.get("sentence") or f"The ladder's answer: {answer['decision']}."),
                    *_ladder_cost_sentences(answer),
                    *([error_rates] if (error_rates := error_rate_sentence(answer)) is not None else []),
                    *notes,
                ),
                tables=(value_table(columns, rows, f"margin {_figure(answer.get('margin'))}"),) if rows else (),
                figures=(figure,) if figure else (),
                points=warnings,
            )
        )
    return sections


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


def open_ends(studies: Sequence[StudyInfo]) -> list[str]:
    """Return what each undecided ladder leaves open, and what would settle it."""
    ladders = [(name, answer) for study in studies for name, answer in ladders_of(study)]
    return [
        f"{name}: it is not settled {_open_step(answer)}. {answer.get('would_settle') or ''}".rstrip()
        for name, answer in ladders
        if answer["decision"] == "inconclusive" and answer.get("comparisons")
    ]


def _open_step(answer: Mapping[str, Any]) -> str:
    last = answer["comparisons"][-1]
    return f"whether r = {last['to_rank']} is worth its cost over r = {last['from_rank']}"


def rank_section(configurations: Sequence[Configuration], measure: Measure, with_ladder: bool) -> Section | None:
    figure = figures.rank_curve(configurations, measure)
    if figure is None:
        return None
    note = "Means over seeds; bars are 95 % intervals from the variance over seeds, pooled over the configurations."
    if all(c.quality is None or c.quality.se is None for c in configurations):
        note = "One seed per configuration: how much of a difference is due to the seed is unknown."
    if len(figure["data"]) == figures.MAX_LINES:
        note += f" At most {figures.MAX_LINES} lines are drawn, those with the most ranks."
    caveat = (
        "" if with_ladder else " This describes the runs and decides nothing; qlora-exp sweep rank_doubling decides."
    )
    return Section("rank", "Quality by rank", (note + caveat,), (), (figure,))


def tradeoff_section(configurations: Sequence[Configuration], measure: Measure) -> Section:
    front = tradeoffs.front(configurations, measure)
    if not front.configurations:
        return Section("tradeoffs", "Quality, memory and speed", (str(front.why_none),))
    plots = tuple(figures.pareto(front, measure, axis) for axis in ("memory", "speed"))
    paragraphs = [front.why_none] if front.why_none else [_front_sentence(front)]
    if len(front.configurations) > figures.MAX_DOMINATED_POINTS:
        paragraphs.append(
            f"About {figures.MAX_DOMINATED_POINTS:,} of the dominated points are drawn; the last table has all."
        )
    unbeaten = [
        (c, status)
        for c, status in zip(front.configurations, front.statuses or [None] * len(front.configurations), strict=True)
        if status is not tradeoffs.ParetoStatus.DOMINATED
    ]
    unbeaten.sort(key=lambda pair: -measure.sign * (pair[0].quality.mean if pair[0].quality else 0.0))
    rows = [(*_configuration_row(c), str(status) if status else None) for c, status in unbeaten[:MAX_ROWS]]
    columns = (*_configuration_columns(measure), "standing")
    caption = (
        f"The best {MAX_ROWS} of {len(unbeaten)} configurations that no other clearly beats"
        if len(unbeaten) > MAX_ROWS
        else None
    )
    return Section(
        "tradeoffs", "Quality, memory and speed", tuple(paragraphs), (value_table(columns, rows, caption),), plots
    )


def equal_everything_section(configurations: Sequence[Configuration], measure: Measure) -> Section:
    """Compare quantization modes and target sets between runs that agree in everything else."""
    at_equal_size = tradeoffs.targets_at_equal_parameters(configurations, measure)
    hint = None if at_equal_size else tradeoffs.equal_parameters_hint(configurations)
    comparisons = (
        ("Quantizations, everything else equal", tradeoffs.quantization_contrasts(configurations, measure)),
        ("Target modules at equal rank", tradeoffs.target_contrasts(configurations, measure)),
        ("Target modules at equally many parameters", at_equal_size),
    )
    tables = tuple(_contrasts(caption, contrasts, measure) for caption, contrasts in comparisons if contrasts)
    note = (
        f"Gain in {measure.label}: above 0, the one named first is better. Runs are paired by configuration and seed;"
        " the 95 % interval is over these pairs, on these items."
    )
    nothing = "No two runs differ only in their quantization or target modules: there is nothing to compare."
    return Section(
        "equal", "At equal everything else", (note if tables else nothing,), tables, points=(hint,) if hint else ()
    )


def memory_section(configurations: Sequence[Configuration], records: Sequence[RunRecord]) -> Section:
    parts = memory.breakdowns(configurations)
    figure = figures.memory_bars(parts)
    rows = [(b.label, *(b.parts[part] for part in memory.PEAK_PARTS)) for b in parts[:MAX_ROWS]]
    by_part = value_table(("configuration", *((part, "bytes") for part in memory.PEAK_PARTS)), rows, "Memory by part")
    sizes: list[tuple[DisplayedValue, ...]] = [
        (f"{s.bits} bits", s.nominal_bytes, ", ".join(f"{m} {_bytes(b)}" for m, b in s.measured_bytes.items()) or None)
        for s in memory.weight_sizes(records)
    ]
    weights = value_table(
        ("weights at", ("parameters × bits / 8", "bytes"), "measured, with quantization state"),
        sizes,
        "Size of the base's weights",
    )
    adapters = memory.adapter_sizes(records)
    columns = (("r", "integer"), "targets", ("parameters", "integer"), ("adapter", "bytes"))
    adapter_rows = [(a.rank, a.targets, a.parameters, a.adapter_bytes) for a in adapters[:MAX_ROWS]]
    note = (
        "Activations are the peak of training minus the other parts; they are unknown if a process ran several trials"
        " on a CPU. Embeddings and norms stay unquantized, so measured weights are larger than parameters × bits / 8."
    )
    tables = tuple(t for t in (by_part, weights, value_table(columns, adapter_rows, "Size of the adapters")) if t.rows)
    return Section("memory", "Memory", (note,), tables, (figure,) if figure else ())


def speed_section(records: Sequence[RunRecord]) -> Section:
    by_kind: dict[tuple[str, str], list[RunRecord]] = defaultdict(list)
    for record in records:
        device = record.environment.device
        by_kind[str(record.config["quantization"]["mode"]), device.name or device.kind].append(record)
    rows = [
        (
            *(mode, device, len(runs)),
            *(
                _known_mean(r.speed.train_tokens_per_second for r in runs),
                _known_mean(r.speed.step_seconds_p50 for r in runs),
            ),
            *(_known_mean(r.speed.train_seconds for r in runs), _known_mean(r.speed.cost_usd for r in runs)),
        )
        for (mode, device), runs in by_kind.items()
    ]
    columns = (
        *("quantization", "device", ("runs", "integer"), ("tokens/s", "figure"), ("seconds a step, median", "figure")),
        *(("training", "seconds"), ("cost", "usd")),
    )
    note = (
        "Means over runs; the first steps, evaluation and saving are not counted. Compare runs on one device only, and"
    )
    note += " only if nothing else ran on it."
    notes = (note, priced) if (priced := _price_sentence(records)) else (note,)
    return Section("speed", "Speed and cost", notes, (value_table(columns, rows),))


def _price_sentence(records: Sequence[RunRecord]) -> str | None:
    """Return which prices the costs use; ``None`` if no record has any. Older records have a single price."""
    plans = [record.plan for record in records if record.plan is not None and record.plan.usd_per_hour is not None]
    prices = sorted({(str(plan.usd_per_hour_from), plan.usd_per_hour or 0.0) for plan in plans})
    if not prices:
        return None
    described = ", ".join(f"{price:g} USD ({source})" for source, price in prices)
    return f"Costs: all seconds of a run, including loading and scoring, at the price per hour: {described}."


def importance_section(studies: Sequence[StudyInfo], completed: Sequence[RunRecord]) -> Section | None:
    importances = [(objective, shares) for study in studies for objective, shares in study.importance.items() if shares]
    if not importances:
        return None
    rows = [(objective, axis, share) for objective, shares in importances for axis, share in shares.items()]
    axes = max(len(shares) for _, shares in importances)
    note = "Share of the objective's variance over the trials that each axis explains (fANOVA). It describes this"
    note += " search, not what would matter elsewhere."
    points, trials = [], len(completed)
    if (
        any(".loss" in objective for objective, _ in importances)
        and len({r.plan.format for r in completed if r.plan}) > 1
    ):
        points.append("A loss counts end tokens, which depend on the format: they cause a part of the format's share.")
    if trials < MIN_TRIALS_FOR_IMPORTANCE * axes:
        points.append(
            f"{trials} trials for {axes} axes are too few to trust: run at least {MIN_TRIALS_FOR_IMPORTANCE} an axis."
        )
    if any(ladders_of(study) for study in studies):
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
    seconds: dict[Status, float] = defaultdict(float)
    for record in records:
        seconds[record.status] += record.speed.total_seconds or 0.0
    total = sum(seconds.values())
    counts = Counter(record.status for record in records)
    usd = {s: [r.speed.cost_usd for r in records if r.status is s and r.speed.cost_usd is not None] for s in counts}
    rows = [
        (str(s), counts[s], seconds[s], seconds[s] / total if total else None, sum(usd[s]) if usd[s] else None)
        for s in counts
    ]
    columns = ("status", ("runs", "integer"), ("time", "seconds"), ("of all time", "percent"), ("cost", "usd"))
    kinds = Counter((r.status.value, _first_line(r)) for r in ended if r.failure is not None)
    reasons = [(status, why, count) for (status, why), count in kinds.most_common(MAX_ROWS)]
    tables = [value_table(columns, rows)]
    tables += [value_table(("status", "why", ("runs", "integer")), reasons, "Reasons")] if reasons else []
    wasted = sum(record.speed.total_seconds or 0.0 for record in ended)
    summary = f"{len(ended)} of {len(records)} runs did not complete; they took {wasted / 60:,.1f} minutes."
    return Section("failures", "Failures and what they cost", (summary,), tuple(tables))


def method_section(
    groups: Sequence[Group], records: Sequence[RunRecord], measure: Measure | None, studies: Sequence[StudyInfo]
) -> Section:
    rows: list[tuple[DisplayedValue, DisplayedValue]] = []
    if measure is not None:
        rows.append(("quality", f"{measure.label}, {'higher' if measure.higher_is_better else 'lower'} is better"))
    margins = dict.fromkeys(_margin_words(answer) for study in studies for _, answer in ladders_of(study))
    rows += [("margin, fixed beforehand", margin) for margin in margins]
    for number, group in enumerate(groups[:3], start=1):
        p = group.protocol
        rows += [
            (f"protocol {number}" if len(groups) > 1 else "protocol", f"{len(group.records)} finished runs"),
            ("task", f"{p.task}: {p.train_items} training items, {len(p.labels)} labels"),
            ("scored on", f"{p.scored_items} items of the {p.split} split"),
            ("training", f"{p.max_steps} steps × {p.batch_size}; adapters in {p.adapter_dtype}"),
        ]
    finished = [record for group in groups for record in group.records]
    rows.append(("seeds", ", ".join(sorted({str(r.seed) for r in finished}, key=lambda s: (len(s), s))[:MAX_ROWS])))
    rows.append(
        ("devices", _most_common_values(r.environment.device.name or r.environment.device.kind for r in finished))
    )
    for package in ("qlora-exp", "torch", "transformers", "peft", "trl", "bitsandbytes"):
        rows.append((package, _most_common_values(r.environment.packages.get(package) for r in finished)))
    rows.append(("git commit", _most_common_values(_commit(r) for r in finished)))
    warned = Counter(warning for record in records for warning in record.warnings)
    points = tuple(f"{warning} ({count} runs)" for warning, count in warned.most_common(10))
    return Section("method", "How it was measured", (), (value_table(("what", "how"), rows),), points=points)


def runs_section_table(records: Sequence[RunRecord]) -> Table:
    """Return the table of all runs, with raw values."""
    columns = (
        *(
            "run",
            "status",
            "study",
            ("trial", "integer"),
            "model",
            "variant",
            "format",
            "quantization",
            ("r", "integer"),
        ),
        *(("alpha", "figure"), "targets", ("learning rate", "figure"), ("seed", "integer"), "split"),
        *(
            ("loss per item", "figure"),
            ("accuracy", "figure"),
            ("base accuracy", "figure"),
            ("bits/byte", "figure"),
        ),
        *(("forgetting", "figure"), ("parameters", "integer"), ("weights", "bytes"), ("model state", "bytes")),
        *(
            ("peak memory", "bytes"),
            ("predicted need", "bytes"),
            ("memory bound", "bytes"),
            ("tokens/s", "figure"),
            ("training", "seconds"),
            ("total", "seconds"),
            ("cost", "usd"),
        ),
    )
    return value_table(columns, [_run_row(record) for record in records], keep_empty=True)


def _run_row(record: RunRecord) -> tuple[DisplayedValue, ...]:
    config, plan, speed = record.config, record.plan, record.speed
    scores, before = answering_scores(record), base_model_scores(record)
    targets = config.get("targets") or {}
    modules = targets.get("modules")
    weights = record.memory.base_weight_bytes
    return (
        *(record.run_id, record.status.value, record.trial.study if record.trial else None),
        record.trial.number if record.trial else None,
        *(config["model"]["family"], config["model"]["variant"], plan.format if plan else None),
        *(config["quantization"]["mode"], config["lora"]["r"], plan.alpha if plan else None),
        "+".join(map(str, modules)) if modules else targets.get("set"),
        *(config["training"]["learning_rate"], record.seed, scores.split if scores else None),
        *(scores.loss_per_item if scores else None, scores.accuracy if scores else None),
        *(before.accuracy if before else None, scores.bits_per_byte if scores else None),
        record.scores.forgetting.difference if record.scores.forgetting else None,
        *(plan.trainable_parameters if plan else None, weights, model_state_bytes(record)),
        *(record.memory.peak_train_bytes, record.fit.corrected_bytes if record.fit else None),
        *(record.fit.limit_bytes if record.fit else None, speed.train_tokens_per_second),
        *(speed.train_seconds, speed.total_seconds, speed.cost_usd),
    )


def _configuration_columns(measure: Measure) -> tuple[tuple[str, str] | str, ...]:
    return (
        *("configuration", ("seeds", "integer"), (measure.name.replace("_", " "), "figure"), ("low", "figure")),
        *(("high", "figure"), ("memory", "bytes"), ("tokens/s", "figure"), ("training", "seconds"), ("cost", "usd")),
    )


def _configuration_row(c: Configuration) -> tuple[DisplayedValue, ...]:
    q = c.quality
    quality = (q.seeds, q.mean, q.low, q.high) if q is not None else (0, None, None, None)
    return (c.label, *quality, c.memory_bytes, c.tokens_per_second, c.train_seconds, c.cost_usd)


def _contrasts(caption: str, contrasts: Sequence[tradeoffs.QuantizationContrast], measure: Measure) -> Table:
    columns = (
        *("against", ("pairs", "integer"), ("gain", "figure"), ("low", "figure"), ("high", "figure")),
        *(("memory", "percent"), ("speed", "percent"), ("parameters", "percent")),
    )
    rows = [
        (
            *(f"{c.level} against {c.reference}", c.gain.seeds, c.gain.mean, c.gain.low, c.gain.high),
            *(c.memory_ratio, c.speed_ratio, c.parameters_ratio),
        )
        for c in contrasts
    ]
    return value_table(columns, rows, caption)


def _front_sentence(front: tradeoffs.Front) -> str:
    counts = Counter(front.statuses)
    ties = counts[tradeoffs.ParetoStatus.NEAR]
    noise = f"; {ties} more are within noise of the front (95 %, over seeds)."
    if all(c.quality is None or c.quality.se is None for c in front.configurations):
        noise = ". With one seed per configuration, a place on the front may be chance."
    return (
        f"{counts[tradeoffs.ParetoStatus.FRONT]} of {len(front.configurations)} configurations are on the Pareto front:"
        f" no other beats them in quality, memory and speed at once (large marks){noise}"
    )


def _ladder_cost_sentences(answer: Mapping[str, Any]) -> list[str]:
    """Return what the ladder cost and was decided from; empty if the answer doesn't have it."""
    spent, seeds, items = answer.get("spent") or {}, answer.get("seeds") or {}, answer.get("items")
    if not spent:
        return []
    usd = f", {formatted_value(spent['cost_usd'], 'usd')}" if spent.get("cost_usd") is not None else ""
    summary = f"{spent['runs']} runs, {spent['pilots']} of them pilots, took {spent['seconds'] / 60:,.1f} minutes{usd}."
    if seeds and items:
        summary += (
            f" Decided from {items} test items and {', '.join(f'{n} seeds at r = {r}' for r, n in seeds.items())}."
        )
    return [summary]


def _margin_words(answer: Mapping[str, Any]) -> str:
    zone = answer.get("half_zone")
    either = "" if zone is None else f"; within ± {_figure(zone)} of it, either answer counts as right"
    return f"{_figure(answer.get('margin'))} nats per item per doubling{either}"


def _ladder_name(answer: Mapping[str, Any], number: int) -> str:
    name = answer.get("configuration") or answer.get("axes") or answer.get("name") or number
    if isinstance(name, Mapping):
        return ", ".join(f"{key}={value}" for key, value in name.items())
    return str(name)


def _first_line(record: RunRecord) -> str:
    assert record.failure is not None
    lines = record.failure.message.splitlines() or [""]
    return f"{record.failure.kind}: {lines[0]}"[:200]


def _known_mean(values: Any) -> float | None:
    return mean(value for value in values if value is not None)


def _most_common_values(values: Any) -> str:
    counts = Counter(str(value) for value in values if value is not None)
    return ", ".join(value for value, _ in counts.most_common(4)) + (", …" if len(counts) > 4 else "")


def _commit(record: RunRecord) -> str | None:
    commit = record.environment.git_commit
    return None if commit is None else commit[:10] + (" (with changes)" if record.environment.git_dirty else "")


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "unknown"


def _bytes(value: float) -> str:
    return formatted_value(value, "bytes")
