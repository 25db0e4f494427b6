"""Resolves which layers get an adapter: from a named set or a list of names to full module names of this model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from qlora_exp.architecture.shapes import Architecture, WeightShape
from qlora_exp.config.allowed_values import FROM_WEIGHTS, TARGET_SETS
from qlora_exp.config.enums import AdapterInit
from qlora_exp.config.schema import LoraConfig, TargetsConfig
from qlora_exp.errors import ModelError, nearest, raise_all


def resolve_targets(architecture: Architecture, targets: TargetsConfig) -> tuple[str, ...]:
    """Return the full names of the layers to adapt, in the model's order.

    ``attention``: every projection of every attention. ``attention_qv``: those that give queries or values (a fused one
    as a whole). ``mlp``: the feed-forward layers. ``all_linear``: all linear layers of the language model but its
    output head. No set contains layers that PEFT doesn't adapt (:func:`layers_without_adapters`).

    Names of an explicit list match whole dotted endings, as in PEFT: ``q_proj`` matches
    ``model.layers.0.self_attn.q_proj``.

    Raises:
        ModelError: a set or a name matches nothing.
    """
    adaptable = [shape for shape in architecture.weights if shape.kind != "other"]
    if targets.modules is not None:
        return _match_endings(architecture, adaptable, targets.modules)

    def in_set(shape: WeightShape) -> bool:
        if targets.set == "attention_qv":
            return shape.role == "attention" and bool(set(qkv_of_name(shape.name)) & {"q", "v"})
        return targets.set in ("all_linear", shape.role)

    chosen = tuple(shape.name for shape in adaptable if in_set(shape))
    if not chosen:
        raise _empty_set_error(architecture, adaptable, targets.set)
    return chosen


def rank_of(lora: LoraConfig, name: str) -> int:
    """Return the rank of a module's adapter: of the first key of ``lora.rank_pattern`` that its name ends with, else
    ``lora.r``.

    Example: 16 for ``model.layers.0.mlp.down_proj`` with ``{"down_proj": 16}``.
    """
    for key, rank in (lora.rank_pattern or {}).items():
        if name == key or name.endswith(f".{key}"):
            return int(rank)
    return lora.r


def check_patterns(lora: LoraConfig, modules: Sequence[str]) -> None:
    """Raise :class:`ModelError` if a key of ``lora.rank_pattern`` or ``lora.alpha_pattern`` fits no target module."""
    for pattern, keys in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for key in keys or {}:
            if not any(name == key or name.endswith(f".{key}") for name in modules):
                known = sorted({name.rpartition(".")[2] for name in modules})
                what = f"no target module is called {key}"
                hint = f"{nearest(key, known)} targets=all_linear adapts all linear layers"
                raise ModelError(what, f"lora.{pattern}.{key}", hint)


def rank_warning(architecture: Architecture, modules: Sequence[str], lora: LoraConfig) -> str | None:
    """Return a warning if ``lora.r`` is above a target layer's smaller dimension, else ``None``.

    A change of a weight can't have a higher rank than its smaller dimension.

    Raises:
        ModelError: so high a rank with PiSSA, OLoRA or EVA, which need ``lora.r`` directions; OLoRA on GPT-2's layers.
    """
    check_patterns(lora, modules)
    names = set(modules)
    transposed = next((shape for shape in architecture.weights if shape.name in names and shape.kind == "conv1d"), None)
    if lora.init is AdapterInit.olora and transposed is not None:
        what = f"PEFT's OLoRA takes transposed layers such as {transposed.name} for others, and can't compute"
        raise ModelError(what, "lora.init = olora", "lora.init=pissa, or lora.init=kaiming")
    too_narrow = {
        min(shape.in_features, shape.out_features): shape
        for shape in architecture.weights
        if shape.name in names and rank_of(lora, shape.name) > min(shape.in_features, shape.out_features)
    }
    if not too_narrow:
        return None
    adapted = (shape for shape in architecture.weights if shape.name in names)
    few = next((shape for shape in adapted if rank_of(lora, shape.name) > shape.in_features), None)
    if lora.init is AdapterInit.eva and few is not None:
        rank = rank_of(lora, few.name)
        what = f"EVA can't take {rank} directions from the inputs of {few.name}, which has {few.in_features}"
        raise ModelError(what, f"lora.r = {lora.r}", f"lora.r={few.in_features} or less, or lora.init=kaiming")
    narrowest = min(too_narrow)
    layer = too_narrow[narrowest]
    what = f"{layer.name} is {layer.in_features} × {layer.out_features}: the rank of its update is {narrowest} at most"
    if lora.init in FROM_WEIGHTS:
        name = {"pissa": "PiSSA", "olora": "OLoRA"}[lora.init.value]
        what = f"{name} can't take {lora.r} directions from {layer.name}, which has {narrowest}"
        raise ModelError(what, f"lora.r = {lora.r}", f"lora.r={narrowest} or less, or lora.init=kaiming")
    return f"lora.r={rank_of(lora, layer.name)} is more than a layer can use: {what}"


@lru_cache(maxsize=4096)
def qkv_of_name(name: str) -> str:
    """Return which of ``q``, ``k``, ``v`` an attention projection computes, from its name.

    Examples: ``q_proj``, ``query``, ``Wq`` → q; ``kv_b_proj`` → kv; ``qkv_proj``, ``query_key_value``, ``Wqkv``,
    ``c_attn`` → qkv; ``o_proj`` → nothing.
    """
    for part in reversed(name.split(".")[-2:]):  # the parent's name, too: Moshi has q_proj.linear
        if part == "c_attn":
            return "qkv"
        words = re.split(r"[^a-z]+", part.lower().replace("query", "q").replace("key", "k").replace("value", "v"))
        # A word counts if only q, k, v and z are left after a leading w.
        letters = {letter for word in words if set(bare := word.removeprefix("w")) <= set("qkvz") for letter in bare}
        if letters:
            return "".join(letter for letter in "qkv" if letter in letters)
    return ""


def layers_without_adapters(architecture: Architecture) -> list[str]:
    """Return the last parts of names of attention and feed-forward layers that PEFT doesn't adapt: it takes them for
    experts' layers (``models/inspect.py``)."""
    shapes = (shape for shape in architecture.weights if shape.kind == "other" and shape.role != "other")
    return sorted({shape.name.rpartition(".")[2] for shape in shapes})


