"""A configuration over its seeds: its settings, its score with an interval, and its cost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from qlora_exp.analysis.comparable import answering_scores
from qlora_exp.records.types import RunRecord, Scores

INTERVAL_CONFIDENCE = 0.95
"""Level of the two-sided intervals over seeds."""

IGNORED_KEYS = (
    *("seed", "name", "output_root", "tracking", "evaluation", "budget", "task", "workers", "sweep"),
    *("training.resume", "training.threads", "training.logging_steps", "training.save_every_steps"),
)
"""Keys in which two runs of one configuration may differ. The task is one: the protocol holds it equal."""

LABEL_KEYS = ("model.variant", "quantization.mode", "lora.r", "targets.set", "training.learning_rate")
"""Keys that every label shows (the learning rate only where it differs)."""

MEASURES = (
    *(
        ("loss_per_item", False),
        ("bits_per_byte", False),
        ("accuracy", True),
        ("exact_match", True),
        ("rouge_l", True),
        ("loss", False),
    ),
)


@dataclass(frozen=True)
class Measure:
    """The score that is compared, and whether higher is better."""

    name: str
    higher_is_better: bool

    @property
    def label(self) -> str:
        unit = {"loss_per_item": "nats per item", "loss": "nats per token", "bits_per_byte": "of the answer"}.get(
            self.name
        )
        return self.name.replace("_", " ") if unit is None else f"{self.name.replace('_', ' ')}, {unit}"

    @property
    def sign(self) -> float:
        """Factor after which a higher score is better."""
        return 1.0 if self.higher_is_better else -1.0

    def of(self, scores: Scores | None) -> float | None:
        value = getattr(scores, self.name) if scores is not None else None
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. ``se`` and ``df`` are ``None`` if no configuration has a second seed."""

    mean: float
    seeds: int
    se: float | None
    df: float | None

    def half_width(self, confidence: float = INTERVAL_CONFIDENCE) -> float | None:
        if self.se is None or self.df is None:
            return None
        return float(stats.t.ppf((1 + confidence) / 2, self.df)) * self.se

    @property
    def low(self) -> float | None:
        half = self.half_width()
        return None if half is None else self.mean - half

    @property
    def high(self) -> float | None:
        half = self.half_width()
        return None if half is None else self.mean + half


@dataclass(frozen=True)
class Configuration:
    """One configuration's finished runs, one per seed. Figures are means over seeds; ``None`` is unknown."""

    label: str
    settings: dict[str, Any]
    """Key → value, for the keys in which the compared configurations differ."""
    runs: tuple[RunRecord, ...]
    quality: Estimate | None
    memory_bytes: float | None
    """Peak of training if it was measured on a GPU, else weights + quantization state + adapter + gradients +
    optimizer."""
    tokens_per_second: float | None
    train_seconds: float | None
    cost_usd: float | None

    @property
    def first(self) -> RunRecord:
        return self.runs[0]


def measure_of(records: Sequence[RunRecord]) -> Measure | None:
    """Return the first score that every run has, else the first that any run has; ``None`` if there is none.

    The order is that of :data:`MEASURES`. Loss per item is skipped if the runs differ in format or model family: it
    counts end tokens, which depend on both.
    """
    qualities = MEASURES[1:] if len({_format_and_family(record) for record in records}) > 1 else MEASURES
    for enough in (all, any):
        for name, higher in qualities:
            measure = Measure(name, higher)
            if records and enough(measure.of(answering_scores(record)) is not None for record in records):
                return measure
    return None


def _format_and_family(record: RunRecord) -> tuple[str, ...]:
    model = record.config.get("model") or {}
    return (str(record.plan.format if record.plan is not None else None), str(model.get("family")))


def configurations(records: Sequence[RunRecord], measure: Measure) -> list[Configuration]:
    """Group the runs into configurations, in the order in which they were first run.

    The variance over seeds is pooled over all of them, with Σ(seeds − 1) degrees of freedom. If a seed was run twice,
    its last run counts.
    """
    settings = [configuration_settings(record) for record in records]
    varying = varying_keys(settings)
    by_key: dict[tuple[Any, ...], dict[int | None, RunRecord]] = defaultdict(dict)
    for record, flat in zip(records, settings, strict=True):
        by_key[tuple(str(flat.get(key)) for key in varying)][record.seed] = record
    values = {
        key: [value for run in runs.values() if (value := measure.of(answering_scores(run))) is not None]
        for key, runs in by_key.items()
    }
    sd, df = pooled_sd(values.values())
    source = _memory_source(records)
    return [_configuration(tuple(runs.values()), varying, values[key], sd, df, source) for key, runs in by_key.items()]


