"""``plan --fit``: the recommended configuration as text, and which others fit into a given memory, best first."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from qlora_exp.config.checks_method import TUNES_WEIGHTS
from qlora_exp.config.enums import Method
from qlora_exp.config.overrides import hydra_value, override_key
from qlora_exp.errors import ConfigError
from qlora_exp.estimate.candidates import search_space
from qlora_exp.estimate.device import PlanDevice
from qlora_exp.estimate.memory_fit import BORDERLINE_NOTES, CPU_PROCESS_BYTES
from qlora_exp.estimate.planner import PlannedRun, Planner
from qlora_exp.estimate.recommended import LORA_KEYS, RECIPE, NothingFits, Recommended, command_lines
from qlora_exp.estimate.tables import candidate_name, cost_summary, notes
from qlora_exp.formatting import UNKNOWN_CELL, bytes_text, number, print_table, simple_table

SEARCHED: dict[str, tuple[str, ...]] = {
    "quantization": ("fp32", "bf16", "int8", "nf4"),
    "lora.r": ("4", "8", "16", "32", "64", "128", "256"),
    "targets": ("attention_qv", "attention", "mlp", "all_linear"),
    "training.max_length": ("256", "512", "1024", "2048", "4096"),
    "training.micro_batch_size": ("1", "2", "4", "8", "16"),
}
"""The values to try for keys that the command line doesn't set. fp16 and fp4 need the same memory as bf16 and nf4."""

BEST = "larger precision first, then rank, then sequence length, then adapted layers, then micro-batch"
WIDTH = 98
"""Columns of all lines but the table's."""
FRONT_SHOWN = 16
"""Rows of the table: with the recommendation it fits on one screen."""
FRONT_HEADINGS = {
    "lora.r": "r",
    "training.max_length": "length",
    "training.micro_batch_size": "micro-batch",
}
_LEVELS = (
    *(("int2_asym",), ("int3_asym",), ("fp4",), ("nf4", "int4_asym", "int4_sym")),
    *(("int8", "int8_sym", "int8_asym"), ("fp16", "bf16"), ("fp32",)),
)
PRECISIONS = {mode: level for level, modes in enumerate(_LEVELS) for mode in modes}


def named_methods(overrides: Sequence[str]) -> frozenset[str]:
    """Return the tuning methods that the overrides name, for example of ``method=full,lora``; LoRA if they name
    none."""
    named = [text.partition("=")[2] for text in overrides if override_key(text) == "method"]
    return frozenset(value.strip() for value in named[-1].split(",")) if named else frozenset({Method.lora.value})


def with_precision(overrides: Sequence[str], device: PlanDevice | None = None) -> list[str]:
    """Return ``overrides`` with a 16-bit base if they name no quantization and rule out the recommended one: a method
    that trains the base's own weights, quantization-aware training, some kinds of PEFT.

    Raises:
        ConfigError, Problems: a misspelt key or choice, a wrong type.
    """
    if any(override_key(text).partition(".")[0] == "quantization" for text in overrides):
        return list(overrides)
    if not named_methods(overrides) <= {kind.value for kind in TUNES_WEIGHTS}:
        recipe = search_space([*overrides, f"quantization={RECIPE['quantization']}"]).points
        if any(point.config is not None for point in recipe):
            return list(overrides)
    no_bf16 = device is not None and device.kind == "cuda" and not device.bf16
    return [*overrides, f"quantization={'fp16' if no_bf16 else 'bf16'}"]


