"""Detects the method by which a checkpoint is quantized already, from its configuration, file names and tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

QUANTIZATION_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "qmodel.pt": "HQQ",
    "mlc-chat-config.json": "MLC",
}
TENSOR_NAMES = (
    ("bitsandbytes", re.compile(r"\.(absmax|quant_map|SCB|quant_state\.bitsandbytes__\w+)$")),
    ("compressed-tensors", re.compile(r"\.weight_packed$")),
    ("GPTQ", re.compile(r"\.g_idx$")),
    ("AWQ or GPTQ", re.compile(r"\.(qweight|qzeros)$")),
    ("HQQ", re.compile(r"\.W_q$")),
    ("AQLM", re.compile(r"\.codebooks$")),
    ("VPTQ", re.compile(r"\.centroids(\.weight)?$")),
    ("quanto", re.compile(r"\.weight\._(data|scale)$")),
    ("torchao", re.compile(r":qdata$|\.weight_qdata$")),
    ("MXFP4", re.compile(r"_proj_blocks$")),
    ("fp8", re.compile(r"\.(weight_scale_inv|weight_scale|input_scale)$")),
)
"""Method and a pattern that only its tensors' names match; the first match counts."""
QUANTIZED_HINT = "give the unquantized checkpoint that it was made from; qlora-exp quantizes by itself"


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Return the method that a configuration names, also inside ``text_config``; ``None`` if it isn't quantized."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings:
        method = (
            settings.get("quant_method") if isinstance(settings, Mapping) else getattr(settings, "quant_method", "")
        )
        if method:
            return str(getattr(method, "value", method))
        return "MLX" if isinstance(settings, Mapping) and "group_size" in settings else "an unknown method"
    if isinstance(config.get("quantization"), Mapping) and "bits" in config["quantization"]:
        return "MLX"
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else getattr(text, "__dict__", None)
    return quantization_method(inner) if inner else None


def quantization_method_of_tensors(dtypes: Mapping[str, str]) -> str | None:
    """Return the method that the tensors show. ``dtypes`` maps names to dtypes, as in a safetensors header."""
    for method, pattern in TENSOR_NAMES:
        if any(pattern.search(name) for name in dtypes):
            return method
    if any(dtype == "U32" and f"{name.removesuffix('.weight')}.scales" in dtypes for name, dtype in dtypes.items()):
        return "MLX"
    eight_bits = sorted({dtype for dtype in dtypes.values() if dtype.startswith("F8")})
    return f"fp8 ({', '.join(eight_bits)})" if eight_bits else None
