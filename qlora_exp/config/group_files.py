"""The files of conf/, read one by one without Hydra."""

from __future__ import annotations

import typing
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp.config.groups import groups
from qlora_exp.config.schema import Config
from qlora_exp.paths import CONF


def default_choices() -> dict[str, str]:
    """Return group → choice, as in conf/config.yaml."""
    raw: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"), resolve=False)
    entries = [entry for entry in raw["defaults"] if isinstance(entry, dict)]
    group_names = groups()
    return {key: name for entry in entries for key, name in entry.items() if key in group_names and key != "sweeps"}


def read_choice(group: str, name: str) -> Any:
    """Return the file ``conf/GROUP/NAME.yaml`` typed by the schema, with its folder's shared parts; ``None`` if only
    Hydra can compose it: other defaults, interpolations, missing values."""
    node = OmegaConf.load(CONF / group / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    parts = node.pop("defaults", ["_self_"])
    if any(not isinstance(part, str) or not part.startswith("_") for part in parts):
        return None
    schema = typing.get_type_hints(Config)[group]
    schema = next((kind for kind in typing.get_args(schema) if kind is not type(None)), schema)
    files = [node if part == "_self_" else OmegaConf.load(CONF / group / f"{part}.yaml") for part in parts]
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *files))
    except OmegaConfBaseException:
        return None
