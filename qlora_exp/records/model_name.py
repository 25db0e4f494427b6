"""The name of a run's model, from its settings: what a person calls it, not how it was chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

SNAPSHOT = re.compile(r"(?:^|/)models--([^/]+)/snapshots/[^/]+")
"""A folder of the Hub's cache, e.g. ``models--Qwen--Qwen3-8B/snapshots/COMMIT``."""
GGUF_PART = re.compile(r"-\d{5}-of-\d{5}$")
OWNER_AND_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""What most ids of the Hub look like."""
CHOSEN = ("hub", "local")
"""Families that hold any model."""
ADAPTER_FOLDER = "adapter"
"""The folder of a run that holds its adapter."""
DIGITS_OF_RUN = 4
"""Hexadecimal digits at the end of a run's id."""


def model_name(model: Mapping[str, Any], short: bool = False) -> str:
    """Return the name of the model with these settings (``model`` of a configuration or of a record).

    It is the family, the Hub id for ``model=hub``, and the name of the directory or file for ``model=local``. A
    starting adapter follows after a plus sign. ``short``: without the Hub's owner.

    Examples: ``smollm2_135m``, ``Qwen/Qwen2.5-0.5B``, ``SmolLM2-135M.Q4_1``, ``embedded+cd64`` (with the adapter of
    the run whose id ends in cd64).
    """
    family, place = str(model.get("family")), model_place(model)
    name = family
    if place and family in CHOSEN:
        name = name_of_path(place) if model.get("path") and not OWNER_AND_NAME.fullmatch(place) else place
    return f"{name.rpartition('/')[2] if short else name}{_adapter_suffix(model)}"


def variant_name(model: Mapping[str, Any]) -> str:
    """Return the short name with the variant, unless the name of a chosen model says it: ``embedded-base``,
    ``Qwen3-8B-instruct``, ``SmolLM2-135M-Instruct``, ``embedded-base+cd64``."""
    name, variant = model_name({**model, "adapter": None}, short=True), str(model.get("variant"))
    is_said = model.get("family") in CHOSEN and variant in name.lower()
    return f"{name if is_said else f'{name}-{variant}'}{_adapter_suffix(model)}"


def model_place(model: Mapping[str, Any]) -> str | None:
    """Return the Hub id, ``embedded:NAME`` or path of the model with these settings; the Hub id for a snapshot of the
    Hub's cache. ``None`` if the settings name none."""
    variant = str(model.get("variant"))
    path = (model.get("instruct_path") if variant == "instruct" else None) or model.get("path")
    if path:
        return name_of_path(str(path)) if SNAPSHOT.search(str(path)) else str(path)
    checkpoint = (model.get("checkpoints") or {}).get(variant) or model.get("id")
    return str(checkpoint) if checkpoint else None


def name_of_path(path: str) -> str:
    """Return the name of a model on disk: that of its directory or of its GGUF file, or the Hub id of a snapshot."""
    if match := SNAPSHOT.search(path):
        return match[1].replace("--", "/")
    file = PurePath(path)
    if file.name == "config.json":
        return name_of_path(str(file.parent))
    return GGUF_PART.sub("", file.stem) if file.suffix == ".gguf" else file.name


def _adapter_suffix(model: Mapping[str, Any]) -> str:
    """Return e.g. ``+cd64`` for an adapter of a run, ``+NAME`` for one in another folder; empty without one."""
    if not model.get("adapter"):
        return ""
    place = PurePath(str(model["adapter"]))
    if place.name != ADAPTER_FOLDER:
        return f"+{place.name}"
    _, _, digits = place.parent.name.rpartition("-")
    return f"+{digits if len(digits) == DIGITS_OF_RUN else place.parent.name}"
