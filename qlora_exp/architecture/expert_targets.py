"""Experts' three-dimensional parameters as targets of LoRA: one pair of matrices for each expert."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.schema import LoraConfig
from qlora_exp.errors import ModelError, nearest

INPUT_PROJECTIONS = ("gate_up_proj", "up_proj", "gate_proj")


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter that holds one matrix (inputs × outputs, in either order) of each expert of a layer. ``saved_as``:
    the name of its adapter's module in a file of PEFT, which nests the adapters of one module."""

    name: str
    saved_as: str
    experts: int
    inputs: int
    outputs: int

    @property
    def elements(self) -> int:
        """Return the number of its values."""
        return self.experts * self.inputs * self.outputs


def expert_targets(architecture: Architecture, lora: LoraConfig) -> tuple[ExpertParameter, ...]:
    """Return the parameters that ``lora.target_parameters`` names by their endings, in the model's order.

    Raises:
        ModelError: a name fits no experts' parameter.
    """
    if lora.target_parameters is None:
        return ()
    offered = _offered(architecture)
    chosen: set[str] = set()
    for ending in lora.target_parameters:
        matches = {name for name, *_ in offered if name == ending or name.endswith(f".{ending}")}
        if not matches:
            where = f"lora.target_parameters = {ending}, architecture {architecture.model_type}"
            parts = ending.count(".") + 1
            known = sorted({".".join(name.split(".")[-parts:]) for name, *_ in offered})
            what = f"no experts' parameter is called {ending}" if known else "the model has no experts' parameters"
            raise ModelError(what, where, nearest(ending, known) if known else "targets=mlp or targets=all_linear")
        chosen |= matches
    targets = [entry for entry in offered if entry[0] in chosen]
    modules = [name.rpartition(".")[0] for name, *_ in targets]
    return tuple(
        ExpertParameter(name, modules[number] + ".base_layer" * modules[number + 1 :].count(modules[number]), *sizes)
        for number, (name, *sizes) in enumerate(targets)
    )


def _offered(architecture: Architecture) -> list[tuple[str, int, int, int]]:
    """Return name, experts, inputs and outputs of each parameter whose size is that of its experts' matrices."""
    experts = {entry.name: entry for entry in architecture.experts}
    offered = []
    for tensor in architecture.others:
        module, _, part = tensor.name.rpartition(".")
        entry, hidden = experts.get(module), architecture.hidden_size
        if entry is None or not hidden:
            continue
        if part == "down_proj":
            inputs, outputs = entry.intermediate, hidden
        elif part in INPUT_PROJECTIONS:
            inputs, outputs = hidden, tensor.elements // (entry.count * hidden)
        else:
            continue
        if entry.count * inputs * outputs == tensor.elements:
            offered.append((tensor.name, entry.count, inputs, outputs))
    return offered
