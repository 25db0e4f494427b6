"""The settings of a ``--from`` file: defaults beneath a sweep's axes and beneath what is typed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def given_overrides(source: Path | None, overrides: Sequence[str] | None, sweep: str | None = None) -> list[str]:
    """The overrides of a ``--from`` file, then those of the command line, which win. ``sweep``: the name of a file of
    sweeps/, whose axes go before the settings of ``source``, too.

    Raises:
        ConfigError, Problems: the file can't be read, holds no settings, or names a key that doesn't exist.
    """
    typed = list(overrides or [])
    if source is None:
        return typed
    read = _read_overrides(source)
    named = {_key(text) for text in typed} | ({"sweeps"} if sweep else set())
    kept = [text for text in read if _key(text) not in named]
    axes = _axes(sweep, [*kept, *typed]) if sweep else {}
    kept = [text for text in kept if _key(text) not in axes]
    chosen = {_key(text): text.partition("=")[2] for text in read if _key(text) not in {*axes, *named}}
    by_group = axes | {_key(text): text.partition("=")[2] for text in typed}
    replaced = [text for text in kept if _of_another_choice(text, by_group, chosen, read)]
    _tell(source, replaced, by_group)
    return [*(text for text in kept if text not in replaced), *typed]


def _key(text: str) -> str:
    return text.partition("=")[0].lstrip("+~")


def _axes(sweep: str, overrides: Sequence[str]) -> dict[str, str]:
    """The axes of ``sweeps/SWEEP.yaml``, key → text; of a ladder also what it chooses itself."""
    from qlora_exp.config.compose import compose_raw
    from qlora_exp.config.overrides import is_swept
    from qlora_exp.config.problems import problems_of
    from qlora_exp.config.schema import Sampler
    from qlora_exp.errors import raise_all
    from qlora_exp.rank_doubling.settings import RANK, SPLIT

    everything = [
        f"sweeps={sweep}",
        *(text for text in overrides if not text.startswith("plan.")),
    ]  # no setting of a run
    raise_all(problems_of(everything, multirun=True))
    search = compose_raw([text for text in everything if not is_swept(text)]).sweep
    chosen = {RANK: "", SPLIT: ""} if search.sampler is Sampler.ladder else {}
    return {**chosen, **{str(key): str(text) for key, text in search.params.items()}}


def _of_another_choice(text: str, by_group: Mapping[str, str], chosen: Mapping[str, str], read: Sequence[str]) -> bool:
    """Whether a value belongs to the file's own choice of a group, and another one is typed or searched: the layers of
    ``targets.modules`` where ``targets=mlp`` is typed, the ``model.path`` of another model."""
    from qlora_exp.config.choices import choices, group_names

    group, dot, key = _key(text).partition(".")
    if not dot or group not in by_group or group not in group_names():
        return False
    names = re.findall(r"\w+", by_group[group])
    files = {choice.name: choice.keys for choice in choices(group)}
    others = [name for name in names if name in files and f"{group}={name}" not in read]
    if not others:
        return False
    if any(_has(files[name], key) for name in others):
        return True
    return any(_key(other) == group for other in read) and _default(group, key) is None


def _has(keys: Mapping[str, Any], key: str) -> bool:
    first, _, rest = key.partition(".")
    if first not in keys or keys[first] == "???":
        return False
    return _has(keys[first], rest) if rest and isinstance(keys[first], Mapping) else True


def _default(group: str, key: str) -> Any:
    """What all choices of a group share for a key; ``None``: nothing, so that it belongs to one of them."""
    import yaml

    from qlora_exp.paths import CONF

    value: Any = {}
    for file in sorted((CONF / group).glob("_*.yaml")):
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value == "???" else value


def _tell(source: Path, replaced: Sequence[str], by_group: Mapping[str, str]) -> None:
    import sys

    for text in replaced:
        group = _key(text).partition(".")[0]
        told = f"{source}: {text} is left out: {group}={by_group[group]} replaces it. To keep it, add it to the command"
        print(told, file=sys.stderr)


def _read_overrides(file: Path) -> list[str]:
    """A YAML mapping as overrides: ``task: local``, ``task.path: FILE`` or nested keys."""
    import yaml

    from qlora_exp.config.of_record import flat_overrides
    from qlora_exp.errors import ConfigError

    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file can't be read: {error}", str(file), "give --from a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}".splitlines()[0], str(file), "key: value, one a line") from None
    if not isinstance(raw, dict):
        raise ConfigError("the file holds no settings", str(file), "key: value, one a line")
    return flat_overrides(raw)
