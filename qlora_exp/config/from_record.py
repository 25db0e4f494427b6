"""The overrides that compose a recorded run's configuration again, with changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_exp.config.choices import choices, groups
from qlora_exp.config.compose import compose
from qlora_exp.config.overrides import escape_interpolations, hydra_value
from qlora_exp.config.schema import MAPPING_KEYS, to_plain
from qlora_exp.errors import RecordError
from qlora_exp.formatting import flatten
from qlora_exp.records.redaction import REDACTED
from qlora_exp.records.types import RunRecord

GROUP_KEYS = {"model": "family", "quantization": "mode", "method": "kind", "targets": "set", "task": "source"}
"""The key of each group that names its file in conf/."""


def recorded_overrides(record: RunRecord, changes: Sequence[str] = ()) -> list[str]:
    """Return the overrides that give the record's configuration, then ``changes``.

    Only differences from the defaults are named, so that the line stays readable. A changed group
    (``quantization=fp32``) takes its own values, without the recorded ones of that group. Redacted values keep their
    defaults.

    Raises:
        RecordError: the record has no configuration.
        ConfigError: it no longer composes with this version.
    """
    if not isinstance(record.config.get("model"), Mapping):
        raise RecordError("the record has no configuration", record.run_id, "start a new run with its overrides")
    changed = {change.lstrip("+~").partition("=")[0] for change in changes}
    chosen, needed = [], []
    for group, name_key in GROUP_KEYS.items():
        values = record.config.get(group, {})
        file = next((choice for choice in choices(group) if choice.name == str(values.get(name_key))), None)
        if file is None or group in changed:
            continue
        chosen.append(f"{group}={file.name}")
        # What a chosen file leaves to the user (???): without it nothing composes.
        left_out = [key for key, value in file.keys.items() if value == "???"]
        needed += [f"{group}.{key}={hydra_value(escape_interpolations(values.get(key)))}" for key in left_out]
    composed = to_plain(compose([*chosen, *needed]))
    given = {text.partition("=")[0] for text in needed} | changed
    derived = ("model.checkpoints",) if record.config["model"].get("family") == "hub" else ()  # from the model's ids
    differing = [
        f"{path}={hydra_value(escape_interpolations(value))}"
        for path, value in _different(record.config, composed)
        if path not in given
        and path.partition(".")[0] not in changed
        and not path.removeprefix("++").startswith(derived)
    ]
    # Composed with the recorded values first: with a new one, what depends on it may not compose without the rest.
    return [*chosen, *(text for text in needed if text.partition("=")[0] not in changed), *differing, *changes]


def flat_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Return e.g. ``task=local lora.r=8`` for ``{"task": "local", "lora": {"r": 8}}``; group choices first, as in
    Hydra."""
    groups_first = sorted(flatten(settings, mappings=MAPPING_KEYS), key=lambda leaf: leaf[0] not in groups())
    return [f"{path}={hydra_value(value)}" for path, value in groups_first]


def _different(recorded: Mapping[str, Any], composed: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in recorded.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if key not in composed:
            # An open mapping such as task.splits; at the top level, a setting that this version doesn't know.
            if prefix:
                yield f"++{path}", value
        elif isinstance(value, Mapping) and isinstance(composed[key], Mapping):
            yield from _different(value, composed[key], path)
        elif value != composed[key] and REDACTED not in str(value):
            yield path, value
