"""``plan --fit``: the one configuration to start with, as a command, or what would make one fit.

The rule: 4-bit weights (nf4), adapters on all linear layers, rank 16, sequences as long as the task's rows need, and
the largest micro-batch that fits even if the predicted peak is too small by the prediction's error. Keys that the
command line sets keep their values.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_exp.architecture.families import known_families
from qlora_exp.config.enums import Method
from qlora_exp.config.overrides import hydra_value, is_swept, override_key
from qlora_exp.config.schema import Config
from qlora_exp.estimate.candidates import Candidate, search_space
from qlora_exp.estimate.memory_fit import CPU_PROCESS_BYTES, RELATIVE_ERROR
from qlora_exp.estimate.micro_batch_tokens import ENOUGH_TOKENS
from qlora_exp.estimate.planner import PlannedRun, Planner
from qlora_exp.estimate.tokens import PlannedRows, RowCounter
from qlora_exp.formatting import bytes_text
from qlora_exp.records.types import RunRecord
from qlora_exp.system.cards import CARDS

RECIPE = {"quantization": "nf4", "targets": "all_linear", "lora.r": "16"}
"""Dettmers et al. 2023 (QLoRA): nf4 equals 16 bit if all linear layers get adapters; the rank matters less."""
LORA_KEYS = ("targets", "lora.r")
"""Keys that mean nothing for other methods."""
QUANTIZATION_ORDER = (
    *("nf4", "int4_asym", "int4_sym", "int8", "int8_asym", "int8_sym", "fp4"),
    *("bf16", "fp16", "fp32", "int3_asym", "int2_asym"),
)
"""The preferred mode first, where the command line gives a choice."""
LENGTH_STEP = 64
"""A sequence length is rounded up to a multiple of this many tokens."""
USUAL_SHARE = 0.99
"""The share of rows that must not be cut if the longest row doesn't fit."""
UNCUT = 10**7
"""Tokens; longer than any row, so that rows are counted whole."""
SHORTER_LENGTHS = (4096, 2048, 1024, 512, 256, 128, 64)
MODELS_NAMED = 3


@dataclass(frozen=True)
class Recommended:
    """``run``: the plan of the configuration to start with. ``command`` starts it. ``needed_bytes``: its peak with the
    prediction's error, on a CPU with the process. ``length_reason``: why its sequences are so long."""

    run: PlannedRun
    command: tuple[str, ...]
    needed_bytes: int
    length_reason: str
    checkpointing: bool


@dataclass(frozen=True)
class NothingFits:
    """No configuration of the recipe fits with the prediction's error. ``smallest``: the one with the smallest peak,
    ``None`` if none can be planned. ``helps``: what would make one fit, each as a sentence."""

    smallest: PlannedRun | None
    needed_bytes: int | None
    helps: tuple[str, ...]


@dataclass(frozen=True)
class _Lengths:
    """Values of ``training.max_length``, the preferred one first, and the reason for each; empty: the command line
    sets it."""

    reasons: Mapping[int, str]


def recommend(
    overrides: Sequence[str],
    typed: Sequence[str],
    source: str | None,
    planner: Planner,
    records: Sequence[RunRecord],
    fit_bytes: int,
) -> Recommended | NothingFits:
    """Return the configuration to start with, within ``fit_bytes``.

    ``overrides``: ``typed``, and those of the ``--from`` file ``source``. ``planner``: plans full-length rows; the
    recommended run itself is planned with the task's rows, if the command line names a task.

    Raises:
        ConfigError, Problems: a misspelt key or choice, a wrong type.
    """
    keys = {override_key(text) for text in overrides}
    candidates = search_space(overrides).points
    configs = [point.config for point in candidates if point.config is not None]
    if not configs and candidates[0].problem is not None:
        raise candidates[0].problem
    first, kinds = configs[0], [config.method.kind for config in configs]
    names_task = any(key == "task" or key.startswith("task.") for key in keys)
    counter = RowCounter() if names_task or first.model.family == "embedded" else None  # that model comes with a task
    planner = planner.with_rows(counter, records)
    lengths = _lengths(first, keys, planner, counter)
    unread = () if any(one is Method.lora for one in kinds) else LORA_KEYS
    fixed = {key: value for key, value in RECIPE.items() if key not in unread and not _is_set(key, keys)}
    axes = dict(fixed)
    if lengths.reasons:
        axes["training.max_length"] = ",".join(map(str, lengths.reasons))
    if not keys & {"training.micro_batch_size", "training.micro_batch_tokens"}:
        axes["training.micro_batch_size"] = ",".join(map(str, _divisors(first.training.batch_size)))
    points = _points(overrides, axes)
    plans = [(planner.plan(point), point) for point in points]
    planned = [(run, point) for run, point in plans if run.memory is not None]
    with_headroom = [(run, point) for run, point in planned if run.fits and not run.borderline]
    if not with_headroom:
        return _nothing_fits(overrides, axes, [run for run, _ in planned], planner, fit_bytes)
    order = list(lengths.reasons)
    run, point = max(with_headroom, key=lambda pair: _preference(pair[0], order, _checkpoints(planner, pair[1])))
    settings = {**fixed, **{key: hydra_value(value) for key, value in run.params.items()}}
    if lengths.reasons:
        settings.setdefault("training.max_length", str(run.settings["max_length"]))
    kept = [text for text in typed if not is_swept(text) and override_key(text) not in settings]
    chosen = [f"{key}={value}" for key, value in settings.items()]
    command = ["qlora-exp", "run", *(["--from", source] if source is not None else []), *kept, *chosen]
    return Recommended(
        run,
        tuple(command),
        _with_error(run),
        lengths.reasons.get(run.settings["max_length"], "as on the command line"),
        _checkpoints(planner, point),
    )


