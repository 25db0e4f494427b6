"""The settings of a ``--from`` file: defaults that a sweep's axes and the overrides on the command line replace."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_exp.config.choices import choices, group_names
from qlora_exp.errors import ConfigError, raise_all
from qlora_exp.paths import CONF

LENGTHS = frozenset(("training.max_steps", "training.max_tokens", "training.epochs"))
"""Keys of which one ends a training."""


def combined_overrides(source: Path | None, overrides: Sequence[str] | None, sweep: str | None = None) -> list[str]:
    """Return the overrides of the ``--from`` file ``source``, then those of the command line, which take precedence.

    Example: a file with ``lora.r: 8`` and ``seed: 1``, and ``seed=2`` on the command line, give ``["lora.r=8",
    "seed=2"]``. ``sweep``: a file's name in sweeps/, whose axes take precedence over ``source``, too.

    Raises:
        ConfigError, Problems: the file can't be read, holds no settings, or names a key that doesn't exist.
    """
    typed = list(overrides or [])
    if source is None:
        return typed
    in_file = _read_overrides(source)
    overridden = {_key(text) for text in typed} | ({"sweeps"} if sweep else set())
    if overridden & LENGTHS:  # training.epochs=3 replaces the file's training.max_steps
        overridden |= LENGTHS
    kept = [text for text in in_file if _key(text) not in overridden]
    axes = _axes(sweep, [*kept, *typed]) if sweep else {}
    kept = [text for text in kept if _key(text) not in axes]
    replacements = axes | {_key(text): text.partition("=")[2] for text in typed}
    replaced = [text for text in kept if _of_another_choice(text, replacements, in_file)]
    for text in replaced:
        name = _key(text).partition(".")[0]
        message = f"{text} is left out: {name}={replacements[name]} replaces it. To keep it, add it to the command"
        print(f"{source}: {message}", file=sys.stderr)
    return [*(text for text in kept if text not in replaced), *typed]


def _key(text: str) -> str:
    """Return an override's key without Hydra's prefixes: ``+lora.r=8`` gives ``lora.r``."""
    return text.partition("=")[0].lstrip("+~")


def _axes(sweep: str, overrides: Sequence[str]) -> dict[str, str]:
    """Return the axes of ``sweeps/SWEEP.yaml``, key → text, and for a ladder the keys that it chooses itself."""
    from qlora_exp.config.compose import compose_raw
    from qlora_exp.config.enums import Sampler
    from qlora_exp.config.override_errors import problems_of
    from qlora_exp.config.overrides import is_swept
    from qlora_exp.rank_doubling.settings import RANK, SPLIT

    # plan.* are options of the command `plan`, not keys of the configuration.
    all_overrides = [f"sweeps={sweep}", *(text for text in overrides if not text.startswith("plan."))]
    raise_all(problems_of(all_overrides, multirun=True))
    sweep_config = compose_raw([text for text in all_overrides if not is_swept(text)]).sweep
    chosen = {RANK: "", SPLIT: ""} if sweep_config.sampler is Sampler.ladder else {}
    return {**chosen, **{str(key): str(text) for key, text in sweep_config.params.items()}}


def _of_another_choice(text: str, replacements: Mapping[str, str], in_file: Sequence[str]) -> bool:
    """Whether a value belongs to the file's own choice of a group, but another choice was typed or is searched.

    Examples: the layers of ``targets.modules`` if ``targets=mlp`` is typed, or the ``model.path`` of another model.
    """
    group, dot, key = _key(text).partition(".")
    if not dot or group not in replacements or group not in group_names():
        return False
    names = re.findall(r"\w+", replacements[group])
    files = {choice.name: choice.keys for choice in choices(group)}
    new_choices = [name for name in names if name in files and f"{group}={name}" not in in_file]
    if not new_choices:
        return False
    if any(_has(files[name], key) for name in new_choices):
        return True
    return any(_key(override) == group for override in in_file) and _default(group, key) is None


def _has(keys: Mapping[str, Any], key: str) -> bool:
    """Whether a file of a group sets this nested key; ``???`` is Hydra's mark for a value that is still missing."""
    first, _, rest = key.partition(".")
    if first not in keys or keys[first] == "???":
        return False
    return _has(keys[first], rest) if rest and isinstance(keys[first], Mapping) else True


def _default(group: str, key: str) -> Any:
    """Return the value that all choices of a group share for a key; ``None`` if only one of them has it."""
    value: Any = {}
    for file in sorted((CONF / group).glob("_*.yaml")):
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value == "???" else value


def _read_overrides(file: Path) -> list[str]:
    """Return a YAML mapping as overrides. It has keys such as ``task: local``, ``task.path: FILE``, or nested keys."""
    from qlora_exp.config.from_record import flat_overrides

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file can't be read: {error}", str(file), "give --from a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}".splitlines()[0], str(file), "key: value, one per line") from None
    if not isinstance(content, dict):
        raise ConfigError("the file holds no settings", str(file), "key: value, one per line")
    return flat_overrides(content)