def best_on_validation(candidates: Sequence[Configuration], measure: Measure) -> Configuration | None:
    """Return the configuration that is best on validation, to be scored on test; ``None`` if none has a score."""

    def on_validation(configuration: Configuration) -> float:
        known = [value for run in configuration.runs if (value := measure.of(run.scores.after)) is not None]
        return measure.sign * float(np.mean(known)) if known else -math.inf

    return max((c for c in candidates if c.quality is not None), key=on_validation, default=None)


def configuration_settings(record: RunRecord) -> dict[str, Any]:
    """Return dotted key → value of the settings that define a configuration; ``format`` as it was resolved."""
    return {**dict(_flat(record.config, "")), "format": record.plan.format if record.plan is not None else None}


def varying_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ."""
    keys = dict.fromkeys(key for flat in settings for key in flat)
    return [key for key in keys if len({str(flat.get(key)) for flat in settings}) > 1]


def model_state_bytes(record: RunRecord) -> float | None:
    """Return weights + quantization state + adapter + gradients + optimizer; ``None`` if one is unknown."""
    memory = record.memory
    parts = (
        *(memory.base_weight_bytes, memory.quantization_state_bytes, memory.adapter_bytes),
        *(memory.gradient_bytes, memory.optimizer_bytes),
    )
    return None if None in parts else float(sum(part for part in parts if part is not None))


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean; ``None`` if any value is unknown, or there is none."""
    known = list(values)
    present = [value for value in known if value is not None]
    return float(np.mean(present)) if present and len(present) == len(known) else None


def display_settings(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(map(str, value)) if isinstance(value, list) else "unset" if value is None else str(value)


def _configuration(
    runs: tuple[RunRecord, ...],
    varying: Sequence[str],
    values: Sequence[float],
    sd: float | None,
    df: int,
    source: str,
) -> Configuration:
    flat = configuration_settings(runs[0])
    known = len(values) > 0
    quality = Estimate(
        float(np.mean(values)), len(values), None if sd is None else sd / math.sqrt(len(values)), df or None
    ) if known else None  # fmt: skip
    return Configuration(
        label=_label(flat, varying),
        settings={key: flat.get(key) for key in varying},
        runs=runs,
        quality=quality,
        memory_bytes=mean(_memory(run, source) for run in runs),
        tokens_per_second=mean(run.speed.train_tokens_per_second for run in runs),
        train_seconds=mean(run.speed.train_seconds for run in runs),
        cost_usd=mean(run.speed.cost_usd for run in runs),
    )


def _label(flat: Mapping[str, Any], varying: Sequence[str]) -> str:
    format_part = [str(flat.get("format"))] if "format" in varying else []
    parts = [
        str(flat.get("model.variant")),
        *format_part,
        str(flat.get("quantization.mode")),
        f"r {flat.get('lora.r')}",
        display_settings(flat.get("targets.modules") or flat.get("targets.set")),
    ]
    implied = ("model.template_tokens_trained", "quantization.", "targets.")
    others = [key for key in varying if key not in (*LABEL_KEYS[:4], "format") and not key.startswith(implied)]
    names = {"training.learning_rate": "lr", "lora.alpha": "alpha"}
    parts += [f"{names.get(key, key.rsplit('.', 1)[-1])} {display_settings(flat.get(key))}" for key in others]
    return " · ".join(parts)


def pooled_sd(samples: Iterable[Sequence[float]]) -> tuple[float | None, int]:
    """Return the standard deviation over seeds, pooled over the samples, and its degrees of freedom.

    ``(None, 0)`` without a second seed.
    """
    squares, df = 0.0, 0
    for sample in samples:
        if len(sample) > 1:
            squares += float(np.var(sample) * len(sample))
            df += len(sample) - 1
    return (math.sqrt(squares / df), df) if df else (None, 0)


def _memory_source(records: Sequence[RunRecord]) -> str:
    measured = all(
        record.memory.source == "cuda_allocated" and record.memory.peak_train_bytes is not None for record in records
    )
    return "peak" if measured else "state"


def _memory(record: RunRecord, source: str) -> float | None:
    return record.memory.peak_train_bytes if source == "peak" else model_state_bytes(record)


def _flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, entry in value.items():
        name = f"{prefix}{key}"
        if name in IGNORED_KEYS:
            continue
        if isinstance(entry, Mapping):
            yield from _flat(entry, f"{name}.")
        else:
            yield name, entry