def with_search_axes(overrides: Sequence[str], device: PlanDevice | None = None) -> list[str]:
    """Return ``overrides`` with an axis for each key of :data:`SEARCHED` that they don't set.

    Micro-batches divide the batch, sequences are no longer than the model allows, and the 16-bit mode is the one that
    ``device`` computes in.
    """
    overridden = {override_key(text) for text in overrides}
    fixed_keys = overridden | {"targets" if key.startswith("targets.") else key for key in overridden}
    if "training.micro_batch_tokens" in overridden:  # the other way to choose a micro-batch
        fixed_keys |= {"training.micro_batch_size"}
    if Method.lora.value not in named_methods(overrides):
        fixed_keys |= set(LORA_KEYS)
    axes = {key: values for key, values in SEARCHED.items() if key not in fixed_keys}
    if "quantization" in axes and device is not None and device.kind == "cuda" and not device.bf16:
        axes["quantization"] = tuple("fp16" if mode == "bf16" else mode for mode in axes["quantization"])
    first = next((point.config for point in search_space(overrides).points if point.config is not None), None)
    if first is not None:
        batch, max_positions = first.training.batch_size, Planner().architecture(first.model).positions
        _narrow(axes, "training.micro_batch_size", lambda value: batch % value == 0)
        _narrow(axes, "training.max_length", lambda value: max_positions is None or value <= max_positions)
    return [*overrides, *(f"{key}={','.join(values)}" for key, values in axes.items())]


def _narrow(axes: dict[str, tuple[str, ...]], key: str, is_valid: Callable[[int], bool]) -> None:
    if key in axes:
        axes[key] = tuple(value for value in axes[key] if is_valid(int(value))) or axes[key][:1]


def print_fitting(runs: Sequence[PlannedRun], fit: str, found: Recommended | NothingFits | None = None) -> None:
    """Print the recommended configuration, then the Pareto front of the runs that fit.

    ``fit``: the value of ``--fit``. ``found``: ``None`` for the configurations of a sweep, which get no recommendation.

    Raises:
        ConfigError: none of them fits.
    """
    fitting = by_preference(runs)
    if isinstance(found, Recommended):
        print(*recommendation_lines(found, fit), sep="\n", end="\n\n")
    elif isinstance(found, NothingFits):
        if not fitting or found.smallest is None:
            raise _nothing_fits(runs, fit, found)
        print(*_no_headroom_lines(found, fit), sep="\n", end="\n\n")
    elif not fitting:
        raise _nothing_fits(runs, fit, None)
    if not fitting:
        return
    safe = [run for run in fitting if not run.borderline]
    front = _first_of_equals(pareto_front(safe or fitting))
    axes = [key for key in front[0].params if len({str(run.params[key]) for run in front}) > 1]
    same = " ".join(f"{key}={hydra_value(value)}" for key, value in front[0].params.items() if key not in axes)
    count = f"{len(fitting):,} of {len(runs):,} fit into {fit}"
    count += f", {len(safe):,} of them with the prediction's error" if len(safe) < len(fitting) else ""
    shared = f", all with {same}" if same else ""
    _print_wrapped([f"{count}; those that no other beats in everything{shared}:"])
    print()
    print_table(_front_table(front[:FRONT_SHOWN], axes))
    if len(front) > FRONT_SHOWN:
        print(f"… and {len(front) - FRONT_SHOWN:,} more: --json has all that fit")
    print()
    rows = "peak: for rows as long as training.max_length; a run predicts it again from its own rows"
    # Without what each configuration adds, e.g. that its rank is high: the recommended one shows its own notes.
    _print_wrapped([f"best first: {BEST}", rows, *notes([replace(run, notes=()) for run in front])])


def _print_wrapped(lines: Sequence[str]) -> None:
    for line in lines:
        print(textwrap.fill(line, WIDTH, subsequent_indent="  "))


