"""What ``show`` and ``diff`` print: the lines of a run that matter, and the differences between two runs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from rich.table import Table

from qlora_exp.formatting import UNKNOWN_CELL, bytes_text, clock_text, figure, flatten, number, simple_table
from qlora_exp.paths import RunPaths
from qlora_exp.records.flat_rows import MAIN_SCORES, base_bytes_of, flat_run, shown_scores
from qlora_exp.records.labels import labels, run_name, short_id
from qlora_exp.records.method_name import is_lora, saves_adapter
from qlora_exp.records.model_name import model_place
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import RunRecord, Status

NOT_COMPARED = ("run_id.", "name.", "started_at.", "ended_at.", "process.", "config.name.", "config.output_root.")
"""Beginnings of the keys that differ between any two runs and explain nothing; a dot ends a key."""

SECTIONS = {
    "settings": ("config.", "data."),
    "results": ("scores.", "baselines.", "goal.", "status", "failure.", "training."),
    "memory, speed, cost": ("memory.", "speed.", "spent.", "plan.trainable_parameters"),
    "other": ("",),
}
"""Section of ``diff`` → the beginnings of its keys, in this order."""

RESULT_NAMES = (*MAIN_SCORES, "loss_per_item", "bits_per_byte", "answer", "difference", "status", "final_loss", "kind")
RESOURCE_NAMES = (
    *("trainable_parameters", "base_weight_bytes", "adapter_bytes", "peak_train_bytes", "peak_evaluation_bytes"),
    *("train_tokens_per_second", "train_seconds", "total_seconds", "energy_joules", "cost_usd"),
)
DERIVED_DATA = ("data.mean_prompt_tokens", "data.mean_completion_tokens", "data.truncated_items")
MAX_WARNINGS = 1


def summary_table(record: RunRecord, paths: RunPaths, option: str = "") -> Table:
    """Return the lines of a run that matter. ``option``: `` --output-root DIR`` for the commands, if they need it."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column("what", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    for heading, text in summary(record, paths, option):
        table.add_row(heading, text)
    return table


def summary(record: RunRecord, paths: RunPaths, option: str = "") -> Iterator[tuple[str, str]]:
    """Yield (heading, text): status, what was trained, scores, memory, speed, cost, files, the next command. Lines of
    which nothing is known are left out."""
    row, settings = flat_run(record), dict(flatten(record.config))
    took = f" in {clock_text(record.speed.total_seconds)}" if record.speed.total_seconds is not None else ""
    started = datetime.fromisoformat(record.started_at).strftime("%Y-%m-%d %H:%M %Z")
    yield "status", f"{record.status.value}{took}, started {started}"
    if record.failure is not None:
        where = f" in phase {record.failure.phase}" if record.failure.phase else ""
        yield "failure", f"{record.failure.kind}{where}: {record.failure.message.splitlines()[0]}"
    trial = f", trial {record.trial.number} of study {record.trial.study}" if record.trial is not None else ""
    yield "run", f"{record.run_id}\n{run_name(record)}{trial}"
    path = f" ({model_place(record.config['model'])})" if settings.get("model.path") else ""
    model = f"{row['model']} {row['variant']}{path}, {row['quantization']}"
    if record.plan is not None:
        model += f", {record.plan.total_parameters:,} parameters, on {record.environment.device.name}"
    yield "model", model
    alpha = _known(row["alpha"]) if row["alpha"] is not None else settings.get("lora.alpha_policy")
    adapter = f"r = {row['r']}, alpha {alpha}, {row['targets']}" if is_lora(record.config) else row["method"]
    if record.plan is not None:
        share = record.plan.trainable_parameters / record.plan.total_parameters
        adapter += f": {record.plan.trainable_parameters:,} trained parameters ({share:.2%})"
    yield ("LoRA" if is_lora(record.config) else "method"), adapter
    yield "training", _training(record, row)
    if record.data is not None:
        counts = (record.data.train_items, record.data.validation_items, record.data.test_items)
        yield "data", "{}: {:,} training, {:,} validation, {:,} test items".format(record.data.task, *counts)
    yield from _score_lines(record)
    if record.memory.peak_train_bytes is not None or base_bytes_of(record) is not None:
        predicted = record.plan.predicted_peak_train_bytes if record.plan is not None else None
        beside = f" (predicted {bytes_text(predicted)})" if predicted is not None else ""
        peak = f"training peak {bytes_text(record.memory.peak_train_bytes)}{beside}"
        if record.memory.process_reused and record.memory.peak_train_bytes is None:
            peak = f"training peak not measured: the process had run before{beside}"
        weights = f"base model {bytes_text(base_bytes_of(record))}"
        if not saves_adapter(record.config):
            trained = bytes_text(record.memory.adapter_bytes)
            weights = f"trained weights {trained}, other weights {bytes_text(base_bytes_of(record))}"
        yield "memory", f"{peak}, {weights}"
    if record.speed.train_seconds is not None:
        rate = number(record.speed.train_tokens_per_second, 0)
        cost = f", ${record.speed.cost_usd:.2g}" if record.speed.cost_usd is not None else ""
        yield "speed", f"{rate} tokens/s, {clock_text(record.speed.train_seconds)} of training{cost}"
    for warning in record.warnings[:MAX_WARNINGS]:
        more = (
            f" (and {len(record.warnings) - MAX_WARNINGS} more: --all)" if len(record.warnings) > MAX_WARNINGS else ""
        )
        yield "warning", f"{warning}{more}"
    present = [child.name for child in (paths.record, paths.weights) if child.exists()]
    yield "files", f"{paths.folder} ({', '.join(present)})"
    yield (
        "next",
        next_command(record, short_id(record.run_id, (run.name for run in paths.folder.parent.iterdir())), option),
    )


