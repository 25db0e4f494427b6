"""A record as MLflow shows it: params, metrics, tags, a note. Pure functions: no store is opened."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

from qlora_exp.formatting import figure, flatten
from qlora_exp.records.method_name import LORA, is_lora, method_name
from qlora_exp.records.model_card import findings, score_rows
from qlora_exp.records.model_name import model_name
from qlora_exp.records.redaction import redact, redact_text
from qlora_exp.records.types import RunRecord, Scores, Status

RUN_ID_TAG = "qlora_exp.run_id"
NOTE_TAG = "mlflow.note.content"
PARENT_TAG = "mlflow.parentRunId"

MAX_METRIC_KEYS = 30
"""MLflow draws one chart per key; nobody looks through more charts than this."""
SHOWN_DIGITS = 6
"""Significant digits of logged metrics: the UI doesn't round. The record has all digits."""
MAX_PARAM_LENGTH = 500
MAX_TAG_LENGTH = 5000
DIGEST_LENGTH = 12
"""Characters of the data's fingerprint that are logged; MLflow's limit is 36. The record has the whole fingerprint."""
MIB_BYTES = 1024 * 1024

MLFLOW_STATUS = {
    Status.RUNNING: "RUNNING",
    Status.COMPLETED: "FINISHED",
    Status.PRUNED: "KILLED",
    Status.INTERRUPTED: "KILLED",
    Status.OUT_OF_MEMORY: "FAILED",
    Status.DIVERGED: "FAILED",
    Status.FAILED: "FAILED",
}

CURVE_KEYS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "gradient_norm": "train/gradient_norm",
    "validation_loss": "train/validation_loss",
}
"""Field of a curve point → metric."""

CONFIG_PARAMS = (
    "model.family",
    "model.variant",
    "model.id",
    "model.instruct_id",
    "model.path",
    "model.instruct_path",
    "model.adapter",
    "model.revision",
    "quantization.mode",
    "quantization.double_quantization",
    "lora.r",
    "lora.alpha_policy",
    "lora.dropout",
    "lora.dtype",
    "lora.rslora",
    "lora.dora",
    "lora.init",
    "task.name",
    "training.max_steps",
    "training.max_tokens",
    "training.epochs",
    "training.batch_size",
    "training.learning_rate",
    "training.scheduler",
    "training.warmup_ratio",
    "training.weight_decay",
    "training.max_grad_norm",
    "training.optimizer",
    "training.max_length",
    "evaluation.split",
)

SCORE_FIELDS = (
    "loss_per_item",
    "loss",
    "accuracy",
    "accuracy_calibrated",
    "macro_f1",
    "exact_match",
    "rouge_l",
    "token_f1",
    "invalid_answer_rate",
    "token_accuracy",
)

HEADLINE_FIELDS = ("accuracy", "rouge_l", "exact_match", "loss_per_item", "loss")


LORA_LISTS = ("rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters", "loraplus_lr_ratio")
"""Settings of LoRA that most runs leave at null."""


