"""Plans as a terminal table, as an HTML page, and as JSON; and the sizes of one model's weights (``plan --sizes``)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Table

from qlora_exp.architecture.run_plan import compute_dtype
from qlora_exp.config.allowed_values import INTEGER_MODES
from qlora_exp.config.enums import Method
from qlora_exp.config.overrides import hydra_value
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError
from qlora_exp.estimate.candidates import SearchSpace
from qlora_exp.estimate.memory_fit import BORDERLINE_NOTES, CPU_PROCESS_BYTES
from qlora_exp.estimate.planner import PlannedMemory, PlannedRun, Planner
from qlora_exp.estimate.throughput import Interval
from qlora_exp.estimate.tokens import PlannedRows
from qlora_exp.estimate.weights_and_optimizer import BITS_PER_WEIGHT, base_bytes, in_mode, trained_bytes
from qlora_exp.formatting import UNKNOWN_CELL, bytes_text, number, print_table, print_wrapped, simple_table
from qlora_exp.records.model_name import model_name
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
PLAN_COLUMNS = {
    "name": "configuration",
    "trainable": "trainable",
    "parts": "memory by part",
    "peak": "peak",
    "fits": "fits",
    "seconds": "training",
    "other_seconds": "load, score",
    "usd": "usd",
    "disk": "disk",
}
"""Cell of a row → its heading."""
INTERVALS = ("seconds", "other_seconds", "usd")
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
    objects = []
    for run in runs:
        plain: dict[str, Any] = {"overrides": to_dict(run.params)}
        for key, value in vars(run).items():
            if key in INTERVALS:
                plain |= {key: value and value.middle, f"{key}_interval": value and [value.low, value.high]}
            elif key != "params":
                plain[key] = to_dict(value)
        if plain["rows"] is not None:
            del plain["rows"]["lengths"]["sorted_tokens"]  # hundreds of numbers that nobody reads
        objects.append(plain)
    return objects


def plan_table(runs: Sequence[PlannedRun]) -> Table:
    """Return one row for all configurations with the same figures: the first :data:`ROWS_SHOWN` rows."""
    columns = PLAN_COLUMNS
    if all(run.other_seconds is None for run in runs):
        columns = {key: title for key, title in PLAN_COLUMNS.items() if key != "other_seconds"}
    table = simple_table(*columns.values())
    scale = _scale(runs)
    groups: dict[tuple[Any, ...], list[PlannedRun]] = {}
    for run in runs:
        fit = (run.fits, run.borderline, run.notes)
        figures = (run.trainable_parameters, run.memory, run.disk, fit, run.seconds, run.other_seconds, run.usd)
        groups.setdefault(figures if run.memory is not None else (run.reason,), []).append(run)
    for first, *others in list(groups.values())[:ROWS_SHOWN]:
        cells = {**_cells(first), "parts": _bar(first.memory, scale)}
        cells["name"] += f" (and {len(others):,} with the same figures)" if others else ""
        table.add_row(*(cells[key] for key in columns))
    if len(groups) > ROWS_SHOWN:
        table.add_row(f"… and {len(groups) - ROWS_SHOWN:,} more rows: --json or --html FILE has them all")
    return table


def print_plan(runs: Sequence[PlannedRun], space: SearchSpace) -> None:
    """Print the table, and what a reader needs to know about it."""
    print_table(plan_table(runs))
    print()
    print_wrapped(summary_lines(runs, space))
    print_wrapped([f"  {reason}" for reason in reasons(runs)])
    print_wrapped([LEGEND, *notes(runs), *row_notes(runs)])


def summary_lines(runs: Sequence[PlannedRun], space: SearchSpace) -> list[str]:
    """Return how many configurations there are and fit, what they cost, and what the budget is enough for."""
    count = f"{len(runs):,} configuration{'s' if len(runs) != 1 else ''}"
    if space.sampled:
        count = f"{'an unknown number of' if space.trials is None else f'{space.trials:,}'} trials among {count}"
    words_by_fit = {True: "fit", False: "don't fit or can't run", None: "unknown"}
    numbers = {words: sum(run.fits is fits for run in runs) for fits, words in words_by_fit.items()}
    borderline = sum(run.borderline for run in runs)
    edge = f"; {borderline:,} borderline" if borderline else ""
    summary = f"{count}: {', '.join(f'{number:,} {words}' for words, number in numbers.items() if number)}{edge}"
    cost = cost_summary(runs, space.trials if space.sampled else None) if space.trials is not None else None
    return [summary, *([cost] if cost is not None else []), *(limit.message for limit in runs[0].budget)]


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
    seconds = _total([run.seconds for run in counted], searched)
    if seconds is None:
        return "training: time unknown; run qlora-exp calibrate on the training machine to measure its rate"
    message = f"training: {_duration(seconds)}"
    scored = [run for run in counted if run.other_seconds is not None]
    other_seconds = _total([run.other_seconds for run in counted], searched)
    if other_seconds is not None:
        message = f"{message}, loading and scoring: {_duration(other_seconds)}"
    usd = _total([run.usd for run in counted], searched)
    price = "usd unknown: no price in conf/prices.yaml; budget.usd_per_hour=PRICE"
    message = f"{message}, {price if usd is None else _with_interval(usd, ' usd')}"
    if searched is not None:
        message = f"{message}, for {searched:,} trials of a search between these"
    if other_seconds is not None:
        return message
    if scored and usd is not None:
        message = f"{message}; usd includes loading and scoring for {len(scored):,} of {len(counted):,} configurations"
    return f"{message}; {UNKNOWN_OTHER_SECONDS}"


def _total(intervals: Sequence[Interval | None], searched: int | None) -> Interval | None:
    known = [interval for interval in intervals if interval is not None]
    if not known or len(known) < len(intervals):
        return None
    lows, middles, highs = zip(*((end.low, end.middle, end.high) for end in known), strict=True)
    if searched is not None:
        return Interval(searched * min(lows), searched * statistics.fmean(middles), searched * max(highs), "")
    return Interval(sum(lows), sum(middles), sum(highs), "")


def row_notes(runs: Sequence[PlannedRun]) -> list[str]:
    """Return which rows peaks and times are predicted from: one sentence per task, tokenizer and length."""
    first_by_rows: dict[PlannedRows | None, PlannedRun] = {}
    for run in runs:
        if run.memory is not None:
            first_by_rows.setdefault(run.rows, run)
    names = {rows: f", {candidate_name(run)}" if len(first_by_rows) > 1 else "" for rows, run in first_by_rows.items()}
    return _first_lines([f"peak and time{name}: {_rows_text(rows)}" for rows, name in names.items()])


def _rows_text(rows: PlannedRows | None) -> str:
    if rows is None:
        return UNKNOWN_ROWS
    counted = f", {rows.counted:,} of them counted" if rows.counted < rows.rows else ""
    mean, longest = rows.mean_tokens, rows.lengths.longest_tokens
    return f"from the task's {rows.rows:,} rows{counted}: mean {mean:.1f} tokens, longest {longest}"


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


def reasons(runs: Sequence[PlannedRun]) -> list[str]:
    """Return why configurations don't fit, can't run or are unknown: each reason once, the first few."""
    first_by_reason: dict[str, PlannedRun] = {}
    for run in runs:
        if run.fits is not True:
            first_by_reason.setdefault(run.reason if run.fits is False else run.reason.rpartition("; ")[2], run)
    return _first_lines(
        [f"{candidate_name(run)}: {reason}" if run.fits is False else reason for reason, run in first_by_reason.items()]
    )


def _first_lines(lines: list[str]) -> list[str]:
    more = len(lines) - REASONS_SHOWN
    return lines if more <= 0 else [*lines[:REASONS_SHOWN], f"… and {more:,} more"]


def write_page(runs: Sequence[PlannedRun], title: str, words: Sequence[str], file: Path) -> None:
    """Write all configurations as one self-contained HTML page, with ``words`` above the table.

    Raises:
        ConfigError: it can't be written.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    scale = _scale(runs)
    rows = [
        {**_cells(run), "parts": _shares(run.memory, scale), "reason": "; ".join((run.reason, *run.notes))}
        for run in runs
    ]
    template = environment.from_string((Path(__file__).parent / "page.html.jinja").read_text(encoding="utf-8"))
    legend = [(key, words) for key, (_, words) in MEMORY_PARTS.items()]
    page = template.render(title=title, words=[*words, *notes(runs), *row_notes(runs)], rows=rows, legend=legend)
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        what = f"the page can't be written: {error.strerror}"
        raise ConfigError(what, f"--html {file}", "choose a file that can be written") from None


