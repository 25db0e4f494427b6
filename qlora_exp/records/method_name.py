"""The tuning method of a configuration in a few words, e.g. ``full``, ``layerwise last:2``, ``bottleneck 16``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LORA = "lora"


def method_name(config: Mapping[str, Any]) -> str:
    """Return the method of a record's configuration, with the settings that it reads; ``lora`` for earlier versions.

    Examples: ``lora``, ``lora last:2``, ``full``, ``layerwise last:2``, ``selective norms+biases``, ``bottleneck 16``
    (behind attention and MLP), ``bottleneck 16 mlp``, ``ia3``,
    ``oft oft_block_size 16``, ``selective magnitude:0.01``.
    """
    method = config.get("method") or {}
    kind = str(method.get("kind") or LORA)
    words = [kind]
    if kind == "selective":
        parameters = method.get("parameters") or ()
        words.append(parameters if isinstance(parameters, str) else "+".join(map(str, parameters)))
    if kind == "peft":
        words = [str(method.get("peft_type"))]
        words += [f"{name} {value}" for name, value in (method.get("options") or {}).items()]
    if kind == "bottleneck":
        words.append(str(method.get("size")))
        if len(method.get("after") or ()) == 1:
            words += method["after"]
    layers = method.get("layers")
    if layers is not None:
        words.append(layers if isinstance(layers, str) else "layers " + "+".join(map(str, layers)))
    return " ".join(words)


def is_lora(config: Mapping[str, Any]) -> bool:
    """Return whether the configuration trains LoRA adapters: rank, alpha and targets mean something."""
    return str((config.get("method") or {}).get("kind") or LORA) == LORA


def saves_adapter(config: Mapping[str, Any]) -> bool:
    """Return whether the run saves an adapter of PEFT in ``RUN/adapter``; other methods write ``RUN/tuned``."""
    method = config.get("method") or {}
    parameters = method.get("parameters") or ()
    chosen = [parameters] if isinstance(parameters, str) else parameters
    entries = any(str(part).startswith(("magnitude:", "gradient:")) for part in chosen)
    return is_lora(config) or method.get("kind") == "peft" or (method.get("kind") == "selective" and entries)


def adapter_name(config: Mapping[str, Any], targets: str) -> str:
    """Return what a label says of a run's tuning: ``r 8 · attention``, or another method's name."""
    name = method_name(config)
    if not is_lora(config):
        return name
    layers = "" if name == LORA else f" · {name.removeprefix('lora ')}"
    return f"r {config['lora']['r']} · {targets}{layers}"
