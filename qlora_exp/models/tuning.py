"""What every tuning method offers: attach, trained parameters, save, load, merge; and the base without the tuning.

LoRA's weights are PEFT's files in ``RUN/adapter``. Other methods write ``RUN/tuned``: the tensors that they trained,
under the names that these have in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from qlora_exp.architecture.expert_targets import expert_targets
from qlora_exp.architecture.shapes import Architecture
from qlora_exp.architecture.tuned_weights import tuned_tensors, whole_tensors
from qlora_exp.config.enums import ComputeDtype, Method, Quantization
from qlora_exp.config.peft_kinds import in_peft_format, peft_kind_of
from qlora_exp.config.schema import Config
from qlora_exp.data.items import Item
from qlora_exp.errors import ModelError
from qlora_exp.models.adapters import (
    adapter_parameters,
    attach_adapters,
    load_adapter,
    recast_adapters,
    save_adapter,
    whole_parameters,
)
from qlora_exp.models.base import Base, clone_sharing_weights, load_base
from qlora_exp.models.bottleneck import bottlenecks, insert_bottlenecks, set_active
from qlora_exp.models.fake_quantization import (
    exact_weights,
    install_fake_quantization,
    qat_format,
    round_linears,
    start_from_ternary,
)
from qlora_exp.models.inspect import describe
from qlora_exp.models.merging import merged_model
from qlora_exp.models.peft_adapters import attach_peft, load_peft
from qlora_exp.records.files import write_json

TUNED_FILE = "tuned.safetensors"
NAMES_ATTRIBUTE = "qlora_exp_tuned"
"""On a model that isn't PEFT's: the names of its trained parameters."""
BASE_ATTRIBUTE = "qlora_exp_base_weights"
"""On a loaded model: the base's own tensors, by name."""
START_VALUES = "qlora_exp_start_values"
"""On a model before training: float32 values, for :func:`restore_precision`."""


def attach(
    model: PreTrainedModel,
    config: Config,
    modules: Sequence[str],
    architecture: Architecture,
    items: Sequence[Item] = (),
) -> Any:
    """Return ``model`` ready for training by ``config.method``. A base that shares its tensors doesn't change.

    ``modules``: from ``trained_modules``. Weights that are trained are float32 copies. ``items``: training rows, for
    methods that choose what they train by gradients.
    """
    if config.method.kind is Method.lora:
        whole = [tensor.name.rpartition(".")[0] for tensor in whole_tensors(architecture, config.lora)]
        parameters = [target.name for target in expert_targets(architecture, config.lora)]
        adapted = attach_adapters(model, config, modules, items, whole, parameters)
        install_fake_quantization(adapted, config)
        return adapted
    if peft_kind_of(config.method) is not None:
        adapted = attach_peft(model, config, modules, architecture, items)
        set_trained(adapted, [name for name, parameter in adapted.named_parameters() if parameter.requires_grad])
        return adapted
    model.requires_grad_(False)
    if config.method.kind is Method.bottleneck:
        insert_bottlenecks(model, config, architecture)
        names = [name for name, _ in _bottleneck_parameters(model)]
    else:
        names = [tensor.name for tensor in tuned_tensors(architecture, config.method)]
        _replace(model, {name: _parameter(model, name).detach().to(torch.float32, copy=True) for name in names})
    set_trained(model, names)
    setattr(model, START_VALUES, {name: value.detach().clone() for name, value in _bottleneck_parameters(model)})
    start_from_ternary(model, config.training.qat)
    install_fake_quantization(model, config)
    return model


def set_trained(model: nn.Module, names: Sequence[str]) -> None:
    """Mark these parameters as those that the run trains, in float32. Their values are kept for
    :func:`restore_precision`."""
    setattr(model, NAMES_ATTRIBUTE, tuple(names))
    for _, parameter in tuned_parameters(model):
        parameter.requires_grad_(True)
        parameter.data = parameter.data.to(torch.float32)
    if isinstance(model, PeftModel):
        setattr(model, START_VALUES, {name: value.detach().clone() for name, value in tuned_parameters(model)})


def adapter_loader(config: Config) -> Callable[[Base, Path], PeftModel]:
    """Return what loads an adapter of ``RUN/adapter`` on a base."""
    return load_adapter if config.method.kind is Method.lora else load_peft


def is_peft(model: Any) -> bool:
    """Return whether PEFT holds the model's adapters."""
    return isinstance(model, PeftModel)


