"""Plans as a terminal table, as an HTML page, and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Table

from qlora_exp.config.overrides import hydra_value
from qlora_exp.estimate.estimator import PlannedMemory, PlannedRun
from qlora_exp.estimate.fit_result import BORDERLINE_NOTES
from qlora_exp.estimate.memory_fit import CPU_PROCESS_BYTES
from qlora_exp.estimate.tokens import PlannedRows
from qlora_exp.formatting import UNKNOWN_CELL, bytes_text, number, simple_table
from qlora_exp.records.schema import to_dict

MEMORY_PARTS = {
    "base_weight_bytes": ("W", "base weights"),
    "quantization_state_bytes": ("Q", "quantization state"),
    "adapter_bytes": ("A", "adapters"),
    "gradient_bytes": ("G", "gradients"),
    "optimizer_bytes": ("O", "optimizer"),
    "activation_bytes": ("+", "activations and everything else at the peak"),
}
"""Part of :class:`PlannedMemory` → (its letter in the bar, its name)."""
LEGEND = "memory: " + ", ".join(f"{letter} {words}" for letter, words in MEMORY_PARTS.values())
BEYOND_IMPORTS = (
    "a peak on a CPU doesn't include what the process holds after its imports, about "
    f"{bytes_text(CPU_PROCESS_BYTES)}; this counts against the machine's memory and --fit SIZE, but not against "
    "budget.memory_bytes"
)
UNKNOWN_ROWS = "for rows as long as training.max_length; a run predicts both again from its own rows"
DURATIONS = ((86_400, "d"), (3600, "h"), (60, "min"))
UNKNOWN_OTHER_SECONDS = "without loading and scoring: unknown until similar runs have ended in the same output_root"
BAR_CHARACTERS = 24
REASONS_SHOWN = 8
ROWS_SHOWN = 40
"""More rows don't fit on a screen or two; --json and --html show all."""