def candidate_name(run: PlannedRun) -> str:
    """Return a configuration's axes as text; for a single one, its model, quantization, rank and targets."""
    settings = run.settings
    if run.params or not settings:
        return " ".join(f"{key}={hydra_value(value)}" for key, value in run.params.items()) or "configuration"
    return f"{settings['model']} {settings['quantization']} r={settings['r']} {settings['targets']}"


def _cells(run: PlannedRun) -> dict[str, str]:
    return {
        "name": candidate_name(run),
        "trainable": number(run.trainable_parameters, 0),
        "peak": bytes_text(run.memory.peak_bytes if run.memory is not None else None),
        "fits": {True: "yes", False: "no", None: UNKNOWN_CELL}[run.fits] + ("?" if run.borderline else ""),
        "seconds": _duration(run.seconds),
        "other_seconds": _duration(run.other_seconds),
        "usd": _with_interval(run.usd),
        "disk": bytes_text(run.disk.checkpoint_bytes if run.disk else None),
    }


def _with_interval(interval: Interval | None, unit: str = "") -> str:
    """Return e.g. ``23 min (11–51)``."""
    if interval is None:
        return UNKNOWN_CELL
    ends = (interval.middle, interval.low, interval.high)
    middle, low, high = (f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for value in ends)
    return f"{middle}{unit} ({low}–{high})"


