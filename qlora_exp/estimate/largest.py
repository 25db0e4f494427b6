"""The reverse question: which configurations fit into so much memory, best first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qlora_exp.config.overrides import override_key
from qlora_exp.estimate.device import PlanDevice
from qlora_exp.estimate.estimator import PlannedRun, Planner
from qlora_exp.estimate.sweep import search_space

SEARCHED: dict[str, tuple[str, ...]] = {
    "quantization": ("fp32", "bf16", "int8", "nf4"),
    "lora.r": ("4", "8", "16", "32", "64", "128", "256"),
    "targets": ("attention_qv", "attention", "mlp", "all_linear"),
    "training.max_length": ("256", "512", "1024", "2048", "4096"),
    "training.micro_batch_size": ("1", "2", "4", "8", "16"),
}
"""What is tried where the command line doesn't say; fp16 and fp4 take what bf16 and nf4 take."""

BEST = "larger precision first, then rank, then sequence length, then adapted layers, then micro-batch"
PRECISIONS = {"fp32": 4, "bf16": 3, "fp16": 3, "int8": 2, "nf4": 1, "fp4": 0}


def with_search_axes(overrides: Sequence[str], device: PlanDevice | None = None) -> list[str]:
    """``overrides`` with an axis for each of :data:`SEARCHED` that they leave open. Micro-batches divide the batch,
    sequences are no longer than the model takes, and 16 bits are those that the card ``device`` computes in."""
    given = {override_key(text) for text in overrides}
    taken = given | {"targets" if key.startswith("targets.") else key for key in given}
    axes = {key: values for key, values in SEARCHED.items() if key not in taken}
    if "quantization" in axes and device is not None and device.kind == "cuda" and not device.bf16:
        axes["quantization"] = tuple("fp16" if mode == "bf16" else mode for mode in axes["quantization"])
    first = next((point.config for point in search_space(overrides).points if point.config is not None), None)
    if first is not None:
        batch, longest = first.training.batch_size, Planner().architecture(first.model).positions
        _narrow(axes, "training.micro_batch_size", lambda value: batch % value == 0)
        _narrow(axes, "training.max_length", lambda value: longest is None or value <= longest)
    return [*overrides, *(f"{key}={','.join(values)}" for key, values in axes.items())]


def _narrow(axes: dict[str, tuple[str, ...]], key: str, fitting: Callable[[int], bool]) -> None:
    if key in axes:
        axes[key] = tuple(value for value in axes[key] if fitting(int(value))) or axes[key][:1]


def by_preference(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """What fits: :data:`BEST`."""
    return sorted((run for run in runs if run.fits), key=_preference, reverse=True)


def pareto_front(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Those than which no other is at least as good in every respect; of equals the first."""
    kept: list[PlannedRun] = []
    for run in runs:  # best first: whoever dominates comes before
        own = _preference(run)
        if not any(all(a >= b for a, b in zip(_preference(other), own, strict=True)) for other in kept):
            kept.append(run)
    return kept


def _preference(run: PlannedRun) -> tuple[float, ...]:
    settings = run.settings
    assert run.memory is not None
    targets = run.trainable_parameters or 0
    return (
        PRECISIONS[settings["quantization"]],
        settings["r"],
        settings["max_length"],
        targets / settings["r"],
        settings["micro_batch_size"],
    )
