"""Settings typed as options, as other tools have them: ``--learning_rate 1e-4`` in place of ``learning_rate=1e-4``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from qlora_exp.errors import ConfigError


def options_error(error: Any, arguments: Sequence[str]) -> ConfigError | None:
    """Return the error for settings typed as options, with the command that works; ``None``: ``error`` is another one,
    or its command has no settings.

    Example: ``run --model hub --lora.r 16`` gives ``qlora-exp run model=hub lora.r=16``.
    """
    name, command = getattr(error, "option_name", None), getattr(error.ctx, "command", None) if error.ctx else None
    parameters = {parameter.name: parameter for parameter in getattr(command, "params", ())}
    if type(error).__name__ != "NoSuchOption" or not {"overrides", "arguments"} & set(parameters):
        return None
    option = re.split("=", str(name), maxsplit=1)[0]
    key = option.lstrip("-").replace("-", "_")
    if not option.startswith("--") or not re.fullmatch(r"\w+(\.\w+)*", key):
        return None
    if not _is_setting(key):
        return None
    known = {text: parameter for parameter in parameters.values() for text in parameter.opts}
    corrected = " ".join(map(shlex.quote, ["qlora-exp", *_as_settings(arguments, known)]))
    return ConfigError(f"there is no option {option}: settings are written KEY=VALUE", "command line", corrected)


def _is_setting(key: str) -> bool:
    from qlora_exp.config.other_tools import counterpart, has_key
    from qlora_exp.config.schema import Config

    return has_key(Config, key) or counterpart(key) is not None


def _as_settings(arguments: Sequence[str], known: dict[str, Any]) -> list[str]:
    """Return the arguments with each unknown ``--key value`` as our setting, and another tool's key as ours."""
    from qlora_exp.config.other_tools import setting_text, settings_here

    words, rest = [], list(arguments)
    pairs: list[tuple[str, str]] = []
    while rest:
        word = rest.pop(0)
        option, sign, value = word.partition("=")
        if not option.startswith("--") or option in ("--", "--help"):
            words.append(word)
        elif option in known:
            words.append(word)
            if not sign and not known[option].is_flag and rest:
                words.append(rest.pop(0))
        else:
            if not sign:
                values = []
                while rest and not rest[0].startswith("-") and "=" not in rest[0]:
                    values.append(rest.pop(0))
                value = f"[{','.join(values)}]" if len(values) > 1 else values[0] if values else "true"
            pairs.append((option.lstrip("-").replace("-", "_"), value))
    others = dict(pairs)
    settings: dict[str, Any] = {}
    for key, value in pairs:
        settings |= settings_here(key, value, others)
    return [*words, *(shlex.split(setting_text(key, value))[0] for key, value in settings.items())]
