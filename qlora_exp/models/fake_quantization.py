"""Quantization-aware training: every linear layer of the body computes with rounded weights, and learns through them.

The rounded weight is round(W), or round(W + s·B·A) with a LoRA adapter: what ships after merging. Its gradient passes
the rounding as if it were not there (straight-through, Bengio et al. 2013). Layers without an adapter are rounded, too,
because they ship rounded.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from qlora_exp.config.schema import Config
from qlora_exp.config.shipping import QatConfig
from qlora_exp.errors import ModelError
from qlora_exp.quantizers.weight_formats import TERNARY, WeightFormat, is_ternary, ternary_masters, weight_format

STATE_ATTRIBUTE = "qlora_exp_qat"


@dataclass
class FakeQuantization:
    """The state that all layers of one model share. ``strength``: 0 computes with exact weights, 1 with rounded ones;
    between them, with a mean of both."""

    format: WeightFormat
    strength: float = 1.0
    layers: list[str] = field(default_factory=list)

    def weight(self, exact: Tensor) -> Tensor:
        """Return the weight to compute with; its gradient is that of ``exact``."""
        if self.strength == 0.0:
            return exact
        # In float32: in 16 bits the sum would not be the rounded weight.
        fixed = exact.detach().float()
        return exact.float() + (self.format.rounded(fixed) - fixed) * self.strength


def qat_format(qat: QatConfig) -> WeightFormat | None:
    """Return the format of ``training.qat``; ``None``: it is off."""
    return weight_format(qat.format, qat.symmetric, qat.group) if qat.format is not None else None


def body_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the linear layers that are rounded when a model ships: all but the output head. A layer with an adapter
    counts as one."""
    given: Any = model
    plain = given.get_base_model() if hasattr(given, "get_base_model") else given
    head: Any = plain.get_output_embeddings()
    inside: set[int] = set()
    for name, module in plain.named_modules():
        if id(module) in inside or module is head:
            continue
        if isinstance(module, LoraLayer):
            inside |= {id(part) for part in module.modules()}
            yield name, module
        elif isinstance(module, nn.Linear | Conv1D):
            yield name, module


def matrix_of(layer: Any) -> Tensor:
    """Return the weight of a linear layer, or of the one under an adapter, as (rows, columns): GPT-2's ``Conv1D`` keeps
    it transposed."""
    plain = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    weight: Tensor = plain.weight
    return weight.T if isinstance(plain, Conv1D) else weight


def start_from_ternary(model: nn.Module, qat: QatConfig) -> None:
    """Give ternary layers that are trained weights from which they can learn, if they are to be ternary again: the
    model computes the same. ``model`` owns these weights, in float32."""
    if qat.format != TERNARY:
        return
    for _, module in body_linears(model):
        weight = module.weight
        if weight.requires_grad and is_ternary(weight.detach()):
            weight.data = ternary_masters(weight.detach())


def install_fake_quantization(model: nn.Module, config: Config) -> FakeQuantization | None:
    """Let the linear layers of ``model`` compute with rounded weights from now on, if ``training.qat`` asks for it.

    Raises:
        ModelError: the model has no linear layer that can be rounded, or one of its widths isn't divisible by the
            group.
    """
    format = qat_format(config.training.qat)
    if format is None:
        return None
    state = FakeQuantization(format)
    for name, module in body_linears(model):
        width = matrix_of(module).shape[1]
        if format.group is not None and width % format.group:
            what = f"{name} has {width} inputs, which {format.name} can't divide into groups of {format.group}"
            raise ModelError(what, "training.qat", "another training.qat.group, or training.qat.format")
        state.layers.append(name)
        forward = _adapted_forward if isinstance(module, LoraLayer) else _plain_forward
        module.__dict__["forward"] = types.MethodType(forward(state), module)
    if not state.layers:
        what = "the model has no linear layers that can be rounded"
        raise ModelError(what, "training.qat", "training.qat.format=null")
    setattr(model, STATE_ATTRIBUTE, state)
    return state


