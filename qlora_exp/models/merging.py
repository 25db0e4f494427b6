"""Merges an adapter into the weights of its base: one model that needs no adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from qlora_exp.config.enums import ComputeDtype, Quantization
from qlora_exp.config.schema import Config
from qlora_exp.errors import ModelError
from qlora_exp.models.adapters import load_adapter
from qlora_exp.models.base import Base, load_base
from qlora_exp.models.starting_adapters import retie_embeddings


def merged_model(
    config: Config, adapter: Path, load: Callable[[Base, Path], PeftModel] = load_adapter
) -> tuple[PreTrainedModel, str]:
    """Return W + scale · B·A in fp32, on the CPU, from the *unquantized* base; and the fingerprint of that base.

    W holds the adapters that the run started from. ``load`` reads the run's adapter.

    Raises:
        ModelError: the base can't be loaded, the adapter doesn't fit it, or the merged weights are not finite.
    """
    unquantized = replace(config.quantization, mode=Quantization.fp32, compute_dtype=ComputeDtype.auto)
    base = load_base(replace(config, quantization=unquantized), "cpu")
    tied = bool(base.model.config.tie_word_embeddings)
    adapted = load(base, adapter)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT: NaNs detected in the merged weights
        raise ModelError(f"the adapter can't be merged: {error}", str(adapter), "train it again") from None
    assert isinstance(merged, PreTrainedModel)
    if tied:
        retie_embeddings(merged)
    return merged, base.fingerprint
