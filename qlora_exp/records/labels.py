"""Short names for runs: what varies among them, e.g. ``r16 lr0.0028 s3``, and the shortest part of an id."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from qlora_exp.formatting import flatten
from qlora_exp.records.method_name import LORA, method_name
from qlora_exp.records.model_name import model_name, model_place
from qlora_exp.records.redaction import redact
from qlora_exp.records.types import RunRecord
from qlora_exp.records.unread_settings import said_in_a_word, unread_prefixes

MIN_ID_LENGTH = 4
"""Characters of a short id: an id's last four are random."""
LABEL_DIGITS = (2, 3, 4, 6, 17)
"""Significant digits of a number in a label: the first that keep different values apart. One with at most three is
shown as it is."""

SPELLINGS = {
    "model": "",
    "model.family": "",
    "model.variant": "",
    "model.id": "",
    "model.path": "",
    "quantization": "",
    "quantization.mode": "",
    "task": "",
    "task.name": "",
    "method": "",
    "method.kind": "",
    "lora.r": "r",
    "lora.alpha": "alpha",
    "lora.alpha_policy": "alpha=",
    "lora.dropout": "dropout",
    "targets": "",
    "targets.set": "",
    "training.learning_rate": "lr",
    "training.batch_size": "batch",
    "training.max_length": "length",
    "training.max_steps": "steps",
    "training.max_tokens": "tokens",
    "training.epochs": "epochs",
    "seed": "s",
    "evaluation.split": "",
    "ships": "",
    "qat": "",
    "teacher": "",
    "kept": "",
}
"""Setting → what precedes its value in a label, in the order of labels. Others read ``name=value`` and come last."""

GROUPS = {
    "model.": "model.family",
    "quantization.": "quantization.mode",
    "targets.": "targets.set",
    "task.": "task.name",
}
"""Group of settings → the one that names the choice. A setting that only follows from the choice isn't in labels."""

NOT_NAMED = (
    *("name", "output_root", "tracking.", "budget.", "notify.", "sweep.", "workers."),
    *("model.checkpoints", "model.template_tokens_trained", "training.logging_steps", "training.save_every_steps"),
    *("training.resume", "training.threads", "training.device", "training.evaluate_every_steps", "evaluation."),
    *("training.micro_batch", "training.gradient_checkpointing", "training.kernels", "training.padding_free"),
    *("training.engine", "training.sleep", "task.goal", "task.max_", "task.columns", "task.splits", "task.labels"),
)
"""Beginnings of a configuration's keys that don't change what is trained, or that follow from the model. Those of a
study's axes are in labels all the same, and the split, by which pilots differ."""

MAX_TEXT = 24
"""Characters of a text in a label."""

IN_THE_NAME = tuple(f"model.{key}" for key in ("id", "instruct_id", "path", "instruct_path", "adapter"))
"""Settings that a model's name says."""

IMPLIED = {"evaluation.split": "test"}
"""Values that a label leaves out: a pilot's label has ``validation``."""


def labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return for each run what varies among them, e.g. ``r16 lr0.0028 s3``.

    Args:
        rows: per run its record (with a ``config``), its configuration, or its trial's params; nested or dotted.

    If nothing varies, the label has the settings that describe a run: model, quantization, rank, targets, rate, seed;
    or all of a trial's params. Runs with the same settings are numbered: ``r16 s3``, ``r16 s3 (2)``. No label is empty.
    """
    settings = _with_distinct_models(rows, [named_settings(row) for row in rows])
    keys = varying_keys(settings) or _describing_keys(settings)
    texts, names = {key: _texts([row.get(key) for row in settings]) for key in keys}, _names(keys)
    found = [_joined(_part(key, row.get(key), texts[key], names) for key in keys) for row in settings]
    counts: dict[str, int] = {}
    for index, label in enumerate(found):
        counts[label] = counts.get(label, 0) + 1
        if counts[label] > 1:
            found[index] = f"{label} ({counts[label]})"
    return found


def label(row: Mapping[str, Any]) -> str:
    """Return one run's label from its trial's params, all of them: it doesn't depend on other trials.

    Example: ``label({"lora.r": 16, "seed": 3})`` is ``r16 s3``.
    """
    settings = named_settings(row)
    names = _names(settings)
    return _joined(_part(key, settings[key], _texts([settings[key]]), names) for key in _in_order(settings))


def shared_settings(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what describes all of the runs, e.g. ``embedded base nf4 all_linear``; "" if nothing does."""
    settings = [named_settings(row) for row in rows]
    varying = set(varying_keys(settings))
    keys = [key for key in _describing_keys(settings) if key not in varying] if settings else []
    names = _names(keys)
    return _joined((_part(key, settings[0].get(key), _texts([settings[0].get(key)]), names) for key in keys), "")


