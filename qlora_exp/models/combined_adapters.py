"""One adapter in place of several that were merged one after the other: their low-rank updates add up.

Σ sₖ·Bₖ·Aₖ = [s₁·B₁ … sₙ·Bₙ] · [A₁; …; Aₙ]: the matrices are concatenated, and the scales sₖ go into B.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qlora_exp.errors import ModelError
from qlora_exp.models.portable_adapters import SETTINGS_FILE, WEIGHTS_FILE

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
MERGED_HINT = "--formats merged, or GGUF: these contain both"


def write_combined(folders: Sequence[Path], target: Path) -> None:
    """Write one adapter to ``target`` that does to the base what the adapters in ``folders`` do one after the other.

    Its rank is the sum of their ranks; a layer that one of them lacks gets zeros in its place. Values are float32.

    Raises:
        ModelError: one of them isn't a plain low-rank update (DoRA, PiSSA that PEFT saved unconverted, embeddings).
    """
    settings = [json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")) for folder in folders]
    tensors = [load_file(folder / WEIGHTS_FILE) for folder in folders]
    for folder, single, held in zip(folders, settings, tensors, strict=True):
        _check_plain(folder, single, held)
    ranks = [max(value.shape[0] for name, value in held.items() if name.endswith(A_SUFFIX)) for held in tensors]
    layers = sorted({name.removesuffix(A_SUFFIX) for held in tensors for name in held if name.endswith(A_SUFFIX)})
    combined: dict[str, torch.Tensor] = {}
    for layer in layers:
        example = next(held for held in tensors if layer + A_SUFFIX in held)
        inputs, outputs = example[layer + A_SUFFIX].shape[1], example[layer + B_SUFFIX].shape[0]
        a, b = torch.zeros(sum(ranks), inputs), torch.zeros(outputs, sum(ranks))
        first = 0
        for single, held, rank in zip(settings, tensors, ranks, strict=True):
            if layer + A_SUFFIX in held:
                own = held[layer + A_SUFFIX].shape[0]
                scale = float(single["lora_alpha"]) / (math.sqrt(own) if single.get("use_rslora") else own)
                a[first : first + own] = held[layer + A_SUFFIX].float()
                b[:, first : first + own] = scale * held[layer + B_SUFFIX].float()
            first += rank
        combined[layer + A_SUFFIX], combined[layer + B_SUFFIX] = a, b
    target.mkdir(parents=True, exist_ok=True)
    save_file(combined, target / WEIGHTS_FILE, metadata={"format": "pt"})
    written = settings[-1] | {
        "base_model_name_or_path": settings[0].get("base_model_name_or_path"),
        "r": sum(ranks),
        "lora_alpha": sum(ranks),
        "use_rslora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "target_modules": _target_modules(settings, layers),
    }
    (target / SETTINGS_FILE).write_text(json.dumps(written, indent=2, sort_keys=True), encoding="utf-8")


def _check_plain(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    reasons = {
        "DoRA's magnitudes don't add up": settings.get("use_dora"),
        "PEFT subtracts its start when it loads it": settings.get("init_lora_weights") in ("pissa", "olora"),
        "its layers have different values of alpha": settings.get("alpha_pattern"),
        "it adapts experts' parameters": settings.get("target_parameters"),
        "it has more than A and B of linear layers": any(not n.endswith((A_SUFFIX, B_SUFFIX)) for n in tensors),
    }
    for reason, holds in reasons.items():
        if holds:
            what = f"the adapter and the one that the run started from can't be written as one: {reason}"
            raise ModelError(what, str(folder), MERGED_HINT)


def _target_modules(settings: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> list[str]:
    """Return the last parts of the layers' names if all adapters name their layers so, else the full names."""
    short = all(
        isinstance(single.get("target_modules"), list) and all("." not in name for name in single["target_modules"])
        for single in settings
    )
    names = [layer.removeprefix("base_model.model.") for layer in layers]
    return sorted({name.rpartition(".")[2] for name in names}) if short else names
