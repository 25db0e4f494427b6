"""Hydra's overrides: their keys and values, values back to text, and the folders in which sweeps are found."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from qlora_exp.config.choices import choice_names, groups
from qlora_exp.errors import ConfigError
from qlora_exp.paths import SWEEPS

SEARCH_PATH = "hydra.searchpath"


def override_key(text: str) -> str:
    """Return the key or group of an override."""
    return parse(text).key_or_group


def override_value(text: str) -> Any:
    """Return the value of an override with a single value."""
    [value] = values_of(parse(text))
    return value


def is_swept(text: str) -> bool:
    """Return whether an override has several values: ``lora.r=4,8``, ``training.learning_rate=interval(1e-4,1e-2)``."""
    return parse(text).is_sweep_override()


def first_choice(text: str) -> str:
    """Return the override with the first of its values; for an interval, with its lower end."""
    override = parse(text)
    value = next(iter(values_of(override)), None) if override.is_sweep_override() else None
    return text if value is None else f"{override.get_key_element()}={hydra_value(value)}"


def is_hydra(key: str) -> bool:
    """Return whether a key or group is Hydra's own: how a configuration is launched, not what it contains."""
    return key == "hydra" or key.startswith(("hydra.", "hydra/"))


@functools.lru_cache(maxsize=4096)  # Hydra's parser takes a quarter of a millisecond, and a sweep repeats its overrides
def parse(text: str) -> Override:
    """Return the parsed override; don't change it: equal texts give the same object."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        what = f"{text!r} is not a valid override: {str(error).splitlines()[0]}"
        hint = "write key=value"
        key, sign, value = text.partition("=")
        if sign and re.fullmatch(r"\+{0,2}\w+(\.\w+)*", key):  # the value quoted for Hydra, all of it for a shell
            hint = shlex.quote(f"{key}={QuotedString(text=value, quote=Quote.double).with_quotes()}")
        raise ConfigError(what, "command line", hint) from None


def values_of(override: Override) -> list[Any]:
    """Return the values of an override; for an interval, both ends."""
    value: Any = override.value()
    if not override.is_sweep_override():
        return [value.text if isinstance(value, QuotedString) else value]
    if isinstance(value, IntervalSweep):
        return [value.start, value.end]
    if isinstance(value, Glob):
        return glob_matches(override)
    return [override_value(f"key={text}") for text in override.sweep_string_iterator()]


def glob_matches(override: Override) -> list[str]:
    """Return the choices that match a ``glob(…)``; an empty list for any other override."""
    value = override.value()
    return value.filter(groups().get(override.key_or_group, [])) if isinstance(value, Glob) else []


def without_globs(texts: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Return ``texts`` with each glob among the ``overrides`` expanded: ``lora=glob(*)`` becomes every choice of the
    group.

    Hydra's own expansion would include the groups' shared parts (``_mode.yaml``), which aren't choices.
    """
    expanded = []
    for text in texts:
        matches = glob_matches(parse(text)) if text in overrides else []
        expanded.append(f"{parse(text).get_key_element()}={','.join(matches)}" if matches else text)
    return expanded


def hydra_value(value: Any) -> str:
    """Return ``value`` (JSON types) in Hydra's override grammar, quoted so that Hydra reads the same value back.

    Example: ``[1, "a b"]`` gives ``[1,'a b']``.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra_value(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(hydra_value, value)) + "]"
    text = str(value)
    if re.fullmatch(r"[A-Za-z0-9_./-]+", text) and not _reads_as_another_type(text):
        return text
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _reads_as_another_type(text: str) -> bool:
    """Return whether Hydra would read an unquoted ``text`` as a number, a boolean or null."""
    if text.lower() in ("null", "true", "false", "none"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def has_interpolation(value: Any) -> bool:
    """Return whether a text in ``value`` (JSON types) holds an interpolation: ``${lora.r}``, but not
    ``\\${lora.r}``."""
    if isinstance(value, str):
        return any(len(match[1]) % 2 == 0 for match in re.finditer(r"(\\*)\$\{", value))
    if isinstance(value, Mapping):
        return any(map(has_interpolation, value.values()))
    return isinstance(value, list | tuple) and any(map(has_interpolation, value))


def escape_interpolations(value: Any) -> Any:
    """Return ``value`` (JSON types) with ``${`` escaped in its texts, so that OmegaConf reads it literally."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: f"{match[1]}{match[1]}\\${{", value)
    if isinstance(value, Mapping):
        return {key: escape_interpolations(entry) for key, entry in value.items()}
    return [escape_interpolations(entry) for entry in value] if isinstance(value, list | tuple) else value


def with_target_modules(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a single run with ``targets=q_proj,v_proj`` as ``targets.modules=[q_proj,v_proj]``.

    Only a list without a target set is one of modules: ``targets=attention,mlp`` stays an axis, which a single run
    refuses. In a sweep every comma separates the values of an axis, so nothing changes there.
    """
    return [_target_modules(text) or text for text in overrides]


def _target_modules(text: str) -> str | None:
    key, _, value = text.partition("=")
    names = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    is_list = "," in value or names != value
    if key != "targets" or not is_list or not re.fullmatch(r"[\w.]+(,\s*[\w.]+)*", names):
        return None
    modules = re.findall(r"[\w.]+", names)
    if set(modules) & set(groups()["targets"]):
        return None
    return f"targets.modules={hydra_value(modules)}"


def search_folders(overrides: Sequence[str]) -> list[Path]:
    """Return the folders whose ``sweeps/`` is searched: the package's, those of ``hydra.searchpath``, and the current
    one.

    If a folder of ``hydra.searchpath`` and the current one have a sweep of the same name, the current one isn't
    searched: a study from elsewhere is being resumed.

    Raises:
        ConfigError: two folders have a sweep of the same name.
    """
    values = [parse(text).value() for text in overrides if text.lstrip("+").partition("=")[0] == SEARCH_PATH]
    entries = [str(entry).removeprefix("file://") for value in values if isinstance(value, list) for entry in value]
    listed_folders = [Path(entry).resolve() for entry in entries]
    folders = [SWEEPS.parent]
    for folder in (*listed_folders, Path.cwd()):
        if (folder / "sweeps").is_dir() and (folder / "sweeps").resolve() not in [f / "sweeps" for f in folders]:
            folders.append(folder.resolve())
    owners: dict[str, Path] = {}
    for folder in list(folders):
        for name in choice_names(folder / "sweeps"):
            if name in owners and folder not in listed_folders and owners[name] in listed_folders:
                folders.remove(folder)
                break
            if name in owners:
                where = " and ".join(str(owner / "sweeps" / f"{name}.yaml") for owner in (owners[name], folder))
                raise ConfigError(f"there are two sweeps {name!r}", where, "rename yours")
            owners[name] = folder
    return folders


def search_path(folders: Sequence[Path]) -> str:
    """Return the override ``hydra.searchpath=[…]`` with which Hydra finds ``sweeps=NAME`` in the ``sweeps/`` of
    ``folders``."""
    entries = [QuotedString(text=f"file://{folder}", quote=Quote.single).with_quotes() for folder in folders]
    return f"{SEARCH_PATH}=[{','.join(entries)}]"
