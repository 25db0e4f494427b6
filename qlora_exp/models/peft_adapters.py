"""PEFT's adapters other than LoRA's: put on a base, and loaded again; config/peft_kinds.py has their rows."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.supertuning import SupertuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.architecture.tuned_weights import is_last_of_mlp, norm_tensors
from qlora_exp.config.peft_kinds import peft_kind_of, sparse_parameters
from qlora_exp.config.schema import Config
from qlora_exp.data.items import Item
from qlora_exp.errors import ModelError
from qlora_exp.models.adapters import ADAPTER, WEIGHTS_FILE
from qlora_exp.models.base import Base, clone_sharing_weights
from qlora_exp.system.device_errors import is_device_error

SCORED_ROWS = 64
"""Training rows whose gradient chooses entries."""


def attach_peft(
    model: PreTrainedModel, config: Config, modules: Sequence[str], architecture: Architecture, items: Sequence[Item]
) -> PeftModel:
    """Put the adapter of ``config.method`` on ``modules``. Random values are drawn from the run's seed: they are equal
    on float32 and quantized bases, and rounded to 16 bits on a base in 16 bits.

    ``items``: training rows, for ``gradient:0.01``.

    Raises:
        ModelError: PEFT refuses the options or a layer, or adapts other layers than these.
    """
    found = peft_kind_of(config.method)
    assert found is not None
    kind, options = found
    requested = _norm_modules(architecture, config) if kind.on_norms else list(modules)
    sparse = sparse_parameters(config.method)
    chosen: dict[str, torch.Tensor] = {}
    if sparse is not None and sparse[0] == "gradient":
        chosen = largest_gradients(model, requested, items, 1 - options["sparsity"])
    settings_class = getattr(peft, kind.config)
    known = {field.name for field in fields(settings_class)}
    extra: dict[str, Any] = {"target_modules": "|".join(re.escape(name) for name in sorted(requested))}
    if "feedforward_modules" in known:
        last = {shape.name for shape in architecture.weights if is_last_of_mlp(architecture, shape)}
        extra["feedforward_modules"] = "|".join(re.escape(name) for name in sorted(last & set(requested))) or "^$"
    if "random_seed" in known:
        extra["random_seed"] = config.seed
    if "fan_in_fan_out" in known:
        transposed = {shape.name for shape in architecture.weights if shape.kind == "conv1d"}
        extra["fan_in_fan_out"] = bool(transposed & set(requested))
    with _quiet_refusals(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        settings = settings_class(task_type="CAUSAL_LM", **extra, **kind.settings(options))
        adapted = peft.get_peft_model(model, settings, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    assert isinstance(adapted, PeftModel)
    names = set(adapted.base_model.targeted_module_names)
    if names != set(requested):
        differing = sorted(names ^ set(requested))[:3]
        what = "PEFT adapted other layers than those asked for"
        raise ModelError(what, ", ".join(differing), "name them in targets.modules")
    for name, indices in chosen.items():
        layer: Any = adapted.get_base_model().get_submodule(name)
        assert isinstance(layer, SupertuningLayer)
        layer.supertuning_indices[ADAPTER] = indices.to(layer.supertuning_indices[ADAPTER])
    _compute_in_input_dtype(adapted)
    return adapted


def load_peft(base: Base, folder: Path) -> PeftModel:
    """Return a clone of ``base`` with the adapter in ``folder``, in float32 as it was trained, for evaluation.

    Raises:
        ModelError: the folder has no adapter, or the adapter is damaged or belongs to another architecture.
    """
    file = folder / WEIGHTS_FILE
    try:
        saved = load_file(file)
    except FileNotFoundError:
        raise ModelError(f"there is no adapter: {WEIGHTS_FILE} is missing", str(folder)) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"the adapter can't be read: {error}", str(folder), "copy it again") from None
    with _quiet_refusals(str(folder)):
        adapted = PeftModel.from_pretrained(
            clone_sharing_weights(base), str(folder), is_trainable=False, autocast_adapter_dtype=False
        )
        trained = {name for name, _ in peft.get_peft_model_state_dict(adapted).items()}
        if missing := sorted(trained - saved.keys()):
            raise ModelError(f"the adapter doesn't fit the model: {missing[0]} is missing", str(folder))
        for name, parameter in adapted.named_parameters():
            if ".default" in name or name.endswith(f".{ADAPTER}"):
                parameter.data = parameter.data.to(torch.float32)
        unmatched = peft.set_peft_model_state_dict(adapted, saved).unexpected_keys
    if unmatched:
        raise ModelError(f"the adapter doesn't fit the model: {unmatched[0]} has no place in it", str(folder))
    _compute_in_input_dtype(adapted)
    return adapted.eval()


def _compute_in_input_dtype(model: PeftModel) -> None:
    """Let each adapted layer multiply in the dtype of its 16-bit input and return that dtype. PEFT multiplies its
    float32 values with 16-bit activations, which torch refuses outside of autocast."""
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        assert isinstance(layer, nn.Module)
        layer.forward = _in_input_dtype(layer, layer.forward)


def _in_input_dtype(layer: Any, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def computed(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if hidden.dtype is torch.float32 or layer.disable_adapters:
            return forward(hidden, *args, **kwargs)
        with torch.autocast(hidden.device.type, hidden.dtype):
            return forward(hidden, *args, **kwargs).to(hidden.dtype)

    return computed


def largest_gradients(
    model: PreTrainedModel, modules: Sequence[str], items: Sequence[Item], share: float
) -> dict[str, torch.Tensor]:
    """Return, by module, the flat positions of the entries with the largest gradient: ``share`` of each weight.

    The gradient is that of the mean loss of :data:`SCORED_ROWS` training rows, each with the same weight. ``model``
    stays as it is.
    """
    weights = [model.get_submodule(name).get_parameter("weight") for name in modules]
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for item in items[:SCORED_ROWS]:
            tokens = torch.tensor([item.ids], device=model.device)
            learned = torch.tensor([item.completion_mask], device=model.device, dtype=torch.bool)
            labels = tokens.masked_fill(~learned, -100)
            loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
            for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
                total += gradient
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return {
        name: torch.topk(total.abs().flatten(), int(total.numel() * share)).indices.to(torch.int32)
        for name, total in zip(modules, totals, strict=True)
    }


def _norm_modules(architecture: Architecture, config: Config) -> list[str]:
    names = {tensor.name.rpartition(".")[0]: None for tensor in norm_tensors(architecture, config.method)}
    return list(names)


@contextmanager
def _quiet_refusals(where: str = "method.peft_type, method.options, targets") -> Iterator[None]:
    """Turn PEFT's refusals into one line. Its warnings of options that don't fit are checked before."""
    # BOFT tries to compile a CUDA extension, and leaves these set where that fails.
    compilers = {name: os.environ.get(name) for name in ("CC", "CXX")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ValueError, TypeError, RuntimeError, NotImplementedError, KeyError, AssertionError) as error:
        if is_device_error(error):
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        hint = "other options or targets, or method=lora"
        raise ModelError(f"PEFT can't adapt this model so: {line}", where, hint) from None
    finally:
        for name, value in compilers.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