def _first_of_equals(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the first of the runs with the same parameters and bytes: twice as many rows of half the length, e.g."""
    firsts: dict[Any, PlannedRun] = {}
    for run in runs:
        firsts.setdefault((run.settings["quantization"], run.trainable_parameters, run.memory, run.disk), run)
    return list(firsts.values())


def recommendation_lines(found: Recommended, fit: str) -> list[str]:
    """Return the command to start with, why, and what it is predicted to take, in lines of at most 100 columns."""
    run, memory = found.run, found.run.memory
    assert memory is not None
    kind = "cpu" if run.device == "cpu" else "cuda"
    process = f" and the process's {bytes_text(CPU_PROCESS_BYTES)}" if kind == "cpu" else ""
    needed = f"{bytes_text(memory.peak_bytes)} predicted; with the prediction's error{process} "
    micro_batch = run.settings["micro_batch_tokens"] or run.settings["micro_batch_size"]
    unit = "tokens" if run.settings["micro_batch_tokens"] else "rows"
    checkpointing = "with" if found.checkpointing else "without"
    facts = {
        "peak": [f"{needed}{bytes_text(found.needed_bytes)} of {fit}", f"({BORDERLINE_NOTES[kind]})"],
        "length": [found.length_reason],
        "micro-batch": [f"{micro_batch} {unit}, {checkpointing} gradient checkpointing"],
        "time": [(cost_summary([run]) or UNKNOWN_CELL).removeprefix("training: ").removeprefix("time ")],
        "disk": [f"{bytes_text(run.disk.adapter_file_bytes)} for the adapter" if run.disk else UNKNOWN_CELL],
    }
    lines = [f"recommended for {fit}:", "", *(f"  {line}" for line in command_lines(found.command, WIDTH - 2)), ""]
    for name, texts in (*facts.items(), *(("note", [note]) for note in run.notes)):
        wrapped = [line for text in texts for line in textwrap.wrap(text, WIDTH - 14)]
        lines += [f"  {name if number == 0 else '':<12}{line}" for number, line in enumerate(wrapped)]
    return lines


def _no_headroom_lines(found: NothingFits, fit: str) -> list[str]:
    smallest = found.smallest
    assert smallest is not None
    first = f"no recommendation: nothing fits into {fit} even if the prediction is too low by its error."
    settings = smallest.settings
    name = f"{settings['quantization']}, r = {settings['r']}, {settings['targets']}, {settings['max_length']} tokens"
    name += f", micro-batches of {settings['micro_batch_size']}"
    helps = [textwrap.fill(help, WIDTH, initial_indent="  * ", subsequent_indent="    ") for help in found.helps]
    return [textwrap.fill(first, WIDTH), textwrap.fill(f"The smallest ({name}): {smallest.reason}", WIDTH), "",
            "What would help:", *helps]  # fmt: skip


def _nothing_fits(runs: Sequence[PlannedRun], fit: str, found: NothingFits | None) -> ConfigError:
    smallest = min((run for run in runs if run.memory is not None), key=_peak_bytes)
    problem = f"nothing fits: the smallest, {candidate_name(smallest)}, {smallest.reason}"
    hint = "; or ".join(found.helps) if found is not None and found.helps else "choose a smaller model or a larger card"
    return ConfigError(problem, f"--fit {fit}", hint)


def _front_table(front: Sequence[PlannedRun], axes: Sequence[str]) -> Table:
    headings = [FRONT_HEADINGS.get(key, key.rpartition(".")[2]) for key in axes]
    table = simple_table(*headings, "trainable", "peak", "fits", "checkpoint")
    for run in front:
        no_lora = run.params.get("method", Method.lora.value) != Method.lora.value
        cells = ["–" if no_lora and key in LORA_KEYS else str(run.params[key]) for key in axes]
        fits = "yes?" if run.borderline else "yes"
        peak, disk = bytes_text(_peak_bytes(run)), bytes_text(run.disk.checkpoint_bytes if run.disk else None)
        table.add_row(*cells, number(run.trainable_parameters, 0), peak, fits, disk)
    return table


def by_preference(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the runs that fit, best first: :data:`BEST`."""
    return sorted((run for run in runs if run.fits), key=_preference, reverse=True)


def pareto_front(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the runs that no other run matches or beats in every respect; of equal runs, the first. ``runs``: best
    first."""
    front: list[PlannedRun] = []
    for run in runs:  # best first: a run that dominates comes earlier
        preference = _preference(run)
        if not any(all(a >= b for a, b in zip(_preference(other), preference, strict=True)) for other in front):
            front.append(run)
    return front


def _preference(run: PlannedRun) -> tuple[float, ...]:
    settings = run.settings
    assert run.memory is not None
    trainable_parameters = run.trainable_parameters or 0
    return (
        PRECISIONS[settings["quantization"]],
        settings["r"],
        settings["max_length"],
        trainable_parameters / settings["r"],
        settings["micro_batch_size"],
    )


def _peak_bytes(run: PlannedRun) -> int:
    assert run.memory is not None
    return run.memory.peak_bytes