def fake_quantization_of(model: nn.Module) -> FakeQuantization | None:
    """Return the state that :func:`install_fake_quantization` left; ``None``: it installed nothing."""
    return getattr(model, STATE_ATTRIBUTE, None)


@contextmanager
def exact_weights(model: nn.Module) -> Iterator[None]:
    """Let ``model`` compute with exact weights in the ``with`` block."""
    state = fake_quantization_of(model)
    strength = state.strength if state is not None else 0.0
    if state is not None:
        state.strength = 0.0
    try:
        yield
    finally:
        if state is not None:
            state.strength = strength


def strength_at(step: int, steps: int, qat: QatConfig) -> float:
    """Return the strength of the rounding in a step (0 is the first): 0 before ``start_step``, then rising linearly
    over ``warmup_ratio`` of the ``steps``."""
    if step < qat.start_step:
        return 0.0
    warmup = round(qat.warmup_ratio * steps)
    return min(1.0, (step - qat.start_step + 1) / warmup) if warmup else 1.0


def merged_weight(layer: Any) -> Tensor:
    """Return W + s·B·A (rows, columns) of a layer with one active adapter in float32, as merging computes it."""
    base = matrix_of(layer)
    if layer.disable_adapters or not layer.active_adapters:
        return base.float()
    name = layer.active_adapters[0]
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return base.float() + (b.float() @ a.float()) * layer.scaling[name]  # type: ignore[no-any-return]


def _plain_forward(state: FakeQuantization) -> Any:
    cache = _Rounded(state)

    def forward(self: Any, x: Tensor) -> Tensor:
        return linear(x, cache(matrix_of(self), (self.weight,)).to(x.dtype), self.bias)

    return forward


def _adapted_forward(state: FakeQuantization) -> Any:
    cache = _Rounded(state)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        if self.disable_adapters:  # the base by itself, as it was scored before training
            return linear(x, matrix_of(self), base.bias)
        name = self.active_adapters[0]
        tensors = (base.weight, self.lora_A[name].weight, self.lora_B[name].weight)
        weight = merged_weight(self)
        return linear(x, cache(weight, tensors).to(x.dtype), base.bias)

    return forward


class _Rounded:
    """Rounds a layer's weight, and keeps the result while nothing that it was made of changes: in scoring, and for
    layers that aren't trained."""

    def __init__(self, state: FakeQuantization) -> None:
        self.state = state
        self.key: tuple[Any, ...] | None = None
        self.value: Tensor | None = None

    def __call__(self, weight: Tensor, made_of: tuple[Tensor, ...]) -> Tensor:
        if weight.requires_grad and torch.is_grad_enabled():
            self.key = self.value = None
            return self.state.weight(weight)
        key = (self.state.strength, *((id(tensor), tensor._version, tensor.data_ptr()) for tensor in made_of))
        if key != self.key or self.value is None:
            self.key, self.value = key, self.state.weight(weight).detach()
        return self.value


def round_linears(model: nn.Module, format: WeightFormat, search: bool) -> tuple[int, int]:
    """Round the weights of :func:`body_linears` of a merged model in place, and return their number and packed bytes.

    Raises:
        ModelError: a layer's width isn't divisible by the format's group.
    """
    count, bits = 0, 0.0
    for name, module in body_linears(model):
        matrix = matrix_of(module).detach()
        rows, columns = matrix.shape
        if format.group is not None and columns % format.group:
            what = f"{name} has {columns} inputs, which {format.name} can't divide into groups of {format.group}"
            raise ModelError(what, "ship.format", "another ship.group or ship.format")
        rounded = format.rounded(matrix, search).to(matrix.dtype)
        module.weight.data = rounded.T.contiguous() if isinstance(module, Conv1D) else rounded
        count, bits = count + matrix.numel(), bits + format.stored_bits(rows, columns)
    return count, round(bits / 8)
