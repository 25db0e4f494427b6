"""LoRA adapters: on exactly the named layers, with the same start for the same seed in every quantization mode."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_exp.architecture.run_plan import adapter_dtype, alpha_pattern, effective_alpha
from qlora_exp.architecture.targets import rank_of
from qlora_exp.config.allowed_values import FROM_WEIGHTS
from qlora_exp.config.enums import AdapterInit
from qlora_exp.config.schema import Config, LoraConfig
from qlora_exp.data.items import Item
from qlora_exp.errors import ModelError
from qlora_exp.models.activation_start import module_generator, principal_inputs
from qlora_exp.models.base import Base, clone_sharing_weights
from qlora_exp.models.portable_adapters import SUBTRACTING, make_portable
from qlora_exp.system.device_errors import is_device_error

ADAPTER = "default"
START_ATTRIBUTE = "_qlora_exp_adapter_start"
"""Attribute of the model that holds the adapters' first values until recast_adapters() reads them."""
SUBTRACTED_ATTRIBUTE = "_qlora_exp_subtracted"
"""Attribute of the model that holds what PiSSA or OLoRA subtracted from the base's weights (the adapters' first
values), until save_adapter() writes it."""
COPIED = "modules_to_save"
"""PEFT's name of the copies of modules that are trained whole; part of their parameters' names."""
MAGNITUDE = "lora_magnitude_vector"
WEIGHTS_FILE = "adapter_model.safetensors"


def attach_adapters(
    model: PreTrainedModel,
    config: Config,
    modules: Sequence[str],
    items: Sequence[Item] = (),
    whole: Sequence[str] = (),
    parameters: Sequence[str] = (),
) -> PeftModel:
    """Put an adapter on each of ``modules`` (full names) and on nothing else.

    A is drawn in fp32 on the CPU from a generator seeded by (seed, module name); B is zero. Both are then cast to
    ``lora.dtype`` (DoRA's magnitudes stay in fp32). So fp32, fp16, int8 and nf4 bases start from the same adapters.
    PiSSA and OLoRA instead take A and B from the base's weights and subtract them there. They work on copies: tensors
    shared with a cached base don't change. EVA takes A from the layers' inputs on ``items``, training rows.
    ``whole``: modules that are trained as float32 copies. ``parameters``: experts' three-dimensional parameters that
    get adapters, too.

    Raises:
        ModelError: the model lacks one of the names, or PEFT refuses.
    """
    lora = config.lora
    layers = dict(model.named_modules())
    missing = [name for name in modules if name not in layers]
    if missing or not modules:
        raise ModelError("there are target modules that the model doesn't have", ", ".join(missing) or "none given")
    if lora.init in FROM_WEIGHTS:
        _copy_weights([layers[name] for name in modules], lora.r)
    directions: dict[str, torch.Tensor] = {}
    if lora.init is AdapterInit.eva:
        directions = principal_inputs(model, {name: rank_of(lora, name) for name in modules}, items, config.seed)
    requested = set(modules)
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=effective_alpha(lora),
        rank_pattern={re.escape(key): rank for key, rank in (lora.rank_pattern or {}).items()},
        alpha_pattern=alpha_pattern(lora),
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=lora.init.value if lora.init in FROM_WEIGHTS else True,
        target_modules=_peft_target_modules(layers, requested),
        modules_to_save=list(whole) or None,
        target_parameters=list(parameters) or None,
        fan_in_fan_out=any(isinstance(layers[name], Conv1D) for name in modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = _inject(model, settings)
    adapted_names = {_adapted_name(name, layer) for name, layer in _lora_layers(adapted)}
    if adapted_names != requested | set(parameters):
        differing = sorted(adapted_names ^ (requested | set(parameters)))[:3]
        raise ModelError(
            "PEFT adapted other layers than those asked for", ", ".join(differing), "name them in targets.modules"
        )
    if lora.init not in FROM_WEIGHTS:
        _set_a(adapted, lora, config.seed, directions)
    if lora.init in FROM_WEIGHTS:  # before the cast: these are the values that PEFT subtracted
        setattr(adapted, SUBTRACTED_ATTRIBUTE, {name: value.detach().clone() for name, value in _matrices(adapted)})
    _cast(adapted, getattr(torch, adapter_dtype(lora)))
    for _, parameter in whole_parameters(adapted):
        parameter.data = parameter.data.float()
    setattr(adapted, START_ATTRIBUTE, {name: value.detach().clone() for name, value in adapter_parameters(adapted)})
    return adapted


def recast_adapters(model: nn.Module, lora: LoraConfig) -> None:
    """Restore dtype and values of a quantized model's adapters, which SFTTrainer casts to bf16. Call it before an
    optimizer exists.

    A value that differs from its start by more than rounding was trained or loaded: it is only cast.
    """
    dtype = getattr(torch, adapter_dtype(lora))
    start_values: dict[str, torch.Tensor] = model.__dict__.pop(START_ATTRIBUTE, {})
    for name, parameter in adapter_parameters(model):
        start = start_values.get(name)
        is_at_start = start is not None and torch.equal(start.to(parameter.dtype), parameter.detach())
        parameter.data = (start if start is not None and is_at_start else parameter.data).to(_dtype_of(name, dtype))


@contextmanager
def autocast_casts_inputs(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Let autocast cast what adapters read, in place of PEFT. For training with LoRA under autocast.

    PEFT casts the input of an unquantized layer's adapter to float32 (the adapter's dtype), and autocast casts it back:
    both cost a pass over memory in each layer, and each adapter saves a copy for backward. Results are equal, because a
    16-bit number stays what it is in float32. DoRA computes norms in its input's dtype: there the cast must stay.
    """
    with disable_input_dtype_casting(model, active):
        yield


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the adapters' parameters with their names: A, B, with DoRA the magnitudes, and whole modules."""
    for name, parameter in model.named_parameters():
        if any(part.startswith("lora_") or part == COPIED for part in name.split(".")):
            yield name, parameter


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of ``lora.modules_to_save`` with their names."""
    return ((name, parameter) for name, parameter in adapter_parameters(model) if COPIED in name.split("."))


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in adapter_parameters(model) if COPIED not in name.split("."))


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, which PEFT, vLLM and others read. On the base as
    it was loaded they give the trained model, with every initialization."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    make_portable(folder, getattr(model, SUBTRACTED_ATTRIBUTE, {}))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form; a run writes its own model card


def write_portable(base: Base, config: Config, modules: Sequence[str], source: Path, target: Path) -> None:
    """Copy the adapter in ``source`` to ``target``. An adapter of an earlier version that starts from PiSSA or has
    rsLoRA's scale is rewritten. ``base`` and ``config`` are those that it was trained with."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS_FILE, "adapter_config.json"):
        shutil.copyfile(source / name, target / name)
    start: dict[str, torch.Tensor] = {}
    if config.lora.init in FROM_WEIGHTS:
        start = getattr(attach_adapters(clone_sharing_weights(base), config, modules), SUBTRACTED_ATTRIBUTE)
    make_portable(target, start)


def load_adapter(base: Base, folder: Path) -> PeftModel:
    """Return a clone of ``base`` with the adapter in ``folder``, in the dtype that it was saved in, for evaluation.

    Raises:
        ModelError: the folder has no adapter, or the adapter is damaged or belongs to another architecture.
    """
    file = folder / WEIGHTS_FILE
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        saved = load_file(file)
    except FileNotFoundError as error:
        raise ModelError(f"there is no adapter: {error.filename or error} is missing", str(folder)) from None
    except (OSError, ValueError, SafetensorError) as error:
        if is_device_error(error):
            raise
        raise ModelError(f"the adapter can't be read: {error}", str(folder), "copy it again") from None
    model = clone_sharing_weights(base)
    if settings.get("init_lora_weights") in SUBTRACTING:
        _copy_weights([module for module in model.modules() if hasattr(module, "weight")], 0)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False, autocast_adapter_dtype=False)
        _cast(adapted, next(value.dtype for name, value in saved.items() if "lora_A" in name))
        unmatched = peft.set_peft_model_state_dict(adapted, saved).unexpected_keys
    except (ValueError, RuntimeError, KeyError, StopIteration) as error:
        if is_device_error(error):
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(
            f"the adapter doesn't fit the model: {line}", str(folder), "load the base it was made on"
        ) from None
    if unmatched:
        raise ModelError(f"the adapter doesn't fit the model: {unmatched[0]} has no place in it", str(folder))
    return adapted.eval()


