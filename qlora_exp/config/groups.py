"""The configuration groups of conf/, their choices, and the folders with sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_exp.paths import CONF, SWEEPS


def groups(searched: Sequence[Path] = (SWEEPS.parent,)) -> dict[str, list[str]]:
    """Return the choices of each configuration group, e.g. ``{"quantization": ["bf16", "fp16", …]}``; ``sweeps`` are
    those in the folders ``searched``."""
    folders = sorted(path for path in CONF.iterdir() if path.is_dir())
    choices = {folder.name: choices_of_group(folder) for folder in folders if folder.name != "model_training"}
    return {**choices, "sweeps": sorted({name for folder in searched for name in choices_of_group(folder / "sweeps")})}


def choices_of_group(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml") if not path.name.startswith("_"))
