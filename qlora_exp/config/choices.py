"""What can be chosen, read from the files of conf/ and sweeps/ without composing a configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_exp.errors import ConfigError, nearest
from qlora_exp.paths import CONF, SWEEPS

LISTED = {
    "models": "model",
    "quantizations": "quantization",
    "methods": "method",
    "targets": "targets",
    "routes": "route",
    "tasks": "task",
}
"""The names of configuration groups in ``ls`` → the group's folder in conf/."""
OVERLAYS = ("model_training",)
"""Folders of conf/ that Hydra merges over a group automatically; their files aren't chosen by name."""
HYDRAS = "hydra"
"""Folder of conf/ with choices of Hydra's own groups."""


@dataclass(frozen=True)
class Choice:
    """One file of a group: its name, the meaning and the command in its first line, and its keys as written; for a
    sweep also its cost."""

    name: str
    meaning: str
    command: str | None
    keys: dict[str, Any]
    cost: str | None = None


def group_names() -> list[str]:
    """Return the configuration groups, e.g. ``model``, ``quantization``."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in (*OVERLAYS, HYDRAS))


def groups(searched: Sequence[Path] = (SWEEPS.parent,)) -> dict[str, list[str]]:
    """Return the choices of each configuration group, e.g. ``{"quantization": ["bf16", "fp16", …]}``; ``sweeps`` are
    those in the folders ``searched``."""
    of_sweeps = sorted({name for folder in searched for name in choice_names(folder / "sweeps")})
    return {**{name: choice_names(CONF / name) for name in group_names()}, "sweeps": of_sweeps}


def choice_names(folder: Path) -> list[str]:
    """Return the names of a folder's choices. Files that start with ``_`` are shared parts, not choices."""
    return sorted(path.stem for path in folder.glob("*.yaml") if not path.name.startswith("_"))


def group_keys(group: str) -> list[str]:
    """Return the keys that the files of a group set, shared parts included."""
    files = (CONF / group).glob("*.yaml")
    return sorted({key for path in files for key in _read(path).keys} - {"defaults"})


def choices(group: str) -> list[Choice]:
    """Return the choices of a configuration group, by name.

    Raises:
        ConfigError: there is no such group.
    """
    folder = CONF / group
    if not folder.is_dir():
        raise ConfigError(f"there is no configuration group {group!r}", str(CONF), nearest(group, group_names()))
    return _choices_in(folder)


def sweeps() -> list[Choice]:
    """Return the sweeps, one file per question: those of the package, then those of the current folder."""
    local = Path.cwd() / "sweeps"
    folders = [SWEEPS, *([local] if local.resolve() != SWEEPS else [])]
    return [choice for folder in folders for choice in _choices_in(folder)]


def default_output_root() -> str:
    """Return ``output_root`` from conf/config.yaml."""
    return str(yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["output_root"])


def _choices_in(folder: Path) -> list[Choice]:
    return [_read(folder / f"{name}.yaml") for name in choice_names(folder)]


def _read(path: Path) -> Choice:
    text = path.read_text(encoding="utf-8")
    # The header is the first line, except that Hydra needs its "# @package …" line above it.
    first = next((line for line in text.splitlines() if not line.startswith("# @")), "")
    header = first.removeprefix("#").strip() if first.startswith("#") else ""
    meaning, gap, command = header.partition("  ")
    cost = re.search(r"^# cost: (.+)$", text, re.MULTILINE)
    keys = yaml.safe_load(text)
    return Choice(
        path.stem,
        meaning,
        command.strip() if gap else None,
        keys if isinstance(keys, dict) else {},
        cost[1] if cost else None,
    )