def run_name(record: RunRecord) -> str:
    """Return a run's name: of a trial, the values of the study's axes (after ``name``, if one is set)."""
    if record.trial is None or not record.trial.params:
        return record.name
    given = record.config.get("name")
    words = ("SYNTHETIC" if record.synthetic else "", str(given) if given else "", label(redact(record.trial.params)))
    return " ".join(word for word in words if word)


def named_settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that can be in a run's label: dotted key → value. ``row`` as for :func:`labels`."""
    config = row["config"] if isinstance(row.get("config"), Mapping) else row
    trial = row.get("trial")
    axes = trial["params"] if isinstance(trial, Mapping) and isinstance(trial.get("params"), Mapping) else {}
    settings = {key.lstrip("+"): value for key, value in flatten(config)}
    modules = settings.pop("targets.modules", None)
    if modules is not None:
        settings["targets.set"] = modules  # the list takes precedence
    if settings.get("lora.alpha") is not None and settings.get("lora.alpha_policy") == "fixed":
        del settings["lora.alpha_policy"]  # alpha's own value says it
    if not any(isinstance(value, Mapping) for value in config.values()):
        return settings  # a trial's params
    unread = unread_prefixes(config)
    settings = {key: value for key, value in settings.items() if not key.startswith(unread)}
    if (method := method_name(config)) != LORA:
        settings["method.kind"] = method
    settings |= said_in_a_word(config)
    if isinstance(model := config.get("model"), Mapping) and "family" in model:
        settings["model.family"] = model_name(model, short=True)
        settings = {key: value for key, value in settings.items() if key not in IN_THE_NAME}
    kept = {"evaluation.split", *axes}
    return {key: value for key, value in settings.items() if key in kept or not key.startswith(NOT_NAMED)}


def varying_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ among the runs, in the order of labels."""
    keys = dict.fromkeys(key for row in settings for key in row)
    values = {key: [_comparable(row.get(key)) for row in settings] for key in keys}
    varying = {key for key in keys if len(set(values[key])) > 1}
    for group, choice in GROUPS.items():
        if choice in varying:
            for key in [key for key in varying if key.startswith(group) and key != choice]:
                if len(set(zip(values[choice], values[key], strict=True))) == len(set(values[choice])):
                    varying.remove(key)
    return _in_order(varying)


def short_id(run_id: str, among: Iterable[str] = ()) -> str:
    """Return the shortest end of ``run_id`` by which commands find the run ``among`` these ids (its own may be one).

    Example: ``20261130-120000-embedded-base-nf4-r8-3f2a`` is ``3f2a``.
    """
    others = [other for other in among if other != run_id]
    for length in range(min(MIN_ID_LENGTH, len(run_id)), len(run_id)):
        end = run_id[-length:]
        if not end.startswith("-") and not any(other.startswith(end) or other.endswith(end) for other in others):
            return end
    return run_id


def _in_order(keys: Iterable[str]) -> list[str]:
    order = list(SPELLINGS)

    def place(key: str) -> tuple[int, str]:
        return (order.index(key), "") if key in SPELLINGS else (len(order), key)

    return sorted(keys, key=place)


def _describing_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    describing = [
        *("model", "model.family", "model.variant", "quantization", "quantization.mode", "method.kind", "lora.r"),
        *("targets", "targets.set", "training.learning_rate", "seed"),
    ]
    if any("model.family" in row for row in settings):
        return [key for key in describing if any(row.get(key) is not None for row in settings)]
    return _in_order({key for row in settings for key in row})  # a trial's params


def _comparable(value: Any) -> Any:
    """Return a hashable value that is equal for equal settings; 8 and 8.0 are the same, 1 and true aren't."""
    return (isinstance(value, bool), value) if isinstance(value, str | int | float | None) else repr(value)


