"""The frozen base: loaded in the configured precision, safe to evaluate and train in any order, cloned without copying
tensors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from qlora_exp.architecture.run_plan import compute_dtype, weight_dtype
from qlora_exp.config.allowed_values import FOUR_BIT, QUANTIZED
from qlora_exp.config.enums import Quantization
from qlora_exp.config.schema import Config, QuantizationConfig
from qlora_exp.errors import ModelError
from qlora_exp.models.causality import check_causal
from qlora_exp.models.gguf_header import gguf_parts
from qlora_exp.models.gguf_tensors import one_name_map, weights_of_parts
from qlora_exp.models.inspect import build_meta, check_weights, quantizable_linears
from qlora_exp.models.integer_linear import IntegerLinear, integer_format, replace_linears
from qlora_exp.models.layer_pruning import prune_layers
from qlora_exp.models.quantized_checkpoints import QuantizedCheckpoint, unpacked_weights
from qlora_exp.models.quiet_loading import quiet_loading
from qlora_exp.models.sources import ModelSource, fingerprint, model_config, quantized_source, resolve_source
from qlora_exp.models.starting_adapters import merge_adapter
from qlora_exp.system.device_errors import is_device_error

QUANTIZED_LINEARS = (Linear4bit, Linear8bitLt, IntegerLinear)
"""The linear layers of quantized modes."""


@dataclass
class Base:
    """A loaded base model.

    ``weight_dtype`` is the storage of its quantized (or all) linear weights. ``compute_dtype`` is the dtype of the
    computation and of the unquantized rest. ``unquantized`` names the modules with weights that a quantized mode leaves
    alone (embeddings, head, norms).
    """

    model: PreTrainedModel
    device: torch.device
    weight_dtype: str
    compute_dtype: str
    fingerprint: str
    unquantized: tuple[str, ...] = ()


def load_base(config: Config, device_kind: str) -> Base:
    """Load ``config``'s base on ``device_kind`` (``cpu`` or ``cuda``), frozen, in eval mode, after a forward pass.

    Raises:
        ModelError: the weights don't fit the architecture, or the model doesn't support the quantization mode.
    """
    source = resolve_source(config.model)
    model = load_model(source, config.quantization, config.model.attention, device_kind)
    mode = config.quantization.mode
    return Base(
        model=model,
        device=_device(device_kind),
        weight_dtype=weight_dtype(mode),
        compute_dtype=_compute_dtype(config.quantization, device_kind),
        fingerprint=fingerprint(source),
        unquantized=unquantized_modules(model) if mode in QUANTIZED else (),
    )


def load_model(
    source: ModelSource, quantization: QuantizationConfig, attention: str, device_kind: str
) -> PreTrainedModel:
    """Return the model of a resolved source, ready for adapters, in the state that :func:`load_base` promises."""
    dtype = getattr(torch, _compute_dtype(quantization, device_kind))
    integers = integer_format(quantization)
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": None if attention == "auto" else attention,
        # Integers are made on the CPU: the device never holds the exact weights.
        "device_map": {"": _device(device_kind if integers is None else "cpu")},
        "quantization_config": bitsandbytes_config(quantization, dtype),
        "use_safetensors": True,
    }
    check_weights(source)
    with quiet_loading():
        try:
            loaded = _from_files(replace(source, layers=()), arguments)
            if source.layers:
                loaded = prune_layers(loaded, source.layers, source.where)
            if integers is not None:
                replace_linears(loaded, integers, quantizable_linears(loaded))
                loaded.to(_device(device_kind))
        except Exception as error:  # transformers and safetensors raise every kind for weights that don't fit
            if isinstance(error, ModelError) or is_device_error(error):
                raise
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ModelError(f"the weights can't be loaded: {line}", source.where, "see the model's card") from error
    _check_quantized(loaded, quantization.mode, source)
    if quantization.mode in QUANTIZED:
        _copy_out_of_mmap(loaded)
    in_memory = source.gguf_file or source.adapters or quantized_source(source) is not None
    if in_memory:  # PEFT would write the base's name as "None"
        loaded.name_or_path = " + ".join([source.where, *source.adapters])
    return _warm_up(loaded, source)


def bitsandbytes_config(quantization: QuantizationConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return bitsandbytes' settings, all of them explicit: transformers' defaults (fp4, fp32 compute, no double
    quantization) are not QLoRA."""
    if quantization.mode is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=quantization.int8_threshold)
    if quantization.mode in FOUR_BIT:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.mode.value,
            bnb_4bit_use_double_quant=quantization.double_quantization,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=torch.uint8,
        )
    return None


