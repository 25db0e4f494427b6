"""Overrides in, typed configuration out: every mistake in them found at once, before anything expensive."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import shlex
import types
import typing
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from qlora_exp import plan
from qlora_exp.config import Config, register, typed
from qlora_exp.errors import ConfigError, QloraExpError, nearest, raise_all
from qlora_exp.paths import CONF, SWEEPS

GRID_CHECK_LIMIT = 256
"""Configurations of a multirun that are composed and checked before its first run; the rest are checked by axis."""

SEARCH_PATH = "hydra.searchpath"

UNSAFE = ("_target_", "trust_remote_code")

OTHER_NAMES = {
    "lr": "training.learning_rate",
    "rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "bs": "training.batch_size",
    "steps": "training.max_steps",
    "target_modules": "targets.modules",
    "quant": "quantization",
    "dataset": "task",
    "data": "task",
}
"""What other tools call our keys."""


def compose(overrides: Sequence[str]) -> Config:
    """One configuration from conf/ and ``overrides`` (``group=choice``, ``key.path=value``).

    Raises:
        ConfigError, Problems: a misspelt key or choice, a wrong type, an impossible combination; all together.
    """
    raise_all(problems_of(overrides, multirun=False))
    return _compose_checked(overrides)


def check_multirun(overrides: Sequence[str]) -> None:
    """Raise for any wrong point of a grid (``lora.r=8,16``) before its first run starts."""
    raise_all(problems_of(overrides, multirun=True))
    listed = without_globs(overrides, overrides)
    axes = [_choices(override) for override in _parsed(listed) if _is_ours(override)]
    check_points(itertools.islice(itertools.product(*axes), GRID_CHECK_LIMIT))


def check_points(points: Iterable[Sequence[str]]) -> None:
    """Compose each of ``points`` (overrides) and raise what is wrong with any of them, each problem once."""
    errors: dict[str, QloraExpError] = {}
    composer = Composer()
    for point in points:
        try:
            checked(composer.raw(point))
        except QloraExpError as error:
            for one in getattr(error, "errors", (error,)):
                errors.setdefault(str(one), one)
    raise_all(list(errors.values()))


class Composer:
    """Composes one configuration after the other. Hydra, which takes a tenth of a second, composes each combination of
    group choices once only; the values are set on a copy of it: Hydra sets them last, too."""

    def __init__(self) -> None:
        self._groups = frozenset(groups())
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: Sequence[str]) -> Config:
        """As :func:`compose`."""
        raise_all(problems_of(overrides, multirun=False))
        return checked(self.raw(overrides))

    def raw(self, overrides: Sequence[str]) -> DictConfig:
        """As :func:`compose_raw`."""
        chosen: list[str] = []
        values: list[Override] = []
        for text in overrides:
            override = _parse(text)
            plain = override.type is OverrideType.CHANGE and _is_ours(override)
            if plain and override.key_or_group not in self._groups:
                values.append(override)
            else:
                chosen.append(text)
        if tuple(chosen) not in self._composed:
            self._composed[tuple(chosen)] = compose_raw(chosen)
        config = copy.deepcopy(self._composed[tuple(chosen)])
        try:
            for override in values:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return compose_raw(overrides)  # which says what is wrong
        return config


def without_globs(texts: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """``texts`` with each glob among the ``overrides`` spelt out: ``lora=glob(*)`` names every choice of that group.

    Hydra would count the groups' shared parts (``_mode.yaml``), which are no choices, too.
    """
    return [_without_glob(text) if text in overrides else text for text in texts]


def _without_glob(text: str) -> str:
    override = _parse(text)
    fitting = _globbed(override)
    return f"{override.get_key_element()}={','.join(fitting)}" if fitting else text


def _globbed(override: Override) -> list[str]:
    """The choices of its group that a ``glob(…)`` means; none for every other override."""
    value = override.value()
    return value.filter(groups().get(override.key_or_group, [])) if isinstance(value, Glob) else []


def problems_of(overrides: Sequence[str], multirun: bool) -> list[QloraExpError]:
    """Every problem that can be seen in the overrides one by one."""
    found: list[QloraExpError] = []
    try:
        searched = search_folders(overrides)
    except ConfigError as error:
        return [error]
    for text in overrides:
        try:
            override = _parse(text)
            if _is_ours(override):
                found.extend(_problems_of_one(override, text, multirun, searched))
        except ConfigError as error:
            found.append(error)
        except HydraException as error:  # a sweep that can be neither listed nor bounded
            what = f"{text} can't be listed value by value: {str(error).splitlines()[0]}"
            found.append(ConfigError(what, "command line", "name the values: key=a,b,c or key=range(1,4)"))
    return found


def groups(searched: Sequence[Path] = (SWEEPS.parent,)) -> dict[str, list[str]]:
    """Choices of each configuration group, e.g. ``{"quantization": ["bf16", "fp16", …]}``; ``sweeps`` are those of
    ``searched``'s folders."""
    folders = sorted(path for path in CONF.iterdir() if path.is_dir())
    found = {folder.name: _choices_of_group(folder) for folder in folders if folder.name != "model_training"}
    return {**found, "sweeps": sorted({name for folder in searched for name in _choices_of_group(folder / "sweeps")})}


