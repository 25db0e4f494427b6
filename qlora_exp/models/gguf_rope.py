"""The rotary embedding of Llama 3.1, 3.2 and 3.3 in a GGUF file, which transformers doesn't read.

llama.cpp's converter writes no setting for it. It writes the tensor ``rope_freqs.weight``: the divisor of each
frequency. This module recovers the settings behind the divisors, and uses them only if they reproduce the divisors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_exp.models.gguf_header import GgufHeader

ROPE_FACTORS_TENSOR = "rope_freqs.weight"
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The settings that Meta published for all of them. The factor is 8 (3.1, 3.3) or 32 (3.2)."""
F32_TYPE = 0


def rope_factors(headers: Sequence[GgufHeader]) -> np.ndarray | None:
    """Return the file's divisors, half as many as a head has dimensions; ``None`` if it has none, or not in fp32."""
    for header in headers:
        for tensor in header.tensors:
            if tensor.name == ROPE_FACTORS_TENSOR and tensor.kind == F32_TYPE:
                count = math.prod(tensor.shape)
                return np.fromfile(header.file, dtype="<f4", count=count, offset=tensor.offset)
    return None


def with_llama3_rope(config: PretrainedConfig, headers: Sequence[GgufHeader]) -> PretrainedConfig:
    """Return ``config``, with the rotary embedding that gives the file's divisors if Llama 3's settings do."""
    factors = rope_factors(headers)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if factors is None or config.model_type != "llama" or rope.get("rope_type", "default") != "default":
        return config
    if len(factors) == 0 or factors.max() <= 1:
        return config
    config.rope_parameters = {**rope, **LLAMA3_ROPE, "factor": float(factors.max())}
    if not gives_factors(config, factors):
        config.rope_parameters = rope
    return config


def gives_factors(config: PretrainedConfig, factors: np.ndarray) -> bool:
    """Return whether transformers divides the frequencies by ``factors`` under ``config``."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") == "default":
        return bool((factors == 1).all())
    if rope["rope_type"] != "llama3":
        return False
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    width = 2 * len(frequencies)
    plain = rope["rope_theta"] ** -(np.arange(0, width, 2) / width)
    divisors = plain / frequencies.numpy().astype(np.float64)
    return divisors.shape == factors.shape and bool(np.allclose(divisors, factors, rtol=1e-3))