def command_lines(command: Sequence[str], width: int) -> list[str]:
    """Return a shell command in lines of at most ``width`` columns, where its words allow that."""
    lines = [""]
    for word in map(shlex.quote, command):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width - 2:
            lines[-1] += " \\"
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _points(overrides: Sequence[str], axes: Mapping[str, str]) -> tuple[Candidate, ...]:
    return search_space([*overrides, *(f"{key}={values}" for key, values in axes.items())]).points


def _is_set(key: str, keys: set[str]) -> bool:
    return key in keys or (key in ("targets", "quantization") and any(other.startswith(f"{key}.") for other in keys))


def _divisors(batch_size: int) -> list[int]:
    """Return the micro-batches to try: the divisors of the batch."""
    return [rows for rows in range(1, min(batch_size, 4096) + 1) if batch_size % rows == 0]


def _lengths(config: Config, keys: set[str], planner: Planner, counter: RowCounter | None) -> _Lengths:
    if "training.max_length" in keys:
        return _Lengths({})
    default = config.training.max_length
    rows = counter.of(replace(config, training=replace(config.training, max_length=UNCUT))) if counter else None
    if rows is None:
        unknown = "the task's rows can't be counted here" if counter else "no task is named, so its rows are unknown"
        return _Lengths({default: f"the default: {unknown}"})
    positions = planner.architecture(config.model).positions
    longest, usual = rows.lengths.longest_tokens, _usual_length(rows)
    counted = f", {rows.counted:,} of them counted" if rows.counted < rows.rows else ""
    of_rows = f"the task's {rows.rows:,} rows{counted}"
    usual_text = f"holds {USUAL_SHARE:.0%} of {of_rows}: the longest has {longest:,} tokens and is cut or refused"
    longest_text = f"holds the longest of {of_rows}: {longest:,} tokens"
    reasons: dict[int, str] = {}
    for tokens, text in ((longest, longest_text), (usual, usual_text)):
        length = LENGTH_STEP * math.ceil(tokens / LENGTH_STEP)
        if positions is not None and length > positions:
            length = positions
            text = f"the model's {positions:,} positions; the task's longest row has {longest:,} tokens"
        reasons.setdefault(length, text)
    return _Lengths(reasons)


def _usual_length(rows: PlannedRows) -> int:
    lengths = rows.lengths.sorted_tokens
    return (
        lengths[min(len(lengths) - 1, math.ceil(USUAL_SHARE * len(lengths)))]
        if lengths
        else rows.lengths.longest_tokens
    )


def _checkpoints(planner: Planner, point: Candidate) -> bool:
    assert point.config is not None
    return planner.checkpointing(point.config)


def _preference(run: PlannedRun, lengths: Sequence[int], checkpointing: bool) -> tuple[float, ...]:
    """Return what the recommended run has most of: rows that aren't cut, then the recipe, then rows per micro-batch.

    Gradient checkpointing costs a quarter to a third of the speed. It isn't bought for a larger micro-batch if one of
    :data:`ENOUGH_TOKENS` fits without it.
    """
    settings = run.settings
    length, rows = settings["max_length"], settings["micro_batch_size"]
    enough = not checkpointing and (rows * length >= ENOUGH_TOKENS or rows == settings["batch_size"])
    return (
        -lengths.index(length) if length in lengths else 0,
        run.total_parameters or 0,
        -QUANTIZATION_ORDER.index(settings["quantization"]),
        -abs(math.log2(settings["r"] / int(RECIPE["lora.r"]))),
        (run.trainable_parameters or 0) / settings["r"],
        enough,
        rows,
    )


