"""Checks that a GGUF file holds exactly the model that transformers makes of it, and loads a model in several parts."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.gguf import get_gguf_conversion_mapping, is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from qlora_exp.errors import ModelError
from qlora_exp.models.gguf_header import GgufHeader, GgufTensor, gguf_parts, read_header
from qlora_exp.models.gguf_rope import ROPE_FACTORS_TENSOR, gives_factors, rope_factors
from qlora_exp.models.tensors import LoadReport, dry_load, first_three, raise_misshapen, raise_missing
from qlora_exp.progress import report_progress

SAFETENSORS_HINT = (
    "give the model's safetensors, or a file that llama.cpp's convert_hf_to_gguf.py wrote of the whole model"
)
COMPUTED = re.compile(r"(^|\.)attn_rot_embd\.")
"""Frequencies of the rotary embedding, which the model computes itself."""
ROPE_FACTORS = re.compile(r"^rope_(freqs|factors_long|factors_short)\.weight$")
EXPERTS = re.compile(r"_exps(\.weight)?$")
GEMMA_27B = {("gemma2", 46), ("gemma3_text", 62)}
"""Model type and layers of the two models that scale attention scores by another width than a head's."""
NORMS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps")


def one_name_map() -> contextlib.AbstractContextManager[None]:
    """Let transformers build gguf's map of tensor names once: it builds the same one for every module of a model, which
    takes seconds for 30 layers."""
    return _computed_once("get_tensor_name_map")


def one_reader(path: str | None) -> contextlib.AbstractContextManager[None]:
    """Read the vocabulary of the GGUF file ``path`` once: configuration and tokenizer each take a second or two for it.
    Nothing happens for another model. The reader is dropped at the end, with what it has in memory."""
    is_gguf = bool(path) and str(path).endswith(".gguf") and importlib.util.find_spec("gguf") is not None
    return _computed_once("GGUFReader") if is_gguf else contextlib.nullcontext()


@contextlib.contextmanager
def _computed_once(name: str) -> Iterator[None]:
    """Keep the results of ``gguf.NAME`` as long as the context lasts."""
    import gguf

    original = getattr(gguf, name)
    setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        setattr(gguf, name, original)


def check_gguf(model: PreTrainedModel, file: Path) -> None:
    """Check that the file holds exactly ``model``, which is on the meta device; the check changes it.

    ``file`` is the model's file, or its first part.

    Raises:
        ModelError: a weight is in no file, transformers would ignore a tensor or a setting, or a file is truncated.
    """
    headers = [read_header(part) for part in gguf_parts(file)]
    architecture = str(headers[0].metadata["general.architecture"])
    if len(headers) > 1 and is_gguf_arch_supported(architecture):  # transformers reads these from one file only
        hint = f"join them: llama-gguf-split --merge {file.name} WHOLE.gguf"
        raise ModelError(f"{architecture} can't be loaded from {len(headers)} parts", str(file), hint)
    for header in headers:
        _check_lengths(header)
    _check_settings(headers[0], model.config)
    tensors = {tensor.name: tensor for header in headers for tensor in header.tensors}
    for name, tensor in tensors.items():
        if ROPE_FACTORS.match(name) and not _applies_rope_factors(model.config, headers, tensor):
            what = f"{name} scales the rotary embedding in a way that transformers doesn't read from GGUF files"
            raise ModelError(what, str(file), "give the model's safetensors: the result would be another model")
    report = _load_report(model, headers[0], tensors)
    raise_missing(report, str(file), SAFETENSORS_HINT)
    raise_misshapen(report, str(file), SAFETENSORS_HINT, "transformers")
    left_out = [name for name in report.unexpected if not COMPUTED.search(name) and not ROPE_FACTORS.match(name)]
    if left_out:
        what = f"transformers would leave out {len(left_out)} tensors of the file: {first_three(left_out)}"
        raise ModelError(what, str(file), SAFETENSORS_HINT)