def clone_sharing_weights(base: Base) -> PreTrainedModel:
    """Return a copy of the base's modules that shares all of its tensors: train an adapter on it and throw it away.

    Trainers wrap ``forward``, add hooks and change flags for good. On a clone they leave the base as it is.
    """
    return _clone_sharing_tensors(base.model)


def _clone_sharing_tensors(model: PreTrainedModel) -> PreTrainedModel:
    memo: dict[int, Any] = {}
    for module in model.modules():
        for shared in _shared_tensors(module):
            memo[id(shared)] = shared
    return copy.deepcopy(model, memo)


def unquantized_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules of a quantized model that hold weights in full precision."""
    return tuple(
        name
        for name, module in model.named_modules()
        if not isinstance(module, QUANTIZED_LINEARS) and next(module.parameters(recurse=False), None) is not None
    )


def _shared_tensors(module: nn.Module) -> Iterator[Any]:
    """Yield what a clone shares. A 4-bit weight carries its quantization state; an 8-bit layer keeps it in
    ``state``."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    for value in vars(module).values():
        if isinstance(value, torch.Tensor | QuantState):
            yield value
    if isinstance(module, Linear8bitLt):
        yield from (value for value in vars(module.state).values() if isinstance(value, torch.Tensor))


def _from_files(source: ModelSource, arguments: dict[str, Any]) -> PreTrainedModel:
    if source.adapters:
        return _with_merged_adapters(source, arguments)
    return _from_gguf(source, arguments) if source.gguf_file else _from_folder(source, arguments)


def _with_merged_adapters(source: ModelSource, arguments: dict[str, Any]) -> PreTrainedModel:
    """Load the weights in fp32 on the CPU, merge the adapters there, and load the result from memory as ``arguments``
    say. So quantization rounds the merged weights, as it does those of any other base."""
    exact = {**arguments, "dtype": torch.float32, "device_map": {"": "cpu"}, "quantization_config": None}
    model = _from_files(replace(source, adapters=()), exact)
    generation = model.generation_config
    for folder in source.adapters:
        model = merge_adapter(model, Path(folder))
    loaded, report = type(model).from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), output_loading_info=True, **arguments
    )
    loaded.generation_config = generation
    return _check_no_missing_weights(loaded, report, source)


def _from_folder(source: ModelSource, arguments: dict[str, Any]) -> PreTrainedModel:
    packed = quantized_source(source)
    if packed is not None:
        return _from_packed(source, packed, arguments)
    config = model_config(source)
    model, report = AutoModelForCausalLM.from_pretrained(
        source.path_or_id, config=config, output_loading_info=True, **source.arguments, **arguments
    )
    if not source.is_local:
        check_weights(source)  # files that were downloaded only now
    return _check_no_missing_weights(model, report, source)


def _from_packed(source: ModelSource, packed: QuantizedCheckpoint, arguments: dict[str, Any]) -> PreTrainedModel:
    """Unpack a checkpoint that is quantized already, and load it from memory as if it had never been."""
    folder = source.cached_folder
    if folder is None:
        folder = Path(
            huggingface_hub.snapshot_download(
                source.path_or_id, revision=source.revision, allow_patterns=["*.safetensors", "*.json"]
            )
        )
        check_weights(source)
    config = model_config(source)
    built = build_meta(config, source)
    weights = unpacked_weights(packed, folder, arguments["dtype"], quantizable_linears(built))
    model, report = type(built).from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True, **arguments
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return _check_no_missing_weights(model, report, source)


