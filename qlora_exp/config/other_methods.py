"""Other tools' settings of what is trained: full tuning, frozen layers, PEFT's kinds, whole modules, patterns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from qlora_exp.config.peft_kinds import PEFT_KINDS

Converted = dict[str, Any]
KIND_NAMES = {"prefix_tuning": "prefix", "prompt_tuning": "prompt"}
"""PEFT's names of kinds that differ from ours."""


def tuned_by(value: Any, others: Mapping[str, Any]) -> Converted:
    """Return the method of LLaMA-Factory's ``finetuning_type``. ``freeze`` trains the last layers, two of them by
    default; a negative number is the first ones."""
    if value == "full":
        return {"method": "full"}
    if value == "freeze":
        count = int(others.get("freeze_trainable_layers") or 2)
        return {"method": "layerwise", "method.layers": f"{'last' if count > 0 else 'first'}:{abs(count)}"}
    return tuned_by_kind(value, others)


def tuned_by_kind(value: Any, _: Mapping[str, Any]) -> Converted:
    """Return the method of PEFT's ``peft_type``; empty for LoRA, our default.

    Raises:
        ValueError: the kind isn't in the table.
    """
    name = str(value).rpartition(".")[2].lower()
    name = KIND_NAMES.get(name, name)
    if name == "lora":
        return {}
    if name not in PEFT_KINDS:
        raise ValueError(name)
    return {"method": "peft", "method.peft_type": name}


def tuned_by_adapter(value: Any, others: Mapping[str, Any]) -> Converted:
    """Return the settings of Axolotl's ``adapter``: a kind of PEFT, or ``qlora``, LoRA over 4 bits."""
    return {"quantization": "nf4"} if value == "qlora" else tuned_by_kind(value, others)


def list_of_names(key: str) -> Callable[[Any, Mapping[str, Any]], Converted]:
    """Return a conversion to a list of names: a list, or a text with commas."""

    def convert(value: Any, _: Mapping[str, Any]) -> Converted:
        names = value.split(",") if isinstance(value, str) else list(value)
        return {key: [str(name).strip() for name in names]} if names else {}

    return convert


def module_pattern(key: str) -> Callable[[Any, Mapping[str, Any]], Converted]:
    """Return a conversion of a mapping of modules, whose names are regular expressions in PEFT: ``mlp\\.down_proj``."""

    def convert(value: Any, _: Mapping[str, Any]) -> Converted:
        return {key: {re.sub(r"\\(.)", r"\1", name): one for name, one in value.items()}} if value else {}

    return convert


def chosen_layers_of(value: Any, _: Mapping[str, Any]) -> Converted:
    """Return the layers of PEFT's ``layers_to_transform``: a number or a list of numbers."""
    return {"method.layers": [value] if isinstance(value, int) else [int(number) for number in value]}


def rounding_of_qat(value: Any, _: Mapping[str, Any]) -> Converted:
    """Return the settings of Axolotl's ``qat``: torchao's symmetric integers of the weights.

    Raises:
        ValueError: another format (nvfp4, fp8).
    """
    if not value:
        return {}
    format = str(value.get("weight_dtype")).rpartition(".")[2]
    if not re.fullmatch(r"int[2-8]", format):
        raise ValueError(format)
    found = {"training.qat.format": format, "training.qat.symmetric": True}
    if value.get("group_size"):
        found["training.qat.group"] = str(value["group_size"])
    return found | ({"training.qat.start_step": int(steps)} if (steps := value.get("fake_quant_after_n_steps")) else {})