def plan_as_json(runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """Return one object per configuration, in bytes, seconds and US dollars; ``null`` is unknown. ``overrides`` are the
    axes' values."""
    return [_object(run) for run in runs]


def _object(run: PlannedRun) -> dict[str, Any]:
    plain = to_dict(run)
    return {"overrides": plain.pop("params"), **plain}


def plan_table(runs: Sequence[PlannedRun]) -> Table:
    """Return one row for all configurations with the same figures: the first :data:`ROWS_SHOWN` rows."""
    scored = any(run.other_seconds is not None for run in runs)
    columns = ["configuration", "trainable", "memory by part", "peak", "fits", "training", "usd", "disk"]
    if scored:
        columns.insert(6, "load, score")
    table = simple_table(*columns)
    scale = _scale(runs)
    groups: dict[tuple[Any, ...], list[PlannedRun]] = {}
    for run in runs:
        fit = (run.fits, run.borderline, run.notes)
        figures = (run.trainable_parameters, run.memory, run.disk, fit, run.seconds, run.other_seconds, run.usd)
        groups.setdefault(figures if run.memory is not None else (run.reason,), []).append(run)
    for first, *others in list(groups.values())[:ROWS_SHOWN]:
        table.add_row(*_row(first, scale, f" (and {len(others):,} with the same figures)" if others else "", scored))
    if len(groups) > ROWS_SHOWN:
        table.add_row(f"… and {len(groups) - ROWS_SHOWN:,} more rows: --json or --html FILE has them all")
    return table


def plan_summary(runs: Sequence[PlannedRun], trials: int | None, sampled: bool) -> str:
    """Return how many configurations there are, and how many of them fit."""
    count = f"{len(runs):,} configuration{'s' if len(runs) != 1 else ''}"
    if sampled:
        count = f"{'an unknown number of' if trials is None else f'{trials:,}'} trials among {count}"
    words_by_fit = {True: "fit", False: "don't fit or can't run", None: "unknown"}
    counts = [f"{sum(run.fits is fits for run in runs):,} {words}" for fits, words in words_by_fit.items()]
    borderline = sum(run.borderline for run in runs)
    edge = f"; {borderline:,} borderline" if borderline else ""
    return f"{count}: {', '.join(text for text in counts if not text.startswith('0 '))}{edge}"


def cost_summary(runs: Sequence[PlannedRun], searched: int | None = None) -> str | None:
    """Return a sentence with the time and money of all runs that may start, one after the other; ``None``: nothing
    fits.

    The ends of the intervals are added up. With ``searched`` trials of a search between the runs, each trial counts as
    the mean; the interval as all the smallest or all the largest. If a run's time is unknown, the sentence says how to
    find it out.
    """
    counted = [run for run in runs if run.fits is not False]
    if not counted:
        return None
    seconds = _total([run.seconds for run in counted], [run.seconds_interval for run in counted], searched)
    if seconds is None:
        return "training: time unknown; run qlora-exp calibrate on the training machine to measure its rate"
    message = f"training: {_duration(seconds[0], seconds[1:])}"
    scored = [run for run in counted if run.other_seconds is not None]
    other_seconds = _total(
        [run.other_seconds for run in counted], [run.other_seconds_interval for run in counted], searched
    )
    if other_seconds is not None:
        message = f"{message}, loading and scoring: {_duration(other_seconds[0], other_seconds[1:])}"
    usd = _total([run.usd for run in counted], [run.usd_interval for run in counted], searched)
    price = "usd unknown: no price in conf/prices.yaml; budget.usd_per_hour=PRICE"
    message = f"{message}, {price if usd is None else _with_interval(usd[0], usd[1:], ' usd')}"
    if searched is not None:
        message = f"{message}, for {searched:,} trials of a search between these"
    if other_seconds is not None:
        return message
    if scored and usd is not None:
        message = f"{message}; usd includes loading and scoring for {len(scored):,} of {len(counted):,} configurations"
    return f"{message}; {UNKNOWN_OTHER_SECONDS}"


def _total(
    middles: Sequence[float | None], intervals: Sequence[tuple[float, float] | None], searched: int | None
) -> tuple[float, float, float] | None:
    known = [(m, *interval) for m, interval in zip(middles, intervals, strict=True) if m is not None and interval]
    if not known or len(known) < len(middles):
        return None
    middles_known, lows, highs = zip(*known, strict=True)
    if searched is not None:
        return searched * statistics.fmean(middles_known), searched * min(lows), searched * max(highs)
    return sum(middles_known), sum(lows), sum(highs)


def row_notes(runs: Sequence[PlannedRun]) -> list[str]:
    """Return which rows peaks and times are predicted from: one sentence per task, tokenizer and length."""
    first_by_rows: dict[PlannedRows | None, PlannedRun] = {}
    for run in runs:
        if run.memory is not None:
            first_by_rows.setdefault(run.rows, run)
    names = {rows: f", {candidate_name(run)}" if len(first_by_rows) > 1 else "" for rows, run in first_by_rows.items()}
    lines = [f"peak and time{name}: {_rows(rows)}" for rows, name in names.items()]
    return (
        lines if len(lines) <= REASONS_SHOWN else [*lines[:REASONS_SHOWN], f"… and {len(lines) - REASONS_SHOWN:,} more"]
    )


def notes(runs: Sequence[PlannedRun]) -> list[str]:
    """Return what a reader needs to know about the figures, each sentence once."""
    kinds = {"cpu" if run.device == "cpu" else "cuda" for run in runs if run.borderline}
    lines = [f"yes?, no?: borderline; {BORDERLINE_NOTES[kind]}" for kind in sorted(kinds)]
    if any(run.device == "cpu" and run.memory is not None for run in runs):
        lines.append(BEYOND_IMPORTS)
    first_by_note: dict[str, PlannedRun] = {}
    for run in runs:
        for note in run.notes:
            first_by_note.setdefault(note, run)
    return [*lines, *(f"{candidate_name(run)}: {note}" for note, run in first_by_note.items())]


def _rows(rows: PlannedRows | None) -> str:
    if rows is None:
        return UNKNOWN_ROWS
    counted = f", {rows.counted:,} of them counted" if rows.counted < rows.rows else ""
    mean, longest = rows.mean_tokens, rows.lengths.longest_tokens
    return f"from the task's {rows.rows:,} rows{counted}: mean {mean:.1f} tokens, longest {longest}"


def reasons(runs: Sequence[PlannedRun]) -> list[str]:
    """Return why configurations don't fit, can't run or are unknown: each reason once, the first few."""
    first_by_reason: dict[str, PlannedRun] = {}
    for run in runs:
        if run.fits is not True:
            first_by_reason.setdefault(run.reason if run.fits is False else run.reason.rpartition("; ")[2], run)
    lines = [
        f"{candidate_name(run)}: {reason}" if run.fits is False else reason for reason, run in first_by_reason.items()
    ]
    return (
        lines if len(lines) <= REASONS_SHOWN else [*lines[:REASONS_SHOWN], f"… and {len(lines) - REASONS_SHOWN:,} more"]
    )


def write_page(runs: Sequence[PlannedRun], title: str, words: Sequence[str], file: Path) -> None:
    """Write all configurations as one self-contained HTML page, with ``words`` above the table.

    Raises:
        OSError: it can't be written.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    scale = _scale(runs)
    rows = [
        {
            "name": candidate_name(run),
            "trainable": number(run.trainable_parameters, 0),
            "parts": _shares(run.memory, scale),
            "peak": _peak(run.memory),
            "fits": _fits_text(run),
            "reason": "; ".join((run.reason, *run.notes)),
            "seconds": _duration(run.seconds, run.seconds_interval),
            "other_seconds": _duration(run.other_seconds, run.other_seconds_interval),
            "usd": _with_interval(run.usd, run.usd_interval),
            "disk": bytes_text(run.disk.checkpoint_bytes if run.disk else None),
        }
        for run in runs
    ]
    template = environment.from_string((Path(__file__).parent / "page.html.jinja").read_text(encoding="utf-8"))
    legend = [(key, words) for key, (_, words) in MEMORY_PARTS.items()]
    file.write_text(
        template.render(title=title, words=[*words, *notes(runs), *row_notes(runs)], rows=rows, legend=legend),
        encoding="utf-8",
    )


def candidate_name(run: PlannedRun) -> str:
    """Return a configuration's axes as text; for a single one, its model, quantization, rank and targets."""
    settings = run.settings
    if run.params or not settings:
        return " ".join(f"{key}={hydra_value(value)}" for key, value in run.params.items()) or "configuration"
    return f"{settings['model']} {settings['quantization']} r={settings['r']} {settings['targets']}"


def _row(run: PlannedRun, scale: int, more: str, scored: bool) -> list[str]:
    other_seconds = [_duration(run.other_seconds, run.other_seconds_interval)] if scored else []
    return [
        f"{candidate_name(run)}{more}",
        number(run.trainable_parameters, 0),
        _bar(run.memory, scale),
        _peak(run.memory),
        _fits_text(run),
        _duration(run.seconds, run.seconds_interval),
        *other_seconds,
        _with_interval(run.usd, run.usd_interval),
        bytes_text(run.disk.checkpoint_bytes if run.disk else None),
    ]


def _with_interval(middle: float | None, interval: tuple[float, float] | None, unit: str = "") -> str:
    """Return e.g. ``23 min (11–51)``."""
    if middle is None or interval is None:
        return UNKNOWN_CELL
    figure, low, high = (f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for value in (middle, *interval))
    return f"{figure}{unit} ({low}–{high})"


def _duration(seconds: float | None, interval: tuple[float, float] | None) -> str:
    """Return seconds in the largest unit that gives at least 1."""
    if seconds is None or interval is None:
        return UNKNOWN_CELL
    size, unit = next(((size, unit) for size, unit in DURATIONS if seconds >= size), (1, "s"))
    return _with_interval(seconds / size, (interval[0] / size, interval[1] / size), f" {unit}")


def _fits_text(run: PlannedRun) -> str:
    return {True: "yes", False: "no", None: UNKNOWN_CELL}[run.fits] + ("?" if run.borderline else "")


def _peak(memory: PlannedMemory | None) -> str:
    return bytes_text(memory.peak_bytes if memory is not None else None)


def _scale(runs: Sequence[PlannedRun]) -> int:
    return max((run.memory.peak_bytes for run in runs if run.memory is not None), default=1)


def _bar(memory: PlannedMemory | None, scale: int) -> str:
    shares = _shares(memory, scale)
    bar, end = "", 0.0
    for part, (letter, _) in MEMORY_PARTS.items():
        end += shares.get(part, 0.0)
        bar += letter * (round(end * BAR_CHARACTERS) - len(bar))
    return bar


def _shares(memory: PlannedMemory | None, scale: int) -> dict[str, float]:
    if memory is None:
        return {}
    return {part: getattr(memory, part) / scale for part in MEMORY_PARTS}