def _with_error(run: PlannedRun) -> int:
    """Return the bytes that ``run`` needs if its prediction is too small by the prediction's error."""
    assert run.memory is not None
    kind = "cpu" if run.device == "cpu" else "cuda"
    process = CPU_PROCESS_BYTES if kind == "cpu" else 0
    return process + round(run.memory.peak_bytes * (1 + RELATIVE_ERROR[kind]))


def _nothing_fits(
    overrides: Sequence[str], axes: Mapping[str, str], runs: Sequence[PlannedRun], planner: Planner, fit_bytes: int
) -> NothingFits:
    if not runs:
        return NothingFits(None, None, ())
    smallest = min(runs, key=_with_error)
    needed = _with_error(smallest)
    least = {**axes, "training.micro_batch_size": "1"} if "training.micro_batch_size" in axes else dict(axes)
    helps = [
        *_shorter_length(overrides, least, smallest, planner),
        *_other_settings(overrides, least, planner),
        *_smaller_models(overrides, least, smallest, planner),
    ]
    cards = [name for name, (mib, _, _) in sorted(CARDS.items(), key=lambda card: card[1][0]) if mib * 2**20 >= needed]
    on_card = f", e.g. --fit {cards[0]}" if cards and smallest.device != "cpu" else ""
    helps.append(f"{bytes_text(needed)} of memory instead of {bytes_text(fit_bytes)}{on_card}")
    return NothingFits(smallest, needed, tuple(helps))


def _shorter_length(
    overrides: Sequence[str], axes: Mapping[str, str], smallest: PlannedRun, planner: Planner
) -> list[str]:
    tried = [length for length in SHORTER_LENGTHS if length < smallest.settings["max_length"]]
    kept = [text for text in overrides if override_key(text) != "training.max_length"]
    for length in tried:
        run = _first_with_headroom(kept, {**axes, "training.max_length": str(length)}, planner)
        if run is not None:
            return [f"shorter sequences: training.max_length={length} ({bytes_text(_peak(run))})"]
    return []


def _other_settings(overrides: Sequence[str], axes: Mapping[str, str], planner: Planner) -> list[str]:
    """Return what of the command line's settings would have to change to the recipe's."""
    helps = []
    for key, value in {**RECIPE, "training.micro_batch_size": "1"}.items():
        kept = [text for text in overrides if override_key(text) != key]
        if len(kept) < len(overrides):
            run = _first_with_headroom(kept, {**axes, key: value}, planner)
            if run is not None:
                helps.append(f"{key}={value} ({bytes_text(_peak(run))})")
    return helps


def _smaller_models(
    overrides: Sequence[str], axes: Mapping[str, str], smallest: PlannedRun, planner: Planner
) -> list[str]:
    """Return the largest models of the package that fit, if the command line names one of the Hub's."""
    keys = {override_key(text) for text in overrides}
    if (
        any(key.startswith("model.") and key != "model.variant" for key in keys)
        or smallest.settings["model"] == "embedded"
    ):
        return []
    kept = [text for text in overrides if override_key(text) not in ("model", "training.max_length")]
    length = str(smallest.settings["max_length"])
    fitting: dict[str, PlannedRun] = {}
    for family in known_families():
        if family != "embedded":
            run = _first_with_headroom(kept, {**axes, "model": family, "training.max_length": length}, planner)
            if run is not None and (run.total_parameters or 0) < (smallest.total_parameters or 0):
                fitting[family] = run
    largest = sorted(fitting.items(), key=lambda item: -(item[1].total_parameters or 0))[:MODELS_NAMED]
    if not largest:
        return []
    return ["a smaller model: " + ", ".join(f"model={name} ({bytes_text(_peak(run))})" for name, run in largest)]


def _first_with_headroom(overrides: Sequence[str], axes: Mapping[str, str], planner: Planner) -> PlannedRun | None:
    runs = map(planner.plan, _points(overrides, axes))
    return next((run for run in runs if run.memory is not None and run.fits and not run.borderline), None)


def _peak(run: PlannedRun) -> int:
    assert run.memory is not None
    return run.memory.peak_bytes


def json_fields(found: Recommended) -> dict[str, Any]:
    """Return what ``--json`` adds to the recommended configuration's object."""
    return {"recommended": True, "command": shlex.join(found.command)}
