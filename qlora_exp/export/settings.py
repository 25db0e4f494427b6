"""Merges conf/export.yaml with the caller's settings, typed and checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp.config.schema import ComputeDtype, ExportConfig
from qlora_exp.errors import ConfigError, nearest
from qlora_exp.paths import CONF

BLOCK_TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
FORMATS = ("adapter", "merged", *BLOCK_TYPES)


def load_settings(changes: Mapping[str, Any]) -> ExportConfig:
    """Return the defaults, overridden by ``changes`` (``None`` keeps a default).

    Raises:
        ConfigError: a key or format is unknown, or a number is out of range.
    """
    overrides = {key: value for key, value in changes.items() if value is not None}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ExportConfig), OmegaConf.load(CONF / "export.yaml"), overrides)
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0], "export", "qlora-exp export --help") from None
    assert isinstance(settings, ExportConfig)
    for problem in _problems(settings):
        raise problem
    return settings


def _problems(settings: ExportConfig) -> list[ConfigError]:
    unknown = [name for name in settings.formats if name not in FORMATS]
    problems = [ConfigError(f"there is no format {name!r}", "--formats", nearest(name, FORMATS)) for name in unknown]
    if not settings.formats:
        problems.append(ConfigError("there is nothing to export", "--formats", f"some of {', '.join(FORMATS)}"))
    if settings.dtype not in (ComputeDtype.bfloat16, ComputeDtype.float16):
        what = f"a merged model is written in 16 bits, not as {settings.dtype.value}"
        problems.append(ConfigError(what, "--dtype", "bfloat16 or float16"))
    if not 0 <= settings.tolerance < 1:
        problems.append(
            ConfigError(f"the tolerance is {settings.tolerance:g}", "--tolerance", "a share: 0.03 is 3 points")
        )
    positive = ("context_tokens", "generated_tokens", "phone_file_bytes", "phone_memory_bytes")
    for name in positive:
        if getattr(settings, name) < 1:
            problems.append(ConfigError(f"{name} is {getattr(settings, name)}", "conf/export.yaml", "at least 1"))
    for name in ("check_items", "phone_usd", "usd_per_hour"):
        if (getattr(settings, name) or 0) < 0:
            problems.append(ConfigError(f"{name} is {getattr(settings, name)}", "qlora-exp export", "0 or more"))
    return problems