def search_folders(overrides: Sequence[str]) -> list[Path]:
    """The folders whose ``sweeps/`` is searched: ours, those of ``hydra.searchpath``, the current one where it has any.

    Raises:
        ConfigError: two of them have a sweep of the same name.
    """
    given = [override.value() for override in _parsed(overrides) if override.key_or_group == SEARCH_PATH]
    entries = [str(entry).removeprefix("file://") for value in given if isinstance(value, list) for entry in value]
    folders = [SWEEPS.parent]
    for folder in (*map(Path, entries), Path.cwd()):
        if (folder / "sweeps").is_dir() and (folder / "sweeps").resolve() not in [f / "sweeps" for f in folders]:
            folders.append(folder.resolve())
    owners: dict[str, Path] = {}
    for folder in folders:
        for name in _choices_of_group(folder / "sweeps"):
            if name in owners:
                where = " and ".join(str(place / "sweeps" / f"{name}.yaml") for place in (owners[name], folder))
                raise ConfigError(f"there are two sweeps {name!r}", where, "rename yours")
            owners[name] = folder
    return folders


def search_path(folders: Sequence[Path]) -> str:
    """``hydra.searchpath=[…]`` under which Hydra finds ``sweeps=NAME`` in the ``sweeps/`` of ``folders``."""
    entries = [QuotedString(text=f"file://{folder}", quote=Quote.single).with_quotes() for folder in folders]
    return f"{SEARCH_PATH}=[{','.join(entries)}]"


def key_of(text: str) -> str:
    """The key or group that an override is for."""
    return _parse(text).key_or_group


def value_of(text: str) -> Any:
    """The value of an override that has one."""
    [value] = _values(_parse(text))
    return value


def is_swept(text: str) -> bool:
    """Whether an override has several values: ``lora.r=4,8``, ``training.learning_rate=interval(1e-4,1e-2)``."""
    return _parse(text).is_sweep_override()