def next_command(record: RunRecord, run: str, option: str = "") -> str:
    """Return what a person would do next with this run, whose short id is ``run``."""
    study = shlex.quote(record.trial.study) if record.trial is not None else None
    if record.status is Status.RUNNING:
        return f"qlora-exp status {study} --watch{option}" if study else f"qlora-exp show {run}{option}"
    if record.status is Status.INTERRUPTED:
        return f"qlora-exp resume {study}{option}" if study else f"qlora-exp run --resume {run}{option}"
    if record.failure is not None:
        hint = f"{record.failure.hint}; then " if record.failure.hint else ""
        return f"{hint}qlora-exp rerun {run}{option}"
    if record.status is Status.PRUNED:
        return f"qlora-exp best {study}{option}" if study else f"qlora-exp rerun {run}{option}"
    if record.synthetic:
        return f"qlora-exp ls runs{option}"
    return f"qlora-exp show {run} --items 20{option}\nqlora-exp export {run}{option}"


def _training(record: RunRecord, row: dict[str, Any]) -> str:
    steps = f"{row['max_steps']} steps" if row["max_steps"] is not None else "steps by tokens"
    if record.training is not None and record.training.steps != row["max_steps"]:
        steps = f"{record.training.steps} of {steps}"
    if record.training is not None and record.training.epochs is not None:
        steps += f" ({record.training.epochs:.2g} epochs)"
    return f"{steps} of {row['batch_size']} items, learning rate {_known(row['learning_rate'])}, seed {row['seed']}"


def _score_lines(record: RunRecord) -> Iterator[tuple[str, str]]:
    before, after = shown_scores(record)
    shown = after or before
    if shown is None:
        return
    for name in [name for name in (*MAIN_SCORES, "loss_per_item") if getattr(shown, name) is not None][:2]:
        values = [number(getattr(scores, name) if scores is not None else None) for scores in (before, after)]
        where = f" on {shown.items:,} {shown.split} items" if name != "loss" else " nats per token"
        yield name.replace("_", " "), f"{' → '.join(values)}{where}"
    compared = []
    if record.baselines is not None and record.baselines.tfidf_accuracy is not None:
        compared.append(f"TF-IDF {figure(record.baselines.tfidf_accuracy)}")
    if record.baselines is not None and record.baselines.majority_accuracy is not None:
        compared.append(f"majority class {figure(record.baselines.majority_accuracy)}")
    if compared and record.baselines is not None:
        yield "baselines", f"{', '.join(compared)} ({record.baselines.split} accuracy)"
    if record.goal is not None:
        met = {"yes": "met", "no": "not met"}.get(record.goal.answer, record.goal.answer)
        yield "goal", f"{record.goal.text} on {record.goal.split}: {met}"


