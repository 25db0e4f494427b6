"""``plan --fit``: which configurations fit into a given memory, best first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qlora_exp.config.overrides import override_key
from qlora_exp.errors import ConfigError
from qlora_exp.estimate.candidates import search_space
from qlora_exp.estimate.device import PlanDevice
from qlora_exp.estimate.planner import PlannedRun, Planner
from qlora_exp.estimate.tables import LEGEND, candidate_name, notes, plan_table, row_notes
from qlora_exp.formatting import print_table

SEARCHED: dict[str, tuple[str, ...]] = {
    "quantization": ("fp32", "bf16", "int8", "nf4"),
    "lora.r": ("4", "8", "16", "32", "64", "128", "256"),
    "targets": ("attention_qv", "attention", "mlp", "all_linear"),
    "training.max_length": ("256", "512", "1024", "2048", "4096"),
    "training.micro_batch_size": ("1", "2", "4", "8", "16"),
}
"""The values to try for keys that the command line doesn't set. fp16 and fp4 need the same memory as bf16 and nf4."""

BEST = "larger precision first, then rank, then sequence length, then adapted layers, then micro-batch"
PRECISIONS = {"fp32": 4, "bf16": 3, "fp16": 3, "int8": 2, "nf4": 1, "fp4": 0}


def with_search_axes(overrides: Sequence[str], device: PlanDevice | None = None) -> list[str]:
    """Return ``overrides`` with an axis for each key of :data:`SEARCHED` that they don't set.

    Micro-batches divide the batch, sequences are no longer than the model allows, and the 16-bit mode is the one that
    ``device`` computes in.
    """
    overridden = {override_key(text) for text in overrides}
    fixed_keys = overridden | {"targets" if key.startswith("targets.") else key for key in overridden}
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


def print_fitting(runs: Sequence[PlannedRun], fit: str) -> None:
    """Print the Pareto front of the runs that fit. ``fit``: the value of ``--fit``.

    Raises:
        ConfigError: none of them fits.
    """
    fitting = by_preference(runs)
    if not fitting:
        smallest = min((run for run in runs if run.memory is not None), key=_peak_bytes)
        problem = f"nothing fits: the smallest, {candidate_name(smallest)}, {smallest.reason}"
        raise ConfigError(problem, f"--fit {fit}", "choose a smaller model or a larger card")
    best = pareto_front(fitting)
    print_table(plan_table(best))
    borderline = sum(run.borderline for run in fitting)
    note = f" ({borderline:,} of them borderline)" if borderline else ""
    print(f"\n{len(fitting):,} of {len(runs):,} fit into {fit}{note}; shown: the Pareto front")
    print(f"best first: {BEST}")
    print(LEGEND, *notes(best), *row_notes(best), sep="\n")


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
