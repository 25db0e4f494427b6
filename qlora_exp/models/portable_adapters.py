"""Adapter files that mean the same to every tool: W + alpha/r · B·A on the published base is the trained model.

With ``lora.alpha_pattern``, or one alpha for several ranks, modules have their own scale: what differs is written into
B, so that one scale holds for all.

PiSSA trains on a base without its principal directions, s·B₀·A₀; OLoRA without the first ones of its QR decomposition.
Only PEFT subtracts these again when it loads the adapter. Written as [B, -B₀] · [A; A₀], with twice the rank, the
adapter needs no such step. rsLoRA's scale, alpha/√r, is written as a different alpha: llama.cpp knows only alpha/r.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

A, B = "lora_A", "lora_B"
SUBTRACTING = ("pissa", "olora")
"""PEFT's names of starts that it subtracts from the base's weights."""
WEIGHTS_FILE, SETTINGS_FILE = "adapter_model.safetensors", "adapter_config.json"


def is_portable(settings: Mapping[str, Any]) -> bool:
    """Return whether an ``adapter_config.json`` needs only W + alpha/r · B·A."""
    return settings.get("init_lora_weights") not in SUBTRACTING and not settings.get("use_rslora")


def make_portable(folder: Path, start: Mapping[str, torch.Tensor]) -> None:
    """Rewrite the adapter in ``folder``, as PEFT saved it. ``start`` holds its values before training, by their names
    in the model; only PiSSA and OLoRA need them."""
    settings: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    if is_portable(settings) and not settings.get("alpha_pattern") and not settings.get("rank_pattern"):
        return
    tensors = load_file(folder / WEIGHTS_FILE)
    scale = _scale(settings)
    factors = _factors(settings, tensors, scale)
    if is_portable(settings) and all(factor == 1.0 for factor in factors.values()):
        return
    for name, factor in factors.items():
        if factor != 1.0:
            tensors[name] = (tensors[name].float() * factor).contiguous()
    if settings.get("init_lora_weights") in SUBTRACTING:
        first = {_saved_name(name): value for name, value in start.items()}
        tensors = {name: _with_start(name, value, first) for name, value in tensors.items()}
        settings["r"] *= 2
    alpha = scale * settings["r"]
    alpha = int(alpha) if alpha.is_integer() else alpha
    settings |= {"init_lora_weights": True, "use_rslora": False, "lora_alpha": alpha}
    settings["alpha_pattern"] = {key: scale * rank for key, rank in (settings.get("rank_pattern") or {}).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _factors(settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], scale: float) -> dict[str, float]:
    """Return by the name of each B its module's scale over ``scale``, which all modules have in the file."""
    alphas: Mapping[str, float] = settings.get("alpha_pattern") or {}
    factors = {}
    for name, value in tensors.items():
        parts = name.split(".")
        if B not in parts:
            continue
        module, rank = ".".join(parts[: parts.index(B)]), value.shape[1]
        alpha = next(
            (alpha for key, alpha in alphas.items() if re.match(rf"(.*\.)?({key})$", module)), settings["lora_alpha"]
        )
        factors[name] = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank) / scale
    return factors


def _scale(settings: Mapping[str, Any]) -> float:
    r = settings["r"]
    return float(settings["lora_alpha"]) / (math.sqrt(r) if settings.get("use_rslora") else r)


def _saved_name(name: str) -> str:
    """Return the parameter's name in a file of PEFT: without the adapter's own name."""
    return name.replace(".default.", ".").removesuffix(".default")


def _with_start(name: str, value: torch.Tensor, start: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return A with A₀ appended as rows, B with -B₀ appended as columns, both in float32 as PiSSA subtracted them.
    DoRA's magnitudes don't change."""
    parts = name.split(".")
    if A in parts:
        return torch.cat([value.float(), start[name].float().to(value.device)], dim=0)
    return torch.cat([value.float(), -start[name].float().to(value.device)], dim=1) if B in parts else value
