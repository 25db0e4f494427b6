"""What other tools call methods, layers and patterns of ranks, as our settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from qlora_exp.config.peft_kinds import PEFT_KINDS


def kind_of_adapter(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    """Return our settings for PEFT's ``peft_type``; none for LoRA and for kinds that aren't trained."""
    name = str(value).rpartition(".")[2].lower()
    return {"method": "peft", "method.peft_type": name} if name in PEFT_KINDS else {}


def method_of(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    """Return our settings for LLaMA-Factory's ``finetuning_type``."""
    methods = {"full": "full", "freeze": "layerwise"}
    return {"method": methods[str(value)]} if value in methods else {}


def last_layers(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    """Return our settings for LLaMA-Factory's ``freeze_trainable_layers``: the last n layers, for n < 0 the first."""
    count = value if isinstance(value, int) and not isinstance(value, bool) else 0
    return {"method.layers": f"{'last' if count > 0 else 'first'}:{abs(count)}"} if count else {}


def adapted_layers_of(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    """Return our settings for the layers that get adapters, a number or a list."""
    layers = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    return {"method.layers": list(layers)} if isinstance(layers, list | tuple) and layers else {}


def pattern_of(key: str) -> Callable[[Any, Mapping[str, Any]], dict[str, Any]]:
    """Return a conversion of a mapping whose keys are ends of module names; PEFT's may be regular expressions."""

    def convert(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
        named = isinstance(value, Mapping) and all(re.fullmatch(r"\w+(\.\w+)*", str(name)) for name in value)
        return {key: dict(value)} if named and value else {}

    return convert