def _known(value: float | None) -> str:
    return UNKNOWN_CELL if value is None else f"{value:g}"


def record_table(record: RunRecord) -> Table:
    """Return everything known of a run, one figure per row; unknown figures are left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column("key", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    for key, value in flatten(to_dict(record)):
        if value is not None and value != {} and value != []:
            table.add_row(key, _value(key, value))
    return table


def differences(left: RunRecord, right: RunRecord) -> list[dict[str, Any]]:
    """Return what differs, as ``{section, key, first, second, change}``, in the order of :data:`SECTIONS`.

    ``change`` is second − first of two numbers, else ``None``; a setting has none.
    """
    before, after = dict(flatten(to_dict(left))), dict(flatten(to_dict(right)))
    rows = []
    for key in before | after:
        first: Any = before.get(key)
        second: Any = after.get(key)
        if first == second or f"{key}.".startswith(NOT_COMPARED):
            continue
        section = _section(key)
        change = second - first if section != "settings" and _is_number(first) and _is_number(second) else None
        shown_key = key.removeprefix("config.")
        rows.append({"section": section, "key": shown_key, "first": first, "second": second, "change": change})
    order = list(SECTIONS)
    return sorted(rows, key=lambda row: order.index(str(row["section"])))


def difference_table(rows: Sequence[dict[str, Any]], headings: Sequence[str]) -> Table:
    """Return a table of differences with a row above each section. ``headings``: of the two runs."""
    table = simple_table("key")
    for heading in (*headings, "change"):
        table.add_column(heading, overflow="fold", justify="right")
    section = None
    for row in rows:
        if row["section"] != section:
            section = row["section"]
            table.add_row(f"[{section}]", "", "", "", style="bold cyan")
        cells = [_value(row["key"], row[side]) for side in ("first", "second")]
        table.add_row(row["key"], *cells, _change(row))
    return table


def is_main(row: dict[str, Any]) -> bool:
    """Return whether ``diff`` shows the difference without ``--all``."""
    last = row["key"].rsplit(".", 1)[-1]
    if row["section"] == "settings":
        return row["key"] not in DERIVED_DATA
    if row["section"] == "results":
        return last in RESULT_NAMES
    return row["section"] != "other" and last in RESOURCE_NAMES


def pair_lines(records: Sequence[RunRecord], ids: Sequence[str]) -> list[str]:
    """Return a line per run: its short id, what distinguishes it, and its whole id."""
    names = labels([{"config": record.config, "trial": to_dict(record.trial)} for record in records])
    width, rows = max(map(len, names)), zip(ids, names, records, strict=True)
    return [f"{run}  {name.ljust(width)}  {record.run_id}" for run, name, record in rows]


def _section(key: str) -> str:
    return next(section for section, beginnings in SECTIONS.items() if key.startswith(beginnings))


def _plain(value: Any) -> str:
    if value is None:
        return UNKNOWN_CELL
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value(key: str, value: Any) -> str:
    """Return a figure as text, by the unit in its key's name; anything else as it is."""
    if not _is_number(value):
        return _plain(value)
    if key.endswith("_bytes"):
        return f"{bytes_text(value)} ({value:,.0f})" if abs(value) >= 1000 else bytes_text(value)
    if key.endswith("_seconds"):
        return f"{value:.3f} s"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else f"{value:.6g}"


def _change(row: dict[str, Any]) -> str:
    difference, first = row["change"], row["first"]
    if difference is None:
        return ""
    share = f" ({difference / abs(first):+.1%})" if first else ""
    if row["key"].endswith("_bytes"):
        return f"{'+' if difference > 0 else ''}{bytes_text(difference)}{share}"
    return f"{difference:+.4g}{share}"