def _listed(value: Any) -> Any:
    """Return a mapping or a list as one text: ``down_proj=16,q_proj=4``."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={entry}" for name, entry in value.items())
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def run_params(record: RunRecord) -> dict[str, str]:
    """Return the configuration's settings and, if there is a plan, what it derived from them. Leaves unset values
    out."""
    config = redact(record.config)
    settings = dict(flatten(config))
    values: dict[str, Any] = {key: settings.get(key) for key in CONFIG_PARAMS}
    if isinstance(config.get("model"), Mapping):
        values["model.family"] = model_name(config["model"])  # the name that tells models apart, not hub or local
    if values["quantization.mode"] not in ("nf4", "fp4"):
        values["quantization.double_quantization"] = None  # only 4-bit modes have it
    if not (lora := is_lora(config)):
        values = {key: value for key, value in values.items() if not key.startswith("lora.")}
    values["method"] = method_name(config) if method_name(config) != LORA else None  # as in earlier versions
    targets = config.get("targets") or {} if lora else {}
    values["targets"] = ",".join(targets.get("modules") or []) or targets.get("set")
    values["seed"] = record.seed if record.seed is not None else config.get("seed")
    if record.plan is not None:
        if lora:
            values |= {"lora.alpha": record.plan.alpha, "lora.scale": record.plan.scale}
            values |= {f"lora.{key}": _listed(config["lora"].get(key)) for key in LORA_LISTS}
        values["task.format"] = record.plan.format
        values["training.micro_batch_size"] = record.plan.micro_batch_size
        values["training.micro_batch_tokens"] = record.plan.micro_batch_tokens
        values["training.kernels"] = record.plan.kernels if record.plan.kernels != "none" else None
        values["quantization.compute_dtype"] = record.plan.compute_dtype
        values["plan.trainable_parameters"] = record.plan.trainable_parameters
        values["plan.target_modules"] = ",".join(record.plan.target_modules)
        values["plan.device"] = record.plan.device
    if record.trial is not None:
        values |= {param_key(key): value for key, value in redact(record.trial.params).items()}
    return {key: shown_text(value) for key, value in values.items() if value is not None}


def run_metrics(record: RunRecord) -> dict[str, float]:
    """Return the final figures by key. Together with the curve they have at most ``MAX_METRIC_KEYS`` keys; the least
    informative are left out."""
    limit = MAX_METRIC_KEYS - len(CURVE_KEYS)
    finite = [(key, value) for key, value in _figures(record) if value is not None and math.isfinite(value)]
    return {key: float(f"{value:.{SHOWN_DIGITS}g}") for key, value in finite[:limit]}


def curve_metrics(record: RunRecord, points: Iterable[Mapping[str, Any]]) -> list[Metric]:
    """Return curve points as step-wise metrics.

    Timestamps depend only on the record's start and the point: its ``seconds``, or its step as milliseconds. So a point
    that is delivered twice is the same point.
    """
    start = milliseconds(record.started_at)
    rows = []
    for point in points:
        step = int(point["step"])
        seconds = point.get("seconds")
        timestamp = start + (round(1000 * seconds) if isinstance(seconds, int | float) else step)
        for name, key in CURVE_KEYS.items():
            value = point.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                rows.append(Metric(key, float(value), timestamp, step))
    return rows


def run_tags(record: RunRecord, parent: str | None = None) -> dict[str, str]:
    """Return the tags by which runs are filtered. ``parent``: the MLflow run id of the trial's study."""
    environment = record.environment
    values = {
        RUN_ID_TAG: record.run_id,
        "qlora_exp.status": record.status.value,
        "qlora_exp.schema_version": record.schema_version,
        "qlora_exp.version": environment.packages.get("qlora-exp"),
        "qlora_exp.config_fingerprint": record.plan.config_fingerprint[:16] if record.plan else None,
        "qlora_exp.goal": record.goal.answer if record.goal else None,
        "git.commit": environment.git_commit,
        "git.dirty": environment.git_dirty,
        "failure.kind": record.failure.kind if record.failure else None,
        "failure.phase": record.failure.phase if record.failure else None,
        "device": environment.device.name or environment.device.kind,
        "mlflow.source.name": "qlora-exp",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": environment.git_commit,
        PARENT_TAG: parent,
    }
    if record.trial is not None:
        for name in ("study", "study_id", "number", "attempt"):
            values[f"qlora_exp.trial.{name}"] = getattr(record.trial, name)
    return {key: shown_text(value) for key, value in values.items() if value is not None}


def run_note(record: RunRecord) -> str:
    """Return the run's summary in Markdown, for the run's page in MLflow."""
    before, after = record.scores.before, record.scores.after
    lines = [_headline(record), ""]
    if (scores := after or before) is not None:
        rows = score_rows(before, after, (*SCORE_FIELDS, "bits_per_byte"))
        lines += [f"| {scores.split}, {scores.items} items | before | after |", "|---|---:|---:|"]
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += [f"- {fact}" for fact in (*findings(record), *_facts(record))]
    if record.failure is not None:
        where = f" in {record.failure.phase}" if record.failure.phase else ""
        lines += ["", f"**{record.failure.kind}**{where}: {record.failure.message[:1000]}"]
        if record.failure.hint:
            lines.append(f"What to do: {record.failure.hint}")
    lines += [f"\n> {warning}" for warning in record.warnings[:10]]
    return shown_text("\n".join(lines).strip(), MAX_TAG_LENGTH)


