"""One function that replaces what differs from run to run and from machine to machine: :func:`masked`.

Masked are measured times, memory, energy and prices of measured time; dates; run ids; folders; host, process and
versions; sentences. A field that is masked keeps its name and mostly the kind of its value: ``<number>``, ``<text>``,
``null``.
Everything that arithmetic or a seed determines stays: counts, sizes in bytes, fingerprints, losses and scores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MEASURED = re.compile(
    r"""(?:^|[./_])(?:
      (?:load|train|evaluation|base_evaluation|total|other|queue|last)_seconds
    | predicted_(?:train|other)_seconds\w* | predicted_train_usd | step_seconds_p\d+ | seconds | seconds_left
    | train_tokens_per_second | tokens_per_second | model_flops_utilisation | energy_joules | joules | cost_usd
    | resident_after_imports_bytes | peak_(?:load|train|evaluation)_bytes | peak_train_reserved_bytes
    | train_working_set_bytes | memory_bytes | free_bytes | limit_bytes | corrected_bytes | record_digest
    | cost/usd | memory/peak_\w+_mib | cpu_cores | torch_threads
    | pid | start_ticks | boot_id | pid_namespace | host | duration_ms | usd_interval | start_time | end_time
    )$""",
    re.VERBOSE,
)
"""The end of a field's name, or of an MLflow key, whose number a clock or the machine says."""
OF_THE_MACHINE = re.compile(r"(?:^|\.)(?:environment|process|packages)\.|\.tags\.device$|\.saves\.\w+_(?:seconds|usd)$")
"""Fields of which only the names are kept: whether there is a value depends on the machine, too."""
WORDS = re.compile(r"(?:^|\.)(?:sentence|warnings|message|hint|traceback|would_settle|mlflow\.note\.content)$")
"""Fields that hold sentences, which may be rewritten."""
TEXTS = (
    (re.compile(r"\d{8}-\d{6}(-[A-Za-z0-9_.-]+)?-[0-9a-f]{4}\b"), r"<time>\1-<hex>"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d+)?(?:[+-]\d\d:\d\d|Z)?"), "<time>"),
    (re.compile(r"\b\d{4}-\d\d-\d\d \d\d:\d\d\b"), "<time>"),
    (re.compile(r"\b\d[\d.:]* s(?= elapsed\b)|(?<= took )\d[\d.:]* s\b"), "<seconds> s"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "<id>"),
    (re.compile(r"(?<=/logs/)[^/]+-\d+-(\d+\.log)$"), r"<host>-<process>-\1"),
)
"""Parts of texts: run ids (their telling middle stays), points in time, MLflow's ids."""
KEPT_TEXTS = re.compile(r"(?:^|\.)(?:\w*fingerprint|schema_version|date|chat_date)$")


def masked(value: Any, folders: Mapping[str, str] = {}, key: str = "") -> Any:
    """``value`` without what differs between two runs of the same command.

    Args:
        value: JSON types.
        folders: folder → what stands for it, e.g. ``{"/tmp/x": "<outputs>"}``.
        key: where ``value`` is, as ``speed.total_seconds``.
    """
    if isinstance(value, Mapping):
        return {
            masked(str(name), folders): masked(item, folders, f"{key}.{name}" if key else str(name))
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked(item, folders, key) for item in value]
    if OF_THE_MACHINE.search(key):
        return "<machine>"
    if WORDS.search(key) and isinstance(value, str):
        return "<words>"
    if MEASURED.search(key):
        return kind_of(value)
    if isinstance(value, str) and not KEPT_TEXTS.search(key):
        for folder, name in folders.items():
            value = value.replace(folder, name)
        for pattern, replacement in TEXTS:
            value = pattern.sub(replacement, value)
    return value


def kind_of(value: Any) -> Any:
    """What is left of a masked leaf."""
    if value is None or isinstance(value, bool):
        return value
    return "<number>" if isinstance(value, int | float) else "<text>"