def _duration(seconds: Interval | None) -> str:
    """Return seconds in the largest unit that gives at least 1."""
    if seconds is None:
        return UNKNOWN_CELL
    size, unit = next(((size, unit) for size, unit in DURATIONS if seconds.middle >= size), (1, "s"))
    scaled = Interval(seconds.low / size, seconds.middle / size, seconds.high / size, seconds.basis)
    return _with_interval(scaled, f" {unit}")


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


@dataclass(frozen=True)
class Size:
    """Bytes of one model's base in one mode; ``remainder_dtype`` is the dtype of its unquantized tensors."""

    quantization: str
    bits: int
    remainder_dtype: str
    base_weight_bytes: int
    quantization_state_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Sizes:
    """A model's sizes on one device, and those of its configured adapters."""

    model: str
    device: str
    total_parameters: int
    modes: tuple[Size, ...]
    r: int
    target_modules: tuple[str, ...]
    trainable_parameters: int
    adapter_bytes: int


def sizes_of(config: Config, planner: Planner) -> Sizes:
    """Return the sizes of ``config``'s model in every mode on its device, and of its adapters.

    Raises:
        ModelError: it can't be described, or the targets match nothing in it.
    """
    device, architecture = planner.device(config), planner.architecture(config.model)
    with_lora = replace(config, method=replace(config.method, kind=Method.lora))
    adapted = planner.adapted(with_lora)
    adapters = trained_bytes(architecture, adapted, with_lora, "float32")
    modes = []
    for mode, bits in BITS_PER_WEIGHT.items():
        quantization = in_mode(config.quantization, mode)
        widths = {shape.in_features for shape in architecture.weights if shape.quantizable}
        if mode in INTEGER_MODES and any(width % quantization.group for width in widths):
            continue  # a run would be refused, too
        dtype = compute_dtype(quantization, device.kind, device.bf16)
        base = base_bytes(architecture, quantization, dtype)
        parts = (base.base_weight_bytes, base.quantization_state_bytes, base.total_bytes)
        modes.append(Size(mode.value, bits, dtype, *parts))
    return Sizes(
        model=model_name(vars(config.model)),
        device=device.name,
        total_parameters=architecture.total_parameters,
        modes=tuple(modes),
        r=config.lora.r,
        target_modules=tuple(sorted({shape.name.rsplit(".", 1)[-1] for shape in adapted})),
        trainable_parameters=adapters.trainable_parameters,
        adapter_bytes=adapters.adapter_bytes,
    )


def print_sizes(sizes: Sizes) -> None:
    """Print a table with one row per mode, and the size of the adapters."""
    print(f"{sizes.model} on {sizes.device}: {sizes.total_parameters:,} parameters")
    table = simple_table("quantization", "bits", "unquantized dtype", "weights", "quantization state", "total")
    for size in sizes.modes:
        parts = (size.base_weight_bytes, size.quantization_state_bytes, size.total_bytes)
        rest = size.remainder_dtype if size.bits < 16 else ""
        table.add_row(size.quantization, str(size.bits), rest, *(bytes_text(part) for part in parts))
    print_table(table)
    modules, count = ", ".join(sizes.target_modules), f"{sizes.trainable_parameters:,}"
    print(f"\nadapters, r = {sizes.r} on {modules}: {count} parameters, {bytes_text(sizes.adapter_bytes)}")