def tuned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that the run trains or trained, with their names."""
    if isinstance(model, PeftModel) and not hasattr(model, NAMES_ATTRIBUTE):
        yield from adapter_parameters(model)
        return
    for name in getattr(model, NAMES_ATTRIBUTE, ()):
        yield name, _parameter(model, name)


def restore_precision(model: nn.Module, config: Config) -> None:
    """Restore dtype and values of what SFTTrainer casts to bfloat16 on a quantized base. Call it before an optimizer
    exists."""
    if isinstance(model, PeftModel) and config.method.kind is Method.lora:
        recast_adapters(model, config.lora)
        return
    start: dict[str, torch.Tensor] = model.__dict__.pop(START_VALUES, {})
    for name, parameter in tuned_parameters(model):
        value = start.get(name, parameter.data)
        at_start = torch.equal(value.to(parameter.dtype), parameter.detach())
        parameter.data = (value if at_start else parameter.data).to(torch.float32)


def end_training(model: nn.Module, dtype: str) -> None:
    """Give trained base weights the base's dtype, in which they are saved and scored. Inserted modules stay in
    float32."""
    inserted = {name for name, _ in _bottleneck_parameters(model)}
    if not isinstance(model, PeftModel):
        for name, parameter in tuned_parameters(model):
            if name not in inserted:
                parameter.data = parameter.data.to(getattr(torch, dtype))
    else:
        for _, parameter in whole_parameters(model):
            parameter.data = parameter.data.to(getattr(torch, dtype))


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the trained tensors of a model that isn't PEFT's, on the CPU, by name."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tuned_parameters(model)}


def save_tuned(model: Any, folder: Path) -> None:
    """Write what the run trained to ``folder`` (``RunPaths.weights``)."""
    if isinstance(model, PeftModel):
        save_adapter(model, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(model), str(folder / TUNED_FILE), metadata={"format": "pt"})
    write_json(folder / "tuned.json", {"tensors": list(getattr(model, NAMES_ATTRIBUTE))})


def load_tuned(base: Base, config: Config, folder: Path) -> Any:
    """Return a clone of ``base`` as the run left it, for evaluation.

    Raises:
        ModelError: there is no such file, or it is damaged or belongs to another architecture.
    """
    if config.method.kind is Method.lora:
        adapted = load_adapter(base, folder)
        install_fake_quantization(adapted, config)
        return adapted
    if peft_kind_of(config.method) is not None:
        return load_peft(base, folder)
    saved = read_tuned(folder)
    model = clone_sharing_weights(base)
    if config.method.kind is Method.bottleneck:
        insert_bottlenecks(model, config, describe(config.model))
    with_tensors(model, saved, folder)
    install_fake_quantization(model, config)
    return model.eval()


def read_tuned(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in ``folder``, by name."""
    file = folder / TUNED_FILE
    try:
        saved: dict[str, torch.Tensor] = load_file(file)
        return saved
    except FileNotFoundError:
        raise ModelError(f"there are no tuned weights: {TUNED_FILE} is missing", str(folder)) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"the tuned weights can't be read: {error}", str(file), "copy them again") from None


def restore_tuned(model: nn.Module, folder: Path) -> None:
    """Copy the tensors in ``folder``, a checkpoint, into the parameters that ``model`` trains."""
    saved = read_tuned(folder)
    with torch.no_grad():
        for name, parameter in tuned_parameters(model):
            parameter.copy_(saved[name])


def with_tensors(model: nn.Module, saved: dict[str, torch.Tensor], where: Path) -> None:
    """Put ``saved`` into ``model`` in the place of its own tensors, which it keeps for :func:`without_tuning`."""
    own: dict[str, torch.Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in saved.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != value.shape:
            there = "nothing" if parameter is None else str(tuple(parameter.shape))
            what = f"the tuned weights don't fit the model: for {name} {tuple(value.shape)} it has {there}"
            raise ModelError(what, str(where), "load the base that they were made on")
        own[name] = parameter.detach()
        saved[name] = value.to(parameter.device)
    inserted = {name for name, _ in _bottleneck_parameters(model)}
    _replace(model, saved)
    setattr(model, NAMES_ATTRIBUTE, tuple(saved))
    setattr(model, BASE_ATTRIBUTE, {name: value for name, value in own.items() if name not in inserted})


@contextmanager
def without_tuning(model: Any) -> Iterator[None]:
    """Let ``model`` be its base in the ``with`` block, bit by bit. One model in memory serves both."""
    with exact_weights(model):
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                yield
        else:
            with _without_own_tensors(model):
                yield


@contextmanager
def _without_own_tensors(model: Any) -> Iterator[None]:
    adapters = [adapter for _, adapter in bottlenecks(model)]
    own: dict[str, torch.Tensor] = getattr(model, BASE_ATTRIBUTE, {})
    set_active(adapters, False)
    _swap(model, own)
    try:
        yield
    finally:
        set_active(adapters, True)
        _swap(model, own)


def merged_tuned(config: Config, folder: Path) -> tuple[PreTrainedModel, str]:
    """Return the run's model as one set of weights in float32 on the CPU, and the fingerprint of its base. See

    :func:`~qlora_exp.models.merging.merged_model`. A run with ``training.qat`` ships rounded weights.

    Raises:
        ModelError: the method's modules can't be merged.
    """
    merged, fingerprint = _merged(config, folder)
    format = qat_format(config.training.qat)
    if format is not None:
        round_linears(merged, format, search=False)
    return merged, fingerprint


def _merged(config: Config, folder: Path) -> tuple[PreTrainedModel, str]:
    if in_peft_format(config.method):
        return merged_model(config, folder, adapter_loader(config))
    if config.method.kind is Method.bottleneck:
        what = "bottleneck adapters are layers of their network, and can't be merged into the base's weights"
        raise ModelError(what, str(folder), "method=lora; or load the run with qlora_exp.load_run(RUN).model()")
    unquantized = replace(config.quantization, mode=Quantization.fp32, compute_dtype=ComputeDtype.auto)
    base = load_base(replace(config, quantization=unquantized), "cpu")
    saved = {name: value.float() for name, value in read_tuned(folder).items()}
    model = clone_sharing_weights(base)
    with_tensors(model, saved, folder)
    delattr(model, BASE_ATTRIBUTE)
    return model.eval(), base.fingerprint


def _bottleneck_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, adapter in bottlenecks(model):
        for part, parameter in adapter.named_parameters():
            yield f"{name}.{part}", parameter


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(name)


def _replace(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Give ``model`` new parameters. Modules that share a tensor (a tied head) share the new one, too."""
    new = {id(_parameter(model, name)): nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in new:
                module._parameters[name] = new[id(parameter)]


def _swap(model: nn.Module, own: dict[str, torch.Tensor]) -> None:
    for name in own:
        parameter = _parameter(model, name)
        parameter.data, own[name] = own[name], parameter.data