def _inject(model: PreTrainedModel, settings: peft.LoraConfig) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # A model with both Conv1D and Linear targets is handled layer by layer; PEFT warns of each.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            adapted = peft.get_peft_model(model, settings, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        if is_device_error(error):
            raise
        line = str(error).strip().splitlines()[0][:300]
        hint = "choose other targets, or leave lora.dora and lora.init at their defaults"
        raise ModelError(f"PEFT can't adapt this model so: {line}", "lora, targets", hint) from None
    assert isinstance(adapted, PeftModel)
    return adapted


def _peft_target_modules(layers: dict[str, nn.Module], requested: set[str]) -> list[str] | str:
    """Return ``target_modules`` for PEFT: the last parts of names if they match exactly the requested layers, else a
    regular expression of the full names. Other tools read adapters with short names well. PEFT would match a list of
    full names as endings, too."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in requested})
    matched = {name for name in layers if name.rsplit(".", 1)[-1] in endings}
    if matched == requested:
        return endings
    return "|".join(re.escape(name) for name in sorted(requested))


def _lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _adapted_name(name: str, layer: LoraLayer) -> str:
    """Return the full name of the layer, or of the parameter, whose adapter ``layer`` is."""
    return f"{name.replace('.base_layer', '')}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name


def _set_a(model: PeftModel, lora: LoraConfig, seed: int, directions: dict[str, torch.Tensor]) -> None:
    """Set A to the module's ``directions``, or draw it. kaiming: uniform with bound 1/sqrt(in), torch's default for a
    linear layer and LoRA's own. gaussian:
    standard deviation 1/r, as in PEFT."""
    for name, layer in _lora_layers(model):
        generator = module_generator(seed, name)
        weight = layer.lora_A[ADAPTER].weight
        drawn = torch.empty(weight.shape, dtype=torch.float32)
        if name in directions:
            drawn = directions[name]
        elif lora.init is AdapterInit.gaussian:
            nn.init.normal_(drawn, std=1 / layer.r[ADAPTER], generator=generator)
        else:
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        dtype = getattr(torch, adapter_dtype(lora))
        weight.data = drawn.to(device=weight.device, dtype=dtype)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in _matrices(model):
        parameter.data = parameter.data.to(_dtype_of(name, dtype))


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return ``dtype`` for A and B, and always fp32 for DoRA's magnitudes and whole modules: 16 bits round their small
    updates away."""
    return torch.float32 if MAGNITUDE in name or COPIED in name.split(".") else dtype


def _copy_weights(layers: Sequence[nn.Module], r: int) -> None:
    """Give each of ``layers`` a copy of its weight: PiSSA and OLoRA write into the base's weights."""
    for layer in layers:
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        if r > min(weight.shape):
            what = f"there are no {r} directions to start from in a {tuple(weight.shape)} matrix"
            raise ModelError(what, f"lora.r = {r}", f"lora.r={min(weight.shape)} or less, or lora.init=kaiming")
        layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