def _texts(values: Iterable[Any]) -> dict[Any, str]:
    """Return each value's text, with so many digits that different numbers have different texts."""
    known = {_comparable(value): value for value in values if value is not None}
    for digits in LABEL_DIGITS:
        texts = {key: value_text(value, digits) for key, value in known.items()}
        if len(set(texts.values())) == len(texts):
            break
    return texts


def value_text(value: Any, digits: int = LABEL_DIGITS[0]) -> str:
    """Return a setting's value for people: a number that a person wrote as it is, any other with ``digits`` digits."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return "+".join(value_text(entry, digits) for entry in value)
    if isinstance(value, float) and math.isfinite(value):
        short = f"{value:.3g}"
        text = short if float(short) == value else f"{value:.{digits}g}"
        return text.replace("e-0", "e-").replace("e+0", "e")
    return str(value)


def _names(keys: Iterable[str]) -> dict[str, str]:
    """Return for each key without a spelling the shortest end that no other of ``keys`` has: of ``a.ratio`` and
    ``b.ratio`` the whole, of ``training.scheduler`` alone its last part."""
    others = [key for key in keys if key not in SPELLINGS]
    parts = {key: key.split(".") for key in others}
    names = {}
    for key in others:
        ends = [".".join(parts[key][-count:]) for count in range(1, len(parts[key]) + 1)]
        is_only = (end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others if other != key))
        names[key] = next(is_only, key)
    return names


def _with_distinct_models(rows: Sequence[Mapping[str, Any]], settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``settings`` with the parent folders in the names of models in different folders of the same name."""
    places: dict[str, dict[str, list[int]]] = {}
    for index, row in enumerate(rows):
        config = row["config"] if isinstance(row.get("config"), Mapping) else row
        model = config.get("model")
        if isinstance(model, Mapping) and model.get("path") and (place := model_place(model)) is not None:
            places.setdefault(str(settings[index].get("model.family")), {}).setdefault(place, []).append(index)
    for name, folders in places.items():
        parts = {place: PurePath(place).parts for place in folders}
        depth = next((n for n in range(2, 9) if len({part[-n:] for part in parts.values()}) == len(parts)), 0)
        for place, indices in folders.items() if len(folders) > 1 and depth else ():
            for index in indices:
                settings[index]["model.family"] = "/".join([*parts[place][-depth:-1], name])
    return settings


def _part(key: str, value: Any, texts: Mapping[Any, str], names: Mapping[str, str]) -> str:
    if value is None or IMPLIED.get(key) == value:
        return ""
    text = texts[_comparable(value)]
    if key in ("model.id", "model.path"):
        text = _last_part(text)
    text = " ".join(text.split()) if isinstance(value, str) else text
    text = text if len(text) <= MAX_TEXT or not isinstance(value, str) else f"{text[: MAX_TEXT - 1]}…"
    return f"{SPELLINGS[key]}{text}" if key in SPELLINGS else f"{names[key]}={text}"


def _last_part(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _joined(parts: Iterable[str], nothing: str = "default") -> str:
    return " ".join(part for part in parts if part) or nothing
