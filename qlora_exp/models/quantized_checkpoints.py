"""Checkpoints that are quantized already, as bases: unpacked to floating point, or refused by the name of their method.

An unpacked base is a base like any other: ``quantization=…`` says how the run keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_exp.errors import ModelError
from qlora_exp.models.packed_weights import (
    PackedFormat,
    awq_format,
    bitnet_format,
    bitsandbytes_format,
    compressed_format,
    fbgemm_format,
    fp8_format,
    gptq_format,
    torchao_format,
)
from qlora_exp.models.prequantized import QUANTIZED_HINT, quantization_method
from qlora_exp.models.tensors import StoredTensor
from qlora_exp.models.weight_files import weight_files

Formats = Callable[[Mapping[str, Any]], PackedFormat | None]


@dataclass(frozen=True)
class QuantizedMethod:
    """``quant_method`` of a config.json. ``format`` returns how its weights are packed; ``None``: they aren't read.

    ``library`` is what transformers loads such a checkpoint with. ``reads``: the kinds that ``format`` reads.
    ``unpacked_by``: what of transformers unpacks those that it doesn't read."""

    library: str
    format: Formats | None = None
    reads: str = ""
    unpacked_by: str | None = None


_BY_MODEL = "model.dequantize()"
_BY_FP8_CONFIG = "quantization_config=FineGrainedFP8Config(dequantize=True)"
_BY_METAL_CONFIG = "quantization_config=MetalConfig(dequantize=True)"
_BY_MXFP4_CONFIG = "quantization_config=Mxfp4Config(dequantize=True)"


METHODS: dict[str, QuantizedMethod] = {
    "bitsandbytes": QuantizedMethod(
        "bitsandbytes>=0.46.1", bitsandbytes_format, "nf4 and fp4 stored as uint8, int8", _BY_MODEL
    ),
    "gptq": QuantizedMethod("gptqmodel>=1.4.3 and optimum>=1.24", gptq_format, "2, 4 and 8 bits"),
    "awq": QuantizedMethod("gptqmodel>=5.0", awq_format, "4 bits, version gemm"),
    "compressed-tensors": QuantizedMethod(
        "compressed-tensors>=0.15",
        compressed_format,
        "pack-quantized in 2, 4 and 8 bits, and int- or float-quantized in 8 bits",
    ),
    "torchao": QuantizedMethod("torchao>=0.15", torchao_format, "int8, intx and float8 weights in safetensors"),
    "bitnet": QuantizedMethod("transformers itself", bitnet_format, "packed or online, without use_rms_norm"),
    "fp8": QuantizedMethod("kernels>=0.18.2 and a GPU", fp8_format, "a scale for each block or matrix", _BY_FP8_CONFIG),
    "fbgemm_fp8": QuantizedMethod("fbgemm-gpu and a GPU", fbgemm_format, "a scale for each row"),
    "aqlm": QuantizedMethod("aqlm>=1.0.2"),
    "auto-round": QuantizedMethod("auto-round>=0.5"),
    "eetq": QuantizedMethod("kernels>=0.18.2 and a GPU"),
    "fouroversix": QuantizedMethod("fouroversix"),
    "fp_quant": QuantizedMethod("fp_quant and a GPU of compute capability 9.0"),
    "higgs": QuantizedMethod("flute-kernel>=0.3.0 and a GPU", unpacked_by=_BY_MODEL),
    "hqq": QuantizedMethod("hqq>=0.2.1"),
    "metal": QuantizedMethod("kernels>=0.18.2 and an Apple GPU", unpacked_by=_BY_METAL_CONFIG),
    "mxfp4": QuantizedMethod("triton>=3.4 and kernels>=0.18.2", unpacked_by=_BY_MXFP4_CONFIG),
    "mxfp8": QuantizedMethod("kernels>=0.18.2 and a GPU", unpacked_by=_BY_FP8_CONFIG),
    "nvfp4": QuantizedMethod("kernels>=0.18.2 and a GPU"),
    "quanto": QuantizedMethod("optimum-quanto"),
    "quark": QuantizedMethod("amd-quark"),
    "sinq": QuantizedMethod("sinq"),
    "spqr": QuantizedMethod("spqr_quant"),
    "vptq": QuantizedMethod("vptq>=0.0.4"),
}
"""One row for each method that transformers loads. The versions are its own lower bounds."""


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """``ternary_masters``: BitNet weights in 16 bits, which each forward pass rounds to three values; but not those of
    the modules ``exact``."""

    method: str
    format: PackedFormat
    ternary_masters: bool = False
    exact: tuple[str, ...] = ()