def _from_gguf(source: ModelSource, arguments: dict[str, Any]) -> PreTrainedModel:
    """Load GGUF weights, dequantized to fp32, from memory as if they had never been quantized. transformers marks a
    model that it loads from GGUF, and refuses to quantize or train a marked one."""
    parts, config = gguf_parts(Path(source.where)), model_config(source)
    if len(parts) > 1:
        built = build_meta(config, source)
        model_class, weights = type(built), weights_of_parts(built, parts)
    else:
        with one_name_map():
            unpacked, report = AutoModelForCausalLM.from_pretrained(
                source.path_or_id,
                dtype=torch.float32,
                device_map={"": "cpu"},
                output_loading_info=True,
                **source.arguments,
            )
        _check_no_missing_weights(unpacked, report, source)
        model_class, weights = type(unpacked), unpacked.state_dict()
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True, **arguments
    )
    return _check_no_missing_weights(model, report, source)


def _check_no_missing_weights(model: PreTrainedModel, report: dict[str, Any], source: ModelSource) -> PreTrainedModel:
    """Return ``model`` if all of its weights come from the files, in the right shape. transformers only warns of
    missing weights and initializes them at random; a run on such a base would mean nothing."""
    missing = sorted(report["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        what = f"{len(missing)} of the model's weights are not in its files: {shown}"
        raise ModelError(what, source.where, "the files and config.json are not of one model; restore them")
    for name, module in model.named_modules():
        stored = _quantized_shape(module)
        if stored is not None and stored != (module.out_features, module.in_features):
            what = f"{name} is {stored[0]} × {stored[1]} in the files, and {module.out_features} × {module.in_features}"
            raise ModelError(f"{what} by config.json", source.where, "the files and config.json are not of one model")
    return model


def _quantized_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Return the file's shape of a quantized weight, ``None`` for other modules. transformers compares shapes before it
    loads a plain weight, but not for one that it quantizes while loading."""
    if isinstance(module, Linear4bit):
        return tuple(module.weight.quant_state.shape)
    return tuple(module.weight.shape) if isinstance(module, Linear8bitLt) else None


def _copy_out_of_mmap(model: PreTrainedModel) -> None:
    """Copy unquantized CPU tensors, so that the mapped file can be released. They are views of the file and keep all of
    it resident, including the weights that were quantized from it."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def _warm_up(model: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
    """Return ``model`` frozen, in eval mode, in a state that no later forward pass changes.

    On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward pass in eval mode. Training would
    then use an operation without a gradient, so the repacking is switched off. An 8-bit layer moves its scales at its
    first forward pass, and clones made before that would differ from later ones. The forward passes of
    :func:`~qlora_exp.models.causality.check_causal` do it here.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    model.eval()
    check_causal(model, source.where, _clone_sharing_tensors)
    return model


def _check_quantized(model: nn.Module, mode: Quantization, source: ModelSource) -> None:
    """Raise :class:`ModelError` if a quantized mode left every layer unquantized: a record that called the model
    quantized would be wrong. bitsandbytes replaces only torch's Linear and GPT-2's Conv1D."""
    if mode not in QUANTIZED or any(isinstance(module, QUANTIZED_LINEARS) for module in model.modules()):
        return
    what = f"quantization={mode.value} leaves every layer of this model unquantized"
    raise ModelError(what, source.where, "quantization=bf16, fp16 or fp32: it has no plain linear layers")


def _compute_dtype(quantization: QuantizationConfig, device_kind: str) -> str:
    bf16 = device_kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return compute_dtype(quantization, device_kind, bf16)


def _device(device_kind: str) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device_kind == "cuda" else torch.device(device_kind)