def _choices_of_group(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml") if not path.name.startswith("_"))


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        first = str(error).splitlines()[0]
        what = f"{text!r} can't be read as an override: {first}"
        raise ConfigError(what, "command line", _in_quotes(text) or "write key=value") from None


def _in_quotes(text: str) -> str | None:
    """``key=value`` with its value as a text that Hydra reads, itself quoted for a shell; ``None`` without a key."""
    key, sign, value = text.partition("=")
    if not (sign and re.fullmatch(r"[\w.+]+", key)):
        return None
    return shlex.quote(f"{key}={QuotedString(text=value, quote=Quote.double).with_quotes()}")


def _parsed(overrides: Sequence[str]) -> list[Override]:
    return [_parse(text) for text in overrides]


def is_hydra(key: str) -> bool:
    """Whether a key or group is Hydra's own: how a configuration is launched, not what it is."""
    return key == "hydra" or key.startswith(("hydra.", "hydra/"))


def _is_ours(override: Override) -> bool:
    return not is_hydra(override.key_or_group)


def _choices(override: Override) -> list[str]:
    """The override once per value that it sweeps over."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _problems_of_one(
    override: Override, text: str, multirun: bool, searched: Sequence[Path]
) -> Iterable[QloraExpError]:
    key = override.key_or_group
    if any(name in key.split(".") for name in UNSAFE):
        yield ConfigError(f"{key} can't be set", text, "remote code and object construction are off, on purpose")
        return
    if isinstance(override.value(), Glob) and multirun:
        if not _globbed(override):
            yield ConfigError(f"{text} fits no choice", "command line", f"a glob is for a group: {', '.join(groups())}")
        return
    if override.is_sweep_override() and not multirun:
        yield ConfigError(
            f"{key} has several values, and this is one run",
            text,
            f"python -m qlora_exp -m {text} runs them all; in a list use brackets: {key}=[a,b]",
        )
        return
    if not key:
        yield ConfigError("an override without a key", text, "write key=value")
        return
    choices = groups(searched)
    if key in choices:
        yield from _problems_of_choice(override, text, choices[key])
        return
    if override.is_delete():
        yield ConfigError(f"{key} can't be deleted", text, "set it to null where it may be unknown")
        return
    kind = _schema_type(key)
    if isinstance(kind, ConfigError):
        yield kind
        return
    for value in _values(override):
        problem = _problem_of_value(key, value, kind, text)
        if problem is not None:
            yield problem


def _problems_of_choice(override: Override, text: str, valid: list[str]) -> Iterable[ConfigError]:
    key = override.key_or_group
    for value in _values(override):
        name = str(value)
        if name not in valid and not (key == "sweeps" and value is None):
            hint = nearest(name, valid)
            if key == "model" and Path(name).expanduser().exists():
                hint = f"model=local model.path={name}"
            yield ConfigError(
                f"{key} has no choice {name!r}", f"{text} ({'sweeps' if key == 'sweeps' else f'conf/{key}'}/)", hint
            )


def _values(override: Override) -> list[Any]:
    if not override.is_sweep_override():
        value = override.value()
        return [value.text if isinstance(value, QuotedString) else value]
    swept: Any = override.value()
    if isinstance(swept, IntervalSweep):
        return [swept.start, swept.end]
    if isinstance(swept, Glob):
        return _globbed(override)
    return [_plain(text) for text in override.sweep_string_iterator()]


def _plain(text: str) -> Any:
    value = OverridesParser.create().parse_override(f"key={text}").value()
    return value.text if isinstance(value, QuotedString) else value


def _schema_type(key: str) -> Any:
    """The type of ``a.b.c`` in the schema, or the error that names the nearest keys."""
    current: Any = Config
    walked: list[str] = []
    for part in key.split("."):
        if not dataclasses.is_dataclass(current):
            if typing.get_origin(current) is dict:
                return typing.get_args(current)[1]
            return ConfigError(f"{'.'.join(walked)} holds a single value", key, f"{'.'.join(walked)}=VALUE")
        hints = _hints(current)
        if part not in hints:
            where = ".".join(walked) or "the configuration"
            return ConfigError(f"there is no key {key!r}", where, _nearest_key(part, walked, hints))
        walked.append(part)
        current = hints[part]
    return current


def _hints(kind: Any) -> dict[str, Any]:
    """A schema's keys and types; a group that may be absent counts as the group."""
    return {name: _present(hint) for name, hint in typing.get_type_hints(kind).items()}


def _present(hint: Any) -> Any:
    return next((kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)), hint)


def _nearest_key(part: str, walked: list[str], hints: dict[str, Any]) -> str:
    prefix = "".join(f"{name}." for name in walked)
    known = OTHER_NAMES.get(part)
    same_name = [path for path in _all_keys(Config) if path.rsplit(".", 1)[-1] == part]
    if known is not None:
        return f"did you mean {known}?"
    if same_name:
        return f"did you mean {' or '.join(same_name[:3])}?"
    told = nearest(part, hints)
    return told if told.startswith("valid") else nearest(f"{prefix}{part}", [f"{prefix}{name}" for name in hints])


def _all_keys(kind: Any, prefix: str = "") -> list[str]:
    found = []
    for name, hint in _hints(kind).items():
        path = f"{prefix}{name}"
        found.extend(_all_keys(hint, f"{path}.") if dataclasses.is_dataclass(hint) else [path])
    return found