def quantized_checkpoint(config: Mapping[str, Any], where: str) -> QuantizedCheckpoint | None:
    """Return how the checkpoint of a configuration is packed; ``None``: it isn't quantized.

    Raises:
        ModelError: its method, or this kind of it, isn't read.
    """
    method = quantization_method(config)
    if method is None:
        return None
    what = f"the checkpoint is quantized already (by {method})"
    row = METHODS.get(method)
    if row is None:
        raise ModelError(f"{what}, which transformers doesn't load", where, QUANTIZED_HINT)
    settings = _settings(config)
    format = row.format(settings) if row.format is not None else None
    if format is None:
        readable = f"of {method}, qlora-exp reads {row.reads}" if row.reads else "qlora-exp can't unpack its weights"
        hint = f"{QUANTIZED_HINT} (transformers loads this one with {row.library}"
        hint += f", and {row.unpacked_by} unpacks it: save_pretrained() that)" if row.unpacked_by else ")"
        raise ModelError(f"{what}, and {readable}", where, hint)
    masters = settings.get("linear_class") == "autobitlinear" and settings.get("quantization_mode") == "online"
    exact = tuple(settings.get("modules_to_not_convert") or ())
    return QuantizedCheckpoint(method, format, method == "bitnet" and masters, exact)


def unpacked_tensors(
    stored: Mapping[str, StoredTensor], checkpoint: QuantizedCheckpoint, folder: Path
) -> dict[str, StoredTensor]:
    """Return the tensors that the checkpoint has once its weights are unpacked, from the files' headers.

    Raises:
        ModelError: no tensor is packed as config.json says, or a packed layer lacks a part.
    """
    layers, rest = _packed_layers(stored, checkpoint.format)
    if not layers and not checkpoint.ternary_masters:
        what = f"config.json says that the weights are quantized (by {checkpoint.method}), and no tensor is packed so"
        raise ModelError(what, str(folder), "restore config.json and the weights from one source")
    found = {name: stored[name] for name in rest}
    for layer, names in layers.items():
        found[f"{layer}.weight"] = StoredTensor(_shape(layer, names, stored, checkpoint, folder), "F32")
    return found


def unpacked_weights(
    checkpoint: QuantizedCheckpoint, folder: Path, dtype: torch.dtype, linears: Collection[str]
) -> dict[str, Tensor]:
    """Return all tensors of the checkpoint on the CPU, packed ones unpacked in float32 and then rounded to ``dtype``.

    Of BitNet's 16-bit weights, those of the layers ``linears`` become ternary: the model computes with these.
    """
    stored, places = {}, {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_slice(name)
                stored[name] = StoredTensor(tuple(tensor.get_shape()), str(tensor.get_dtype()))
                places[name] = file
    layers, rest = _packed_layers(stored, checkpoint.format)
    loaded = {}
    for layer, names in layers.items():
        parts = {part: _load(places[name], name) for part, name in names.items()}
        loaded[f"{layer}.weight"] = checkpoint.format.unpack(parts).to(dtype).contiguous()
    for name in rest:
        loaded[name] = _load(places[name], name)
    if checkpoint.ternary_masters:
        for layer in linears:
            if should_convert_module(layer, list(checkpoint.exact)):
                loaded[f"{layer}.weight"] = _ternary(loaded[f"{layer}.weight"]).to(dtype)
    return loaded


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """Remove the settings of the checkpoint's quantization from ``config``, which is returned."""
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
    return config


def _ternary(weight: Tensor) -> Tensor:
    """Return −s, 0 and s, with s the mean magnitude: as transformers' AutoBitLinear computes."""
    exact = weight.float()
    scale = exact.abs().mean().clamp(min=1e-5)
    return (exact / scale).round().clamp(-1, 1) * scale


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantization's settings as a mapping, also those inside ``text_config``."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings is None:
        text = config.get("text_config")
        return _settings(text if isinstance(text, Mapping) else vars(text))
    return settings if isinstance(settings, Mapping) else dict(settings.to_dict())


def _packed_layers(
    stored: Mapping[str, StoredTensor], format: PackedFormat
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the tensors of each packed layer by part, and the names of all other tensors."""
    layers: dict[str, dict[str, str]] = {}
    for name, tensor in stored.items():
        layer, part = _split(name, format)
        if part == format.marker and tensor.dtype in format.dtypes:
            layers[layer] = {part: name}
    rest = []
    for name in stored:
        layer, part = _split(name, format)
        if part is None or layer not in layers:
            rest.append(name)
        else:
            layers[layer][part] = name
    return layers, rest


def _split(name: str, format: PackedFormat) -> tuple[str, str | None]:
    for part in sorted((format.marker, *format.parts), key=len, reverse=True):
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    return name, None


def _shape(
    layer: str,
    names: Mapping[str, str],
    stored: Mapping[str, StoredTensor],
    checkpoint: QuantizedCheckpoint,
    folder: Path,
) -> tuple[int, ...]:
    lacking = [part for part in checkpoint.format.needed if part not in names]
    try:
        if lacking:
            raise KeyError(lacking[0])
        shapes = {part: stored[name].shape for part, name in names.items()}
        return checkpoint.format.shape(shapes, lambda part: _read(folder, names[part]))
    except KeyError as missing:
        what = f"{layer} is packed (by {checkpoint.method}) and lacks its {missing.args[0]}"
        raise ModelError(what, str(folder), "restore the weights from the model's source") from None


def _read(folder: Path, name: str) -> Tensor:
    return next(_load(file, name) for file in weight_files(folder) if name in _names(file))


def _names(file: Path) -> Iterator[str]:
    with safe_open(file, framework="pt") as weights:
        yield from weights.keys()


def _load(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as weights:
        tensor: Tensor = weights.get_tensor(name)
    return tensor
