"""Reads what version 1 wrote: its names of keys, in records, studies and reports' files, become version 2's.

Every file is upgraded when it is read, and written with the new names when it is next written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

RECORD_KEYS = {
    "fit.kin": "similar_runs",
    "fit.bound_bytes": "limit_bytes",
    "memory.host_reused": "process_reused",
    "speed.untouched_evaluation_seconds": "base_evaluation_seconds",
    "speed.untouched_cached": "base_scores_cached",
    "scores.few_shot.asked": "requested",
    "config.sweep.ladder.most_seeds": "max_seeds",
}
"""Path of a key in a record of version 1 → its name in version 2. A list's path is that of each entry."""

PHASES = {"evaluate untouched": "evaluate base"}
"""``failure.phase`` of version 1 → of version 2."""

SKIPPED_TRIAL_KEYS = {"fit.kin": "similar_runs", "fit.bound_bytes": "limit_bytes"}
LADDER_SETTING_KEYS = {"most_seeds": "max_seeds"}
LR_POLICIES = {"transfer": "carry"}
"""``lr_policy`` of earlier versions → ours."""
SETTING_KEYS = {"sweep.ladder.most_seeds": "sweep.ladder.max_seeds"}
"""Configuration keys of version 1 → of version 2."""

ANSWER_KEYS = {"what_it_takes": "would_settle"}
PREDICTED_MEMORY_KEYS = {
    "bound_bytes": "limit_bytes",
    "refused": "skipped",
    "near_the_edge": "borderline",
    "near_the_edge_out_of_memory": "borderline_out_of_memory",
    "beyond_the_bound": "above_limit",
}


def upgrade_record(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a ``record.json`` of schema version 1 or 2 as version 2. A damaged part stays as it is."""
    if raw.get("schema_version") != 1:
        return raw
    raw = renamed(raw, RECORD_KEYS) | {"schema_version": 2}
    if isinstance(raw.get("failure"), dict):
        raw["failure"] = _with_phase(raw["failure"])
    if isinstance(raw.get("earlier_failures"), list):
        raw["earlier_failures"] = [_with_phase(failure) for failure in raw["earlier_failures"]]
    return raw


def upgrade_study(raw: Any) -> Any:
    """Return a ``study.json`` of any version with the names of version 2."""
    if not isinstance(raw, dict):
        return raw
    raw = _with_lr_policy(renamed(raw, {f"ladder.{old}": new for old, new in LADDER_SETTING_KEYS.items()}))
    for group in ("fixed", "settings", "interpolated"):
        if isinstance(raw.get(group), dict):
            raw[group] = _flat_renamed(raw[group], SETTING_KEYS)
    if isinstance(raw.get("overrides"), list):
        raw["overrides"] = [upgrade_override(text) for text in raw["overrides"]]
    return raw


def stored_settings_of(attributes: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings that a study's storage holds in the study's user ``attributes``; ``None``: none yet."""
    if "settings" in attributes:
        return dict(_with_lr_policy(attributes["settings"]))
    if "asks" not in attributes:
        return None
    flat = _flat_renamed(attributes["asks"], SETTING_KEYS)
    return dict(_with_lr_policy(renamed(flat, {f"ladder.{old}": new for old, new in LADDER_SETTING_KEYS.items()})))


def upgrade_override(text: Any) -> Any:
    """Return an override with its key's and value's new names: ``sweep.ladder.most_seeds=5`` →
    ``sweep.ladder.max_seeds=5``."""
    if isinstance(text, str):
        for old, new in SETTING_KEYS.items():
            text = re.sub(rf"^([+~]*){re.escape(old)}(?==|$)", rf"\g<1>{new}", text)
        for old, new in LR_POLICIES.items():
            text = re.sub(rf"^([+~]*sweep\.ladder\.lr_policy=){old}$", rf"\g<1>{new}", text)
    return text


def upgrade_answers(raw: Any) -> Any:
    """Return a ``ladder.json`` of any version, one ladder or several, with the names of version 2."""
    if not isinstance(raw, dict):
        return raw
    return renamed(raw, ANSWER_KEYS | {f"ladders.{old}": new for old, new in ANSWER_KEYS.items()})


def renamed(raw: Any, names: Mapping[str, str]) -> Any:
    """Return a copy of ``raw`` with the keys at the paths ``names`` renamed.

    A key that is there under its new name, too, keeps the new name's value.

    Example: ``renamed({"fit": {"kin": 3}}, {"fit.kin": "similar_runs"})`` gives ``{"fit": {"similar_runs": 3}}``.
    """
    return _renamed(raw, {tuple(path.split(".")): name for path, name in names.items()})


def _renamed(raw: Any, names: Mapping[tuple[str, ...], str]) -> Any:
    if not names:
        return raw
    if isinstance(raw, list):
        return [_renamed(entry, names) for entry in raw]
    if not isinstance(raw, dict):
        return raw
    result: dict[str, Any] = {}
    for key, value in raw.items():
        new = names.get((key,), key)
        if new == key or new not in raw:
            result[new] = _renamed(
                value, {path[1:]: name for path, name in names.items() if path[1:] and path[0] == key}
            )
    return result


def _flat_renamed(raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in raw.items()}


def _with_lr_policy(raw: Any) -> Any:
    """Return a study's settings with ``ladder.lr_policy`` under its new name."""
    ladder = raw.get("ladder") if isinstance(raw, dict) else None
    if not isinstance(ladder, dict) or ladder.get("lr_policy") not in LR_POLICIES:
        return raw
    return raw | {"ladder": ladder | {"lr_policy": LR_POLICIES[ladder["lr_policy"]]}}


def _with_phase(failure: Any) -> Any:
    if not isinstance(failure, dict):
        return failure
    return failure | {"phase": PHASES.get(str(failure.get("phase")), failure.get("phase"))}
