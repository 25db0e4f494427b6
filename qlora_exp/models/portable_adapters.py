"""Adapter files that mean the same to every tool: W + alpha/r · B·A on the published base is the trained model.

PiSSA trains on a base without its principal directions, s·B₀·A₀; OLoRA without the first ones of its QR decomposition.
Only PEFT subtracts these again when it loads the adapter. Written as [B, -B₀] · [A; A₀], with twice the rank, the
adapter needs no such step. rsLoRA's scale, alpha/√r, is written as a different alpha: llama.cpp knows only alpha/r.
B includes a module's own alpha: many tools read one alpha for all.
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
    return (
        settings.get("init_lora_weights") not in SUBTRACTING
        and not settings.get("use_rslora")
        and (settings.get("alpha_pattern") or {}) == _alphas_of_one_scale(settings)
    )


def make_portable(folder: Path, start: Mapping[str, torch.Tensor]) -> None:
    """Rewrite the adapter in ``folder``, as PEFT saved it. ``start`` holds its values before training, by their names
    in the model; only PiSSA and OLoRA need them."""
    settings: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    if is_portable(settings):
        return
    tensors = load_file(folder / WEIGHTS_FILE)
    scale = _scale(settings)
    if settings.get("init_lora_weights") in SUBTRACTING:
        first = {_saved_name(name): value for name, value in start.items()}
        tensors = {name: _with_start(name, value, first) for name, value in tensors.items()}
        settings["r"] *= 2
    tensors = {name: _with_scale(name, value, settings, scale) for name, value in tensors.items()}
    alpha = scale * settings["r"]
    alpha = int(alpha) if alpha.is_integer() else alpha
    settings |= {"init_lora_weights": True, "use_rslora": False, "lora_alpha": alpha}
    settings["alpha_pattern"] = _alphas_of_one_scale(settings)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _scale(settings: Mapping[str, Any]) -> float:
    r = settings["r"]
    return float(settings["lora_alpha"]) / (math.sqrt(r) if settings.get("use_rslora") else r)


def _alphas_of_one_scale(settings: Mapping[str, Any]) -> dict[str, float]:
    """Return the ``alpha_pattern`` that gives the modules of ``rank_pattern`` the scale of the others."""
    ranks = settings.get("rank_pattern") or {}
    factor = float(settings["lora_alpha"]) / settings["r"] if ranks else 0.0  # other kinds than LoRA have neither
    return {key: factor * rank for key, rank in ranks.items()}


def _with_scale(name: str, value: torch.Tensor, settings: Mapping[str, Any], scale: float) -> torch.Tensor:
    """Return B with its module's scale relative to ``scale``; other tensors as they are."""
    module, _, part = name.partition(f".{B}.")
    if not part:
        return value
    alphas = settings.get("alpha_pattern") or {}
    alpha = next((alphas[key] for key in alphas if re.fullmatch(rf"(.*\.)?({key})", module)), None)
    return value if alpha is None else value * (alpha / value.shape[1] / scale)


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