def _empty_set_error(architecture: Architecture, adaptable: Sequence[WeightShape], name: str) -> ModelError:
    if name not in TARGET_SETS:
        return ModelError(f"there is no target set called {name}", "targets.set", nearest(name, TARGET_SETS))
    where = f"targets = {name}, architecture {architecture.model_type}"
    if not adaptable:
        return ModelError("the model has no linear layer that can be adapted", where, "choose another model")
    what = f"the model has no linear layer in its {name}"
    if name == "mlp" and layers_without_adapters(architecture):
        what += f" that PEFT adapts: it takes {', '.join(layers_without_adapters(architecture))} for experts' layers"
    elif name == "mlp":
        what += " (its experts are three-dimensional parameters, or it has none)"
    endings = ", ".join(sorted({shape.name.rsplit(".", 1)[-1] for shape in adaptable})[:12])
    return ModelError(what, where, f"targets=all_linear, or targets.modules=[…] of {endings}")


def _match_endings(
    architecture: Architecture, adaptable: Sequence[WeightShape], requested: Sequence[str]
) -> tuple[str, ...]:
    matches = {
        ending: {shape.name for shape in adaptable if shape.name == ending or shape.name.endswith(f".{ending}")}
        for ending in requested
    }
    raise_all([_no_match_error(architecture, adaptable, ending) for ending, names in matches.items() if not names])
    chosen = set().union(*matches.values())
    if not chosen:
        raise ModelError("the list of target modules is empty", "targets.modules", "targets.modules=[q_proj,v_proj]")
    return tuple(shape.name for shape in adaptable if shape.name in chosen)


def _no_match_error(architecture: Architecture, adaptable: Sequence[WeightShape], ending: str) -> ModelError:
    where = f"targets.modules = {ending}, architecture {architecture.model_type}"
    head = architecture.output_head
    if head is not None and (head == ending or head.endswith(f".{ending}")):
        return ModelError(f"{ending} is the output head, which gets no adapter", where, "leave it out")
    if ending.rpartition(".")[2] in layers_without_adapters(architecture):
        what = f"PEFT takes {ending} for an experts' layer and doesn't adapt it"
        return ModelError(what, where, "leave it out, or targets=attention")
    parts = ending.count(".") + 1
    endings = {".".join(shape.name.split(".")[-parts:]) for shape in adaptable}
    return ModelError(f"no linear layer's name ends in {ending}", where, nearest(ending, endings))
