"""What uses the memory, and how large the weights are at 32, 16, 8 and 4 bits."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.analysis.configurations import Configuration, mean
from qlora_exp.records.types import Memory, RunRecord

PEAK_PARTS = ("weights", "quantization state", "adapters", "gradients", "optimizer", "activations")
QUANTIZATION_BITS = {32: ("fp32",), 16: ("fp16", "bf16"), 8: ("int8",), 4: ("nf4", "fp4")}


@dataclass(frozen=True)
class Breakdown:
    """Bytes by part (:data:`PEAK_PARTS`); ``None`` is unknown."""

    label: str
    parts: dict[str, float | None]


@dataclass(frozen=True)
class WeightSize:
    """``nominal_bytes``: parameters × bits / 8. ``measured_bytes``: mode → weights + quantization state in memory;
    larger, because embeddings and norms stay unquantized."""

    bits: int
    nominal_bytes: float
    measured_bytes: dict[str, float]


@dataclass(frozen=True)
class AdapterSize:
    rank: int
    targets: str
    parameters: int
    adapter_bytes: float | None


def parts_of(memory: Memory) -> dict[str, float | None]:
    """Return bytes by part; activations are the peak of training minus the other parts that it counts.

    A GPU's peak counts all parts. A CPU's peak is what training adds to the weights and adapters held at its start.
    """
    held = {
        "weights": memory.base_weight_bytes,
        "quantization state": memory.quantization_state_bytes,
        "adapters": memory.adapter_bytes,
        "gradients": memory.gradient_bytes,
        "optimizer": memory.optimizer_bytes,
    }
    counted = list(held.values()) if memory.source == "cuda_allocated" else [held["gradients"], held["optimizer"]]
    activations = None
    if memory.peak_train_bytes is not None and None not in counted:
        activations = max(0, memory.peak_train_bytes - sum(part for part in counted if part is not None))
    return {**held, "activations": activations}


def breakdowns(configurations: Sequence[Configuration]) -> list[Breakdown]:
    """Return one breakdown per quantization, rank and target set: means over the runs that know a part."""
    runs: dict[str, list[RunRecord]] = defaultdict(list)
    for configuration in configurations:
        for run in configuration.runs:
            runs[_kind(run)].append(run)
    bars = []
    for label, records in runs.items():
        parts_of_runs = [parts_of(record.memory) for record in records]
        parts = {
            part: mean(run_parts[part] for run_parts in parts_of_runs if run_parts[part] is not None)
            for part in PEAK_PARTS
        }
        bars.append(Breakdown(label, parts))
    return bars


def weight_sizes(records: Sequence[RunRecord]) -> list[WeightSize]:
    """Return the sizes of the largest model among the runs at 32, 16, 8 and 4 bits."""
    largest = max((record.plan.total_parameters for record in records if record.plan is not None), default=None)
    if largest is None:
        return []
    largest_runs = [record for record in records if record.plan is not None and record.plan.total_parameters == largest]
    measured: dict[str, float] = {}
    for record in largest_runs:
        memory, mode = record.memory, str((record.config.get("quantization") or {}).get("mode"))
        if memory.base_weight_bytes is not None:
            measured.setdefault(mode, memory.base_weight_bytes + (memory.quantization_state_bytes or 0))
    return [
        WeightSize(bits, largest * bits / 8, {mode: measured[mode] for mode in modes if mode in measured})
        for bits, modes in QUANTIZATION_BITS.items()
    ]


def adapter_sizes(records: Sequence[RunRecord]) -> list[AdapterSize]:
    """Return one size per rank and target set, the smallest first."""
    sizes: dict[tuple[int, str], AdapterSize] = {}
    for record in records:
        if record.plan is not None:
            rank, targets = int(record.config["lora"]["r"]), _targets(record)
            size = AdapterSize(rank, targets, record.plan.trainable_parameters, record.memory.adapter_bytes)
            sizes.setdefault((rank, targets), size)
    return sorted(sizes.values(), key=lambda size: size.parameters)


def _kind(record: RunRecord) -> str:
    return f"{record.config['quantization']['mode']} · r {record.config['lora']['r']} · {_targets(record)}"


def _targets(record: RunRecord) -> str:
    targets = record.config.get("targets") or {}
    modules = targets.get("modules")
    return "+".join(map(str, modules)) if modules else str(targets.get("set"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the answer and its tables for a folder of runs; ``--page FILE`` saves the plots."""
    from qlora_exp.analysis.ask import main as ask

    ask(["memory", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