def weights_of_parts(model: PreTrainedModel, parts: list[Path]) -> dict[str, torch.Tensor]:
    """Return the weights of a model in several files, dequantized to fp32, under transformers' names. It does what
    ``load_gguf_checkpoint`` does for one file. ``model`` is on the meta device."""
    from gguf import GGUFReader, dequantize

    architecture = str(read_header(parts[0]).metadata["general.architecture"])
    settings = load_gguf_checkpoint(str(parts[0]), return_tensors=False)["config"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=settings)
    with one_name_map():
        names = get_gguf_hf_weights_map(model, processor)
    parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
    total, done = sum(len(read_header(part).tensors) for part in parts), 0
    for part in parts:
        for tensor in GGUFReader(part).tensors:
            report_progress(done := done + 1, total, "tensors of the GGUF unpacked")
            values = dequantize(tensor.data, tensor.tensor_type)
            result = processor.process(
                weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters=parsed
            )
            if result.name in names:
                parsed["tensors"][names[result.name]] = torch.from_numpy(np.copy(result.weights)).to(torch.float32)
    return parsed["tensors"]


def _load_report(model: PreTrainedModel, header: GgufHeader, tensors: dict[str, GgufTensor]) -> LoadReport:
    architecture = str(header.metadata["general.architecture"])
    if is_gguf_arch_supported(architecture):
        conversions = get_gguf_conversion_mapping(architecture, model.config)
        return dry_load(model, {name: tensor.shape for name, tensor in tensors.items()}, conversions)
    return _load_report_by_names(model, architecture, tensors)


def _load_report_by_names(model: PreTrainedModel, architecture: str, tensors: dict[str, GgufTensor]) -> LoadReport:
    """Report by the map of names that transformers' older GGUF reader uses. In this map, experts' weights have two
    names, without a suffix."""
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    gguf_names: dict[str, list[str]] = defaultdict(list)
    with one_name_map():
        names = get_gguf_hf_weights_map(model, processor)
    for gguf_name, name in names.items():
        gguf_names[name].append(gguf_name if gguf_name in tensors else _with_suffix(gguf_name, tensors))
    report = LoadReport()
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    used: set[str] = set()
    for name, weight in model.state_dict().items():
        file_names = gguf_names.get(name, [])
        missing = [file_name for file_name in file_names if file_name not in tensors]
        if len(missing) < len(file_names) and not all(EXPERTS.search(file_name) for file_name in file_names):
            file_names, missing = [file_name for file_name in file_names if file_name in tensors], []
        used.update(file_names)
        if missing or not file_names:
            if name not in tied:
                report.missing.append(", ".join(missing) or name)
        elif not _shapes_match(weight, [tensors[file_name].shape for file_name in file_names]):
            report.misshapen.append((file_names[0], tensors[file_names[0]].shape, tuple(weight.shape)))
    report.unexpected = [name for name in tensors if name not in used]
    return report


def _with_suffix(name: str, tensors: dict[str, GgufTensor]) -> str:
    """Return a tensor's name in the file, where experts' tensors have a suffix that the map lacks."""
    return f"{name}.weight" if f"{name}.weight" in tensors or not name.endswith((".weight", ".bias")) else name


def _shapes_match(weight: torch.Tensor, shapes: list[tuple[int, ...]]) -> bool:
    """Return whether the shapes agree, but for the order of axes and axes of length 1: transformers changes these."""
    if len(shapes) > 1:  # gate and up of experts, in one weight
        return weight.numel() == sum(math.prod(shape) for shape in shapes)
    return sorted(axis for axis in weight.shape if axis != 1) == sorted(axis for axis in shapes[0] if axis != 1)


