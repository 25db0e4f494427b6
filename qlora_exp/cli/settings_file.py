"""The settings of a ``--from`` file: defaults that a sweep's axes and the overrides on the command line replace."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_exp.config.choices import choices, group_names
from qlora_exp.errors import ConfigError, nearest, raise_all
from qlora_exp.paths import CONF

LENGTHS = frozenset(("training.max_steps", "training.max_tokens", "training.epochs"))
"""Keys of which one ends a training."""
YAML_SUFFIXES = (".yaml", ".yml")


def combined_overrides(source: Path | None, overrides: Sequence[str] | None, sweep: str | None = None) -> list[str]:
    """Return the overrides of the ``--from`` file ``source``, then those of the command line, which take precedence.

    Example: a file with ``lora.r: 8`` and ``seed: 1``, and ``seed=2`` on the command line, give ``["lora.r=8",
    "seed=2"]``. ``sweep``: a file's name in sweeps/, whose axes take precedence over ``source``, too.

    Raises:
        ConfigError, Problems: the file can't be read, holds no settings, or names a key that doesn't exist.
    """
    typed = list(overrides or [])
    _check_no_file(typed, source)
    if source is None:
        return typed
    in_file = _read_overrides(source)
    overridden = {_key(text) for text in typed} | ({"sweeps"} if sweep else set())
    # training.epochs=3 replaces the file's training.max_steps, but not what the file switches off.
    lengths = [text for text in (*typed, *in_file) if _key(text) in LENGTHS and not text.endswith("=null")]
    replaced_lengths = lengths if any(text in typed for text in lengths) else []
    kept = [text for text in in_file if _key(text) not in overridden and text not in replaced_lengths]
    axes = _axes(sweep, [*kept, *typed]) if sweep else {}
    kept = [text for text in kept if _key(text) not in axes]
    replacements = axes | {_key(text): text.partition("=")[2] for text in typed}
    replaced = {text: name for text in kept if (name := _of_another_choice(text, replacements, in_file))}
    for text, name in replaced.items():
        message = f"{text} is left out: {name}={replacements[name]} replaces it. To keep it, add it to the command"
        print(f"{source}: {message}", file=sys.stderr)
    return [*(text for text in kept if text not in replaced), *typed]


def _check_no_file(typed: Sequence[str], source: Path | None) -> None:
    """Raise ConfigError for a lone ``FILE.yaml`` among the overrides: it belongs behind ``--from`` or ``import``."""
    for text in typed:
        if "=" in text or Path(text).suffix.lower() not in (*YAML_SUFFIXES, ".json"):
            continue
        what = f"{text} is a file, not a setting"
        if source is not None:
            raise ConfigError(what, "command line", f"only one file gives settings, and --from {source} names it")
        if not Path(text).is_file():
            raise ConfigError(f"there is no {text}, and it is no setting", "command line", _nearest_file(text))
        from qlora_exp.config.imported_settings import tool_of_file

        tool = tool_of_file(Path(text))
        hint = f"qlora-exp import {shlex.quote(text)}" if tool else f"--from {shlex.quote(text)}"
        raise ConfigError(f"{what}{f'; it has the keys of {tool}' if tool else ''}", "command line", hint)


def _nearest_file(name: str) -> str:
    """Return which YAML files lie where ``name`` should."""
    folder = Path(name).expanduser().parent
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in YAML_SUFFIXES) if folder.is_dir() else []
    if not files:
        return "give --from a YAML file, e.g. the task.yaml that qlora-exp init my-task writes"
    close = nearest(str(name), map(str, files), template="--from {}")
    return close.replace("valid: ", f"{folder} has: ") if close.startswith("valid") else close


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


def _of_another_choice(text: str, replacements: Mapping[str, str], in_file: Sequence[str]) -> str | None:
    """Return the group or key whose other choice was typed or is searched, if a value belongs to the file's own choice.

    Examples: the layers of ``targets.modules`` if ``targets=mlp`` is typed, the ``model.path`` of another model, the
    ``sweep.pruner_options`` of another pruner.
    """
    kind = re.match(r"sweep\.(?:sampler|pruner)(?=_options)", _key(text))
    if kind is not None:
        return kind[0] if kind[0] in replacements and f"{kind[0]}={replacements[kind[0]]}" not in in_file else None
    group, dot, key = _key(text).partition(".")
    if not dot or group not in replacements or group not in group_names():
        return None
    names = re.findall(r"\w+", replacements[group])
    files = {choice.name: choice.keys for choice in choices(group)}
    new_choices = [name for name in names if name in files and f"{group}={name}" not in in_file]
    if not new_choices:
        return None
    if any(_has(files[name], key) for name in new_choices):
        return group
    is_its_own = any(_key(override) == group for override in in_file) and _default(group, key) is None
    return group if is_its_own else None


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
    from qlora_exp.config.imported_settings import tool_of

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {file}", str(file), _nearest_file(str(file))) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file can't be read: {error}", str(file), "give --from a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}".splitlines()[0], str(file), "key: value, one per line") from None
    if not isinstance(content, dict):
        raise ConfigError("the file holds no settings", str(file), "key: value, one per line")
    if tool := tool_of(content):
        what = f"the file has the keys of {tool}"
        raise ConfigError(what, str(file), f"qlora-exp import {shlex.quote(str(file))} writes it with our keys")
    return flat_overrides(content)
