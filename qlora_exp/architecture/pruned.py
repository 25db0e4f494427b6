"""A model of which only some decoder layers are kept (``model.layers``): a student for distillation."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from qlora_exp.architecture.shapes import Architecture, Experts, OtherTensor, WeightShape
from qlora_exp.architecture.tuned_weights import chosen_layers, layer_of
from qlora_exp.config.schema import ModelConfig

T = TypeVar("T", WeightShape, OtherTensor, Experts)


def kept_layers(layers: object, count: int, model_type: str) -> tuple[int, ...]:
    """Return the numbers of the decoder layers that ``model.layers`` keeps of ``count``, in the model's order.

    Raises:
        ModelError: the model has no such layer.
    """
    return tuple(sorted(chosen_layers(layers, count, model_type, "model.layers")))


def pruned(architecture: Architecture, model: ModelConfig) -> Architecture:
    """Return ``architecture`` with the layers of ``model.layers`` alone, numbered anew.

    Raises:
        ModelError: the model has no such layer.
    """
    if model.layers is None:
        return architecture
    numbers = kept_layers(model.layers, architecture.layers, architecture.model_type)
    new = {number: place for place, number in enumerate(numbers)}

    def kept(tensors: tuple[T, ...]) -> tuple[T, ...]:
        renumbered = []
        for tensor in tensors:
            number = layer_of(tensor.name)
            if number is None:
                renumbered.append(tensor)
            elif number in new:
                name = tensor.name.replace(f".{number}.", f".{new[number]}.", 1)
                renumbered.append(replace(tensor, name=name))
        return tuple(renumbered)

    smaller = replace(
        architecture,
        layers=len(numbers),
        weights=kept(architecture.weights),
        others=kept(architecture.others),
        experts=kept(architecture.experts),
    )
    parameters = sum(shape.parameters for shape in smaller.weights)
    parameters += sum(tensor.elements for tensor in smaller.others if not tensor.buffer)
    return replace(smaller, total_parameters=parameters)