def _check_lengths(header: GgufHeader) -> None:
    """Raise :class:`ModelError` for a truncated file, or a block type that can't be dequantized."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    unpacked = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, *quants._type_traits}
    for tensor in header.tensors:
        try:
            kind = GGMLQuantizationType(tensor.kind)
        except ValueError:
            kind = None
        if kind is None or kind not in unpacked:
            named = kind.name if kind is not None else f"number {tensor.kind}"
            what = f"{tensor.name} is stored in blocks of the type {named}, which the gguf package can't unpack"
            raise ModelError(what, str(header.file), "give a file in another type: Q8_0, Q4_K_M, F16 …")
        values, block_bytes = GGML_QUANT_SIZES[kind]
        end = tensor.offset + math.prod(tensor.shape) // values * block_bytes
        if end > header.file_bytes:
            what = f"the file is truncated: it has {header.file_bytes:,} bytes, and {tensor.name} ends at {end:,}"
            raise ModelError(what, str(header.file), "copy or download it again")


def _applies_rope_factors(config: PretrainedConfig, headers: list[GgufHeader], tensor: GgufTensor) -> bool:
    """Return whether the model divides its frequencies by the file's factors: all of them 1, or Llama 3's."""
    factors = rope_factors(headers) if tensor.name == ROPE_FACTORS_TENSOR else None
    return factors is not None and gives_factors(config, factors)


def _check_settings(header: GgufHeader, config: PretrainedConfig) -> None:
    """Raise :class:`ModelError` if a setting that changes the model's results differs from the file's. transformers
    reads some of a GGUF file's settings and takes its own defaults for the others."""
    architecture = str(header.metadata["general.architecture"])
    settings = {
        key.removeprefix(f"{architecture}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    if architecture == "llama" and "attention.head_count_kv" not in settings:
        what = "the file has no attention.head_count_kv, without which transformers mixes up the rows of q and k"
        raise ModelError(what, str(header.file), "give the model's safetensors, or convert it with a newer llama.cpp")
    scaling = str(settings.get("rope.scaling.type", "none"))
    if scaling != "none" and scaling != _rope(config).get("rope_type"):
        what = f"the file scales the rotary embedding ({scaling}), and transformers doesn't read that from GGUF files"
        raise ModelError(what, str(header.file), "give the model's safetensors: the result would be another model")
    config_scale = getattr(config, "query_pre_attn_scalar", None)
    if config_scale is not None and config_scale != (scale := _attention_scale(config)):
        what = f"this model scales attention scores by {scale:g}, but transformers uses {config_scale:g} for GGUF files"
        raise ModelError(what, str(header.file), "give the model's safetensors: the result would be another model")
    for key, accepted in _settings_of(config).items():
        value = settings.get(key)
        if (
            isinstance(value, int | float)
            and accepted
            and not any(math.isclose(value, candidate, rel_tol=1e-4) for candidate in accepted)
        ):
            what = f"the file says {architecture}.{key} = {value:g}, but transformers would use {accepted[0]:g}"
            raise ModelError(what, str(header.file), "give the model's safetensors: the result would be another model")


def _attention_scale(config: PretrainedConfig) -> int:
    """Return the number whose square root llama.cpp divides attention scores by in Gemma 2 and 3. The file has no
    setting for it."""
    if (config.model_type, config.num_hidden_layers) in GEMMA_27B:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


def _settings_of(config: PretrainedConfig) -> dict[str, list[float]]:
    """Map each setting of a GGUF file to the values that are right. No values: the configuration has no such
    setting."""
    rope = _rope(config)
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    shared = "full_attention" not in (getattr(config, "rope_parameters", None) or {})
    rotated = int(width * share) if width and shared else None
    expected: dict[str, list[Any]] = {
        "rope.freq_base": [rope.get("rope_theta")],
        "rope.dimension_count": [rotated],
        "attention.key_length": [width, getattr(config, "global_head_dim", None)],
        "attention.layer_norm_rms_epsilon": [getattr(config, name, None) for name in NORMS],
        "attention.layer_norm_epsilon": [getattr(config, name, None) for name in NORMS],
        "attn_logit_softcapping": [getattr(config, "attn_logit_softcapping", None) or 0.0],
        "final_logit_softcapping": [getattr(config, "final_logit_softcapping", None) or 0.0],
        "expert_used_count": [getattr(config, "num_experts_per_tok", None)],
    }
    return {key: [value for value in values if isinstance(value, int | float)] for key, values in expected.items()}


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """Return the rotary embedding's settings; those of full-attention layers if each kind of layer has its own."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rope.get("full_attention") or {}) if "full_attention" in rope else rope