def _problem_of_value(key: str, value: Any, kind: Any, text: str) -> ConfigError | None:
    holder = dataclasses.make_dataclass("Holder", [("value", kind)])
    try:
        node = OmegaConf.structured(holder)
        # An interpolation is resolved by Hydra later; everything else must fit now.
        if not (isinstance(value, str) and "${" in value):
            node.value = value
    except (OmegaConfBaseException, ValueError, TypeError):
        return ConfigError(f"{key} must be {_describe(kind)}, not {value!r}", text, _hint_for(kind, value))
    return None


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        inner = [option for option in typing.get_args(kind) if option is not type(None)]
        return f"{_describe(inner[0])} or null"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    if dataclasses.is_dataclass(kind):
        return "a group of keys"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if origin is list:
        return f"a list, e.g. [{'a,b' if typing.get_args(kind)[0] is str else '1,2'}]"
    if origin is dict:
        return "a mapping, e.g. {a: b}"
    return names.get(kind, str(kind))


def _hint_for(kind: Any, value: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return nearest(str(value), kind.__members__)
    return f"give it {_describe(kind)}"


def _compose_checked(overrides: Sequence[str]) -> Config:
    return checked(compose_raw(overrides))


def compose_raw(overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes, unchecked: values may still be missing, and interpolations are not resolved.

    Raises:
        ConfigError: it can't be composed.
    """
    register()
    own = [text for text in overrides if _is_ours(_parse(text))]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose("config", overrides=[search_path(search_folders(overrides)), *own])
    except (HydraException, OmegaConfBaseException) as error:
        raise _not_composed(error, own) from None


def _not_composed(error: Exception, overrides: Sequence[str] = ()) -> ConfigError:
    refused = re.match(r"Could not override '([\w.]+)'", str(error))
    for text in overrides if refused else ():
        # Overrides are checked against the schema before: what Hydra still refuses is a new entry of a mapping.
        if refused and key_of(text) == refused[1]:
            return ConfigError(
                f"{refused[1]} isn't there yet", text, f"a + in front adds it: {shlex.quote(f'+{text}')}"
            )
    return ConfigError(str(error).splitlines()[0], " ".join(overrides) or "conf/", "qlora-exp validate …")


def _missing(error: MissingMandatoryValue) -> ConfigError:
    key = str(getattr(error, "full_key", None) or "a key")
    return ConfigError(f"{key} must be given", "command line", f"{key}=VALUE")


def checked(config: Any) -> Config:
    """The same checks for a configuration that Hydra composed itself."""
    result = built(config)
    raise_all(plan.check(result))
    return result


def built(config: Any) -> Config:
    """A composed configuration as dataclasses; what must hold between its keys is not looked at.

    Raises:
        ConfigError: a value is missing, or an interpolation names nothing.
    """
    try:
        return typed(config)
    except MissingMandatoryValue as error:
        raise _missing(error) from None
    except OmegaConfBaseException as error:
        raise _not_composed(error) from None


def typed_value(key: str, value: Any) -> Any:
    """``value`` as the schema has it at ``key``: ``nf4`` as its enum, ``1`` as a float where one is asked for.

    Raises:
        ConfigError: there is no such key, or it can't be that.
    """
    kind = _schema_type(key)
    problem = kind if isinstance(kind, ConfigError) else _problem_of_value(key, value, kind, f"{key}={value}")
    if problem is not None:
        raise problem
    node = OmegaConf.structured(dataclasses.make_dataclass("Holder", [("value", kind)]))
    node.value = value
    return typing.cast(Any, OmegaConf.to_object(node)).value


def default_choices() -> dict[str, str]:
    """Group → the choice that conf/config.yaml makes."""
    raw: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"), resolve=False)
    entries = [entry for entry in raw["defaults"] if isinstance(entry, dict)]
    own = groups()
    return {key: name for entry in entries for key, name in entry.items() if key in own and key != "sweeps"}


def read_choice(group: str, name: str) -> Any:
    """The file ``conf/GROUP/NAME.yaml`` as the schema has it, its folder's shared parts included; ``None`` where Hydra
    alone can say what it means: other defaults, interpolations, values still to be given."""
    own = OmegaConf.load(CONF / group / f"{name}.yaml")
    assert isinstance(own, DictConfig)
    parts = own.pop("defaults", ["_self_"])
    if any(not isinstance(part, str) or not (part == "_self_" or part.startswith("_")) for part in parts):
        return None
    schema = _hints(Config)[group]
    files = [own if part == "_self_" else OmegaConf.load(CONF / group / f"{part}.yaml") for part in parts]
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *files))
    except OmegaConfBaseException:
        return None
