"""Settings of a configuration that its run doesn't read: those of another method, of no shipped model, of no QAT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_exp.records.method_name import is_lora


def unread_prefixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the beginnings of dotted keys that say nothing about the run. Earlier records lack these keys, and are
    equal to new ones with their defaults.

    ``method.*`` is always among them: :func:`~qlora_exp.records.method_name.method_name` says it in one word.
    """
    prefixes = ["method."]
    if not is_lora(config):
        prefixes += ["lora.", "targets."]
    model = (config.get("ship") or {}).get("model")
    if model is None:
        prefixes.append("ship.")
    if model == "trained":
        prefixes += ["ship.format", "ship.symmetric", "ship.group", "ship.calibration"]
    if (config.get("distillation") or {}).get("teacher") is None:
        prefixes.append("distillation.")
    if ((config.get("training") or {}).get("qat") or {}).get("format") is None:
        prefixes.append("training.qat.")
    return tuple(prefixes)