def dataset_input(record: RunRecord) -> DatasetInput | None:
    """Return the training data's name, fingerprint (as digest) and source; ``None`` before the data was read."""
    if record.data is None:
        return None
    task = redact(record.config.get("task") or {})
    source_type, source = "package", {"uri": "qlora_exp/embedded"}
    if task.get("source") == "hub":
        names = {"path": "hub_id", "config_name": "hub_config", "revision": "hub_revision"}
        source_type, source = "hf", {name: task.get(key) for name, key in names.items()}
    elif task.get("source") == "local":
        source_type, source = "local", {"uri": str(task.get("path"))}
    counts = ("train_items", "validation_items", "test_items", "dropped_rows")
    dataset = Dataset(
        name=record.data.task,
        digest=record.data.fingerprint.removeprefix("sha256:")[:DIGEST_LENGTH],
        source_type=source_type,
        source=json.dumps(source),
        profile=json.dumps({name: getattr(record.data, name) for name in counts}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def milliseconds(moment: str) -> int:
    """Return an ISO 8601 time as MLflow's Unix milliseconds; a time without a zone is UTC."""
    parsed = datetime.fromisoformat(moment)
    return round((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp() * 1000)


def shown_text(value: Any, limit: int | None = MAX_PARAM_LENGTH) -> str:
    """Return a value as redacted text, cut to ``limit`` characters."""
    text = redact_text(f"{value:g}" if isinstance(value, float) else str(value))
    return text if limit is None or len(text) <= limit else f"{text[: limit - 1]}…"


def param_key(key: str) -> str:
    """Return ``key`` without the characters that MLflow refuses in a name: ``+lora.r`` gives ``lora.r``."""
    return re.sub(r"[^\w./ :-]", "", key)


def _figures(record: RunRecord) -> Iterator[tuple[str, float | None]]:
    scores, memory, speed = record.scores, record.memory, record.speed
    yield from _score_figures("score", scores.after, SCORE_FIELDS)
    if scores.after is not None:
        yield from ((f"score/{name}", value) for name, value in scores.after.other.items())
    before = ("loss_per_item", "loss", "accuracy", "accuracy_calibrated", "exact_match", "rouge_l")
    yield from _score_figures("score_before", scores.before, before)
    yield from _score_figures("score_test", scores.test, ("loss_per_item", "accuracy", "exact_match", "rouge_l"))
    yield "memory/peak_train_mib", _mib(memory.peak_train_bytes)
    yield "memory/base_weights_mib", _mib(memory.base_weight_bytes)
    yield "speed/train_tokens_per_second", speed.train_tokens_per_second
    yield "speed/train_seconds", speed.train_seconds
    if scores.forgetting is not None:
        yield "score/forgetting_nats_per_byte", scores.forgetting.difference
    if scores.forgetting_chat is not None:
        yield "score/forgetting_chat_nats_per_byte", scores.forgetting_chat.difference
    if record.baselines is not None:
        yield "baseline/tfidf_accuracy", record.baselines.tfidf_accuracy
        yield "baseline/majority_accuracy", record.baselines.majority_accuracy
    if record.agreement is not None:
        yield "teacher/equal_answers", record.agreement.equal_answers
        yield "teacher/kl_nats_per_token", record.agreement.kl_nats_per_token
    yield "cost/usd", speed.cost_usd
    yield "memory/adapter_mib", _mib(memory.adapter_bytes)
    yield "memory/optimizer_mib", _mib(memory.optimizer_bytes)
    yield "memory/peak_evaluation_mib", _mib(memory.peak_evaluation_bytes)
    for name in ("step_seconds_p50", "evaluation_seconds", "load_seconds"):
        yield f"speed/{name}", getattr(speed, name)


def _score_figures(group: str, scores: Scores | None, fields: Iterable[str]) -> Iterator[tuple[str, float | None]]:
    if scores is not None:
        yield from ((f"{group}/{name}", getattr(scores, name)) for name in fields)


def _headline(record: RunRecord) -> str:
    """Return the note's first line, which the UI shows while the note is folded."""
    before, after = record.scores.before, record.scores.after
    if record.status is not Status.COMPLETED or after is None:
        return f"**{record.status.value.replace('_', ' ').lower()}**"
    name = next((name for name in HEADLINE_FIELDS if getattr(after, name) is not None), None)
    if name is None:
        return "**completed**"
    base_value = figure(getattr(before, name) if before is not None else None)
    return f"{name.replace('_', ' ')} on {after.split}: {base_value} → **{figure(getattr(after, name))}**"


def _facts(record: RunRecord) -> Iterator[str]:
    if record.plan is not None:
        yield f"{record.plan.trainable_parameters:,} trainable of {record.plan.total_parameters:,} parameters"
    if record.memory.peak_train_bytes is not None:
        yield f"peak training memory {figure(_mib(record.memory.peak_train_bytes))} MiB ({record.memory.source})"
    if record.speed.train_tokens_per_second is not None:
        yield f"{record.speed.train_tokens_per_second:,.0f} tokens/s on {record.environment.device.name}"
    if record.environment.git_dirty:
        yield "run from a checkout with uncommitted changes"


def _mib(size: int | None) -> float | None:
    return None if size is None else size / MIB_BYTES
