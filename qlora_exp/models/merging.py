"""An adapter added into the weights of its base, as one model that needs no adapter any more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from qlora_exp.config import ComputeDtype, Config, Quantization
from qlora_exp.errors import ModelError
from qlora_exp.models.adapters import load_adapter
from qlora_exp.models.base import load_base


def merged_model(config: Config, adapter: Path) -> tuple[PreTrainedModel, str]:
    """W + scale · B·A in fp32, on the CPU, from the *unquantized* base; and the fingerprint of that base.

    Raises :class:`ModelError` for a base that can't be loaded, an adapter that doesn't fit it, or one whose weights
    are not finite.
    """
    unquantized = replace(config.quantization, mode=Quantization.fp32, compute_dtype=ComputeDtype.auto)
    base = load_base(replace(config, quantization=unquantized), "cpu")
    adapted = load_adapter(base, adapter)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT: NaNs detected in the merged weights
        raise ModelError(f"the adapter can't be merged: {error}", str(adapter), "train it again") from None
    assert isinstance(merged, PreTrainedModel)
    return merged, base.fingerprint
